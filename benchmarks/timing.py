"""Time several functions in one process: a warm-up, then in turns, and the median of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(sides: dict[str, Callable[[], object]], *, repeats: int = 7) -> dict[str, float]:
    """Return the median seconds of each side. They take turns, so that a change in the load affects all of them."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
