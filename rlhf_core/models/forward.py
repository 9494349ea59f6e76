"""The one way through a model: a `PackedBatch` in, (B, T) tensors out.

    hidden states of the stream -> the rows that predict completion tokens -> a head (log-probs, values or scores)

Three routes give the same numbers. *Packed* runs the stream as it is. *Padded* runs one right-padded row a sequence,
for models that cannot read the stream. Both hand only completion rows to the fused head; a model whose logits are more
than a linear head with a scale and a softcap is asked for its own logits instead. On the first use of a model a small
probe runs both layouts and both heads and compares them, so a model that would go wrong silently is caught.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlhf_core.batch import PackedBatch, PaddedBatch
from rlhf_core.models.attention import PACKED, packed_forward
from rlhf_core.models.routers import router_loss, watch_of
from rlhf_core.ops.kl import kl_divergence, linear_kl
from rlhf_core.ops.logprobs import linear_logprobs, linear_token_loss, logits_logprobs, vocab_statistics

Layout = Literal["auto", "packed", "padded"]
logger = logging.getLogger("rlhf_core.models")


@dataclass(frozen=True)
class PolicyOutputs:
    """What one forward of a policy says about the completion tokens; each (B, T), zero outside the mask."""

    logprobs: Tensor
    entropy: Tensor | None = None  # nats, without gradient unless it was asked for
    values: Tensor | None = None  # V(prompt and completion before the token)
    kl: Tensor | None = None  # KL(policy || reference) of the whole distribution at the token
    log_sum_sq_probs: Tensor | None = None  # log of the chance that two draws of the token agree, without gradient
    mean_logprob: Tensor | None = None  # mean over the vocabulary of log p, with gradient, for label smoothing
    likeliest: Tensor | None = None  # bool, whether no other token was likelier


def token_logprobs(
    model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, layout: Layout = "auto"
) -> Tensor:
    """Log-probability of every completion token given all before it, (B, T) float32, zero outside the mask."""
    return policy_outputs(model, batch, temperature=temperature, layout=layout).logprobs


def policy_outputs(
    model: nn.Module,
    batch: PackedBatch,
    *,
    value_head: Callable[[Tensor], Tensor] | None = None,
    reference: nn.Module | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    mean_logprob: bool = False,
    likeliest: bool = False,
    kl_kind: str = "reverse",
    agreement: bool = False,
    layout: Layout = "auto",
) -> PolicyOutputs:
    """Log-probs, and on request more that hangs on the same hidden states, from one forward of the policy.

    Args:
        value_head: (M, H) states to (M,) values, such as a `ValueHead`.
        reference: a model of the same vocabulary, without gradient, that the exact KL is taken to (`linear_kl`).
        temperature: divides both models' logits: give the one the completions were sampled with.
        entropy: also the entropies, a gauge. entropy_gradient: with their gradient, for a bonus; the (M, V) logits of
            the completion tokens are then there at once.
        mean_logprob: also the mean of log p over the vocabulary, which label smoothing needs.
        likeliest: also whether each token is the one that greedy decoding takes; costs one more product of the head.
        kl_kind: "reverse", or "forward" for KL(reference || policy), or "js".
        agreement: also `log_sum_sq_probs`, what WPO weighs by; one more product of the head as well.

    Raises ValueError where `layout="packed"` is asked of a model that cannot take it.
    """
    route = find_route(model, layout)
    batch = batch.to(device_of(model))
    logits = None
    if route.fused_head:
        states = completion_states(model, batch, route)
        logits = _head_logits(model, states) if entropy_gradient else None
    else:
        states, logits = _own_logits(model, batch, with_states=value_head is not None)
    if logits is None:
        logprobs, entropies = linear_logprobs(
            states, targets=batch.targets, temperature=temperature, entropy=entropy, **_lm_head(model)
        )
    else:
        logprobs, entropies = logits_logprobs(logits, batch.targets, temperature=temperature, entropy=entropy)
    if entropy_gradient:
        entropies = vocab_statistics(logits, temperature=temperature).entropy
    kl = None
    if reference is not None:
        options = dict(kind=kl_kind, temperature=temperature)
        kl = _exact_kl(model, reference, batch, states, logits, options=options, layout=layout)
    agreements = _agreement(model, states, logits, temperature) if agreement else None
    mean = _mean_logprobs(model, states, logits, batch.targets, logprobs, temperature) if mean_logprob else None
    top = _likeliest(model, states, logits, batch.targets) if likeliest else None
    return PolicyOutputs(
        logprobs=batch.scatter(logprobs),
        entropy=batch.scatter(entropies) if entropies is not None else None,
        values=batch.scatter(value_head(states)) if value_head is not None else None,
        kl=batch.scatter(kl) if kl is not None else None,
        log_sum_sq_probs=batch.scatter(agreements) if agreements is not None else None,
        mean_logprob=batch.scatter(mean) if mean is not None else None,
        likeliest=batch.scatter(top) if top is not None else None,
    )


def _mean_logprobs(
    model: nn.Module,
    states: Tensor | None,
    logits: Tensor | None,
    targets: Tensor,
    logprobs: Tensor,
    temperature: float,
) -> Tensor:
    """(M,) mean over the vocabulary of log p, with its gradient.

    A mean of log-probs is a mean of logits, less one number that the target's log-prob has in it too:
    mean_v log p_v = log p_target + mean_v z_v - z_target. Where logits are linear in the state, their mean is the
    state's product with the mean of the head's rows, and no other logit is needed.
    """
    head = _lm_head(model)
    if logits is None and head["softcap"] is None:
        weight = head["weight"].float()
        gap = states.float() @ weight.mean(0) - (states.float() * weight[targets]).sum(-1)
        if head["bias"] is not None:
            gap = gap + head["bias"].float().mean() - head["bias"].float()[targets]
        return logprobs + head["scale"] * gap / temperature
    logits = _head_logits(model, states) if logits is None else logits
    return vocab_statistics(logits, temperature=temperature).mean_logprob


@torch.no_grad()
def _agreement(model: nn.Module, states: Tensor | None, logits: Tensor | None, temperature: float) -> Tensor:
    """(M,) log sum_v p_v^2, from the logits or, a block of rows at a time, from states."""
    size = 512
    blocks = logits.split(size) if logits is not None else (_head_logits(model, part) for part in states.split(size))
    return torch.cat([vocab_statistics(block, temperature=temperature).log_sum_sq_probs for block in blocks])


@torch.no_grad()
def _likeliest(model: nn.Module, states: Tensor | None, logits: Tensor | None, targets: Tensor) -> Tensor:
    """(M,) bool: no other token has a larger logit. A block of rows at a time where the logits are not there."""
    size = 512
    blocks = logits.split(size) if logits is not None else (_head_logits(model, part) for part in states.split(size))
    return torch.cat([block.argmax(-1) for block in blocks]) == targets


def _exact_kl(
    model: nn.Module,
    reference: nn.Module,
    batch: PackedBatch,
    states: Tensor | None,
    logits: Tensor | None,
    *,
    options: dict[str, Any],
    layout: Layout,
) -> Tensor:
    """(M,) divergence of `options["kind"]` from the states of two linear heads of one kind, from logits otherwise."""
    route = find_route(reference, layout)
    with torch.no_grad():
        if route.fused_head:
            ref_states, ref_logits = completion_states(reference, batch, route), None
        else:
            ref_states, ref_logits = _own_logits(reference, batch)
    if logits is None and ref_logits is None:
        ours, theirs = _lm_head(model), _lm_head(reference)
        shared = dict(scale=ours["scale"], softcap=ours["softcap"])
        if shared == dict(scale=theirs["scale"], softcap=theirs["softcap"]):
            biases = dict(policy_bias=ours["bias"], ref_bias=theirs["bias"])
            heads = (states, ours["weight"], ref_states, theirs["weight"])
            return linear_kl(*heads, **options, **biases, **shared)[0]
    logits = _head_logits(model, states) if logits is None else logits
    with torch.no_grad():
        ref_logits = _head_logits(reference, ref_states) if ref_logits is None else ref_logits
    return kl_divergence(logits, ref_logits, **options)[0]


def summed_loss(
    model: nn.Module,
    batch: PackedBatch,
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    layout: Layout = "auto",
) -> tuple[Tensor, Tensor]:
    """A loss in which each token stands for itself, without ever keeping what the head's gradient is made of.

    Such a loss can be taken of any part of the tokens, and the parts add up. So each block of the LM head is done with
    at once, in three matrix products and the memory of one block, where `token_logprobs` must keep all blocks for the
    backward or compute them again.

    Args:
        loss: called as loss(logprobs, mask) with some of the completion tokens, both (1, r); returns a scalar and its
            stats, as the functions in `losses` do. Divided by anything but a fixed normalizer, parts do not add up.
        weights: (B,) of completions; the loss then gets weights=(1, r), those of its tokens.
        temperature: divides the logits.

    Returns:
        the sum, a scalar to call backward on, once; and the log-probs, (B, T) without gradient. Both are of the tokens
        in `batch.loss_mask` alone: the others never reach the head, and have 0.
    """
    route = find_route(model, layout)
    learned = batch.loss_mask.flatten()[batch.slots]  # (M,), looked at where the batch was made: no wait for a device
    kept = None if bool(learned.all()) else learned.nonzero().squeeze(1)
    if weights is not None:
        lengths = batch.loss_mask.sum(-1)
        weights = weights.to(lengths.device).repeat_interleave(lengths).to(device_of(model))
    batch = batch.to(device_of(model))
    slots, targets = batch.slots, batch.targets
    if kept is not None:
        kept = kept.to(batch.slots.device)
        slots, targets = slots[kept], targets[kept]

    def part(logprobs: Tensor, rows: slice = slice(None)) -> Tensor:
        options = {} if weights is None else {"weights": weights[rows][None]}
        return loss(logprobs[None], torch.ones_like(logprobs, dtype=torch.bool)[None], **options)[0]

    if route.fused_head:
        states = completion_states(model, batch, route)
        states = states if kept is None else states[kept]
        options = dict(temperature=temperature, **_lm_head(model))
        total, logprobs = linear_token_loss(states, targets=targets, loss=part, **options)
    else:
        logits = _own_logits(model, batch)[1]
        logprobs, _ = logits_logprobs(logits if kept is None else logits[kept], targets, temperature=temperature)
        total = part(logprobs)
    whole = logprobs.new_zeros(batch.loss_mask.numel()).index_copy(0, slots, logprobs.detach())
    return total, whole.view(batch.loss_mask.shape)


def token_values(value_model: nn.Module, batch: PackedBatch, *, layout: Layout = "auto") -> Tensor:
    """V(prompt, completion so far) before each completion token, (B, T), from a model with a scalar score head.

    The value at t may not see token t: it is read where that token is predicted.
    """
    batch = batch.to(device_of(value_model))
    states = completion_states(value_model, batch, find_route(value_model, layout))
    return batch.scatter(_score(value_model, states))


def sequence_scores(reward_model: nn.Module, batch: PackedBatch, *, layout: Layout = "auto") -> Tensor:
    """The reward model's score of each completion, (B,), read at its last token (found by length, never by id).

    An ensemble of N heads gives (B, N).
    """
    batch = batch.to(device_of(reward_model))
    return _score(reward_model, last_states(reward_model, batch, find_route(reward_model, layout)))


def token_scores(reward_model: nn.Module, batch: PackedBatch, *, layout: Layout = "auto") -> Tensor:
    """The score as it stands at each completion token, that token seen, (B, T): of a process reward model, which reads
    it where a step ends. At a completion's last token it is `sequence_scores`.
    """
    batch = batch.to(device_of(reward_model))
    return batch.scatter(_score(reward_model, _own_states(reward_model, batch, find_route(reward_model, layout))))


def pair_logprobs(
    policy: nn.Module,
    reference: nn.Module | None,
    batch: PackedBatch,
    *,
    layout: Layout = "auto",
    kl: bool = False,
    agreement: bool = False,
) -> dict[str, Tensor]:
    """Log-probs and masks of preference pairs, by the keywords that `preference_loss` takes.

    `batch` holds chosen, rejected, chosen, rejected, ... as `preference_batches` makes them. Each tensor is (B, T) for
    B pairs. The reference runs without gradient; with None its log-probs are left out.

    Args:
        kl: also `chosen_kl`, `rejected_kl`, the exact KL(reference || policy) at each token, with gradient (TDPO).
        agreement: also `chosen_log_sum_sq_probs` and the rejected one's, which `wpo_weights` is made of.

    Raises ValueError for a batch that is not of pairs, and for a kl without a reference.
    """
    if batch.num_completions % 2:
        raise ValueError(f"{batch.num_completions} completions do not make pairs of chosen and rejected")
    if kl and reference is None:
        raise ValueError("kl=True: expected a reference to take it to")
    options = dict(reference=reference if kl else None, kl_kind="forward", agreement=agreement)
    outputs = policy_outputs(policy, batch, layout=layout, **options)
    both = dict(logprobs=outputs.logprobs, mask=batch.loss_mask.to(device_of(policy)))
    if reference is not None:
        with torch.no_grad():
            both["ref_logprobs"] = token_logprobs(reference, batch, layout=layout)
    both |= dict(kl=outputs.kl, log_sum_sq_probs=outputs.log_sum_sq_probs)
    return {
        f"ref_{side}_logprobs" if name == "ref_logprobs" else f"{side}_{name}": tensor[start::2]
        for name, tensor in both.items()
        for start, side in enumerate(("chosen", "rejected"))
        if tensor is not None
    }


# ---------------------------------------------------------------------------------------------------------- the trunk


def completion_states(model: nn.Module, batch: PackedBatch, route: Route) -> Tensor:
    """(M, H) last hidden states of the rows that predict each completion token."""
    return _states(model, batch, route, "predict_rows")


def last_states(model: nn.Module, batch: PackedBatch, route: Route) -> Tensor:
    """(B, H) last hidden states at each completion's last token."""
    return _states(model, batch, route, "last_rows")


