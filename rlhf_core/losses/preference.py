"""Preference losses: learning from pairs without a reward model.

`preference_loss` turns token log-probs into what a loss is made of (`PairTerms`), calls one entry of
`PREFERENCE_LOSSES`, or a weighted mix of several, and averages over pairs. Below it stand the losses themselves, a
paragraph each. Throughout:

    c, r    the chosen and the rejected completion
    l       log-prob of a completion under the policy, summed over its tokens; l / L its mean
    a, b    log-ratio l - l_ref of the chosen and of the rejected completion
    d       a - b (under another f-divergence: f'(e^a) - f'(e^b), see divergence.py)
    e       label_smoothing, the probability that a label is wrong

A loss of one's own: `register_preference_loss` in pairs.py. Completions with a label each and no partner: unpaired.py.
Lists of more than two: ranking.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.divergence import exp_difference, score_difference
from rlhf_core.losses.pairs import PREFERENCE_LOSSES, PairTerms, PreferenceLoss, register_preference_loss
from rlhf_core.losses.ranking import ranked_preference_loss
from rlhf_core.losses.registry import (
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
        own = shared[each] | dict(beta=beta, label_smoothing=label_smoothing)
        losses = entry.function(terms, **{key: own[key] for key in options_of(entry.function) if key in own})
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


# ------------------------------------------------------------------------------------ DPO and what changes its logistic


def _logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(logits) - e log sigmoid(-logits)."""
    if label_smoothing == 0:  # 0 * inf, should a logit have overflowed
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


@register_preference_loss("sigmoid", f_divergence=True)
def sigmoid(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); smoothed: conservative DPO (Mitchell 2023, eq. 3).

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)
    """
    return _logistic(beta * pairs.difference, label_smoothing)


@register_preference_loss("sigmoid_norm", length_normalized=True, f_divergence=True)
def sigmoid_norm(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO over mean log-ratios (Tulu 3, Lambert et al. 2024, arXiv:2411.15124, eq. 6).

    -(1 - e) log sigmoid(beta (a / L_c - b / L_r)) - e log sigmoid(-beta (a / L_c - b / L_r))
    """
    return _logistic(beta * pairs.difference, label_smoothing)


@register_preference_loss("robust", f_divergence=True)
def robust(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: unbiased under labels flipped with probability e (Chowdhury et al. 2024, arXiv:2403.00409).

    (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)

    Without a lower bound where e > 0.
    """
    logits = beta * pairs.difference
    if label_smoothing == 0:
        return -F.logsigmoid(logits)
    flipped = -label_smoothing * F.logsigmoid(-logits)
    return (-(1 - label_smoothing) * F.logsigmoid(logits) - flipped) / (1 - 2 * label_smoothing)


@register_preference_loss("exo_pair", f_divergence=True)
def exo_pair(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO: the reverse KL between the policy's and the labels' preference (Ji et al. 2024, arXiv:2402.00856, eq. 16).

    q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e),   q = sigmoid(beta d)

    Needs e > 0, since the KL to a certain label is infinite.
    """
    require(label_smoothing > 0, "label_smoothing", label_smoothing, "more than 0 for 'exo_pair'")
    logits = beta * pairs.difference
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    return chosen + (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))


@register_preference_loss("discopop", f_divergence=True)
def discopop(pairs: PairTerms, *, beta: float, tau: float = 0.05) -> Tensor:
    """DiscoPOP: logistic where d is negative, exponential where positive (Lu et al. 2024, arXiv:2406.08414, eq. 5).

    -(1 - m) log sigmoid(beta d) + m exp(-beta d),   m = sigmoid(beta d / tau)
    """
    require(tau > 0, "tau", tau, "more than 0")
    logits = beta * pairs.difference
    # m exp(-beta d) with both exponents together: for a very negative d, 0 * inf apart.
    exponential = (F.logsigmoid(logits / tau) - logits).exp()
    return (-logits / tau).sigmoid() * -F.logsigmoid(logits) + exponential


