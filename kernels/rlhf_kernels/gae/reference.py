"""The definition: a loop from the last token to the first. Slow; the tests compare with it."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T) float32 (float64 where an input is), 0 outside the mask.

    With t + 1 the next True token of the row, and `bootstrap` the value after its last one (0 for None):

        delta_t  = r_t + gamma * V_{t+1} - V_t
        A_t      = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t

    `whiten` scales the advantages, and not the returns, to mean 0 and variance 1 over the mask.
    """
    dtype = common_dtype(rewards, values, bootstrap)
    next_value = rewards.new_zeros(len(rewards), dtype=dtype) if bootstrap is None else bootstrap.to(dtype)
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        here, value = mask[:, t], values[:, t].to(dtype)
        delta = rewards[:, t].to(dtype) + gamma * next_value - value
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(here, value, next_value)
        columns.append(torch.where(here, advantage, 0.0))
    advantages = torch.stack(columns[::-1], 1) if columns else rewards.to(dtype)
    returns = torch.where(mask, advantages + values.to(dtype), 0.0)
    return whitened(advantages, mask) if whiten else advantages, returns


def whitened(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) over the mask, with the biased variance; 0 outside the mask."""
    count = mask.sum().clamp(min=1)
    centred = torch.where(mask, values - values.sum() / count, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / count + eps)


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if one of the tensors is, otherwise float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
