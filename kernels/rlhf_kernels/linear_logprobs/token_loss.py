"""Loss and gradient of the head in one pass over its blocks: three matrix products, and nothing kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_kernels.common import real_dtype
from rlhf_kernels.linear_logprobs.blocks import Gradients, HeadOptions, blocks, check_head, check_options
from rlhf_kernels.registry import choose, implementation


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, slice], Tensor],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum over rows of loss_i(log p(target_i)), for losses in which each token stands for itself.

    Such a loss knows its derivative to a log-prob as soon as it has the log-prob. So a block's gradient is made while
    its logits are there: three products (logits, d hidden, d weight), where `linear_logprobs` must either keep
    [tokens, vocab] or take four. SFT is of this kind, loss = -coefficient * logprob; and PPO and GRPO with a ratio for
    each token, their other inputs (old log-probs, advantages, mask) being known. DPO is not: its pairs are sums.

    Args:
        hidden, weight, targets, bias, temperature, scale, softcap, impl: as for `linear_logprobs`. Rows that take no
            part are best left out beforehand.
        loss: maps the log-probs of a block, (r,), and its slice of the rows to the r losses, (r,), or to their sum, ().
            Differentiated to the log-probs alone: whatever else it uses gets no gradient. It is called once for each
            block, in order.

    Returns:
        The sum, a scalar with gradients to hidden, weight and bias, and the (M,) log-probs without gradient; float32
        (float64 for float64 inputs).

    Raises ValueError for shapes and options out of range, or a loss of another shape. The gradients are handed out
    once: a second backward, or a second derivative, is a RuntimeError.

    An autograd.Function and no custom op, since a function cannot be the argument of an op: `torch.compile` breaks its
    graph here.
    """
    check_head(hidden, weight, bias)
    check_options(scale, softcap)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype}: expected ({len(hidden)},) int64"
        )
    impl = choose("linear_token_loss", hidden.device, impl)
    options = HeadOptions(temperature, scale, softcap)
    differentiate = torch.is_grad_enabled()  # inside the Function it no longer shows
    return _LinearTokenLoss.apply(hidden, weight, bias, targets, loss, options, impl, differentiate)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, loss, options, impl, differentiate):
        wanted = tuple(differentiate and needed for needed in ctx.needs_input_grad[:3])
        rows_of = implementation("linear_logprobs", impl)
        logprobs = hidden.new_empty(len(hidden), dtype=real_dtype(hidden.dtype))
        stats, total = logprobs.new_empty(2, len(hidden)), logprobs.new_zeros(())
        targets = targets.contiguous()
        size = rows_of.block_rows(weight)
        buffer = rows_of.new_block(min(len(hidden), size), weight)
        gradients = Gradients(hidden, weight, bias, wanted)
        for rows in blocks(len(hidden), size):
            block = buffer[: rows.stop - rows.start]
            rows_of.project(hidden[rows], weight, out=block)
            rows_of.fold(
                block, bias, targets[rows], options, logprobs[rows], None, stats[:, rows], want_gradient=any(wanted)
            )
            losses, slope = _losses(loss, logprobs[rows], rows, differentiate=any(wanted))
            total += losses.sum()
            if any(wanted):
                gradient = rows_of.gradient(block, bias, targets[rows], options, stats[:, rows], slope, out=block)
                gradients.add(rows, *gradient)
        ctx.gradients = gradients.finish() if any(wanted) else None
        ctx.mark_non_differentiable(logprobs)
        return total, logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_token_loss hands out its gradients once; compute the loss anew for a second time"
            )
        # In place: a second copy of d weight would double the peak. That is why they are handed out once.
        given = (
            x.mul_(grad_total) if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return *given, *[None] * 5


def _losses(
    loss: Callable[[Tensor, slice], Tensor], logprobs: Tensor, rows: slice, *, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """A block's losses, (r,) or their sum, and their derivative to each log-prob; None where not wanted."""
    with torch.set_grad_enabled(differentiate):
        leaf = logprobs.detach().clone().requires_grad_(differentiate)
        losses = loss(leaf, rows)
        if losses.shape not in (leaf.shape, ()):
            raise ValueError(
                f"loss gave shape {tuple(losses.shape)} for {len(leaf)} log-probs: expected ({len(leaf)},) or ()"
            )
        slope = None
        if differentiate:
            # A loss that does not depend on the log-probs at all (a block wholly masked) has a slope of 0.
            slope = torch.zeros_like(leaf)
            if losses.requires_grad:
                (found,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
                slope = slope if found is None else found
    return losses.detach(), slope
