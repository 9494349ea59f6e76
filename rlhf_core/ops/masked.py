"""Reductions over the tokens that take part. Every mask is bool, True = takes part; masked places may hold anything."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over True places; 0 where there is none. A masked NaN or infinity does not leak, nor does its gradient."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None, *, all_ranks: bool = False) -> Tensor:
    """Mean over True places; 0 where there is none. With `all_ranks` over those of all ranks (`over_ranks`)."""
    count = mask.sum() if dim is None else mask.sum(dim)
    total = masked_sum(values, mask, dim)
    if all_ranks:
        total, count = over_ranks(total, count)
    return total / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = False, all_ranks: bool = False) -> Tensor:
    """Variance over True places; `unbiased` divides by n - 1. 0 where fewer than two take part. `all_ranks`: as above.

    In two passes: deviations from the mean of all are squared, so values far from 0 keep the digits of their spread.
    """
    # Masked before it is squared: the gradient of a square is 0 * NaN at a masked NaN.
    centred = torch.where(mask, values, 0.0) - masked_mean(values, mask, all_ranks=all_ranks)
    squares, count = masked_sum(centred.square(), mask), mask.sum()
    if all_ranks:
        squares, count = over_ranks(squares, count)
    return squares / (count - int(unbiased)).clamp(min=1)


def masked_whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8, all_ranks: bool = False
) -> Tensor:
    """Scale to variance 1 (biased, as lm-human-preferences does) and, with `shift_mean`, to mean 0; masked places 0.

    `shift_mean=False` keeps the mean as it was before scaling, so only the spread changes. With `all_ranks` mean and
    variance are those of the whole batch that the ranks hold together, and each gets its own part of it, whitened.
    """
    values, mean = torch.where(mask, values, 0.0), masked_mean(values, mask, all_ranks=all_ranks)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask, all_ranks=all_ranks) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def over_ranks(*sums: Tensor) -> list[Tensor]:
    """Each tensor summed over all ranks of torch.distributed, or as it is where there is one process alone.

    Every rank must call it, with tensors of the same shapes. Raises ValueError for a tensor with a gradient, which
    would be this rank's part of it alone.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return list(sums)
    if any(tensor.requires_grad for tensor in sums):
        raise ValueError("all_ranks=True: expected numbers without a gradient")
    summed = [tensor.clone() for tensor in sums]
    for tensor in summed:
        distributed.all_reduce(tensor)
    return summed


def pick(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` where True, else `no`, in the dtype of `like`: torch.where rounds two plain numbers to float32."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def require_tokens(mask: Tensor, normalizer: float | Tensor | None = None, name: str = "mask") -> None:
    """ValueError where nothing takes part and no `normalizer` says that this is one micro-batch of a larger whole.

    Not looked at inside torch.compile, where a question about data would break the graph.
    """
    if normalizer is None and not torch.compiler.is_compiling() and not bool(mask.any()):
        raise ValueError(f"{name} of shape {tuple(mask.shape)} is False everywhere: expected at least one token")


AGGREGATIONS = ("token", "sequence", "sequence_sum", "max_length")


def masked_aggregate(
    values: Tensor,
    mask: Tensor,
    aggregation: str = "token",
    *,
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """One scalar from per-token values: who weighs how much is a choice of its own, apart from what is averaged.

    - "token": every token alike, sum / tokens.
    - "sequence": every sequence alike, whatever its length: the mean of the sequences' means.
    - "sequence_sum": the mean over sequences of their sums, so a longer one weighs more.
    - "max_length": the mean over sequences of sum / max_length, a constant, so no length is favoured.

    Args:
        values: (B, T). mask: (B, T) bool. A row without a token is no sequence: it adds to neither sum nor count.
        normalizer: divide by this instead of the local count of tokens ("token") or sequences (the others). Give the
            count of the whole accumulation window, over all ranks, and eight micro-batches of one add up to one of
            eight.

    Raises ValueError for an unknown aggregation, "max_length" without a length, or a mask that is False everywhere
    while no normalizer is given.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}: expected one of {', '.join(AGGREGATIONS)}")
    if aggregation == "max_length" and (max_length is None or max_length <= 0):
        raise ValueError(f"max_length={max_length}: aggregation 'max_length' expects more than 0")
    require_tokens(mask, normalizer)
    lengths = mask.sum(-1)
    if aggregation == "token":
        return masked_sum(values, mask) / (lengths.sum() if normalizer is None else normalizer)
    per_sequence = masked_sum(values, mask, -1)
    if aggregation == "sequence":
        per_sequence = per_sequence / lengths.clamp(min=1)
    elif aggregation == "max_length":
        per_sequence = per_sequence / max_length
    return per_sequence.sum() / ((lengths > 0).sum() if normalizer is None else normalizer)
