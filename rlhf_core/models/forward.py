"""The forwards of prepared models: a `PackedBatch` in, (B, T) tensors out.

    hidden states of the stream -> the rows that predict completion tokens -> a head (log-probs, values or scores)

`prepare` finds out once how a model is to be run; the `load_*` functions do so for every model that they load:

- packed, the stream as it is, or padded, one right-padded row per sequence, for models that do not support the stream;
- through the fused head, or, where a model's logits are more than a linear head with a scale and a softcap, through the
  model's own forward.

All ways give the same numbers up to rounding. B completions, M completion tokens, T tokens in the longest completion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.batch import PackedBatch
from rlhf_core.losses.pairs import Pairs
from rlhf_core.models.heads import lm_head, score
from rlhf_core.models.predictions import predict
from rlhf_core.models.route import Layout, Route, prepare, route_of
from rlhf_core.models.trunk import Rows, device_of, evaluating, own_logits, trunk_of, trunk_states
from rlhf_core.ops.logprobs import linear_token_loss, logits_logprobs, vocab_statistics

__all__ = [
    "Layout",
    "PolicyOutputs",
    "Route",
    "SummedLoss",
    "completion_states",
    "device_of",
    "evaluating",
    "last_states",
    "pair_logprobs",
    "policy_outputs",
    "prepare",
    "route_of",
    "sequence_scores",
    "summed_loss",
    "token_logprobs",
    "token_scores",
    "token_values",
    "trunk_of",
]


@dataclass(frozen=True)
class PolicyOutputs:
    """Outputs of one forward of a policy at the completion tokens; each (B, T), zero outside the completion mask."""

    logprobs: Tensor
    """float32, of the completion tokens."""
    entropy: Tensor | None = None
    """In nats; with gradient only by `entropy_gradient=True`."""
    values: Tensor | None = None
    """V(prompt and completion before the token)."""
    kl: Tensor | None = None
    """Exact divergence from the reference of the whole distribution that predicts the token."""
    log_sum_sq_probs: Tensor | None = None
    """log sum_v p_v^2, the log of the expected probability of a sampled token, without gradient."""
    mean_logprob: Tensor | None = None
    """Mean over the vocabulary of log p, with gradient."""
    is_argmax: Tensor | None = None
    """Bool, whether the token is the most likely one."""
    router_loss: Tensor | None = None
    """Load-balancing loss of the forward, a scalar with gradient."""


class SummedLoss(NamedTuple):
    """What `summed_loss` returns."""

    loss: Tensor
    """Scalar; call backward on it, once."""
    logprobs: Tensor
    """(B, T) without gradient, zero outside `batch.loss_mask`."""
    router_loss: Tensor | None
    """Scalar with gradient; None unless requested."""


def token_logprobs(model: PreTrainedModel, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
    """Return the log-prob of every completion token given all tokens before it, (B, T) float32, zero outside the mask.

    Raises:
        ValueError: for a model that was not prepared, as every function of this module does.
    """
    return policy_outputs(model, batch, temperature=temperature).logprobs


def policy_outputs(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    value_head: Callable[[Tensor], Tensor] | None = None,
    reference: PreTrainedModel | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    mean_logprob: bool = False,
    is_argmax: bool = False,
    kl_kind: str = "reverse",
    log_sum_sq_probs: bool = False,
    router_loss: bool = False,
) -> PolicyOutputs:
    """Return log-probs, and on request other outputs, from one forward of the policy.

    Args:
        value_head: maps (M, H) states to (M,) values, such as a `ValueHead`.
        reference: a prepared model of the same vocabulary, run without gradient, for the exact divergence `kl`.
        temperature: divides the logits of both models; use the one the completions were sampled with.
        entropy: also return entropies, without gradient. entropy_gradient: with gradient, for an entropy bonus; this
            stores the (M, V) logits.
        mean_logprob: also return the mean of log p over the vocabulary, for label smoothing.
        is_argmax: also return whether each token is the one that greedy decoding takes. Costs one more product of the
            head, as `log_sum_sq_probs` does, which WPO's weights need.
        kl_kind: "reverse" for KL(policy || reference), "forward" for KL(reference || policy), or "js".
        router_loss: also return the load-balancing loss of a mixture of experts.

    Raises:
        ValueError: for `router_loss=True` and a model without such a loss.
    """
    batch = batch.to(device_of(model))
    predictions = predict(model, batch, with_states=value_head is not None, router_loss=router_loss)
    if entropy_gradient:
        predictions = predictions.with_logits()
    logprobs, entropies = predictions.logprobs(temperature, entropy=entropy)
    if entropy_gradient:
        assert predictions.logits is not None
        entropies = vocab_statistics(predictions.logits, temperature=temperature).entropy
    kl = None
    if reference is not None:
        with torch.no_grad():
            ref_predictions = predict(reference, batch)
        kl = predictions.kl(ref_predictions, kind=kl_kind, temperature=temperature)
    sum_sq = predictions.log_sum_sq_probs(temperature) if log_sum_sq_probs else None
    mean = predictions.mean_logprobs(logprobs, temperature) if mean_logprob else None
    top = predictions.is_argmax() if is_argmax else None
    return PolicyOutputs(
        logprobs=batch.scatter(logprobs),
        entropy=None if entropies is None else batch.scatter(entropies),
        values=None if value_head is None else batch.scatter(value_head(predictions.hidden)),
        kl=None if kl is None else batch.scatter(kl),
        log_sum_sq_probs=None if sum_sq is None else batch.scatter(sum_sq),
        mean_logprob=None if mean is None else batch.scatter(mean),
        is_argmax=None if top is None else batch.scatter(top),
        router_loss=predictions.router_loss,
    )


def summed_loss(
    model: PreTrainedModel,
    batch: PackedBatch,
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    router_loss: bool = False,
) -> SummedLoss:
    """Compute a loss that is a sum over tokens, with the gradient of the LM head computed block by block.

    The loss of any subset of the tokens can be computed alone, so each block of the head is finished at once, in three
    matrix products and the memory of one block. `token_logprobs` must store all blocks for the backward pass, or
    compute them again.

    Args:
        loss: called as loss(logprobs, mask) with some of the completion tokens, both (1, r); returns a scalar and
            stats, as the functions in `losses` do. It must be divided by nothing but a fixed normalizer: otherwise the
            parts do not add up.
        weights: (B,) of completions; the loss then gets weights=(1, r), those of its tokens.
        temperature: divides the logits.
        router_loss: also return the load-balancing loss of a mixture of experts.

    Returns:
        The loss, the log-probs and the router loss. Only the tokens in `batch.loss_mask` reach the LM head.

    Raises:
        ValueError: for `router_loss=True` and a model without such a loss.
    """
    route = route_of(model)
    supervised = batch.loss_mask.flatten()[batch.slots]  # (M,), read on the batch's own device, before it is moved
    kept = None if bool(supervised.all()) else supervised.nonzero().squeeze(1)
    if weights is not None:
        lengths = batch.loss_mask.sum(-1)
        weights = weights.to(lengths.device).repeat_interleave(lengths).to(device_of(model))
    batch = batch.to(device_of(model))
    slots, targets = batch.slots, batch.targets
    if kept is not None:
        kept = kept.to(batch.slots.device)
        slots, targets = slots[kept], targets[kept]
    if route.fused_head:
        states, balance = trunk_states(model, batch, route.layout, "predict", router_loss=router_loss)
        head = lm_head(model)
        total, logprobs = linear_token_loss(
            states if kept is None else states[kept],
            head.weight,
            targets,
            partial(_block_loss, loss, weights),
            bias=head.bias,
            temperature=temperature,
            scale=head.scale,
            softcap=head.softcap,
        )
    else:
        logits, _, balance = own_logits(model, batch, router_loss=router_loss)
        logprobs, _ = logits_logprobs(logits if kept is None else logits[kept], targets, temperature=temperature)
        total = _block_loss(loss, weights, logprobs, slice(None))
    flat = logprobs.new_zeros(batch.loss_mask.numel()).index_copy(0, slots, logprobs.detach())
    return SummedLoss(total, flat.view(batch.loss_mask.shape), balance)


def _block_loss(
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]], weights: Tensor | None, logprobs: Tensor, rows: slice
) -> Tensor:
    """Return the loss of the tokens in `rows`, whose log-probs are (r,), with their part of the weights."""
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    if weights is None:
        return loss(logprobs[None], mask[None])[0]
    return loss(logprobs[None], mask[None], weights=weights[rows][None])[0]


def pair_logprobs(
    policy: PreTrainedModel, reference: PreTrainedModel | None, batch: PackedBatch, *, kl: bool = False
) -> Pairs:
    """Return the log-probs of preference pairs, for `preference_loss`. The mask of each side is `batch.loss_mask`'s.

    Args:
        reference: run without gradient; None leaves its log-probs out.
        batch: 2P completions in the order chosen, rejected, chosen, rejected, ..., as `preference_batches` makes them.
        kl: also return the exact KL(reference || policy) at each token, with gradient (TDPO).

    Returns:
        P pairs, each tensor (P, T).

    Raises:
        ValueError: for an odd number of completions, and for `kl=True` without a reference.
    """
    if batch.num_completions % 2:
        raise ValueError(f"num_completions={batch.num_completions}: expected pairs of a chosen and a rejected one")
    if kl and reference is None:
        raise ValueError("kl=True: expected a reference")
    outputs = policy_outputs(policy, batch, reference=reference if kl else None, kl_kind="forward")
    ref_logprobs = None
    if reference is not None:
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, batch)
    mask = batch.loss_mask.to(device_of(policy))
    return Pairs.interleaved(outputs.logprobs, mask, ref_logprobs=ref_logprobs, kl=outputs.kl)


def token_values(value_model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return V(prompt, completion so far) before each completion token, (B, T) float32, zero outside the mask.

    The value at t does not depend on token t: it is computed from the state that predicts this token.

    Raises:
        ValueError: for a model without a score head.
    """
    batch = batch.to(device_of(value_model))
    return batch.scatter(score(value_model, completion_states(value_model, batch)))


def sequence_scores(reward_model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the reward model's score of each completion, (B,) float32; (B, N) for an ensemble of N heads.

    It is computed from the state of the completion's last token, found by length and never by a token id.

    Raises:
        ValueError: for a model without a score head.
    """
    return score(reward_model, last_states(reward_model, batch))


def token_scores(reward_model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the score after each completion token, (B, T) float32, zero outside the mask.

    For process reward models, whose score of a step is the one after its last token. After a completion's last token it
    equals `sequence_scores`.

    Raises:
        ValueError: for a model without a score head.
    """
    batch = batch.to(device_of(reward_model))
    return batch.scatter(score(reward_model, _states(reward_model, batch, "own")))


def completion_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the last hidden states that predict each completion token, (M, H), completion by completion."""
    return _states(model, batch, "predict")


def last_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the last hidden states of each completion's last token, (B, H)."""
    return _states(model, batch, "last")


def _states(model: PreTrainedModel, batch: PackedBatch, rows: Rows) -> Tensor:
    return trunk_states(model, batch.to(device_of(model)), route_of(model).layout, rows).states
