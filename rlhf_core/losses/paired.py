"""The paired preference losses, entries of `PREFERENCE_LOSSES`. Notation:

c, r    the chosen and the rejected completion
l       log-prob of a completion under the policy, summed over its tokens; l / L its mean
a, b    log-ratio l - l_ref of the chosen and of the rejected completion
d       a - b (under another f-divergence: f'(e^a) - f'(e^b), see divergence.py)
e       label_smoothing, the probability that a label is wrong
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.divergence import exp_difference
from rlhf_core.losses.pairs import PairTerms, RunningOption, register_preference_loss
from rlhf_core.losses.registry import require, smoothed_logistic

# ------------------------------------------------------------------------------------------- DPO and logistic variants


@register_preference_loss("sigmoid", f_divergence=True)
def sigmoid(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); smoothed: conservative DPO (Mitchell 2023, eq. 3).

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)
    """
    return smoothed_logistic(beta * pairs.difference, label_smoothing)


@register_preference_loss("sigmoid_norm", length_normalized=True, f_divergence=True)
def sigmoid_norm(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO over mean log-ratios (Tulu 3, Lambert et al. 2024, arXiv:2411.15124, eq. 6).

    -(1 - e) log sigmoid(beta (a / L_c - b / L_r)) - e log sigmoid(-beta (a / L_c - b / L_r))
    """
    return smoothed_logistic(beta * pairs.difference, label_smoothing)


@register_preference_loss("robust", f_divergence=True)
def robust(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: unbiased under labels flipped with probability e (Chowdhury et al. 2024, arXiv:2403.00409).

    (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)

    Unbounded below where e > 0.
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

    Needs e > 0: the KL to a label without uncertainty is infinite.
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
    # m exp(-beta d) as one exponential: the separate factors give 0 * inf for a very negative d.
    exponential = (F.logsigmoid(logits / tau) - logits).exp()
    return (-logits / tau).sigmoid() * -F.logsigmoid(logits) + exponential


@register_preference_loss(
    "beta_dpo", f_divergence=True, across_pairs=True, running_mean=RunningOption("gap_mean", ("gap",), momentum=0.9)
)
def beta_dpo(
    pairs: PairTerms,
    *,
    beta: float,
    label_smoothing: float,
    beta_alpha: float = 0.6,
    gap_mean: float = 0.0,
    min_beta: float = 1e-3,
) -> Tensor:
    """Beta-DPO: beta adapts to the mean difference of the batch (Wu et al. 2024, arXiv:2407.08639; no data filter).

    -log sigmoid(beta' d),   beta' = max(min_beta, beta (1 + beta_alpha (mean d - gap_mean))) without gradient

    `gap_mean` is the running mean of d over earlier batches (momentum 0.9, as in the paper), kept by the caller.
    """
    gap = pairs.difference.detach().sum() / max(len(pairs.difference), 1)
    dynamic_beta = (beta * (1 + beta_alpha * (gap - gap_mean))).clamp(min=min_beta)
    return smoothed_logistic(dynamic_beta * pairs.difference, label_smoothing)


@register_preference_loss("odpo", f_divergence=True, needs=("margin",))
def odpo(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """ODPO: DPO with an offset, by how much the chosen completion is better (Amini et al. 2024, arXiv:2402.10571).

    -log sigmoid(beta d - margin),   margin (B,), for example alpha log(score_c - score_r)
    """
    return smoothed_logistic(beta * pairs.difference - pairs.margin, label_smoothing)


@register_preference_loss("r_dpo", f_divergence=True)
def r_dpo(pairs: PairTerms, *, beta: float, label_smoothing: float, length_coef: float = 0.01) -> Tensor:
    """Length-regularised DPO: the reward is reduced by length_coef per token (Park et al. 2024, arXiv:2403.19159).

    -log sigmoid(beta d + length_coef (L_c - L_r))
    """
    return smoothed_logistic(
        beta * pairs.difference + length_coef * (pairs.chosen_length - pairs.rejected_length), label_smoothing
    )


@register_preference_loss("dpop")
def dpop(pairs: PairTerms, *, beta: float, label_smoothing: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive: penalty where the chosen log-ratio is negative (Pal et al. 2024, arXiv:2402.13228, eq. 3).

    -log sigmoid(beta (d - dpop_lambda max(0, -a)))
    """
    require(dpop_lambda >= 0, "dpop_lambda", dpop_lambda, "0 or more")
    penalty = dpop_lambda * F.relu(-pairs.chosen_log_ratio)
    return smoothed_logistic(beta * (pairs.difference - penalty), label_smoothing)


@register_preference_loss("cal_dpo")
def cal_dpo(pairs: PairTerms, *, beta: float, cal_coef: float = 1.0) -> Tensor:
    """Cal-DPO: log-ratios regressed to +-1 / (2 beta) (Xiao et al. 2024, arXiv:2412.14516, eq. 10).

    -log sigmoid(d) + cal_coef ((a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2)

    The authors' code uses cal_coef 1/2.
    """
    require(cal_coef >= 0, "cal_coef", cal_coef, "0 or more")
    return -F.logsigmoid(pairs.difference) + cal_coef * sppo_hard(pairs, beta=beta)


@register_preference_loss("tdpo1", ld_alpha=False, needs=("kl",))
def tdpo1(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """TDPO1: token-level DPO (Zeng et al. 2024, arXiv:2404.11999, eq. 15).

    -log sigmoid(beta (d - (KL_r - KL_c))),   KL = sum over tokens of KL(reference || policy), with gradient

    The KL of a side is its `Completions.kl`, as `kl_full(..., direction="forward")` computes it.
    """
    return smoothed_logistic(beta * (pairs.difference - (pairs.rejected_kl - pairs.chosen_kl)), label_smoothing)


@register_preference_loss("tdpo2", ld_alpha=False, needs=("kl",))
def tdpo2(pairs: PairTerms, *, beta: float, label_smoothing: float, tdpo_alpha: float = 0.5) -> Tensor:
    """TDPO2: token-level DPO, no gradient through the chosen side's KL (Zeng et al. 2024, arXiv:2404.11999, eq. 17).

    -log sigmoid(beta (d - tdpo_alpha (KL_r - stop_gradient(KL_c))))
    """
    shift = tdpo_alpha * (pairs.rejected_kl - pairs.chosen_kl.detach())
    return smoothed_logistic(beta * (pairs.difference - shift), label_smoothing)


# ---------------------------------------------------------------------------------- other functions of the log-ratios


@register_preference_loss("hinge", f_divergence=True)
def hinge(pairs: PairTerms, *, beta: float) -> Tensor:
    """Hinge loss on DPO's logit (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425; on log-ratios: RSO, arXiv:2309.06657).

    max(0, 1 - beta d)
    """
    return F.relu(1 - beta * pairs.difference)


@register_preference_loss("ipo", length_normalized=True, f_divergence=True)
def ipo(pairs: PairTerms, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), over mean log-ratios, as confirmed by its authors.

    (a / L_c - b / L_r - 1 / (2 beta))^2

    Its optimum is ref exp(E[p(y > y')] / beta), not DPO's ref exp(r / beta): the log-ratios stay bounded even if every
    annotator agrees.
    """
    return (pairs.difference - 1 / (2 * beta)).square()


@register_preference_loss("sppo_hard")
def sppo_hard(pairs: PairTerms, *, beta: float) -> Tensor:
    """SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with P = 1 and 0).

    (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2
    """
    target = 1 / (2 * beta)
    return (pairs.chosen_log_ratio - target).square() + (pairs.rejected_log_ratio + target).square()


@register_preference_loss("nca_pair")
def nca_pair(pairs: PairTerms, *, beta: float) -> Tensor:
    """NCA: noise-contrastive alignment, each side on its own (Chen et al. 2024, arXiv:2402.05369, table 1).

    -log sigmoid(beta a) - 1/2 log sigmoid(-beta a) - 1/2 log sigmoid(-beta b)
    """
    chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register_preference_loss("bco_pair", running_mean=RunningOption("delta", ("reward",)))
def bco_pair(pairs: PairTerms, *, beta: float, delta: float = 0.0) -> Tensor:
    """BCO on pairs: a binary classifier of chosen against rejected (Jung et al. 2024, arXiv:2404.04656).

    -log sigmoid(beta a - delta) - log sigmoid(-(beta b - delta))

    `delta` is the running mean of the rewards of both sides, kept by the caller; with 0 this is TRL's loss.
    """
    return -F.logsigmoid(beta * pairs.chosen_log_ratio - delta) - F.logsigmoid(delta - beta * pairs.rejected_log_ratio)


@register_preference_loss("apo_zero")
def apo_zero(pairs: PairTerms, *, beta: float) -> Tensor:
    """APO-zero: raises chosen, lowers rejected log-ratios (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    1 - sigmoid(beta a) + sigmoid(beta b)
    """
    return (-beta * pairs.chosen_log_ratio).sigmoid() + (beta * pairs.rejected_log_ratio).sigmoid()


@register_preference_loss("apo_down")
def apo_down(pairs: PairTerms, *, beta: float) -> Tensor:
    """APO-down: lowers both log-ratios, the rejected one more (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8).

    sigmoid(beta a) + 1 - sigmoid(beta (a - b))
    """
    margin = pairs.chosen_log_ratio - pairs.rejected_log_ratio
    return (beta * pairs.chosen_log_ratio).sigmoid() + (-beta * margin).sigmoid()


@register_preference_loss("aot", pair_weights=False, across_pairs=True)
def aot(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT: stochastic dominance of the policy's margins over the reference's (Melnyk et al. 2024, arXiv:2406.05882).

    -log sigmoid(beta (sort(l_c - l_r) - sort(ref_c - ref_r))), sorted over all pairs
    """
    margins = (pairs.chosen_logprob - pairs.rejected_logprob).sort().values
    ref_margins = (pairs.ref_chosen_logprob - pairs.ref_rejected_logprob).sort().values
    return smoothed_logistic(beta * (margins - ref_margins), label_smoothing)


@register_preference_loss("aot_unpaired", pair_weights=False, across_pairs=True)
def aot_unpaired(pairs: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT: stochastic dominance of chosen over rejected log-ratios (Melnyk et al. 2024, arXiv:2406.05882).

    -log sigmoid(beta (sort(a) - sort(b))), sorted over all pairs
    """
    difference = pairs.chosen_log_ratio.sort().values - pairs.rejected_log_ratio.sort().values
    return smoothed_logistic(beta * difference, label_smoothing)


# ------------------------------------------------------------------------------------------------- without a reference


@register_preference_loss("sft", needs_reference=False, ld_alpha=False)
def sft(pairs: PairTerms) -> Tensor:
    """Negative log-likelihood of the chosen completions, mean over their tokens; the NLL term of mixes.

    -sum over chosen tokens of log p / number of chosen tokens
    """
    return pairs.chosen_nll


@register_preference_loss("cpo", needs_reference=False)
def cpo(pairs: PairTerms, *, beta: float, label_smoothing: float, nll_coef: float = 1.0) -> Tensor:
    """CPO: DPO under a uniform reference, plus NLL of the chosen (Xu et al. 2024, arXiv:2401.08417, eq. 3 and NLL).

    -log sigmoid(beta (l_c - l_r)) + nll_coef nll_c
    """
    require(nll_coef >= 0, "nll_coef", nll_coef, "0 or more")
    return smoothed_logistic(beta * pairs.difference, label_smoothing) + nll_coef * pairs.chosen_nll


@register_preference_loss("simpo", needs_reference=False, length_normalized=True, ld_alpha=False)
def simpo(pairs: PairTerms, *, beta: float, label_smoothing: float, gamma: float = 0.5) -> Tensor:
    """SimPO: mean log-probs and a target margin (Meng et al. 2024, arXiv:2405.14734, eq. 6; beta about 2 to 10 there).

    -log sigmoid(beta (l_c / L_c - l_r / L_r) - gamma)
    """
    return smoothed_logistic(beta * pairs.difference - gamma, label_smoothing)


@register_preference_loss("alphapo", needs_reference=False, length_normalized=True, ld_alpha=False)
def alphapo(
    pairs: PairTerms, *, beta: float, label_smoothing: float, gamma: float = 0.5, reward_alpha: float = 0.25
) -> Tensor:
    """AlphaPO: SimPO with a power-transformed reward (Gupta et al. 2025, arXiv:2501.03884; alpha -> 0 is SimPO).

    -log sigmoid(beta (r_c - r_l) - gamma),   r = (1 - p^-alpha) / alpha,   p = exp(l / L)
    """
    if reward_alpha == 0:
        return simpo(pairs, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    exponents = -reward_alpha * pairs.rejected_logprob, -reward_alpha * pairs.chosen_logprob
    return smoothed_logistic(beta * exp_difference(*exponents) / reward_alpha - gamma, label_smoothing)


@register_preference_loss("orpo", needs_reference=False, length_normalized=True, ld_alpha=False)
def orpo(pairs: PairTerms, *, beta: float, nll_coef: float = 1.0) -> Tensor:
    """ORPO: NLL of the chosen and the odds ratio (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7; beta: its lambda).

    nll_coef nll_c - beta log sigmoid(log(odds_c / odds_r)),   odds = p / (1 - p),   p = exp(l / L)
    """
    require(nll_coef >= 0, "nll_coef", nll_coef, "0 or more")
    # Where p rounds to 1, 1 - p is taken as half a unit in the last place, so that the odds stay finite.
    certain = -torch.finfo(pairs.chosen_logprob.dtype).eps / 2
    log_odds = [
        logprob - torch.log(-torch.expm1(logprob.clamp(max=certain)))
        for logprob in (pairs.chosen_logprob, pairs.rejected_logprob)
    ]
    return nll_coef * pairs.chosen_nll - beta * F.logsigmoid(log_odds[0] - log_odds[1])
