"""Checks of answers: exact, numeric, by regular expression, by format. Each scores 1 if it passes and 0 if not.

`make_checker("numeric:answer")` returns a reward function: (prompts, completions, data rows) -> scores. The part after
the colon is the column with the right answer, a pattern, or the tags of a format.

Where a completion marks its answer, that part counts: `<answer>...</answer>`, `\\boxed{...}` or `#### ...` to the end
of the line, the last one if there are several. Otherwise `exact` takes the whole completion and `numeric` the last
number in it. The column may hold a whole solution that ends in such a mark, as GSM8K's does, or a list of answers that
are all right. Completions of a row whose column is null are excluded (None).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

from rlhf_core.config import ConfigError, did_you_mean
from rlhf_core.data.errors import DataError

Function = Callable[..., Any]
"""(prompts, completions, data rows) -> scores, None for a completion that is to be excluded."""


def make_checker(spec: str) -> Function:
    """Return the checker of a spec, `name` or `name:argument`; `exact` and `numeric` alone mean the column `answer`.

    Raises ConfigError for an unknown name and for an invalid pattern or invalid tags.
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
    """Score 1 where the answer equals that of the column, apart from the amount of whitespace."""
    return partial(_check_answers, column, _same_text)


def numeric(column: str = "answer") -> Function:
    """Score 1 where the answer is exactly the number of the column, in any notation: 1,200 and $1200.00 are equal."""
    return partial(_check_answers, column, partial(_same_number, column))


def regex(pattern: str = "") -> Function:
    """Score 1 where the pattern is found in the completion (Python's `re.search`)."""
    if not pattern:
        raise ValueError("expected a pattern after the colon")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression: {error}") from None
    return lambda prompts, completions, rows: [float(compiled.search(text) is not None) for text in completions]


def tagged(tags: str = "think+answer") -> Function:
    """Score 1 where the completion is <a>...</a> <b>...</b> for tags a+b: each once, in order, with only whitespace
    around them. A first tag that ends the prompt need not be repeated.
    """
    names = tags.split("+")
    if not all(re.fullmatch(r"\w+", name) for name in names) or len({*names}) < len(names):
        raise ValueError("expected names of tags with + between them, each once")
    words = "|".join(rf"</?{name}>" for name in names)
    inside = rf"(?:(?!{words}).)*+"  # anything but one of the tags; possessive, so that it never backtracks
    compiled = re.compile(r"\s*".join(rf"<{name}>{inside}</{name}>" for name in names), re.DOTALL)
    return partial(_check_format, f"<{names[0]}>", compiled)


CHECKERS: dict[str, Callable[..., Function]] = {"exact": exact, "numeric": numeric, "regex": regex, "format": tagged}


def _check_answers(
    column: str,
    equal: Callable[[Any, str], bool],
    prompts: list[str],
    completions: list[str],
    rows: list[dict[str, Any]],
) -> list[float | None]:
    """Compare each completion with the answer in the column of its row, or with each of a list of answers."""
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
            scores.append(float(any(equal(answer, completion) for answer in answers)))
    return scores


def _same_text(answer: Any, completion: str) -> bool:
    return marked_answer(completion).split() == marked_answer(str(answer)).split()


def _same_number(column: str, answer: Any, completion: str) -> bool:
    wanted = read_number(str(answer))
    if wanted is None:
        raise DataError(f"the row's {column!r} holds no number")
    return read_number(completion) == wanted


def _check_format(
    first_tag: str,
    pattern: re.Pattern[str],
    prompts: list[str],
    completions: list[str],
    rows: list[dict[str, Any]],
) -> list[float]:
    texts = [
        first_tag + completion if prompt.rstrip().endswith(first_tag) else completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return [float(pattern.fullmatch(text.strip()) is not None) for text in texts]


# -------------------------------------------------------------------------------------------------------------- answers


def marked_answer(text: str) -> str:
    """Return the part of a text that is marked as its answer, the last one of its kind; without a mark, the text."""
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
    """Return the content of the last \\boxed{...}, which may hold nested braces; None if none is closed."""
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
    """Return the last number of a text, or of the part marked as its answer; None if there is none.

    Signs, commas between thousands, decimals, exponents of up to three digits and fractions a/b are read, also in TeX
    notation. A currency, a unit or a percent sign is ignored: 5 % is 5.
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
