"""What both sides score completions with, each by its own protocol. No model: a reward that takes no time."""

from __future__ import annotations


def share_of_spaces(prompts: list[str], completions: list[str], *_: object, **__: object) -> list[float]:
    """How many of its characters are spaces: short words score more."""
    return [text.count(" ") / max(len(text), 1) for text in completions]
