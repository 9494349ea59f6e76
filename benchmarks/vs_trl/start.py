"""Time from the command to the first step: rlhf_core against TRL on the CPU, SFT on Alpaca's 52,002 rows.

    python benchmarks/vs_trl/start.py [--steps 3] [--quick]

Each start is a new process, timed from its start until its trainer is about to make its first step: imports, a model of
30M parameters, reading and tokenising all rows with GPT-2's tokenizer, and all else that the trainer does before.
Each side is started cold, with empty caches, and then warm, with the caches of the cold start. `--steps` is the number
of pairs of starts.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from material import alpaca_rows, make_real_model
from processes import Child, benchmark_parser, log, machine


def main() -> None:
    parser = benchmark_parser(__doc__, steps=3)
    parser.add_argument("--rows", type=int, help="largest number of rows")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rows = 1, 500
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name:
        folder = Path(name)
        make_real_model(folder)
        rows = alpaca_rows(args.rows, longest=None)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(args.steps):
            for title, script, settings in entries(folder):
                caches = folder / f"{title}-{number}"
                caches.mkdir()
                for state in ("cold", "warm"):
                    taken = start(title, script, settings(caches), caches, args)
                    log(f"{title}, {state}: {taken:.1f} s")
                    seconds.setdefault(title, {}).setdefault(state, []).append(taken)
    medians = {
        title: {state: statistics.median(taken) for state, taken in row.items()} for title, row in seconds.items()
    }
    print(f"\nstart to first step of SFT, {len(rows)} rows; median of {args.steps}\n  {machine()}\n")
    print(f"{'':<28}{'cold s':>10}{'warm s':>10}{'over ours: cold':>18}{'warm':>10}")
    for title, row in medians.items():
        ratios = [row[state] / medians["ours"][state] for state in ("cold", "warm")]
        print(f"{title:<28}{row['cold']:>10.1f}{row['warm']:>10.1f}{ratios[0]:>17.2f}x{ratios[1]:>9.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=2) + "\n")


def entries(folder: Path) -> Iterator[tuple[str, str, Callable[[Path], dict[str, Any]]]]:
    """Yield title, script, and a function that returns the settings for a folder of caches."""
    rows, policy = str(folder / "rows.jsonl"), str(folder / "policy")

    def ours(caches: Path) -> dict:
        data = dict(path=rows, cache=str(caches / "tokens"))
        return dict(job="sft", config=dict(model=policy, data=data, batch_size=8, optim=dict(schedule="constant")))

    def trl(caches: Path, **config: object) -> dict:
        shared = dict(per_device_train_batch_size=8, gradient_checkpointing=False)
        return dict(job="sft", folder=str(folder), data=rows, config=shared | config)

    yield "ours", "ours_train.py", ours
    yield "TRL", "trl_train.py", trl
    yield "TRL, two processes", "trl_train.py", lambda caches: trl(caches, dataset_num_proc=2)


def start(title: str, script: str, settings: dict, caches: Path, args) -> float:
    """Return the seconds until a new process waits for its first request."""
    about = {"folder": str(caches), "output": str(caches / f"output-{time.monotonic_ns()}"), "steps": 1}
    path = caches / "settings.json"
    path.write_text(json.dumps(about | {"threads": args.threads} | settings))
    started = time.perf_counter()
    parallel = "processes" not in title  # processes forked while tokenizers has threads would hang
    child = Child(title, script, [path], caches, threads=args.threads, trl=args.trl, parallel_tokenizers=parallel)
    taken = time.perf_counter() - started
    child.close()
    return taken


if __name__ == "__main__":
    main()
