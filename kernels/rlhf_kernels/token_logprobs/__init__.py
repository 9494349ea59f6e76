"""Log-probs of given tokens, and entropies, from existing logits: one read forward, one read and one write backward."""

from __future__ import annotations

from typing import Any

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
    rowwise_or_none,
)
from rlhf_kernels.registry import choose, implementation

__all__ = ["token_logprobs"]


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute log p(target) under softmax(logits / temperature).

    Args:
        logits: (..., V), of any floating dtype and any strides; -inf excludes a token.
        targets: (...) int64, each at least 0 and below V. On CUDA an invalid target gives NaN: raising an error would
            need a device synchronization.
        temperature: more than 0.
        mask: (...) bool, the rows to compute. The others are not read and give 0.
        entropy: also return the entropy of the distribution in nats, with its gradient.
        inplace_backward: write the gradient over the logits, which saves a tensor of their size. The logits must not be
            read after the backward pass. Autograd raises an error if it saved them for another operation, or for a
            second backward pass; other reads cannot be detected. No effect under torch.compile, where the compiler
            decides which memory is reused.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`.

    Returns:
        (...) log-probs, float32 (float64 for float64 logits), and (...) entropies or None.

    Raises:
        ValueError: for invalid shapes, dtypes or temperature, and for `inplace_backward` on logits that cannot be
            overwritten.
        RuntimeError: for an `impl` that cannot run here, and for a second derivative.
    """
    check_logits(logits)
    check_rows(targets, logits, torch.int64, name="targets")
    if mask is not None:
        check_rows(mask, logits, torch.bool, name="mask")
    inplace = inplace_backward and logits.requires_grad and not torch.compiler.is_compiling()
    if inplace:
        _check_overwritable(logits)
    impl = choose("token_logprobs", logits.device, impl)
    logprobs, entropies, _ = _forward(
        logits, targets, mask, host_scalar(temperature, name="temperature"), entropy, inplace, impl
    )
    return logprobs, entropies if entropy else None


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf:  # its .grad would be the leaf itself
        raise ValueError("inplace_backward=True, but the logits are a leaf: expected the result of an operation")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(f"inplace_backward=True, but logits of stride {logits.stride()} share their memory (expanded)")


@torch.library.custom_op("rlhf_kernels::token_logprobs", mutates_args=())
def _forward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: bool,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs (...), entropies (...) or (0,), and the statistics (2, ...) of the Triton backward."""
    (rows,) = as_rows(logits)
    logprobs, entropies, stats = implementation("token_logprobs", impl).forward(
        rows, rowwise(rows, targets), rowwise_or_none(rows, mask), temperature.item(), entropy
    )
    shape = logits.shape[:-1]
    return logprobs.view(shape), entropies.view(shape) if entropy else entropies, stats


@_forward.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: bool,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
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
    impl: str,
) -> Tensor:
    """Return the gradient of the logits, contiguous."""
    (rows,) = as_rows(logits)
    gradient = logits.new_empty(logits.shape)
    implementation("token_logprobs", impl).backward(
        rows,
        gradient.view(rows.shape),
        rowwise(rows, grad_logprobs),
        rowwise_or_none(rows, grad_entropies),
        rowwise(rows, targets),
        rowwise_or_none(rows, mask),
        rowwise(rows, entropies),
        stats,
        temperature.item(),
    )
    return gradient


@_backward.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
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
    impl: str,
) -> None:
    """Write the gradient of the logits over the logits."""
    (rows,) = as_rows(logits)
    implementation("token_logprobs", impl).backward(
        rows,
        rows,
        rowwise(rows, grad_logprobs),
        rowwise_or_none(rows, grad_entropies),
        rowwise(rows, targets),
        rowwise_or_none(rows, mask),
        rowwise(rows, entropies),
        stats,
        temperature.item(),
    )
    if rows.data_ptr() != logits.data_ptr():  # `as_rows` had to copy
        logits.copy_(rows.view(logits.shape))


@_backward_inplace.register_fake
def _(logits: Tensor, *others: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, mask, temperature, entropy, ctx.inplace, ctx.impl = inputs
    _, entropies, stats = output
    ctx.save_for_backward(logits, targets, mask, entropies, stats, temperature)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([stats] if entropy else [entropies, stats]))


def _differentiate(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    logits, targets, mask, entropies, stats, temperature = ctx.saved_tensors
    if grad_logprobs is None:
        if grad_entropies is None:
            return (None,) * 7
        grad_logprobs = torch.zeros_like(grad_entropies)
    arguments = (grad_logprobs, grad_entropies, targets, mask, entropies, stats, temperature, ctx.impl)
    if ctx.inplace and not torch.is_grad_enabled():  # a graph of the backward would save what is overwritten
        _backward_inplace(logits, *arguments)
        gradient = logits.detach()
    else:
        gradient = _backward(logits, *arguments)
    return gradient, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "token_logprobs")
