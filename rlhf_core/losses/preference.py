"""Preference losses: training a policy on pairs without a reward model.

`preference_loss` reduces token log-probs to the terms of a loss (`PairTerms`), calls one entry of `PREFERENCE_LOSSES`,
or a weighted mix of several, and averages over pairs. The losses themselves are in paired.py, one paragraph each. To
add a loss: `register_preference_loss` in pairs.py. Single completions with a label: unpaired.py. Lists of more than two
completions: ranking.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_core.losses.paired  # noqa: F401  fills the table
from rlhf_core.losses.divergence import score_difference
from rlhf_core.losses.pairs import (
    PREFERENCE_LOSSES,
    Completions,
    Pairs,
    PairTerms,
    PreferenceLoss,
    RunningOption,
    register_preference_loss,
)
from rlhf_core.losses.ranking import ranked_preference_loss
from rlhf_core.losses.registry import (
    call_declared,
    in_full_precision,
    look_up,
    options_of,
    require,
    require_beta,
    require_label_smoothing,
    require_mask,
    share_options,
)
from rlhf_core.losses.unpaired import kto_kl, unpaired_preference_loss
from rlhf_core.ops.masked import masked_mean, masked_sum, pick

__all__ = [
    "PREFERENCE_LOSSES",
    "Completions",
    "PairTerms",
    "Pairs",
    "PreferenceLoss",
    "RunningOption",
    "kto_kl",
    "preference_loss",
    "ranked_preference_loss",
    "register_preference_loss",
    "running_metrics",
    "unpaired_preference_loss",
    "wpo_weights",
]


def preference_loss(
    name: str | Sequence[str],
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
    reference_free: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
    normalizer: float | Tensor | None = None,
    token_normalizer: float | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the named loss, or a weighted sum of several, as the mean over pairs.

    Args:
        name: a name of `PREFERENCE_LOSSES`, or a list of names (MPO, arXiv:2411.10442: ["sigmoid", "bco_pair", "sft"]
            with loss_weights [0.8, 0.2, 1]; iterative RPO, arXiv:2404.19733: ["sigmoid", "sft"]).
        pairs: P pairs. A pair with a side without tokens is not counted. With `weights`, each pair's loss is multiplied
            by its weight (for example `wpo_weights`); the divisor stays the count of pairs.
        beta: coefficient of the implicit reward beta * log-ratio, more than 0; a higher one keeps the policy closer to
            the reference.
        label_smoothing: probability that a label is wrong, 0 <= label_smoothing < 0.5.
        loss_weights: one factor per name, default 1 each.
        reference_free: take the reference to be uniform, so that its log-probs are 0.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha" (with `f_alpha`), see divergence.py.
        ld_alpha: LD-DPO (Liu et al. 2024, arXiv:2409.06411): factor, 0 to 1, of the tokens of the longer completion
            beyond the length of the shorter one, under policy and reference. None: all count alike.
        normalizer: divide by this instead of the local count of pairs, token_normalizer instead of the local count of
            chosen tokens (for losses with an NLL term). With both counted over the whole accumulation window, eight
            micro-batches of one pair equal one of eight, except for losses that are registered with `across_pairs`:
            aot, aot_unpaired, beta_dpo.
        options: keyword-only parameters of the named losses.

    Returns:
        the loss, a scalar, and stats over pairs: `accuracy` of the implicit rewards beta * log-ratio (a tie counts
        half), their `margin`, `chosen_reward` and `rejected_reward`, and the mean `chosen_logprob`, `rejected_logprob`
        (those of the first name); in a mix, `loss_NAME` of each.

    Raises ValueError for an unknown name or option, a missing tensor that a loss needs, a parameter out of range, or
    one that a loss does not support.
    """
    names = [name] if isinstance(name, str) else list(name)
    entries = {each: look_up(PREFERENCE_LOSSES, each, "preference loss") for each in names}
    require(len(entries) == len(names) > 0, "name", names, "one or more different names")
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    require(len(weights) == len(names), "loss_weights", weights, f"one for each of {len(names)} losses")
    pairs = replace(
        pairs,
        chosen=_in_full_precision("chosen", pairs.chosen),
        rejected=_in_full_precision("rejected", pairs.rejected),
    )
    count = len(pairs.rejected)
    require(len(pairs) == count, "len(pairs.rejected)", count, f"as many as chosen, {len(pairs)}")
    require_beta(beta)
    require_label_smoothing(label_smoothing)
    require(ld_alpha is None or 0 <= ld_alpha <= 1, "ld_alpha", ld_alpha, "between 0 and 1")
    for each, entry in entries.items():
        _require_tensors(each, entry, pairs, reference_free)
    if label_smoothing:
        _require_all(entries, "label_smoothing", label_smoothing, lambda e: "label_smoothing" in options_of(e.function))
    if f_divergence != "reverse_kl":
        _require_all(entries, "f_divergence", f_divergence, lambda entry: entry.f_divergence)
    if ld_alpha is not None:
        _require_all(entries, "ld_alpha", ld_alpha, lambda entry: entry.ld_alpha)
    if pairs.weights is not None:
        _require_all(entries, "pairs.weights", "a tensor", lambda entry: entry.pair_weights)
    shared = share_options({each: entry.function for each, entry in entries.items()}, options)

    pairs = _whole_pairs(pairs, normalizer)
    divisor = len(pairs) if normalizer is None else normalizer
    nll_counts: tuple[float | Tensor, float | Tensor]
    if token_normalizer is None:  # a micro-batch's own mean over tokens, weighted by its share of the pairs
        nll_counts = (len(pairs), pairs.chosen.mask.sum().clamp(min=1))
    else:
        nll_counts = (divisor, token_normalizer)

    total, stats = pairs.chosen.logprobs.new_zeros(()), dict[str, Tensor]()
    for each, weight in zip(names, weights, strict=True):
        entry = entries[each]
        terms = _pair_terms(
            pairs,
            use_reference=entry.needs_reference and not reference_free,
            length_normalized=entry.length_normalized,
            f_divergence=f_divergence if entry.f_divergence else "reverse_kl",
            f_alpha=f_alpha,
            ld_alpha=ld_alpha if entry.ld_alpha else None,
            nll_counts=nll_counts,
        )
        losses = call_declared(entry.function, terms, beta=beta, label_smoothing=label_smoothing, **shared[each])
        if pairs.weights is not None:
            losses = losses * pairs.weights.detach()
        loss = losses.sum() / divisor
        total = total + weight * loss
        stats = stats or _pair_metrics(terms, beta)
        if len(names) > 1:
            stats[f"loss_{each}"] = loss.detach()
    return total, stats


