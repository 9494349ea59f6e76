"""Reductions over the True positions of a bool mask; values at False positions are ignored, NaN included."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def masked_sum(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum over True positions; 0 where there is none. Masked NaNs and infinities affect neither value nor gradient."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None, *, all_ranks: bool = False) -> Tensor:
    """Mean over True positions; 0 where there is none. `all_ranks`: over the positions of all ranks (`over_ranks`)."""
    count = mask.sum() if dim is None else mask.sum(dim)
    total = masked_sum(values, mask, dim)
    if all_ranks:
        total, count = over_ranks(total, count)
    return total / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = False, all_ranks: bool = False) -> Tensor:
    """Variance over True positions; 0 for fewer than two. `unbiased` divides by n - 1. `all_ranks`: over all ranks.

    Computed in two passes, so that no digits are lost for values far from 0.
    """
    # Masked before the square, whose gradient at a masked NaN would be 0 * NaN.
    centred = torch.where(mask, values, 0.0) - masked_mean(values, mask, all_ranks=all_ranks)
    squares, count = masked_sum(centred.square(), mask), mask.sum()
    if all_ranks:
        squares, count = over_ranks(squares, count)
    return squares / (count - int(unbiased)).clamp(min=1)


def masked_whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8, all_ranks: bool = False
) -> Tensor:
    """Scale to variance 1 (biased, as in lm-human-preferences) and, with `shift_mean`, to mean 0.

    Args:
        values: any shape. mask: bool, the shape of values.
        shift_mean: False restores the mean from before the scaling.
        eps: added to the variance.
        all_ranks: use mean and variance over all ranks; each rank gets its own part, whitened.

    Returns:
        the shape of values, 0 where the mask is False.
    """
    values, mean = torch.where(mask, values, 0.0), masked_mean(values, mask, all_ranks=all_ranks)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask, all_ranks=all_ranks) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def over_ranks(*sums: Tensor) -> list[Tensor]:
    """Sum each tensor over all ranks of torch.distributed; with a single process return the tensors unchanged.

    Every rank must call it, with tensors of the same shapes. Raises ValueError for a tensor that requires a gradient,
    since the gradient would cover this rank only.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return list(sums)
    if any(tensor.requires_grad for tensor in sums):
        raise ValueError("all_ranks=True: expected tensors without a gradient")
    summed = [tensor.clone() for tensor in sums]
    for tensor in summed:
        distributed.all_reduce(tensor)
    return summed


def pick(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Return `yes` where True, else `no`, in the dtype of `like`: torch.where takes Python numbers as float32."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def require_tokens(mask: Tensor, normalizer: float | Tensor | None = None, name: str = "mask") -> None:
    """Raise ValueError for a mask that is False everywhere, unless a `normalizer` is given: a micro-batch may be empty.

    Not checked inside torch.compile, where a data-dependent branch would break the graph.
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
    """Aggregate per-token values to a scalar.

    - "token": sum / number of tokens.
    - "sequence": mean over sequences of each sequence's mean.
    - "sequence_sum": mean over sequences of each sequence's sum, so longer ones have more weight.
    - "max_length": mean over sequences of sum / max_length, a constant, so that the weight of a token does not depend
      on the length of its sequence.

    Args:
        values: (B, T). mask: (B, T) bool. A row without tokens adds to neither sum nor count.
        normalizer: divide by this instead of the local count of tokens ("token") or sequences (the others). With the
            count of the whole accumulation window, over all ranks, eight micro-batches of one row equal one of eight.
        max_length: tokens, more than 0; needed for "max_length".

    Returns:
        a scalar.

    Raises ValueError for an unknown aggregation, "max_length" without a length, or a mask that is False everywhere
    while no normalizer is given.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}: expected one of {', '.join(AGGREGATIONS)}")
    if aggregation == "max_length" and (max_length is None or max_length <= 0):
        raise ValueError(f"max_length={max_length}: expected more than 0 for aggregation 'max_length'")
    require_tokens(mask, normalizer)
    lengths = mask.sum(-1)
    if aggregation == "token":
        return masked_sum(values, mask) / (lengths.sum() if normalizer is None else normalizer)
    per_sequence = masked_sum(values, mask, -1)
    if aggregation == "sequence":
        per_sequence = per_sequence / lengths.clamp(min=1)
    elif aggregation == "max_length" and max_length is not None:
        per_sequence = per_sequence / max_length
    return per_sequence.sum() / ((lengths > 0).sum() if normalizer is None else normalizer)