def _own_states(model: nn.Module, batch: PackedBatch, route: Route) -> Tensor:
    """(M, H) last hidden states at each completion token itself."""
    return _states(model, batch, route, "own_rows")


def _own_rows(batch: PackedBatch, rows: PackedBatch | PaddedBatch) -> Tensor:
    """(M,) row of each completion token: the one that predicts the token after it, or the completion's last one."""
    lasts = batch.completion_mask.sum(-1).cumsum(0) - 1
    return rows.predict_rows.roll(-1).index_copy(0, lasts, rows.last_rows)


def _states(model: nn.Module, batch: PackedBatch, route: Route, rows: str) -> Tensor:
    trunk = trunk_of(model)
    if route.layout == "packed":
        with packed_forward():
            hidden = _run(
                model,
                trunk,
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                layout=batch.layout,
            ).last_hidden_state
        return hidden[0].index_select(0, _own_rows(batch, batch) if rows == "own_rows" else getattr(batch, rows))
    padded = batch.padded()
    output = _run(model, trunk, input_ids=padded.input_ids, attention_mask=padded.attention_mask)
    kept = _own_rows(batch, padded) if rows == "own_rows" else getattr(padded, rows)
    return output.last_hidden_state.flatten(0, 1).index_select(0, kept)


def _own_logits(model: nn.Module, batch: PackedBatch, *, with_states: bool = False) -> tuple[Tensor | None, Tensor]:
    """(M, H) states and (M, V) logits by the model's own ordinary forward: the definition, and the last resort."""
    padded = batch.padded()
    output = _run(
        model,
        model,
        input_ids=padded.input_ids,
        attention_mask=padded.attention_mask,
        output_hidden_states=with_states,
    )
    states = output.hidden_states[-1].flatten(0, 1).index_select(0, padded.predict_rows) if with_states else None
    return states, output.logits.flatten(0, 1).index_select(0, padded.predict_rows)


