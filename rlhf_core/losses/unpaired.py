"""Preference losses for single completions labelled desirable or undesirable: KTO, BCO, APO-zero unpaired.

In the formulas x is a completion's log-ratio: its log-prob minus the reference's, summed over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.pairs import PreferenceLoss, RunningOption
from rlhf_core.losses.registry import (
    Function,
    add_entry,
    call_declared,
    in_full_precision,
    look_up,
    require,
    require_beta,
    require_mask,
    share_options,
)
from rlhf_core.ops.masked import masked_mean, masked_sum, pick, require_tokens


@dataclass(frozen=True)
class UnpairedTerms:
    """What an unpaired loss is computed from."""

    logprob: Tensor  # (B,), summed over tokens
    log_ratio: Tensor  # (B,)
    labels: Tensor  # (B,) bool, True = desirable
    kl: Tensor  # scalar: KTO's reference point, in nats per completion, without gradient; 0 where not given


UNPAIRED_LOSSES: dict[str, PreferenceLoss] = {}


def register_unpaired_loss(
    name: str,
    *,
    needs_reference: bool = True,
    needs: tuple[str, ...] = (),
    running_mean: RunningOption | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that adds a loss to `UNPAIRED_LOSSES`: `function(terms, *, options)` returns each completion's
    loss, (B,).

    Args: fields of `PreferenceLoss`. Raises ValueError for a name that is already registered.
    """

    def register(function: Function) -> Function:
        entry = PreferenceLoss(
            function,
            needs_reference=needs_reference,
            ld_alpha=False,
            pair_weights=False,
            needs=needs,
            running_mean=running_mean,
        )
        add_entry(UNPAIRED_LOSSES, name, entry, "preference loss")
        return function

    return register


