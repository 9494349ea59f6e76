"""Judges: which of two completions of a prompt is better, where no scores exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core.data.records import Example
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.plugins import import_function
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.timeouts import CallTimeout, call_within, describe_failure
from rlhf_core.seeding import generator


class Verdicts(NamedTuple):
    """Verdicts on P pairs of completions."""

    second: Tensor  # (P,) bool: the second completion is better; False where not valid
    valid: Tensor  # (P,) bool: False for a tie and for a pair without a verdict


Judge = Callable[[list[list[int]], list[list[int]], list[list[int]], list[dict[str, Any]]], Verdicts]
"""(prompt ids, ids of the first completions, ids of the second ones, data rows) -> Verdicts."""


def load_judge(name: str, tokenizer: Tokenizer, *, timeout: float | None = None) -> Judge:
    """Return the judge `module:function`; see `function_judge`. Raises ValueError if there is no such function."""
    return function_judge(import_function(name), tokenizer, name=name, timeout=timeout)


def function_judge(
    function: Callable[..., Any],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    timeout: float | None = None,
) -> Judge:
    """Return a judge that calls `function(prompts, firsts, seconds, rows)`: lists of texts (without special tokens) and
    of data rows.

    For each pair the function returns 0 where the first completion is better, 1 where the second one is, and None for
    a tie or no verdict. The judge raises ValueError, which names the function and the pair, where the function raises,
    takes more than `timeout` seconds for a batch, or returns anything else.
    """
    return _FunctionJudge(function, tokenizer, name or str(getattr(function, "__name__", function)), timeout)


@dataclass(frozen=True)
class _FunctionJudge:
    function: Callable[..., Any]
    tokenizer: Tokenizer
    name: str
    timeout: float | None

    def __call__(
        self, prompts: list[list[int]], firsts: list[list[int]], seconds: list[list[int]], rows: list[dict[str, Any]]
    ) -> Verdicts:
        texts = [self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, firsts, seconds)]
        begin = [f"the first completion begins {text[:60]!r}" for text in texts[1]]
        columns: list[list[Any]] = [*texts, [dict(row) for row in rows]]
        try:
            answers = call_within(self.timeout, self.function, *columns)
        except (Exception, CallTimeout) as error:
            fault = describe_failure(error, self.function, self.timeout, *columns, begin=begin, what="pair")
            raise ValueError(f"judge {self.name}: {fault}") from error
        answers = answers.tolist() if isinstance(answers, Tensor | np.ndarray) else answers
        sized = isinstance(answers, Sequence) and not isinstance(answers, str)
        if not sized or len(answers) != len(prompts):
            got = f"{len(answers)} answers" if sized else repr(answers)
            raise ValueError(f"judge {self.name}: {got} for {len(prompts)} pairs")
        for pair, answer in enumerate(answers):
            # True is 1, but may have been meant as "the first one is better".
            number = isinstance(answer, Integral) and not isinstance(answer, bool)
            if answer is not None and not (number and answer in (0, 1)):
                raise ValueError(
                    f"judge {self.name}: pair {pair} got {answer!r}, expected 0 (the first is better), 1 (the second) "
                    f"or None; {begin[pair]}"
                )
        return Verdicts(
            second=torch.tensor([answer == 1 for answer in answers]),
            valid=torch.tensor([answer is not None for answer in answers]),
        )


def in_random_order(judge: Judge, seed: int, *purpose: str | int) -> Judge:
    """Return the judge with the two completions of each pair in a random order, a function of `seed` and `purpose`:
    many judges prefer one position."""
    return _RandomOrder(judge, seed, purpose)


@dataclass(frozen=True)
class _RandomOrder:
    judge: Judge
    seed: int
    purpose: tuple[str | int, ...]

    def __call__(
        self, prompts: list[list[int]], firsts: list[list[int]], seconds: list[list[int]], rows: list[dict[str, Any]]
    ) -> Verdicts:
        swapped = torch.rand(len(prompts), generator=generator(self.seed, *self.purpose)) < 0.5
        pairs = [(b, a) if swap else (a, b) for swap, a, b in zip(swapped.tolist(), firsts, seconds, strict=True)]
        verdicts = self.judge(prompts, [a for a, _ in pairs], [b for _, b in pairs], rows)
        return verdicts._replace(second=(verdicts.second ^ swapped) & verdicts.valid)


def compare_by_judge(
    judge: Judge, experience: Experience, rows: Sequence[Example], seed: int, *purpose: str | int
) -> Verdicts:
    """Return the judge's verdicts on the two completions of each prompt, shown in random order."""
    columns = experience.prompts[::2], experience.completions[::2], experience.completions[1::2]
    return in_random_order(judge, seed, *purpose)(*columns, [row.record.row for row in rows])


def judged_pairs(verdicts: Verdicts) -> tuple[Tensor, int]:
    """Return (P, 2) rows, of each two completions the better and the other one, and the number without a verdict."""
    firsts, second = torch.arange(len(verdicts.valid)) * 2, verdicts.second.long()
    pairs = torch.stack([firsts + second, firsts + 1 - second], 1)
    return pairs[verdicts.valid], int((~verdicts.valid).sum())