def _run(model: nn.Module, part: nn.Module, **inputs: Any) -> Any:
    """A forward of the model's trunk or of all of it, its routers watched where somebody asked for their balance."""
    watch = watch_of(model)
    output = part(**inputs, use_cache=False, **({} if watch is None else {"output_router_logits": True}))
    if watch is not None:
        watch.note(output, inputs.get("attention_mask"))
    return output


def trunk_of(model: nn.Module) -> nn.Module:
    """The transformer under the head(s)."""
    return model.base_model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _score(model: nn.Module, states: Tensor) -> Tensor:
    """A classifier's one label on the given rows, (R,) float32; (R, N) of an ensemble's N labels."""
    head = score_head(model)
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no `score` head; load it with load_reward_model or load_value_model"
        )
    return head(states).squeeze(-1).float()


def score_head(model: nn.Module) -> nn.Module | None:
    """The linear head on each state that a classifier's score comes from; None where there is none.

    Some families name it `classifier` when it reads every token; by that name, read once a sequence, it sits on more.
    """
    other = getattr(model, "classifier", None) if "TokenClassification" in type(model).__name__ else None
    return getattr(model, "score", other)


def _lm_head(model: nn.Module) -> dict:
    """The LM head as `linear_logprobs` takes it: weight, bias, and the scale and softcap some families put on it."""
    head, config = model.get_output_embeddings(), model.config
    # Cohere multiplies its logits, Granite and MiniCPM divide; Gemma caps. Anything else is caught by the probe.
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    return dict(
        weight=head.weight,
        bias=getattr(head, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _head_logits(model: nn.Module, states: Tensor) -> Tensor:
    """(M, H) states -> the (M, V) logits that `linear_logprobs` spares, by the definition it has of them."""
    head = _lm_head(model)
    logits = head["scale"] * torch.nn.functional.linear(states, head["weight"], head["bias"])
    return logits if head["softcap"] is None else head["softcap"] * (logits / head["softcap"]).tanh()


# ---------------------------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class Route:
    """How a model is to be run."""

    layout: Literal["packed", "padded"]
    fused_head: bool


@dataclass(frozen=True)
class _Verdict:
    packed_fault: str | None  # why the packed layout is wrong for this model, None where it is right
    fused_head: bool


_verdicts: weakref.WeakKeyDictionary[nn.Module, _Verdict] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def find_route(model: nn.Module, layout: Layout = "auto") -> Route:
    """The route for this model, probing it on first use. Only `"auto"` falls back; `"packed"` raises ValueError."""
    if layout not in ("auto", "packed", "padded"):
        raise ValueError(f"layout={layout!r}: expected auto, packed or padded")
    if model not in _verdicts:
        with router_loss(model, 0.0):  # nobody who watches its routers means the probe
            _verdicts[model] = _probe(model)
    verdict = _verdicts[model]
    if layout == "packed" and verdict.packed_fault:
        raise ValueError(
            f"layout='packed' was asked for, but {type(model).__name__} cannot take it: {verdict.packed_fault}. "
            "Use layout='auto' or 'padded'."
        )
    if layout == "auto" and verdict.packed_fault and model not in _warned:
        _warned.add(model)
        logger.warning("%s runs in the padded layout: %s", type(model).__name__, verdict.packed_fault)
    packed = layout != "padded" and not verdict.packed_fault
    if packed and model.config._attn_implementation != PACKED:  # somebody chose another one since the probe
        model.set_attn_implementation(PACKED)
    return Route("packed" if packed else "padded", verdict.fused_head)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode again after."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def _probe(model: nn.Module) -> _Verdict:
    """Run a small batch both ways and compare; leaves the model switched to packed attention where that is right."""
    with evaluating(model):
        batch = _probe_batch(model).to(device_of(model))
        padded_states = completion_states(model, batch, Route("padded", fused_head=False))
        fused_head = True
        if model.get_output_embeddings() is not None:
            own, _ = logits_logprobs(_own_logits(model, batch)[1], batch.targets)
            fused, _ = linear_logprobs(padded_states, targets=batch.targets, **_lm_head(model))
            fused_head = _difference(fused[:, None], own[:, None]) <= _tolerance(model)
            # An adapter on the head says nothing yet when it is new, and everything later.
            fused_head = fused_head and not hasattr(model.get_output_embeddings(), "lora_A")
        return _Verdict(_packed_fault(model, batch, padded_states), fused_head)


def _packed_fault(model: nn.Module, batch: PackedBatch, padded_states: Tensor) -> str | None:
    """Switch the model to packed attention and try it; on any fault switch it back and say what was wrong."""
    config = model.config.get_text_config()
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked, which the packed layout does not know"
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(PACKED)
        with packed_forward() as windows:
            states = completion_states(model, batch, Route("packed", fused_head=False))
        difference = _difference(states, padded_states)
        if not windows:
            fault = "the layout reaches none of its layers"
        elif (window := _sliding_window(config)) and window not in windows:
            fault = f"its attention does not say that its window is {window} tokens"
        elif difference > _tolerance(model):
            fault = f"hidden states differ from the padded forward by {difference:.2g} of their size"
        else:
            return None
    except Exception as error:  # whatever a foreign model throws, the padded layout still serves it
        fault = f"{type(error).__name__}: {error}"
    if before not in (None, PACKED):  # a failed choice stays in the config otherwise
        model.set_attn_implementation(before)
    return fault


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a layer with a sliding window sees, None where no layer has one."""
    layers = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if layers is None or "sliding_attention" in layers else None


def _probe_batch(model: nn.Module) -> PackedBatch:
    """Two prompts, with two completions and with one, longer than a small sliding window if the model has one."""
    window = _sliding_window(model.config.get_text_config()) or 0
    prompt_length = 9 + (window if window <= 64 else 0)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def draw(length):
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    return PackedBatch.pack([(draw(prompt_length), [draw(7), draw(4)]), (draw(3), [draw(5)])], share=True)


def _difference(tensor: Tensor, truth: Tensor) -> float:
    """How far (rows, columns) are from the truth in the median column, as a share of the column's own size.

    Not of the largest entry: trained models have a few columns a hundred times the size of the rest, beside which a
    wrong mask would look like rounding. Infinite where anything is not finite.
    """
    tensor, truth = tensor.float(), truth.float()
    columns = (tensor - truth).norm(dim=0) / truth.norm(dim=0).clamp(min=1e-6)
    return columns.median().item() if columns.isfinite().all() else float("inf")


def _tolerance(model: nn.Module) -> float:
    """What rounding may cost: far below what a wrong mask or a wrong position does."""
    return 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 3e-2
