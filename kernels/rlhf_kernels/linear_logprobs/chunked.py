"""The LM head and the log-prob together, a block of rows at a time: [tokens, vocabulary] is never held whole.

The gradient needs softmax(logits) again. Within `keep_bytes` the forward keeps its exponentials (three matrix products
in all: logits, d hidden, d weight); beyond that the backward makes the logits anew (four, memory of one block).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a block. Fewer starve the matrix product, more spill the block's logits from cache.
_BLOCK_ROWS = 128


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
) -> tuple[Tensor, Tensor | None]:
    """log p(target) under softmax(logits / temperature), without the logits.

    Args:
        hidden: (M, H), in the model's dtype. weight: (V, H). targets: (M,) int64. bias: (V,) or None.
        scale, softcap: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap); no tanh where None.
        entropy: also return the distribution's entropy in nats, a gauge without gradient.
        keep_bytes: memory that the forward may keep for the backward instead of computing logits twice.

    Returns:
        (M,) log-probs, float32 (float64 for float64 inputs), with gradients to hidden, weight and bias; and (M,)
        entropies or None.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")
    if not torch.is_grad_enabled():  # a Function is told that its inputs need gradients even where none will be taken
        keep_bytes = 0
    return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, scale, softcap, entropy, keep_bytes)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, scale, softcap, want_entropy, keep_bytes):
        ctx.logit_options = (temperature, scale, softcap)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_grad = any(ctx.needs_input_grad[:3])
        # The derivative of tanh needs the logits themselves, so a softcapped head is always recomputed.
        keep = needs_grad and softcap is None and hidden.shape[0] * weight.shape[0] * dtype.itemsize <= keep_bytes
        logprobs = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs) if want_entropy else None
        peaks, totals, kept = torch.empty_like(logprobs), torch.empty_like(logprobs), []
        for rows in _blocks(hidden.shape[0]):
            logits = _logits(hidden[rows], weight, bias, *ctx.logit_options)
            peaks[rows] = logits.amax(-1)
            shifted = logits.sub_(peaks[rows, None])
            chosen = shifted.gather(-1, targets[rows, None]).squeeze(-1)
            exponentials = shifted.exp() if want_entropy else shifted.exp_()
            totals[rows] = total = exponentials.sum(-1)
            logprobs[rows] = chosen - total.log()
            if want_entropy:  # H = log Z - E[logit]
                entropy[rows] = total.log() - torch.linalg.vecdot(exponentials, shifted) / total
            if keep:
                kept.append(exponentials)
        ctx.keep = keep
        ctx.save_for_backward(hidden, weight, bias, targets, peaks, totals, *kept)
        if want_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _):
        hidden, weight, bias, targets, peaks, totals, *kept = ctx.saved_tensors
        temperature, scale, softcap = ctx.logit_options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over many blocks are accumulated in full precision whatever the model's dtype.
        grad_weight = torch.zeros_like(weight, dtype=totals.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=totals.dtype) if needs_bias else None
        grad_chosen = grad_logprobs * (scale / temperature)
        for block, rows in enumerate(_blocks(hidden.shape[0])):
            grad_others = (-grad_chosen[rows] / totals[rows])[:, None]  # per exponential: p = exponential / total
            if ctx.keep:
                gradient = kept[block].mul(grad_others)
            else:
                logits = _logits(hidden[rows], weight, bias, temperature, scale, softcap)
                capped = logits * (temperature / softcap) if softcap is not None else None  # tanh, its own derivative
                gradient = logits.sub_(peaks[rows, None]).exp_().mul_(grad_others)
            # d log p_y / d logit = 1[y] - p, the true class formed in full precision: 1 - p_y survives p_y near 1.
            gradient.scatter_add_(-1, targets[rows, None], grad_chosen[rows, None])
            if softcap is not None:
                gradient.mul_(capped.square_().neg_().add_(1))
            if needs_bias:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if needs_hidden:
                torch.mm(gradient, weight, out=grad_hidden[rows])
            if needs_weight:
                if grad_weight.dtype == gradient.dtype:
                    grad_weight.addmm_(gradient.T, hidden[rows])
                else:
                    grad_weight += gradient.T @ hidden[rows]
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_hidden, grad_weight, grad_bias, *[None] * 6


def _blocks(num_rows: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK_ROWS, num_rows)) for start in range(0, num_rows, _BLOCK_ROWS)]


def _logits(hidden, weight, bias, temperature, scale, softcap) -> Tensor:
    """(rows, V) float32 or float64, a fresh tensor that the caller may overwrite."""
    logits = hidden @ weight.T
    if logits.dtype != torch.float64:
        logits = logits.float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1.0 else logits.div_(temperature)
