"""What a packed stream's layout must hold, and what each of its tokens may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """Stretches of the stream that are attended together: query i of a row sees keys 0 .. prefix + i of that row.

    A single stretch that sees itself alone is given by `span`. Otherwise `queries` (G, L) and `keys` (G, prefix + L)
    hold stream positions: first a stretch of `prefix` tokens, then the queries themselves. Rows shorter than L repeat
    their last token.
    """

    prefix: int
    span: tuple[int, int] | None
    queries: Tensor | None
    keys: Tensor | None


class Layout(Protocol):
    """Every token of the stream is a query of one group. `restore` (N,) puts the concatenated outputs of all groups
    back into stream order; None where they already are.

    What is made once a layout is kept in its `__dict__`, so a layout must not change.
    """

    groups: Sequence[Group]
    restore: Tensor | None


class Ranges(NamedTuple):
    """A query t sees keys own_start[t] .. t and prefix_start[t] .. prefix_end[t] - 1; each (N,) int32."""

    own_start: Tensor
    prefix_start: Tensor
    prefix_end: Tensor

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, of the common shape of the indices `query` and `key`."""
        own = (key >= self.own_start[query]) & (key <= query)
        return own | ((key >= self.prefix_start[query]) & (key < self.prefix_end[query]))


def visible_ranges(layout: Layout, num_tokens: int, device: torch.device, sliding_window: int | None) -> Ranges:
    """The two ranges of every token, without waiting for the device.

    A window counts positions along the token's own sequence: the prefix, then its stretch. It sees the token itself and
    the `sliding_window - 1` before it.
    """
    own = torch.zeros(num_tokens, dtype=torch.int32)
    for group in layout.groups:
        if group.span is not None:
            own[slice(*group.span)] = group.span[0]
    own = own.to(device, non_blocking=True)
    prefix_start, prefix_end = torch.zeros_like(own), torch.zeros_like(own)
    for group in layout.groups:
        if group.span is None:
            own[group.queries] = group.queries[:, :1].int().expand_as(group.queries)
            if group.prefix:
                starts = group.keys[:, :1].int().expand_as(group.queries)
                prefix_start[group.queries] = starts
                prefix_end[group.queries] = starts + group.prefix
    if sliding_window is not None:
        token = torch.arange(num_tokens, dtype=torch.int32, device=device)
        # The window's first place, counted in the stream, were the prefix to stand right before the stretch.
        first = token - (sliding_window - 1)
        into_prefix = (first - own + prefix_end - prefix_start).clamp(min=0)
        prefix_start = torch.minimum(prefix_start + into_prefix, prefix_end)
        own = torch.maximum(own, first)
    return Ranges(own, prefix_start, prefix_end)
