"""Time on the device, and its ceilings: copy bandwidth and matrix product rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Written before each timed call: more than any L2 cache, and long enough that the call is queued meanwhile.
FLUSH_BYTES = 1 << 30


@dataclass
class Ceilings:
    """Measured rates of this device."""

    copy_bytes: float  # bytes per second, read and written together
    product_flops: float  # bf16 matrix products

    def __str__(self) -> str:
        return f"copy {self.copy_bytes / 1e12:.2f} TB/s, bf16 products {self.product_flops / 1e12:.0f} TFLOP/s"


@dataclass
class Side:
    """One contestant: `run` is timed, with the results of `prepare`, which is not timed."""

    run: Callable
    prepare: Callable[[], tuple] = lambda: ()
    seconds: list[float] = field(default_factory=list)


class Clock:
    """Measures seconds of single calls, each after a flush of the caches."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.on_cuda else 1
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, side: Side) -> float:
        arguments = side.prepare()
        self.flush.zero_()
        if not self.on_cuda:
            start = time.perf_counter()
            side.run(*arguments)
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = side.run(*arguments)
        end.record()
        end.synchronize()
        del result, arguments
        return start.elapsed_time(end) / 1e3

    def rounds(self, sides: dict[str, Side], *, budget: float, most: int = 15) -> None:
        """Time the sides in turns until `budget` seconds are spent, at least three times each.

        In turns, so that a slower device affects all of them.
        """
        begin = time.monotonic()
        for number in range(most):
            if number >= 3 and time.monotonic() - begin > budget:
                break
            for side in sides.values():
                side.seconds.append(self.once(side))


def median(side: Side) -> float:
    return statistics.median(side.seconds)


def measure_ceilings(device: torch.device, *, tiny: bool = False) -> Ceilings:
    """Return the best of several sizes, each the median of its repeats."""
    clock, repeats = Clock(device), 3 if tiny else 10

    def best(work: float, run: Callable) -> float:
        side = Side(run)
        clock.once(side)
        side.seconds = [clock.once(side) for _ in range(repeats)]
        return work / median(side)

    copies = []
    for size in (1 << 16,) if tiny else (1 << 30, 1 << 32):
        source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        copies.append(best(2 * size, lambda source=source, target=target: target.copy_(source)))
        del source, target
    products = []
    for rows, inner, columns in ((32, 32, 32),) if tiny else ((8192, 8192, 8192), (4096, 4096, 32768)):
        left = torch.randn(rows, inner, device=device).bfloat16()
        right = torch.randn(columns, inner, device=device).bfloat16().T
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        products.append(best(2 * rows * inner * columns, lambda a=left, b=right, out=out: torch.mm(a, b, out=out)))
    return Ceilings(max(copies), max(products))
