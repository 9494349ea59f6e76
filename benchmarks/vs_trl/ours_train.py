"""rlhf_core's training jobs: `train` as a user calls it, with a wait between its steps.

Settings: `job`, a name that `rlhf` knows, and `config`, what it is told.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator

from turns import Turns

from rlhf_core.cli import JOBS
from rlhf_core.config import from_dict
from rlhf_core.training.run import Run


def main() -> None:
    turns = Turns()
    args = turns.args
    own_steps = Run.steps

    def steps(run: Run) -> Iterator[int]:
        for step in own_steps(run):
            turns.begin()
            yield step
            row = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
            del row["seconds"]  # of the run, as it knows them
            turns.end(**row)

    Run.steps = steps
    module, config, train, _ = JOBS[args.job]
    module = importlib.import_module(module)
    shared = dict(output=args.output, max_steps=args.steps, epochs=args.steps, device="cpu", progress=False)
    getattr(module, train)(from_dict(getattr(module, config), shared | args.config))


if __name__ == "__main__":
    main()
