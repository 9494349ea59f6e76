"""The exact divergence between two LM heads, one block of rows at a time: no [tokens, vocabulary] tensor is needed.

Forward and backward take four matrix products (both logits, d hidden, d weight) where the gradient fits into
`keep_bytes`. Beyond that the backward computes both logits again: six products, in the memory of two blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.common import check_kind, host_scalar, real_dtype, refuse_second_derivative
from rlhf_kernels.linear_logprobs.blocks import Gradients, HeadOptions, blocks, check_head, check_options
from rlhf_kernels.registry import choose, implementation

__all__ = ["linear_kl"]


def linear_kl(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kind: str = "reverse",
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    keep_bytes: int = 1 << 29,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence between the distributions of two heads at each row, summed over the vocabulary.

    Args:
        policy_hidden: (M, Hp).
        policy_weight: (V, Hp).
        ref_hidden: (M, Hr). The widths may differ; the rows and the vocabulary are the same.
        ref_weight: (V, Hr).
        policy_bias, ref_bias: (V,) or None.
        kind: "reverse", "forward" or "js", see `kl_divergence`.
        temperature: more than 0.
        scale, softcap: of both heads, as for `linear_logprobs`.
        entropy: also return the entropy of the policy in nats, without gradient.
        keep_bytes: memory that the forward may keep for the backward, which otherwise computes all logits again.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`. The Triton path supports no softcap and only
            positive scales: otherwise "auto" is the torch path on CUDA too.

    Returns:
        (M,) divergences in nats, float32 (float64 for float64 inputs), with gradients to the policy's hidden, weight
        and bias, and (M,) entropies or None.

    Raises:
        ValueError: for invalid shapes, dtypes and options.
        RuntimeError: for an `impl` that cannot run here, and for a second derivative.
    """
    check_kind(kind)
    check_head(policy_hidden, policy_weight, policy_bias, prefix="policy_")
    check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    check_options(scale, softcap)
    if len(ref_hidden) != len(policy_hidden) or len(ref_weight) != len(policy_weight):
        raise ValueError(
            f"reference of {len(ref_hidden)} rows and {len(ref_weight)} tokens, policy of {len(policy_hidden)} and "
            f"{len(policy_weight)}: expected the same"
        )
    beyond_triton = softcap is not None or not scale > 0
    if impl == "triton" and beyond_triton:
        raise RuntimeError(
            f"linear_kl: softcap={softcap}, scale={scale}: impl='triton' expects no softcap and a positive scale; "
            "impl='torch' supports any"
        )
    impl = choose("linear_kl", policy_hidden.device, "torch" if beyond_triton else impl)
    head = (policy_hidden, policy_weight) if policy_bias is None else (policy_hidden, policy_weight, policy_bias)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in head)
    # The torch path keeps the gradient of the policy's logits, the Triton path both logits in the dtype of the model.
    kept = 2 * policy_hidden.dtype.itemsize if impl == "triton" else real_dtype(policy_hidden.dtype).itemsize
    divergences, entropies, *_ = _forward(
        policy_hidden,
        policy_weight,
        policy_bias,
        ref_hidden.detach(),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        kind,
        host_scalar(temperature, name="temperature"),
        scale,
        softcap,
        entropy,
        keep and policy_hidden.shape[0] * policy_weight.shape[0] * kept <= keep_bytes,
        impl,
    )
    return divergences, entropies if entropy else None