def unpaired_preference_loss(
    name: str,
    *,
    logprobs: Tensor,
    mask: Tensor,
    labels: Tensor,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    row_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the named loss of `UNPAIRED_LOSSES` as the mean over completions, each weighted by its class.

    Args:
        logprobs, ref_logprobs: (B, T) token log-probs under policy and reference. mask: (B, T) bool, True = completion
            token; a row without tokens is not counted. labels: (B,) bool, True = desirable.
        kl: scalar from `kto_kl`, in nats; "kto" needs it. No gradient flows through it.
        beta: coefficient of the implicit reward beta * x, more than 0.
        desirable_weight, undesirable_weight: factors of the two classes, more than 0. The authors of KTO recommend
            (desirable_weight * desirable rows) / (undesirable_weight * undesirable rows) between 1 and 3/2 (eq. 9; 4/3
            in the first versions).
        row_weights: (B,) factor of each completion's loss, without gradient: the mean becomes sum w loss / sum w.
        normalizer: divide by this instead of the local count of completions, or of the sum of their weights.
        options: keyword-only parameters of the loss, such as bco's `delta`.

    Returns:
        the loss, a scalar, and stats: `desirable_reward` and `undesirable_reward` (means of beta * x over each class, 0
        where it is empty), their difference `margin`, and `kl` where given.

    Raises ValueError for an unknown name or option, a missing reference or kl, or a parameter out of range.
    """
    entry = look_up(UNPAIRED_LOSSES, name, "unpaired preference loss")
    require_beta(beta)
    for field, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        require(value > 0, field, value, "more than 0")
    if entry.needs_reference and ref_logprobs is None:
        raise ValueError(f"loss {name!r} needs ref_logprobs")
    if "kl" in entry.needs and kl is None:
        raise ValueError(f"loss {name!r} needs kl, the reference point from kto_kl")
    require(labels.dtype == torch.bool, "labels.dtype", labels.dtype, "torch.bool, True = desirable")
    own = share_options({name: entry.function}, options)[name]
    require_mask(mask)
    logprobs = in_full_precision("logprobs", logprobs, mask)
    ref_logprobs = in_full_precision("ref_logprobs", ref_logprobs, mask)
    require(labels.shape == mask.shape[:1], "labels.shape", tuple(labels.shape), f"one a row, {tuple(mask.shape[:1])}")
    require_tokens(mask, normalizer)

    log_ratio = logprob = masked_sum(logprobs, mask, -1)
    if ref_logprobs is not None:
        log_ratio = masked_sum(logprobs - ref_logprobs, mask, -1)
    kl_point = torch.as_tensor(0.0 if kl is None else kl).detach().to(log_ratio)
    terms = UnpairedTerms(logprob, log_ratio, labels, kl_point)
    losses = call_declared(entry.function, terms, beta=beta, **own)
    counted = mask.any(-1)
    losses = pick(labels, desirable_weight, undesirable_weight, losses) * losses
    count = counted.sum()
    if row_weights is not None:
        require(row_weights.shape == labels.shape, "row_weights.shape", tuple(row_weights.shape), "one a row")
        losses, count = losses * row_weights.detach(), masked_sum(row_weights.detach(), counted)
    loss = masked_sum(losses, counted) / (count if normalizer is None else normalizer)

    rewards = beta * log_ratio.detach()
    desirable, undesirable = (masked_mean(rewards, counted & side) for side in (labels, ~labels))
    stats = {"desirable_reward": desirable, "undesirable_reward": undesirable, "margin": desirable - undesirable}
    return loss, stats | ({} if kl is None else {"kl": kl_point})


@torch.no_grad()
def kto_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Estimate KTO's reference point, the KL of policy and reference on mismatched completions, in nats.

        max(0, mean over rows of x),   each prompt with the completion of another row of its batch

    Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1. A scalar without gradient.

    Args:
        logprobs, ref_logprobs: (B, T) of the mismatched completions. mask: (B, T) bool; empty rows are not counted.
    """
    require_mask(mask)
    logprobs = in_full_precision("logprobs", logprobs, mask)
    ref_logprobs = in_full_precision("ref_logprobs", ref_logprobs, mask)
    require_tokens(mask)
    return masked_mean(masked_sum(logprobs - ref_logprobs, mask, -1), mask.any(-1)).clamp(min=0)


@register_unpaired_loss("kto", needs=("kl",))
def kto(terms: UnpairedTerms, *, beta: float) -> Tensor:
    """KTO: utility against a reference point (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    desirable: 1 - sigmoid(beta (x - kl));   undesirable: 1 - sigmoid(beta (kl - x))
    """
    gain = beta * (terms.log_ratio - terms.kl)
    return torch.where(terms.labels, -gain, gain).sigmoid()


@register_unpaired_loss("bco", running_mean=RunningOption("delta", ("desirable_reward", "undesirable_reward")))
def bco(terms: UnpairedTerms, *, beta: float, delta: float | Tensor = 0.0) -> Tensor:
    """BCO: a binary classifier of desirable against undesirable (Jung et al. 2024, arXiv:2404.04656).

    desirable: -log sigmoid(beta x - delta);   undesirable: -log sigmoid(-(beta x - delta))

    The threshold `delta` is the mean of the running means of `desirable_reward` and `undesirable_reward` in the stats,
    kept by the caller. No gradient flows through it.
    """
    logits = beta * terms.log_ratio - torch.as_tensor(delta).detach().to(terms.log_ratio)
    return -F.logsigmoid(torch.where(terms.labels, logits, -logits))


@register_unpaired_loss("apo_zero_unpaired")
def apo_zero_unpaired(terms: UnpairedTerms, *, beta: float) -> Tensor:
    """APO-zero for single completions (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    desirable: 1 - sigmoid(beta x);   undesirable: sigmoid(beta x)
    """
    reward = beta * terms.log_ratio
    return torch.where(terms.labels, -reward, reward).sigmoid()


@torch.no_grad()
def unpaired_metrics(
    logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, labels: Tensor, beta: float, zero: Tensor | float
) -> dict[str, Tensor]:
    """Return means over rows: `accuracy`, the fraction whose reward is on its label's side of `zero` (a tie counts
    half); `desirable`, the fraction of desirable rows; and each class's part of the mean reward, see `class_means`."""
    rewards = beta * masked_sum(logprobs if ref_logprobs is None else logprobs - ref_logprobs, mask, -1)
    signed = torch.where(labels, rewards - zero, zero - rewards)
    return {
        "accuracy": ((signed > 0).float() + 0.5 * (signed == 0).float()).mean(),
        "desirable": labels.float().mean(),
        "desirable_reward": (rewards * labels).mean(),
        "undesirable_reward": (rewards * ~labels).mean(),
    }


def class_means(means: dict[str, float]) -> dict[str, float]:
    """Return the metrics with rewards as means over their own class, 0 for a class without rows, and `margin`, their
    difference."""
    share, rewards = means["desirable"], {}
    for name, part in (("desirable_reward", share), ("undesirable_reward", 1 - share)):
        rewards[name] = means[name] / part if part > 1e-9 else 0.0
    return means | rewards | {"margin": rewards["desirable_reward"] - rewards["undesirable_reward"]}
