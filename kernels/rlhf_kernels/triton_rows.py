"""Functions that several Triton kernels share: row offsets, blocks of a row, running sums, tanh, launch options."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from rlhf_kernels.common import LOG_ZERO

LOG_ZERO = tl.constexpr(LOG_ZERO)
LARGEST_BLOCK = 4096


def block_options(vocabulary: int) -> dict[str, int]:
    """Return BLOCK, the tokens that a program computes at a time, and `num_warps` for a vocabulary of this size.

    BLOCK is a power of two that holds the whole vocabulary, up to 4096: 16 tokens for each thread of 8 warps, loaded
    128 bits at a time. Compiled for sm_90, `token_logprobs` in bfloat16 then takes 61 registers per thread, so that
    four programs fit on a multiprocessor (three with entropies, 79 registers). Chosen by these counts, not yet timed.
    """
    block = min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary))
    return dict(BLOCK=block, num_warps=max(1, min(8, block // 512)))


def real_type(dtype: torch.dtype) -> tl.dtype:
    """Return the Triton dtype of float32 or float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context manager in which kernels are launched on the device of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Return the offset of a row of (outer, inner, V), in 64 bits: 2^31 elements are 16,744 rows of 128,256."""
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner


@triton.jit
def load_block(row, columns, vocabulary, stride, REAL: tl.constexpr):
    """Load logits of a row, -inf past the end of the vocabulary."""
    offsets = columns.to(tl.int64) * stride
    return tl.load(row + offsets, mask=columns < vocabulary, other=float("-inf")).to(REAL)


@triton.jit
def fold(z, peak, total, weighted, scale, WEIGHTED: tl.constexpr):
    """Add a block of a row to its running sums, one sum per column of the block until the end.

    With e = exp((z - peak) / temperature) and the peak the largest z so far, total is sum e and weighted, if WEIGHTED,
    sum e log e, from which the entropy is log(total) - weighted / total. A higher peak scales the old sums down.

    Returns:
        The new peak, total and weighted, the block's e, and the factor that scaled the old sums.
    """
    higher = tl.maximum(peak, tl.max(z, 0))
    centre = tl.where(higher == float("-inf"), 0.0, higher)  # all -inf so far: avoid inf - inf
    log_e = (z - centre) * scale
    e = tl.exp(log_e)
    factor = tl.exp((peak - centre) * scale)
    if WEIGHTED:
        drop = tl.where(peak == float("-inf"), 0.0, (peak - centre) * scale)
        weighted = (weighted + drop * total) * factor + e * tl.maximum(log_e, LOG_ZERO)
    return higher, total * factor + e, weighted, e, factor


@triton.jit
def tanh(x, REAL: tl.constexpr):
    """Return tanh to a few units in the last place, in float32 and float64.

    Away from 0 it is 1 - 2 / (exp(2 |x|) + 1). Near 0 that loses digits, so Lambert's continued fraction
    x / (1 + x^2 / (3 + x^2 / (5 + ...))) is used instead; truncated after 11 it has an error below x^13 / 1.4e9.
    """
    near: tl.constexpr = 0.25 if REAL.primitive_bitwidth == 64 else 1.0
    square = x * x
    numerator = x * (10395 + square * (1260 + square * 21))
    fraction = numerator / (10395 + square * (4725 + square * (210 + square)))
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < near, fraction, tl.where(x < 0, -far, far))
