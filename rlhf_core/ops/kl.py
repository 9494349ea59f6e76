"""The KL divergence of a policy from its reference: estimated from sampled tokens, or exact over the vocabulary.

Here KL is KL(policy || reference). Which estimator to use depends on what it is used for. "right" means that the
expected gradient, over tokens sampled from the policy, is that of the KL:

    estimator  value     as a reward              as a loss                   as a loss, times the ratio
    k1         unbiased  right                    nothing: the gradient is 0  right
    k2         biased    wrong                    right                       wrong
    k3         unbiased  wrong                    KL(reference || policy)'s   right
    abs        too high  wrong                    twice the total variation's wrong
    full       exact     later tokens' part only  right                       right

- As a *reward*, -k_t is a constant, and the gradient is the policy gradient k * grad log p. With k1, gamma 1 and the
  whole return it is the gradient of the KL of whole sequences, including the effect of a token on which later states
  are visited. Near the reference k2 and k3 are of second order, so their policy gradient vanishes. "full" does not
  depend on the sampled token, so it has no gradient from the divergence at its own state: together with the full KL as
  a loss the gradient is exact.
- As a *loss*, the estimate is differentiated at the sampled tokens. "right" refers to single states: the gradient of
  the KL at each visited state, without the effect of a token on which states are visited.
- *Times the ratio* exp(new - old), with its gradient, the expectation is under the new policy: the gradient is that of
  the estimator's value at each state, so every unbiased estimator is right, also on samples of an older policy.

tests/ops/test_kl.py checks each cell on enumerated distributions; `warn_about_kl` warns about the wrong ones.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rlhf_core.ops.masked import masked_sum
from rlhf_kernels import kl_divergence, linear_kl

__all__ = [
    "ESTIMATORS",
    "USES",
    "kl_divergence",
    "kl_estimate",
    "kl_full",
    "kl_penalty",
    "linear_kl",
    "sequence_kl",
    "warn_about_kl",
]

ESTIMATORS = ("k1", "k2", "k3", "abs", "full")
USES = ("reward", "loss", "weighted loss")

_VANISHES = "its policy gradient is not that of the KL and vanishes near the reference; use k1"
_MISTAKES = {
    ("k2", "reward"): _VANISHES,
    ("k3", "reward"): _VANISHES,
    ("abs", "reward"): "its policy gradient is not that of the KL, both signs of the log-ratio are penalised; use k1",
    ("full", "reward"): "its gradient covers only the KL of later tokens; use k1, or add the full KL as a loss as well",
    ("k1", "loss"): "its expected gradient is 0; use k2 or full, or multiply it by the ratio",
    ("k3", "loss"): "its gradient is that of KL(reference || policy); use k2 or full, or multiply it by the ratio",
    ("abs", "loss"): "its gradient is that of twice the total variation distance; use k2 or full",
    ("k2", "weighted loss"): "its gradient is that of a biased value; use k1 or k3, or leave the ratio out",
    ("abs", "weighted loss"): "its gradient is that of a biased value; use k1 or k3",
}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Estimate KL(policy || reference) at each token. With d = logprobs - ref_logprobs:

    - "k1": d. Unbiased, of any sign.
    - "k2": d^2 / 2. Biased; its expected *gradient* is exactly that of the KL.
    - "k3": exp(-d) - 1 + d. Unbiased, never negative.
    - "abs": |d|. At least the KL in expectation.

    Source: J. Schulman, "Approximating KL divergence" (2020). In float32 exp(-d) is infinite for d < -88, which is not
    clamped: a sampled token that is e^88 times more likely under the reference indicates an error.

    Args:
        logprobs, ref_logprobs: log-probs of the sampled tokens, of one shape.

    Returns:
        nats, in the shape of the inputs, with gradient. Raises ValueError for an unknown estimator.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    if estimator == "abs":
        return log_ratio.abs()
    hint = "; full needs logits, see kl_full" if estimator == "full" else ""
    raise ValueError(f"estimator={estimator!r}: expected k1, k2, k3 or abs{hint}")


def kl_full(
    policy_logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0, direction: str = "reverse"
) -> Tensor:
    """Compute the exact KL at each position. With p the policy's distribution and q the reference's:

        "reverse": KL(policy || reference) = sum over v of p_v (log p_v - log q_v)
        "forward": KL(reference || policy) = sum over v of q_v (log q_v - log p_v)

    A logit of -inf gives its token probability 0. Where both distributions do, it adds 0; where only the second one
    does, the KL is infinite.

    Args:
        policy_logits, ref_logits: (..., V). temperature: both are divided by it; more than 0.

    Returns:
        (...), in nats, float32 (float64 for float64 logits), with derivatives of any order. `kl_divergence` computes
        the same in one pass over logits of one shape, and `linear_kl` from hidden states, without storing logits.

    Raises ValueError for a temperature that is not positive and an unknown direction.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction={direction!r}: expected reverse or forward")
    policy, reference = (
        torch.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, dim=-1)
        for logits in (policy_logits, ref_logits)
    )
    first, second = (policy, reference) if direction == "reverse" else (reference, policy)
    probs = first.exp()
    return (probs * torch.where(probs > 0, first - second, 0.0)).sum(-1)  # 0 log 0 = 0


