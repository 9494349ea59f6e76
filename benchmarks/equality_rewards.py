"""Reward functions, a judge and a preference loss for the runs of equality.py."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.preference import register_preference_loss

Rows = list[dict[str, Any]]


def vowels(prompts: list[str], completions: list[str], rows: Rows) -> list[float]:
    """Return ten times the share of vowels in each completion."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) * 10 for text in completions]


def some_none(prompts: list[str], completions: list[str], rows: Rows) -> list[float | None]:
    """Return the number of e's in each completion; None where its length is a multiple of 5."""
    return [None if len(text) % 5 == 0 else float(text.count("e")) for text in completions]


def coarse(prompts: list[str], completions: list[str], rows: Rows) -> list[float]:
    """Return 1 for a completion that contains "the" and 0 for others, so that many groups have equal scores."""
    return [float("the" in text) for text in completions]


def constant(prompts: list[str], completions: list[str], rows: Rows) -> list[float]:
    """Return 1 for every completion, so that every group has equal scores."""
    return [1.0] * len(prompts)


def by_token(prompts: list[str], completions: list[str], rows: Rows, completion_ids: list[list[int]]) -> list[Any]:
    """Return a score for each token of each completion."""
    return [[0.1 * (place % 7) for place in ids] for ids in completion_ids]


def prefers_short(prompts: list[str], firsts: list[str], seconds: list[str], rows: Rows) -> list[int | None]:
    """Judge: prefer the shorter completion; None where both have the same length."""
    return [
        None if len(first) == len(second) else int(len(second) < len(first))
        for first, second in zip(firsts, seconds, strict=True)
    ]


@register_preference_loss("tempered")
def tempered(pairs: Any, *, beta: float, tau: float = 0.5) -> Tensor:
    """Compute DPO's sigmoid loss with a temperature `tau`, (P,)."""
    return -F.logsigmoid(beta * pairs.difference / tau)
