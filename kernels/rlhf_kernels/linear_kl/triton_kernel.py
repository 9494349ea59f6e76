"""The rows of a block of two heads in Triton: the kernels of `kl_divergence`, run on a block of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.kl_divergence.triton_kernel import backward, forward
from rlhf_kernels.linear_logprobs.blocks import HeadOptions
from rlhf_kernels.linear_logprobs.triton_kernel import block_rows, new_block

__all__ = ["block_rows", "fold", "gradients", "new_block", "project"]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias"""
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias.to(out.dtype), hidden, weight.T, out=out)


def fold(
    logits: list[Tensor],
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    entropies: Tensor | None,
    stats: Tensor,
    wanted: tuple[bool, bool],
) -> None:
    """Divergences and entropies of blocks of logits, which stay as they are; (4 or 6, r) statistics into `stats`."""
    policy, reference = (x[None] for x in logits)
    found = forward(policy, reference, None, 1 / options.slope, kind, entropies is not None)
    divergences.copy_(found[0][0])
    if entropies is not None:
        entropies.copy_(found[1][0])
    stats[: len(found[2])] = found[2]


def gradients(
    logits: list[Tensor],
    outs: list[Tensor],
    options: HeadOptions,
    kind: str,
    divergences: Tensor,
    stats: Tensor,
    gradient: Tensor,
    wanted: tuple[bool, bool],
) -> list[tuple[Tensor, None]]:
    """The gradients to both blocks of logits, written into `outs`, which may be the blocks themselves."""
    policy, reference, policy_out, reference_out = (x[None] for x in (*logits, *outs))
    backward(
        policy,
        reference,
        policy_out,
        reference_out if wanted[1] else None,
        gradient.contiguous(),
        None,
        None,
        divergences,
        divergences,  # for entropies, which have no gradient here
        stats[: 6 if kind == "js" else 4].contiguous(),
        1 / options.slope,
        kind,
    )
    return [(out, None) for out in outs]
