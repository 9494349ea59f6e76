"""Tokenised rows in flat arrays: a few bytes a token instead of a Python object each, in memory or mapped from a file.

    tokens   17 5 9 | 4 4 2 | 8 2 | 3 1 | 6 2        every prompt and completion, end to end
    bounds   0        3       6     8     10    12   where each of these sequences begins, and the last ends
    firsts   0                      3          5     which sequence is the prompt of each example

`Examples` makes an `Example` when one is asked for. What is not tokens, the record and a few other fields, lies beside
the arrays: a list in memory, JSON lines in a cache (`cache.py`).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from functools import cached_property
from typing import Any, overload

import numpy as np

from rlhf_core.batch import stream_length
from rlhf_core.data.account import Account
from rlhf_core.data.formats import DataError, Record
from rlhf_core.data.tokenize import Example

Note = tuple[Record, dict[str, Any]]  # an example's record, and its fields that are neither tokens nor at their default

_OTHERS = tuple(field for field in fields(Example) if field.name not in ("prompt", "completions", "record"))


class Examples(Sequence[Example]):
    """A sequence of examples, each made anew when it is asked for; a slice is a list of them."""

    def __init__(
        self, tokens: np.ndarray, bounds: np.ndarray, firsts: np.ndarray, notes: Sequence[Note], account: Account
    ):
        """tokens: (N,) int32. bounds: (S + 1,) int64. firsts: (n + 1,) int64. notes: n of them."""
        self._tokens, self._bounds, self._firsts, self._notes = tokens, bounds, firsts, notes
        self.account = account

    def __len__(self) -> int:
        return len(self._firsts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._example(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._example(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, range(len(self)))

    def _example(self, i: int) -> Example:
        record, others = self._notes[i]
        bounds = self._bounds[self._firsts[i] : self._firsts[i + 1] + 1].tolist()
        tokens = self._tokens[bounds[0] : bounds[-1]].tolist()
        prompt, *completions = (
            tokens[start - bounds[0] : end - bounds[0]] for start, end in zip(bounds, bounds[1:], strict=False)
        )
        if "supervised" in others:
            flags = (_flags(runs, len(ids)) for runs, ids in zip(others["supervised"], completions, strict=True))
            others = others | {"supervised": tuple(flags)}
        return Example(prompt=prompt, completions=tuple(completions), record=record, **others)

    @cached_property
    def stream_lengths(self) -> np.ndarray:
        """(n,) int64, tokens of each example as `PackedBatch` holds them."""
        lengths = np.diff(self._bounds)
        counts = np.diff(self._firsts)
        if len(counts) and counts.max() > 2:  # several completions, and the prompt perhaps once for each
            sequences = [range(length) for length in lengths.tolist()]
            parts = (sequences[start:end] for start, end in zip(self._firsts, self._firsts[1:], strict=False))
            return np.array([stream_length(prompt, completions) for prompt, *completions in parts])
        return np.add.reduceat(lengths, self._firsts[:-1]) if len(counts) else counts


class Columns:
    """Where examples are gathered, in flat arrays that grow."""

    def __init__(self) -> None:
        self.tokens, self.bounds, self.firsts = array("i"), array("q", [0]), array("q", [0])
        self._num_tokens, self._num_sequences = 0, 0

    def add(self, example: Example) -> Note:
        """Take the tokens of an example; what is left of it is returned."""
        for ids in (example.prompt, *example.completions):
            self.tokens.extend(ids)
            self._num_tokens += len(ids)
            self.bounds.append(self._num_tokens)
        self._num_sequences += 1 + len(example.completions)
        self.firsts.append(self._num_sequences)
        others = {
            field.name: value for field in _OTHERS if (value := getattr(example, field.name)) is not field.default
        }
        if example.supervised is not None:
            others["supervised"] = tuple(map(_runs, example.supervised))
        return example.record, others

    def take(self) -> tuple[array, array, array]:
        """What was gathered since the last time, to be written behind what was taken before."""
        taken = self.tokens, self.bounds, self.firsts
        self.tokens, self.bounds, self.firsts = array("i"), array("q"), array("q")
        return taken


def gather(make: Callable[[Account], Iterable[Example]]) -> Examples:
    """Examples in memory. `make` yields them, and tells the account it is given of what it drops."""
    account, columns, notes = Account(), Columns(), []
    for example in make(account):
        account.keep(example)
        notes.append(columns.add(example))
    if not notes:
        raise DataError(account.nothing_left())
    arrays = (np.frombuffer(values, dtype=values.typecode) for values in columns.take())
    return Examples(*arrays, notes, account)


def _runs(flags: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """[False, True, True, False, True] -> ((1, 3), (4, 5)): a few numbers instead of one for each token."""
    edges = np.flatnonzero(np.diff(np.asarray(flags, dtype=np.int8), prepend=0, append=0)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _flags(runs: Iterable[Sequence[int]], length: int) -> list[bool]:
    flags = [False] * length
    for start, end in runs:
        flags[start:end] = [True] * (end - start)
    return flags


assert all(field.default is not MISSING for field in _OTHERS), "every further field of Example needs a default"
