"""The parent's half of the benchmarks: contestants in processes of their own, that act when asked and one at a time.

A contestant is a script of this folder. Those named ours_* run in the project's environment, the others in one that
holds TRL (environment.py). What they are asked and answer are lines of JSON; see child.py and turns.py.
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


class Player:
    """A contestant's process. It speaks first, once it has loaded; what it said then is `about`.

    Tokenizers work in one thread unless `parallel_tokenizers`.
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
        self.log = folder / f"{title}.log"
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
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, HERE / script, *arguments],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
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
        tail = "\n".join(self.log.read_text().splitlines()[-30:])
        raise SystemExit(f"{self.title!r} ended with status {status}. The end of its log:\n{tail}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ------------------------------------------------------------------------------------- both sides' own training loops


@dataclass(frozen=True)
class Entry:
    """One contestant of `play`: a title, a script that uses turns.py, and the settings that it is given."""

    title: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)


def benchmark_parser(doc: str, *, steps: int, trl: str = "1.16.0") -> argparse.ArgumentParser:
    """The options that all benchmarks of training loops have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of each, after one of warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", default=trl, metavar="VERSION")
    parser.add_argument("--quick", action="store_true", help="only show that it works: one small step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def play(
    entries: list[Entry],
    folder: Path,
    args: argparse.Namespace,
    check: Callable[[str, int, dict], None] = lambda title, step, turn: None,
) -> dict[str, list[dict]]:
    """The turns of each contestant, `args.steps` after one of warm-up; they take them one at a time and round robin.

    check: called with every turn, the warm-up's as step 0; ends the program where a turn is not what it should be.
    """
    turns: dict[str, list[dict]] = {entry.title: [] for entry in entries}
    with contextlib.ExitStack() as stack:
        players = []
        for number, entry in enumerate(entries):
            say(f"loading: {entry.title}")
            about = {"folder": str(folder), "output": str(folder / f"output-{number}"), "threads": args.threads}
            settings = folder / f"{number}.json"
            settings.write_text(json.dumps(about | {"steps": args.steps + 1} | entry.settings))
            player = Player(entry.title, entry.script, [settings], folder, threads=args.threads, trl=args.trl)
            stack.callback(player.close)
            players.append(player)
        for step in range(args.steps + 1):
            for player in players:
                turn = player.ask(do="turn") | {"versions": player.about["versions"]}
                say(f"step {step or 'of warm-up'}: {player.title}: {turn['seconds']:.2f} s")
                check(player.title, step, turn)
                if step:
                    turns[player.title].append(turn)
    return turns


def report(
    title: str,
    turns: dict[str, list[dict]],
    args: argparse.Namespace,
    *,
    ours: list[str],
    more: dict[str, Callable[[list[dict]], str]] | None = None,
) -> None:
    """Print a row for each contestant, with its time and memory over those of each one named in `ours`.

    more: further columns, from the turns of a row.
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
        "\ns/step, least: mean and least of the steps; cpu s: least processor time, all threads together"
        "\nadded MiB: peak resident memory of a step above what was resident after loading, Adam's state included"
        f"\ntime, memory: s/step and added MiB over those of {' and of '.join(map(repr, ours))}"
    )
    if args.json:
        results = {name: rows[name] | {"turns": turns[name]} for name in rows}
        about = {"title": title, "settings": settings, "machine": machine()}
        args.json.write_text(json.dumps(about | {"results": results}, indent=2, default=str) + "\n")


def same_losses(first: float, later: float) -> Callable[[str, int, dict], None]:
    """A check for `play`: the loss of a step is relatively as near as this to the first contestant's."""
    of_step: dict[int, float] = {}

    def check(title: str, step: int, turn: dict) -> None:
        loss = of_step.setdefault(step, turn["loss"])
        off = abs(turn["loss"] / loss - 1)
        if not off <= (later if step else first):  # so that NaN counts as wrong
            raise SystemExit(f"NOT THE SAME STEP: {title}: the loss of step {step} is {turn['loss']}, not {loss}")

    return check


def machine() -> dict[str, Any]:
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
"""When the program began."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
