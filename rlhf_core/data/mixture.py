"""Several data sets as one: concatenated, or each with a share of every epoch."""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import overload

import numpy as np

from rlhf_core.data.examples import ExampleSequence, IntArray
from rlhf_core.data.records import Example


class Mixture(Sequence[Example]):
    """One epoch of several data sets.

    Without weights an epoch has every example of each, once. With weights it has examples of the data sets in that
    proportion: the data set that is largest relative to its weight contributes each of its examples once, every other
    repeats its own in order. Each epoch continues where the previous one stopped, so that over the epochs the examples
    of a data set are seen equally often, to within one. No example is left out.

        counts[i] = round(weights[i] * max_j(sizes[j] / weights[j]))

    `at(slot, epoch)` is the example in that place of an epoch before shuffling; `mixture[slot]` that of epoch 0.
    """

    def __init__(self, parts: Sequence[ExampleSequence], weights: Sequence[float] | None = None):
        self.parts = tuple(parts)
        sizes = [len(part) for part in parts]
        scale = max(size / weight for size, weight in zip(sizes, weights, strict=True)) if weights else 0.0
        self.counts = [round(weight * scale) for weight in weights] if weights else sizes
        self._starts = [0, *accumulate(self.counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.at(slot, 0) for slot in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.at(index % len(self), 0)

    def at(self, slot: int, epoch: int) -> Example:
        """Return the example in that place of that epoch, both counted from 0."""
        number = bisect.bisect_right(self._starts, slot) - 1
        part = self.parts[number]
        return part[(slot - self._starts[number] + epoch * self.counts[number]) % len(part)]

    def stream_lengths(self, epoch: int) -> IntArray:
        """Return (len(self),) tokens of each example in a `PackedBatch`."""
        rows = [
            (np.arange(count) + epoch * count) % len(part) for part, count in zip(self.parts, self.counts, strict=True)
        ]
        return np.concatenate([part.stream_lengths[index] for part, index in zip(self.parts, rows, strict=True)])
