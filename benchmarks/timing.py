"""Fair timing of two sides in one process: interleaved, after a warm-up, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(sides: dict[str, Callable[[], object]], *, repeats: int = 7) -> dict[str, float]:
    """Median seconds of each side; they take turns, so what disturbs the machine disturbs all alike."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
