"""The metrics of a step, and the files that a run writes them to: metrics.jsonl, and TensorBoard on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, float]
"""What a step or an evaluation reports, by name."""


class StepMetrics:
    """The metrics of one step, combined from its micro-batches. Tensors stay on their device until `read`.

    This is the one place where numbers of several micro-batches become one: weighted means, sums, maxima, and numbers
    that are set once.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor | float] = {}
        self._weights: dict[str, Tensor | float] = {}
        self._sums: dict[str, Tensor | float] = {}
        self._maxima: dict[str, Tensor] = {}
        self._values: Metrics = {}

    def mean(self, values: Mapping[str, Tensor | float], weight: Tensor | float = 1.0) -> None:
        """Add values to the weighted means of their names."""
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, 0.0) + _detached(value) * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def sum(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values to the sums of their names."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + _detached(value)

    def maximum(self, name: str, value: Tensor) -> None:
        """Keep the larger of this value and the earlier ones; NaN stays."""
        before = self._maxima.get(name)
        self._maxima[name] = value.detach() if before is None else torch.maximum(before, value.detach())

    def set(self, values: Mapping[str, float]) -> None:
        """Set numbers that are not combined; the last one counts."""
        self._values.update(values)

    def total(self, name: str) -> Tensor | float:
        """Return the weighted sum of a name so far, 0 if there is none."""
        return self._totals.get(name, 0.0)

    def largest(self, name: str) -> Tensor:
        """Return the maximum of a name so far."""
        return self._maxima[name]

    def read(self) -> Metrics:
        """Return everything as plain numbers. Waits for the device."""
        means = {name: float(total / self._weights[name]) for name, total in self._totals.items()}
        sums = {name: value.item() if isinstance(value, Tensor) else value for name, value in self._sums.items()}
        maxima = {name: value.item() for name, value in self._maxima.items()}
        return means | sums | maxima | self._values


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


class MetricWriter:
    """Append one JSON object per step to metrics.jsonl. A run that resumes at a step drops the lines after it."""

    def __init__(self, folder: Path, *, tensorboard: bool = False, resume_at: int = 0):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= resume_at]
            shorter = self.path.with_suffix(".tmp")
            shorter.write_text("".join(line + "\n" for line in kept))
            shorter.replace(self.path)
        self._file = self.path.open("a")
        self._board = _board(folder / "tensorboard", resume_at) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of a step."""
        # JSON has no NaN. Numbers that are not finite are written as text, never as 0.
        row = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close all files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    """Return the step of a line, infinity for a line that was cut when its process was killed."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def _board(folder: Path, resume_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs TensorBoard: pip install 'rlhf-core[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=resume_at + 1)
