"""The output folder of a run: checks before anything is written, and the best model by an evaluation metric."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_core.config import ConfigError, DataConfig, RunConfig, did_you_mean
from rlhf_core.models.adapters import base_of
from rlhf_core.models.load import default_device
from rlhf_core.ops.logprobs import require_kernels

SETTINGS, ABOUT = "run.yaml", "run.json"
BEST, BEST_ABOUT = "best", "best.json"
_LESS_IS_BETTER = ("loss", "nll", "kl", "error", "perplexity")

WriteModel = Callable[[Path], None]


def claim_folder(config: RunConfig) -> None:
    """Check that the output folder may be written, and empty it where `overwrite` is set, before any other work.

    Raises ConfigError where the folder holds something and neither resume nor overwrite is set, and where writing to it
    would destroy files that no run has made or that this run reads. A preview of the data writes nothing.
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
        raise ConfigError(f"output={config.output!r}: expected a folder, found a file")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (config.resume or config.overwrite):
        raise ConfigError(
            f"output={config.output!r}: the folder is not empty. --resume continues its run, --overwrite starts anew"
        )
    for path in _inputs(config):
        if Path(path).exists() and folder.resolve() in [Path(path).resolve(), *Path(path).resolve().parents]:
            raise ConfigError(f"output={config.output!r}: writing to it would destroy the input {path}")
    if not (folder / ABOUT).exists():
        raise ConfigError(
            f"output={config.output!r}: not the folder of a run (it has no {ABOUT}), so nothing in it is touched"
        )
    if config.overwrite:
        shutil.rmtree(folder)


def _inputs(config: RunConfig) -> list[str]:
    """Return every path that the run reads, including the base models of adapters."""
    groups = [value for value in vars(config).values() if getattr(value, "path", None)]
    paths = [path for value in groups for path in (value.paths() if isinstance(value, DataConfig) else [value.path])]
    return paths + [base for path in paths if Path(path).is_dir() and (base := base_of(path))]


class BestModel:
    """The model that was best by an evaluation metric so far, kept in `folder`/best.

    Args:
        metric: its name; None keeps nothing. write: writes the model as it is now into a folder. resumed: whether the
            run continues an earlier one, whose best model is then kept.
    """

    def __init__(self, folder: Path, metric: str | None, write: WriteModel, *, resumed: bool):
        self.folder, self.metric, self._write = folder, metric, write
        self.best: dict[str, Any] | None = None
        best, older = folder / BEST, folder / f".{BEST}-old"
        # A model may be from a later step than the checkpoint that a crashed run continues from: the steps between are
        # repeated bit for bit, so it belongs to this run.
        if not resumed:
            shutil.rmtree(best, ignore_errors=True)
        elif older.exists() and not best.exists():  # killed between two renames
            older.replace(best)
        shutil.rmtree(older, ignore_errors=True)
        if (best / BEST_ABOUT).exists():
            self.best = json.loads((best / BEST_ABOUT).read_text())

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the model if no earlier evaluation was as good. NaN is never the best.

        Raises ConfigError if the evaluation has no metric of that name.
        """
        if self.metric is None:
            return
        if self.metric not in metrics:
            known = [each for each in metrics if each.startswith("eval_")]
            hint = did_you_mean(self.metric, known)
            raise ConfigError(f"keep_best={self.metric!r}: expected one of {', '.join(sorted(known))}{hint}")
        value, sign = metrics[self.metric], -1 if any(part in self.metric for part in _LESS_IS_BETTER) else 1
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best["value"]):
            return
        self.best = {"metric": self.metric, "value": value, "step": step}
        best, older, temporary = (self.folder / each for each in (BEST, f".{BEST}-old", f".{BEST}"))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self._write(temporary)
        (temporary / BEST_ABOUT).write_text(json.dumps(self.best, indent=2))
        if best.exists():
            best.replace(older)
        temporary.replace(best)
        shutil.rmtree(older, ignore_errors=True)

    def describe(self) -> str | None:
        """Return a sentence about the best model, None if there is none."""
        if self.best is None:
            return None
        text = "{metric} {value:.4g} at step {step}".format(**self.best)
        return f"the best model ({text}) is in {self.folder / BEST}"


def write_model_files(folder: Path, write: WriteModel) -> None:
    """Write the trained model into the run's folder, every file of it whole or not at all."""
    temporary = folder / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    for path in temporary.iterdir():
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    temporary.rmdir()
