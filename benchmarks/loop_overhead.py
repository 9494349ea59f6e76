"""Time the steps of DPO, PPO and GRPO in two checkouts of this project, such as before and after a change.

    python benchmarks/loop_overhead.py --base PATH [--rounds 5] [--jobs dpo ppo grpo] [--quick]

Each checkout trains through its own `train`, on the same trained model of 260,032 parameters and the same rows, in one
thread on the CPU. Processes of the two checkouts run one after the other, in turns, so that a change in the load of the
machine affects both. A process runs all jobs; a step is the time between two lines of metrics, so everything that a
loop does belongs to it. The first step of a job is a warm-up.

The table has the median over all steps of wall-clock and of processor time, in milliseconds, and the ratio of this
checkout to the base: less than 1 is faster. `rounds` is the range of that ratio over the rounds: where it includes 1,
the difference is within the noise of the machine. Processor time is the more reliable one on a machine that does other
work. Before the table, the metrics of both checkouts are compared: the times mean little if they did other work.

A base from before the settings were grouped is recognised, and gets the old names. About 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("RLHF_SHARED", HERE.parents[1] / "shared")) / "real"

Times = dict[str, list[list[float]]]  # for each job the wall-clock and processor time of each step, in seconds

COMMON = dict(
    model=str(SHARED / "models" / "stories260K"), seed=0, device="cpu", progress=False, optim=dict(lr=1e-4), epochs=100
)
PROMPTS = dict(
    data=str(SHARED / "data" / "prompts_tinystories_train.jsonl.gz"), reward_function="vs_trl.rewards:share_of_spaces",
    sampling=dict(max_new_tokens=16), micro_batch_size=4,
)  # fmt: skip
JOBS: dict[str, tuple[str, dict[str, Any]]] = {  # the name of the config, and the settings
    "dpo": (
        "DPOConfig",
        dict(
            data=str(SHARED / "data" / "pref_rasbt_train.jsonl.gz"), batch_size=8, micro_batch_size=2,
            reference=dict(cache="off"),
        ),
    ),
    "ppo": (
        "PPOConfig",
        PROMPTS | dict(batch_size=16, minibatch_size=8, rollout_epochs=2, kl=dict(coef=0.05)),
    ),
    "grpo": (
        "GRPOConfig",
        PROMPTS | dict(batch_size=4, num_generations=4, minibatch_size=8, rollout_epochs=2, kl=dict(coef=0.04)),
    ),
}  # fmt: skip
STEPS = {"dpo": 16, "ppo": 7, "grpo": 7}

OLD_NAMES = {  # names of a checkout from before the settings were grouped
    "reference.cache": "cache_reference",
    "kl.coef": "kl_coef",
    "ppo.rollout_epochs": "ppo_epochs",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="PATH", help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="processes of each checkout (default: 5)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help="dpo, ppo, grpo")
    parser.add_argument("--quick", action="store_true", help="only check that it works: one round of two steps")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the folder of a process that takes the times
    options = parser.parse_args()
    if options.child:
        take_times(options.child, options.jobs, quick=options.quick)
        return 0
    if options.base is None or not (options.base / "rlhf_core").is_dir():
        parser.error(f"--base {options.base}: expected the folder of a checkout, which has rlhf_core in it")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected 1 or more")
    compare(options.base.resolve(), options.jobs, 1 if options.quick else options.rounds, quick=options.quick)
    return 0


def compare(base: Path, jobs: list[str], rounds: int, *, quick: bool) -> None:
    """Run both checkouts in turns, and print their times."""
    trees = {"base": base, "this": HERE.parent}
    times: dict[str, list[Times]] = {side: [] for side in trees}
    print(f"base: {base}\nload average {os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="loop_overhead_") as temporary:
        for number in range(rounds):
            order = list(trees) if number % 2 == 0 else list(reversed(trees))
            for side in order:
                folder = Path(temporary, f"{side}-{number}")
                folder.mkdir()
                times[side].append(run_child(trees[side], folder, jobs, quick=quick))
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for job in jobs:
            same = metrics_of(Path(temporary, "base-0", job)) == metrics_of(Path(temporary, "this-0", job))
            print(f"{job}: the metrics of the two are {'equal' if same else 'NOT equal'}")
    print(f"\n{'':<8}{'':<12}{'base ms':>10}{'this ms':>10}{'this/base':>11}{'rounds':>16}")
    for job in jobs:
        for clock, name in enumerate(("wall clock", "processor")):
            rows = {side: [[step[clock] for step in one[job]] for one in times[side]] for side in trees}
            medians = {side: 1e3 * statistics.median(sum(rows[side], [])) for side in trees}
            pairs = zip(rows["this"], rows["base"], strict=True)
            ratios = [statistics.median(this) / statistics.median(other) for this, other in pairs]
            print(
                f"{job:<8}{name:<12}{medians['base']:>10.1f}{medians['this']:>10.1f}"
                f"{medians['this'] / medians['base']:>11.3f}{f'{min(ratios):.2f} to {max(ratios):.2f}':>16}"
            )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without its times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]


def run_child(tree: Path, folder: Path, jobs: list[str], *, quick: bool) -> Times:
    """Run the jobs in a process that imports the packages of `tree`."""
    paths = [str(tree), str(tree / "kernels")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(HERE / "loop_overhead.py"), "--child", str(folder), "--jobs", *jobs]
    done = subprocess.run([*command, *["--quick"] * quick], env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{tree}: ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    answer = json.loads((folder / "times.json").read_text())
    if not Path(answer["package"]).is_relative_to(tree):
        raise SystemExit(f"{tree}: imported {answer['package']} instead")
    return answer["times"]


# --------------------------------------------------------------------------------------------- in the process


def take_times(folder: Path, jobs: list[str], *, quick: bool) -> None:
    """Run the jobs with the packages on the path; write the times of their steps to `folder`/times.json."""
    import torch

    import rlhf_core
    from rlhf_core.training.metrics import MetricWriter

    torch.set_num_threads(1)
    is_old = not (Path(rlhf_core.__file__).parent / "config").is_dir()
    clocks: list[tuple[float, float]] = []
    MetricWriter.write = partialmethod(write_and_time, MetricWriter.write, clocks)
    times: Times = {}
    for job in jobs:
        config_name, settings = JOBS[job]
        settings = COMMON | settings | dict(output=str(folder / job), max_steps=3 if quick else STEPS[job])
        module = importlib.import_module(f"rlhf_core.trainers.{job}")
        clocks.clear()
        module.train(getattr(module, config_name)(**(with_old_names(job, settings) if is_old else settings)))
        times[job] = [
            [after[0] - before[0], after[1] - before[1]] for before, after in zip(clocks, clocks[1:], strict=False)
        ]
    answer = {"package": rlhf_core.__file__, "times": times}
    (folder / "times.json").write_text(json.dumps(answer))


def write_and_time(writer: Any, write: Any, clocks: list[tuple[float, float]], step: int, metrics: Any) -> None:
    """Stand in for `MetricWriter.write`: write the metrics of a step, and read the clocks."""
    write(writer, step, metrics)
    clocks.append((time.perf_counter(), time.process_time()))


def with_old_names(job: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings by their names before they were grouped."""
    old: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("reference", "kl"):
            old |= {OLD_NAMES[f"{name}.{inner}"]: setting for inner, setting in value.items()}
        else:
            old[OLD_NAMES.get(f"{job}.{name}", name)] = value
    return old


if __name__ == "__main__":
    sys.exit(main())
