"""GAE in plain torch, all columns at once: log2(T) steps, each reaching twice as far as the one before.

What a token hands to the one before it, u_t = gamma * (1 - lam) * V_t + gamma * lam * return_t, obeys a recursion
without a neighbour's value in it:

    u_t      = gamma * (1 - lam) * V_t + gamma * lam * (r_t + u_{t+1}),   u_t = u_{t+1} in a hole of the mask,
    return_t = r_t + u_{t+1},                                             u = gamma * bootstrap after the last column.

Each step is an affine map of u_{t+1}, and affine maps compose, so they can be composed in any grouping.
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
    """`reference.gae` without the loop over tokens."""
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
    handed = torch.cat([offsets + slopes * end, end], dim=1)[:, 1:]
    returns = torch.where(mask, rewards + handed, 0.0)
    advantages = returns - values
    return whitened(advantages, mask) if whiten else advantages, returns
