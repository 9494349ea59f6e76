"""Policy-gradient losses over sampled tokens.

A loss has three parts:

    surrogate      loss of one token: the functions below, entries of POLICY_LOSSES
    ratio_level    ratio new / sampling policy of one "token", or of the "sequence": its geometric mean (GSPO)
    aggregation    from tokens to a scalar: "token", "sequence", "sequence_sum", "max_length" (`masked_aggregate`)

A published algorithm is one combination: GRPO is the clipped surrogate averaged within each completion first, DAPO the
same averaged over tokens, Dr. GRPO the same divided by a constant length. Each of the three can be overridden:
`policy_loss("grpo", ..., aggregation="token")`. What a paper prescribes besides (clip ranges, KL coefficient, scale of
advantages) is in the entry's `recipe`, which `policy_loss` does not apply.

The KL to the reference, the entropy bonus and the pretraining loss are separate terms to be added (`kl_loss`,
`entropy_bonus`, `ptx_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_core.losses.registry import (
    Function,
    add_entry,
    in_full_precision,
    look_up,
    require,
    require_mask,
    share_options,
)
from rlhf_core.losses.sft import sft_loss
from rlhf_core.ops.kl import kl_estimate, warn_about_kl
from rlhf_core.ops.masked import masked_aggregate, masked_mean, masked_sum, pick, require_tokens


@dataclass(frozen=True)
class PolicyTerms:
    """What a surrogate is computed from, each (B, T), 0 outside the mask."""

    new_logprobs: Tensor  # with gradient
    log_ratio: Tensor  # new minus sampling log-prob, of the token or of the whole sequence; with gradient
    advantages: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Recipe:
    """What a paper prescribes besides the loss itself; a job uses these values where its settings give none.

    `policy_loss` does not apply it.
    """

    options: Mapping[str, float] = field(default_factory=dict)
    """Options of the surrogate, such as clip_high."""
    kl_coef: float = 0.04
    """Coefficient of the KL loss; 0: no reference. GRPO: 0.04."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by (`group_advantages`)."""
    local_normalizer: bool = False
    """Divide by the tokens of each micro-batch instead of those of the whole optimizer step."""


@dataclass(frozen=True)
class PolicyLoss:
    """One entry of the table: a surrogate with the ratio level, the aggregation and the recipe of its paper."""

    surrogate: Callable[..., Tensor | tuple[Tensor, Tensor]]
    aggregation: str = "token"
    ratio_level: str = "token"
    weights: bool = True
    """Importance weights may multiply each token's loss."""
    source: str = ""
    """Paper of this combination, if it differs from that of its surrogate."""
    recipe: Recipe = Recipe()


POLICY_LOSSES: dict[str, PolicyLoss] = {}


