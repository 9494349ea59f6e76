"""The exact divergence between two LM heads, a block of rows at a time: [tokens, vocabulary] is never held whole.

Forward and backward take four matrix products (both heads' logits, d hidden, d weight) where the gradients fit into
`keep_bytes`; beyond that the backward makes both heads' logits anew: six, in the memory of two blocks.
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
from rlhf_kernels.registry import choose, implementation

__all__ = ["linear_kl"]

KINDS = ("reverse", "forward", "js")


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
    both_gradients: bool = False,
    keep_bytes: int = 1 << 29,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The divergence between the distributions of two heads at each row, summed exactly over the vocabulary.

    With p and q the softmax of policy and reference logits over the temperature, and m = (p + q) / 2:

        "reverse": sum of p log(p / q)    "forward": sum of q log(q / p)
        "js": (sum of p log(p / m) + sum of q log(q / m)) / 2

    where 0 log 0 = 0. What only the second distribution of a KL rules out makes it infinite, as it is.

    Args:
        policy_hidden: (M, Hp). policy_weight: (V, Hp). ref_hidden: (M, Hr). ref_weight: (V, Hr). The widths may differ;
            the rows and the vocabulary are common. policy_bias, ref_bias: (V,) or None.
        scale, softcap: of both heads, as for `linear_logprobs`.
        entropy: also return the policy's entropy in nats, a gauge without gradient.
        both_gradients: the reference's inputs get gradients too; otherwise they are constants.
        keep_bytes: memory that the forward may keep for the backward instead of computing all logits twice.
        mask: (M,) bool, the rows that count; the others take part in no product and give 0. Finding them waits for
            the device on CUDA: who knows the rows passes them alone.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`. Triton takes neither a softcap nor a scale
            that is not above 0: "auto" then runs the torch path on CUDA too.

    Returns:
        (M,) divergences, float32 (float64 for float64 inputs), and (M,) entropies or None.

    Raises ValueError for shapes, dtypes and options out of range; RuntimeError for an impl that cannot run here, and
    for a second derivative.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    check_head(policy_hidden, policy_weight, policy_bias, prefix="policy_")
    check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    check_options(scale, softcap)
    if len(ref_hidden) != len(policy_hidden) or len(ref_weight) != len(policy_weight):
        raise ValueError(
            f"reference of {len(ref_hidden)} rows and {len(ref_weight)} tokens, policy of {len(policy_hidden)} and "
            f"{len(policy_weight)}: expected the same"
        )
    if mask is not None and (mask.shape != policy_hidden.shape[:1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} and {mask.dtype}: expected ({len(policy_hidden)},) of bool"
        )
    beyond_triton = softcap is not None or not scale > 0
    if impl == "triton" and beyond_triton:
        raise RuntimeError(f"linear_kl: impl='triton' takes no softcap={softcap} and no scale={scale}; torch does")
    impl = choose("linear_kl", policy_hidden.device, "torch" if beyond_triton else impl)
    if not both_gradients:
        ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
        ref_bias = None if ref_bias is None else ref_bias.detach()
    heads = (policy_hidden, policy_weight, policy_bias), (ref_hidden, ref_weight, ref_bias)
    wanted = [torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head) for head in heads]
    # The torch path keeps the gradients that are wanted, the Triton path both logits in the model's dtype.
    if impl == "triton":
        keeps, itemsize = [any(wanted)] * 2, policy_hidden.dtype.itemsize
    else:
        keeps, itemsize = wanted, real_dtype(policy_hidden.dtype).itemsize
    if sum(keeps) * policy_hidden.shape[0] * policy_weight.shape[0] * itemsize > keep_bytes:
        keeps = [False, False]
    divergences, entropies, *_ = _forward(
        *heads[0],
        *heads[1],
        mask,
        kind,
        host_scalar(temperature, name="temperature"),
        scale,
        softcap,
        entropy,
        keeps,
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
    mask: Tensor | None,
    kind: str,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    entropy: bool,
    keeps: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Divergences (M,), entropies (M,) or (0,); for the backward statistics (6, M) and each head's block, (M or 0, V).

    Of the last three only the first rows are filled where a mask leaves fewer: their shapes must not depend on it.
    """
    options, num_rows = HeadOptions(temperature.item(), scale, softcap), len(policy_hidden)
    rows_of = implementation("linear_kl", impl)
    index, hiddens = live_rows(mask, policy_hidden, ref_hidden)
    weights, biases = (policy_weight, ref_weight), (policy_bias, ref_bias)
    divergences = policy_hidden.new_empty(len(hiddens[0]), dtype=real_dtype(policy_hidden.dtype))
    entropies = torch.empty_like(divergences) if entropy else None
    stats = divergences.new_empty(6, num_rows)
    size = max(1, min(rows_of.block_rows(policy_weight), len(hiddens[0])))
    kept = [rows_of.new_block(num_rows if keep else 0, weight) for keep, weight in zip(keeps, weights, strict=True)]
    buffers = [rows_of.new_block(0 if keep else size, weight) for keep, weight in zip(keeps, weights, strict=True)]
    for rows in blocks(len(hiddens[0]), size):
        logits = [kept[side][rows] if keeps[side] else buffers[side][: rows.stop - rows.start] for side in (0, 1)]
        for side in (0, 1):
            rows_of.project(hiddens[side][rows], weights[side], biases[side], out=logits[side])
        part = entropies[rows] if entropy else None
        rows_of.fold(logits, options, kind, divergences[rows], part, stats[:, rows], tuple(keeps))
    entropies = all_rows(index, entropies, num_rows) if entropy else divergences.new_empty(0)
    return all_rows(index, divergences, num_rows), entropies, stats, *kept


