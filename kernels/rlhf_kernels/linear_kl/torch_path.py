"""The torch implementation of a block of rows of two heads: tiles that stay in the cache, computed in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.common import LOG_ZERO, tile_rows
from rlhf_kernels.linear_logprobs.blocks import HeadOptions, blocks
from rlhf_kernels.linear_logprobs.torch_path import block_rows, new_block, temper
from rlhf_kernels.linear_logprobs.torch_path import project as project_without_bias

__all__ = ["block_rows", "fold", "gradient", "new_block", "project"]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute out = hidden @ weight.T + bias."""
    if bias is None:
        project_without_bias(hidden, weight, out=out)
    elif out.dtype == hidden.dtype:
        torch.addmm(bias.to(out.dtype), hidden, weight.T, out=out)
    else:
        out.copy_(torch.addmm(bias.to(hidden.dtype), hidden, weight.T))


def fold(
    policy: Tensor,
    reference: Tensor,
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    entropies: Tensor | None,
    stats: Tensor,
    *,
    want_gradient: bool,
) -> None:
    """Compute divergences and entropies of blocks of logits of both heads, and overwrite the blocks.

    Where a gradient is wanted, the policy's block becomes the derivative of its row's divergence with respect to z (see
    `HeadOptions`), times that of the tanh. With p and q the distributions and m = (p + q) / 2:

        reverse    p (log(p / q) - KL(p || q))
        forward    p - q
        js         p (log(p / m) - KL(p || m)) / 2
    """
    size = tile_rows(policy[None])
    scratch = policy.new_empty(4, min(size, len(policy)), policy.shape[1])
    for rows in blocks(len(policy), size):
        p, q, p_gap, q_gap = scratch[:, : rows.stop - rows.start]
        log_p, log_q = policy[rows], reference[rows]
        derivative = temper(log_p, None, options, want_slope=want_gradient)
        temper(log_q, None, options, want_slope=False)
        _log_softmax_(log_p, p)
        _log_softmax_(log_q, q)
        if entropies is not None:
            entropies[rows] = -torch.linalg.vecdot(p, torch.clamp(log_p, min=LOG_ZERO, out=p_gap))
        if kind == "js":
            # log(p / m) = log 2 - log(1 + exp(-d)), d = log(p / q): no cancellation where p is near q.
            d = log_p.sub_(log_q)
            middle = log_q.copy_(d).abs_().neg_().exp_().log1p_().neg_().add_(math.log(2))
            p_sum = _weigh_(torch.clamp(d, max=0, out=p_gap).add_(middle), p)
            q_sum = _weigh_(torch.clamp(d, min=0, out=q_gap).neg_().add_(middle), q)
            divergences[rows] = (p_sum + q_sum)[:, 0] / 2
            if want_gradient:
                torch.addcmul(p_gap, p, p_sum, value=-1, out=log_p).div_(2)
        elif kind == "reverse":
            total = _weigh_(torch.sub(log_p, log_q, out=p_gap), p)
            divergences[rows] = total[:, 0]
            if want_gradient:
                torch.addcmul(p_gap, p, total, value=-1, out=log_p)
        else:
            divergences[rows] = _weigh_(torch.sub(log_q, log_p, out=q_gap), q)[:, 0]
            if want_gradient:
                torch.sub(p, q, out=log_p)
        if derivative is not None:
            log_p.mul_(derivative)


def gradient(
    policy: Tensor,
    reference: Tensor,
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    stats: Tensor,
    grad_divergences: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the policy's logits as a block and a coefficient per row; the block is that of `fold`."""
    return policy, grad_divergences * options.slope


def _log_softmax_(z: Tensor, probs: Tensor) -> None:
    """Turn z into log softmax(z) in place, and write softmax(z) into `probs`."""
    z.sub_(z.amax(-1, keepdim=True))
    total = torch.exp(z, out=probs).sum(-1, keepdim=True)
    probs.div_(total)
    z.sub_(total.log())


def _weigh_(gap: Tensor, probs: Tensor) -> Tensor:
    """Multiply gap by probs in place, with 0 where probs is 0, and return the sum of each row, (r, 1)."""
    return gap.masked_fill_(probs == 0, 0).mul_(probs).sum(-1, keepdim=True)
