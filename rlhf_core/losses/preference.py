"""Preference losses: learning from pairs without a reward model.

`preference_loss` turns token log-probs into what a loss is made of (`PairTerms`), calls one entry of
`PREFERENCE_LOSSES`, or a weighted mix of several, and averages over pairs. The losses themselves stand in paired.py, a
paragraph each. A loss of one's own: `register_preference_loss` in pairs.py. Completions with a label each and no
partner: unpaired.py. Lists of more than two: ranking.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import rlhf_core.losses.paired  # noqa: F401  fills the table
from rlhf_core.losses.divergence import score_difference
from rlhf_core.losses.pairs import PREFERENCE_LOSSES, PairTerms, PreferenceLoss, register_preference_loss
from rlhf_core.losses.ranking import ranked_preference_loss
from rlhf_core.losses.registry import (
    call_declared,
    in_full_precision,
    look_up,
    options_of,
    require,
    require_beta,
    require_label_smoothing,
    share_options,
)
from rlhf_core.losses.unpaired import kto_kl, unpaired_preference_loss
from rlhf_core.ops.masked import masked_mean, masked_sum, pick

__all__ = [
    "PREFERENCE_LOSSES",
    "PairTerms",
    "PreferenceLoss",
    "kto_kl",
    "preference_loss",
    "ranked_preference_loss",
    "register_preference_loss",
    "unpaired_preference_loss",
    "wpo_weights",
]


def preference_loss(
    name: str | Sequence[str],
    *,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weights: Sequence[float] | None = None,
    reference_free: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
    pair_weights: Tensor | None = None,
    margin: Tensor | None = None,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    token_normalizer: float | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The named loss, or a weighted sum of several, the mean over pairs.

    Args:
        name: a name of `PREFERENCE_LOSSES`, or a list of names (MPO, arXiv:2411.10442: ["sigmoid", "bco_pair", "sft"]
            with weights [0.8, 0.2, 1]; iterative RPO, arXiv:2404.19733: ["sigmoid", "sft"]).
        *_logprobs: (B, T) token log-probs under the policy; ref_*: under the reference, None where no loss needs it.
        *_mask: (B, T) bool, True = completion token. T may differ between the sides. A pair with an empty side is not
            counted.
        beta: strength of the pull to the reference; more than 0.
        label_smoothing: probability that a label is wrong, 0 <= label_smoothing < 0.5.
        weights: one a name, default 1 each.
        reference_free: take the reference to be uniform, so that its log-probs are 0.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha" (with `f_alpha`), see divergence.py.
        ld_alpha: LD-DPO (Liu et al. 2024, arXiv:2409.06411): the tokens of the longer completion beyond the length of
            the shorter one count this much, 0 to 1, under policy and reference. None: all count alike.
        pair_weights: (B,) factor of each pair's loss, for example `wpo_weights`, without gradient.
        margin, chosen_kl, rejected_kl: what single losses ask for, (B,) and (B, T); see there.
        normalizer: divide by this instead of the local count of pairs, token_normalizer instead of the local count of
            chosen tokens (for losses with an NLL term). With both counted over the whole accumulation window, eight
            micro-batches of one add up to one of eight, except for losses that look across pairs: aot, aot_unpaired,
            beta_dpo.
        options: keyword-only parameters of the losses below, by their names.

    Returns:
        the loss, a scalar, and stats over pairs: `accuracy` of the implicit rewards beta * log-ratio (a tie counts
        half), their `margin`, `chosen_reward` and `rejected_reward`, and the mean `chosen_logprob`, `rejected_logprob`
        (those of the first name); in a mix, `loss_NAME` of each.

    Raises ValueError for an unknown name or option, a tensor that a loss needs and does not get, a parameter out of
    range, or one that a loss cannot honour.
    """
    names = [name] if isinstance(name, str) else list(name)
    entries = {each: look_up(PREFERENCE_LOSSES, each, "preference loss") for each in names}
    require(len(entries) == len(names) > 0, "name", names, "one or more different names")
    weights = [1.0] * len(names) if weights is None else list(weights)
    require(len(weights) == len(names), "weights", weights, f"one for each of {len(names)} losses")
    chosen_logprobs, ref_chosen_logprobs, chosen_kl = in_full_precision(
        chosen_mask, chosen_logprobs=chosen_logprobs, ref_chosen_logprobs=ref_chosen_logprobs, chosen_kl=chosen_kl
    )
    rejected_logprobs, ref_rejected_logprobs, rejected_kl = in_full_precision(
        rejected_mask,
        rejected_logprobs=rejected_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
        rejected_kl=rejected_kl,
    )
    require(len(chosen_mask) == len(rejected_mask), "len(rejected_mask)", len(rejected_mask), "as many pairs as chosen")
    given = dict(
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
        margin=margin,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
    )
    require_beta(beta)
    require_label_smoothing(label_smoothing)
    require(ld_alpha is None or 0 <= ld_alpha <= 1, "ld_alpha", ld_alpha, "between 0 and 1")
    for each, entry in entries.items():
        _require_tensors(each, entry, given, reference_free)
    if label_smoothing:
        _require_all(entries, "label_smoothing", label_smoothing, lambda e: "label_smoothing" in options_of(e.function))
    if f_divergence != "reverse_kl":
        _require_all(entries, "f_divergence", f_divergence, lambda entry: entry.f_divergence)
    if ld_alpha is not None:
        _require_all(entries, "ld_alpha", ld_alpha, lambda entry: entry.ld_alpha)
    if pair_weights is not None:
        _require_all(entries, "pair_weights", "a tensor", lambda entry: entry.pair_weights)
    shared = share_options({each: entry.function for each, entry in entries.items()}, options)

    tensors = dict(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
        pair_weights=pair_weights,
        **given,
    )
    tensors = _whole_pairs(tensors, normalizer)
    pairs = len(tensors["chosen_mask"]) if normalizer is None else normalizer
    nll_counts = (pairs, token_normalizer)
    if token_normalizer is None:  # a micro-batch's own mean over tokens, weighed by its share of the pairs
        nll_counts = (len(tensors["chosen_mask"]), tensors["chosen_mask"].sum().clamp(min=1))

    total, stats = 0.0, {}
    for each, weight in zip(names, weights, strict=True):
        entry = entries[each]
        terms = _pair_terms(
            tensors,
            use_reference=entry.needs_reference and not reference_free,
            length_normalized=entry.length_normalized,
            divergence=dict(divergence=f_divergence, alpha=f_alpha) if entry.f_divergence else {},
            ld_alpha=ld_alpha if entry.ld_alpha else None,
            nll_counts=nll_counts,
        )
        losses = call_declared(entry.function, terms, beta=beta, label_smoothing=label_smoothing, **shared[each])
        if pair_weights is not None:
            losses = losses * tensors["pair_weights"].detach()
        loss = losses.sum() / pairs
        total = total + weight * loss
        stats = stats or _gauges(terms, beta)
        if len(names) > 1:
            stats[f"loss_{each}"] = loss.detach()
    return total, stats


