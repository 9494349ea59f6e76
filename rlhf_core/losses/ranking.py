"""Preference losses for K ranked completions of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.pairs import PreferenceLoss
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
from rlhf_core.losses.reward import plackett_luce_nll
from rlhf_core.ops.masked import masked_sum, require_tokens


@dataclass(frozen=True)
class RankedTerms:
    """What a ranking loss is computed from: K completions per prompt, best first, completions without tokens last."""

    logprob: Tensor  # (B, K), summed over tokens
    log_ratio: Tensor  # (B, K); the log-prob itself where the loss needs no reference
    length: Tensor  # (B, K) tokens; 0 marks a missing completion
    scores: Tensor  # (B, K), descending; equal scores are ties


RANKED_LOSSES: dict[str, PreferenceLoss] = {}


def register_ranked_loss(name: str, *, needs_reference: bool = True) -> Callable[[Function], Function]:
    """Return a decorator that adds a loss to `RANKED_LOSSES`: `function(terms, *, options)` returns each list's loss,
    (B,).

    Raises ValueError for a name that is already registered.
    """

    def register(function: Function) -> Function:
        entry = PreferenceLoss(function, needs_reference=needs_reference, ld_alpha=False, pair_weights=False)
        add_entry(RANKED_LOSSES, name, entry, "preference loss")
        return function

    return register


def ranked_preference_loss(
    name: str,
    *,
    logprobs: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    scores: Tensor | None = None,
    beta: float = 0.1,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the named loss of `RANKED_LOSSES` as the mean over prompts with at least two completions.

    Args:
        logprobs, ref_logprobs: (B, K, T) token log-probs of K completions per prompt. mask: (B, K, T) bool; a row
            without tokens is a missing completion, so lists may differ in length.
        scores: (B, K), higher is better, in any order; None: the completions are ordered from best to worst.
        beta: coefficient of the implicit reward beta * log-ratio, more than 0.
        normalizer: divide by this instead of the local count of prompts.
        options: keyword-only parameters of the loss, such as rrhf's `nll_coef`.

    Returns:
        the loss, a scalar, and stats: `accuracy`, over pairs of unequal score, of beta * log-ratio (a tie counts half).

    Raises ValueError for an unknown name or option, a missing reference, or a mask that is False everywhere.
    """
    entry = look_up(RANKED_LOSSES, name, "ranking loss")
    require_beta(beta)
    require(logprobs.dim() == 3, "logprobs.dim()", logprobs.dim(), "3, (prompts, completions, tokens)")
    if entry.needs_reference and ref_logprobs is None:
        raise ValueError(f"loss {name!r} needs ref_logprobs")
    own = share_options({name: entry.function}, options)[name]
    require_mask(mask)
    logprobs = in_full_precision("logprobs", logprobs, mask)
    ref_logprobs = in_full_precision("ref_logprobs", ref_logprobs, mask)
    require_tokens(mask, normalizer)

    logprob, length = masked_sum(logprobs, mask, -1), mask.sum(-1)
    log_ratio = logprob
    if entry.needs_reference and ref_logprobs is not None:
        log_ratio = masked_sum(logprobs - ref_logprobs, mask, -1)
    if scores is None:
        scores = torch.arange(mask.shape[1], 0, -1, device=mask.device).to(logprob.dtype).expand(length.shape)
    scores = torch.where(length > 0, scores.to(logprob.dtype), -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    terms = RankedTerms(*(each.gather(1, order) for each in (logprob, log_ratio, length, scores)))
    losses = call_declared(entry.function, terms, beta=beta, **own)
    counted = (terms.length > 0).sum(-1) > 1
    loss = masked_sum(losses, counted) / (counted.sum().clamp(min=1) if normalizer is None else normalizer)

    with torch.no_grad():
        better = _better(terms)
        gap = terms.log_ratio[:, :, None] - terms.log_ratio[:, None, :]
        right = (gap > 0).float() + 0.5 * (gap == 0).float()
        accuracy = masked_sum(right, better) / better.sum().clamp(min=1)
    return loss, {"accuracy": accuracy}


def _better(terms: RankedTerms) -> Tensor:
    """(B, i, j) bool: completion i has the higher score, and both exist."""
    exists = terms.length > 0
    return (terms.scores[:, :, None] > terms.scores[:, None, :]) & exists[:, :, None] & exists[:, None, :]


@register_ranked_loss("plackett_luce")
def plackett_luce(terms: RankedTerms, *, beta: float) -> Tensor:
    """DPO over rankings (Rafailov et al. 2023, arXiv:2305.18290, eq. 20, appendix A.3). Ties are ordered by position.

    -sum over k of (beta x_k - log sum over j >= k of e^(beta x_j)),   x = log-ratio, best first
    """
    return plackett_luce_nll(beta * terms.log_ratio, terms.length > 0)


@register_ranked_loss("rrhf", needs_reference=False)
def rrhf(terms: RankedTerms, *, nll_coef: float = 1.0) -> Tensor:
    """RRHF: mean log-probs in the scores' order, and NLL of the best (Yuan et al. 2023, arXiv:2304.05302, eq. 1 to 5).

    sum over pairs with score_i > score_j of max(0, p_j - p_i) - nll_coef l_best,   p = l / L
    """
    require(nll_coef >= 0, "nll_coef", nll_coef, "0 or more")
    mean = terms.logprob / terms.length.clamp(min=1)
    gaps = F.relu(mean[:, None, :] - mean[:, :, None])  # (B, i, j): by how much mean_j exceeds mean_i
    return masked_sum(gaps, _better(terms), (1, 2)) - nll_coef * terms.logprob[:, 0]