def sequence_kl(kl: Tensor, mask: Tensor) -> float:
    """Return the mean over completions of their KL summed over tokens, (B, T) in nats; NaN if the mask is empty."""
    return masked_sum(kl, mask, -1)[mask.any(-1)].mean().item()


def kl_penalty(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    kl: Tensor | None = None,
    with_loss: bool = False,
    token_scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute per-token rewards: a KL penalty at every token, and the score at each completion's last token.

    r_t = -kl_coef * kl_t, plus the score at the last token (Ziegler et al. 2019, eq. 2, per token).

    Args:
        scores: (B,) reward of the whole completion. logprobs, ref_logprobs: (B, T). mask: (B, T) bool, any layout.
        kl_coef: coefficient of the KL, in score units per nat, 0 or more.
        estimator: one of `ESTIMATORS`; warns if it is wrong as a reward (the table above).
        kl: (B, T) exact KL of each position (`kl_full`); required with estimator "full", otherwise an error.
        with_loss: the same KL is also added as a loss, which makes "full" right, so it does not warn.
        token_scores: (B, T) parts of the scores that are given at their tokens; the last token gets the remainder, so
            that the rewards of a completion add up to its score minus its KL penalty.

    Returns:
        rewards (B, T), and kl (B, T) without coefficient; both 0 outside the mask.

    Raises ValueError for a negative kl_coef, an unknown estimator, a `kl` without "full" or "full" without it, and a
    completion without tokens.
    """
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef={kl_coef}: expected 0 or more")
    if (estimator == "full") != (kl is not None):
        raise ValueError(f"estimator={estimator!r}: expected a kl with full, and none with any other estimator")
    if not (with_loss and estimator == "full"):
        warn_about_kl(estimator, "reward")
    if kl is None:
        logprobs, ref_logprobs = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
        kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
    kl = torch.where(mask, kl, 0.0)
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(-1)
    if bool((last < 0).any()):
        raise ValueError("mask: expected at least one token in every completion, to hold its score")
    rewards, scores = -kl_coef * kl, scores.to(kl.dtype)
    if token_scores is not None:
        token_scores = torch.where(mask, token_scores, 0.0).to(kl.dtype)
        rewards, scores = rewards + token_scores, scores - token_scores.sum(-1)
    return rewards.scatter_add(1, last[:, None], scores[:, None]), kl


def warn_about_kl(estimator: str, use: str) -> None:
    """Emit a UserWarning, attributed to the caller's caller, if the gradient of this use is not that of the KL.

    Args:
        estimator: k1, k2, k3, abs or full. use: "reward", "loss", or "weighted loss", a loss times the ratio.

    Raises ValueError for an unknown estimator or use.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(ESTIMATORS)}")
    if use not in USES:
        raise ValueError(f"use={use!r}: expected one of {', '.join(USES)}")
    if mistake := _MISTAKES.get((estimator, use)):
        warnings.warn(f"KL estimator {estimator!r} as a {use}: {mistake}", UserWarning, stacklevel=3)