def wpo_weights(logprobs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO: how likely the policy itself would have been to sample it (Zhou et al. 2024, arXiv:2406.11827, eq. 2).

        w = exp(mean over tokens of (log p(token) - log sum_v p(v)^2)),   without gradient

    A pair's weight is the product of its completions' weights, given to `preference_loss` as `pair_weights`. The
    authors' code cuts that product at 1, which the paper does not: `.clamp(max=1)` gives theirs.

    Args:
        logprobs: (B, T) of the tokens. log_sum_sq_probs: (B, T), log of the expected probability of a sampled token
            (`vocab_statistics`). mask: (B, T) bool.
    """
    return masked_mean((logprobs - log_sum_sq_probs).detach(), mask, -1).exp()


# ------------------------------------------------------------------------------------------------- from tokens to terms


def _require_tensors(name: str, entry: PreferenceLoss, given: dict, reference_free: bool) -> None:
    needs = [*entry.needs]
    if entry.needs_reference and not reference_free:
        needs += ["ref_chosen_logprobs", "ref_rejected_logprobs"]
    if any(given[each] is None for each in needs):
        raise ValueError(f"loss {name!r} needs {' and '.join(needs)}")


def _require_all(
    entries: dict[str, PreferenceLoss], field: str, value: object, has: Callable[[PreferenceLoss], bool]
) -> None:
    """An option is honoured by every loss or refused, never by some in silence. "sft" beside others is spared: its
    labels are not in doubt, and it looks at no ratio and no second completion (but a pair's weight is its weight too).
    """
    concerned = [name for name in entries if name != "sft" or field == "pair_weights"] or [*entries]
    without = [name for name in concerned if not has(entries[name])]
    if without:
        raise ValueError(f"{field}={value}: not defined for {', '.join(map(repr, without))}")


def _whole_pairs(tensors: dict[str, Tensor | None], normalizer: float | Tensor | None) -> dict[str, Tensor | None]:
    """The pairs that have a token on both sides; all of them, as they are, in the usual case."""
    if torch.compiler.is_compiling():  # a question about data would break the graph
        return tensors
    for side in ("chosen", "rejected"):
        if normalizer is None and not bool(tensors[f"{side}_mask"].any()):
            raise ValueError(f"{side}_mask is False everywhere: expected at least one token")
    whole = tensors["chosen_mask"].any(-1) & tensors["rejected_mask"].any(-1)
    if bool(whole.all()):
        return tensors
    if normalizer is None and not bool(whole.any()):
        raise ValueError("chosen_mask, rejected_mask: expected at least one pair with a token on both sides")
    return {name: None if tensor is None else tensor[whole] for name, tensor in tensors.items()}


def _pair_terms(
    tensors: dict[str, Tensor | None],
    *,
    use_reference: bool,
    length_normalized: bool,
    divergence: dict[str, Any],
    ld_alpha: float | None,
    nll_counts: tuple[float | Tensor, float | Tensor],
) -> PairTerms:
    """Sums, or means, over each completion's tokens."""
    lengths = {side: tensors[f"{side}_mask"].sum(-1) for side in ("chosen", "rejected")}
    shorter = torch.minimum(lengths["chosen"], lengths["rejected"])
    over = {side: length.clamp(min=1) if length_normalized else 1 for side, length in lengths.items()}
    terms: dict[str, Tensor | None] = {}
    log_ratios = {}
    for side, length in lengths.items():
        mask, kl = tensors[f"{side}_mask"], tensors[f"{side}_kl"]
        reference = tensors[f"ref_{side}_logprobs"] if use_reference else None
        token_weights = None
        if ld_alpha is not None:
            token_weights = pick(mask.cumsum(-1) <= shorter[:, None], 1.0, ld_alpha, tensors[f"{side}_logprobs"])
        logprob, ref_logprob, log_ratios[side] = _sequence_sums(
            tensors[f"{side}_logprobs"], reference, mask, token_weights
        )
        terms |= {
            f"{side}_logprob": logprob / over[side],
            f"ref_{side}_logprob": ref_logprob / over[side],
            f"{side}_log_ratio": log_ratios[side] / over[side],
            f"{side}_length": length,
            f"{side}_kl": None if kl is None else masked_sum(kl, mask, -1),
        }
    return PairTerms(
        **terms,
        difference=score_difference(
            log_ratios["chosen"],
            log_ratios["rejected"],
            chosen_length=over["chosen"],
            rejected_length=over["rejected"],
            **divergence,
        ),
        chosen_nll=-masked_sum(tensors["chosen_logprobs"], tensors["chosen_mask"], -1) * nll_counts[0] / nll_counts[1],
        margin=tensors["margin"],
    )


def _sequence_sums(
    logprobs: Tensor, reference: Tensor | None, mask: Tensor, token_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums over tokens of log-probs, the reference's and their difference; a reference of None is uniform."""

    def total(values: Tensor) -> Tensor:
        kept = torch.where(mask, values, 0.0)
        return kept.sum(-1) if token_weights is None else (kept * token_weights).sum(-1)

    logprob = total(logprobs)
    if reference is None:
        return logprob, torch.zeros_like(logprob), logprob
    # Token by token, then summed: the difference of two large sums has lost its digits.
    return logprob, total(reference), total(logprobs - reference)


@torch.no_grad()
def _gauges(terms: PairTerms, beta: float) -> dict[str, Tensor]:
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
