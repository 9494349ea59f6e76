"""The LM head and log-probs together, one block of rows at a time: no [tokens, vocabulary] tensor is needed.

The gradient needs softmax(logits) again. Within `keep_bytes` the forward keeps it for the backward: three matrix
products in all (logits, d hidden, d weight), two where the weight is frozen. Beyond that the backward computes the
logits again: four and three products, in the memory of one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.common import host_scalar, real_dtype, refuse_second_derivative
from rlhf_kernels.linear_logprobs.blocks import (
    Gradients,
    HeadOptions,
    blocks,
    check_head,
    check_options,
    check_targets,
)
from rlhf_kernels.linear_logprobs.token_loss import linear_token_loss
from rlhf_kernels.registry import choose, implementation

__all__ = ["linear_logprobs", "linear_token_loss"]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    keep_bytes: int = 1 << 29,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute log p(target) under softmax(logits / temperature) from hidden states, without the logits.

    Args:
        hidden: (M, H), in the dtype of the model.
        weight: (V, H), of the LM head.
        targets: (M,) int64.
        bias: (V,) or None.
        temperature: more than 0.
        scale, softcap: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap); no tanh for None.
        entropy: also return the entropy of the distribution in nats, without gradient.
        keep_bytes: memory that the forward may keep for the backward, which otherwise computes the logits again.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`.

    Returns:
        (M,) log-probs, float32 (float64 for float64 inputs), with gradients to hidden, weight and bias; and (M,)
        entropies or None.

    Raises:
        ValueError: for invalid shapes, dtypes and options.
        RuntimeError: for an `impl` that cannot run here, and for a second derivative.
    """
    check_head(hidden, weight, bias)
    check_options(scale, softcap)
    check_targets(targets, hidden)
    impl = choose("linear_logprobs", hidden.device, impl)
    differentiable = (hidden, weight) if bias is None else (hidden, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    itemsize = hidden.dtype.itemsize if impl == "triton" else real_dtype(hidden.dtype).itemsize
    keep = needs_grad and hidden.shape[0] * weight.shape[0] * itemsize <= keep_bytes
    logprobs, entropies, _, _ = _forward(
        hidden,
        weight,
        bias,
        targets,
        host_scalar(temperature, name="temperature"),
        scale,
        softcap,
        entropy,
        keep,
        impl,
    )
    return logprobs, entropies if entropy else None


@torch.library.custom_op("rlhf_kernels::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    entropy: bool,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs (M,), entropies (M,) or (0,), and for the backward statistics (2, M) and a block (M or 0, V)."""
    options, rows_of = HeadOptions(temperature.item(), scale, softcap), implementation("linear_logprobs", impl)
    num_rows, targets = len(hidden), targets.contiguous()
    stats = hidden.new_empty(2, num_rows, dtype=real_dtype(hidden.dtype))
    logprobs = stats.new_empty(num_rows)
    entropies = stats.new_empty(num_rows if entropy else 0)
    size = rows_of.block_rows(weight)
    kept = rows_of.new_block(num_rows if keep else 0, weight)
    buffer = kept if keep else rows_of.new_block(min(num_rows, size), weight)
    for rows in blocks(num_rows, size):
        block = kept[rows] if keep else buffer[: rows.stop - rows.start]
        rows_of.project(hidden[rows], weight, out=block)
        rows_of.fold(
            block,
            bias,
            targets[rows],
            options,
            logprobs[rows],
            entropies[rows] if entropy else None,
            stats[:, rows],
            want_gradient=keep,
        )
    return logprobs, entropies, stats, kept


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    entropy: bool,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = real_dtype(hidden.dtype)
    num_rows, vocabulary = hidden.shape[0], weight.shape[0]
    per_row = hidden.new_empty(num_rows, dtype=real)
    kept_dtype = hidden.dtype if impl == "triton" else real
    return (
        per_row,
        per_row.new_empty(num_rows if entropy else 0),
        per_row.new_empty(2, num_rows),
        hidden.new_empty(num_rows if keep else 0, vocabulary, dtype=kept_dtype),
    )


@torch.library.custom_op("rlhf_kernels::linear_logprobs_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    kept: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias; (0,) for those not wanted."""
    options, rows_of = HeadOptions(temperature.item(), scale, softcap), implementation("linear_logprobs", impl)
    num_rows, keep = len(hidden), len(kept) > 0
    grad_logprobs, targets = grad_logprobs.contiguous(), targets.contiguous()
    gradients = Gradients(hidden, weight, bias, (wants_hidden, wants_weight, wants_bias))
    size = rows_of.block_rows(weight)
    # What was kept is not overwritten, so that a second backward pass is possible. The torch path needs no buffer then.
    buffer = rows_of.new_block(0 if keep and impl == "torch" else min(num_rows, size), weight)
    fold_again = impl == "torch" and not keep  # the Triton path needs only the statistics
    if fold_again:
        stats, logprobs = torch.empty_like(stats), torch.empty_like(grad_logprobs)
    for rows in blocks(num_rows, size):
        block = buffer[: rows.stop - rows.start]
        if keep:
            source = kept[rows]
        else:
            source = block
            rows_of.project(hidden[rows], weight, out=block)
            if fold_again:
                rows_of.fold(
                    block, bias, targets[rows], options, logprobs[rows], None, stats[:, rows], want_gradient=True
                )
        gradient = rows_of.gradient(
            source, bias, targets[rows], options, stats[:, rows], grad_logprobs[rows], out=block
        )
        gradients.add(rows, *gradient)
    return gradients.finish()


@_backward.register_fake
def _(
    grad_logprobs: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight, wants_bias, _ = others[-4:]
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(0) if bias is None or not wants_bias else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, temperature, scale, softcap, _, _, impl = inputs
    _, entropies, stats, kept = output
    ctx.save_for_backward(hidden, weight, bias, targets, stats, kept, temperature)
    ctx.options = (scale, softcap)
    ctx.impl = impl
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(entropies, stats, kept)


def _differentiate(ctx: Any, grad_logprobs: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_logprobs is None:
        return (None,) * 10
    wanted = ctx.needs_input_grad[:3]
    gradients = _backward(grad_logprobs, *ctx.saved_tensors, *ctx.options, *wanted, ctx.impl)
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "linear_logprobs")
