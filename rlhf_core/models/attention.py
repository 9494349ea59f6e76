"""Attention over a packed stream, registered with transformers under the name `rlhf_packed`.

transformers hands the keyword `layout` of a model's forward down to every attention call, activation checkpointing
included. With a layout the stream is walked group by group, each one scaled_dot_product_attention over exactly the keys
it may see: no N x N mask, work linear in the number of sequences. Without one (generation, padded batches) the call is
transformers' own sdpa attention, so a model needs to be switched only once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf_core.batch import AttentionLayout

PACKED = "rlhf_packed"

# Keywords of an attention call that change what attention computes, and that the packed walk does not know.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, key-value heads, N, D)
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: AttentionLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention output (1, N, heads, D) of the stream described by `layout`, or of an ordinary batch without one."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if (windows := _walking.get()) is not None:
        windows.add(sliding_window)
    unknown = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unknown or not kwargs.get("is_causal", True):
        raise NotImplementedError(f"packed attention does not honour {', '.join(unknown) or 'is_causal=False'}")
    options = dict(scale=scaling, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1])
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # (N, heads, D)

    outputs = []
    for group in layout.groups:
        if group.span is not None:
            start, end = group.span
            q, k, v = (x[None, start:end] for x in (query, key, value))
        else:
            q, k, v = _rows(query, group.queries), _rows(key, group.keys), _rows(value, group.keys)
        mask = _group_mask(group.prefix, q.shape[1], sliding_window, q.device)
        output = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=mask is None, **options
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs)
    return (joined if layout.restore is None else joined.index_select(0, layout.restore)).unsqueeze(0), None


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


_walking: ContextVar[set[int | None] | None] = ContextVar("rlhf_core_packed_forward", default=None)


@contextlib.contextmanager
def packed_forward() -> Iterator[set[int | None]]:
    """Around a packed forward: transformers must build no mask, or it would make an N x N one from the positions.

    Yields the sliding windows that attention calls are handed meanwhile; an empty set afterwards means that no call
    came here.
    """
    outer = _walking.get()
    windows = set() if outer is None else outer
    token = _walking.set(windows)
    try:
        yield windows
    finally:
        _walking.reset(token)


def packed_mask(*args, **kwargs) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _walking.get() is None else None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
