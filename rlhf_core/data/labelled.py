"""Rows for losses of single labelled completions: pairs split into two rows, and mismatched rows for KTO's KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from rlhf_core.config import DataConfig
from rlhf_core.data.examples import ExampleSequence
from rlhf_core.data.mixture import Mixture
from rlhf_core.data.records import Example


class SplitPairs(ExampleSequence):
    """Preference pairs as twice as many labelled rows: the chosen completion is desirable, the rejected one is not."""

    def __init__(self, pairs: Sequence[Example]):
        self.pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, side = divmod(range(len(self))[index], 2)
        pair = self.pairs[number]
        supervised = None if pair.supervised is None else (pair.supervised[side],)
        record = replace(pair.record, label=side == 0)
        return replace(pair, completions=(pair.completions[side],), supervised=supervised, record=record)


def labelled_rows(rows: Sequence[Example], data: DataConfig) -> Sequence[Example]:
    """Return rows that have a label as they are, and pairs split into two rows each."""
    if len(rows[0].completions) == 1:
        return rows
    return (
        Mixture([SplitPairs(part) for part in rows.parts], data.weights)
        if isinstance(rows, Mixture)
        else SplitPairs(rows)
    )


def mismatched_rows(rows: Sequence[Example], examples: Sequence[Example], max_length: int | None) -> list[Example]:
    """Return each prompt with the completion of the row before it that has another prompt; the first with the last's.

    A single row gets a completion of another row of `examples`. Prompts are truncated on the left where the two
    together are longer than `max_length`.
    """
    near = range(1, min(len(rows), 33))  # if more rows than these share a prompt, the row before is used
    sources = [
        next((rows[i - back] for back in near if rows[i - back].prompt != row.prompt), rows[i - 1])
        for i, row in enumerate(rows)
    ]
    if len(rows) == 1:
        sources = [examples[0] if examples[0].completions != rows[0].completions else examples[1]]
    return [
        replace(
            row,
            prompt=row.prompt if max_length is None else row.prompt[-max(max_length - len(source.completions[0]), 1) :],
            completions=source.completions,
            supervised=source.supervised,
        )
        for row, source in zip(rows, sources, strict=True)
    ]
