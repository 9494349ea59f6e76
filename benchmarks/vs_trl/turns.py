"""The child's half of the PPO benchmark: take one iteration each time the parent asks for one, and say what it took.

Lines of JSON over stdin and stdout, as in child.py. The loop that is measured is the trainer's own: it calls `begin`
before an iteration, which waits to be asked, and `end` after it. Runs in the project's environment and in TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from child import PeakMemory, versions


class Turns:
    """`args` are what the parent wants; the first `begin` says that everything is loaded."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("folder", type=Path, help="made by ppo.py")
        parser.add_argument("output", type=Path)
        for name in ("prompts", "tokens", "epochs", "minibatches", "iterations", "threads"):
            parser.add_argument(f"--{name}", type=int, required=True)
        parser.add_argument("--value", default="head", help="ours: whose trunk the critic has")
        self.args = parser.parse_args()
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever a library prints goes to the log, not into the conversation
        torch.set_num_threads(self.args.threads)
        self.memory: PeakMemory | None = None

    def begin(self) -> None:
        if self.memory is None:
            self.memory = PeakMemory()
            self._answer({"versions": versions()})
        if not sys.stdin.readline():
            sys.exit()  # the parent is gone
        self.memory.reset()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def end(self, **facts: float) -> None:
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        self._answer({"seconds": seconds, "cpu_seconds": cpu_seconds, "added_mib": self.memory.added_mib(), **facts})

    def _answer(self, answer: dict) -> None:
        self.answers.write(json.dumps(answer) + "\n")
