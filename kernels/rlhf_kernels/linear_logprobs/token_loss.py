"""Loss and gradient of the LM head in one pass over its blocks: three matrix products, and nothing kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.common import real_dtype
from rlhf_kernels.linear_logprobs.blocks import (
    Gradients,
    HeadOptions,
    blocks,
    check_head,
    check_options,
    check_targets,
)
from rlhf_kernels.registry import choose, implementation

TokenLoss = Callable[[Tensor, slice], Tensor]


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute sum_i loss_i(log p(target_i)) for a loss whose terms depend on one log-prob each.

    The derivative of such a term is known as soon as its log-prob is, so the gradient of a block is computed while its
    logits are in memory: three products (logits, d hidden, d weight), where `linear_logprobs` must either keep
    [tokens, vocabulary] or take four. SFT has such a loss, -coefficient * logprob, and so have PPO and GRPO with a
    ratio per token. DPO has not: its terms depend on sums of log-probs.

    Args:
        hidden, weight, targets, bias, temperature, scale, softcap, impl: as for `linear_logprobs`.
        loss: maps the log-probs of a block, (r,), and the slice of its rows to the r losses, (r,), or to their sum, ().
            It is called once per block, in order, and differentiated with respect to the log-probs only: no other
            tensor that it uses gets a gradient.

    Returns:
        The sum, a scalar with gradients to hidden, weight and bias, and the (M,) log-probs without gradient; float32
        (float64 for float64 inputs).

    Raises:
        ValueError: for invalid shapes and options, or a loss of another shape.
        RuntimeError: for a second backward pass or a second derivative: the gradients are released by the first.

    Under torch.compile this function breaks the graph, because a function cannot be an argument of a custom op.
    """
    check_head(hidden, weight, bias)
    check_options(scale, softcap)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    check_targets(targets, hidden)
    impl = choose("linear_token_loss", hidden.device, impl)
    options = HeadOptions(temperature, scale, softcap)
    differentiate = torch.is_grad_enabled()  # always off inside the Function
    total, logprobs = _LinearTokenLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, loss, options, impl, differentiate
    )
    return total, logprobs


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss: TokenLoss,
        options: HeadOptions,
        impl: str,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = tuple(differentiate and needed for needed in ctx.needs_input_grad[:3])
        rows_of = implementation("linear_logprobs", impl)
        logprobs = hidden.new_empty(len(hidden), dtype=real_dtype(hidden.dtype))
        stats, total = logprobs.new_empty(2, len(hidden)), logprobs.new_zeros(())
        targets = targets.contiguous()
        size = rows_of.block_rows(weight)
        buffer = rows_of.new_block(min(len(hidden), size), weight)
        gradients = Gradients(hidden, weight, bias, (wanted[0], wanted[1], wanted[2]))
        for rows in blocks(len(hidden), size):
            block = buffer[: rows.stop - rows.start]
            rows_of.project(hidden[rows], weight, out=block)
            rows_of.fold(
                block, bias, targets[rows], options, logprobs[rows], None, stats[:, rows], want_gradient=any(wanted)
            )
            losses, derivative = _losses(loss, logprobs[rows], rows, differentiate=any(wanted))
            total += losses.sum()
            if any(wanted):
                gradient = rows_of.gradient(block, bias, targets[rows], options, stats[:, rows], derivative, out=block)
                gradients.add(rows, *gradient)
        ctx.gradients = gradients.finish() if any(wanted) else None
        ctx.mark_non_differentiable(logprobs)
        return total, logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_token_loss has one backward pass: compute the loss again for a second one")
        # In place: a second copy of d weight would double the peak. So the gradients are released once.
        scaled = (
            x.mul_(grad_total) if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return *scaled, *[None] * 5


def _losses(loss: TokenLoss, logprobs: Tensor, rows: slice, *, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """Return a block's losses, (r,) or their sum, and their derivative with respect to each log-prob, if wanted."""
    with torch.set_grad_enabled(differentiate):
        leaf = logprobs.detach().clone().requires_grad_(differentiate)
        losses = loss(leaf, rows)
        if losses.shape not in (leaf.shape, ()):
            raise ValueError(
                f"loss gave shape {tuple(losses.shape)} for {len(leaf)} log-probs: expected ({len(leaf)},) or ()"
            )
        derivative = None
        if differentiate:
            # A loss that does not depend on the log-probs at all (a fully masked block) has a derivative of 0.
            derivative = torch.zeros_like(leaf)
            if losses.requires_grad:
                (found,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
                derivative = derivative if found is None else found
    return losses.detach(), derivative
