"""Judges, as a config names them: functions of prompts, first completions, second completions and data rows."""

from __future__ import annotations


def _by(key, firsts, seconds):
    ranks = [(key(first), key(second)) for first, second in zip(firsts, seconds, strict=True)]
    return [None if first == second else int(second > first) for first, second in ranks]


def likes(prompts, firsts, seconds, rows):
    """The one with more dolos, where there is one."""
    return _by(lambda text: text.split().count("dolo"), firsts, seconds)


def dislikes(prompts, firsts, seconds, rows):
    return [None if answer is None else 1 - answer for answer in likes(prompts, firsts, seconds, rows)]


def alphabet(prompts, firsts, seconds, rows):
    """The one that stands later in a dictionary; no verdict where the prompt has an h."""
    assert [row["prompt"] for row in rows] == [prompt.strip() for prompt in prompts]
    later = _by(str, firsts, seconds)
    return [None if "h" in prompt else answer for prompt, answer in zip(prompts, later, strict=True)]


def undecided(prompts, firsts, seconds, rows):
    return [None] * len(prompts)


def talkative(prompts, firsts, seconds, rows):
    return ["the first, I think"] * len(prompts)
