"""rlhf_core's training jobs: `train` as a user calls it, with a wait between its steps.

Settings: `job`, the name of a job of `rlhf`, and `config`, its settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from typing import Any

from turns import Turns

from rlhf_core.cli import JOBS
from rlhf_core.config import from_dict
from rlhf_core.training.run import Run, Step


def main() -> None:
    turns = Turns()
    args = turns.args
    Run.iterate = partialmethod(iterate_in_turns, turns, Run.iterate)
    Run.finish_step = partialmethod(finish_in_turns, turns, Run.finish_step)
    module_name, config_name, function_name, _ = JOBS[args.job]
    module = importlib.import_module(module_name)
    shared = dict(output=args.output, max_steps=args.steps, epochs=args.steps, device="cpu", progress=False)
    config = from_dict(getattr(module, config_name), shared | args.config)
    getattr(module, function_name)(config)


def iterate_in_turns(run: Run[Any], turns: Turns, iterate: Any, make_step: Callable[[int], Step]) -> Iterator[Step]:
    """Stand in for `Run.iterate`: wait for a request before each step."""
    return iterate(run, partial(begin_step, turns, make_step))


def begin_step(turns: Turns, make_step: Callable[[int], Step], number: int) -> Step:
    turns.begin()
    return make_step(number)


def finish_in_turns(
    run: Run[Any], turns: Turns, finish: Any, number: int, metrics: dict[str, float]
) -> dict[str, float]:
    """Stand in for `Run.finish_step`, the end of a step: answer the request with its metrics."""
    metrics = finish(run, number, metrics)
    turns.end(**metrics)
    return metrics


if __name__ == "__main__":
    main()
