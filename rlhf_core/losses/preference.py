"""Preference losses: learning from pairs without a reward model.

Every loss sees the same numbers, and is one entry of `PREFERENCE_LOSSES`. A new one is a function and a decorator:

    @register_preference_loss("mine")
    def mine(pairs: PairTerms, *, beta, label_smoothing):
        return -F.logsigmoid(beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio))
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlhf_core.ops.masked import masked_sum


@dataclass(frozen=True)
class PairTerms:
    """What a preference loss is made of, each (B,): sums of log-probs over the completion's tokens."""

    chosen_logprob: Tensor
    rejected_logprob: Tensor
    chosen_log_ratio: Tensor  # minus the reference's; the log-prob itself where the loss needs no reference
    rejected_log_ratio: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """One entry of the table: `function(terms, *, beta, label_smoothing)` gives the loss of each pair, (B,)."""

    function: Callable[..., Tensor]
    needs_reference: bool = True
    paired: bool = True
    length_normalized: bool = False  # mean log-probs over tokens instead of sums


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}


def register_preference_loss(name: str, *, needs_reference: bool = True, length_normalized: bool = False) -> Callable:
    """Decorator that puts a loss into the table. Raises ValueError for a name that is taken."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in PREFERENCE_LOSSES:
            raise ValueError(f"a preference loss named {name!r} is registered already")
        PREFERENCE_LOSSES[name] = PreferenceLoss(
            function, needs_reference=needs_reference, length_normalized=length_normalized
        )
        return function

    return register


def preference_loss(
    name: str,
    *,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The named loss, the mean over pairs.

    Args:
        *_logprobs: (B, T) token log-probs under the policy; ref_*: under the reference, None where the loss needs none.
        *_mask: (B, T) bool, True = completion token.
        beta: strength of the pull to the reference; more than 0.
        label_smoothing: probability that a label is wrong, 0 <= label_smoothing < 0.5.

    Returns:
        the loss, a scalar, and stats over pairs: `accuracy` of the implicit rewards beta * log-ratio (a tie counts
        half), their `margin`, `chosen_reward` and `rejected_reward`, and the mean `chosen_logprob`, `rejected_logprob`.

    Raises ValueError for an unknown name, a missing reference or a parameter out of range.
    """
    entry = _lookup(name)
    if not beta > 0:
        raise ValueError(f"beta={beta}: expected more than 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: expected 0 <= label_smoothing < 0.5")
    if entry.needs_reference and (ref_chosen_logprobs is None or ref_rejected_logprobs is None):
        raise ValueError(f"loss {name!r} needs ref_chosen_logprobs and ref_rejected_logprobs")

    def reduce(logprobs: Tensor, mask: Tensor) -> Tensor:
        total = masked_sum(logprobs, mask, -1)
        return total / mask.sum(-1).clamp(min=1) if entry.length_normalized else total

    chosen, rejected = reduce(chosen_logprobs, chosen_mask), reduce(rejected_logprobs, rejected_mask)
    chosen_log_ratio, rejected_log_ratio = chosen, rejected
    if entry.needs_reference:  # token by token, then summed: the difference of two large sums has lost its digits
        chosen_log_ratio = reduce(chosen_logprobs - ref_chosen_logprobs, chosen_mask)
        rejected_log_ratio = reduce(rejected_logprobs - ref_rejected_logprobs, rejected_mask)
    terms = PairTerms(chosen, rejected, chosen_log_ratio, rejected_log_ratio)
    loss = entry.function(terms, beta=beta, label_smoothing=label_smoothing).mean()

    chosen_reward, rejected_reward = beta * terms.chosen_log_ratio.detach(), beta * terms.rejected_log_ratio.detach()
    margin = chosen_reward - rejected_reward
    stats = {
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "margin": margin.mean(),
        "chosen_reward": chosen_reward.mean(),
        "rejected_reward": rejected_reward.mean(),
        "chosen_logprob": chosen.detach().mean(),
        "rejected_logprob": rejected.detach().mean(),
    }
    return loss, stats


def _lookup(name: str) -> PreferenceLoss:
    if name not in PREFERENCE_LOSSES:
        near = difflib.get_close_matches(name, PREFERENCE_LOSSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no preference loss named {name!r}; there are {sorted(PREFERENCE_LOSSES)}{hint}")
    return PREFERENCE_LOSSES[name]


@register_preference_loss("sigmoid")
def sigmoid(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); smoothed: conservative DPO (Mitchell 2023, eq. 3).

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), d = difference of the log-ratios, e = label_smoothing.
    """
    logits = beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
