"""Several data sets as one: end to end, or each with a share of every epoch."""

import bisect
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from rlhf_core.data.examples import Examples
from rlhf_core.data.tokenize import Example


class Mixture(Sequence[Example]):
    """One epoch of several data sets.

    Without weights that is every example of each, once. With weights the data sets stand in an epoch in that
    proportion: the one that is largest for its weight gives each of its examples once, every other gives its own again
    and again, from the first to the last in turn. Where it stops in one epoch it goes on in the next, so that over the
    epochs all examples of a data set are seen equally often, give or take one. No example is left out.

        counts[i] = round(weights[i] * max_j(sizes[j] / weights[j]))

    `mixture[slot]` is what an epoch holds at that place before it is shuffled; `at(slot, epoch)` the same of any epoch.
    """

    def __init__(self, parts: Sequence[Examples], weights: Sequence[float] | None = None):
        self.parts = tuple(parts)
        sizes = [len(part) for part in parts]
        scale = max(size / weight for size, weight in zip(sizes, weights, strict=True)) if weights else 0
        self.counts = [round(weight * scale) for weight in weights] if weights else sizes
        self._starts = [0, *accumulate(self.counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.at(slot, 0) for slot in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.at(index % len(self), 0)

    def at(self, slot: int, epoch: int) -> Example:
        """The example at that place of that epoch, both counted from 0."""
        number = bisect.bisect_right(self._starts, slot) - 1
        part = self.parts[number]
        return part[(slot - self._starts[number] + epoch * self.counts[number]) % len(part)]

    def stream_lengths(self, epoch: int) -> np.ndarray:
        """(len(self),) tokens of each, as `PackedBatch` holds them."""
        rows = [
            (np.arange(count) + epoch * count) % len(part) for part, count in zip(self.parts, self.counts, strict=True)
        ]
        return np.concatenate([part.stream_lengths[index] for part, index in zip(self.parts, rows, strict=True)])
