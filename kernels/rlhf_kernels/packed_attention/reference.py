"""The definition in plain torch: one softmax with an N x N mask. Slow and large; the tests compare with it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.packed_attention.layout import Layout, visible_ranges


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Return softmax(scale * query @ key^T, where visible) @ value, (1, heads, N, D) in the query's dtype.

    A scale of None is 1 / sqrt(D). Query heads share a key-value head in equal, adjacent groups.
    """
    heads, num_tokens, size = query.shape[1:]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (x.to(dtype).repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    scores = query.to(dtype) @ key.mT * (size**-0.5 if scale is None else scale)
    token = torch.arange(num_tokens, device=query.device)
    visible = visible_ranges(layout, num_tokens, query.device, sliding_window).visible(token[:, None], token)
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value).to(query.dtype)
