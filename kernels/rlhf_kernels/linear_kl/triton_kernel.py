"""The Triton implementation of a block of rows of two heads: the kernels of `kl_divergence` on a block of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.kl_divergence.triton_kernel import backward, forward
from rlhf_kernels.linear_logprobs.blocks import HeadOptions
from rlhf_kernels.linear_logprobs.triton_kernel import block_rows, new_block

__all__ = ["block_rows", "fold", "gradient", "new_block", "project"]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute out = hidden @ weight.T + bias."""
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias.to(out.dtype), hidden, weight.T, out=out)


def fold(
    policy: Tensor,
    reference: Tensor,
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    entropies: Tensor | None,
    stats: Tensor,
    *,
    want_gradient: bool,
) -> None:
    """Compute divergences and entropies of blocks of logits, which are not changed, and (4 or 5, r) statistics."""
    found = forward(policy[None], reference[None], 1 / options.slope, kind, entropies is not None)
    divergences.copy_(found[0][0])
    if entropies is not None:
        entropies.copy_(found[1][0])
    stats[: len(found[2])] = found[2]


def gradient(
    policy: Tensor,
    reference: Tensor,
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    stats: Tensor,
    grad_divergences: Tensor,
    out: Tensor,
) -> tuple[Tensor, None]:
    """Write the gradient of the policy's logits into `out`, which may be its block of logits itself."""
    backward(
        policy[None],
        reference[None],
        out[None],
        grad_divergences.contiguous(),
        None,
        divergences,
        divergences,  # in place of the entropies, which have no gradient here
        stats[: 5 if kind == "js" else 4].contiguous(),
        1 / options.slope,
        kind,
    )
    return out, None
