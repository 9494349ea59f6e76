"""From a path to the packed batches of each step. The order of the data is a function of (seed, step)."""

from __future__ import annotations

import bisect
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rlhf_core import __version__
from rlhf_core.batch import PackedBatch, stream_length
from rlhf_core.config import ConfigError, DataConfig, RunConfig, to_dict
from rlhf_core.data.account import Account
from rlhf_core.data.cache import cached_examples, describe_code, describe_tokenizer
from rlhf_core.data.chat import load_chat_template
from rlhf_core.data.examples import Examples, gather
from rlhf_core.data.formats import iter_records
from rlhf_core.data.mixture import Mixture
from rlhf_core.data.preview import show
from rlhf_core.data.sources import fingerprint
from rlhf_core.data.tokenize import Example, encode_records, stop_ids
from rlhf_core.plugins import fingerprint_function
from rlhf_core.seeding import generator

logger = logging.getLogger("rlhf_core.data")

_ROWS_AT_ONCE = 4000
# Settings that no token follows from; the path does, by what lies there.
_NOT_IN_THE_KEY = {"path", "weights", "cache", "preview"}


def load_examples(
    data: DataConfig, tokenizer: Any, *, need: str, model: Any = None, reserve: int = 0
) -> Sequence[Example]:
    """Read, recognise and tokenise the rows of `data` for a job that needs `need` (see `iter_records`).

    Rows longer than `data.max_length`, or else than the model's context, lose the left of their prompt (see
    `data.truncation`); `reserve` tokens of it are kept free for a completion that is still to be sampled.

    The examples are made when they are asked for, from flat arrays in memory or, with `data.cache`, in a file. What was
    read, dropped and cut is logged, and kept in the `account` of the result or of each of its `parts`. With
    `data.preview` the first are shown, and SystemExit ends the job before it begins.
    """
    max_length = data.max_length or getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if max_length is not None and reserve and max_length - reserve < 2:
        raise ConfigError(
            f"sampling.max_new_tokens={reserve}: expected at most {max_length - 2}, because prompt and completion "
            f"together have {max_length} tokens (data.max_length, or the model's own)"
        )
    encoding = dict(
        stop_ids=stop_ids(tokenizer, getattr(model, "generation_config", None)),
        max_length=max_length and max_length - reserve,
        truncation=data.truncation,
        chat_template=load_chat_template(data.chat_template) if data.chat_template else None,
    )
    parts = [_load(path, data, tokenizer, need, encoding) for path in data.paths()]
    examples = parts[0] if len(parts) == 1 else Mixture(parts, data.weights)
    if data.preview:
        print(show(examples[: data.preview], tokenizer, need=need))
        raise SystemExit(0)
    return examples


