"""The LM head and the log-prob together, a block of rows at a time: [tokens, vocabulary] is never held whole.

The gradient needs softmax(logits) again. Within `keep_bytes` the forward keeps it for the backward: three matrix
products in all (logits, d hidden, d weight), two where the weight is frozen. Beyond that the backward makes the logits
anew: four and three, in the memory of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.common import host_scalar, real_dtype, refuse_second_derivative
from rlhf_kernels.linear_logprobs.blocks import (
    Gradients,
    HeadOptions,
    all_rows,
    blocks,
    check_head,
    check_options,
    live_rows,
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
    mask: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) under softmax(logits / temperature), without the logits.

    Args:
        hidden: (M, H), in the model's dtype. weight: (V, H). targets: (M,) int64. bias: (V,) or None.
        scale, softcap: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap); no tanh where None.
        entropy: also return the distribution's entropy in nats, a gauge without gradient.
        keep_bytes: memory that the forward may keep for the backward instead of computing logits twice.
        mask: (M,) bool, the rows that count; the others take part in no product and give 0. Finding them waits for
            the device on CUDA, so who knows the rows already passes them alone, as `models/forward.py` does.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`.

    Returns:
        (M,) log-probs, float32 (float64 for float64 inputs), with gradients to hidden, weight and bias; and (M,)
        entropies or None.

    Raises ValueError for shapes, dtypes and options out of range; RuntimeError for an impl that cannot run here, and
    for a second derivative.
    """
    check_head(hidden, weight, bias)
    check_options(scale, softcap)
    for name, x, dtype in (("targets", targets, torch.int64), ("mask", mask, torch.bool)):
        if x is not None and (x.shape != hidden.shape[:1] or x.dtype != dtype):
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} and {x.dtype}: expected ({hidden.shape[0]},) of {dtype}"
            )
    impl = choose("linear_logprobs", hidden.device, impl)
    differentiable = (hidden, weight) if bias is None else (hidden, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    itemsize = hidden.dtype.itemsize if impl == "triton" else real_dtype(hidden.dtype).itemsize
    keep = needs_grad and hidden.shape[0] * weight.shape[0] * itemsize <= keep_bytes
    temperature = host_scalar(temperature, name="temperature")
    logprobs, entropies, _, _ = _forward(
        hidden, weight, bias, targets, mask, temperature, scale, softcap, entropy, keep, impl
    )
    return logprobs, entropies if entropy else None


@torch.library.custom_op("rlhf_kernels::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    entropy: bool,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (M,), entropies (M,) or (0,); for the backward statistics (2, M), and what is kept (M or 0, V).

    Of the last two only the first rows are filled where a mask leaves fewer: their shapes must not depend on it.
    """
    options, rows_of = HeadOptions(temperature.item(), scale, softcap), implementation("linear_logprobs", impl)
    num_rows = hidden.shape[0]
    index, (hidden, targets) = live_rows(mask, hidden, targets)
    targets = targets.contiguous()
    stats = hidden.new_empty(2, num_rows, dtype=real_dtype(hidden.dtype))
    logprobs = stats.new_empty(len(hidden))
    entropies = torch.empty_like(logprobs) if entropy else None
    size = rows_of.block_rows(weight)
    kept = rows_of.new_block(num_rows if keep else 0, weight)
    buffer = kept if keep else rows_of.new_block(min(len(hidden), size), weight)
    for rows in blocks(len(hidden), size):
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
    entropies = all_rows(index, entropies, num_rows) if entropy else stats.new_empty(0)
    return all_rows(index, logprobs, num_rows), entropies, stats, kept


@_forward.register_fake
def _(hidden, weight, bias, targets, mask, temperature, scale, softcap, entropy, keep, impl):
    real = real_dtype(hidden.dtype)
    num_rows, vocabulary = hidden.shape[0], weight.shape[0]
    per_row = hidden.new_empty(num_rows, dtype=real)
    kept_dtype = hidden.dtype if impl == "triton" else real
    return (
        per_row,
        torch.empty_like(per_row) if entropy else per_row.new_empty(0),
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
    mask: Tensor | None,
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
    """d hidden, d weight, d bias; (0,) for those not wanted."""
    options, rows_of = HeadOptions(temperature.item(), scale, softcap), implementation("linear_logprobs", impl)
    num_rows, keep = hidden.shape[0], len(kept) > 0
    index, (hidden, targets, grad_logprobs) = live_rows(mask, hidden, targets, grad_logprobs)
    grad_logprobs, targets = grad_logprobs.contiguous(), targets.contiguous()
    gradients = Gradients(hidden, weight, bias, (wants_hidden, wants_weight, wants_bias))
    size = rows_of.block_rows(weight)
    # Where the gradient is made in place of what was kept, nothing is written: a second backward finds it unharmed.
    buffer = rows_of.new_block(0 if keep and impl == "torch" else min(len(hidden), size), weight)
    fold_again = impl == "torch" and not keep  # the kernel needs the statistics alone, the tiles are worked on in place
    if fold_again:
        stats, logprobs = torch.empty_like(stats), torch.empty_like(grad_logprobs)
    for rows in blocks(len(hidden), size):
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
    grad_hidden, grad_weight, grad_bias = gradients.finish()
    return all_rows(index, grad_hidden, num_rows) if wants_hidden else grad_hidden, grad_weight, grad_bias


@_backward.register_fake
def _(grad_logprobs, hidden, weight, bias, targets, mask, stats, kept, temperature, scale, softcap, *wanted_and_impl):
    *wanted, _ = wanted_and_impl
    inputs = (hidden, weight, weight.new_empty(0) if bias is None else bias)
    return tuple(x.new_empty(x.shape if want else (0,)) for x, want in zip(inputs, wanted, strict=True))


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, mask, temperature, scale, softcap, _, _, impl = inputs
    _, entropies, stats, kept = output
    ctx.save_for_backward(hidden, weight, bias, targets, mask, stats, kept, temperature)
    ctx.options = (scale, softcap, impl)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(entropies, stats, kept)


def _differentiate(ctx, grad_logprobs, *_):
    *tensors, temperature = ctx.saved_tensors
    scale, softcap, impl = ctx.options
    wanted = ctx.needs_input_grad[:3]
    if grad_logprobs is None:
        return (None,) * 11
    gradients = _backward(grad_logprobs, *tensors, temperature, scale, softcap, *wanted, impl)
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "linear_logprobs")
