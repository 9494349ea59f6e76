"""Whether log-probs recorded while sampling may replace those of a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_core.models.forward import PolicyOutputs
from rlhf_core.rollout.experience import Experience

RECORDED_TOLERANCE = 1e-3
"""Largest allowed difference, in nats, between a recorded log-prob and that of a forward: 0.1 % of the ratio."""


class RecordedLogprobs:
    """The setting `recorded`, and once it was checked in the run, whether recorded log-probs are usable.

    `usable` is None until the first rollout was compared with a forward; checkpoints keep it.
    """

    def __init__(self, choice: str):
        self.choice = choice
        self.usable: bool | None = False if choice == "off" else None

    @property
    def wanted(self) -> bool:
        """Whether the engine should record what a forward would compute."""
        return self.usable is not False

    def check(
        self, experience: Experience, outputs: PolicyOutputs, rows: Tensor | slice, *, whole_completions: bool
    ) -> str | None:
        """Compare recorded log-probs and values with those of a forward, in the given rows, and set `usable`.

        Args:
            whole_completions: compare sums over completions, for losses whose ratio is that of whole completions.

        Returns the reason if they are not usable. Raises ValueError if choice="on" and they are not.
        """
        difference = (experience.logprobs - outputs.logprobs)[rows]
        gaps = [(difference.sum(-1) if whole_completions else difference).abs().max()]
        if experience.values is not None and outputs.values is not None:
            relative = (experience.values - outputs.values) / outputs.values.abs().clamp(min=1)
            gaps.append(relative[rows].abs().max())
        gap = torch.stack(gaps).max().item()
        self.usable = gap <= RECORDED_TOLERANCE  # False for NaN
        if self.usable:
            return None
        reason = f"recorded log-probs differ from a forward by {gap:.2g}, more than {RECORDED_TOLERANCE}"
        if self.choice == "on":
            raise ValueError(f"recorded='on': {reason}; expected 'off' or 'auto' for this model")
        return reason

    def state_dict(self) -> dict[str, Any]:
        return {"usable": self.usable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usable = state["usable"]
