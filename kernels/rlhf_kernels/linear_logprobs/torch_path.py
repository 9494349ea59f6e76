"""The torch implementation of a block of rows: tiles that stay in the cache, computed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.common import LOG_ZERO, real_dtype, tile_rows
from rlhf_kernels.linear_logprobs.blocks import HeadOptions, blocks


def block_rows(weight: Tensor) -> int:
    """Return the rows of a block. Fewer make the matrix products slow, more take memory and leave the cache."""
    return 512 if weight.shape[0] <= 1 << 15 else 256


def new_block(num_rows: int, weight: Tensor) -> Tensor:
    """Allocate a block for logits, in float32 or float64, which `fold` overwrites."""
    return weight.new_empty(num_rows, weight.shape[0], dtype=real_dtype(weight.dtype))


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute out = hidden @ weight.T."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    else:
        out.copy_(hidden @ weight.T)


def temper(z: Tensor, bias: Tensor | None, options: HeadOptions, *, want_slope: bool) -> Tensor | None:
    """Turn a tile of hidden @ weight.T into z (see `HeadOptions`) in place; return 1 - tanh^2 if there is a softcap."""
    if bias is not None:
        z += bias
    if options.softcap is None:
        if options.slope != 1.0:
            z.mul_(options.slope)
        return None
    z.mul_(options.scale / options.softcap).tanh_()
    slope = z.square().neg_().add_(1) if want_slope else None
    z.mul_(options.softcap / options.temperature)
    return slope


def fold(
    block: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: HeadOptions,
    logprobs: Tensor,
    entropies: Tensor | None,
    stats: Tensor,
    *,
    want_gradient: bool,
) -> None:
    """Compute log-probs and entropies of a block of hidden @ weight.T, and overwrite the block.

    `stats`, (2, r), receives each row's largest z and total = sum_v e_v, e_v = exp(z_v - largest). Where a gradient is
    wanted, the block becomes (e_v - 1[v = target] total) (1 - tanh^2), which is -total times d log p / d z. It is
    computed in full precision, so that 1 - p is exact for p near 1.
    """
    for rows in blocks(len(block), tile_rows(block[None])):
        z, index = block[rows], targets[rows, None]
        slope = temper(z, bias, options, want_slope=want_gradient)
        peak = z.amax(-1, keepdim=True)
        z.sub_(peak)
        chosen = z.gather(-1, index)
        shifted = z.clamp(min=LOG_ZERO) if entropies is not None else None  # 0 times -inf is 0 below
        total = z.exp_().sum(-1, keepdim=True)
        log_total = total.log()
        stats[0, rows], stats[1, rows] = peak[:, 0], total[:, 0]
        logprobs[rows] = (chosen - log_total)[:, 0]
        if entropies is not None:  # H = log total - E[shifted]
            entropies[rows] = log_total[:, 0] - torch.linalg.vecdot(z, shifted) / total[:, 0]
        if want_gradient:
            z.scatter_(-1, index, chosen.exp_() - total)
            if slope is not None:
                z.mul_(slope)


def gradient(
    block: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: HeadOptions,
    stats: Tensor,
    grad_logprobs: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of hidden @ weight.T as a block and a coefficient per row; the block is that of `fold`."""
    return block, grad_logprobs * (-options.slope / stats[1])