def register_policy_loss(
    name: str,
    *,
    aggregation: str = "token",
    ratio_level: str = "token",
    weights: bool = True,
    source: str = "",
    recipe: Recipe | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that adds a surrogate to `POLICY_LOSSES`: `surrogate(terms, *, options)` returns each token's
    loss, (B, T), to be minimised.

    It may return a pair instead: the losses and a bool (B, T), True where a token was clipped, which is logged as
    `clip_fraction`.

    Args: the fields of `PolicyLoss`. Raises ValueError for a name that is already registered.
    """

    def register(surrogate: Function) -> Function:
        entry = PolicyLoss(surrogate, aggregation, ratio_level, weights, source, recipe or Recipe())
        add_entry(POLICY_LOSSES, name, entry, "policy loss")
        return surrogate

    return register


def policy_loss(
    name: str = "ppo",
    *,
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ratio_level: str | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the named surrogate over sampled tokens, aggregated to a scalar.

    Args:
        new_logprobs: (B, T) under the policy now, with gradient. logprobs: (B, T) under the policy that sampled.
        advantages: (B, T), or (B,) or (B, 1) for one per completion. mask: (B, T) bool.
        ratio_level: "token" or "sequence"; None: that of the entry.
        aggregation, normalizer, max_length: see `masked_aggregate`; aggregation None: that of the entry.
        weights: (B, T) or (B, 1) factors of each token's loss, without gradient, such as `importance_weights`.
        options: keyword-only parameters of the surrogate, such as `clip`, `clip_high` and `dual_clip`.

    Returns:
        the loss, a scalar, and stats over tokens of the mask: `approx_kl`, the k3 estimate of KL(sampling || new
        policy), `ratio_max`, and `clip_fraction` if the surrogate clips. Only what the formula clips is clamped: where
        A < 0 and there is no dual clip, a ratio that overflows gives an infinite loss.

    Raises ValueError for an unknown name or option, a parameter out of range, or a mask that is False everywhere while
    no normalizer is given.
    """
    entry = look_up(POLICY_LOSSES, name, "policy loss")
    own = share_options({name: entry.surrogate}, options)[name]
    require_mask(mask)
    new_logprobs = in_full_precision("new_logprobs", new_logprobs, mask)
    logprobs = in_full_precision("logprobs", logprobs, mask)
    require_tokens(mask, normalizer)
    if weights is not None and not entry.weights:
        raise ValueError(
            f"weights: not defined for {name!r}, a nonlinear function of the ratio; pass the log-probs of the sampling "
            "engine as `logprobs` instead"
        )
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).to(log_ratio.dtype)
    terms = PolicyTerms(
        new_logprobs=torch.where(mask, new_logprobs, 0.0),
        log_ratio=_at_level(log_ratio, mask, ratio_level or entry.ratio_level),
        advantages=torch.where(mask, advantages, 0.0),
        mask=mask,
    )
    losses = entry.surrogate(terms, **own)
    losses, clipped = losses if isinstance(losses, tuple) else (losses, None)
    if weights is not None:
        losses = losses * weights.detach()
    loss = masked_aggregate(
        losses, mask, aggregation or entry.aggregation, normalizer=normalizer, max_length=max_length
    )
    with torch.no_grad():
        stats = {
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
            "ratio_max": torch.where(mask, log_ratio.exp(), 0.0).max(),
        }
        if clipped is not None:
            stats["clip_fraction"] = masked_mean(clipped.float(), mask)
    return loss, stats


def _at_level(log_ratio: Tensor, mask: Tensor, ratio_level: str) -> Tensor:
    """Return log-ratios of tokens, or at each token the mean over its sequence (GSPO, arXiv:2507.18071, eq. 7)."""
    require(ratio_level in ("token", "sequence"), "ratio_level", repr(ratio_level), "'token' or 'sequence'")
    if ratio_level == "token":
        return log_ratio
    return masked_mean(log_ratio, mask, -1)[:, None].expand_as(log_ratio)


# ------------------------------------------------------------------------------------------------------- the surrogates


