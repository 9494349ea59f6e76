"""The Triton implementation of a block of rows: matrix products by the vendor's library, kernels for the rest.

A block of logits, in the dtype of the model, is read once for its statistics, and read and written once to become its
gradient. Blocks are large, so that reading and writing d weight (in float32, once per block) is small in comparison.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.linear_logprobs.blocks import HeadOptions
from rlhf_kernels.triton_rows import block_options, load_block, on_device, real_type, tanh
from rlhf_kernels.triton_rows import fold as fold_block

_BLOCK_ROWS = 4096


def block_rows(weight: Tensor) -> int:
    """Return the rows of a block."""
    return _BLOCK_ROWS


def new_block(num_rows: int, weight: Tensor) -> Tensor:
    """Allocate a block for logits, in the dtype of the model, and then for their gradient."""
    return weight.new_empty(num_rows, weight.shape[0])


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute out = hidden @ weight.T."""
    torch.mm(hidden, weight.T, out=out)


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
    """Compute log-probs and entropies of a block of hidden @ weight.T, which is not changed.

    `stats`, (2, r), receives each row's largest z and sum_v exp(z_v - largest).
    """
    if len(block):
        with on_device(block):
            _fold_kernel[(len(block),)](
                block, bias, targets, logprobs, entropies, stats[0], stats[1], block.stride(0), block.shape[1],
                **_scalars(options), HAS_BIAS=bias is not None, HAS_SOFTCAP=options.softcap is not None,
                ENTROPY=entropies is not None, REAL=real_type(stats.dtype), **block_options(block.shape[1]),
            )  # fmt: skip


def gradient(
    block: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: HeadOptions,
    stats: Tensor,
    grad_logprobs: Tensor,
    out: Tensor,
) -> tuple[Tensor, None]:
    """Write the gradient of hidden @ weight.T into `out`, which may be the block itself."""
    vocabulary = block.shape[1]
    launch = block_options(vocabulary)
    blocks = triton.cdiv(vocabulary, launch["BLOCK"])
    if len(block):
        with on_device(block):
            _gradient_kernel[(len(block) * blocks,)](
                block, out, bias, targets, grad_logprobs, stats[0], stats[1], block.stride(0), out.stride(0),
                vocabulary, blocks, **_scalars(options), slope=options.slope, HAS_BIAS=bias is not None,
                HAS_SOFTCAP=options.softcap is not None, REAL=real_type(stats.dtype), **launch,
            )  # fmt: skip
    return out, None


def _scalars(options: HeadOptions) -> dict[str, float]:
    """Return the factors of z = tanh(logit * inner) * outer, or z = logit * inner without a softcap."""
    if options.softcap is None:
        return dict(inner=options.slope, outer=1.0)
    return dict(inner=options.scale / options.softcap, outer=options.softcap / options.temperature)


@triton.jit
def _temper(x, inner, outer, HAS_SOFTCAP: tl.constexpr, REAL: tl.constexpr):
    """Return z (see `HeadOptions`) for logits without scale."""
    z = x * inner
    if HAS_SOFTCAP:
        z = tanh(z, REAL) * outer
    return z


@triton.jit
def _fold_kernel(
    logits,
    bias,
    targets,
    logprobs,
    entropies,
    peaks,
    totals,
    stride,
    vocabulary,
    inner: tl.float64,
    outer: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inner = tl.full([], inner, REAL)
    outer = tl.full([], outer, REAL)
    peak = tl.full([], float("-inf"), REAL)
    total = tl.zeros([BLOCK], REAL)
    weighted = tl.zeros([BLOCK], REAL)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        x = load_block(logits + row * stride, columns, vocabulary, 1, REAL)
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=inside, other=0.0).to(REAL)
        z = tl.where(inside, _temper(x, inner, outer, HAS_SOFTCAP, REAL), float("-inf"))
        peak, total, weighted, _, _ = fold_block(z, peak, total, weighted, 1.0, ENTROPY)
    row_total = tl.sum(total, 0)
    log_total = tl.log(row_total)
    target = tl.load(targets + row)
    valid = (target >= 0) & (target < vocabulary)  # NaN for an invalid target: a kernel cannot raise an error
    x = tl.load(logits + row * stride + target, mask=valid, other=float("nan")).to(REAL)
    if HAS_BIAS:
        x += tl.load(bias + target, mask=valid, other=0.0).to(REAL)
    chosen = _temper(x, inner, outer, HAS_SOFTCAP, REAL)
    tl.store(logprobs + row, (chosen - peak) - log_total)
    tl.store(peaks + row, peak)
    tl.store(totals + row, row_total)
    if ENTROPY:
        tl.store(entropies + row, log_total - tl.sum(weighted, 0) / row_total)


@triton.jit
def _gradient_kernel(
    logits,
    out,
    bias,
    targets,
    grads,
    peaks,
    totals,
    stride,
    out_stride,
    vocabulary,
    blocks,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = load_block(logits + row * stride, columns, vocabulary, 1, REAL)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(REAL)
    outer = tl.full([], outer, REAL)
    z = _temper(x, tl.full([], inner, REAL), outer, HAS_SOFTCAP, REAL)
    total = tl.load(totals + row)
    e = tl.exp(z - tl.load(peaks + row))
    # (1[v = target] - p_v) times total, so that 1 - p is computed before rounding to the dtype of the model.
    distance = tl.where(columns == tl.load(targets + row), total - e, -e)
    gradient = distance * (tl.load(grads + row).to(REAL) * tl.full([], slope, REAL) / total)
    if HAS_SOFTCAP:
        ratio = z / outer
        gradient *= 1 - ratio * ratio
    tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=inside)
