"""Judging: which of two completions of a prompt is better, where nobody gives scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core.plugins import import_function
from rlhf_core.rollout.rewards import TimeIsUp, blame, call_within
from rlhf_core.seeding import generator


class Verdicts(NamedTuple):
    """On P pairs of completions."""

    second: Tensor  # (P,) bool, True = the second one is better; False where not valid
    valid: Tensor  # (P,) bool, False = a tie, or no verdict


Judge = Callable[[list[list[int]], list[list[int]], list[list[int]], list[dict[str, Any]]], Verdicts]
"""(prompt ids, ids of the first completions, ids of the second ones, data rows) -> Verdicts."""


def load_judge(name: str, tokenizer: Any, *, timeout: float | None = None) -> Judge:
    """The judge `module:function`; ValueError where there is none."""
    return function_judge(import_function(name), tokenizer, name=name, timeout=timeout)


def function_judge(
    function: Callable[..., Sequence[int | None]],
    tokenizer: Any,
    *,
    name: str | None = None,
    timeout: float | None = None,
) -> Judge:
    """Verdicts of `function(prompts, firsts, seconds, rows)`: lists of texts (without special tokens) and of data rows.

    It returns for each pair 0 where the first completion is better, 1 where the second one is, and None for a tie or
    where it cannot tell. The judge raises ValueError that names the function, and the pair, where it raises, takes more
    than `timeout` seconds for a batch, or returns anything else.
    """
    name = name or getattr(function, "__name__", str(function))

    def judge(
        prompts: list[list[int]], firsts: list[list[int]], seconds: list[list[int]], rows: list[dict[str, Any]]
    ) -> Verdicts:
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, firsts, seconds)]
        columns = *texts, [dict(row) for row in rows]

        def begin(pair: int) -> str:
            return f"the first completion begins {texts[1][pair][:60]!r}"

        try:
            answers = call_within(timeout, function, *columns)
        except (Exception, TimeIsUp) as error:
            fault = blame(error, function, timeout, *columns, begin=begin, what="pair")
            raise ValueError(f"judge {name}: {fault}") from error
        answers = answers.tolist() if isinstance(answers, Tensor | np.ndarray) else answers
        sized = isinstance(answers, Sequence) and not isinstance(answers, str)
        if not sized or len(answers) != len(prompts):
            raise ValueError(
                f"judge {name}: {f'{len(answers)} answers' if sized else repr(answers)} for {len(prompts)} pairs"
            )
        for pair, answer in enumerate(answers):
            # True is 1, but may have been meant as "the first one wins".
            number = isinstance(answer, Integral) and not isinstance(answer, bool)
            if answer is not None and not (number and answer in (0, 1)):
                raise ValueError(
                    f"judge {name}: pair {pair} got {answer!r}, expected 0 (the first is better), 1 (the second) or "
                    f"None; {begin(pair)}"
                )
        return Verdicts(
            second=torch.tensor([answer == 1 for answer in answers]),
            valid=torch.tensor([answer is not None for answer in answers]),
        )

    return judge


def in_random_order(judge: Judge, *seed: str | int) -> Judge:
    """The same judge, shown each pair in an order that is drawn anew from `seed`: many judges favour a place."""

    def shuffled(
        prompts: list[list[int]], firsts: list[list[int]], seconds: list[list[int]], rows: list[dict[str, Any]]
    ) -> Verdicts:
        turned = torch.rand(len(prompts), generator=generator(*seed)) < 0.5
        shown = [(b, a) if turn else (a, b) for turn, a, b in zip(turned.tolist(), firsts, seconds, strict=True)]
        verdicts = judge(prompts, [a for a, _ in shown], [b for _, b in shown], rows)
        return verdicts._replace(second=(verdicts.second ^ turned) & verdicts.valid)

    return shuffled
