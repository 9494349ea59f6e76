"""GAE in plain torch, all columns at once, in log2(T) steps: a parallel scan.

With u_t = gamma * (1 - lam) * V_t + gamma * lam * return_t, the part of a return that comes from later tokens, there is
a recursion that contains no value of another token:

    u_t      = gamma * (1 - lam) * V_t + gamma * lam * (r_t + u_{t+1}),   u_t = u_{t+1} outside the mask,
    return_t = r_t + u_{t+1},                                             u = gamma * bootstrap after the last column.

Each step is an affine map of u_{t+1}. Composition of affine maps is associative, so they can be scanned in parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.gae.reference import common_dtype, whitened


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
    """Compute `reference.gae` without the loop over tokens."""
    dtype = common_dtype(rewards, values, bootstrap)
    rewards, values = (torch.where(mask, x.to(dtype), 0.0) for x in (rewards, values))
    slopes = torch.ones_like(rewards).masked_fill_(mask, gamma * lam)
    offsets = gamma * (1 - lam) * values + gamma * lam * rewards
    reach = 1
    while reach < rewards.shape[1]:
        near = slopes[:, :-reach]
        offsets[:, :-reach] += near * offsets[:, reach:]
        slopes[:, :-reach] = near * slopes[:, reach:]
        reach *= 2
    end = rewards.new_zeros(len(rewards), 1) if bootstrap is None else gamma * bootstrap.to(dtype)[:, None]
    later = torch.cat([offsets + slopes * end, end], dim=1)[:, 1:]
    returns = torch.where(mask, rewards + later, 0.0)
    advantages = returns - values
    return whitened(advantages, mask) if whiten else advantages, returns
