"""The Triton implementation: forward one program per row, one read; backward one program per block of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.common import real_dtype
from rlhf_kernels.triton_rows import (
    LOG_ZERO,
    block_options,
    fold,
    load_block,
    on_device,
    real_type,
    row_offset,
)


@triton.jit
def _forward_kernel(
    logits,
    targets,
    mask,
    logprobs,
    entropies,
    stats,
    rows,
    vocabulary,
    inner,
    stride_outer,
    stride_inner,
    stride_vocabulary,
    inverse_temperature: tl.float64,
    HAS_MASK: tl.constexpr,
    ENTROPY: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if HAS_MASK:  # noqa: SIM102 (without a mask the pointer is None)
        if tl.load(mask + row) == 0:
            return
    scale = tl.full([], inverse_temperature, REAL)
    pointer = logits + row_offset(row, inner, stride_outer, stride_inner)
    columns = tl.arange(0, BLOCK)

    peak = tl.full([], float("-inf"), REAL)
    total = tl.zeros([BLOCK], REAL)
    weighted = tl.zeros([BLOCK], REAL)
    block = load_block(pointer, columns, vocabulary, stride_vocabulary, REAL)
    for start in range(0, vocabulary, BLOCK):
        # Load the next block while this one is added.
        following = load_block(pointer, start + BLOCK + columns, vocabulary, stride_vocabulary, REAL)
        peak, total, weighted, _, _ = fold(block, peak, total, weighted, scale, ENTROPY)
        block = following

    target = tl.load(targets + row)
    valid = (target >= 0) & (target < vocabulary)
    chosen = tl.load(pointer + target * stride_vocabulary, mask=valid, other=float("nan")).to(REAL)
    sum_e = tl.sum(total, 0)
    log_total = tl.log(sum_e)
    tl.store(logprobs + row, (chosen - peak) * scale - log_total)
    tl.store(stats + row, peak)
    tl.store(stats + rows + row, log_total)
    if ENTROPY:
        tl.store(entropies + row, log_total - tl.sum(weighted, 0) / sum_e)


@triton.jit
def _backward_kernel(
    logits,
    gradient,
    grad_logprobs,
    grad_entropies,
    targets,
    mask,
    entropies,
    stats,
    rows,
    vocabulary,
    blocks,
    inner,
    stride_outer,
    stride_inner,
    stride_vocabulary,
    out_stride_outer,
    out_stride_inner,
    out_stride_vocabulary,
    inverse_temperature: tl.float64,
    HAS_MASK: tl.constexpr,
    ENTROPY: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    out = gradient + row_offset(row, inner, out_stride_outer, out_stride_inner)
    out += columns.to(tl.int64) * out_stride_vocabulary

    live = True
    if HAS_MASK:
        live = tl.load(mask + row) != 0
    g = tl.load(grad_logprobs + row)
    h = g * 0
    if ENTROPY:
        h = tl.load(grad_entropies + row)
    if live & ((g != 0) | (h != 0)):
        scale = tl.full([], inverse_temperature, REAL)
        pointer = logits + row_offset(row, inner, stride_outer, stride_inner)
        z = load_block(pointer, columns, vocabulary, stride_vocabulary, REAL)
        log_p = (z - tl.load(stats + row)) * scale - tl.load(stats + rows + row)
        p = tl.exp(log_p)
        # 1 - p of the target is computed before rounding, so that it is exact for p near 1.
        d = g * (tl.where(columns == tl.load(targets + row), 1.0, 0.0) - p)
        if ENTROPY:
            d -= h * p * (tl.maximum(log_p, LOG_ZERO) + tl.load(entropies + row))
        tl.store(out, (d * scale).to(gradient.dtype.element_ty), mask=inside)
    else:
        tl.store(out, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=inside)


def forward(
    rows: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (outer, inner) log-probs of (outer, inner, V) rows, entropies (empty if not wanted), and statistics.

    The statistics are (2, outer * inner): each row's largest logit, and log sum_v exp((logit_v - largest) /
    temperature). Their sum would lose digits where the logits are large.
    """
    outer, inner, vocabulary = rows.shape
    real = real_dtype(rows.dtype)
    logprobs = rows.new_zeros((outer, inner), dtype=real)
    entropies = rows.new_zeros((outer, inner) if entropy else 0, dtype=real)
    stats = rows.new_zeros((2, outer * inner), dtype=real)
    if outer * inner:
        with on_device(rows):
            _forward_kernel[(outer * inner,)](
                rows, targets, mask, logprobs, entropies, stats, outer * inner, vocabulary, inner, *rows.stride(),
                1 / temperature, HAS_MASK=mask is not None, ENTROPY=entropy, REAL=real_type(real),
                **block_options(vocabulary),
            )  # fmt: skip
    return logprobs, entropies, stats


def backward(
    rows: Tensor,
    out: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    entropies: Tensor,
    stats: Tensor,
    temperature: float,
) -> None:
    """Write the gradient into `out`, (outer, inner, V) like the rows, or the rows themselves; see torch_path."""
    outer, inner, vocabulary = rows.shape
    options = block_options(vocabulary)
    blocks = triton.cdiv(vocabulary, options["BLOCK"])
    if outer * inner:
        with on_device(rows):
            _backward_kernel[(outer * inner * blocks,)](
                rows, out, grad_logprobs, grad_entropies, targets, mask, entropies, stats, outer * inner, vocabulary,
                blocks, inner, *rows.stride(), *out.stride(), 1 / temperature,
                HAS_MASK=mask is not None, ENTROPY=grad_entropies is not None,
                REAL=real_type(stats.dtype), **options,
            )  # fmt: skip
