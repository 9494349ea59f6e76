"""Credit: from rewards, values and scores to advantages and value targets.

Per token: `gae`, `discounted_returns`, `reinforce_pp_advantages`. Per completion, without a critic, against the other
completions of the same prompt: `rloo_advantages`, `group_advantages`, `remax_advantages`. Nothing is whitened but where
the name's paper does it.
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

_SMALLEST = 1e-30  # power of a decay that a scan multiplies by: float32 ends at 1e-38, and rewards need room too
_ZERO = torch.zeros((), device="cpu")  # torch.where makes a tensor of a Python 0.0 at every call


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t  = r_t + gamma * V_{t+1} - V_t
        A_t      = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t

    Where t + 1 is the row's next True token: what lies in a hole of the mask (a tool's output between two turns) is
    no action, and the state after a token is the one before the next action.

    Args:
        rewards, values: (B, T). values[:, t] is the state before token t. mask: (B, T) bool, any layout; rows in one
            run (padded on either side) are faster than rows with holes.
        gamma, lam: 0 to 1. Discount, and how far credit reaches beyond one step's TD error (0) to the whole return (1).
        bootstrap: (B,) value of the state after the last True token; None is 0, the end of an episode. It matters where
            a completion was cut at the length limit: 0 says that the limit is part of the task, and the policy learns
            to be done before it; the value model's V says that the limit is an accident of sampling, and the policy is
            paid for what would have followed. Completions that ended by themselves take 0 either way.

    Returns:
        advantages and returns, (B, T), 0 outside the mask. Not whitened: that is a step of its own.

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
        order = (~mask).byte().argsort(dim=-1, stable=True)  # each row's True places first, in their order
        packed = gae(*(x.gather(-1, order) for x in (rewards, values, mask)), gamma=gamma, lam=lam, bootstrap=bootstrap)
        advantages, returns = (torch.zeros_like(x).scatter(-1, order, x) for x in packed)
        return advantages, returns

    rewards, values = torch.where(mask, rewards, _ZERO), torch.where(mask, values, _ZERO)
    if bootstrap is not None:
        rewards = _pay_at_the_end(rewards, mask, gamma * bootstrap)
    # return_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * return_{t+1}): the same recursion, solved for the return.
    targets = torch.add(rewards, _next(values), alpha=gamma * (1 - lam))
    returns = _reverse_scan(targets, gamma * lam)
    if not left_aligned:  # else it met nothing but zeros right of a row's last token
        returns = torch.where(mask, returns, _ZERO)
    return returns - values, returns


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, bootstrap: Tensor | None = None) -> Tensor:
    """What a token still earns: the discounted sum of the rewards from it on.

        R_t = r_t + gamma * R_{t+1},   R after the last token = bootstrap, or 0

    Args as in `gae`, whose return it is with lam = 1 and no critic.

    Returns:
        (B, T), 0 outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, bootstrap=bootstrap)[1]


def rloo_advantages(scores: Tensor, *, group_size: int | None = None, valid: Tensor | None = None) -> Tensor:
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).

        A_i = r_i - mean of the other scores in its group

    The baseline holds nothing of sample i itself, so it takes variance away and adds no bias.

    Args:
        scores: (N,) with each prompt's completions adjacent, `group_size` of them; or (prompts, group).
        valid: bool, the scores' shape. False where a score does not exist (it may be NaN): it is nobody's baseline and
            its own advantage is 0. So is that of a sample without a valid fellow.

    Returns:
        advantages in the scores' shape, float32 or float64.

    Raises ValueError for a group_size below 2, or one that the scores do not divide into.
    """
    shape = scores.shape
    scores, valid = _groups(scores, group_size, valid)
    heights, count = _heights(scores, valid), valid.sum(-1, keepdim=True)
    others = (heights.sum(-1, keepdim=True) - heights) / (count - 1).clamp(min=1)  # a lone one's height is 0
    return torch.where(valid, heights - others, 0.0).reshape(shape)


def group_advantages(
    scores: Tensor,
    *,
    group_size: int | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """GRPO's advantages (Shao et al. 2024, arXiv:2402.03300, section 4.1.2): scores normalised within their group.

        A_i = (r_i - mean of the group) / (std + eps)

    - scale "group": the std of the group. It lifts prompts on which nearly all completions score alike.
    - scale "batch": the std of all scores, the same for every prompt.
    - scale "none": no division (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    The std has Bessel's correction, as in TRL. A group of equal scores has advantage exactly 0, whatever its rounding;
    the std of a single valid score counts as 0.

    Args and Returns as in `rloo_advantages`, whose advantages are those of "none" times G / (G - 1). eps: more than 0.

    Raises ValueError for an unknown scale, an eps that is not positive, and as `rloo_advantages`.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: expected one of {', '.join(SCALES)}")
    if not eps > 0:
        raise ValueError(f"eps={eps}: expected more than 0")
    shape = scores.shape
    scores, valid = _groups(scores, group_size, valid)
    heights, count = _heights(scores, valid), valid.sum(-1, keepdim=True)
    mean = heights.sum(-1, keepdim=True) / count.clamp(min=1)
    advantages = torch.where(valid, heights - mean, 0.0)
    if scale == "group":
        variance = advantages.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)
    elif scale == "batch":
        advantages = advantages / (masked_var(scores, valid, unbiased=True).sqrt() + eps)
    return advantages.reshape(shape)


