"""The Triton implementation: KL and entropy in one read of both logits, Jensen-Shannon in two; backward in one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.triton_rows import (
    LOG_ZERO,
    block_options,
    fold,
    load_block,
    on_device,
    real_type,
    row_offset,
)

LOG_TWO = tl.constexpr(0.6931471805599453)


@triton.jit
def _centre(block):
    """Return the largest logit of a block, or 0 where all are -inf."""
    peak = tl.max(block, 0)
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _mixture_gaps(p, q, log_p, log_q):
    """Return log(p / m) and log(q / m) with m = (p + q) / 2, each 0 where its numerator is.

    With d = log(p / q), log(p / m) = log 2 - log(1 + exp(-d)): no cancellation where p is near q.
    """
    d = log_p - log_q
    tail = tl.log(1 + tl.exp(-tl.abs(d)))
    gap_p = tl.where(p > 0, LOG_TWO - tl.maximum(-d, 0.0) - tail, 0.0)
    gap_q = tl.where(q > 0, LOG_TWO - tl.maximum(d, 0.0) - tail, 0.0)
    return gap_p, gap_q


@triton.jit
def _forward_kernel(
    policy,
    reference,
    divergence,
    entropies,
    stats,
    rows,
    vocabulary,
    inner,
    policy_outer,
    policy_inner,
    policy_stride,
    reference_outer,
    reference_inner,
    reference_stride,
    inverse_temperature: tl.float64,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    scale = tl.full([], inverse_temperature, REAL)
    p_row = policy + row_offset(row, inner, policy_outer, policy_inner)
    q_row = reference + row_offset(row, inner, reference_outer, reference_inner)
    columns = tl.arange(0, BLOCK)

    p_peak = tl.full([], float("-inf"), REAL)
    q_peak = tl.full([], float("-inf"), REAL)
    p_total = tl.zeros([BLOCK], REAL)
    q_total = tl.zeros([BLOCK], REAL)
    weighted = tl.zeros([BLOCK], REAL)
    cross = tl.zeros([BLOCK], REAL)  # sum of e (z_p - z_q - offset), e the p's or the q's
    p_block = load_block(p_row, columns, vocabulary, policy_stride, REAL)
    q_block = load_block(q_row, columns, vocabulary, reference_stride, REAL)
    # A constant added to all logits changes nothing, so the difference of the two sides is taken out first.
    offset = _centre(p_block) - _centre(q_block)
    for start in range(0, vocabulary, BLOCK):
        # Load the next blocks while these are added.
        p_following = load_block(p_row, start + BLOCK + columns, vocabulary, policy_stride, REAL)
        q_following = load_block(q_row, start + BLOCK + columns, vocabulary, reference_stride, REAL)
        p_peak, p_total, weighted, p_e, p_factor = fold(p_block, p_peak, p_total, weighted, scale, ENTROPY)
        q_peak, q_total, _, q_e, q_factor = fold(q_block, q_peak, q_total, q_total, scale, False)
        # An infinite sum stays infinite unless its probabilities become 0; 0 log 0 = 0.
        if KIND == "reverse":
            cross = tl.where(p_factor > 0, cross * p_factor, 0.0)
            cross += tl.where(p_e > 0, p_e * (p_block - q_block - offset), 0.0)
        if KIND == "forward":
            cross = tl.where(q_factor > 0, cross * q_factor, 0.0)
            cross += tl.where(q_e > 0, q_e * (p_block - q_block - offset), 0.0)
        p_block = p_following
        q_block = q_following

    p_sum = tl.sum(p_total, 0)
    q_sum = tl.sum(q_total, 0)
    p_log_total = tl.log(p_sum)
    q_log_total = tl.log(q_sum)
    tl.store(stats + row, p_peak)
    tl.store(stats + rows + row, p_log_total)
    tl.store(stats + 2 * rows.to(tl.int64) + row, q_peak)
    tl.store(stats + 3 * rows.to(tl.int64) + row, q_log_total)
    if ENTROPY:
        tl.store(entropies + row, p_log_total - tl.sum(weighted, 0) / p_sum)
    if KIND == "js":
        p_sums = tl.zeros([BLOCK], REAL)
        q_sums = tl.zeros([BLOCK], REAL)
        for start in range(0, vocabulary, BLOCK):
            p_block = load_block(p_row, start + columns, vocabulary, policy_stride, REAL)
            q_block = load_block(q_row, start + columns, vocabulary, reference_stride, REAL)
            log_p = (p_block - p_peak) * scale - p_log_total
            log_q = (q_block - q_peak) * scale - q_log_total
            p = tl.exp(log_p)
            q = tl.exp(log_q)
            p_gap, q_gap = _mixture_gaps(p, q, log_p, log_q)
            p_sums += p * p_gap
            q_sums += q * q_gap
        from_p = tl.sum(p_sums, 0)
        from_q = tl.sum(q_sums, 0)
        tl.store(stats + 4 * rows.to(tl.int64) + row, from_p)
        tl.store(divergence + row, (from_p + from_q) / 2)
    else:
        log_ratio = (p_peak - q_peak - offset) * scale + tl.log(p_sum / q_sum)  # of the two normalisers
        if KIND == "reverse":
            tl.store(divergence + row, tl.sum(cross, 0) * scale / p_sum - log_ratio)
        else:
            tl.store(divergence + row, log_ratio - tl.sum(cross, 0) * scale / q_sum)


@triton.jit
def _backward_kernel(
    policy,
    reference,
    gradients,
    grad_divergence,
    grad_entropies,
    divergence,
    entropies,
    stats,
    rows,
    vocabulary,
    blocks,
    inner,
    policy_outer,
    policy_inner,
    policy_stride,
    reference_outer,
    reference_inner,
    reference_stride,
    inverse_temperature: tl.float64,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    out = row.to(tl.int64) * vocabulary + columns  # the gradient is contiguous

    live = tl.load(grad_divergence + row) != 0
    if ENTROPY:
        live |= tl.load(grad_entropies + row) != 0
    gradient = tl.zeros([BLOCK], REAL)
    if live:
        scale = tl.full([], inverse_temperature, REAL)
        many = rows.to(tl.int64)
        p_row = policy + row_offset(row, inner, policy_outer, policy_inner)
        q_row = reference + row_offset(row, inner, reference_outer, reference_inner)
        z_p = load_block(p_row, columns, vocabulary, policy_stride, REAL)
        z_q = load_block(q_row, columns, vocabulary, reference_stride, REAL)
        log_p = (z_p - tl.load(stats + row)) * scale - tl.load(stats + many + row)
        log_q = (z_q - tl.load(stats + 2 * many + row)) * scale - tl.load(stats + 3 * many + row)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        g = tl.load(grad_divergence + row) * scale
        if KIND == "js":
            p_gap, _ = _mixture_gaps(p, q, log_p, log_q)
            gradient = 0.5 * g * p * (p_gap - tl.load(stats + 4 * many + row))
        elif KIND == "reverse":
            gradient = g * p * (tl.where(p > 0, log_p - log_q, 0.0) - tl.load(divergence + row))
        else:
            gradient = g * (p - q)
        if ENTROPY:
            h = tl.load(grad_entropies + row) * scale
            gradient -= h * p * (tl.maximum(log_p, LOG_ZERO) + tl.load(entropies + row))
    tl.store(gradients + out, gradient.to(gradients.dtype.element_ty), mask=inside)


def forward(
    policy: Tensor, reference: Tensor, temperature: float, kind: str, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (outer, inner) divergences of (outer, inner, V) rows, entropies (empty if not wanted), and statistics.

    The statistics are (4 or 5, outer * inner): for policy and reference each row's largest logit and
    log sum_v exp((z_v - largest) / temperature); for "js" also KL(p || m).
    """
    outer, inner, vocabulary = policy.shape
    real = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    divergence = policy.new_zeros((outer, inner), dtype=real)
    entropies = policy.new_zeros((outer, inner) if entropy else 0, dtype=real)
    stats = policy.new_zeros((5 if kind == "js" else 4, outer * inner), dtype=real)
    if outer * inner:
        with on_device(policy):
            _forward_kernel[(outer * inner,)](
                policy, reference, divergence, entropies, stats, outer * inner, vocabulary, inner, *policy.stride(),
                *reference.stride(), 1 / temperature, KIND=kind, ENTROPY=entropy, REAL=real_type(real),
                **block_options(vocabulary),
            )  # fmt: skip
    return divergence, entropies, stats


def backward(
    policy: Tensor,
    reference: Tensor,
    out: Tensor,
    grad_divergence: Tensor,
    grad_entropies: Tensor | None,
    divergence: Tensor,
    entropies: Tensor,
    stats: Tensor,
    temperature: float,
    kind: str,
) -> None:
    """Write the gradient of the policy's logits into `out`, contiguous (outer, inner, V); see torch_path."""
    outer, inner, vocabulary = policy.shape
    options = block_options(vocabulary)
    blocks = triton.cdiv(vocabulary, options["BLOCK"])
    if outer * inner:
        with on_device(policy):
            _backward_kernel[(outer * inner * blocks,)](
                policy, reference, out, grad_divergence, grad_entropies, divergence, entropies, stats, outer * inner,
                vocabulary, blocks, inner, *policy.stride(), *reference.stride(), 1 / temperature, KIND=kind,
                ENTROPY=grad_entropies is not None, REAL=real_type(stats.dtype), **options,
            )  # fmt: skip
