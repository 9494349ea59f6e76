"""The rows of a block of two heads in plain torch: tiles that stay in the cache, each worked on in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.common import LOG_ZERO, tile_rows
from rlhf_kernels.linear_logprobs.blocks import HeadOptions, blocks
from rlhf_kernels.linear_logprobs.torch_path import block_rows, new_block, temper
from rlhf_kernels.linear_logprobs.torch_path import project as project_without_bias

__all__ = ["block_rows", "fold", "gradients", "new_block", "project"]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias"""
    if bias is None:
        project_without_bias(hidden, weight, out=out)
    elif out.dtype == hidden.dtype:
        torch.addmm(bias.to(out.dtype), hidden, weight.T, out=out)
    else:
        out.copy_(torch.addmm(bias.to(hidden.dtype), hidden, weight.T))


def fold(
    logits: list[Tensor],
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    entropies: Tensor | None,
    stats: Tensor,
    wanted: tuple[bool, bool],
) -> None:
    """Divergences and entropies of blocks of logits of both heads, which are used up.

    A block whose gradient is wanted becomes the gradient of its row's divergence to z (`HeadOptions`), times the
    derivative of the tanh. With p, q the distributions, a = p log(p / q), A its sum over the row, m = (p + q) / 2:

        reverse, A            to policy a - p A, to reference q - p            forward: the same, p and q changed about
        js, (A_p + A_q) / 2   to policy (a_p - p A_p) / 2 with a_p = p log(p / m), to reference likewise with q
    """
    policy, reference = logits
    size = tile_rows(policy[None])
    scratch = policy.new_empty(4, min(size, len(policy)), policy.shape[1])
    for rows in blocks(len(policy), size):
        p, q, p_gap, q_gap = scratch[:, : rows.stop - rows.start]
        tiles = (policy[rows], reference[rows])
        slopes = [temper(z, None, options, want_slope=want) for z, want in zip(tiles, wanted, strict=True)]
        for log_probs, probs in zip(tiles, (p, q), strict=True):
            _log_softmax_(log_probs, probs)
        log_p, log_q = tiles
        if entropies is not None:
            entropies[rows] = -torch.linalg.vecdot(p, torch.clamp(log_p, min=LOG_ZERO, out=p_gap))
        if kind == "js":
            # log(p / m) = log 2 - log(1 + exp(-d)), d = log(p / q): no cancellation where p is near q.
            d = log_p.sub_(log_q)
            middle = log_q.copy_(d).abs_().neg_().exp_().log1p_().neg_().add_(math.log(2))
            p_sum = _weigh_(torch.clamp(d, max=0, out=p_gap).add_(middle), p)
            q_sum = _weigh_(torch.clamp(d, min=0, out=q_gap).neg_().add_(middle), q)
            divergences[rows] = (p_sum + q_sum)[:, 0] / 2
            if wanted[0]:
                torch.addcmul(p_gap, p, p_sum, value=-1, out=log_p).div_(2)
            if wanted[1]:
                torch.addcmul(q_gap, q, q_sum, value=-1, out=log_q).div_(2)
        else:
            first, second = (0, 1) if kind == "reverse" else (1, 0)
            probs = (p, q)
            total = _weigh_(torch.sub(tiles[first], tiles[second], out=p_gap), probs[first])
            divergences[rows] = total[:, 0]
            if wanted[first]:
                torch.addcmul(p_gap, probs[first], total, value=-1, out=tiles[first])
            if wanted[second]:
                torch.sub(probs[second], probs[first], out=tiles[second])
        for z, slope in zip(tiles, slopes, strict=True):
            if slope is not None:
                z.mul_(slope)


def gradients(
    logits: list[Tensor],
    outs: list[Tensor],
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    stats: Tensor,
    gradient: Tensor,
    wanted: tuple[bool, bool],
) -> list[tuple[Tensor, Tensor]]:
    """The gradients to both blocks of logits, and their rows' coefficients; the blocks are what `fold` left."""
    return [(block, gradient * options.slope) for block in logits]


def _log_softmax_(z: Tensor, probs: Tensor) -> None:
    """z becomes log softmax(z), `probs` softmax(z)."""
    z.sub_(z.amax(-1, keepdim=True))
    total = torch.exp(z, out=probs).sum(-1, keepdim=True)
    probs.div_(total)
    z.sub_(total.log())


def _weigh_(gap: Tensor, probs: Tensor) -> Tensor:
    """gap becomes probs * gap, where 0 times anything is 0. Returns its sum over each row, (r, 1)."""
    return gap.masked_fill_(probs == 0, 0).mul_(probs).sum(-1, keepdim=True)
