"""The exact divergence of two distributions over the vocabulary, from their logits, with the policy's entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.common import as_rows, check_logits, check_rows, host_scalar, refuse_second_derivative, rowwise
from rlhf_kernels.registry import choose, implementation

__all__ = ["kl_divergence"]

KINDS = ("reverse", "forward", "js")


def kl_divergence(
    policy_logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: str = "reverse",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    both_gradients: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The divergence of the policy p from the reference q, summed over the vocabulary, at each row.

    With p and q the softmax of either's logits over the temperature, and m = (p + q) / 2:

        "reverse": KL(p || q) = sum over v of p_v log(p_v / q_v)
        "forward": KL(q || p) = sum over v of q_v log(q_v / p_v)
        "js": (KL(p || m) + KL(q || m)) / 2

    A logit of -inf is a token that cannot be sampled; where both forbid it, it costs nothing. One that only the second
    distribution of a KL forbids makes it infinite, as it is.

    Args:
        policy_logits, ref_logits: (..., V), of any floating dtypes and any strides.
        mask: (...) bool, the rows that count. The others are not read, whatever they hold, and give 0.
        entropy: also return the policy's entropy in nats, with its gradient.
        both_gradients: the reference's logits get their gradient too. Otherwise they get none, wanted or not.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`.

    Returns:
        (...) divergences in nats, float32 (float64 if either's logits are), and (...) entropies or None.

    Raises ValueError for an unknown kind, shapes, dtypes and a temperature that is not positive; RuntimeError for an
    impl that cannot run here, and for a second derivative.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    check_logits(policy_logits, name="policy_logits")
    check_logits(ref_logits, name="ref_logits")
    if policy_logits.shape != ref_logits.shape or policy_logits.device != ref_logits.device:
        sides = (f"{tuple(logits.shape)} on {logits.device}" for logits in (policy_logits, ref_logits))
        raise ValueError("policy_logits are {}, ref_logits {}: expected the same".format(*sides))
    if mask is not None:
        check_rows(mask, policy_logits, torch.bool, name="mask")
    impl = choose("kl_divergence", policy_logits.device, impl)
    temperature = host_scalar(temperature, name="temperature")
    divergence, entropies, _ = _forward(
        policy_logits, ref_logits, mask, temperature, kind, entropy, both_gradients, impl
    )
    return divergence, entropies if entropy else None


@torch.library.custom_op("rlhf_kernels::kl_divergence", mutates_args=())
def _forward(
    policy_logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    kind: str,
    entropy: bool,
    both_gradients: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences (...), entropies (...) or (0,), and statistics that Triton's backward wants."""
    policy, reference = as_rows(policy_logits, ref_logits)
    (mask,) = rowwise(policy, mask)
    divergence, entropies, stats = implementation("kl_divergence", impl).forward(
        policy, reference, mask, temperature.item(), kind, entropy
    )
    shape = policy_logits.shape[:-1]
    return divergence.view(shape), entropies.view(shape) if entropy else entropies, stats


@_forward.register_fake
def _(policy_logits, ref_logits, mask, temperature, kind, entropy, both_gradients, impl):
    shape = policy_logits.shape[:-1]
    dtype = torch.promote_types(torch.promote_types(policy_logits.dtype, ref_logits.dtype), torch.float32)
    divergence = policy_logits.new_empty(shape, dtype=dtype)
    stats = (6 if kind == "js" else 4, divergence.numel()) if impl == "triton" else (0,)
    return divergence, divergence.new_empty(shape if entropy else (0,)), divergence.new_empty(stats)


@torch.library.custom_op("rlhf_kernels::kl_divergence_backward", mutates_args=())
def _backward(
    policy_logits: Tensor,
    ref_logits: Tensor,
    grad_divergence: Tensor,
    grad_entropies: Tensor | None,
    mask: Tensor | None,
    divergence: Tensor,
    entropies: Tensor,
    stats: Tensor,
    temperature: Tensor,
    kind: str,
    both_gradients: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The gradients to the policy's logits, contiguous, and to the reference's, (0,) where they are not wanted."""
    policy, reference = as_rows(policy_logits, ref_logits)
    to_policy = policy_logits.new_empty(policy_logits.shape)
    to_reference = ref_logits.new_empty(ref_logits.shape if both_gradients else 0)
    outputs = (to_policy.view(policy.shape), to_reference.view(policy.shape) if both_gradients else None)
    per_row = rowwise(policy, grad_divergence, grad_entropies, mask, divergence, entropies)
    implementation("kl_divergence", impl).backward(
        policy, reference, *outputs, *per_row, stats, temperature.item(), kind
    )
    return to_policy, to_reference


@_backward.register_fake
def _(policy_logits, ref_logits, *others):
    *_, both_gradients, _ = others
    return policy_logits.new_empty(policy_logits.shape), ref_logits.new_empty(
        ref_logits.shape if both_gradients else (0,)
    )


def _setup_context(ctx, inputs, output):
    policy_logits, ref_logits, mask, temperature, kind, entropy, both_gradients, impl = inputs
    divergence, entropies, stats = output
    ctx.save_for_backward(policy_logits, ref_logits, mask, divergence, entropies, stats, temperature)
    ctx.options = (kind, both_gradients and ctx.needs_input_grad[1], impl)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([stats] if entropy else [entropies, stats]))


def _differentiate(ctx, grad_divergence, grad_entropies, _):
    policy_logits, ref_logits, *saved = ctx.saved_tensors
    if grad_divergence is None and grad_entropies is None:
        return (None,) * 8
    if grad_divergence is None:
        grad_divergence = torch.zeros_like(grad_entropies)
    to_policy, to_reference = _backward(
        policy_logits, ref_logits, grad_divergence, grad_entropies, *saved, *ctx.options
    )
    return to_policy, to_reference if ctx.options[1] else None, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "kl_divergence")
