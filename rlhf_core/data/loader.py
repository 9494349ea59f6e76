"""Load rows of data, and form the batches of each step. Their order is a function of (seed, step)."""

from __future__ import annotations

import bisect
import logging
import math
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from rlhf_core import __version__
from rlhf_core.batch import PackedBatch, stream_length
from rlhf_core.config import ConfigError, DataConfig, RunConfig, to_dict
from rlhf_core.data.account import Account
from rlhf_core.data.cache import cached_examples, describe_code, describe_tokenizer
from rlhf_core.data.chat import load_chat_template
from rlhf_core.data.examples import Examples, ExampleSequence, IntArray, gather
from rlhf_core.data.formats import iter_records
from rlhf_core.data.mixture import Mixture
from rlhf_core.data.preview import show
from rlhf_core.data.records import Example
from rlhf_core.data.sources import fingerprint
from rlhf_core.data.tokenize import encode_records, stop_ids
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.plugins import fingerprint_function
from rlhf_core.seeding import generator

if TYPE_CHECKING:  # transformers is slow to import
    from transformers import PreTrainedModel

logger = logging.getLogger("rlhf_core.data")

_ROWS_PER_CHUNK = 4000
# Settings that do not affect tokens; the path does, through the content of its files.
_NOT_IN_THE_KEY = {"path", "weights", "cache", "preview"}


def load_examples(
    data: DataConfig, tokenizer: Tokenizer, *, need: str, model: PreTrainedModel | None = None, reserve: int = 0
) -> Examples | Mixture:
    """Read, recognise and tokenise the rows of `data` for a job that needs `need` (see `iter_records`).

    The prompts of rows longer than `data.max_length`, or else than the model's context, are cut on the left (see
    `data.truncation`); `reserve` tokens are left for a completion that is to be sampled.

    Examples are created when they are indexed, from flat arrays in memory or, with `data.cache`, in files. The numbers
    of rows and tokens that were read, dropped and cut are logged, and kept in the `account` of the result or of each of
    its `parts`. With `data.preview` the first examples are printed, and SystemExit ends the job.
    """
    max_length = data.max_length or getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if max_length is not None and reserve and max_length - reserve < 2:
        raise ConfigError(
            f"sampling.max_new_tokens={reserve}: expected at most {max_length - 2}, because prompt and completion "
            f"together have {max_length} tokens (data.max_length, or the model's own)"
        )
    encode = partial(
        encode_records,
        stop_ids=stop_ids(tokenizer, getattr(model, "generation_config", None)),
        max_length=max_length and max_length - reserve,
        truncation=data.truncation,
        chat_template=load_chat_template(data.chat_template) if data.chat_template else None,
    )
    parts = [_load(path, data, tokenizer, need, encode) for path in data.paths()]
    examples = parts[0] if len(parts) == 1 else Mixture(parts, data.weights)
    if data.preview:
        print(show(examples[: data.preview], tokenizer, need=need))
        raise SystemExit(0)
    return examples


