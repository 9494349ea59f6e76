"""Correctness and speed of every kernel on this machine's GPU, compared with the device's ceilings and other libraries.

python benchmarks/gpu/run.py [--json PATH]     needs CUDA, torch and triton; uses trl and liger-kernel where installed
python benchmarks/gpu/run.py --dry-run         on a CPU, tiny shapes, Triton's interpreter: tests the script only

One process runs the units and this one watches it, so that a kernel that hangs, crashes or breaks the device loses only
its own entry of the table. Units past the deadline are not run. The table is printed last; the exit code is 1 if a
check or a kernel of ours failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "transformers")
# In order of importance, in case time runs out.
UNITS = [
    "ceilings",
    "check: token_logprobs",
    "row: token_logprobs forward",
    "row: token_logprobs backward",
    "check: kl_divergence",
    "row: kl_divergence forward",
    "check: linear_logprobs",
    "row: linear_logprobs fwd+bwd",
    "row: linear_logprobs frozen head",
    "check: gae",
    "row: gae, whitened",
    "check: more than 2^31 elements",
    "row: kl_divergence fwd+bwd",
    "check: linear_kl",
    "row: linear_kl fwd+bwd",
    "check: packed_attention",
    "row: packed_attention fwd+bwd",
]
STEP_SECONDS = 100  # for one contestant's first calls, a check, or a row's timing; the first one starts the process too
COLUMNS = ["eager", "compile", "Liger", "TRL", "torch fused"]


@dataclass
class Findings:
    """Results and failures so far."""

    device: dict = field(default_factory=dict)
    done: dict[str, dict] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)  # unit -> contestant -> reason
    unit: str | None = None  # the unit that is running
    contestant: str | None = None
    since: float = 0.0

    def take(self, event: dict) -> None:
        kind = event.pop("event")
        if kind == "device":
            self.device = event
        elif kind == "begin":
            self.unit, self.contestant, self.since = event["unit"], event["contestant"], time.monotonic()
            print(f"  {self.unit}" + (f", {self.contestant}" if self.contestant else ""), flush=True)
        elif kind == "lost":
            self.lose(event["reason"], event["unit"], event["contestant"])
        elif kind == "failed":
            self.failed[event["unit"]], self.unit = event["reason"], None
        elif kind == "done":
            self.done[event["unit"]], self.unit = event["result"], None

    def lose(self, reason: str, unit: str, contestant: str) -> None:
        self.lost.setdefault(unit, {})[contestant] = reason
        self.contestant = None

    def left(self, units: list[str]) -> list[str]:
        return [unit for unit in units if unit not in self.done and unit not in self.failed]


def work(units: list[str], findings: Findings, deadline: float, step: float, dry_run: bool) -> None:
    """Start a worker, and another whenever one fails, until all units are done or the deadline is reached."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *_python_path()])}
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(len(units) * 3):
            if not findings.left(units) or time.monotonic() >= deadline:
                break
            journal, log = Path(folder) / f"{attempt}.jsonl", Path(folder) / f"{attempt}.log"
            journal.touch()
            without = {unit: list(contestants) for unit, contestants in findings.lost.items()}
            findings.unit, findings.contestant, findings.since = None, None, time.monotonic()
            with log.open("w") as output:
                process = subprocess.Popen(
                    [
                        sys.executable,
                        str(HERE / "worker.py"),
                        str(journal),
                        json.dumps(findings.left(units)),
                        json.dumps(without),
                        *(["--dry-run"] if dry_run else []),
                    ],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                why = watch(process, journal, findings, deadline, step)
            if not findings.left(units) or time.monotonic() >= deadline:
                break
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            why = why or f"the process ended with {process.returncode}" + (f": {last[0][:200]}" if last else "")
            print(f"  ! {findings.unit or 'start'}: {why}", flush=True)
            if findings.unit is None and process.returncode != 3:
                findings.failed |= dict.fromkeys(findings.left(units), f"not run: {why}")  # the worker cannot start
            elif findings.unit is not None and findings.contestant is not None:
                findings.lose(why, findings.unit, findings.contestant)
            elif findings.unit is not None and not _just_lost(findings, process):
                findings.failed[findings.unit] = why


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _just_lost(findings: Findings, process: subprocess.Popen) -> bool:
    """Return whether the worker ended itself because a contestant broke the device; the row can be continued."""
    return process.returncode == 3 and findings.unit in findings.lost


def watch(process: subprocess.Popen, journal: Path, findings: Findings, deadline: float, step: float) -> str | None:
    """Follow the worker's journal to its end. Return the reason if it had to be killed."""
    with journal.open() as lines:
        while True:
            ended = process.poll() is not None
            for event in _whole_lines(lines):
                findings.take(event)
            if ended:
                return None
            now = time.monotonic()
            if now >= deadline or now - findings.since > step:
                process.kill()
                process.wait()
                return "no time left" if now >= deadline else f"took more than {step:.0f} s"
            time.sleep(0.05)


def _whole_lines(lines) -> Iterator[dict]:
    while True:
        place = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(place)
            return
        yield json.loads(line)


# ------------------------------------------------------------------------------------------------------------ the table


def show(findings: Findings, units: list[str], dry_run: bool) -> None:
    """Print the failures, then the table."""
    for unit in units:
        for contestant, why in findings.lost.get(unit, {}).items():
            print(f"{unit}, {contestant}: {why}")
    for unit, why in findings.failed.items():
        print(f"FAILED {unit}: {why}")
    left = findings.left(units)
    if left:
        print(f"no time for: {', '.join(left)}")
    checks = [unit.partition(": ")[2] for unit in units if unit.startswith("check: ")]
    good = [name for name in checks if f"check: {name}" in findings.done]
    print(f"\nchecks passed: {len(good)} of {len(checks)} ({', '.join(good)})")
    ceilings = findings.done.get("ceilings", {})
    if ceilings and not dry_run:
        print(
            f"{findings.device.get('name')}: copy {ceilings['copy_bytes'] / 1e12:.2f} TB/s, bf16 products "
            f"{ceilings['product_flops'] / 1e12:.0f} TFLOP/s"
        )
    if dry_run:
        print("dry run: nothing here is a measurement")
    else:
        print("times faster than others; the floor is by the ceilings measured with each row")
        print(f"{'':<28}{'ours ms':>9}{'of floor':>9}  {'goal':<22}" + "".join(f"{name:>12}" for name in COLUMNS))
    for unit in units:
        if unit.startswith("row: "):
            print(table_line(unit, findings, dry_run).rstrip())


def table_line(unit: str, findings: Findings, dry_run: bool) -> str:
    name, result = unit.partition(": ")[2], findings.done.get(unit)
    seconds = result["seconds"] if result else {}
    ours = seconds.get("ours")
    if ours is None:
        why = findings.lost.get(unit, {}).get("ours") or findings.failed.get(unit) or "not run"
        return f"{name:<28}  {why[:100]}"
    if dry_run:
        return f"{name:<28}  ran, and so did {'; '.join(other for other in seconds if other != 'ours')}"
    share = result["floor"] / ours if result["floor"] else None
    line = f"{name:<28}{1e3 * ours:>9.3f}" + (f"{share:>9.0%}" if share is not None else f"{'':>9}")
    line += f"  {'; '.join(text for _, text in goals_of(result, share)):<22}"
    for column in COLUMNS:
        if column in seconds:
            line += f"{seconds[column] / ours:>11.2f}x"
        else:
            why = findings.lost.get(unit, {}).get(column)
            line += f"{'' if why is None else 'absent' if 'not installed' in why else 'failed':>12}"
    return line


def goals_of(result: dict, share: float | None) -> list[tuple[bool, str]]:
    """Return whether each goal of a row was reached, and its text; none for rivals that were not measured."""
    seconds, goals = result["seconds"], []
    if result["goal"] is not None:
        goals.append((share >= result["goal"], f"{result['goal']:.0%}"))
    if result["most_seconds"] is not None:
        goals.append((seconds["ours"] <= result["most_seconds"], f"{1e6 * result['most_seconds']:.0f} us"))
    if "launches" in result:
        goals.append((result["launches"] == 1, f"one launch ({result['launches']})"))
    for rival, ratio in result["goals"].items():
        if rival in seconds:
            goals.append((seconds[rival] >= ratio * seconds["ours"], f"{ratio:g}x {rival}"))
    return [(reached, f"{text} {'yes' if reached else 'NO'}") for reached, text in goals]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record(findings: Findings, units: list[str], command: list[str], seconds: float) -> dict:
    """Return the content of the JSON file."""
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        device=findings.device,
        versions={package: version_of(package) for package in PACKAGES} | {"python": platform.python_version()},
        seconds=round(seconds, 1),
        checks={unit.partition(": ")[2]: unit in findings.done for unit in units if unit.startswith("check: ")},
        ceilings=findings.done.get("ceilings"),
        rows={unit.partition(": ")[2]: findings.done.get(unit) for unit in units if unit.startswith("row: ")},
        lost=findings.lost,
        failed=findings.failed,
        not_run=findings.left(units),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--only", metavar="TEXT", help="the checks and rows whose names hold this, and the ceilings")
    parser.add_argument("--seconds", type=float, default=510.0, help="the deadline of the whole (510)")
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS, help=f"of one step ({STEP_SECONDS})")
    arguments = parser.parse_args()
    units = [unit for unit in UNITS if unit == "ceilings" or not arguments.only or arguments.only in unit]
    begin = time.monotonic()
    findings = Findings()
    work(units, findings, begin + arguments.seconds, arguments.step_seconds, arguments.dry_run)
    result = record(findings, units, sys.argv, time.monotonic() - begin)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    show(findings, units, arguments.dry_run)
    ours_lost = [unit for unit, lost in findings.lost.items() if any(name.startswith("ours") for name in lost)]
    return int(bool(findings.failed or ours_lost or findings.left(units)))


if __name__ == "__main__":
    sys.exit(main())
