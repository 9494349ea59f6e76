"""The layout of a packed stream, and the keys that each of its tokens attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """Ranges of the stream that share an attention call: query i of a row attends to keys 0 .. prefix + i of that row.

    A single range without a prefix is given by `span`. Otherwise `queries` (G, L) and `keys` (G, prefix + L) are stream
    positions: a prefix, then the queries themselves. Rows shorter than L repeat their last token.
    """

    @property
    def prefix(self) -> int: ...
    @property
    def span(self) -> tuple[int, int] | None: ...
    @property
    def queries(self) -> Tensor | None: ...
    @property
    def keys(self) -> Tensor | None: ...


class Layout(Protocol):
    """Groups in which every token of the stream is a query once.

    `restore` (N,) indexes the concatenated outputs of all groups in stream order; None where they are in that order.
    Block masks are cached in the `__dict__` of a layout, so a layout must not change.
    """

    @property
    def groups(self) -> Sequence[Group]: ...
    @property
    def restore(self) -> Tensor | None: ...


def group_positions(group: Group) -> tuple[Tensor, Tensor]:
    """Return the stream positions of queries and keys of a group without a span."""
    if group.queries is None or group.keys is None:
        raise ValueError("group of a layout: expected a span, or queries and keys")
    return group.queries, group.keys


class Ranges(NamedTuple):
    """Query t attends to keys own_start[t] .. t and prefix_start[t] .. prefix_end[t] - 1; each field (N,) int32."""

    own_start: Tensor
    prefix_start: Tensor
    prefix_end: Tensor

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether queries attend to keys, bool of the common shape of the indices `query` and `key`."""
        own = (key >= self.own_start[query]) & (key <= query)
        return own | ((key >= self.prefix_start[query]) & (key < self.prefix_end[query]))


def visible_ranges(layout: Layout, num_tokens: int, device: torch.device, sliding_window: int | None) -> Ranges:
    """Return the two ranges of every token, without a device synchronization.

    A window counts positions of the token's own sequence, which starts with the prefix: the token itself and the
    `sliding_window - 1` before it.
    """
    own = torch.zeros(num_tokens, dtype=torch.int32)
    for group in layout.groups:
        if group.span is not None:
            own[slice(*group.span)] = group.span[0]
    own = own.to(device, non_blocking=True)
    prefix_start, prefix_end = torch.zeros_like(own), torch.zeros_like(own)
    for group in layout.groups:
        if group.span is None:
            queries, keys = group_positions(group)
            own[queries] = queries[:, :1].int().expand_as(queries)
            if group.prefix:
                starts = keys[:, :1].int().expand_as(queries)
                prefix_start[queries] = starts
                prefix_end[queries] = starts + group.prefix
    if sliding_window is not None:
        token = torch.arange(num_tokens, dtype=torch.int32, device=device)
        # The first position of the window in the stream, if the prefix were directly before the token's own range.
        first = token - (sliding_window - 1)
        into_prefix = (first - own + prefix_end - prefix_start).clamp(min=0)
        prefix_start = torch.minimum(prefix_start + into_prefix, prefix_end)
        own = torch.maximum(own, first)
    return Ranges(own, prefix_start, prefix_end)
