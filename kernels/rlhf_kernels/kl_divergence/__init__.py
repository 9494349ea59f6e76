"""The exact divergence of two distributions over the vocabulary from their logits, and the entropy of the policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.common import (
    as_rows,
    check_kind,
    check_logits,
    host_scalar,
    refuse_second_derivative,
    rowwise,
    rowwise_or_none,
)
from rlhf_kernels.registry import choose, implementation

__all__ = ["kl_divergence"]


def kl_divergence(
    policy_logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: str = "reverse",
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence of the policy p from the reference q, summed over the vocabulary, at each row.

    With p and q the softmax of the logits over the temperature, and m = (p + q) / 2:

        "reverse": KL(p || q) = sum_v p_v log(p_v / q_v)
        "forward": KL(q || p) = sum_v q_v log(q_v / p_v)
        "js": (KL(p || m) + KL(q || m)) / 2

    A logit of -inf excludes a token. A token that both distributions exclude contributes 0. A token that only the
    second distribution of a KL excludes makes it infinite.

    Args:
        policy_logits, ref_logits: (..., V), of any floating dtypes and any strides. Only the policy gets a gradient.
        kind: see above.
        temperature: more than 0.
        entropy: also return the entropy of the policy in nats, with its gradient.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`.

    Returns:
        (...) divergences in nats, float32 (float64 if either logits are), and (...) entropies or None.

    Raises:
        ValueError: for an unknown kind, invalid shapes or dtypes, or a temperature that is not positive.
        RuntimeError: for an `impl` that cannot run here, and for a second derivative.
    """
    check_kind(kind)
    check_logits(policy_logits, name="policy_logits")
    check_logits(ref_logits, name="ref_logits")
    if policy_logits.shape != ref_logits.shape or policy_logits.device != ref_logits.device:
        sides = (f"{tuple(logits.shape)} on {logits.device}" for logits in (policy_logits, ref_logits))
        raise ValueError("policy_logits are {}, ref_logits {}: expected the same".format(*sides))
    impl = choose("kl_divergence", policy_logits.device, impl)
    divergence, entropies, _ = _forward(
        policy_logits, ref_logits, host_scalar(temperature, name="temperature"), kind, entropy, impl
    )
    return divergence, entropies if entropy else None


@torch.library.custom_op("rlhf_kernels::kl_divergence", mutates_args=())
def _forward(
    policy_logits: Tensor, ref_logits: Tensor, temperature: Tensor, kind: str, entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return divergences (...), entropies (...) or (0,), and the statistics of the Triton backward."""
    policy, reference = as_rows(policy_logits, ref_logits)
    divergence, entropies, stats = implementation("kl_divergence", impl).forward(
        policy, reference, temperature.item(), kind, entropy
    )
    shape = policy_logits.shape[:-1]
    return divergence.view(shape), entropies.view(shape) if entropy else entropies, stats


@_forward.register_fake
def _(
    policy_logits: Tensor, ref_logits: Tensor, temperature: Tensor, kind: str, entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = policy_logits.shape[:-1]
    dtype = torch.promote_types(torch.promote_types(policy_logits.dtype, ref_logits.dtype), torch.float32)
    divergence = policy_logits.new_empty(shape, dtype=dtype)
    stats = (5 if kind == "js" else 4, divergence.numel()) if impl == "triton" else (0,)
    return divergence, divergence.new_empty(shape if entropy else (0,)), divergence.new_empty(stats)


@torch.library.custom_op("rlhf_kernels::kl_divergence_backward", mutates_args=())
def _backward(
    policy_logits: Tensor,
    ref_logits: Tensor,
    grad_divergence: Tensor,
    grad_entropies: Tensor | None,
    divergence: Tensor,
    entropies: Tensor,
    stats: Tensor,
    temperature: Tensor,
    kind: str,
    impl: str,
) -> Tensor:
    """Return the gradient of the policy's logits, contiguous."""
    policy, reference = as_rows(policy_logits, ref_logits)
    gradient = policy_logits.new_empty(policy_logits.shape)
    implementation("kl_divergence", impl).backward(
        policy,
        reference,
        gradient.view(policy.shape),
        rowwise(policy, grad_divergence),
        rowwise_or_none(policy, grad_entropies),
        rowwise(policy, divergence),
        rowwise(policy, entropies),
        stats,
        temperature.item(),
        kind,
    )
    return gradient


@_backward.register_fake
def _(policy_logits: Tensor, *others: Any) -> Tensor:
    return policy_logits.new_empty(policy_logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    policy_logits, ref_logits, temperature, ctx.kind, entropy, ctx.impl = inputs
    divergence, entropies, stats = output
    ctx.save_for_backward(policy_logits, ref_logits, divergence, entropies, stats, temperature)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([stats] if entropy else [entropies, stats]))


def _differentiate(
    ctx: Any, grad_divergence: Tensor | None, grad_entropies: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    policy_logits, ref_logits, *saved = ctx.saved_tensors
    if grad_divergence is None:
        if grad_entropies is None:
            return (None,) * 6
        grad_divergence = torch.zeros_like(grad_entropies)
    gradient = _backward(policy_logits, ref_logits, grad_divergence, grad_entropies, *saved, ctx.kind, ctx.impl)
    return gradient, *[None] * 5


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivative(_backward, "kl_divergence")
