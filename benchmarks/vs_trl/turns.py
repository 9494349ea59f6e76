"""The child process of a benchmark of training loops: it makes a step on each request, and answers with its time.

Lines of JSON on stdin and stdout, as in child.py. The trainer's own loop is measured: it calls `begin` before a step,
which waits for a request, and `end` after it. This file runs in the project's environment and in TRL's.
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
    """The steps of this process. `args` are the settings; the first `begin` reports that everything is loaded."""

    def __init__(self) -> None:
        self.args = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print goes to the log, not between the answers
        torch.set_num_threads(self.args.threads)
        self.memory: PeakMemory | None = None
        self.taken = 0
        self.facts: dict[str, float] = {}  # for the answer at the end of this step

    def begin(self) -> None:
        """Wait for a request, and start the clocks."""
        if self.memory is None:
            self._answer({"versions": versions()})
            read_lazy_weights()
            self.memory = PeakMemory()
        if not sys.stdin.readline():
            sys.exit()  # the parent has ended
        self.memory.reset()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def end(self, **facts: float) -> None:
        """Answer with the times of the step, and `facts`."""
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
    """Read all weights that are still in a mapped file, so that they do not count as memory of a step."""
    with torch.no_grad():
        for thing in gc.get_objects():
            if issubclass(type(thing), nn.Module):  # isinstance would load lazy modules
                for tensor in (*thing._parameters.values(), *thing._buffers.values()):
                    if tensor is not None:
                        tensor.sum()
