"""Controllers: the price of KL, when to stop a batch's updates, running means, and the running moments of scores.

Each gives its state as plain numbers and takes it back, so a checkpoint holds it as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable


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


class LinearKL(FixedKL):
    """A price that moves in a straight line from `start` to `end` over `num_updates` updates, and stays there.

        kl_coef after update u = start + (end - start) * min(u / num_updates, 1)

    What KL was measured does not matter.
    """

    def __init__(self, start: float, end: float, num_updates: int):
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: expected a price, 0 or more")
        if not num_updates > 0:
            raise ValueError(f"num_updates={num_updates}: expected more than 0")
        super().__init__(start)
        self.start, self.end, self.num_updates, self.updates = start, end, num_updates, 0

    def update(self, kl: float, num_sequences: int) -> None:
        self.updates += 1
        share = min(self.updates / self.num_updates, 1.0)
        self.kl_coef = self.start * (1 - share) + self.end * share

    def state_dict(self) -> dict[str, float]:
        return super().state_dict() | {"updates": self.updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.updates = state["updates"]


class KLEarlyStop:
    """Ends a batch's updates once the policy has moved far enough from the one that sampled it.

        stop where approx_kl > factor * kl_target    (1.5 in Spinning Up's PPO, J. Achiam 2018)

    `approx_kl` in nats a token, between the policy now and when it sampled. NaN stops: a comparison with it is false
    either way, and a policy whose distance cannot be measured is not one to go on with. `stops` counts.
    """

    def __init__(self, kl_target: float, *, factor: float = 1.5):
        for name, value in (("kl_target", kl_target), ("factor", factor)):
            if not value > 0:
                raise ValueError(f"{name}={value}: expected more than 0")
        self.kl_target, self.factor, self.stops = kl_target, factor, 0

    def stop(self, approx_kl: float) -> bool:
        """Whether to stop here."""
        far = not approx_kl <= self.factor * self.kl_target
        self.stops += far
        return far

    def state_dict(self) -> dict[str, int]:
        return {"stops": self.stops}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stops = state["stops"]


class RunningMean:
    """The mean of all values so far or, with a momentum m, mostly of the late ones; 0 before the first.

    mean = (sum of value * count) / (sum of count)        or        mean = m * mean + (1 - m) * value
    """

    def __init__(self, momentum: float | None = None):
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: expected 0 <= momentum < 1")
        self.momentum, self.mean, self.count = momentum, 0.0, 0

    def update(self, value: float, count: int = 1) -> None:
        """`value` is itself the mean of so many. One that is not finite changes nothing."""
        if count == 0 or not math.isfinite(value):
            return
        self.count += count
        share = count / self.count if self.momentum is None else 1 - self.momentum
        self.mean += share * (value - self.mean)

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.count = state["mean"], state["count"]


class RunningMoments:
    """Count, mean and spread of all values seen, merged batch by batch (Chan, Golub and LeVeque 1979).

        mean = mean_a + (mean_b - mean_a) * n_b / n
        m2   = m2_a + m2_b + (mean_b - mean_a)^2 * n_a * n_b / n    the sum of squared deviations; n = n_a + n_b

    How the values were cut into batches does not matter, and values far from 0 keep the digits of their spread. All in
    Python's floats, which are float64.

    `var` divides by n - 1 and `std` is its root: what was seen is a sample of what will come. Both are 0 before the
    second value, as is `mean` before the first.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Iterable[float], mask: Iterable[bool] | None = None, *, all_ranks: bool = False) -> None:
        """Takes in a tensor of any shape or a sequence of numbers; `mask`, of the same shape, is True where they count.

        With `all_ranks`, where torch.distributed runs, all that the ranks give: each must call it, and all then hold
        the same.

        Raises ValueError for a number that is not finite, where it counts, and a mask of another size. Then nothing
        has been taken in. With `all_ranks` every rank raises, so that none waits for another.
        """
        numbers = _flat(values)
        if mask is not None:
            kept = _flat(mask)
            if len(kept) != len(numbers):
                raise ValueError(f"mask of {len(kept)} places for {len(numbers)} values")
            numbers = [number for number, keep in zip(numbers, kept, strict=True) if keep]
        if all_ranks:
            numbers = _of_all_ranks(numbers)
        for number in numbers:
            if not math.isfinite(number):
                raise ValueError(f"values hold {number}: expected finite numbers")
        if not numbers:
            return
        mean = math.fsum(numbers) / len(numbers)
        m2 = math.fsum((number - mean) ** 2 for number in numbers)
        total, distance = self.count + len(numbers), mean - self.mean
        self.m2 += m2 + distance**2 * self.count * len(numbers) / total
        self.mean += distance * len(numbers) / total
        self.count = total

    @property
    def var(self) -> float:
        return self.m2 / (self.count - 1) if self.count > 1 else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.var)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]


def _flat(values: Iterable[float]) -> list[float]:
    """Python numbers: of a tensor or any array, all of them; of a sequence, its items."""
    return values.flatten().tolist() if hasattr(values, "flatten") else [float(value) for value in values]


def _of_all_ranks(numbers: list[float]) -> list[float]:
    """The numbers of every rank, in the ranks' order; these alone where there is one process."""
    from torch import distributed  # the rest of this module needs no torch

    if not (distributed.is_available() and distributed.is_initialized()):
        return numbers
    parts: list[list[float]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, numbers)
    return [number for part in parts for number in part]
