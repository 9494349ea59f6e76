"""Advantages and value targets from rewards, values and scores.

Per token: `gae`, `discounted_returns`, `reinforce_pp_advantages`. Per completion, without a value model, relative to
other completions of the same prompt: `rloo_advantages`, `group_advantages`, `remax_advantages`. Advantages are whitened
only where the paper of that name does so.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.ops.masked import masked_sum, masked_var, masked_whiten
from rlhf_kernels import gae as fused_gae
from rlhf_kernels.registry import choose

SCALES = ("group", "batch", "none")

_SMALLEST = 1e-30  # least power of a decay in a scan: float32 underflows at 1e-38, and it is multiplied by rewards
_ZERO = torch.zeros((), device="cpu")  # torch.where would convert a Python 0.0 to a tensor in every call


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t  = r_t + gamma * V_{t+1} - V_t
        A_t      = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t

    t + 1 is the row's next True position: tokens in a hole of the mask (tool output between two turns) are no actions,
    and the state after a token is the one before the next action.

    Args:
        rewards, values: (B, T). values[:, t] is the value of the state before token t. mask: (B, T) bool, any layout;
            rows with a single run of True (padded on either side) are faster than rows with holes.
        gamma: discount, 0 to 1. lam: 0 to 1, from one-step TD errors (0) to whole returns (1).
        bootstrap: (B,) value of the state after the last True token; None is 0, the end of an episode. For completions
            truncated at the length limit, 0 treats the limit as part of the task, so the policy learns to finish before
            it; the estimate of the value model treats it as an artefact of sampling and accounts for the rest of the
            completion. Pass 0 for finished completions.

    Returns:
        advantages and returns, (B, T), 0 outside the mask; advantages are not whitened.

    Raises ValueError for gamma or lam outside 0 to 1 and a bootstrap that is not (B,).
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: expected 0 to 1")
    constant = not (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rewards, values, bootstrap))
    )
    if constant and choose("gae", rewards.device) == "triton":
        return fused_gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    left_aligned = torch.equal(mask.cummin(1).values, mask)  # once False, False to the end
    if not left_aligned and _has_holes(mask):
        order = (~mask).byte().argsort(dim=-1, stable=True)  # each row's True positions first, in their order
        packed = gae(*(x.gather(-1, order) for x in (rewards, values, mask)), gamma=gamma, lam=lam, bootstrap=bootstrap)
        advantages, returns = (torch.zeros_like(x).scatter(-1, order, x) for x in packed)
        return advantages, returns

    rewards, values = torch.where(mask, rewards, _ZERO), torch.where(mask, values, _ZERO)
    if bootstrap is not None:
        rewards = _add_at_last_token(rewards, mask, gamma * bootstrap)
    # The same recursion in terms of the return: return_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * return_{t+1}).
    targets = torch.add(rewards, _next(values), alpha=gamma * (1 - lam))
    returns = _reverse_scan(targets, gamma * lam)
    if not left_aligned:  # otherwise returns are already 0 after a row's last token
        returns = torch.where(mask, returns, _ZERO)
    return returns - values, returns


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, bootstrap: Tensor | None = None) -> Tensor:
    """Compute the discounted sum of the rewards from each token on.

        R_t = r_t + gamma * R_{t+1},   R after the last token = bootstrap, or 0

    Args as in `gae`; the result is its return with lam = 1 and values of 0.

    Returns:
        (B, T), 0 outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, bootstrap=bootstrap)[1]


def rloo_advantages(scores: Tensor, *, group_size: int | None = None, valid: Tensor | None = None) -> Tensor:
    """Compute REINFORCE leave-one-out advantages (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).

        A_i = r_i - mean of the other scores in its group

    The baseline does not depend on sample i, so it reduces variance without bias.

    Args:
        scores: (N,) with the completions of each prompt adjacent, `group_size` of them; or (prompts, group).
        valid: bool, in the shape of scores. False where there is no score (it may be NaN): it enters no baseline and
            its advantage is 0. The advantage is also 0 if no other sample of the group is valid.

    Returns:
        advantages in the shape of scores, float32 or float64.

    Raises ValueError for a group_size below 2, or one that does not divide the scores.
    """
    shape = scores.shape
    scores, valid = _groups(scores, group_size, valid)
    shifted, count = _above_lowest(scores, valid), valid.sum(-1, keepdim=True)
    others = (shifted.sum(-1, keepdim=True) - shifted) / (count - 1).clamp(min=1)  # 0 - 0 for a single valid score
    return torch.where(valid, shifted - others, 0.0).reshape(shape)


