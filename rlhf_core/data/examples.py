"""Tokenised rows in flat arrays: a few bytes a token instead of a Python object each, in memory or memory-mapped.

    tokens   17 5 9 | 4 4 2 | 8 2 | 3 1 | 6 2        every prompt and completion, end to end
    bounds   0        3       6     8     10    12   start of each sequence, and the end of the last
    firsts   0                      3          5     index of the sequence that is the prompt of each example

`Examples` creates an `Example` when it is indexed. The fields other than tokens are kept beside the arrays: in a list
in memory, or as JSON lines in a cache (`cache.py`).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from rlhf_core.batch import stream_length
from rlhf_core.data.account import Account
from rlhf_core.data.errors import DataError
from rlhf_core.data.records import Example, Record

# An example's record, and those of its fields that are neither tokens nor at their default.
Metadata = tuple[Record, dict[str, Any]]
IntArray = npt.NDArray[np.integer[Any]]

_OTHERS = tuple(field for field in fields(Example) if field.name not in ("prompt", "completions", "record"))


class ExampleSequence(Sequence[Example]):
    """A sequence of examples that can be a part of a `Mixture`."""

    @property
    def stream_lengths(self) -> IntArray:
        """(n,) int64, tokens of each example in a `PackedBatch`."""
        return np.array([stream_length(example.prompt, example.completions) for example in self])


class Examples(ExampleSequence):
    """A sequence of examples, each created when it is indexed; a slice is a list of them."""

    def __init__(
        self, tokens: IntArray, bounds: IntArray, firsts: IntArray, metadata: Sequence[Metadata], account: Account
    ):
        """tokens: (N,) int32. bounds: (S + 1,) int64. firsts: (n + 1,) int64. metadata: n items."""
        self._tokens, self._bounds, self._firsts, self._metadata = tokens, bounds, firsts, metadata
        self.account = account

    def __len__(self) -> int:
        return len(self._firsts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._example(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, range(len(self)))

    def _example(self, i: int) -> Example:
        record, others = self._metadata[i]
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
    def stream_lengths(self) -> IntArray:
        """(n,) int64, tokens of each example in a `PackedBatch`."""
        lengths = np.diff(self._bounds)
        counts = np.diff(self._firsts)
        if len(counts) and counts.max() > 2:  # several completions: the prompt may be repeated for each
            sequences = [range(length) for length in lengths.tolist()]
            parts = (sequences[start:end] for start, end in zip(self._firsts, self._firsts[1:], strict=False))
            return np.array([stream_length(prompt, completions) for prompt, *completions in parts])
        return np.add.reduceat(lengths, self._firsts[:-1]) if len(counts) else counts


class Columns:
    """Flat arrays that examples are appended to."""

    def __init__(self) -> None:
        self.tokens: array[int] = array("i")
        self.bounds: array[int] = array("q", [0])
        self.firsts: array[int] = array("q", [0])
        self._num_tokens, self._num_sequences = 0, 0

    def add(self, example: Example) -> Metadata:
        """Append the tokens of an example; return its other fields."""
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

    def take(self) -> "tuple[array[int], array[int], array[int]]":
        """Return and remove what was appended since the last call, to be written after what was returned then."""
        taken = self.tokens, self.bounds, self.firsts
        self.tokens, self.bounds, self.firsts = array("i"), array("q"), array("q")
        return taken


def gather(make: Callable[[Account], Iterable[Example]]) -> Examples:
    """Collect examples in memory. `make` yields them, and counts what it drops in the account that it is given."""
    account, columns = Account(), Columns()
    metadata = []
    for example in make(account):
        account.keep(example)
        metadata.append(columns.add(example))
    if not metadata:
        raise DataError(account.nothing_left())
    tokens, bounds, firsts = (np.frombuffer(values, dtype=values.typecode) for values in columns.take())
    return Examples(tokens, bounds, firsts, metadata, account)


def _runs(flags: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """Return the runs of True: [False, True, True, False, True] -> ((1, 3), (4, 5))."""
    edges = np.flatnonzero(np.diff(np.asarray(flags, dtype=np.int8), prepend=0, append=0)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _flags(runs: Iterable[Sequence[int]], length: int) -> list[bool]:
    """Invert `_runs` for a completion of `length` tokens."""
    flags = [False] * length
    for start, end in runs:
        flags[start:end] = [True] * (end - start)
    return flags


assert all(field.default is not MISSING for field in _OTHERS), "every further field of Example needs a default"
