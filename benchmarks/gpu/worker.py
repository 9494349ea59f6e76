"""The process that runs units (ceilings, checks, rows) and writes events, one line of JSON each.

A kernel that hangs or breaks the device ends only this process: run.py reads how far it came and starts another for the
rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys

import torch
from checks import CHECKS
from clock import Clock, measure_ceilings, median
from rows import ROWS, Row, Setup

ROW_BUDGET = 8.0  # seconds of timing a row


class Journal:
    def __init__(self, path: str):
        self.file = open(path, "a")  # noqa: SIM115 (open for the process's life)

    def write(self, event: str, **fields) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")
        self.file.flush()


def reason(error: BaseException) -> str:
    """Return the first line of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def spoiled(error: BaseException) -> bool:
    """Return whether the device is broken for this process, so that every later call would fail too."""
    if not torch.cuda.is_available() or isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize()
        return False
    except Exception:
        return True


def run_row(name: str, row: Row, setup: Setup, journal: Journal, without: set[str]) -> dict:
    """Return the medians of the contestants that could run."""
    clock = Clock(setup.device)
    sides = {}
    for contestant, make in row.contestants.items():
        if contestant in without:
            continue
        journal.write("begin", unit=name, contestant=contestant)
        try:
            side = make()
            clock.once(side)  # compiles
            sides[contestant] = side
        except Exception as error:
            journal.write("lost", unit=name, contestant=contestant, reason=reason(error))
            if spoiled(error):
                sys.exit(3)
        forget()
    journal.write("begin", unit=name, contestant=None)
    clock.rounds(sides, budget=ROW_BUDGET, most=1 if setup.dry else 15)
    result = {"seconds": {contestant: median(side) for contestant, side in sides.items()}}
    if row.one_launch and "ours" in sides and setup.device.type == "cuda":
        result["launches"] = count_launches(sides["ours"].run)
    ceilings = measure_ceilings(setup.device, tiny=setup.dry)
    result |= dict(floor_is=row.floor_is, goal=row.goal, goals=row.goals, most_seconds=row.most_seconds)
    result |= dict(copy_bytes=ceilings.copy_bytes, product_flops=ceilings.product_flops)
    return result | {"floor": row.floor(ceilings) if row.floor else None}


def count_launches(run) -> int:
    """Return the number of kernels and memory operations that a call launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("journal")
    parser.add_argument("units")
    parser.add_argument("without", help='{"unit": [contestants to leave out]}')
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    setup = Setup(torch.device("cpu" if arguments.dry_run else "cuda"), arguments.dry_run)
    journal, without = Journal(arguments.journal), json.loads(arguments.without)
    if not setup.dry:
        torch.empty(1, device=setup.device)
        journal.write("device", name=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability())
    for unit in json.loads(arguments.units):
        journal.write("begin", unit=unit, contestant=None)
        kind, _, name = unit.partition(": ")
        try:
            if kind == "ceilings":
                ceilings = measure_ceilings(setup.device, tiny=setup.dry)
                result = dict(copy_bytes=ceilings.copy_bytes, product_flops=ceilings.product_flops)
            elif kind == "check":
                for impl in ("triton", "torch") if setup.dry else ("triton",):
                    CHECKS[name](setup, impl)
                result = {}
            else:
                result = run_row(unit, ROWS[name](setup), setup, journal, set(without.get(unit, [])))
            journal.write("done", unit=unit, result=result)
        except Exception as error:
            journal.write("failed", unit=unit, reason=reason(error))
            if spoiled(error):
                sys.exit(3)
        forget()


if __name__ == "__main__":
    main()