def reinforce_pp_advantages(
    rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, group_size: int | None = None, all_ranks: bool = False
) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): whitened over all tokens of the batch, without a critic.

        A_t = whiten(R_t),   R_t the discounted return of the KL-priced rewards                without group_size
        A_t = whiten(R - mean of R over its group),   R the completion's total, on each token  "baseline", with it

    Args:
        rewards: (B, T), the scores and the price of KL, as `kl_penalty` gives them. mask: (B, T) bool.
        group_size: completions of one prompt, adjacent. One without a token has no place in its group's mean.
        all_ranks: whiten over the tokens of all ranks (`masked_whiten`).

    Returns:
        (B, T), mean 0 and variance 1 over the mask, 0 outside it.

    Raises ValueError for a gamma outside 0 to 1, or not 1 with a group_size; and as `rloo_advantages`.
    """
    if group_size is None:
        return masked_whiten(discounted_returns(rewards, mask, gamma=gamma), mask, all_ranks=all_ranks)
    if gamma != 1:
        raise ValueError(f"gamma={gamma}: a completion's total has no discount, so group_size={group_size} expects 1")
    totals = masked_sum(rewards, mask, -1)
    advantages = group_advantages(totals, group_size=group_size, scale="none", valid=mask.any(-1))
    return masked_whiten(advantages[:, None].expand_as(mask), mask, all_ranks=all_ranks)


def remax_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """ReMax (Li et al. 2023, arXiv:2310.10505): the baseline is the score of the greedy completion.

        A_i = r_i - r(the completion of the same prompt that takes the likeliest token each time)

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
    """Whether the True places of some row are more than one run."""
    if torch.equal(mask.cummax(1).values, mask):  # once True, True to the end: padded on the left
        return False
    starts = mask[:, 1:] > mask[:, :-1]
    return bool((starts.sum(-1) + mask[:, 0] > 1).any())


def _next(values: Tensor) -> Tensor:
    """Each column's right neighbour, 0 (False) after the last one."""
    return F.pad(values, (-1, 1)) if values.shape[1] else values


def _pay_at_the_end(rewards: Tensor, mask: Tensor, amounts: Tensor) -> Tensor:
    """`amounts` (B,) added to the reward of each row's last token; the rows are single runs, and some may be empty."""
    if amounts.shape != mask.shape[:1]:
        raise ValueError(
            f"bootstrap of shape {tuple(amounts.shape)}: expected one value a row, {tuple(mask.shape[:1])}"
        )
    last = mask & ~_next(mask)
    return torch.where(last, rewards + amounts[:, None], rewards)


@functools.lru_cache(maxsize=64)
def _powers(size: int, decay: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """decay^0 to decay^(size - 1), and the inverse of each."""
    with torch.inference_mode(False):  # they outlive this call, and autograd refuses a tensor of inference mode
        powers = decay ** torch.arange(size, dtype=torch.float64, device=device)
        return powers.to(dtype), powers.reciprocal().to(dtype)


def _reverse_scan(values: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay * y_{t+1}, from the last column back, as one cumulative sum. (B, T).

        decay^t * y_t = sum over k >= t of decay^k * x_k

    Summed from the right the terms grow, so rounding is relative to what is there, as in the plain recursion. Where the
    powers would leave float32's range, columns go in blocks, and what a block receives from its right is a scan of its
    own, over the blocks' first columns.
    """
    if values.dtype.itemsize < 4:
        return _reverse_scan(values.float(), decay).to(values.dtype)
    if decay < 1e-12:  # decay^2 is beneath every digit
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
    return (values * powers).flip(1).cumsum_(1).flip(1).mul_(inverses)  # in place in what flip has copied


def _groups(scores: Tensor, group_size: int | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in float32 or float64, and which of them exist, both (prompts, group)."""
    if group_size is None and scores.ndim != 2:
        raise ValueError(f"group_size=None with scores of shape {tuple(scores.shape)}: expected (prompts, group)")
    size = scores.shape[-1] if group_size is None else group_size
    if size < 2:
        raise ValueError(f"group_size={size}: expected 2 or more, a group of one has no baseline")
    if scores.numel() % size or (scores.ndim == 2 and scores.shape[1] != size):
        raise ValueError(f"group_size={size}: scores of shape {tuple(scores.shape)} are no whole groups of it")
    if valid is not None and valid.shape != scores.shape:
        raise ValueError(f"valid of shape {tuple(valid.shape)}: expected that of scores, {tuple(scores.shape)}")
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.reshape(-1, size), valid.reshape(-1, size)


def _heights(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores above the lowest valid one of their group, 0 where invalid. Equal scores become zeros without rounding."""
    lowest = torch.where(valid, scores, torch.inf).amin(-1, keepdim=True)
    return torch.where(valid, scores - lowest, 0.0)
