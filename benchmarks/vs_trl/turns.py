"""The child's half of a benchmark of training loops: take one step each time the parent asks, and say what it took.

Lines of JSON over stdin and stdout, as in child.py. The loop that is measured is the trainer's own: it calls `begin`
before a step, which waits to be asked, and `end` after it. Runs in the project's environment and in TRL's.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from child import PeakMemory, versions
from torch import nn


class Turns:
    """`args` are what the parent wants; the first `begin` says that everything is loaded."""

    def __init__(self) -> None:
        self.args = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever a library prints goes to the log, not into the conversation
        torch.set_num_threads(self.args.threads)
        self.memory: PeakMemory | None = None
        self.taken = 0
        self.facts: dict[str, float] = {}  # to be told at the end of this step

    def begin(self) -> None:
        if self.memory is None:
            self._answer({"versions": versions()})
            read_lazy_weights()
            self.memory = PeakMemory()
        if not sys.stdin.readline():
            sys.exit()  # the parent is gone
        self.memory.reset()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def end(self, **facts: float) -> None:
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        self._answer(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "added_mib": self.memory.added_mib(),
                **facts,
                **self.facts,
            }
        )
        self.taken, self.facts = self.taken + 1, {}

    def _answer(self, answer: dict) -> None:
        self.answers.write(json.dumps(answer) + "\n")


def read_lazy_weights() -> None:
    """Weights that are still in a mapped file count as loaded, not as added by a step."""
    with torch.no_grad():
        for thing in gc.get_objects():
            if issubclass(type(thing), nn.Module):  # isinstance would wake whatever is lazy
                for tensor in (*thing._parameters.values(), *thing._buffers.values()):
                    if tensor is not None:
                        tensor.sum()
