"""Controllers of the KL price."""

from __future__ import annotations


class FixedKL:
    """A price that does not change."""

    def __init__(self, kl_coef: float):
        if kl_coef < 0:
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

    `target` is in nats a completion (the sum over its tokens, averaged over completions); `horizon` in completions.
    """

    def __init__(self, kl_coef: float, *, target: float, horizon: int):
        super().__init__(kl_coef)
        if kl_coef == 0:
            raise ValueError("kl_coef=0: an adaptive price multiplies, so it must start above 0")
        if target <= 0:
            raise ValueError(f"kl_target={target}: expected more than 0")
        if horizon <= 0:
            raise ValueError(f"kl_horizon={horizon}: expected more than 0")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, num_sequences: int) -> None:
        """`kl`: the mean over this batch's completions of their summed token KL, in nats."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * num_sequences / self.horizon
