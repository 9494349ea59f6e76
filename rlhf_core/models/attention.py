"""Attention over a packed stream, registered with transformers under the name `rlhf_packed`.

transformers hands the keyword `layout` of a model's forward down to every attention call, activation checkpointing
included. With a layout the stream is attended by `rlhf_kernels.packed_attention`, on the CPU group by group and on CUDA
in one kernel: no N x N mask, work linear in the number of sequences. Without one (generation, padded batches) the call
is transformers' own sdpa attention, so a model needs to be switched only once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf_core.batch import AttentionLayout
from rlhf_core.ops import attention as ops_attention

PACKED = "rlhf_packed"

_MIN_FUSED_HEAD = 16

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
    # What the fused kernel does not take, the walk over the layout's groups does.
    walk = dropout > 0 or query.dtype == torch.float64 or query.shape[-1] < _MIN_FUSED_HEAD
    output = ops_attention.packed_attention(
        query,
        key,
        value,
        layout,
        scale=scaling,
        sliding_window=sliding_window,
        dropout=dropout,
        impl="torch" if walk else None,
    )
    return output.transpose(1, 2), None


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