def group_advantages(
    scores: Tensor,
    *,
    group_size: int | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """Compute GRPO's advantages, scores normalised within their group (Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2).

        A_i = (r_i - mean of the group) / (std + eps)

    - scale "group": the std of the group. It gives more weight to prompts whose completions score nearly the same.
    - scale "batch": the std of all scores, the same for every prompt.
    - scale "none": no division (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    The std has Bessel's correction, as in TRL, and is 0 for a single valid score. The advantages of a group of equal
    scores are exactly 0, without rounding errors.

    Args and Returns as in `rloo_advantages`, which returns those of "none" times G / (G - 1). eps: more than 0.

    Raises ValueError for an unknown scale, an eps that is not positive, and as `rloo_advantages`.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: expected one of {', '.join(SCALES)}")
    if not eps > 0:
        raise ValueError(f"eps={eps}: expected more than 0")
    shape = scores.shape
    scores, valid = _groups(scores, group_size, valid)
    shifted, count = _above_lowest(scores, valid), valid.sum(-1, keepdim=True)
    mean = shifted.sum(-1, keepdim=True) / count.clamp(min=1)
    advantages = torch.where(valid, shifted - mean, 0.0)
    if scale == "group":
        variance = advantages.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)
    elif scale == "batch":
        advantages = advantages / (masked_var(scores, valid, unbiased=True).sqrt() + eps)
    return advantages.reshape(shape)


def reinforce_pp_advantages(
    rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, group_size: int | None = None, all_ranks: bool = False
) -> Tensor:
    """Compute REINFORCE++ advantages: whitened over all tokens of the batch (Hu et al. 2025, arXiv:2501.03262).

        A_t = whiten(R_t),   R_t the discounted return of rewards with KL penalty               without group_size
        A_t = whiten(R - mean of R over its group),   R the completion's total, at every token  "baseline", with it

    Args:
        rewards: (B, T), scores and KL penalties, as returned by `kl_penalty`. mask: (B, T) bool.
        gamma: discount, 0 to 1; 1 with a group_size.
        group_size: number of completions per prompt, adjacent. Completions without tokens do not enter the mean of
            their group.
        all_ranks: whiten over the tokens of all ranks (`masked_whiten`).

    Returns:
        (B, T), mean 0 and variance 1 over the mask, 0 outside it.

    Raises ValueError for a gamma outside 0 to 1, or not 1 with a group_size; and as `rloo_advantages`.
    """
    if group_size is None:
        return masked_whiten(discounted_returns(rewards, mask, gamma=gamma), mask, all_ranks=all_ranks)
    if gamma != 1:
        raise ValueError(f"gamma={gamma}: expected 1 with group_size={group_size}, which sums rewards without discount")
    totals = masked_sum(rewards, mask, -1)
    advantages = group_advantages(totals, group_size=group_size, scale="none", valid=mask.any(-1))
    return masked_whiten(advantages[:, None].expand_as(mask), mask, all_ranks=all_ranks)


def remax_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """Compute ReMax advantages: the baseline is the score of the greedy completion (Li et al. 2023, arXiv:2310.10505).

        A_i = r_i - r(greedy completion of the same prompt)

    Args:
        scores, greedy_scores: (B,).

    Returns:
        (B,). Raises ValueError where the shapes differ.
    """
    if scores.shape != greedy_scores.shape:
        raise ValueError(
            f"greedy_scores of shape {tuple(greedy_scores.shape)}: expected that of scores, {tuple(scores.shape)}"
        )
    return scores - greedy_scores


def _has_holes(mask: Tensor) -> bool:
    """Return whether the True positions of some row form more than one run."""
    if torch.equal(mask.cummax(1).values, mask):  # once True, True to the end: padded on the left
        return False
    starts = mask[:, 1:] > mask[:, :-1]
    return bool((starts.sum(-1) + mask[:, 0] > 1).any())


def _next(values: Tensor) -> Tensor:
    """Return each column's right neighbour, 0 (False) after the last one."""
    return F.pad(values, (-1, 1)) if values.shape[1] else values


def _add_at_last_token(rewards: Tensor, mask: Tensor, amounts: Tensor) -> Tensor:
    """Add `amounts` (B,) to the reward of each row's last token. Rows are single runs and may be empty."""
    if amounts.shape != mask.shape[:1]:
        raise ValueError(
            f"bootstrap of shape {tuple(amounts.shape)}: expected one value a row, {tuple(mask.shape[:1])}"
        )
    last = mask & ~_next(mask)
    return torch.where(last, rewards + amounts[:, None], rewards)


@functools.lru_cache(maxsize=64)
def _powers(size: int, decay: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return decay^0 to decay^(size - 1), and the inverse of each."""
    with torch.inference_mode(False):  # they are cached, and autograd does not accept inference tensors
        powers = decay ** torch.arange(size, dtype=torch.float64, device=device)
        return powers.to(dtype), powers.reciprocal().to(dtype)


def _reverse_scan(values: Tensor, decay: float) -> Tensor:
    """Compute y_t = x_t + decay * y_{t+1}, (B, T), as a cumulative sum.

        decay^t * y_t = sum over k >= t of decay^k * x_k

    The sum runs from the right, from small to large terms, so rounding errors are relative to the partial sums, as in
    the recursion. Where the powers would underflow float32, columns are grouped in blocks, and the carries between
    blocks are a scan over the blocks' first columns.
    """
    if values.dtype.itemsize < 4:
        return _reverse_scan(values.float(), decay).to(values.dtype)
    if decay < 1e-12:  # decay^2 is below the precision
        return torch.add(values, _next(values), alpha=decay)
    columns = values.shape[1]
    width = columns if decay == 1 else int(math.log(_SMALLEST) / math.log(decay))
    if columns > width:
        blocks = F.pad(values, (0, -columns % width)).unflatten(1, (-1, width))
        inside = _reverse_scan(blocks.flatten(0, 1), decay).view_as(blocks)
        carries = _next(_reverse_scan(inside[:, :, 0], decay**width))
        powers = decay * _powers(width, decay, values.dtype, values.device)[0].flip(0)
        return (inside + carries[:, :, None] * powers).flatten(1)[:, :columns]
    powers, inverses = _powers(columns, decay, values.dtype, values.device)
    return (values * powers).flip(1).cumsum_(1).flip(1).mul_(inverses)  # in place: flip has made a copy


def _groups(scores: Tensor, group_size: int | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scores in float32 or float64, and which are valid, both (prompts, group)."""
    if group_size is None and scores.ndim != 2:
        raise ValueError(f"group_size=None with scores of shape {tuple(scores.shape)}: expected (prompts, group)")
    size = scores.shape[-1] if group_size is None else group_size
    if size < 2:
        raise ValueError(f"group_size={size}: expected 2 or more")
    if scores.numel() % size or (scores.ndim == 2 and scores.shape[1] != size):
        raise ValueError(f"group_size={size}: expected a divisor of scores of shape {tuple(scores.shape)}")
    if valid is not None and valid.shape != scores.shape:
        raise ValueError(f"valid of shape {tuple(valid.shape)}: expected that of scores, {tuple(scores.shape)}")
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.reshape(-1, size), valid.reshape(-1, size)


def _above_lowest(scores: Tensor, valid: Tensor) -> Tensor:
    """Subtract the lowest valid score of each group; 0 where invalid. Equal scores become 0 without rounding errors."""
    lowest = torch.where(valid, scores, torch.inf).amin(-1, keepdim=True)
    return torch.where(valid, scores - lowest, 0.0)
