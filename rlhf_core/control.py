"""Controllers of the KL price."""

from __future__ import annotations

import math


class FixedKL:
    """A price that does not change."""

    def __init__(self, kl_coef: float):
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef={kl_coef}: expected 0 or more")
        self.kl_coef = kl_coef

    def update(self, kl: float, num_sequences: int) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state["kl_coef"]


class AdaptiveKL(FixedKL):
    """Steers the measured KL to a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

        error = clip(kl / target - 1, -0.2, 0.2);   kl_coef *= 1 + error * num_sequences / horizon

    `target` is in nats a completion (the sum over its tokens, averaged over completions); `horizon` in completions. A
    batch larger than the horizon counts as one horizon, so that a step moves the price by at most 20 %, never below 0.
    """

    def __init__(self, kl_coef: float, *, target: float, horizon: int):
        super().__init__(kl_coef)
        if kl_coef == 0:
            raise ValueError("kl_coef=0: an adaptive price multiplies, so it must start above 0")
        if not target > 0:
            raise ValueError(f"kl_target={target}: expected more than 0")
        if not horizon > 0:
            raise ValueError(f"kl_horizon={horizon}: expected more than 0")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, num_sequences: int) -> None:
        """`kl`: the mean over this batch's completions of their summed token KL, in nats. NaN changes nothing."""
        if math.isnan(kl):
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * min(num_sequences / self.horizon, 1.0)