@register_preference_loss("beta_dpo", f_divergence=True)
def beta_dpo(
    pairs: PairTerms,
    *,
    beta: float,
    label_smoothing: float,
    beta_alpha: float = 0.6,
    gap_mean: float = 0.0,
    min_beta: float = 1e-3,
) -> Tensor:
    """Beta-DPO: beta follows the batch's gap (Wu et al. 2024, arXiv:2407.08639; its data filter is left out).

    -log sigmoid(beta' d),   beta' = max(min_beta, beta (1 + beta_alpha (mean d - gap_mean))) without gradient

    `gap_mean` is the running mean of d over earlier batches (the paper: momentum 0.9), held by the caller; the gauge
    `margin` is beta times this batch's.
    """
    gap = pairs.difference.detach().sum() / max(len(pairs.difference), 1)
    dynamic_beta = (beta * (1 + beta_alpha * (gap - gap_mean))).clamp(min=min_beta)
    return _logistic(dynamic_beta * pairs.difference, label_smoothing)


@register_preference_loss("odpo", f_divergence=True, needs=("margin",))
def odpo(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO with an offset: by how much is the chosen one better (Amini et al. 2024, arXiv:2402.10571).

    -log sigmoid(beta d - margin),   margin (B,), for example alpha log(score_c - score_r)
    """
    return _logistic(beta * pairs.difference - pairs.margin, label_smoothing)


@register_preference_loss("r_dpo", f_divergence=True)
def r_dpo(pairs: PairTerms, *, beta: float, label_smoothing: float, length_coef: float = 0.01) -> Tensor:
    """Length-regularised DPO: a reward that charges length_coef a token (Park et al. 2024, arXiv:2403.19159).

    -log sigmoid(beta d + length_coef (L_c - L_r))
    """
    return _logistic(
        beta * pairs.difference + length_coef * (pairs.chosen_length - pairs.rejected_length), label_smoothing
    )


@register_preference_loss("dpop")
def dpop(pairs: PairTerms, *, beta: float, label_smoothing: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive: the chosen completion may not become rarer (Pal et al. 2024, arXiv:2402.13228, eq. 3).

    -log sigmoid(beta (d - dpop_lambda max(0, -a)))
    """
    require(dpop_lambda >= 0, "dpop_lambda", dpop_lambda, "0 or more")
    penalty = dpop_lambda * F.relu(-pairs.chosen_log_ratio)
    return _logistic(beta * (pairs.difference - penalty), label_smoothing)


@register_preference_loss("cal_dpo")
def cal_dpo(pairs: PairTerms, *, beta: float, cal_coef: float = 1.0) -> Tensor:
    """Cal-DPO: log-ratios calibrated to +-1 / (2 beta) (Xiao et al. 2024, arXiv:2412.14516, eq. 10).

    -log sigmoid(d) + cal_coef ((a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2)

    The authors' code has cal_coef 1/2.
    """
    require(cal_coef >= 0, "cal_coef", cal_coef, "0 or more")
    return -F.logsigmoid(pairs.difference) + cal_coef * sppo_hard(pairs, beta=beta)


@register_preference_loss("tdpo1", ld_alpha=False, needs=("chosen_kl", "rejected_kl"))
def tdpo1(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """Token-level DPO (Zeng et al. 2024, arXiv:2404.11999, eq. 15).

    -log sigmoid(beta (d - (KL_r - KL_c))),   KL = sum over tokens of KL(reference || policy), with gradient

    `chosen_kl`, `rejected_kl`: (B, T) of `kl_full(..., direction="forward")`.
    """
    return _logistic(beta * (pairs.difference - (pairs.rejected_kl - pairs.chosen_kl)), label_smoothing)


@register_preference_loss("tdpo2", ld_alpha=False, needs=("chosen_kl", "rejected_kl"))
def tdpo2(pairs: PairTerms, *, beta: float, label_smoothing: float, tdpo_alpha: float = 0.5) -> Tensor:
    """Token-level DPO, the chosen side's KL held still (Zeng et al. 2024, arXiv:2404.11999, eq. 17).

    -log sigmoid(beta (d - tdpo_alpha (KL_r - stop_gradient(KL_c))))
    """
    shift = tdpo_alpha * (pairs.rejected_kl - pairs.chosen_kl.detach())
    return _logistic(beta * (pairs.difference - shift), label_smoothing)


# ------------------------------------------------------------------------------------------- other shapes of the margin


@register_preference_loss("hinge", f_divergence=True)
def hinge(pairs: PairTerms, *, beta: float) -> Tensor:
    """Hinge loss on DPO's logit (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425; on log-ratios: RSO, arXiv:2309.06657).

    max(0, 1 - beta d)
    """
    return F.relu(1 - beta * pairs.difference)


@register_preference_loss("ipo", length_normalized=True, f_divergence=True)
def ipo(pairs: PairTerms, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), over mean log-ratios as its authors confirmed they use it.

    (a / L_c - b / L_r - 1 / (2 beta))^2

    Its optimum is ref exp(E[p(y > y')] / beta), not DPO's ref exp(r / beta): certain labels do not push forever.
    """
    return (pairs.difference - 1 / (2 * beta)).square()


@register_preference_loss("sppo_hard")
def sppo_hard(pairs: PairTerms, *, beta: float) -> Tensor:
    """SPPO with certain labels (Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with P = 1 and 0).

    (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2
    """
    target = 1 / (2 * beta)
    return (pairs.chosen_log_ratio - target).square() + (pairs.rejected_log_ratio + target).square()


@register_preference_loss("nca_pair")
def nca_pair(pairs: PairTerms, *, beta: float) -> Tensor:
    """NCA: noise-contrastive, each side held by itself (Chen et al. 2024, arXiv:2402.05369, table 1).

    -log sigmoid(beta a) - 1/2 log sigmoid(-beta a) - 1/2 log sigmoid(-beta b)
    """
    chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register_preference_loss("bco_pair")
def bco_pair(pairs: PairTerms, *, beta: float, delta: float = 0.0) -> Tensor:
    """BCO on pairs: a binary classifier of chosen against rejected (Jung et al. 2024, arXiv:2404.04656).

    -log sigmoid(beta a - delta) - log sigmoid(-(beta b - delta))

    `delta` is the running mean of the rewards of both sides, held by the caller; at 0 it is TRL's loss.
    """
    return -F.logsigmoid(beta * pairs.chosen_log_ratio - delta) - F.logsigmoid(delta - beta * pairs.rejected_log_ratio)


@register_preference_loss("apo_zero")
def apo_zero(pairs: PairTerms, *, beta: float) -> Tensor:
    """APO-zero: chosen up, rejected down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    1 - sigmoid(beta a) + sigmoid(beta b)
    """
    return (-beta * pairs.chosen_log_ratio).sigmoid() + (beta * pairs.rejected_log_ratio).sigmoid()


@register_preference_loss("apo_down")
def apo_down(pairs: PairTerms, *, beta: float) -> Tensor:
    """APO-down: both down, rejected more (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8).

    sigmoid(beta a) + 1 - sigmoid(beta (a - b))
    """
    margin = pairs.chosen_log_ratio - pairs.rejected_log_ratio
    return (beta * pairs.chosen_log_ratio).sigmoid() + (-beta * margin).sigmoid()


@register_preference_loss("aot", pair_weights=False)
def aot(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT: the policy's margins dominate the reference's as distributions (Melnyk et al. 2024, arXiv:2406.05882).

    -log sigmoid(beta (sort(l_c - l_r) - sort(ref_c - ref_r))), sorted over the micro-batch
    """
    margins = (pairs.chosen_logprob - pairs.rejected_logprob).sort().values
    ref_margins = (pairs.ref_chosen_logprob - pairs.ref_rejected_logprob).sort().values
    return _logistic(beta * (margins - ref_margins), label_smoothing)


@register_preference_loss("aot_unpaired", pair_weights=False)
def aot_unpaired(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT: chosen log-ratios dominate rejected ones as distributions (Melnyk et al. 2024, arXiv:2406.05882).

    -log sigmoid(beta (sort(a) - sort(b))), sorted over the micro-batch
    """
    difference = pairs.chosen_log_ratio.sort().values - pairs.rejected_log_ratio.sort().values
    return _logistic(beta * difference, label_smoothing)


# ------------------------------------------------------------------------------------------------- without a reference


@register_preference_loss("sft", needs_reference=False, ld_alpha=False)
def sft(pairs: PairTerms) -> Tensor:
    """The chosen completions' negative log-likelihood, mean over their tokens; the NLL term of mixes.

    -sum over chosen tokens of log p / number of chosen tokens
    """
    return pairs.chosen_nll


@register_preference_loss("cpo", needs_reference=False)
def cpo(pairs: PairTerms, *, beta: float, label_smoothing: float, nll_coef: float = 1.0) -> Tensor:
    """CPO: DPO under a uniform reference, plus NLL of the chosen (Xu et al. 2024, arXiv:2401.08417, eq. 3 and NLL).

    -log sigmoid(beta (l_c - l_r)) + nll_coef nll_c
    """
    require(nll_coef >= 0, "nll_coef", nll_coef, "0 or more")
    return _logistic(beta * pairs.difference, label_smoothing) + nll_coef * pairs.chosen_nll


@register_preference_loss("simpo", needs_reference=False, length_normalized=True, ld_alpha=False)
def simpo(pairs: PairTerms, *, beta: float, label_smoothing: float, gamma: float = 0.5) -> Tensor:
    """SimPO: mean log-probs and a target margin (Meng et al. 2024, arXiv:2405.14734, eq. 6; beta about 2 to 10 there).

    -log sigmoid(beta (l_c / L_c - l_r / L_r) - gamma)
    """
    return _logistic(beta * pairs.difference - gamma, label_smoothing)


@register_preference_loss("alphapo", needs_reference=False, length_normalized=True, ld_alpha=False)
def alphapo(
    pairs: PairTerms, *, beta: float, label_smoothing: float, gamma: float = 0.5, reward_alpha: float = 0.25
) -> Tensor:
    """AlphaPO: SimPO whose reward is bent by alpha (Gupta et al. 2025, arXiv:2501.03884; alpha -> 0 is SimPO).

    -log sigmoid(beta (r_c - r_l) - gamma),   r = (1 - p^-alpha) / alpha,   p = exp(l / L)
    """
    if reward_alpha == 0:
        return simpo(pairs, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    exponents = -reward_alpha * pairs.rejected_logprob, -reward_alpha * pairs.chosen_logprob
    return _logistic(beta * exp_difference(*exponents) / reward_alpha - gamma, label_smoothing)


@register_preference_loss("orpo", needs_reference=False, length_normalized=True, ld_alpha=False)
def orpo(pairs: PairTerms, *, beta: float, nll_coef: float = 1.0) -> Tensor:
    """ORPO: NLL of the chosen and the odds ratio (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7; beta is its lambda).

    nll_coef nll_c - beta log sigmoid(log(odds_c / odds_r)),   odds = p / (1 - p),   p = exp(l / L)
    """
    require(nll_coef >= 0, "nll_coef", nll_coef, "0 or more")
    # Where rounding has made p = 1, 1 - p is taken as half a unit in the last place: the longest odds a float can tell.
    certain = -torch.finfo(pairs.chosen_logprob.dtype).eps / 2
    log_odds = [
        logprob - torch.log(-torch.expm1(logprob.clamp(max=certain)))
        for logprob in (pairs.chosen_logprob, pairs.rejected_logprob)
    ]
    return nll_coef * pairs.chosen_nll - beta * F.logsigmoid(log_odds[0] - log_odds[1])
