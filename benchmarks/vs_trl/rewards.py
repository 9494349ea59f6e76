"""The reward function of both sides. It needs no model, so that it takes no time."""

from __future__ import annotations


def share_of_spaces(prompts: list[str], completions: list[str], *_: object, **__: object) -> list[float]:
    """Return the share of spaces in each completion."""
    return [text.count(" ") / max(len(text), 1) for text in completions]
