"""A run's life: its folder, its progress bar, its metrics, its checkpoints, and how it ends.

with Run("dpo", config, total_steps, modules={"policy": policy}, optimizer=optimizer) as run:
    for step in run.steps():
        ...
        run.log(step, {"loss": loss, ...}, show=("loss", "accuracy", "margin"))
    run.save(lambda folder: save_model(folder, policy, tokenizer))

With `write=` given to Run, what it writes into a folder is what `run.save()` saves, and what keep_best keeps. What is
in `about=` is kept in run.json.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from rlhf_core.config import ConfigError, DataConfig, RunConfig, did_you_mean, to_dict
from rlhf_core.models.adapters import base_of
from rlhf_core.models.load import default_device
from rlhf_core.ops.logprobs import require_kernels, use_kernels
from rlhf_core.seeding import generator
from rlhf_core.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, versions
from rlhf_core.training.metrics import MetricWriter

SETTINGS, ABOUT = "run.yaml", "run.json"
BEST, BEST_ABOUT = "best", "best.json"
_LESS_IS_BETTER = ("loss", "nll", "kl", "error", "perplexity")

# Settings that a resumed run may change: they do not touch what is learned.
_FREE_TO_CHANGE = {"output", "resume", "overwrite", "device", "progress", "tensorboard", "eval_every"}
_FREE_TO_CHANGE |= {"save_every", "keep_checkpoints"}
_FREE_IN_DATA = ("data.cache", "data.preview")  # of eval_data and others too
_MAX_BAD_STEPS = 5


class Interrupted(KeyboardInterrupt):
    """Raised when a run stopped on request, after its step was finished and saved."""


class NonFiniteError(FloatingPointError):
    """Raised when step after step has a gradient that is not finite."""


class Run:
    """See the module's own example. `controllers` are other objects with state_dict and load_state_dict of numbers."""

    def __init__(
        self,
        job: str,
        config: RunConfig,
        total_steps: int,
        *,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        controllers: Mapping[str, Any] | None = None,
        write: Callable[[Path], None] | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        if config.keep_best is not None and write is None:
            raise ConfigError(f"keep_best={config.keep_best!r}: expected none, for {job} keeps the last model alone")
        self.job, self.config, self.total_steps = job, config, total_steps
        self.folder = Path(config.output)
        self._modules, self._optimizer, self._controllers = modules, optimizer, controllers or {}
        self._write, self._best, self._about = write, None, about or {}
        self._stop_signal: int | None = None
        self._bad_steps = 0
        self.last_step = 0

    def __enter__(self) -> Run:
        self._started = time.monotonic()
        self.last_step = self._resume() if self.config.resume else 0  # also moves _started
        self._find_best()
        if self.last_step == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._write_about()
        self._writer = MetricWriter(self.folder, tensorboard=self.config.tensorboard, resume_at=self.last_step)
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.last_step,
            desc=self.job,
            unit="step",
            disable=not self.config.progress,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 20,  # a log file gets a line now and then, not every step
        )
        self._old_handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        self._kernels = use_kernels(self.config.kernels)
        self._kernels.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._kernels.__exit__(None, None, None)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._bar.close()
        self._writer.close()

    def steps(self) -> Iterator[int]:
        """Step numbers from where the run stands to the end; between two of them, checkpoints and interruptions."""
        while self.last_step < self.total_steps:
            # What draws from torch's own numbers, an adapter's dropout, draws the same in a resumed run.
            torch.manual_seed(generator(self.config.seed, "step", self.last_step + 1).initial_seed())
            yield self.last_step + 1
            self.last_step += 1
            self._bar.update()
            due = self.config.save_every and self.last_step % self.config.save_every == 0
            if self._stop_signal is not None:
                self._interrupt(self._save_checkpoint())
            if due:
                self._save_checkpoint()

    def evaluate_now(self, step: int) -> bool:
        every = self.config.eval_every
        return step == self.total_steps or (every > 0 and step % every == 0)

    def log(self, step: int, metrics: dict[str, Any], *, show: tuple[str, ...] = ()) -> None:
        """Write the metrics of a step and show the few that matter. Counts steps whose gradient is not finite."""
        metrics = {**metrics, "seconds": round(time.monotonic() - self._started, 3)}
        self._writer.write(step, metrics)
        if self.config.keep_best is not None and self.evaluate_now(step):
            self._keep_if_best(step, metrics)
        if show:
            self._bar.set_postfix({name: f"{metrics[name]:.4g}" for name in show if name in metrics}, refresh=False)
        if "grad_norm" in metrics:
            self._bad_steps = 0 if math.isfinite(metrics["grad_norm"]) else self._bad_steps + 1
            if self._bad_steps == _MAX_BAD_STEPS:
                raise NonFiniteError(
                    f"{self.job}: a gradient was not finite in each of the last {_MAX_BAD_STEPS} steps (to {step}); "
                    f"such a gradient changes no weight. See {self._writer.path}; a lower optim.lr is the usual cure."
                )

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.config.progress:
            self._bar.write(text, file=sys.stderr)

    def save(self, write: Callable[[Path], None] | None = None, summary: Mapping[str, float] | None = None) -> None:
        """Write the trained model into the run's folder, no file of it by halves, and say the last word."""
        write = write or self._write
        temporary = self.folder / ".saving"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        for path in temporary.iterdir():
            target = self.folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        temporary.rmdir()
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in (summary or {}).items())
        seconds = time.monotonic() - self._started
        self._bar.close()
        if self.config.progress:
            print(
                f"{self.job}: {self.total_steps} steps in {seconds:.0f} s{'; ' + numbers if numbers else ''}\n"
                f"{self.job}: the model is in {self.folder}{self._say_best()}",
                file=sys.stderr,
            )

    # --------------------------------------------------------------------------------------------------- the best one

    def _find_best(self) -> None:
        """What an earlier part of this run found best. What another run left there is no business of this one.

        A model may be from a later step than the checkpoint that a crashed run goes on from: the steps between are
        done again to the bit, so it is theirs.
        """
        best, older = self.folder / BEST, self.folder / f".{BEST}-old"
        if self.last_step == 0:
            shutil.rmtree(best, ignore_errors=True)
        elif older.exists() and not best.exists():  # killed between two renames
            older.replace(best)
        shutil.rmtree(older, ignore_errors=True)
        if (best / BEST_ABOUT).exists():
            self._best = json.loads((best / BEST_ABOUT).read_text())

    def _keep_if_best(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the model as it is now into output/best, if no evaluation before was as good. NaN is never good."""
        name = self.config.keep_best
        if name not in metrics:
            known = [each for each in metrics if each.startswith("eval_")]
            hint = did_you_mean(name, known)
            raise ConfigError(f"keep_best={name!r}: expected one of {', '.join(sorted(known))}{hint}")
        value, sign = metrics[name], -1 if any(part in name for part in _LESS_IS_BETTER) else 1
        if not math.isfinite(value) or (self._best is not None and sign * value <= sign * self._best["value"]):
            return
        self._best = {"gauge": name, "value": value, "step": step}
        best, older, temporary = (self.folder / each for each in (BEST, f".{BEST}-old", f".{BEST}"))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self._write(temporary)
        (temporary / BEST_ABOUT).write_text(json.dumps(self._best, indent=2))
        if best.exists():
            best.replace(older)
        temporary.replace(best)
        shutil.rmtree(older, ignore_errors=True)

    def _say_best(self) -> str:
        if self._best is None:
            return ""
        text = "{gauge} {value:.4g} at step {step}".format(**self._best)
        return f"\n{self.job}: the best one ({text}) is in {self.folder / BEST}"

    # ------------------------------------------------------------------------------------------------------- inside

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
        state = load_checkpoint(checkpoint, modules=self._modules, optimizer=self._optimizer)
        for name, controller in self._controllers.items():
            controller.load_state_dict(state["controllers"][name])
        self._started -= state["seconds"]
        return state["step"]

    def _fixed_settings(self) -> dict[str, Any]:
        settings = {name: value for name, value in to_dict(self.config).items() if name not in _FREE_TO_CHANGE}
        return {"job": self.job, **settings}

    def _save_checkpoint(self) -> Path:
        return save_checkpoint(
            self.folder / "checkpoints",
            self.last_step,
            modules=self._modules,
            optimizer=self._optimizer,
            config=self._fixed_settings(),
            state={
                "seconds": time.monotonic() - self._started,
                "controllers": {name: item.state_dict() for name, item in self._controllers.items()},
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

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stop_signal is not None:  # asked twice: stop now
            raise KeyboardInterrupt
        self._stop_signal = number
        self.say(f"{self.job}: finishing this step, then stopping (again to stop at once)")

    def _interrupt(self, checkpoint: Path) -> None:
        raise Interrupted(
            f"{self.job}: stopped after step {self.last_step} of {self.total_steps}. Kept {checkpoint}; "
            "the same command with --resume goes on from there."
        )


def claim_folder(config: RunConfig) -> None:
    """Make sure, before any work is done, that the output folder may be written, and empty it if that was asked for.

    Raises ConfigError where it holds something and neither resume nor overwrite says what to do with it, and where
    writing to it would destroy what no run has made or what this one is to read. A preview of the data writes nothing.
    """
    if any(isinstance(value, DataConfig) and value.preview for value in vars(config).values()):
        return
    try:
        require_kernels(config.kernels, config.device or default_device())
    except RuntimeError as error:
        raise ConfigError(f"kernels={config.kernels!r}: {error}") from None
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("tensorboard=True: TensorBoard is missing; pip install 'rlhf-core[tensorboard]'")
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={config.output!r}: a file is in the way")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (config.resume or config.overwrite):
        raise ConfigError(
            f"output={config.output!r}: the folder is not empty. --resume continues its run, --overwrite starts anew"
        )
    groups = [value for value in vars(config).values() if getattr(value, "path", None)]
    inputs = [path for value in groups for path in (value.paths() if isinstance(value, DataConfig) else [value.path])]
    inputs += [base for path in inputs if Path(path).is_dir() and (base := base_of(path))]  # an adapter's model
    for path in inputs:
        if Path(path).exists() and folder.resolve() in [Path(path).resolve(), *Path(path).resolve().parents]:
            raise ConfigError(f"output={config.output!r}: writing to it would destroy the input {path}")
    if not (folder / ABOUT).exists():
        raise ConfigError(f"output={config.output!r}: no run's folder (it has no {ABOUT}), so nothing in it is touched")
    if config.overwrite:
        shutil.rmtree(folder)


def _differences(before: dict[str, Any], now: dict[str, Any], group: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value before, value now) of every setting that changed."""
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value, f"{group}{name}.")
        elif old != value:
            yield group + name, old, value
