"""Attention over a packed stream, registered with transformers under the name `rlhf_packed`.

transformers passes the keyword `layout` of a model's forward on to every attention call, also under activation
checkpointing. With a layout the call is `rlhf_kernels.packed_attention`, on the CPU group by group and on CUDA in one
kernel: no N x N mask, work linear in the number of sequences. Without one (generation, padded batches) it is
transformers' own sdpa attention, so a model is switched only once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf_core.batch import AttentionLayout
from rlhf_core.ops import attention as ops_attention

PACKED = "rlhf_packed"

_MIN_FUSED_HEAD = 16

# Keywords of an attention call that change its result and that packed attention does not implement.
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (1, N, heads, D) of the stream that `layout` describes, or of an ordinary batch.

    Raises:
        NotImplementedError: for a keyword that changes the result and is not implemented.
    """
    if layout is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return plain
    if (windows := _windows.get()) is not None:
        windows.add(sliding_window)
    unknown = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unknown or not kwargs.get("is_causal", True):
        raise NotImplementedError(f"packed attention does not support {', '.join(unknown) or 'is_causal=False'}")
    # What the fused kernel does not support is computed group by group.
    by_group = dropout > 0 or query.dtype == torch.float64 or query.shape[-1] < _MIN_FUSED_HEAD
    output = ops_attention.packed_attention(
        query,
        key,
        value,
        layout,
        scale=scaling,
        sliding_window=sliding_window,
        dropout=dropout,
        impl="torch" if by_group else None,
    )
    return output.transpose(1, 2), None


# Not an argument: transformers passes keywords to attention calls, but not to the functions that build masks.
_windows: ContextVar[set[int | None] | None] = ContextVar("rlhf_core_packed_forward", default=None)


@contextlib.contextmanager
def packed_forward() -> Iterator[set[int | None]]:
    """Run a packed forward inside: transformers builds no mask, where it would build N x N ones from the positions.

    Yields the set of sliding windows that attention calls get meanwhile. If it is empty afterwards, no attention call
    of the model has reached `packed_attention`.
    """
    outer = _windows.get()
    windows: set[int | None] = set() if outer is None else outer
    token = _windows.set(windows)
    try:
        yield windows
    finally:
        _windows.reset(token)


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return transformers' sdpa mask, or None in a packed forward."""
    return sdpa_mask(*args, **kwargs) if _windows.get() is None else None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
