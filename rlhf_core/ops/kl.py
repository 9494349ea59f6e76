"""KL(policy || reference) from the log-probs of tokens that the policy sampled."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference), same shape as the inputs. With d = logprobs - ref_logprobs:

    - "k1": d. Unbiased, of any sign.
    - "k2": d^2 / 2. Biased in value; its *gradient* is the exact one of the KL.
    - "k3": exp(-d) - 1 + d. Unbiased, never negative.

    Source: J. Schulman, "Approximating KL divergence" (2020). exp(-d) is infinite once d < -88 in float32: a policy
    that sampled a token the reference finds e^88 times likelier is broken, and the infinity says so.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"estimator={estimator!r}: expected k1, k2 or k3")


def kl_penalty(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float, estimator: str = "k1"
) -> tuple[Tensor, Tensor]:
    """Per-token rewards: the price of diverging at every token, and the score on each completion's last token.

    r_t = -kl_coef * kl_t, plus the score at the last token (Ziegler et al. 2019, eq. 2, spread over tokens).

    Args:
        scores: (B,) reward of the whole completion. logprobs, ref_logprobs: (B, T). mask: (B, T) bool, left-aligned.

    Returns:
        rewards (B, T) and the unpriced kl (B, T), both 0 outside the mask.
    """
    kl = torch.where(mask, kl_estimate(logprobs, ref_logprobs, estimator=estimator), 0.0)
    rewards = -kl_coef * kl
    last = mask.sum(-1) - 1
    if bool((last < 0).any()):
        raise ValueError("a completion without tokens has no place for its score")
    rewards = rewards.scatter_add(1, last[:, None], scores.to(rewards.dtype)[:, None])
    return rewards, kl
