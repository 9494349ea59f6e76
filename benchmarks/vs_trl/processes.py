"""The parent process of the benchmarks: it starts a process for each entry, and lets one at a time make a step.

An entry is a script of this folder. Scripts named ours_* run in the project's environment, the others in one with TRL
(environment.py). Requests and answers are lines of JSON; see child.py and turns.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import trl_python

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SHARED = Path(os.environ.get("RLHF_SHARED", REPOSITORY.parent / "shared")) / "real"


class Child:
    """The process of an entry. `about` is its first answer, which it sends once everything is loaded.

    Tokenizers use one thread unless `parallel_tokenizers`.
    """

    def __init__(
        self,
        title: str,
        script: str,
        arguments: Iterable[str | Path],
        folder: Path,
        *,
        threads: int,
        trl: str,
        parallel_tokenizers: bool = False,
    ) -> None:
        self.title, self.script = title, script
        self.log_file = folder / f"{title}.log"
        ours = script.startswith("ours")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": str(parallel_tokenizers).lower(),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "huggingface"),  # no cache of an earlier run
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}" if ours else "",
        }
        python = sys.executable if ours else trl_python(trl)
        with self.log_file.open("w") as log_file:
            self.process = subprocess.Popen(
                [python, HERE / script, *arguments],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_file, text=True,
            )  # fmt: skip
        self.about = self._answer()

    def ask(self, **request: str) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        tail = "\n".join(self.log_file.read_text().splitlines()[-30:])
        raise SystemExit(f"{self.title!r} ended with status {status}. The last lines of its log:\n{tail}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ------------------------------------------------------------------------------------- the training loops of both sides


@dataclass(frozen=True)
class Entry:
    """One entry of `run_in_turns`: a title, a script that uses turns.py, and its settings."""

    title: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)


def benchmark_parser(doc: str, *, steps: int, trl: str = "1.16.0") -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks of training loops have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of each entry, after a warm-up step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", default=trl, metavar="VERSION")
    parser.add_argument("--quick", action="store_true", help="only check that it works: one small step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    return parser


def run_in_turns(
    entries: list[Entry],
    folder: Path,
    args: argparse.Namespace,
    check: Callable[[str, int, dict], None] = lambda title, step, turn: None,
) -> dict[str, list[dict]]:
    """Return the turns of each entry: `args.steps` steps after a warm-up step, one entry at a time, round robin.

    check: called with the title, number and results of every step, 0 for the warm-up; ends the program if they are
    wrong.
    """
    turns: dict[str, list[dict]] = {entry.title: [] for entry in entries}
    with contextlib.ExitStack() as stack:
        children = []
        for number, entry in enumerate(entries):
            log(f"loading: {entry.title}")
            about = {"folder": str(folder), "output": str(folder / f"output-{number}"), "threads": args.threads}
            settings = folder / f"{number}.json"
            settings.write_text(json.dumps(about | {"steps": args.steps + 1} | entry.settings))
            child = Child(entry.title, entry.script, [settings], folder, threads=args.threads, trl=args.trl)
            stack.callback(child.close)
            children.append(child)
        for step in range(args.steps + 1):
            for child in children:
                turn = child.ask(do="turn") | {"versions": child.about["versions"]}
                log(f"step {step or '0, warm-up'}: {child.title}: {turn['seconds']:.2f} s")
                check(child.title, step, turn)
                if step:
                    turns[child.title].append(turn)
    return turns


def report(
    title: str,
    turns: dict[str, list[dict]],
    args: argparse.Namespace,
    *,
    ours: list[str],
    more: dict[str, Callable[[list[dict]], str]] | None = None,
) -> None:
    """Print a row for each entry, with its time and memory divided by those of each entry named in `ours`.

    more: further columns, computed from the turns of a row.
    """
    rows = {
        name: {
            "seconds": statistics.mean(turn["seconds"] for turn in taken),
            "least": min(turn["seconds"] for turn in taken),
            "cpu_seconds": min(turn["cpu_seconds"] for turn in taken),
            "added_mib": max(turn["added_mib"] for turn in taken),
        }
        for name, taken in turns.items()
    }
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    versions = {name: taken[0]["versions"] for name, taken in turns.items()}
    print(f"\n{title}; {', '.join(f'{name} {value}' for name, value in settings.items())}")
    for found in {json.dumps(each): each for each in versions.values()}.values():
        print(f"  {', '.join(f'{package} {number}' for package, number in found.items())}")
    print(f"  {', '.join(f'{name} {value}' for name, value in machine().items())}\n")
    if len(ours) > 1:
        print(f"{'':<75}" + "".join(f"{name:>26}" for name in ours))
    head = f"{'':<36}{'s/step':>9}{'least':>9}{'cpu s':>9}{'added MiB':>12}"
    print(head + f"{'time':>17}{'memory':>9}" * len(ours) + "".join(f"{name:>15}" for name in more or {}))
    for name, row in rows.items():
        line = (
            f"{name:<36}{row['seconds']:>9.2f}{row['least']:>9.2f}{row['cpu_seconds']:>9.2f}{row['added_mib']:>12.0f}"
        )
        for other in (rows[each] for each in ours):
            line += f"{row['seconds'] / other['seconds']:>16.2f}x{row['added_mib'] / other['added_mib']:>8.2f}x"
        print(line + "".join(f"{column(turns[name]):>15}" for column in (more or {}).values()))
    print(
        "\ns/step, least: mean and minimum over the steps; cpu s: minimum of the processor time of all threads"
        "\nadded MiB: peak resident memory of a step minus that after loading; it includes Adam's state"
        f"\ntime, memory: s/step and added MiB divided by those of {' and of '.join(map(repr, ours))}"
    )
    if args.json:
        results = {name: rows[name] | {"turns": turns[name]} for name in rows}
        about = {"title": title, "settings": settings, "machine": machine()}
        args.json.write_text(json.dumps(about | {"results": results}, indent=2, default=str) + "\n")


def same_losses(first: float, later: float) -> Callable[[str, int, dict], None]:
    """Return a check for `run_in_turns`: the largest relative difference of a loss from that of the first entry.

    first, later: the largest difference in the warm-up step and in the others.
    """
    of_step: dict[int, float] = {}

    def check(title: str, step: int, turn: dict) -> None:
        loss = of_step.setdefault(step, turn["loss"])
        difference = abs(turn["loss"] / loss - 1)
        if not difference <= (later if step else first):  # so that NaN counts as wrong
            raise SystemExit(f"NOT THE SAME STEP: {title}: the loss of step {step} is {turn['loss']}, not {loss}")

    return check


def machine() -> dict[str, Any]:
    """Return facts about the machine."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load": LOAD,
    }


LOAD = [round(average, 2) for average in os.getloadavg()]
"""Load averages when the program began."""


def log(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