@torch.no_grad()
def running_metrics(
    pairs: Pairs,
    names: Collection[str],
    *,
    beta: float,
    reference_free: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> dict[str, Tensor]:
    """Compute the metrics that running means of losses are updated with (`RunningOption.metrics`).

    Args:
        names: "gap", the mean over pairs of the difference of log-ratios (of f'(ratio) under another f-divergence),
            or "reward", the mean over both sides of beta * log-ratio, or both.
        The other arguments are those of `preference_loss`.

    Returns:
        a scalar for each name. Raises ValueError for an unknown name.
    """
    if not names:
        return {}
    shorter = torch.minimum(pairs.chosen.mask.sum(-1), pairs.rejected.mask.sum(-1))
    ratios = [
        _summed_log_ratio(side, shorter, reference_free=reference_free, ld_alpha=ld_alpha)
        for side in (pairs.chosen, pairs.rejected)
    ]
    gap = score_difference(ratios[0], ratios[1], divergence=f_divergence, alpha=f_alpha).mean()
    metrics = {"gap": gap, "reward": beta * (ratios[0] + ratios[1]).mean() / 2}
    for name in names:
        require(name in metrics, "names", repr(name), f"one of {', '.join(metrics)}")
    return {name: value for name, value in metrics.items() if name in names}


def wpo_weights(logprobs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """Compute how likely the policy would sample each completion, WPO's weights (Zhou et al. 2024, arXiv:2406.11827).

        w = exp(mean over tokens of (log p(token) - log sum_v p(v)^2)),   without gradient

    This is eq. 2. A pair's weight is the product of its completions' weights, passed to `preference_loss` as
    `Pairs.weights`. The authors' code clamps the product at 1, the paper does not: use `.clamp(max=1)` for theirs.

    Args:
        logprobs: (B, T) of the tokens. log_sum_sq_probs: (B, T), log of the expected probability of a sampled token
            (`vocab_statistics`). mask: (B, T) bool.

    Returns:
        (B,) weights.
    """
    return masked_mean((logprobs - log_sum_sq_probs).detach(), mask, -1).exp()


# ------------------------------------------------------------------------------------------------- from tokens to terms


def _in_full_precision(side: str, completions: Completions) -> Completions:
    mask = completions.mask
    require_mask(mask)
    return Completions(
        logprobs=in_full_precision(f"{side}.logprobs", completions.logprobs, mask),
        mask=mask,
        ref_logprobs=in_full_precision(f"{side}.ref_logprobs", completions.ref_logprobs, mask),
        kl=in_full_precision(f"{side}.kl", completions.kl, mask),
    )


def _require_tensors(name: str, entry: PreferenceLoss, pairs: Pairs, reference_free: bool) -> None:
    """Raise ValueError for a tensor that the loss needs and that is None."""
    sides = (pairs.chosen, pairs.rejected)
    given = {
        "margin": pairs.margin is not None,
        "kl": all(side.kl is not None for side in sides),
        "ref_logprobs": all(side.ref_logprobs is not None for side in sides),
    }
    needs = [*entry.needs]
    if entry.needs_reference and not reference_free:
        needs.append("ref_logprobs")
    if not all(given[each] for each in needs):
        raise ValueError(f"loss {name!r} needs {' and '.join(needs)}")


def _require_all(
    entries: Mapping[str, PreferenceLoss], field: str, value: object, supports: Callable[[PreferenceLoss], bool]
) -> None:
    """Raise ValueError unless every loss supports an option: none may ignore it silently.

    "sft" in a mix is exempt, except from pair weights: it has no labels to smooth, no ratio and no second completion.
    """
    concerned = [name for name in entries if name != "sft" or field == "pairs.weights"] or [*entries]
    without = [name for name in concerned if not supports(entries[name])]
    if without:
        raise ValueError(f"{field}={value}: not defined for {', '.join(map(repr, without))}")


def _whole_pairs(pairs: Pairs, normalizer: float | Tensor | None) -> Pairs:
    """Return the pairs that have a token on both sides: usually all of them, unchanged."""
    if torch.compiler.is_compiling():  # a data-dependent branch would break the graph
        return pairs
    for side, completions in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        if normalizer is None and not bool(completions.mask.any()):
            raise ValueError(f"{side}.mask is False everywhere: expected at least one token")
    whole = pairs.chosen.mask.any(-1) & pairs.rejected.mask.any(-1)
    if bool(whole.all()):
        return pairs
    if normalizer is None and not bool(whole.any()):
        raise ValueError("chosen.mask, rejected.mask: expected at least one pair with a token on both sides")
    return Pairs(
        _rows(pairs.chosen, whole),
        _rows(pairs.rejected, whole),
        weights=None if pairs.weights is None else pairs.weights[whole],
        margin=None if pairs.margin is None else pairs.margin[whole],
    )


def _rows(completions: Completions, rows: Tensor) -> Completions:
    reference, kl = completions.ref_logprobs, completions.kl
    return Completions(
        completions.logprobs[rows],
        completions.mask[rows],
        ref_logprobs=None if reference is None else reference[rows],
        kl=None if kl is None else kl[rows],
    )


def _pair_terms(
    pairs: Pairs,
    *,
    use_reference: bool,
    length_normalized: bool,
    f_divergence: str,
    f_alpha: float,
    ld_alpha: float | None,
    nll_counts: tuple[float | Tensor, float | Tensor],
) -> PairTerms:
    """Compute sums, or means, over each completion's tokens."""
    chosen_length, rejected_length = pairs.chosen.mask.sum(-1), pairs.rejected.mask.sum(-1)
    shorter = torch.minimum(chosen_length, rejected_length)
    chosen = _sequence_sums(pairs.chosen, shorter, use_reference=use_reference, ld_alpha=ld_alpha)
    rejected = _sequence_sums(pairs.rejected, shorter, use_reference=use_reference, ld_alpha=ld_alpha)
    chosen_divisor = chosen_length.clamp(min=1) if length_normalized else 1
    rejected_divisor = rejected_length.clamp(min=1) if length_normalized else 1
    nll = -masked_sum(pairs.chosen.logprobs, pairs.chosen.mask, -1)
    return PairTerms(
        chosen_logprob=chosen.logprob / chosen_divisor,
        rejected_logprob=rejected.logprob / rejected_divisor,
        ref_chosen_logprob=chosen.ref_logprob / chosen_divisor,
        ref_rejected_logprob=rejected.ref_logprob / rejected_divisor,
        chosen_log_ratio=chosen.log_ratio / chosen_divisor,
        rejected_log_ratio=rejected.log_ratio / rejected_divisor,
        difference=score_difference(
            chosen.log_ratio,
            rejected.log_ratio,
            divergence=f_divergence,
            alpha=f_alpha,
            chosen_length=chosen_divisor,
            rejected_length=rejected_divisor,
        ),
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        chosen_nll=nll * nll_counts[0] / nll_counts[1],
        margin=torch.zeros_like(nll) if pairs.margin is None else pairs.margin,
        chosen_kl=_summed_kl(pairs.chosen),
        rejected_kl=_summed_kl(pairs.rejected),
    )


class _SequenceSums(NamedTuple):
    logprob: Tensor  # (P,)
    ref_logprob: Tensor
    log_ratio: Tensor


def _sequence_sums(side: Completions, shorter: Tensor, *, use_reference: bool, ld_alpha: float | None) -> _SequenceSums:
    """Compute weighted sums over tokens of the log-probs, the reference's log-probs, and their difference."""
    logprobs, mask, token_weights = side.logprobs, side.mask, None
    if ld_alpha is not None:
        token_weights = pick(mask.cumsum(-1) <= shorter[:, None], 1.0, ld_alpha, logprobs)
    logprob = _weighted_sum(logprobs, mask, token_weights)
    if not use_reference or side.ref_logprobs is None:
        return _SequenceSums(logprob, torch.zeros_like(logprob), logprob)
    # The difference is taken per token, then summed: the difference of two large sums would lose digits.
    return _SequenceSums(
        logprob,
        _weighted_sum(side.ref_logprobs, mask, token_weights),
        _weighted_sum(logprobs - side.ref_logprobs, mask, token_weights),
    )


def _weighted_sum(values: Tensor, mask: Tensor, token_weights: Tensor | None) -> Tensor:
    kept = torch.where(mask, values, 0.0)
    return kept.sum(-1) if token_weights is None else (kept * token_weights).sum(-1)


def _summed_kl(side: Completions) -> Tensor:
    return side.logprobs.new_zeros(len(side)) if side.kl is None else masked_sum(side.kl, side.mask, -1)


def _summed_log_ratio(side: Completions, shorter: Tensor, *, reference_free: bool, ld_alpha: float | None) -> Tensor:
    ratio = side.logprobs
    if not reference_free:
        if side.ref_logprobs is None:
            raise ValueError("ref_logprobs=None: expected the reference's log-probs, or reference_free=True")
        ratio = ratio - side.ref_logprobs
    ratio = torch.where(side.mask, ratio, 0.0)
    if ld_alpha is not None:
        ratio = torch.where(side.mask.cumsum(-1) <= shorter[:, None], ratio, ld_alpha * ratio)
    return ratio.sum(-1)


@torch.no_grad()
def _pair_metrics(terms: PairTerms, beta: float) -> dict[str, Tensor]:
    count = max(len(terms.chosen_log_ratio), 1)
    chosen_reward, rejected_reward = beta * terms.chosen_log_ratio, beta * terms.rejected_log_ratio
    margin = chosen_reward - rejected_reward
    per_pair = {
        "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "margin": margin,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "chosen_logprob": terms.chosen_logprob,
        "rejected_logprob": terms.rejected_logprob,
    }
    return {name: values.sum() / count for name, values in per_pair.items()}