def accounts(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the account of each data set (see `account.py`), for run.json."""
    parts = getattr(examples, "parts", [examples])
    return [part.account.to_dict() for part in parts if isinstance(part, Examples)]


def _load(path: str, data: DataConfig, tokenizer: Tokenizer, need: str, encode: partial[list[Example]]) -> Examples:
    """Load one data set, from the cache where there is one, and log its account.

    encode: `encode_records` with the arguments that are the same for all data sets.
    """
    start, was_read = time.perf_counter(), False

    def read(account: Account) -> Iterator[Example]:
        nonlocal was_read
        account.source, was_read = path, True
        examples = _tokenised(path, data, tokenizer, need, encode, account)
        # The bar appears on a terminal after a second.
        yield from tqdm(examples, desc=f"reading {Path(path).name}", unit=" rows", disable=None, delay=1, leave=False)

    if data.cache is None:
        examples = gather(read)
    else:
        about = {
            "data": fingerprint(path, data.split),
            "settings": {name: value for name, value in to_dict(data).items() if name not in _NOT_IN_THE_KEY},
            "formatting": data.formatting and fingerprint_function(data.formatting),
            "need": need,
            "encoding": encode.keywords | {"stop_ids": sorted(encode.keywords["stop_ids"])},
            "tokenizer": describe_tokenizer(tokenizer),
            "code": [__version__, describe_code(), version("transformers"), version("tokenizers")],
        }
        examples = cached_examples(Path(data.cache).expanduser(), about, read)
        examples.account.source = path  # the cached files may have been moved
    account, seconds = examples.account, time.perf_counter() - start
    speed = f"{account.tokens / seconds:,.0f} tokens a second" if was_read else "from the cache"
    logger.info(f"{account.kept_line()}; {seconds:.1f} s, {speed}")
    for line in account.warnings():
        logger.warning(line)
    return examples


def _tokenised(
    path: str, data: DataConfig, tokenizer: Tokenizer, need: str, encode: partial[list[Example]], account: Account
) -> Iterator[Example]:
    """Yield the examples of a data set in order, reading a few thousand rows at a time."""
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
    while chunk := list(islice(records, _ROWS_PER_CHUNK)):
        yield from encode(chunk, tokenizer, account=account)


# ------------------------------------------------------------------------------------------------ the rows of each step


def count_steps(num_examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Return the number of optimizer steps of a run. The last batch of an epoch may be smaller than the others."""
    steps = math.ceil(epochs * math.ceil(num_examples / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def step_examples(examples: Sequence[Example], batch_size: int, *, seed: int, step: int) -> list[Example]:
    """Return the examples of step 1, 2, ...: each epoch has a new order, with each example once (see `Mixture`)."""
    steps_per_epoch = math.ceil(len(examples) / batch_size)
    epoch, index = divmod(step - 1, steps_per_epoch)
    return _rows(examples, seed, epoch, index * batch_size, (index + 1) * batch_size)


def _rows(examples: Sequence[Example], seed: int, epoch: int, start: int, end: int) -> list[Example]:
    """Return the examples start .. end of an epoch's order."""
    places = _epoch_order(len(examples), seed, epoch)[start:end].tolist()
    return [examples.at(i, epoch) if isinstance(examples, Mixture) else examples[i] for i in places]


@lru_cache(maxsize=4)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> IntArray:
    return torch.randperm(num_examples, generator=generator(seed, "data", epoch)).numpy()


class Steps:
    """The optimizer steps of a run and the rows of each: a function of the settings and the seed alone.

    A step has `batch_size` rows, the last of an epoch perhaps fewer. With `max_tokens_per_batch` it has fewer rows
    where these would have more tokens together, counted as in `PackedBatch`; a row that is longer is a step of its own.
    The number of steps of an epoch then depends on its order.

    Attributes:
        total: the number of optimizer steps of the run.
    """

    def __init__(self, examples: Sequence[Example], config: RunConfig):
        self._examples, self._config = examples, config
        self._ends: list[list[int]] = []  # for each epoch, the end of each step's rows in its order
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
        """Return the rows of step 1, 2, ..."""
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
        most_tokens = self._config.max_tokens_per_batch
        assert most_tokens is not None
        order = _epoch_order(len(self._examples), self._config.seed, epoch)
        before = np.concatenate([[0], np.cumsum(_stream_lengths(self._examples, epoch)[order])])
        ends: list[int] = []
        start = 0
        while start < len(order):
            most = np.searchsorted(before, before[start] + most_tokens, side="right") - 1
            start = min(max(int(most), start + 1), start + self._config.batch_size, len(order))
            ends.append(start)
        return ends


def _stream_lengths(examples: Sequence[Example], epoch: int) -> IntArray:
    """Return (n,) tokens of each example in a `PackedBatch`."""
    if isinstance(examples, Mixture):
        return examples.stream_lengths(epoch)
    if isinstance(examples, ExampleSequence):
        return examples.stream_lengths
    return np.array([stream_length(example.prompt, example.completions) for example in examples])


# -------------------------------------------------------------------------------------------------------- micro-batches


def pack_rows(rows: Sequence[Example]) -> PackedBatch:
    """Pack all rows into one batch, in their order."""
    return PackedBatch.pack([(row.prompt, row.completions, row.supervised) for row in rows])


def micro_batches(examples: Sequence[Example], micro_batch_size: int | None) -> list[PackedBatch]:
    """Pack examples into micro-batches of at most `micro_batch_size` rows (None: one batch)."""
    size = micro_batch_size or len(examples)
    return [pack_rows(examples[start : start + size]) for start in range(0, len(examples), size)]


def split_places(rows: Sequence[Example], config: RunConfig) -> list[list[int]]:
    """Return, for each micro-batch of one optimizer step, the indices of its rows; each row is in exactly one.

    A micro-batch has at most `micro_batch_size` rows (`batch_size` where that is None) and, where `micro_batch_tokens`
    is set, at most that many tokens, counted as in `PackedBatch`; a row that is longer is a micro-batch of its own.
    The indices of a micro-batch ascend; without `micro_batch_tokens` the micro-batches together keep the order of rows.
    """
    size = config.micro_batch_size or config.batch_size
    if config.micro_batch_tokens is None:
        return [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    lengths = [stream_length(row.prompt, row.completions) for row in rows]
    return best_fit(lengths, config.micro_batch_tokens, most=size)


def best_fit(lengths: Sequence[int], capacity: int, *, most: int | None = None) -> list[list[int]]:
    """Group the indices of `lengths` with at most `capacity` a group: best fit decreasing (Johnson 1973).

    Each is put where it leaves the least room. A length above `capacity` is a group of its own; none is left out. A
    group has at most `most` indices. Groups, and the indices in them, are in ascending order.
    """
    groups: list[list[int]] = []
    open_groups: list[tuple[int, int]] = []  # (room, group) of groups that are not full, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # equal lengths keep their order
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
    data: DataConfig | str | Path, tokenizer: Tokenizer, *, batch_size: int, seed: int | None = 0
) -> Iterator[PackedBatch]:
    """Yield one pass over a preference data set in batches of chosen, rejected, chosen, ... for `pair_logprobs`.

    data: a path, or a `DataConfig` for other settings. seed: of the shuffled order; None keeps that of the file.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected 1 or more")
    config = data if isinstance(data, DataConfig) else DataConfig(path=str(data))
    examples: Sequence[Example] = load_examples(config, tokenizer, need="preference")
    if seed is not None:
        examples = _rows(examples, seed, 0, 0, len(examples))
    for start in range(0, len(examples), batch_size):
        yield from micro_batches(examples[start : start + batch_size], None)
