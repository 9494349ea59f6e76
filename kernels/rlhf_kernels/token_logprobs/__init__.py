"""Log-probs of chosen tokens, and entropies, from logits that are already there: one read forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.common import (
    as_rows,
    check_logits,
    check_rows,
    host_scalar,
    real_dtype,
    refuse_second_derivative,
    rowwise,
)
from rlhf_kernels.registry import choose, implementation

__all__ = ["token_logprobs"]


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) under softmax(z / temperature), with z = softcap * tanh(logits / softcap), or z = logits.

    Args:
        logits: (..., V), of any floating dtype and any strides; -inf rules a token out. targets: (...) int64, each at
            least 0 and below V (on CUDA nothing can be raised without waiting: there the log-prob is NaN).
        mask: (...) bool, the rows that count. The others are not read, whatever they hold, and give 0.
        entropy: also return the distribution's entropy in nats, with its gradient.
        inplace_backward: the gradient is written over the logits, which saves memory as large as they are. Their
            values are lost then, so they must have no other reader after the backward (autograd raises for what it
            saved itself, and for a second backward; no one can see a look of your own). Under torch.compile it does
            nothing: there the compiler decides what is reused.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`.

    Returns:
        (...) log-probs, float32 (float64 for float64 logits), and (...) entropies or None.

    Raises ValueError for shapes, dtypes, a temperature or a softcap out of range, and for `inplace_backward` on logits
    that cannot be overwritten; RuntimeError for an impl that cannot run here, and for a second derivative.
    """
    check_logits(logits)
    check_rows(targets, logits, torch.int64, name="targets")
    if mask is not None:
        check_rows(mask, logits, torch.bool, name="mask")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")
    inplace = inplace_backward and logits.requires_grad and not torch.compiler.is_compiling()
    if inplace:
        _check_overwritable(logits)
    impl = choose("token_logprobs", logits.device, impl)
    logprobs, entropies, _ = _forward(
        logits, targets, mask, host_scalar(temperature, name="temperature"), softcap, entropy, inplace, impl
    )
    return logprobs, entropies if entropy else None


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf:  # its .grad would be the leaf itself
        raise ValueError("inplace_backward=True, but the logits are a leaf: only what was computed can be overwritten")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(f"inplace_backward=True, but logits of stride {logits.stride()} share their memory (expanded)")


@torch.library.custom_op("rlhf_kernels::token_logprobs", mutates_args=())
def _forward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    entropy: bool,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (...), entropies (...) or (0,), and statistics (2, ...) that Triton's backward wants."""
    (rows,) = as_rows(logits)
    targets, mask = rowwise(rows, targets, mask)
    logprobs, entropies, stats = implementation("token_logprobs", impl).forward(
        rows, targets, mask, temperature.item(), softcap, entropy
    )
    shape = logits.shape[:-1]
    return logprobs.view(shape), entropies.view(shape) if entropy else entropies, stats


@_forward.register_fake
def _(logits, targets, mask, temperature, softcap, entropy, inplace_backward, impl):
    shape, dtype = logits.shape[:-1], real_dtype(logits.dtype)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape if entropy else (0,), dtype=dtype),
        logits.new_empty((2, targets.numel()) if impl == "triton" else (0,), dtype=dtype),
    )


@torch.library.custom_op("rlhf_kernels::token_logprobs_backward", mutates_args=())
def _backward(
    logits: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    entropies: Tensor,
    stats: Tensor,
    temperature: Tensor,
    softcap: float | None,
    impl: str,
) -> Tensor:
    """The gradient to the logits, contiguous."""
    (rows,) = as_rows(logits)
    gradient = logits.new_empty(logits.shape)
    per_row = rowwise(rows, grad_logprobs, grad_entropies, targets, mask, entropies)
    implementation("token_logprobs", impl).backward(
        rows, gradient.view(rows.shape), *per_row, stats, temperature.item(), softcap
    )
    return gradient


@_backward.register_fake
def _(logits, *others):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("rlhf_kernels::token_logprobs_backward_", mutates_args=("logits",))
def _backward_inplace(
    logits: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    entropies: Tensor,
    stats: Tensor,
    temperature: Tensor,
    softcap: float | None,
    impl: str,
) -> None:
    """The gradient to the logits, over the logits."""
    (rows,) = as_rows(logits)
    per_row = rowwise(rows, grad_logprobs, grad_entropies, targets, mask, entropies)
    implementation("token_logprobs", impl).backward(rows, rows, *per_row, stats, temperature.item(), softcap)
    if rows.data_ptr() != logits.data_ptr():  # strides that are no rows: the work was done on a copy
        logits.copy_(rows.view(logits.shape))


@_backward_inplace.register_fake
def _(logits, *others):
    return None


def _setup_context(ctx, inputs, output):
    logits, targets, mask, temperature, softcap, entropy, inplace_backward, impl = inputs
    _, entropies, stats = output
    ctx.save_for_backward(logits, targets, mask, entropies, stats, temperature)
    ctx.options, ctx.inplace = (softcap, impl), inplace_backward
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([stats] if entropy else [entropies, stats]))


def _differentiate(ctx, grad_logprobs, grad_entropies, _):
    logits, targets, mask, entropies, stats, temperature = ctx.saved_tensors
    if grad_logprobs is None and grad_entropies is None:
        return (None,) * 8
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(grad_entropies)
    arguments = (grad_logprobs, grad_entropies, targets, mask, entropies, stats, temperature, *ctx.options)
    if ctx.inplace and not torch.is_grad_enabled():  # a graph of the backward would hold what is overwritten
        _backward_inplace(logits, *arguments)
        gradient = logits.detach()
    else:
        gradient = _backward(logits, *arguments)
    return gradient, *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "token_logprobs")
