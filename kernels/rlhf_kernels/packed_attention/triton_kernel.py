"""Attention over a packed stream in one fused kernel, which torch's flex_attention writes in Triton.

A token attends to two ranges of the stream, which are three integers per token. The mask of single entries and, once
per batch, the table of blocks that the kernel visits are computed from them, without N x N entries. A sliding window
makes the ranges shorter. Neither a window nor a new length compiles the kernel again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rlhf_kernels.packed_attention.layout import Layout, Ranges, visible_ranges

BLOCK = 128
_MIN_HEAD = 16  # the smallest head size of the kernel
_CHUNK = 1 << 24  # entries of a temporary while blocks are counted


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
    """Compute `reference.packed_attention`. On the CPU only its forward, and not fused."""
    _check(query, key, value, dropout)
    if not query.is_cuda and not torch.is_grad_enabled():  # torch checks requires_grad only
        query, key, value = query.detach(), key.detach(), value.detach()
    num_tokens = query.shape[2]
    attend = _compiled(query.device.type, query.shape[1], key.shape[1], query.shape[3], query.dtype, scale)
    return attend(query, key, value, block_mask_of(layout, num_tokens, query.device, sliding_window))


def _check(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    if dropout:
        raise RuntimeError(f"dropout={dropout}: impl='triton' of packed_attention expects 0; impl='torch' supports any")
    if query.is_cuda and (query.dtype == torch.float64 or query.shape[-1] < _MIN_HEAD):
        raise RuntimeError(
            f"heads of {query.shape[-1]} {query.dtype}: impl='triton' of packed_attention expects {_MIN_HEAD} or more, "
            "float32 or a half type; impl='torch' supports any"
        )
    if not query.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise RuntimeError("impl='triton' of packed_attention has no backward on the CPU; use impl='torch'")


def block_mask_of(layout: Layout, num_tokens: int, device: torch.device, sliding_window: int | None) -> BlockMask:
    """Return the layout's block mask, cached with it: the layers of a model use the same one or two."""
    kept = vars(layout).setdefault("_packed_attention_masks", {})
    name = (num_tokens, device, sliding_window)
    if name not in kept:
        kept[name] = make_block_mask(visible_ranges(layout, num_tokens, device, sliding_window))
    return kept[name]


def make_block_mask(ranges: Ranges) -> BlockMask:
    """Return the same as `create_block_mask` for `ranges.visible`, without computing every entry.

    The number of keys of a block that a query attends to is the length of two overlaps. Its sum over the queries of a
    block tells whether the block is empty, full or mixed. At most N * N / BLOCK numbers, in chunks, and no device
    synchronization.
    """
    num_tokens, device = len(ranges.own_start), ranges.own_start.device
    blocks = -(-num_tokens // BLOCK)
    edges = torch.arange(0, blocks * BLOCK, BLOCK, dtype=torch.int32, device=device)
    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    own_start, own_end, prefix_start, prefix_end = (
        torch.nn.functional.pad(x, (0, blocks * BLOCK - num_tokens)).view(blocks, BLOCK, 1)
        for x in (ranges.own_start, token + 1, ranges.prefix_start, ranges.prefix_end)
    )
    step = max(1, _CHUNK // (BLOCK * blocks))
    parts = []
    for first in range(0, blocks, step):
        rows = slice(first, first + step)
        seen = (
            _keys_before(own_end[rows], edges)
            - _keys_before(own_start[rows], edges)
            + _keys_before(prefix_end[rows], edges)
            - _keys_before(prefix_start[rows], edges)
        )
        parts.append(seen.sum(1, dtype=torch.int32))
    count = torch.cat(parts)[None, None]  # (1, 1, query blocks, key blocks)
    full = count == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((count > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, head, query, key: ranges.visible(query, key),
        seq_lengths=(num_tokens, num_tokens),
    )


def _keys_before(end: Tensor, edges: Tensor) -> Tensor:
    """Return how many keys of the blocks that start at `edges` come before `end`."""
    return (end - edges).clamp(0, BLOCK)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many entries of each row of (..., Q, K) are True, and the column numbers, those of True first."""
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


@functools.cache
def _compiled(
    device: str, heads: int, key_heads: int, size: int, dtype: torch.dtype, scale: float | None
) -> Callable[..., Tensor]:
    """Return flex_attention compiled for models of these shapes: for the first stream length, and once more for any.

    One function for each, so that the models of a run do not share one limit of recompilations. fullgraph, because the
    fallback of dynamo computes N x N scores.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
        return flex_attention(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=heads != key_heads)

    can_isolate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    isolated = {"isolate_recompiles": True} if can_isolate else {}
    backend = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(attend, fullgraph=True, backend=backend, **isolated)
