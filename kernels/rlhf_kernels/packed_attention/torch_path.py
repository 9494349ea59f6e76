"""Attention over a packed stream, group by group: each one scaled_dot_product_attention over the keys it may see.

No N x N mask, and work linear in the number of sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.packed_attention.layout import Layout


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """`reference.packed_attention`, and attention dropout."""
    options = dict(scale=scale, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1])
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    outputs = []
    for group in layout.groups:
        if group.span is not None:
            start, end = group.span
            q, k, v = (x[None, start:end] for x in (query, key, value))
        else:
            q, k, v = _rows(query, group.queries), _rows(key, group.keys), _rows(value, group.keys)
        mask = _group_mask(group.prefix, q.shape[1], sliding_window, q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if softcap is None:
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
        else:
            output = _softcapped(q, k, v, mask, scale, softcap, dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs)
    joined = joined if layout.restore is None else joined.index_select(0, layout.restore)
    return joined.transpose(0, 1).unsqueeze(0)


def _rows(stream: Tensor, positions: Tensor) -> Tensor:
    """(N, heads, D) at (G, L) positions -> (G, L, heads, D)."""
    return stream.index_select(0, positions.flatten()).unflatten(0, positions.shape)


def _group_mask(prefix: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(length, prefix + length) bool, or None where plain causality says it all."""
    if window is not None and window >= prefix + length:
        window = None
    if prefix == 0 and window is None:
        return None
    mask = torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)
    return mask if window is None else mask.triu(prefix - window + 1)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float, dropout: float
) -> Tensor:
    """What scaled_dot_product_attention has no option for; the softmax is in float32 (float64 for float64)."""
    if mask is None:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = softcap * torch.tanh(scores * ((query.shape[-1] ** -0.5 if scale is None else scale) / softcap))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return F.dropout(weights, dropout).to(value.dtype) @ value
