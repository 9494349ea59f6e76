"""Answers that can be checked: exact, numeric, by regular expression, by format. Each scores 1 if right, 0 if not.

`make_checker("numeric:answer")` is a function like any reward function: (prompts, completions, data rows) -> scores.
The part after the colon is the column that holds the right answer, a pattern, or the tags of a format.

Where a completion says which part of it is the answer, that part counts: `<answer>...</answer>`, `\\boxed{...}` or
`#### ...` to the end of the line, the last one if there are several. Otherwise `exact` takes the whole completion and
`numeric` the last number in it. The column may hold a whole solution that ends in such a mark, as GSM8K's does, or a
list of answers that are all right. A row whose column is null is left out (None).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rlhf_core.config import ConfigError, did_you_mean
from rlhf_core.data.sources import DataError

Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[Any]]
"""(prompts, completions, data rows) -> scores, None for a completion that is to be left out."""


def make_checker(spec: str) -> Function:
    """The checker that `name` or `name:argument` asks for; `exact` and `numeric` alone mean the column `answer`.

    Raises ConfigError for an unknown name and for a pattern or tags that cannot be.
    """
    name, _, argument = spec.partition(":")
    if name not in CHECKERS:
        expected = f"one of {', '.join(CHECKERS)}{did_you_mean(name, CHECKERS)}"
        raise ConfigError(f"checker={spec!r}: expected {expected}")
    try:
        return CHECKERS[name](argument) if argument else CHECKERS[name]()
    except ValueError as error:
        raise ConfigError(f"checker={spec!r}: {error}") from None


# ------------------------------------------------------------------------------------------------------------- checkers


def exact(column: str = "answer") -> Function:
    """1 where the answer is that of the column, but for space around it and how much of it there is between words."""

    def plain(text: str) -> str:
        return " ".join(text.split())

    def right(answer: Any, completion: str) -> bool:
        return plain(marked_answer(completion)) == plain(marked_answer(str(answer)))

    return _compare_with(column, right)


def numeric(column: str = "answer") -> Function:
    """1 where the answer is the number of the column, exactly, however it is written: 1,200 and $1200.00 are equal."""

    def right(answer: Any, completion: str) -> bool:
        wanted = read_number(str(answer))
        if wanted is None:
            raise DataError(f"the row's {column!r} holds no number")
        return read_number(completion) == wanted

    return _compare_with(column, right)


def regex(pattern: str = "") -> Function:
    """1 where the pattern is found in the completion (Python's `re.search`)."""
    if not pattern:
        raise ValueError("expected a pattern after the colon")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression: {error}") from None
    return lambda prompts, completions, rows: [float(compiled.search(text) is not None) for text in completions]


def tagged(tags: str = "think+answer") -> Function:
    """1 where the completion is <a>...</a> <b>...</b> for tags a+b: each once, in order, with only space around them.

    A first tag that the prompt ends with need not be repeated.
    """
    names = tags.split("+")
    if not all(re.fullmatch(r"\w+", name) for name in names) or len({*names}) < len(names):
        raise ValueError("expected names of tags with + between them, each once")
    words = "|".join(rf"</?{name}>" for name in names)
    inside = rf"(?:(?!{words}).)*+"  # anything but one of the tags; once matched, never tried again
    compiled = re.compile(r"\s*".join(rf"<{name}>{inside}</{name}>" for name in names), re.DOTALL)

    def check(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
        opened = f"<{names[0]}>"
        texts = [
            opened + completion if prompt.rstrip().endswith(opened) else completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return [float(compiled.fullmatch(text.strip()) is not None) for text in texts]

    return check


CHECKERS: dict[str, Callable[..., Function]] = {"exact": exact, "numeric": numeric, "regex": regex, "format": tagged}


def _compare_with(column: str, right: Callable[[Any, str], bool]) -> Function:
    """A function that compares each completion with the row's answer, or with each of a list of answers."""

    def check(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float | None]:
        scores: list[float | None] = []
        for completion, row in zip(completions, rows, strict=True):
            if column not in row:
                near = difflib.get_close_matches(column, row, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"the row has no column {column!r}, only {', '.join(map(repr, row))}{hint}")
            answers = row[column] if isinstance(row[column], list) else [row[column]]
            if not answers or answers == [None]:
                scores.append(None)
            else:
                scores.append(float(any(right(answer, completion) for answer in answers)))
        return scores

    return check


# -------------------------------------------------------------------------------------------------------------- answers


def marked_answer(text: str) -> str:
    """The part of a text that is marked as its answer, the last one of its kind; all of it if none is marked."""
    tagged_parts = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    boxed = _boxed(text)
    after_hashes = re.findall(r"####[ \t]*(\S[^\n]*)", text)
    if tagged_parts:
        text = tagged_parts[-1]
    elif boxed is not None:
        text = boxed
    elif after_hashes:
        text = after_hashes[-1]
    return text.strip()


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, which may hold braces of its own; None if there is none that ends."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for end, letter in enumerate(rest if found else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:end]
    return None


_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""(?<![A-Za-z0-9_])                                # not inside a word: the 2 of CO2, the minus of 10-5
    (?P<sign>[-+\u2212]?)(?:[$€£¥₹]\s?)?(?P<inner>[-+\u2212]?)    # -5, -$5, $-5
    (?P<number>(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?)
    (?:\s?/\s?(?P<divisor>{_DIGITS}))?""",
    re.VERBOSE,
)
_TEX = [
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\{,\}"), ","),  # 1{,}000
    (re.compile(r"\\[!,;]"), ""),  # thin spaces: 1\,000
    (re.compile(r"\\\$"), "$"),
]


def read_number(text: str) -> Fraction | None:
    """The last number of a text, or of what it marks as its answer; None if there is none.

    Signs, commas between thousands, decimals, exponents of up to three digits and fractions a/b are read, also as TeX
    writes them. A currency, a unit or a percent sign is left aside: 5 % is 5.
    """
    text = marked_answer(text)
    for pattern, plain in _TEX:
        text = pattern.sub(plain, text)
    found = [*_NUMBER.finditer(text)]
    if not found:
        return None
    last = found[-1]
    negative = (last["sign"] in ("-", "\u2212")) != (last["inner"] in ("-", "\u2212"))
    try:
        number = Fraction(last["number"].replace(",", "")) / Fraction((last["divisor"] or "1").replace(",", ""))
    except (ValueError, ZeroDivisionError):  # thousands of digits; a division by 0
        return None
    return -number if negative else number
