"""Attention over a packed stream in one fused kernel, which torch's flex_attention writes in Triton.

What a token sees is two ranges of the stream, three integers a token. From them come the mask of single entries and,
once a batch, the table of blocks that the kernel visits: neither ever holds N x N entries, a sliding window is nothing
but shorter ranges, and neither a window nor a new length compiles the kernel anew.
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
_MIN_HEAD = 16  # the shortest head that the kernel takes
_CHUNK = 1 << 24  # entries of a temporary while blocks are counted


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
    """`reference.packed_attention`. On the CPU forward alone, and not fused."""
    _check(query, key, value, dropout)
    if not query.is_cuda and not torch.is_grad_enabled():  # torch asks the tensors alone
        query, key, value = query.detach(), key.detach(), value.detach()
    num_tokens = query.shape[2]
    attend = _compiled(query.device.type, query.shape[1], key.shape[1], query.shape[3], query.dtype, scale, softcap)
    return attend(query, key, value, block_mask_of(layout, num_tokens, query.device, sliding_window))


def _check(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    if dropout:
        raise RuntimeError(f"dropout={dropout}: impl='triton' of packed_attention has none; impl='torch' does")
    if query.is_cuda and (query.dtype == torch.float64 or query.shape[-1] < _MIN_HEAD):
        raise RuntimeError(
            f"heads of {query.shape[-1]} {query.dtype}: impl='triton' of packed_attention expects {_MIN_HEAD} or more, "
            "float32 or a half type; impl='torch' takes any"
        )
    if not query.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise RuntimeError("impl='triton' of packed_attention has no backward on the CPU; use impl='torch'")


def block_mask_of(layout: Layout, num_tokens: int, device: torch.device, sliding_window: int | None) -> BlockMask:
    """The layout's block mask, made on first use and kept with it: a model's layers ask for the same one or two."""
    kept = vars(layout).setdefault("_packed_attention_masks", {})
    name = (num_tokens, device, sliding_window)
    if name not in kept:
        kept[name] = make_block_mask(visible_ranges(layout, num_tokens, device, sliding_window))
    return kept[name]


def make_block_mask(ranges: Ranges) -> BlockMask:
    """What `create_block_mask` makes of `ranges.visible`, without looking at every entry.

    How many keys of a block a query sees is the length of two overlaps; summed over a block's queries they say whether
    the block is empty, full or mixed. N * N / BLOCK numbers at most, a chunk at a time; no wait for the device.
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
    counts = []
    for first in range(0, blocks, step):
        rows = slice(first, first + step)

        def before(end: Tensor, rows=rows) -> Tensor:  # keys of each block that lie before `end`
            return (end[rows] - edges).clamp(0, BLOCK)

        seen = before(own_end) - before(own_start) + before(prefix_end) - before(prefix_start)
        counts.append(seen.sum(1, dtype=torch.int32))
    count = torch.cat(counts)[None, None]  # (1, 1, query blocks, key blocks)
    full = count == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((count > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, head, query, key: ranges.visible(query, key),
        seq_lengths=(num_tokens, num_tokens),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(..., Q, K) bool -> how many are True in each row, and all column numbers with those of the True ones first."""
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


@functools.cache
def _compiled(
    device: str, heads: int, key_heads: int, size: int, dtype: torch.dtype, scale: float | None, softcap: float | None
) -> Callable[..., Tensor]:
    """flex_attention compiled for models of these shapes: for the first length of a stream, and once more for any.

    One function for each, so that no number is taken for one that varies (the kernel refuses such a softcap) and the
    models of a run do not share one limit of recompilations. fullgraph: what dynamo falls back to holds N x N scores.
    """
    score_mod = None if softcap is None else lambda score, *place: softcap * torch.tanh(score / softcap)

    def attend(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
        return flex_attention(
            query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=heads != key_heads
        )

    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    backend = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(attend, fullgraph=True, backend=backend, **apart)
