"""Reductions over the tokens that take part. Every mask is bool, True = takes part; masked places may hold anything."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over True places; 0 where there is none. A masked NaN or infinity does not leak, nor does its gradient."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over True places; 0 where there is none."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance over True places; `unbiased` divides by n - 1. 0 where fewer than two take part."""
    # Masked before it is squared: the gradient of a square is 0 * NaN at a masked NaN.
    centred = torch.where(mask, values, 0.0) - masked_mean(values, mask)
    count = mask.sum() - int(unbiased)
    return masked_sum(centred.square(), mask) / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to variance 1 (biased, as lm-human-preferences does) and, with `shift_mean`, to mean 0; masked places 0.

    `shift_mean=False` keeps the mean as it was before scaling, so only the spread changes.
    """
    values, mean = torch.where(mask, values, 0.0), masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)
