"""Attention over a packed stream, group by group: each one scaled_dot_product_attention over the keys it may see.

No N x N mask, and work linear in the number of sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.packed_attention.layout import Layout, group_positions


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None,
    sliding_window: int | None,
    dropout: float,
) -> Tensor:
    """Compute `reference.packed_attention`, with dropout of the attention weights."""
    shared_heads = query.shape[1] != key.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    outputs = []
    for group in layout.groups:
        if group.span is not None:
            start, end = group.span
            q, k, v = (x[None, start:end] for x in (query, key, value))
        else:
            queries, keys = group_positions(group)
            q, k, v = _rows(query, queries), _rows(key, keys), _rows(value, keys)
        mask = _group_mask(group.prefix, q.shape[1], sliding_window, q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=shared_heads
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs)
    joined = joined if layout.restore is None else joined.index_select(0, layout.restore)
    return joined.transpose(0, 1).unsqueeze(0)


def _rows(stream: Tensor, positions: Tensor) -> Tensor:
    """Return (G, L, heads, D) of an (N, heads, D) stream at (G, L) positions."""
    return stream.index_select(0, positions.flatten()).view(*positions.shape, *stream.shape[1:])


def _group_mask(prefix: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return a (length, prefix + length) bool mask, or None where it is the causal one."""
    if window is not None and window >= prefix + length:
        window = None
    if prefix == 0 and window is None:
        return None
    mask = torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)
    return mask if window is None else mask.triu(prefix - window + 1)
