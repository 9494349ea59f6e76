"""The distributions that predict the completion tokens of a batch, and what is computed from them.

M rows predict the M completion tokens. They are held as hidden states (M, H), from which the fused operations compute
without storing logits, or as logits (M, V) where the model's head is more than linear or a gradient needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.batch import PackedBatch
from rlhf_core.models.heads import LMHead, lm_head
from rlhf_core.models.route import route_of
from rlhf_core.models.trunk import own_logits, trunk_states
from rlhf_core.ops.kl import kl_divergence, linear_kl
from rlhf_core.ops.logprobs import linear_logprobs, logits_logprobs, vocab_statistics

# Rows whose logits are computed at once where a statistic needs them and they are not stored.
_BLOCK_ROWS = 512


def predict(
    model: PreTrainedModel, batch: PackedBatch, *, with_states: bool = False, router_loss: bool = False
) -> Predictions:
    """Run the model on the batch by its route.

    Args:
        with_states: keep hidden states also where the model's own logits are used.
        router_loss: also compute the load-balancing loss of a mixture of experts.
    """
    route = route_of(model)
    if route.fused_head:
        states, balance = trunk_states(model, batch, route.layout, "predict", router_loss=router_loss)
        return Predictions(model, batch.targets, states=states, router_loss=balance)
    output = own_logits(model, batch, with_states=with_states, router_loss=router_loss)
    return Predictions(model, batch.targets, output.states, output.logits, output.router_loss)


@dataclass(frozen=True)
class Predictions:
    """M distributions over the vocabulary, one for each completion token. `states` or `logits` is there, or both."""

    model: PreTrainedModel
    targets: Tensor  # (M,) the completion tokens
    states: Tensor | None = None  # (M, H)
    logits: Tensor | None = None  # (M, V)
    router_loss: Tensor | None = None

    @property
    def head(self) -> LMHead:
        return lm_head(self.model)

    def with_logits(self) -> Predictions:
        """Return the same with logits, from which everything is computed then."""
        return self if self.logits is not None else replace(self, logits=self.head.logits(self.hidden))

    @property
    def hidden(self) -> Tensor:
        """`states`, which must be there."""
        assert self.states is not None
        return self.states

    def logprobs(self, temperature: float, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return log-probs of the targets, (M,) float32, and entropies in nats, (M,) without gradient, or None."""
        if self.logits is not None:
            return logits_logprobs(self.logits, self.targets, temperature=temperature, entropy=entropy)
        head = self.head
        return linear_logprobs(
            self.hidden,
            head.weight,
            self.targets,
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            temperature=temperature,
            entropy=entropy,
        )

    def mean_logprobs(self, logprobs: Tensor, temperature: float) -> Tensor:
        """Return the mean over the vocabulary of log p, (M,) with gradient, given the log-probs of the targets.

        A mean of log-probs is a mean of logits minus a constant that the target's log-prob contains too:
        mean_v log p_v = log p_target + mean_v z_v - z_target. Where logits are linear in the state, their mean is the
        product of the state with the mean row of the head, so no other logit is needed.
        """
        head = self.head
        if self.logits is None and head.softcap is None:
            states, weight = self.hidden.float(), head.weight.float()
            gap = states @ weight.mean(0) - (states * weight[self.targets]).sum(-1)
            if head.bias is not None:
                gap = gap + head.bias.float().mean() - head.bias.float()[self.targets]
            return logprobs + head.scale * gap / temperature
        logits = head.logits(self.hidden) if self.logits is None else self.logits
        return vocab_statistics(logits, temperature=temperature).mean_logprob

    @torch.no_grad()
    def log_sum_sq_probs(self, temperature: float) -> Tensor:
        """Return log sum_v p_v^2, (M,) without gradient."""
        blocks = [vocab_statistics(block, temperature=temperature).log_sum_sq_probs for block in self._logit_blocks()]
        return torch.cat(blocks)

    @torch.no_grad()
    def is_argmax(self) -> Tensor:
        """Return whether no other token has a larger logit than the target, (M,) bool."""
        return torch.cat([block.argmax(-1) for block in self._logit_blocks()]) == self.targets

    def _logit_blocks(self) -> Iterator[Tensor]:
        if self.logits is not None:
            yield from self.logits.split(_BLOCK_ROWS)
        else:
            head = self.head
            yield from (head.logits(states) for states in self.hidden.split(_BLOCK_ROWS))

    def kl(self, reference: Predictions, *, kind: str, temperature: float) -> Tensor:
        """Return the divergence from the reference's distributions at the same tokens, (M,), of a kind of `linear_kl`.

        From hidden states where both have linear heads with equal scale and softcap, from logits otherwise. Only the
        policy gets a gradient.
        """
        if self.logits is None and reference.logits is None:
            ours, theirs = self.head, reference.head
            if (ours.scale, ours.softcap) == (theirs.scale, theirs.softcap):
                return linear_kl(
                    self.hidden,
                    ours.weight,
                    reference.hidden,
                    theirs.weight,
                    policy_bias=ours.bias,
                    ref_bias=theirs.bias,
                    kind=kind,
                    temperature=temperature,
                    scale=ours.scale,
                    softcap=ours.softcap,
                )[0]
        logits = self.with_logits().logits
        with torch.no_grad():
            ref_logits = reference.with_logits().logits
        assert logits is not None and ref_logits is not None
        return kl_divergence(logits, ref_logits, kind=kind, temperature=temperature)[0]