@_forward.register_fake
def _(policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, mask, kind, temperature, *options):
    _, _, entropy, keeps, impl = options
    real, num_rows, vocabulary = real_dtype(policy_hidden.dtype), policy_hidden.shape[0], policy_weight.shape[0]
    per_row = policy_hidden.new_empty(num_rows, dtype=real)
    kept_dtype = policy_hidden.dtype if impl == "triton" else real
    return (
        per_row,
        per_row.new_empty(num_rows if entropy else 0),
        per_row.new_empty(6, num_rows),
        *(per_row.new_empty(num_rows if keep else 0, vocabulary, dtype=kept_dtype) for keep in keeps),
    )


@torch.library.custom_op("rlhf_kernels::linear_kl_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    divergences: Tensor,
    stats: Tensor,
    kept_policy: Tensor,
    kept_reference: Tensor,
    temperature: Tensor,
    kind: str,
    scale: float,
    softcap: float | None,
    wanted: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients to both hiddens, weights and biases, in the order of the arguments; (0,) for those not wanted."""
    options, num_rows = HeadOptions(temperature.item(), scale, softcap), len(policy_hidden)
    rows_of = implementation("linear_kl", impl)
    index, (policy_hidden, ref_hidden, gradient, divergences) = live_rows(
        mask, policy_hidden, ref_hidden, gradient, divergences
    )
    heads = (policy_hidden, policy_weight, policy_bias), (ref_hidden, ref_weight, ref_bias)
    wanted_parts = tuple(wanted[:3]), tuple(wanted[3:])
    gradients = [Gradients(*head, parts) for head, parts in zip(heads, wanted_parts, strict=True)]
    wanted_sides = tuple(any(parts) for parts in wanted_parts)
    kept = (kept_policy, kept_reference)
    keep = all(len(kept[side]) == num_rows for side in (0, 1) if wanted_sides[side])
    fold_again = impl == "torch" and not keep  # the kernels need statistics alone, the tiles are worked on in place
    if fold_again:
        divergences, stats = torch.empty_like(divergences), torch.empty_like(stats)
    size = max(1, min(rows_of.block_rows(policy_weight), len(gradient)))
    # What was kept is not written to: a second backward finds it unharmed.
    buffers = [rows_of.new_block(0 if keep and impl == "torch" else size, head[1]) for head in heads]
    for rows in blocks(len(gradient), size):
        outs = [buffer[: rows.stop - rows.start] for buffer in buffers]
        logits = [x[rows] for x in kept] if keep else outs
        if not keep:
            for (hidden, weight, bias), block in zip(heads, logits, strict=True):
                rows_of.project(hidden[rows], weight, bias, out=block)
        if fold_again:
            rows_of.fold(logits, options, kind, divergences[rows], None, stats[:, rows], wanted_sides)
        found = rows_of.gradients(
            logits, outs, options, kind, divergences[rows], stats[:, rows], gradient[rows], wanted_sides
        )
        for side in (0, 1):
            if wanted_sides[side]:
                gradients[side].add(rows, *found[side])
    results = []
    for side in (0, 1):
        grad_hidden, grad_weight, grad_bias = gradients[side].finish()
        if wanted_parts[side][0]:
            grad_hidden = all_rows(index, grad_hidden, num_rows)
        results += [grad_hidden, grad_weight, grad_bias]
    return tuple(results)


@_backward.register_fake
def _(gradient, policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, *others):
    inputs = (policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias)
    return tuple(
        policy_weight.new_empty(0) if x is None or not want else x.new_empty(x.shape)
        for x, want in zip(inputs, others[-2], strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, kind, temperature, scale, softcap, _, _, impl = inputs
    divergences, entropies, stats, *kept = output
    ctx.save_for_backward(*tensors, divergences, stats, *kept, temperature)
    ctx.options, ctx.impl = (kind, scale, softcap), impl
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(entropies, stats, *kept)


def _differentiate(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 14
    wanted = list(ctx.needs_input_grad[:6])
    gradients = _backward(gradient, *ctx.saved_tensors, *ctx.options, wanted, ctx.impl)
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "linear_kl")
