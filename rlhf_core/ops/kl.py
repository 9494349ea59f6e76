"""The KL of a policy from its reference: estimated from sampled tokens, or exact over the vocabulary.

One number, four uses, and an estimator that is right in one is wrong in another. KL is KL(policy || reference), and
"right" means that the expected gradient, over tokens the policy sampled, is the KL's:

    estimator  value     as a reward              as a loss                   as a loss, times the ratio
    k1         unbiased  right                    nothing: the gradient is 0  right
    k2         biased    wrong                    right                       wrong
    k3         unbiased  wrong                    KL(reference || policy)'s   right
    abs        too high  wrong                    twice the total variation's wrong
    full       exact     later tokens' part only  right                       right

- As a *reward*, -k_t is a number, which only the policy gradient k * grad log p carries. With k1, gamma 1 and the whole
  return, that is the gradient of the sequences' KL, with what a token owes for leading to states where the policy
  diverges. Near the reference k2 and k3 are of second order and hardly push back. "full" does not depend on the token
  that was sampled, so its own divergence holds no token to account: with the loss added to it, the two are exact.
- As a *loss*, the estimate is differentiated at the sampled tokens. Right is meant state by state: the gradient of each
  visited state's KL, without what a token owes for leading there.
- *Times the ratio* exp(new - old), with its gradient, the expectation is the new policy's: the gradient is that of the
  estimator's value, state by state, so whichever is unbiased is right, and old samples do as well as new ones.

tests/ops/test_kl.py proves each cell on enumerated distributions; `warn_about_kl` says which are wrong.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rlhf_kernels import kl_divergence, linear_kl

__all__ = [
    "ESTIMATORS",
    "USES",
    "kl_divergence",
    "kl_estimate",
    "kl_full",
    "kl_penalty",
    "linear_kl",
    "warn_about_kl",
]

ESTIMATORS = ("k1", "k2", "k3", "abs", "full")
USES = ("reward", "loss", "weighted loss")

_FADES = "its policy gradient is not the KL's and fades near the reference; use k1"
_MISTAKES = {
    ("k2", "reward"): _FADES,
    ("k3", "reward"): _FADES,
    ("abs", "reward"): "its policy gradient is not the KL's, a token too rare is priced like one too frequent; use k1",
    ("full", "reward"): "it carries only what later tokens cost; use k1, or add the full KL as a loss as well",
    ("k1", "loss"): "its expected gradient is 0; use k2 or full, or multiply it by the ratio",
    ("k3", "loss"): "its gradient is that of KL(reference || policy); use k2 or full, or multiply it by the ratio",
    ("abs", "loss"): "its gradient is that of twice the total variation distance; use k2 or full",
    ("k2", "weighted loss"): "its gradient is that of a biased value; use k1 or k3, or leave the ratio out",
    ("abs", "weighted loss"): "its gradient is that of a biased value; use k1 or k3",
}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference), same shape as the inputs. With d = logprobs - ref_logprobs:

    - "k1": d. Unbiased, of any sign.
    - "k2": d^2 / 2. Biased in value; its *gradient* is the exact one of the KL.
    - "k3": exp(-d) - 1 + d. Unbiased, never negative.
    - "abs": |d|. Never below the KL in expectation.

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
    if estimator == "abs":
        return log_ratio.abs()
    hint = "; full needs the logits: kl_full" if estimator == "full" else ""
    raise ValueError(f"estimator={estimator!r}: expected k1, k2, k3 or abs{hint}")


def kl_full(
    policy_logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0, direction: str = "reverse"
) -> Tensor:
    """Exact KL at each position, summed over the vocabulary. With p the policy's distribution and q the reference's:

        "reverse": KL(policy || reference) = sum over v of p_v (log p_v - log q_v)
        "forward": KL(reference || policy) = sum over v of q_v (log q_v - log p_v)

    A logit of -inf is a token that cannot be sampled; where both forbid it, it costs nothing. One that only the second
    distribution forbids makes the KL infinite, as it is.

    Args:
        policy_logits, ref_logits: (..., V). temperature: both are divided by it; more than 0.

    Returns:
        (...), in nats, float32 (float64 for float64 logits), with any derivative. `kl_divergence` is the same in one
        pass over logits of one shape, and `linear_kl` from hidden states, without the logits.

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
    """Per-token rewards: the price of diverging at every token, and the score on each completion's last token.

    r_t = -kl_coef * kl_t, plus the score at the last token (Ziegler et al. 2019, eq. 2, spread over tokens).

    Args:
        scores: (B,) reward of the whole completion. logprobs, ref_logprobs: (B, T). mask: (B, T) bool, any layout.
        kl_coef: the price of a nat, 0 or more.
        estimator: warns where it is wrong as a reward (the table above).
        kl: (B, T) the exact KL of each position (`kl_full`) instead of an estimate; with "full" and only then.
        with_loss: the same KL is a loss beside this, with which "full" is right and does not warn.
        token_scores: (B, T) parts of the scores that are paid at their tokens; the last token gets what is left, so
            that a completion's rewards still add up to its score less its price.

    Returns:
        rewards (B, T) and the unpriced kl (B, T), both 0 outside the mask.

    Raises ValueError for a negative price, an unknown estimator, a `kl` without "full" or "full" without it, and a
    completion without a token.
    """
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef={kl_coef}: expected 0 or more")
    if (estimator == "full") != (kl is not None):
        raise ValueError(f"estimator={estimator!r} with {'no kl' if kl is None else 'a kl'}: full and kl go together")
    if not (with_loss and estimator == "full"):
        warn_about_kl(estimator, "reward")
    if kl is None:
        logprobs, ref_logprobs = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
        kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
    kl = torch.where(mask, kl, 0.0)
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(-1)
    if bool((last < 0).any()):
        raise ValueError("a completion without tokens has no place for its score")
    rewards, scores = -kl_coef * kl, scores.to(kl.dtype)
    if token_scores is not None:
        token_scores = torch.where(mask, token_scores, 0.0).to(kl.dtype)
        rewards, scores = rewards + token_scores, scores - token_scores.sum(-1)
    return rewards.scatter_add(1, last[:, None], scores[:, None]), kl


def warn_about_kl(estimator: str, use: str) -> None:
    """UserWarning, in the name of the caller's caller, where the gradient of this use is not that of the KL.

    Args:
        estimator: k1, k2, k3, abs or full. use: "reward", "loss", or "weighted loss", a loss times the ratio.

    Raises ValueError for an unknown name.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(ESTIMATORS)}")
    if use not in USES:
        raise ValueError(f"use={use!r}: expected one of {', '.join(USES)}")
    if mistake := _MISTAKES.get((estimator, use)):
        warnings.warn(f"KL estimator {estimator!r} as a {use}: {mistake}", UserWarning, stacklevel=3)
