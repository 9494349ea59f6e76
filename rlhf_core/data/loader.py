"""From examples to the packed batches of each step. The order of the data is a function of (seed, step)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ConfigError, DataConfig
from rlhf_core.data.chat import load_chat_template
from rlhf_core.data.formats import read_records
from rlhf_core.data.tokenize import Example, encode_records, stop_ids
from rlhf_core.seeding import generator

logger = logging.getLogger("rlhf_core.data")


def load_examples(data: DataConfig, tokenizer: Any, *, need: str, model: Any = None, reserve: int = 0) -> list[Example]:
    """Read, recognise and tokenise the rows of `data` for a job that needs `need` (see `read_records`).

    Rows longer than `data.max_length`, or else than the model's context, lose the left of their prompt; `reserve`
    tokens of it are kept free for a completion that is still to be sampled.
    """
    max_length = data.max_length or getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if max_length is not None and reserve and max_length - reserve < 2:
        raise ConfigError(
            f"sampling.max_new_tokens={reserve}: expected at most {max_length - 2}, because prompt and completion "
            f"together have {max_length} tokens (data.max_length, or the model's own)"
        )
    records = read_records(
        data.path,
        need=need,
        format=data.format,
        split=data.split,
        skip_bad_rows=data.skip_bad_rows,
        limit=data.limit,
    )
    return encode_records(
        records,
        tokenizer,
        stop_ids=stop_ids(tokenizer, getattr(model, "generation_config", None)),
        max_length=max_length and max_length - reserve,
        chat_template=load_chat_template(data.chat_template) if data.chat_template else None,
    )


def count_steps(num_examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run. An epoch ends with a smaller batch where the division leaves a rest."""
    steps = math.ceil(epochs * math.ceil(num_examples / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def step_examples(examples: Sequence[Example], batch_size: int, *, seed: int, step: int) -> list[Example]:
    """The examples of step 1, 2, ...: every epoch a new order, every example once an epoch."""
    steps_per_epoch = math.ceil(len(examples) / batch_size)
    epoch, index = divmod(step - 1, steps_per_epoch)
    order = _epoch_order(len(examples), seed, epoch)
    return [examples[i] for i in order[index * batch_size : (index + 1) * batch_size]]


@functools.lru_cache(maxsize=4)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(num_examples, generator=generator(seed, "data", epoch)).tolist()


def micro_batches(examples: Sequence[Example], micro_batch_size: int | None) -> list[PackedBatch]:
    """Pack the examples of one step into micro-batches of at most so many rows of data (None: all in one)."""
    size = micro_batch_size or len(examples)
    return [
        PackedBatch.pack([(example.prompt, example.completions) for example in examples[start : start + size]])
        for start in range(0, len(examples), size)
    ]


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
        examples = [examples[i] for i in _epoch_order(len(examples), seed, 0)]
    for start in range(0, len(examples), batch_size):
        yield from micro_batches(examples[start : start + batch_size], None)