@register_policy_loss("ppo")
@register_policy_loss("grpo", aggregation="sequence", source="GRPO (Shao et al. 2024, arXiv:2402.03300)")
@register_policy_loss(
    "dr_grpo",
    aggregation="max_length",
    source="Dr. GRPO (Liu et al. 2025, arXiv:2503.20783)",
    recipe=Recipe(kl_coef=0.0, scale="none"),
)
@register_policy_loss(
    "dapo",
    source="DAPO (Yu et al. 2025, arXiv:2503.14476)",
    recipe=Recipe(options={"clip_high": 0.28}, kl_coef=0.0),
)
@register_policy_loss(
    "bnpo",
    source="BNPO, as TRL has it: DAPO normalised over the local micro-batch (pass no normalizer)",
    recipe=Recipe(local_normalizer=True),
)
@register_policy_loss(
    "gspo",
    aggregation="sequence",
    ratio_level="sequence",
    source="GSPO (Zheng et al. 2025, arXiv:2507.18071)",
    recipe=Recipe(options={"clip": 3e-4, "clip_high": 4e-4}),
)
@register_policy_loss(
    "luspo", aggregation="sequence_sum", ratio_level="sequence", source="LUSPO (Liu et al. 2026, arXiv:2602.05261)"
)
def clipped_surrogate(
    terms: PolicyTerms, *, clip: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

        -min(ratio A, clamp(ratio, 1 - clip, 1 + clip_high) A)

    `clip_high`, by default equal to `clip`, is DAPO's clip-higher (arXiv:2503.14476, eq. 8; 0.28 there). `dual_clip`
    c > 1 bounds the loss where A < 0 by -c A (Ye et al. 2020, arXiv:1912.09729, eq. 5); TRL calls it delta.
    """
    high = clip if clip_high is None else clip_high
    require(clip > 0, "clip", clip, "more than 0")
    require(high > 0, "clip_high", high, "more than 0")
    require(dual_clip is None or dual_clip > 1 + high, "dual_clip", dual_clip, f"more than 1 + clip_high = {1 + high}")
    # Where A >= 0 a ratio above 1 + high never is the minimum. Clamped before exp, whose gradient would be 0 * inf.
    worst = math.inf if dual_clip is None else math.log(dual_clip)
    ratio = terms.log_ratio.clamp(max=pick(terms.advantages >= 0, math.log1p(high), worst, terms.log_ratio)).exp()
    surrogate = torch.minimum(ratio * terms.advantages, ratio.clamp(1 - clip, 1 + high) * terms.advantages)
    exact = terms.log_ratio.detach().exp()
    return -surrogate, (exact < 1 - clip) | (exact > 1 + high)


@register_policy_loss("reinforce", aggregation="sequence_sum")
def reinforce(terms: PolicyTerms) -> Tensor:
    """REINFORCE (Williams 1992): the score function estimator, on policy, without a ratio.

    -A log pi(token)
    """
    return -terms.advantages * terms.new_logprobs


@register_policy_loss("cispo")
def cispo(terms: PolicyTerms, *, ratio_max: float = 5.0) -> tuple[Tensor, Tensor]:
    """CISPO: clips the ratio, drops no token (MiniMax-M1, arXiv:2506.13585, eq. 4; ratio_max 5: arXiv:2510.13786).

    -stop_gradient(min(ratio, ratio_max)) A log pi(token)
    """
    require(ratio_max > 0, "ratio_max", ratio_max, "more than 0")
    ratio = terms.log_ratio.detach().exp()
    return -ratio.clamp(max=ratio_max) * terms.advantages * terms.new_logprobs, ratio > ratio_max


@register_policy_loss("sapo", aggregation="sequence")
def sapo(terms: PolicyTerms, *, temperature_pos: float = 1.0, temperature_neg: float = 1.05) -> Tensor:
    """SAPO: a sigmoid gate instead of the clip (Gao et al. 2025, arXiv:2511.20347, eq. 5 and 6).

    -4 / tau sigmoid(tau (ratio - 1)) A,   tau = temperature_pos where A > 0, else temperature_neg
    """
    for name, value in (("temperature_pos", temperature_pos), ("temperature_neg", temperature_neg)):
        require(0 < value < math.inf, name, value, "more than 0")
    tau = pick(terms.advantages > 0, temperature_pos, temperature_neg, terms.log_ratio)
    # Above tau (ratio - 1) = 750 the sigmoid is 1 and its gradient 0 in any float; exp's gradient would be 0 * inf.
    ratio = terms.log_ratio.clamp(max=torch.log1p(750 / tau)).exp()
    return -4 / tau * (tau * (ratio - 1)).sigmoid() * terms.advantages


@register_policy_loss("gmpo", aggregation="sequence")
def gmpo(terms: PolicyTerms, *, clip: float = 0.4, clip_high: float | None = None) -> tuple[Tensor, Tensor]:
    """GMPO: the geometric mean of clipped ratios (Zhao et al. 2025, arXiv:2507.20673, eq. 4).

        -exp(mean over tokens of clipped log-ratio) A
        clipped: min(log ratio, clip_high) where A >= 0, max(log ratio, -clip) where A < 0

    The clip is on log-ratios: 0.4 allows e^-0.4 to e^0.4. A is one number per completion, the mean of (B, T) ones.
    """
    high = clip if clip_high is None else clip_high
    require(clip > 0, "clip", clip, "more than 0")
    require(high > 0, "clip_high", high, "more than 0")
    advantage = masked_mean(terms.advantages, terms.mask, -1)[:, None]
    cut = torch.where(advantage >= 0, terms.log_ratio.clamp(max=high), terms.log_ratio.clamp(min=-clip))
    loss = -masked_mean(cut, terms.mask, -1)[:, None].exp() * advantage
    return loss.expand_as(cut), cut.detach() != terms.log_ratio.detach()


@register_policy_loss("vespo", weights=False)
def vespo(
    terms: PolicyTerms,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """VESPO: a gamma-density weight of the sequence's ratio (Shen et al. 2026, arXiv:2602.10693).

    -stop_gradient(phi(w)) A log pi(token),   phi(w) = e^lambda w^k e^(-lambda w),   phi(1) = 1
    w = product of the tokens' ratios;   k, lambda by the sign of A
    """
    for name, value in (("k_pos", k_pos), ("lambda_pos", lambda_pos), ("k_neg", k_neg), ("lambda_neg", lambda_neg)):
        require(0 < value < math.inf, name, value, "more than 0")
    log_w = masked_sum(terms.log_ratio.detach(), terms.mask, -1)[:, None]
    positive = terms.advantages >= 0
    k, lam = (pick(positive, *pair, terms.log_ratio) for pair in ((k_pos, k_neg), (lambda_pos, lambda_neg)))
    # In log space: w^k may overflow where e^(-lambda w) is 0.
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return -phi * terms.advantages * terms.new_logprobs


# ---------------------------------------------------------------------------------------------- terms added to a loss


def kl_loss(
    new_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str = "k2",
    logprobs: Tensor | None = None,
    ratio_level: str = "token",
    aggregation: str = "token",
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the KL to the reference as a loss term on sampled tokens, to be multiplied by a coefficient and added.

        mean of k,   k one of k1, k2, k3 (`kl_estimate`);   with `logprobs`: mean of (new / sampling policy) k

    Without `logprobs`, "k2" has the gradient of the KL, the expected gradient of "k1" is 0, and that of "k3" is of the
    other direction. With `logprobs`, those under the policy that sampled, each estimate is multiplied by the ratio of
    new to sampling policy, with its gradient: then "k1" and "k3" have the gradient of the KL (DeepSeek-V3.2,
    arXiv:2512.02556) and "k2" has not. A combination with a wrong gradient warns, see ops/kl.py.

    Args:
        new_logprobs: (B, T) with gradient. ref_logprobs, logprobs: (B, T). mask: (B, T) bool.
        ratio_level: of the ratio, as in `policy_loss`. aggregation, normalizer, max_length: see `masked_aggregate`.

    Returns:
        the loss, a scalar, and stats: `kl`, the mean of the estimate over tokens, without the ratio.

    Raises ValueError for an unknown estimator, ratio level or aggregation.
    """
    warn_about_kl(estimator, "loss" if logprobs is None else "weighted loss")
    require_mask(mask)
    new_logprobs = in_full_precision("new_logprobs", new_logprobs, mask)
    ref_logprobs = in_full_precision("ref_logprobs", ref_logprobs, mask)
    logprobs = in_full_precision("logprobs", logprobs, mask)
    new_logprobs, ref_logprobs = torch.where(mask, new_logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0)
    kl = kl_estimate(new_logprobs, ref_logprobs, estimator=estimator)
    weighted = kl
    if logprobs is not None:
        log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
        weighted = kl * _at_level(log_ratio, mask, ratio_level).exp()
    loss = masked_aggregate(weighted, mask, aggregation, normalizer=normalizer, max_length=max_length)
    return loss, {"kl": masked_mean(kl.detach(), mask)}


def entropy_bonus(
    entropy: Tensor,
    mask: Tensor,
    *,
    entropy_coef: float,
    aggregation: str = "token",
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a bonus for the policy's entropy (Williams and Peng 1991), in nats per token, to be added to a loss.

        -entropy_coef * mean of H,   H = -sum over v of p_v log p_v

    Args:
        entropy: (B, T) of the whole distribution at each token, with gradient (`vocab_statistics`: dH / dz_v =
            -p_v (log p_v + H)). It cannot be estimated from the log-probs of sampled tokens: E[-grad log p] is 0.
        mask: (B, T) bool.
        entropy_coef: 0 or more. aggregation, normalizer, max_length: see `masked_aggregate`.

    Returns:
        the loss term, a scalar, and stats: `entropy`, the mean over tokens.
    """
    require(entropy_coef >= 0, "entropy_coef", entropy_coef, "0 or more")
    mean = masked_aggregate(entropy, mask, aggregation, normalizer=normalizer, max_length=max_length)
    return -entropy_coef * mean, {"entropy": masked_mean(entropy.detach(), mask)}


def ptx_loss(
    logprobs: Tensor, mask: Tensor, *, ptx_coef: float, normalizer: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the PPO-ptx term: NLL of pretraining text in each update (Ouyang et al. 2022, arXiv:2203.02155, eq. 2).

        ptx_coef * mean over tokens of -log pi(token)

    The paper's coefficient is 27.8, for a sum over the rollout batch; here it multiplies a mean over tokens.

    Args:
        logprobs: (B, T) of the pretraining text, with gradient. mask: (B, T) bool. ptx_coef: 0 or more.

    Returns:
        the loss term, a scalar, and stats: `ptx_nll`.
    """
    require(ptx_coef >= 0, "ptx_coef", ptx_coef, "0 or more")
    loss, stats = sft_loss(logprobs, mask, normalizer=normalizer)
    return ptx_coef * loss, {"ptx_nll": stats["nll"]}


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    weight_max: float = 3.0,
    weight_min: float = 0.0,
) -> Tensor:
    """Compute importance weights p_policy / p_engine of samples from an inference engine, restricted to a range.

    - mode "truncate": weights are clamped to `weight_min` and `weight_max` (truncated importance sampling, Ionides
      2008: small bias, small variance).
    - mode "mask": a weight outside the range becomes 0; its tokens have loss 0 but are still counted.
    - level "sequence": the product over the completion's tokens, at each of them; level "token": each token's own.

    Args:
        logprobs: (B, T) from a forward of the training code, with the weights that sampled. rollout_logprobs: (B, T)
            from the engine that sampled. mask: (B, T) bool.

    Returns:
        (B, T), 0 outside the mask, without gradient: for `policy_loss(weights=...)`.

    Raises ValueError for an unknown level or mode, or unless 0 <= weight_min < weight_max.
    """
    require(level in ("token", "sequence"), "level", repr(level), "'token' or 'sequence'")
    require(mode in ("truncate", "mask"), "mode", repr(mode), "'truncate' or 'mask'")
    require(0 <= weight_min < weight_max, "weight_min", weight_min, f"between 0 and weight_max = {weight_max}")
    log_weight = torch.where(mask, logprobs - rollout_logprobs, 0.0)
    if level == "sequence":
        log_weight = log_weight.sum(-1, keepdim=True).expand_as(log_weight)
    weight = log_weight.exp()
    if mode == "truncate":
        weight = weight.clamp(weight_min, weight_max)
    else:
        weight = torch.where((weight >= weight_min) & (weight <= weight_max), weight, 0.0)
    return torch.where(mask, weight, 0.0)


@torch.no_grad()
def off_policy_mask(
    new_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """Compute which tokens to keep: all except those of completions with A < 0 that are far off policy (DeepSeek-V3.2).

        keep where A >= 0 or mean over the completion's tokens of (log p_rollout - log p_new) <= threshold

    This is arXiv:2512.02556, eq. 9. As `weights` of `policy_loss`, the other tokens have loss 0 but are counted; as
    `mask & off_policy_mask(...)` they are not counted.

    Args:
        new_logprobs, rollout_logprobs: (B, T). advantages: (B,), (B, 1) or (B, T). mask: (B, T) bool.
        threshold: nats per token, more than 0.

    Returns:
        (B, T) bool, False outside the mask.

    Raises ValueError for a threshold that is not positive.
    """
    require(threshold > 0, "threshold", threshold, "more than 0")
    kl = masked_mean(rollout_logprobs - new_logprobs, mask, -1)[:, None]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    return mask & ((advantages >= 0) | (kl <= threshold))