@torch.library.custom_op("rlhf_kernels::linear_kl", mutates_args=())
def _forward(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    kind: str,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    entropy: bool,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return divergences (M,), entropies (M,) or (0,); for the backward statistics (5, M) and blocks (M or 0, V)."""
    options, num_rows = HeadOptions(temperature.item(), scale, softcap), len(policy_hidden)
    rows_of = implementation("linear_kl", impl)
    divergences = policy_hidden.new_empty(num_rows, dtype=real_dtype(policy_hidden.dtype))
    entropies = divergences.new_empty(num_rows if entropy else 0)
    stats = divergences.new_empty(5, num_rows)
    size = max(1, min(rows_of.block_rows(policy_weight), num_rows))
    keep_reference = keep and impl == "triton"
    kept_policy = rows_of.new_block(num_rows if keep else 0, policy_weight)
    kept_reference = rows_of.new_block(num_rows if keep_reference else 0, ref_weight)
    policy_buffer = rows_of.new_block(0 if keep else size, policy_weight)
    reference_buffer = rows_of.new_block(0 if keep_reference else size, ref_weight)
    for rows in blocks(num_rows, size):
        length = rows.stop - rows.start
        policy = kept_policy[rows] if keep else policy_buffer[:length]
        reference = kept_reference[rows] if keep_reference else reference_buffer[:length]
        rows_of.project(policy_hidden[rows], policy_weight, policy_bias, out=policy)
        rows_of.project(ref_hidden[rows], ref_weight, ref_bias, out=reference)
        rows_of.fold(
            policy,
            reference,
            options,
            kind,
            divergences[rows],
            entropies[rows] if entropy else None,
            stats[:, rows],
            want_gradient=keep,
        )
    return divergences, entropies, stats, kept_policy, kept_reference


@_forward.register_fake
def _(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    kind: str,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    entropy: bool,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    real, num_rows, vocabulary = real_dtype(policy_hidden.dtype), policy_hidden.shape[0], policy_weight.shape[0]
    per_row = policy_hidden.new_empty(num_rows, dtype=real)
    kept_dtype = policy_hidden.dtype if impl == "triton" else real
    return (
        per_row,
        per_row.new_empty(num_rows if entropy else 0),
        per_row.new_empty(5, num_rows),
        per_row.new_empty(num_rows if keep else 0, vocabulary, dtype=kept_dtype),
        per_row.new_empty(num_rows if keep and impl == "triton" else 0, vocabulary, dtype=kept_dtype),
    )


@torch.library.custom_op("rlhf_kernels::linear_kl_backward", mutates_args=())
def _backward(
    grad_divergences: Tensor,
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    divergences: Tensor,
    stats: Tensor,
    kept_policy: Tensor,
    kept_reference: Tensor,
    temperature: Tensor,
    kind: str,
    scale: float,
    softcap: float | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the policy's hidden, weight and bias; (0,) for those not wanted."""
    options, num_rows = HeadOptions(temperature.item(), scale, softcap), len(policy_hidden)
    rows_of = implementation("linear_kl", impl)
    gradients = Gradients(policy_hidden, policy_weight, policy_bias, (wants_hidden, wants_weight, wants_bias))
    keep = len(kept_policy) > 0
    fold_again = impl == "torch" and not keep  # the Triton path needs only the statistics
    if fold_again:
        divergences, stats = torch.empty_like(divergences), torch.empty_like(stats)
    size = max(1, min(rows_of.block_rows(policy_weight), num_rows))
    # What was kept is not overwritten, so that a second backward pass is possible. The torch path needs no buffer then.
    policy_buffer = rows_of.new_block(0 if keep and impl == "torch" else size, policy_weight)
    reference_buffer = rows_of.new_block(0 if keep else size, ref_weight)
    for rows in blocks(num_rows, size):
        out = policy = policy_buffer[: rows.stop - rows.start]
        reference = reference_buffer[: rows.stop - rows.start]
        if keep:
            policy, reference = kept_policy[rows], kept_reference[rows]
        else:
            rows_of.project(policy_hidden[rows], policy_weight, policy_bias, out=policy)
            rows_of.project(ref_hidden[rows], ref_weight, ref_bias, out=reference)
        if fold_again:
            rows_of.fold(policy, reference, options, kind, divergences[rows], None, stats[:, rows], want_gradient=True)
        found = rows_of.gradient(
            policy, reference, options, kind, divergences[rows], stats[:, rows], grad_divergences[rows], out
        )
        gradients.add(rows, *found)
    return gradients.finish()


@_backward.register_fake
def _(
    grad_divergences: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight, wants_bias, _ = others[-4:]
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(0) if bias is None or not wants_bias else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kind, temperature, scale, softcap, _, _, impl = inputs
    divergences, entropies, *saved = output
    ctx.save_for_backward(*tensors, divergences, *saved, temperature)
    ctx.options = (kind, scale, softcap)
    ctx.impl = impl
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(entropies, *saved)


def _differentiate(ctx: Any, grad_divergences: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_divergences is None:
        return (None,) * 13
    wanted = ctx.needs_input_grad[:3]
    gradients = _backward(grad_divergences, *ctx.saved_tensors, *ctx.options, *wanted, ctx.impl)
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *[None] * 10


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "linear_kl")
