"""Policy-gradient losses over sampled tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_core.ops.masked import masked_mean, masked_sum


def policy_loss(
    name: str = "ppo",
    *,
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, the mean over completion tokens (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

        -mean min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A),   ratio = exp(new_logprobs - logprobs)

    Args:
        new_logprobs: (B, T) under the policy now, with gradient. logprobs: (B, T) when sampled. advantages: (B, T).
        mask: (B, T) bool. clip: more than 0.
        normalizer: divide by this instead of the local count of tokens (see `sft_loss`).

    Returns:
        the loss, a scalar, and stats over unmasked tokens: `approx_kl`, the k3 estimate of KL(behaviour || new),
        `clip_fraction`, `ratio_max`. A ratio that overflows is clipped where A >= 0; where A < 0 the loss is infinite.
    """
    if name != "ppo":
        raise ValueError(f"no policy loss named {name!r}; there is 'ppo'")
    if not clip > 0:
        raise ValueError(f"clip={clip}: expected more than 0")
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    ratio = log_ratio.exp()
    # Where A >= 0 the minimum never sees a ratio above 1 + clip. Cut before exp, whose gradient would be 0 * inf.
    cut = torch.where(advantages >= 0, log_ratio.clamp(max=math.log1p(clip)), log_ratio).exp()
    surrogate = torch.minimum(cut * advantages, cut.clamp(1 - clip, 1 + clip) * advantages)
    loss = -masked_sum(surrogate, mask) / (mask.sum().clamp(min=1) if normalizer is None else normalizer)
    with torch.no_grad():
        stats = {
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
            "clip_fraction": masked_mean(((ratio - 1).abs() > clip).float(), mask),
            "ratio_max": torch.where(mask, ratio, 0.0).max(),
        }
    return loss, stats
