"""The life of a training run: folder, seed, kernels, optimizer, metrics, checkpoints, signals, evaluation and its end.

    with Run(config, total_steps=100) as run:
        run.add_model("policy", model, write=lambda folder: save_model(folder, model, tokenizer))
        for step in run.steps():
            step.backward(loss)
            step.metrics.mean({"loss": loss})

A run has two phases. Inside `with`, models and states are loaded and added. The first call of `steps()` then builds the
optimizer, resumes from the newest checkpoint, and yields the steps. A step ends when the loop asks for the next one:
gradients are clipped, the optimizer steps, evaluation runs when due, metrics are written; then a checkpoint is saved
when due, or the run stops if it was asked to. After the last step the model is saved. An exception ends the run without
any of this.

Runs that load a model and rows of data: `training/offline.py`. Runs that sample from the policy: `rollout/online.py`.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf_core.config import ConfigError, ReferenceConfig, RunConfig, to_dict
from rlhf_core.ops.logprobs import use_kernels
from rlhf_core.seeding import generator
from rlhf_core.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, versions
from rlhf_core.training.folder import ABOUT, SETTINGS, BestModel, WriteModel, claim_folder, write_model_files
from rlhf_core.training.metrics import Metrics, MetricWriter, StepMetrics
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.reference import require_same_shape, update_reference

C = TypeVar("C", bound=RunConfig)

# Settings that a resumed run may change: they do not affect the result.
_FREE_TO_CHANGE = {"output", "resume", "overwrite", "device", "progress", "tensorboard", "eval_every"}
_FREE_TO_CHANGE |= {"save_every", "keep_checkpoints"}
_FREE_IN_DATA = ("data.cache", "data.preview")  # also of eval_data and others
_MAX_BAD_STEPS = 5


class Interrupted(KeyboardInterrupt):
    """Raised when a run stopped on request, after its step was finished and saved."""


class NonFiniteError(FloatingPointError):
    """Raised when several steps in a row have a gradient that is not finite."""


class State(Protocol):
    """An object whose state, plain numbers, is part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


S = TypeVar("S", bound=State)
M = TypeVar("M", bound=nn.Module)
Convert = Callable[[Metrics], Metrics]
StepType = TypeVar("StepType", bound="Step")


