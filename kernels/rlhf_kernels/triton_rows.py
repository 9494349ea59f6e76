"""What the Triton kernels share: where a row is, a block of it, tanh, and how a launch is shaped."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from rlhf_kernels.common import LOG_ZERO

LOG_ZERO = tl.constexpr(LOG_ZERO)
LARGEST_BLOCK = 4096


def block_options(vocabulary: int) -> dict[str, int]:
    """BLOCK, the symbols a program takes at a time, and its warps, for a vocabulary of this size.

    A power of two that holds the whole vocabulary, up to 4096: 16 symbols for each thread of 8 warps, loaded 128 bits
    at a time. Compiled for sm_90, `token_logprobs` in bfloat16 then takes 61 registers a thread, so that four programs
    fit on a multiprocessor (three with entropies, 79). Chosen by these counts and not yet timed.
    """
    block = min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary))
    return dict(BLOCK=block, num_warps=max(1, min(8, block // 512)))


def real_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for float32 or float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's own device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Where a row of (outer, inner, V) begins, in 64 bits: 2^31 elements are 16,744 rows of 128,256."""
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner


@triton.jit
def load_block(row, columns, vocabulary, stride, REAL: tl.constexpr):
    """Logits of a row, -inf past the vocabulary's end."""
    offsets = columns.to(tl.int64) * stride
    return tl.load(row + offsets, mask=columns < vocabulary, other=float("-inf")).to(REAL)


@triton.jit
def fold(z, peak, total, weighted, scale, WEIGHTED: tl.constexpr):
    """One more block of a row into its running sums, which stay a column's of the block until the end.

    With e = exp((z - peak) / temperature) and the peak the largest z so far, total is sum of e and weighted, if wanted,
    sum of e log e, which gives the entropy log(total) - weighted / total. A higher peak scales the old sums down.

    Returns:
        peak, total, weighted with the block in them; the block's e, and the factor that the old sums were scaled by.
    """
    higher = tl.maximum(peak, tl.max(z, 0))
    centre = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far: not inf - inf
    log_e = (z - centre) * scale
    e = tl.exp(log_e)
    factor = tl.exp((peak - centre) * scale)
    if WEIGHTED:
        drop = tl.where(peak == float("-inf"), 0.0, (peak - centre) * scale)
        weighted = (weighted + drop * total) * factor + e * tl.maximum(log_e, LOG_ZERO)
    return higher, total * factor + e, weighted, e, factor


@triton.jit
def tanh(x, REAL: tl.constexpr):
    """tanh to a few units in the last place, in float32 and float64.

    Away from 0 by its definition, 1 - 2 / (exp(2 |x|) + 1). That loses digits near 0, where Lambert's continued
    fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))), cut after the 11, has an error below x^13 / 1.4e9.
    """
    near: tl.constexpr = 0.25 if REAL.primitive_bitwidth == 64 else 1.0
    square = x * x
    numerator = x * (10395 + square * (1260 + square * 21))
    fraction = numerator / (10395 + square * (4725 + square * (210 + square)))
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < near, fraction, tl.where(x < 0, -far, far))
