"""Controllers: the KL coefficient, when to stop a rollout's updates, running means, and running moments of scores.

Each returns its state as plain numbers and loads it again, so that a checkpoint stores it as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rlhf_core.config import KLConfig


class FixedKL:
    """A constant KL coefficient."""

    def __init__(self, kl_coef: float):
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef={kl_coef}: expected 0 or more")
        self.kl_coef = kl_coef

    def update(self, kl: float, num_sequences: int) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.kl_coef = state["kl_coef"]


class AdaptiveKL(FixedKL):
    """A KL coefficient that steers the measured KL to a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

        error = clip(kl / target - 1, -0.2, 0.2);   kl_coef *= 1 + error * num_sequences / horizon

    A batch larger than the horizon counts as one horizon, so that a step changes the coefficient by at most 20 %.

    Args:
        kl_coef: initial coefficient, more than 0.
        target: KL in nats per completion: the sum over its tokens, averaged over completions.
        horizon: in completions.
    """

    def __init__(self, kl_coef: float, *, target: float, horizon: int):
        super().__init__(kl_coef)
        if kl_coef == 0:
            raise ValueError("kl_coef=0: expected more than 0, because an adaptive coefficient is multiplied")
        if not target > 0:
            raise ValueError(f"target={target}: expected more than 0")
        if not horizon > 0:
            raise ValueError(f"horizon={horizon}: expected more than 0")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, num_sequences: int) -> None:
        """Update the coefficient after a batch; a NaN changes nothing.

        Args:
            kl: mean over the batch's completions of their KL, summed over tokens, in nats.
            num_sequences: completions in the batch.
        """
        if math.isnan(kl):
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * min(num_sequences / self.horizon, 1.0)


class LinearKL(FixedKL):
    """A KL coefficient that moves linearly from `start` to `end` over `num_updates` updates, then stays.

        kl_coef after update u = start + (end - start) * min(u / num_updates, 1)

    The measured KL has no effect.
    """

    def __init__(self, start: float, end: float, num_updates: int):
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: expected a finite coefficient, 0 or more")
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

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        super().load_state_dict(state)
        self.updates = int(state["updates"])


def kl_controller(config: KLConfig, total_steps: int) -> FixedKL:
    """Return the controller of the KL coefficient. A linear one is `coef` at the first step and `coef_end` at the
    last."""
    assert config.coef is not None, "a loss's own coefficient is resolved by its job's config"
    if config.control == "linear":
        return LinearKL(config.coef, config.coef_end, max(total_steps - 1, 1))
    if config.adapts:
        assert config.target is not None
        return AdaptiveKL(config.coef, target=config.target, horizon=config.horizon)
    return FixedKL(config.coef)


class KLEarlyStop:
    """Ends the updates on a rollout once the policy has moved far enough from the policy that sampled it.

        stop where approx_kl > factor * kl_target    (1.5 in Spinning Up's PPO, J. Achiam 2018)

    Attributes:
        stops: how often `stop` was True.
    """

    def __init__(self, kl_target: float, *, factor: float = 1.5):
        for name, value in (("kl_target", kl_target), ("factor", factor)):
            if not value > 0:
                raise ValueError(f"{name}={value}: expected more than 0")
        self.kl_target, self.factor, self.stops = kl_target, factor, 0

    def stop(self, approx_kl: float) -> bool:
        """Return whether to stop. A NaN stops: no update is safe if the distance cannot be measured.

        Args:
            approx_kl: KL in nats per token between the policy now and the policy that sampled.
        """
        far = not approx_kl <= self.factor * self.kl_target
        self.stops += far
        return far

    def state_dict(self) -> dict[str, int]:
        return {"stops": self.stops}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.stops = state["stops"]


class RunningMean:
    """The mean of all values so far, or with a momentum m an exponential moving average; 0 before the first value.

    mean = (sum of value * count) / (sum of count)        or        mean = m * mean + (1 - m) * value
    """

    def __init__(self, momentum: float | None = None):
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: expected 0 <= momentum < 1")
        self.momentum, self.mean, self.count = momentum, 0.0, 0

    def update(self, value: float, count: int = 1) -> None:
        """Add `value`, itself the mean of `count` values. A value that is not finite is ignored."""
        if count == 0 or not math.isfinite(value):
            return
        self.count += count
        share = count / self.count if self.momentum is None else 1 - self.momentum
        self.mean += share * (value - self.mean)

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.mean, self.count = state["mean"], int(state["count"])


class RunningMoments:
    """Count, mean and variance of all values so far, merged batch by batch (Chan, Golub and LeVeque 1979).

        mean = mean_a + (mean_b - mean_a) * n_b / n
        m2   = m2_a + m2_b + (mean_b - mean_a)^2 * n_a * n_b / n    the sum of squared deviations; n = n_a + n_b

    The result does not depend on how the values are split into batches, and is exact for values far from 0. All numbers
    are Python floats, which are float64.

    `var` is the sample variance (it divides by n - 1) and `std` its square root. Both are 0 before the second value;
    `mean` is 0 before the first.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Iterable[float], mask: Iterable[bool] | None = None, *, all_ranks: bool = False) -> None:
        """Add values.

        Args:
            values: a tensor of any shape or a sequence of numbers.
            mask: of the same shape; True where a value counts.
            all_ranks: add the values of all ranks of torch.distributed, if it runs. Every rank must call this, and all
                then have the same state.

        Raises ValueError, before anything is added, for a value that counts but is not finite and for a mask of another
        size. With `all_ranks` every rank raises, so that none waits for another.
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

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), state["mean"], state["m2"]


def _flat(values: Iterable[float]) -> list[float]:
    """Return all numbers of a tensor or array of any shape, or of a sequence, as Python numbers."""
    return values.flatten().tolist() if hasattr(values, "flatten") else [float(value) for value in values]


def _of_all_ranks(numbers: list[float]) -> list[float]:
    """Return the numbers of every rank, in the order of the ranks; these alone if there is one process."""
    from torch import distributed  # the rest of this module needs no torch

    if not (distributed.is_available() and distributed.is_initialized()):
        return numbers
    parts: list[list[float]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, numbers)
    return [number for part in parts for number in part]
