"""Reading what a reward function returns for one completion: a number, a number for each token, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.data.tokenizer import Tokenizer


def parse_score(answer: Any, ids: Sequence[int], text: str, tokenizer: Tokenizer) -> tuple[float, list[float] | None]:
    """Return the score of one completion, NaN for None, and its numbers by token, None where there are none.

    Args:
        answer: what the function returned: None, a number, one number for each token, or a mapping from character
            positions of `text` to numbers.
        ids, text: the completion.

    Raises:
        ValueError: "got ..., expected ...", for anything else and for numbers that are not finite float32.
    """
    if answer is None:
        return math.nan, None
    if isinstance(answer, Mapping):
        return _parse_positions(answer, ids, text, tokenizer)
    if not is_sequence(answer):
        number = _number(answer)
        if number is None:
            raise ValueError(f"got {answer!r}, expected a finite number, or None to leave it out")
        return number, None
    if len(answer) != len(ids):
        raise ValueError(f"got {len(answer)} numbers, expected one for each of its {len(ids)} tokens")
    numbers = []
    for t, value in enumerate(answer):
        number = _number(value)
        if number is None:
            raise ValueError(f"got {value!r} for token {t}, expected a finite number")
        numbers.append(number)
    return _sum(numbers), numbers


def is_sequence(answer: Any) -> bool:
    """Whether a completion got one number for each token; a tensor or array of a single number is that number."""
    if isinstance(answer, Tensor | np.ndarray):
        return answer.ndim == 1 and len(answer) != 1
    return isinstance(answer, list | tuple)


def _parse_positions(
    answer: Mapping[Any, Any], ids: Sequence[int], text: str, tokenizer: Tokenizer
) -> tuple[float, list[float]]:
    """Return the score and its numbers by token, from numbers by character position."""
    numbers, prefixes = [0.0] * len(ids), list[str]()
    for position, value in answer.items():
        number = _number(value)
        if number is None:
            raise ValueError(f"got {value!r} for character {position!r}, expected a finite number")
        whole = isinstance(position, Integral) and not isinstance(position, bool)
        if not whole or not 0 <= position <= len(text):
            raise ValueError(f"got a number for character {position!r}, expected one from 0 to {len(text)}")
        # The first token after which the decoded text has that character. Part of a character may decode to others.
        token = len(ids) - 1
        if position < len(text):
            if not prefixes:
                prefixes = tokenizer.batch_decode([ids[: k + 1] for k in range(len(ids))], skip_special_tokens=True)
            wanted = text[: int(position) + 1]
            token = next((k for k, prefix in enumerate(prefixes) if prefix.startswith(wanted)), token)
        numbers[token] += number
    return _sum(numbers), numbers


def _sum(numbers: Sequence[float]) -> float:
    total = _number(math.fsum(numbers))
    if total is None:
        raise ValueError(f"got numbers whose sum is {math.fsum(numbers)}, expected a finite one")
    return total


def _number(value: Any) -> float | None:
    """Return a score as a float, None if it is not a number or not a finite float32."""
    single = isinstance(value, Real | np.bool_) or (isinstance(value, Tensor) and value.numel() == 1)
    try:
        number = float(value) if single else math.nan
    except (OverflowError, RuntimeError):  # an integer too large, a complex tensor
        return None
    return number if abs(number) <= torch.finfo(torch.float32).max else None
