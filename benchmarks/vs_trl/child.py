"""The child's half of the benchmark: be one contestant, and make one step each time the parent asks for it.

Parent and child talk in lines of JSON over the child's stdin and stdout. The child speaks first, once it has loaded:

    -> {"positions": 2432, "versions": {...}}
    <- {"do": "step"}                    -> {"seconds": 1.2, "cpu_seconds": 2.3, "added_mib": 310.5, "loss": 0.7}
    <- {"do": "save", "path": "..."}     -> {"saved": 74}

`positions` is how many token positions, padding included, go through the policy in a step. This file runs in the
project's environment and in TRL's.
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
class Contestant:
    """`loss()` is the forward half of a step; `serve` adds the backward half, the clock and the memory gauge."""

    policy: nn.Module
    loss: Callable[[], Tensor]
    positions: int
    models: list[nn.Module]  # everything loaded, so that their weights are in memory before a step is measured


def serve(build: Callable[[argparse.Namespace], Contestant]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="made by material.make_material")
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cached-reference", action="store_true", help="reference log-probs computed beforehand")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    args = parser.parse_args()

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into the conversation
    torch.set_num_threads(args.threads)

    contestant = build(args)
    for model in contestant.models:
        for tensor in model.state_dict().values():
            tensor.sum()  # weights read lazily from the file count as loaded, not as added by a step
    memory = PeakMemory()
    answers.write(json.dumps({"positions": contestant.positions, "versions": versions()}) + "\n")

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "step":
            answer = step(contestant, memory)
        else:
            gradients = {name: parameter.grad for name, parameter in contestant.policy.named_parameters()}
            save_file(gradients, request["path"])
            answer = {"saved": len(gradients)}
        answers.write(json.dumps(answer) + "\n")


def step(contestant: Contestant, memory: PeakMemory) -> dict:
    contestant.policy.zero_grad(set_to_none=True)
    memory.reset()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = contestant.loss()
    loss.backward()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "added_mib": memory.added_mib(), "loss": loss.item()}


class PeakMemory:
    """Peak resident memory since `reset`, less what was resident when this object was made.

    Where the kernel cannot reset its peak (it is not Linux, or forbids it) the peak is that of the whole life of the
    process on both sides of the subtraction, which can only make the figure smaller.
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