def accounts(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What became of the rows of each data set, for a run's papers."""
    parts = getattr(examples, "parts", [examples])
    return [part.account.to_dict() for part in parts if isinstance(part, Examples)]


def _load(path: str, data: DataConfig, tokenizer: Any, need: str, encoding: dict[str, Any]) -> Examples:
    """One data set, from the cache where there is one; what became of its rows is logged."""
    start, was_read = time.perf_counter(), False

    def read(account: Account) -> Iterator[Example]:
        nonlocal was_read
        account.source, was_read = path, True
        examples = _tokenised(path, data, tokenizer, need, encoding, account)
        # Shown on a terminal where it takes longer than a moment.
        yield from tqdm(examples, desc=f"reading {Path(path).name}", unit=" rows", disable=None, delay=1, leave=False)

    if data.cache is None:
        examples = gather(read)
    else:
        about = {
            "data": fingerprint(path, data.split),
            "settings": {name: value for name, value in to_dict(data).items() if name not in _NOT_IN_THE_KEY},
            "formatting": data.formatting and fingerprint_function(data.formatting),
            "need": need,
            "encoding": encoding | {"stop_ids": sorted(encoding["stop_ids"])},
            "tokenizer": describe_tokenizer(tokenizer),
            "code": [__version__, describe_code(), version("transformers"), version("tokenizers")],
        }
        examples = cached_examples(Path(data.cache).expanduser(), about, read)
        examples.account.source = path  # the same bytes may lie elsewhere now
    account, seconds = examples.account, time.perf_counter() - start
    speed = f"{account.tokens / seconds:,.0f} tokens a second" if was_read else "from the cache"
    logger.info(f"{account.kept_line()}; {seconds:.1f} s, {speed}")
    for line in account.losses():
        logger.warning(line)
    return examples


def _tokenised(
    path: str, data: DataConfig, tokenizer: Any, need: str, encoding: dict[str, Any], account: Account
) -> Iterator[Example]:
    """The examples of a data set in order, a few thousand rows in hand at a time."""
    records = iter_records(
        path,
        need=need,
        format=data.format,
        split=data.split,
        skip_bad_rows=data.skip_bad_rows,
        limit=data.limit,
        turns=data.turns,
        system=data.system,
        attributes=data.attributes,
        step_separator=data.step_separator,
        formatting=data.formatting,
        account=account,
    )
    while chunk := list(islice(records, _ROWS_AT_ONCE)):
        yield from encode_records(chunk, tokenizer, account=account, **encoding)


# ---------------------------------------------------------------------------------------------- which rows a step takes


def count_steps(num_examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run. An epoch ends with a smaller batch where the division leaves a rest."""
    steps = math.ceil(epochs * math.ceil(num_examples / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def step_examples(examples: Sequence[Example], batch_size: int, *, seed: int, step: int) -> list[Example]:
    """The examples of step 1, 2, ...: every epoch a new order, every example once an epoch (see `Mixture`)."""
    steps_per_epoch = math.ceil(len(examples) / batch_size)
    epoch, index = divmod(step - 1, steps_per_epoch)
    return _rows(examples, seed, epoch, index * batch_size, (index + 1) * batch_size)


def _rows(examples: Sequence[Example], seed: int, epoch: int, start: int, end: int) -> list[Example]:
    """From start to end in the order of an epoch."""
    places = _epoch_order(len(examples), seed, epoch)[start:end].tolist()
    return [examples.at(i, epoch) if isinstance(examples, Mixture) else examples[i] for i in places]


@functools.lru_cache(maxsize=4)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(num_examples, generator=generator(seed, "data", epoch)).numpy()


class Steps:
    """The optimizer steps of a run and the rows of each: a function of the settings and the seed alone.

    `batch_size` rows to a step, the last of an epoch perhaps fewer; with `max_tokens_per_batch` a step ends before its
    rows would have more tokens than that together, counted as `PackedBatch` holds them, and a longer row is a step
    alone. How many steps an epoch has then depends on its order, so the number of each is counted.
    """

    def __init__(self, examples: Sequence[Example], config: RunConfig):
        self._examples, self._config = examples, config
        self._ends: list[list[int]] = []  # of each epoch, where in its order each step's rows end
        if config.max_tokens_per_batch is None:
            self.total = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
            return
        self.total, epochs = 0, config.epochs
        while epochs > 0 and (config.max_steps is None or self.total < config.max_steps):
            self._ends.append(self._step_ends(len(self._ends)))
            self.total += math.ceil(min(epochs, 1) * len(self._ends[-1]))
            epochs -= 1
        self.total = min(self.total, config.max_steps or self.total)

    def rows(self, step: int) -> list[Example]:
        """The rows of step 1, 2, ..."""
        config = self._config
        if config.max_tokens_per_batch is None:
            return step_examples(self._examples, config.batch_size, seed=config.seed, step=step)
        epoch, index = 0, step - 1
        while index >= len(self._ends[epoch]):
            index -= len(self._ends[epoch])
            epoch += 1
        start, end = [0, *self._ends[epoch]][index : index + 2]
        return _rows(self._examples, config.seed, epoch, start, end)

    def _step_ends(self, epoch: int) -> list[int]:
        order = _epoch_order(len(self._examples), self._config.seed, epoch)
        before = np.concatenate([[0], np.cumsum(_stream_lengths(self._examples, epoch)[order])])
        ends, start = [], 0
        while start < len(order):
            most = np.searchsorted(before, before[start] + self._config.max_tokens_per_batch, side="right") - 1
            start = min(max(int(most), start + 1), start + self._config.batch_size, len(order))
            ends.append(start)
        return ends


def _stream_lengths(examples: Sequence[Example], epoch: int) -> np.ndarray:
    """(n,) tokens of each example as `PackedBatch` holds them."""
    if isinstance(examples, Mixture):
        return examples.stream_lengths(epoch)
    if isinstance(examples, Examples):
        return examples.stream_lengths
    return np.array([stream_length(example.prompt, example.completions) for example in examples])


# ---------------------------------------------------------------------------------- what goes through the model at once


def pack_rows(rows: Sequence[Example]) -> PackedBatch:
    """One batch of all these rows, in their order."""
    return PackedBatch.pack([(row.prompt, row.completions, row.supervised) for row in rows])


def micro_batches(examples: Sequence[Example], micro_batch_size: int | None) -> list[PackedBatch]:
    """Pack the examples of one step into micro-batches of at most so many rows of data (None: all in one)."""
    size = micro_batch_size or len(examples)
    return [pack_rows(examples[start : start + size]) for start in range(0, len(examples), size)]


def split_rows(rows: Sequence[Example], config: RunConfig) -> list[list[Example]]:
    """The rows of one optimizer step in the groups that go through the model at once; every row is in one of them.

    A group has at most micro_batch_size rows (batch_size, where there is none) and, where micro_batch_tokens is given,
    at most so many tokens, as `PackedBatch` counts them; a row that is longer goes alone. Without micro_batch_tokens
    the rows stay in their order; with it they keep it inside their group.
    """
    size = config.micro_batch_size or config.batch_size
    if config.micro_batch_tokens is None:
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    lengths = [stream_length(row.prompt, row.completions) for row in rows]
    return [[rows[i] for i in group] for group in best_fit(lengths, config.micro_batch_tokens, most=size)]


def best_fit(lengths: Sequence[int], capacity: int, *, most: int | None = None) -> list[list[int]]:
    """Indices of `lengths` in groups of at most `capacity` together: best fit, the longest first (Johnson 1973).

    Each goes where it leaves the least room. One that is longer than `capacity` is a group of its own; none is left
    out. A group has at most `most` of them. Groups and what is in them are in ascending order.
    """
    groups: list[list[int]] = []
    open_groups: list[tuple[int, int]] = []  # (room, group), ascending, of those that may take more
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # equals keep their order
        place = bisect.bisect_left(open_groups, (lengths[i], 0))
        if place < len(open_groups):
            room, group = open_groups.pop(place)
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(i)
        if room > lengths[i] and len(groups[group]) != most:
            bisect.insort(open_groups, (room - lengths[i], group))
    return sorted(map(sorted, groups))


def preference_batches(
    path: str | Path, tokenizer: Any, *, batch_size: int, seed: int | None = 0, **data_options: Any
) -> Iterator[PackedBatch]:
    """One pass over a preference data set: batches of chosen, rejected, chosen, rejected, ... for `pair_logprobs`.

    `data_options` are the fields of `DataConfig`. `seed=None` keeps the order of the file.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected 1 or more")
    examples = load_examples(DataConfig(path=str(path), **data_options), tokenizer, need="preference")
    if seed is not None:
        examples = _rows(examples, seed, 0, 0, len(examples))
    for start in range(0, len(examples), batch_size):
        yield from micro_batches(examples[start : start + batch_size], None)
