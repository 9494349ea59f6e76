"""What a run writes down: metrics.jsonl always, TensorBoard on request."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch


class Averages:
    """Weighted means of named numbers over the micro-batches of a step. Tensors stay on their device until read."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}

    def add(self, stats: dict[str, Any], weight: Any = 1.0) -> None:
        for name, value in stats.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        return {name: float(total / self._weights[name]) for name, total in self._sums.items()}


class MetricWriter:
    """Appends one JSON object a step to metrics.jsonl; a run that resumes at a step drops the lines after it."""

    def __init__(self, folder: Path, *, tensorboard: bool = False, resume_at: int = 0):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= resume_at]
            shorter = self.path.with_suffix(".tmp")
            shorter.write_text("".join(line + "\n" for line in kept))
            shorter.replace(self.path)
        self._file = self.path.open("a")
        self._board = _board(folder / "tensorboard", resume_at) if tensorboard else None

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        # JSON has no NaN. A number that is not finite is written as a text, never as 0.
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
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    """Infinite for a line that was torn when its process was killed."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _board(folder: Path, resume_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs TensorBoard: pip install 'rlhf-core[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=resume_at + 1)
