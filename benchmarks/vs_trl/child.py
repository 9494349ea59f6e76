"""The child process of a benchmark of single steps: one entry, which makes a step on each request of the parent.

Requests and answers are lines of JSON on the child's stdin and stdout. The child sends a first line once it has loaded:

    -> {"positions": 2432, "versions": {...}}
    <- {"do": "step"}                    -> {"seconds": 1.2, "cpu_seconds": 2.3, "added_mib": 310.5, "loss": 0.7}
    <- {"do": "save", "path": "..."}     -> {"saved": 74}

`positions` is the number of token positions, padding included, that go through the policy in a step. This file runs in
the project's environment and in TRL's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass
class TimedStep:
    """An entry of a benchmark. `loss()` is the forward pass of a step; `serve` adds the backward pass and measures."""

    policy: nn.Module
    loss: Callable[[], Tensor]
    positions: int
    models: list[nn.Module]  # all models; their weights are read before a step is measured


def serve(build: Callable[[argparse.Namespace], TimedStep]) -> None:
    """Build the entry and answer the requests of the parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="folder of the models and pairs (material.py)")
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cached-reference", action="store_true", help="compute reference log-probs before the steps")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    args = parser.parse_args()

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log, not between the answers
    torch.set_num_threads(args.threads)

    timed = build(args)
    for model in timed.models:
        for tensor in model.state_dict().values():
            tensor.sum()  # so that weights read lazily do not count as memory of a step
    memory = PeakMemory()
    answers.write(json.dumps({"positions": timed.positions, "versions": versions()}) + "\n")

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "step":
            answer = step(timed, memory)
        else:
            gradients = {name: parameter.grad for name, parameter in timed.policy.named_parameters()}
            save_file(gradients, request["path"])
            answer = {"saved": len(gradients)}
        answers.write(json.dumps(answer) + "\n")


def step(timed: TimedStep, memory: PeakMemory) -> dict:
    timed.policy.zero_grad(set_to_none=True)
    memory.reset()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = timed.loss()
    loss.backward()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "added_mib": memory.added_mib(), "loss": loss.item()}


class PeakMemory:
    """Peak resident memory since `reset`, minus the resident memory when this object was made.

    Where the kernel cannot reset its peak (not Linux, or not permitted), both are the peak of the whole process, and
    the difference is too small.
    """

    def __init__(self) -> None:
        self.can_reset = self.reset()
        self.before = self._resident_mib("VmRSS" if self.can_reset else None)

    def reset(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def added_mib(self) -> float:
        return self._resident_mib("VmHWM" if self.can_reset else None) - self.before

    def _resident_mib(self, field: str | None) -> float:
        if field is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024  # the kernel writes kB
        raise RuntimeError(f"/proc/self/status has no {field}")


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "trl", "rlhf-core"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
