"""Show that a change of the training loops changes no number: run every job in 118 settings, and hash the results.

    python benchmarks/equality.py OUT.json [NAME ...]        run all cases, or those named, such as dpo-mix or 'ppo*'
    python benchmarks/equality.py --compare A.json B.json    show the cases that differ

Run it before and after a change, and compare the two files. For each case the file has the first 16 digits of the
sha256 of the trained weights, of all metrics, of the result of `train`, and of the names of the files that the run
left; and the metrics themselves, to find where a difference begins. Times are left out. A case that is interrupted
gets SIGINT after the metrics of a step were written, and is then resumed.

Both runs need the same processor and the same versions of torch and transformers. Everything runs on the CPU in one
thread; all cases take about 3 minutes. The trained model and the rows are found through RLHF_SHARED (default: `shared`
beside the checkout). Named cases replace those in OUT.json; without names the file is written anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import logging
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from equality_cases import Case, all_cases, make_models, write_data
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from rlhf_core.cli import JOBS
from rlhf_core.config import from_dict
from rlhf_core.training.run import Interrupted, Run

HASHES = ("weights", "metrics", "result", "files")
NOT_TRAINED = {"checkpoints", "reference_logprobs"}  # folders whose tensors are not the trained weights

Outcome = dict[str, Any]
Outcomes = dict[str, Outcome]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json", help="file for the results")
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases to run; * stands for any text")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="compare two such files")
    options = parser.parse_args()
    if options.compare:
        first, second = (json.loads(path.read_text()) for path in options.compare)
        return compare(first, second)
    if options.out is None:
        parser.error("expected OUT.json, or --compare A.json B.json")
    return run_all(options.out, options.names)


# ---------------------------------------------------------------------------------------------- running


def run_all(out: Path, names: list[str]) -> int:
    """Run the cases and write `out` after each of them. Return the exit status: 1 if one of them failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    outcomes: Outcomes = json.loads(out.read_text()) if names and out.exists() else {}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="equality_") as temporary:
        folder = Path(temporary)
        cases = select(all_cases(folder), names)
        write_data(folder)
        make_models(folder, {Path(path).name for case in cases.values() for path in models_of(case)})
        for name, case in cases.items():
            start = time.monotonic()
            try:
                outcomes[name] = run_case(case, folder / "runs" / name)
            except Exception as error:
                failed += 1
                outcomes[name] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
            shown = " ".join(outcomes[name].get(key, "error") for key in HASHES[:2])
            print(f"{name:26} {shown} {time.monotonic() - start:.1f} s", flush=True)
            out.write_text(json.dumps(outcomes))
    print(f"{len(cases) - failed} cases run, {failed} failed")
    return 1 if failed else 0


def select(cases: dict[str, Case], names: list[str]) -> dict[str, Case]:
    """Return the cases that are named, all of them without names. Ends the program for a name that fits none."""
    chosen: set[str] = set()
    for name in names:
        fitting = fnmatch.filter(cases, name)
        if not fitting:
            raise SystemExit(f"no case is named {name!r}; expected one of {', '.join(cases)}, or a pattern")
        chosen.update(fitting)
    return {name: case for name, case in cases.items() if not names or name in chosen}


def models_of(case: Case) -> list[str]:
    """Return the paths of the models that a case loads."""
    values = [case.settings.get(name) for name in ("model", "reward_model")]
    return [value["path"] if isinstance(value, dict) else value for value in values if value]


def run_case(case: Case, output: Path) -> Outcome:
    """Run a case to its end and return its hashes and metrics."""
    module_name, config_name, function_name, _ = JOBS[case.job]
    module = importlib.import_module(module_name)
    train = getattr(module, function_name)
    config = from_dict(getattr(module, config_name), case.settings | {"output": str(output)})
    for stop in case.stops:
        with mock.patch.object(Run, "log", partialmethod(log_and_interrupt, stop, Run.log)):
            try:
                train(config)
            except Interrupted:
                config = replace(config, resume=True)
            else:
                raise RuntimeError(f"the run was not interrupted after step {stop}")
    result = train(config)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]
    return {
        "weights": hash_weights(output),
        "metrics": hash_json(rows),
        "result": hash_json(result),
        "files": hash_json(sorted(path.name for path in output.iterdir())),
        "rows": rows,
    }


def log_and_interrupt(run: Run[Any], stop: int, log: Any, number: int, metrics: dict[str, float]) -> None:
    """Stand in for `Run.log`: write the metrics of the step, then interrupt the run if it is step `stop`."""
    log(run, number, metrics)
    if number == stop:
        signal.raise_signal(signal.SIGINT)


def hash_weights(folder: Path) -> str:
    """Hash all tensors of a run's models, with their names, types and shapes."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        if NOT_TRAINED & {*file.parts}:
            continue
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.relative_to(folder)} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- comparing


def compare(first: Outcomes, second: Outcomes) -> int:
    """Print the cases that differ, each with the first step whose metrics differ. Return the exit status."""
    common = [name for name in first if name in second]
    different = [name for name in common if differences(first[name], second[name])]
    for name in different:
        print(f"{name}: not equal in {', '.join(differences(first[name], second[name]))}")
        print_first_difference(first[name], second[name])
    missing = (len(first) - len(common), len(second) - len(common))
    print(f"{len(common) - len(different)} cases are equal, {len(different)} differ", end="")
    print(f"; {missing[0]} are only in the first file, {missing[1]} only in the second" if any(missing) else "")
    return 1 if different or not common else 0


def differences(first: Outcome, second: Outcome) -> list[str]:
    """Return the names of the hashes that differ; `error` for a case that failed."""
    if "error" in first or "error" in second:
        return ["error"]
    return [key for key in HASHES if first[key] != second[key]]


def print_first_difference(first: Outcome, second: Outcome) -> None:
    for outcome, side in ((first, "first"), (second, "second")):
        if "error" in outcome:
            print(f"  the {side} failed: {outcome['error'][:300]}")
            return
    if len(first["rows"]) != len(second["rows"]):
        print(f"  {len(first['rows'])} steps in the first, {len(second['rows'])} in the second")
    for one, other in zip(first["rows"], second["rows"], strict=False):
        names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        if names:
            shown = ", ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in names)
            print(f"  step {one.get('step')}: {shown}")
            return


if __name__ == "__main__":
    sys.exit(main())