class Run(Generic[C]):
    """See the module's docstring for an example.

    Args:
        config: settings; `config.job` names the job in messages and files.
        total_steps: number of steps; subclasses compute it from their data.
        evaluate: called as evaluate(run) when an evaluation is due; returns its metrics.
        show: names of the metrics on the progress bar and in the last message.

    Attributes:
        evaluation: metrics of the last evaluation. last_step: number of finished steps.
        reference: a model that follows the policy as `config.reference` says, None if there is none.
    """

    policy: PreTrainedModel
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        config: C,
        *,
        total_steps: int = 0,
        evaluate: Callable[[Any], Metrics] | None = None,
        show: Sequence[str] = (),
    ):
        self.config, self.job, self.folder = config, config.job, Path(config.output)
        self.total_steps, self.last_step = total_steps, 0
        self.evaluation: Metrics = {}
        self.reference: PreTrainedModel | None = None
        self.states: dict[str, State] = {}
        self._evaluate, self._show = evaluate, show
        self._models: dict[str, nn.Module] = {}
        self._trained: list[nn.Module] = []
        self._writers: list[WriteModel] = []
        self._about: dict[str, Any] = {}
        self._bar: tqdm[Any] | None = None
        self._stop_signal: int | None = None
        self._stop_requested = self._begun = self._complete = False
        self._bad_steps = 0

    def __enter__(self) -> Self:
        claim_folder(self.config)
        self._started = time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(use_kernels(self.config.kernels))
            torch.manual_seed(self.config.seed)
            self.load()
            self._on_exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._on_exit.close()
        if error is None and self._begun and not self._complete:
            raise RuntimeError(
                f"{self.job}: the loop left run.steps() in step {self.last_step + 1} of {self.total_steps}, before the "
                "step was finished and the model saved. Call run.stop() and finish the step instead of break"
            )

    # ---------------------------------------------------------------------------------- inside `with`, before the steps

    def load(self) -> None:
        """Load models and data; called on entering. Subclasses override it."""

    def add_model(self, name: str, model: M, *, trained: bool = True, write: WriteModel | None = None) -> M:
        """Add a model to the checkpoints; the optimizer updates it if `trained`. `write` saves it at the end."""
        self._models[name] = model
        if trained:
            self._trained.append(model)
        if write is not None:
            self._writers.append(write)
        return model

    def add_reference(self, model: PreTrainedModel, settings: ReferenceConfig) -> None:
        """Set the run's reference. One that moves is part of the checkpoints and is updated after every step.

        Raises ConfigError for a moving reference whose weights do not match the policy's.
        """
        self.reference, self._reference_settings = model, settings
        if settings.update != "none":
            require_same_shape(model, self.policy, settings)
            self.add_model("reference", model, trained=False)

    def add_state(self, name: str, state: S) -> S:
        """Add an object with state_dict and load_state_dict to the checkpoints."""
        self.states[name] = state
        return state

    def note(self, about: Mapping[str, Any]) -> None:
        """Add facts about the run to its run.json."""
        self._about.update(about)

    # ------------------------------------------------------------------------------------------------------- the steps

    def steps(self) -> Iterator[Step]:
        """Yield the steps from where the run stands to its end. Each is finished when the next one is asked for."""
        return self.iterate(lambda number: Step(self, number))

    def iterate(self, make_step: Callable[[int], StepType]) -> Iterator[StepType]:
        """Yield `make_step(number)` for each step, with everything that happens between steps."""
        self._begin()
        while self.last_step < self.total_steps and not self._stop_requested:
            number = self.last_step + 1
            # Layers that draw from torch's global generator, such as an adapter's dropout, repeat in a resumed run.
            torch.manual_seed(generator(self.config.seed, "step", number).initial_seed())
            step = make_step(number)
            yield step
            step.finish()
            self.last_step = number
            self._progress.update()
            due = self.config.save_every and number % self.config.save_every == 0
            if self._stop_signal is not None:
                self._interrupt(self._save_checkpoint())
            if due:
                self._save_checkpoint()
        self._save_models()
        self._complete = True

    def stop(self) -> None:
        """End the run after the current step, as if it were the last one: evaluate, and save the model."""
        self._stop_requested = True

    def before_steps(self) -> None:
        """Do what comes before the first step, after a checkpoint was read. Subclasses override it."""

    def update_weights(self, number: int) -> Metrics:
        """Clip the gradients, step the optimizer at this step's learning rate, and clear the gradients."""
        return optimizer_step(self.optimizer, self.config.optim, number, self.total_steps)

    def discard_gradients(self) -> None:
        """Clear the gradients without an optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)

    def finish_step(self, number: int, metrics: Metrics) -> Metrics:
        """Evaluate when due, write the metrics, and update a moving reference. Return all metrics."""
        if self._evaluate is not None and self.evaluation_due(number) and self.has_evaluation_data:
            self.evaluation = self._evaluate(self)
            metrics = metrics | self.evaluation
        self.log(number, metrics)
        if self.reference is not None:
            update_reference(self.reference, self.policy, number, self._reference_settings)
        return metrics

    @property
    def has_evaluation_data(self) -> bool:
        """Whether there is something to evaluate on."""
        return True

    def evaluation_due(self, number: int) -> bool:
        """Return whether an evaluation belongs to this step."""
        every = self.config.eval_every
        return number == self.total_steps or self._stop_requested or (every > 0 and number % every == 0)

    def log(self, number: int, metrics: Metrics) -> None:
        """Write the metrics of a step, show some of them, and keep the model if it is the best so far.

        Raises NonFiniteError after several steps in a row whose gradient was not finite.
        """
        metrics = {**metrics, "seconds": round(time.monotonic() - self._started, 3)}
        self._writer.write(number, metrics)
        if self.evaluation_due(number):
            self._best.update(number, metrics)
        shown = {name: f"{metrics[name]:.4g}" for name in self._show if name in metrics}
        if shown:
            self._progress.set_postfix(shown, refresh=False)
        if "grad_norm" in metrics:
            self._bad_steps = 0 if math.isfinite(metrics["grad_norm"]) else self._bad_steps + 1
            if self._bad_steps == _MAX_BAD_STEPS:
                raise NonFiniteError(
                    f"{self.job}: a gradient was not finite in each of the last {_MAX_BAD_STEPS} steps (to {number}); "
                    f"such a gradient changes no weight. See {self._writer.path}; a lower optim.lr is the usual cure."
                )

    def message(self, text: str) -> None:
        """Print a line to stderr without breaking the progress bar."""
        if self.config.progress:
            tqdm.write(text, file=sys.stderr)

    # ---------------------------------------------------------------------------------------------------------- inside

    @property
    def _progress(self) -> tqdm[Any]:
        assert self._bar is not None
        return self._bar

    def _begin(self) -> None:
        """Build the optimizer, resume, open the files, and take over the signals."""
        if self.config.keep_best is not None and not self._writers:
            raise ConfigError(f"keep_best={self.config.keep_best!r}: expected none, for {self.job} saves no model")
        self.optimizer = build_optimizer(self._trained, self.config.optim)
        self.last_step = self._resume() if self.config.resume else 0
        resumed = self.last_step > 0
        self._best = BestModel(self.folder, self.config.keep_best, self._write_models, resumed=resumed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_about()
        self._writer = MetricWriter(self.folder, tensorboard=self.config.tensorboard, resume_at=self.last_step)
        self._on_exit.callback(self._writer.close)
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.last_step,
            desc=self.job,
            unit="step",
            disable=not self.config.progress,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 20,  # a line now and then in a log file, not every step
        )
        self._on_exit.callback(self._bar.close)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._on_exit.callback(signal.signal, number, signal.signal(number, self._on_signal))
        self._begun = True
        self.before_steps()

    def _resume(self) -> int:
        checkpoint = newest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            return 0
        before = json.loads((checkpoint / "config.json").read_text())
        for name, old, new in _differences(before, self._fixed_settings()):
            if name.endswith(_FREE_IN_DATA):
                continue
            raise ConfigError(
                f"{name}={new!r}: the run in {self.folder} was started with {old!r}; a resumed run goes on as it began"
            )
        state = load_checkpoint(checkpoint, modules=self._models, optimizer=self.optimizer)
        for name, item in self.states.items():
            item.load_state_dict(state["states"][name])
        self._started -= state["seconds"]
        return int(state["step"])

    def _fixed_settings(self) -> dict[str, Any]:
        settings = {name: value for name, value in to_dict(self.config).items() if name not in _FREE_TO_CHANGE}
        return {"job": self.job, **settings}

    def _save_checkpoint(self) -> Path:
        return save_checkpoint(
            self.folder / "checkpoints",
            self.last_step,
            modules=self._models,
            optimizer=self.optimizer,
            config=self._fixed_settings(),
            state={
                "seconds": time.monotonic() - self._started,
                "states": {name: item.state_dict() for name, item in self.states.items()},
            },
            keep=self.config.keep_checkpoints,
        )

    def _write_about(self) -> None:
        (self.folder / SETTINGS).write_text(yaml.safe_dump(to_dict(self.config), sort_keys=False))
        about = {
            "job": self.job,
            "seed": self.config.seed,
            "total_steps": self.total_steps,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            **self._about,
        }
        (self.folder / ABOUT).write_text(json.dumps(about, indent=2))

    def _write_models(self, folder: Path) -> None:
        for write in self._writers:
            write(folder)

    def _save_models(self) -> None:
        if not self._writers:
            return
        write_model_files(self.folder, self._write_models)
        shown = {name: value for name, value in self.evaluation.items() if name in self._show} or self.evaluation
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        seconds = time.monotonic() - self._started
        self._progress.close()
        lines = [
            f"{self.last_step} steps in {seconds:.0f} s{'; ' + numbers if numbers else ''}",
            f"the model is in {self.folder}",
            self._best.describe(),
        ]
        if self.config.progress:
            print("\n".join(f"{self.job}: {line}" for line in lines if line is not None), file=sys.stderr)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal is not None:  # the second signal stops at once
            raise KeyboardInterrupt
        self._stop_signal = number
        self.message(f"{self.job}: finishing this step, then stopping (again to stop at once)")

    def _interrupt(self, checkpoint: Path) -> None:
        raise Interrupted(
            f"{self.job}: stopped after step {self.last_step} of {self.total_steps}. Kept {checkpoint}; "
            "the same command with --resume goes on from there."
        )


class Step:
    """One optimizer step: gradients of its micro-batches, and its metrics."""

    def __init__(self, run: Run[Any], number: int):
        self.run, self.number = run, number
        self.metrics = StepMetrics()
        self._result: Metrics | None = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the loss."""
        loss.backward()

    def update(self) -> Metrics:
        """Make the optimizer step; return its metrics."""
        return self.run.update_weights(self.number)

    def finish(self, convert: Convert | None = None) -> Metrics:
        """End the step, once; return its metrics, after `convert` was applied to them."""
        if self._result is None:
            self.metrics.set(self.update())
            metrics = self.metrics.read()
            self._result = self.run.finish_step(self.number, metrics if convert is None else convert(metrics))
        return self._result


def _differences(before: dict[str, Any], now: dict[str, Any], group: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, value before, value now) of every setting that changed."""
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value, f"{group}{name}.")
        elif old != value:
            yield group + name, old, value
