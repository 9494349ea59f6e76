"""Runs over rows of data: SFT, reward models, and preference optimisation.

with OfflineRun(config, need="supervised", evaluate=evaluate) as run:
    for step in run.steps():
        for batch in step.micro_batches():
            step.backward(loss_of(run.policy, batch))
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.batch import PackedBatch
from rlhf_core.config import CachedReferenceConfig, DataConfig, RunConfig
from rlhf_core.data.loader import Steps, accounts, load_examples, pack_rows, split_places
from rlhf_core.data.records import Example
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.models.forward import device_of, evaluating, token_logprobs
from rlhf_core.models.load import load_policy, save_model
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.reference import load_run_reference
from rlhf_core.training.reference_cache import ReferenceLogprobs, cached_logprobs
from rlhf_core.training.run import Run, Step

C = TypeVar("C", bound=RunConfig)
Rows = Sequence[Example]
LoadModel = Callable[[Any], tuple[PreTrainedModel, Tokenizer]]


def load_run_policy(config: RunConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """Load the policy that a run trains, and its tokenizer."""
    policy, tokenizer = load_policy(
        config.model.path,
        device=config.device,
        lora=config.lora,
        quantize=config.quantize,
        seed=config.seed,
        **config.model.options(),
    )
    return policy, tokenizer


class OfflineRun(Run[C]):
    """A `Run` over rows of data.

    Args:
        need: kind of the rows, see `load_examples`. evaluate, show: see `Run`.
        load_model: loads what is trained; a policy by default. role: its name in checkpoints.
        convert_rows: applied to the rows of each data set when they are read.

    Attributes:
        model: what is trained, also as `policy`. tokenizer. examples, eval_examples: rows. device: of the model.
    """

    def __init__(
        self,
        config: C,
        *,
        need: str,
        evaluate: Callable[[Any], Metrics],
        show: Sequence[str] = (),
        load_model: LoadModel = load_run_policy,
        role: str = "policy",
        convert_rows: Callable[[Rows, DataConfig], Rows] | None = None,
    ):
        super().__init__(config, evaluate=evaluate, show=show)
        self._need, self._load_model, self._role, self._convert_rows = need, load_model, role, convert_rows
        self._cache: ReferenceLogprobs | None = None

    def load(self) -> None:
        """Load the model and the rows."""
        config = self.config
        self.model, self.tokenizer = self._load_model(config)
        self.policy, self.device = self.model, device_of(self.model)
        self.add_model(self._role, self.model, write=lambda folder: save_model(folder, self.model, self.tokenizer))
        eval_data: DataConfig | None = getattr(config, "eval_data", None)
        self.examples = self.load_rows(config.data)
        self.eval_examples = self.load_rows(eval_data) if eval_data else []
        self._schedule = Steps(self.examples, config)
        self.total_steps = self._schedule.total

    def load_rows(self, data: DataConfig) -> Rows:
        """Read and tokenise the rows of a data set."""
        rows = load_examples(data, self.tokenizer, need=self._need, model=self.model)
        if data is self.config.data:
            self.note({"data": accounts(rows)})
        return rows if self._convert_rows is None else self._convert_rows(rows, data)

    @property
    def has_evaluation_data(self) -> bool:
        return len(self.eval_examples) > 0

    def steps(self) -> Iterator[OfflineStep]:
        """Yield the optimizer steps."""
        return self.iterate(lambda number: OfflineStep(self, number, self._schedule.rows(number)))

    @contextlib.contextmanager
    def evaluation_batch(self) -> Iterator[RowBatch]:
        """The evaluation rows as one batch. Inside, gradients are off and the model is in evaluation mode."""
        with torch.no_grad(), evaluating(self.model):
            yield RowBatch(self.eval_examples, self.config)

    # --------------------------------------------------------------------------------------------------- the reference

    def load_reference(self, settings: CachedReferenceConfig, *, whole_distribution: bool = False) -> None:
        """Load the reference, or compute its log-probs of all rows beforehand and release it, where that saves time.

        `whole_distribution`: the loss needs more of the reference than its log-probs, so it stays loaded.
        """
        config = self.config
        reference = load_run_reference(config, settings, self.policy, self.tokenizer)
        steps_per_epoch = Steps(self.examples, replace(config, epochs=1.0, max_steps=None)).total  # the cost of a cache
        saves_time = self.total_steps > steps_per_epoch and not whole_distribution and settings.update == "none"
        if {"on": True, "off": False, "auto": saves_time}[settings.cache]:
            folder = Path(settings.cache_folder or Path(config.output, "reference_logprobs"))
            sets = (
                *getattr(self.examples, "parts", [self.examples]),
                *getattr(self.eval_examples, "parts", [self.eval_examples]),
            )
            size = config.micro_batch_size or config.batch_size
            self._cache = cached_logprobs(reference, *sets, folder=folder, batch_size=size)
        if self._cache is None or whole_distribution:
            self.add_reference(reference, settings)

    @torch.no_grad()
    def ref_logprobs(self, batch: MicroBatch) -> Tensor | None:
        """Return the reference's log-probs, (B, T), from the cache or a forward; None without a reference."""
        if self._cache is not None and batch.cached:
            return batch.packed.to(self.device).scatter(self._cache.of(batch.rows))
        return None if self.reference is None else token_logprobs(self.reference, batch.packed)


class RowBatch:
    """Rows that belong together: those of an optimizer step, or the evaluation rows.

    `cached`: the rows are among those whose reference log-probs may be cached.
    """

    def __init__(self, rows: Rows, config: RunConfig, *, cached: bool = True):
        self.rows, self.cached = rows, cached
        self._places = split_places(rows, config)

    @property
    def num_micro_batches(self) -> int:
        return len(self._places)

    def total(self, of: Callable[[Example], float]) -> float:
        """Return the sum of a number over all rows: what losses are divided by."""
        return math.fsum(map(of, self.rows))

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield the rows in the groups that go through the model at once, each packed when it is asked for."""
        for places in self._places:
            yield MicroBatch(self, places)


class MicroBatch:
    """The rows at some `places` of a batch, packed. `share` is their number divided by that of all rows."""

    def __init__(self, batch: RowBatch, places: Sequence[int]):
        self.places, self.cached = places, batch.cached
        self.rows = [batch.rows[place] for place in places]
        self.share = len(self.rows) / len(batch.rows)
        self.packed: PackedBatch = pack_rows(self.rows)

    def row_weights(self, device: torch.device | None = None) -> Tensor:
        """Return the weights of the rows, (R,)."""
        return torch.tensor([row.weight for row in self.rows], device=device)


class OfflineStep(Step, RowBatch):
    """One optimizer step over some rows."""

    def __init__(self, run: OfflineRun[Any], number: int, rows: Rows):
        Step.__init__(self, run, number)
        RowBatch.__init__(self, rows, run.config)
