"""The formats of rows that the library reads, and `iter_records`, which reads a path as records.

A format is recognised by its columns. Every row becomes a `Record`: a prompt and its completions, as text or as chat
messages, not yet rendered and not yet tokenised (see `chat.py` and `tokenize.py`).
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlhf_core.data import convert
from rlhf_core.data.account import Account, list_reasons
from rlhf_core.data.attributes import with_attributes
from rlhf_core.data.convert import Parts
from rlhf_core.data.errors import BadRow, DataError
from rlhf_core.data.messages import checked_text, is_supervised, not_empty, optional_number, read_tools
from rlhf_core.data.records import Completion, Prompt, Record, Row
from rlhf_core.data.sources import formatted, read_rows

logger = logging.getLogger("rlhf_core.data")

# The needs that a job can have of its data, and the commands that have them.
COMMANDS = {
    "supervised": "rlhf sft",
    "preference": "rlhf dpo or rlhf reward (or rlhf kto --pairs)",
    "unpaired": "rlhf kto",
    "ranking": "rlhf reward",
    "process": "rlhf reward",
    "prompts": "rlhf ppo",
}


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True, slots=True)
class Format:
    """A format of rows: its columns, the need it serves, and the functions that read it."""

    need: str  # the need it serves in full, a key of COMMANDS
    looks_like: str  # for error messages: "the data look like ..."
    required: tuple[tuple[str, ...], ...]  # for each required column, the names it may have
    convert: Callable[[Row], Parts]  # raises BadRow
    prompt: Callable[[Row], Prompt] | None  # reads the prompt alone; None for a format without one
    optional: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True  # distinguishes formats that have the same columns

    def matches(self, row: Row) -> bool:
        return all(any(name in row for name in names) for names in self.required) and self.fits(row)

    def serves(self, need: str) -> bool:
        pairs_are_rankings = (self.need, need) == ("preference", "ranking")
        return self.need == need or pairs_are_rankings or (need == "prompts" and self.prompt is not None)

    def columns(self) -> str:
        """Return 'prompt, completion or response, (input)': the columns, optional ones in parentheses."""
        return ", ".join([" or ".join(names) for names in self.required] + [f"({name})" for name in self.optional])


_COMPLETION = ("completion", "response")

# In the order of recognition; the first match is taken. A format precedes those whose columns are a subset of its own
# (`unpaired` before `prompt_completion` before `prompts`); `text` is late because many data sets have a rendered `text`
# column beside others.
FORMATS: dict[str, Format] = {
    "preference": Format(
        need="preference",
        looks_like="preference pairs",
        required=(("prompt",), ("chosen",), ("rejected",)),
        convert=convert.preference,
        prompt=convert.preference_prompt,
    ),
    "preference_implicit": Format(
        need="preference",
        looks_like="preference pairs of whole conversations",
        required=(("chosen",), ("rejected",)),
        convert=convert.preference_implicit,
        prompt=partial(convert.messages_prompt, name="chosen"),
        fits=convert.holds_messages,
    ),
    "hh": Format(
        need="preference",
        looks_like="preference pairs of whole transcripts (Anthropic HH)",
        required=(("chosen",), ("rejected",)),
        convert=convert.hh,
        prompt=convert.hh_prompt,
        fits=convert.holds_transcripts,
    ),
    "unpaired": Format(
        need="unpaired",
        looks_like="single completions with a good/bad label",
        required=(("prompt",), _COMPLETION, ("label",)),
        convert=convert.unpaired,
        prompt=convert.completion_prompt,
    ),
    "messages": Format(
        need="supervised",
        looks_like="conversations",
        required=(("messages",),),
        convert=partial(convert.messages, name="messages"),
        prompt=partial(convert.messages_prompt, name="messages"),
    ),
    "sharegpt": Format(
        need="supervised",
        looks_like="ShareGPT conversations",
        required=(("conversations",),),
        convert=partial(convert.messages, name="conversations"),
        prompt=partial(convert.messages_prompt, name="conversations"),
    ),
    "alpaca": Format(
        need="supervised",
        looks_like="Alpaca instructions",
        required=(("instruction",), ("output",)),
        optional=("input",),
        convert=convert.alpaca,
        prompt=convert.alpaca_prompt,
    ),
    "prompt_completion": Format(
        need="supervised",
        looks_like="prompts with one completion each",
        required=(("prompt",), _COMPLETION),
        convert=convert.prompt_completion,
        prompt=convert.completion_prompt,
    ),
    "text": Format(
        need="supervised",
        looks_like="plain text",
        required=(("text",),),
        convert=convert.plain_text,
        prompt=None,
    ),
    "process": Format(
        need="process",
        looks_like="answers in steps, each with a label",
        required=(("prompt",), ("completions",), ("labels",)),
        convert=convert.process,
        prompt=convert.process_prompt,
    ),
    "ranking": Format(
        need="ranking",
        looks_like="ranked lists of answers",
        required=(("prompt",), ("completions", "responses")),
        optional=("ranks or scores",),
        convert=convert.ranking,
        prompt=convert.ranking_prompt,
    ),
    "prompts": Format(
        need="prompts",
        looks_like="prompts without completions",
        required=(("prompt",),),
        convert=convert.prompts,
        prompt=convert.prompt_column,
    ),
}


# ---------------------------------------------------------------------------------------------------------- recognition


def named_format(name: str) -> Format:
    """Return the format of that name. Raises DataError, with the nearest name, for any other."""
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"unknown data format {name!r}, expected one of {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def recognise(row: Row, *, need: str, source: str) -> Format:
    """Return the first format of the table that the row matches. Raises DataError when there is none.

    `need` is for the error message only: preference pairs stay pairs in a job that cannot use them, which is an error
    of its own.
    """
    for format in FORMATS.values():
        if format.matches(row):
            return format
    raise DataError(f"{source}: found columns {list(row)}; none of the formats fits; {_nearest_format(row, need)}")


def _settle_format(row: Row, *, name: str | None, need: str, source: str) -> Format:
    """Return the format of a data set, recognised by its first row unless it is named.

    Raises DataError if it cannot serve `need`.
    """
    format = recognise(row, need=need, source=source) if name is None else named_format(name)
    if format.serves(need):
        return format
    others = [other for other in FORMATS if FORMATS[other].serves(need) and FORMATS[other].matches(row)]
    by_name = f"to read them otherwise, name the format: --data.format {' or '.join(others)}"
    raise DataError(
        f"{source}: found columns {list(row)}: the data look like {format.looks_like}; that is for "
        f"{COMMANDS[format.need]}, not for {COMMANDS[need]}; {by_name if others else _nearest_format(row, need)}"
    )


def _nearest_format(row: Row, need: str) -> str:
    """Return, for an error message, the format nearest to the columns among those that serve the need."""
    columns = list(row)
    served = {name: format for name, format in FORMATS.items() if format.serves(need)}
    nearness = {name: _nearness(columns, format) for name, format in served.items()}
    # A negative value is not near. A format whose columns are all present was refused for their content, so that
    # renaming would not help.
    nearness = {name: value for name, value in nearness.items() if 0 <= value < len(served[name].required)}
    if not nearness:
        return "expected one of: " + "; ".join(f"{name} ({format.columns()})" for name, format in served.items())
    nearest = max(nearness, key=nearness.__getitem__)  # the first of equals
    hints = [f"; did you mean {column!r} for {name!r}?" for column, name in _misspelt(columns, served[nearest])]
    return f"nearest is {nearest!r}, which needs {served[nearest].columns()}{''.join(hints)}"


def _nearness(columns: Sequence[str], format: Format) -> int:
    """Return the number of required columns present less that of the missing ones; misspelt ones count as neither."""
    present = sum(any(name in columns for name in names) for names in format.required)
    missing = len(format.required) - present - len(_misspelt(columns, format))
    return present - missing


def _misspelt(columns: Sequence[str], format: Format) -> list[tuple[str, str]]:
    """Return (column found, name probably meant) for each required column that is missing."""
    pairs = []
    for names in format.required:
        if not any(name in columns for name in names):
            close = [(column, name) for name in names for column in difflib.get_close_matches(name, columns, n=1)]
            pairs.extend(close[:1])
    return pairs


# ----------------------------------------------------------------------------------------------------------- the reader


_IDENTICAL = "chosen and rejected are the same"
_ALL_TIED = "all answers have the same rank, or the same text"
_LEFT_OUT = "the formatting function leaves it out"
_TIED = "answers with the rank, or the text, of another are left out"


def read_records(path: str | Path, **options: Any) -> list[Record]:
    """Return every row behind `path` as a record; the options are those of `iter_records`."""
    return list(iter_records(path, **options))


def iter_records(
    path: str | Path,
    *,
    need: str,
    format: str | None = None,
    split: str | None = None,
    skip_bad_rows: int = 0,
    limit: int | None = None,
    turns: Literal["last", "all"] = "last",
    system: str | None = None,
    attributes: Sequence[str] | None = None,
    step_separator: str = "\n",
    formatting: str | None = None,
    account: Account | None = None,
) -> Iterator[Record]:
    """Read every row behind `path` as a record that serves `need`, one after another.

    Pairs whose two completions are equal express no preference: they are dropped and counted. With more bad rows than
    may be skipped, the remaining rows are only counted, for the error at the end.

    Args:
        path, split: see `read_rows`: files, folders, `datasets` folders and hub names.
        need: "supervised", "preference", "unpaired", "ranking" (pairs are rankings of two), "process" (completions in
            steps) or "prompts" (any format with a prompt; completions are ignored).
        format: a name in FORMATS; None recognises it by the columns of the first row. Every row must then match.
        skip_bad_rows: how many unusable rows to skip, count and report before they are an error.
        limit: stop after this many records; None reads all.
        turns: the assistant turns of a conversation that are supervised: the last, or all.
        system: a system message for conversations that have none, in a message or a `system` column.
        attributes: names of columns, or NAME:VALUE, to write into the prompt (see `with_attributes`).
        step_separator: text between the steps of a completion.
        formatting: a function of the user's, module:function, that is applied to every row first (see `formatted`).
        account: where to count the rows that are left out, instead of logging warnings.

    Raises:
        DataError: data that cannot be used.
        ValueError: arguments out of range.
    """
    if need not in COMMANDS:
        raise ValueError(f"need={need!r}, expected one of {', '.join(COMMANDS)}")
    if turns not in ("last", "all"):
        raise ValueError(f"turns={turns!r}, expected 'last' or 'all'")
    if turns == "all" and need != "supervised":
        raise DataError(f"data.turns='all' is for {COMMANDS['supervised']}: here only the last answer is used")
    if turns == "all" and attributes:
        raise DataError("data.attributes with data.turns='all': expected one of the two, as they are of one answer")
    if skip_bad_rows < 0:
        raise ValueError(f"skip_bad_rows={skip_bad_rows}, expected 0 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}, expected 1 or more, or None")
    if format is not None:
        named_format(format)  # report a misspelt name before anything is read
    rows = read_rows(path, split)
    formatted_rows = rows if formatting is None else formatted(rows, formatting)
    make_record = partial(
        _record, need=need, turns=turns, system=system, attributes=attributes, step_separator=step_separator
    )
    return _records(
        path, formatted_rows, make_record, format, need=need, most_bad=skip_bad_rows, limit=limit, account=account
    )


def _records(
    path: str | Path,
    rows: Iterable[tuple[str, Row | BadRow | None]],
    make_record: Callable[[Row, Format, str], tuple[Record, int]],
    format: str | None,
    *,
    need: str,
    most_bad: int,
    limit: int | None,
    account: Account | None,
) -> Iterator[Record]:
    """Implement `iter_records` for rows that were read; make_record: from (row, format, source), see `_record`."""
    counts = Account(source=str(path)) if account is None else account
    settled: Format | None = None
    kept, num_read = 0, 0
    bad = Account()  # bad rows alone: the caller of `iter_records` may count other losses in `account` meanwhile
    one_too_many: tuple[str, BadRow] | None = None  # (source, reason)
    for source, row in rows:
        num_read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if row is None:
                counts.drop(_LEFT_OUT, source)
                continue
            if settled is None:
                settled = _settle_format(row, name=format, need=need, source=source)
            record, tied = make_record(row, settled, source)
        except BadRow as error:
            bad.drop(str(error), source)
            counts.drop(str(error), source)
            if bad.rows_dropped == most_bad + 1:
                one_too_many = source, error
            continue
        first, *others = record.completions or [None]
        if need in ("preference", "ranking") and first in (others or [first]):
            counts.drop(_IDENTICAL if others else _ALL_TIED, source)
            continue
        if tied:
            counts.note(_TIED, source)
        kept += 1
        if one_too_many is None:
            yield record
        if kept == limit:
            break
    if one_too_many is not None:
        source, reason = one_too_many
        raise DataError(
            f"{source}: {reason}\n{bad.rows_dropped} of the {num_read} rows read cannot be used: "
            f"{list_reasons(bad.dropped)}. Fix them, or skip them: --data.skip-bad-rows {bad.rows_dropped}"
        ) from reason.__cause__
    if not kept:
        raise DataError(counts.nothing_left())
    if account is None:
        for line in counts.warnings(num_read):
            logger.warning(line)


def _record(
    row: Row,
    format: Format,
    source: str,
    *,
    need: str,
    turns: str,
    system: str | None,
    attributes: Sequence[str] | None,
    step_separator: str,
) -> tuple[Record, int]:
    """Return the record of a row, and the number of ranked completions that were left out of it."""
    only_prompt = format.prompt if need == "prompts" else None
    parts = Parts(only_prompt(row), ()) if only_prompt is not None else format.convert(row)
    prompt, completions = _supervised_turns(parts.prompt, parts.completions, turns)
    prompt = _with_system(prompt, row, system, source)
    prompt = with_attributes(prompt, attributes, row, source) if attributes else prompt
    steps = None
    if parts.steps is not None:
        ended = (step.removesuffix(step_separator) + step_separator for step in parts.steps[:-1])
        steps = (*ended, parts.steps[-1])
        whole = "".join(steps)
        completions = (whole if isinstance(prompt, str) else [{"role": "assistant", "content": whole}],)
    weight = optional_number(row, "weight")
    if weight is not None and weight <= 0:
        raise BadRow("field 'weight': found a number that is not above 0, expected one that is, or no row")
    record = Record(
        prompt=prompt,
        completions=completions,
        row=row,
        source=source,
        label=parts.label,
        tools=read_tools(row) if isinstance(prompt, list) else None,
        weight=1.0 if weight is None else weight,
        margin=_margin(row) if need == "preference" else None,
        steps=steps,
        step_labels=parts.step_labels,
    )
    return record, parts.tied


def _margin(row: Row) -> float | None:
    """Return the `margin` column, or else the difference of the columns `score_chosen` and `score_rejected`."""
    margin = optional_number(row, "margin")
    chosen, rejected = optional_number(row, "score_chosen"), optional_number(row, "score_rejected")
    return chosen - rejected if margin is None and chosen is not None and rejected is not None else margin


def _supervised_turns(
    prompt: Prompt | None, completions: tuple[Completion, ...], turns: str
) -> tuple[Prompt | None, tuple[Completion, ...]]:
    """Move the turns of a conversation that are not supervised to its prompt: all before the first, or last, one."""
    if len(completions) != 1 or isinstance(completions[0], str):
        return prompt, completions
    messages = completions[0]
    supervised = [i for i, message in enumerate(messages) if is_supervised(message)]
    if not supervised:
        raise BadRow("all assistant turns have the weight 0, expected one to learn from")
    if turns == "last":
        supervised = supervised[-1:]
    if not all(not_empty(messages[i]) for i in supervised):
        raise BadRow("an assistant turn is empty, expected text to learn from in all of them (or --data.turns last)")
    return [*(prompt or []), *messages[: supervised[0]]], (messages[supervised[0] : supervised[-1] + 1],)


def _with_system(prompt: Prompt | None, row: Row, system: str | None, source: str) -> Prompt | None:
    """Prepend the system message of the row's `system` column, or else `system`, to a conversation without one."""
    own = row.get("system")
    own = checked_text(own, "field 'system'") if own is not None and prompt is not None else ""
    if not isinstance(prompt, list):
        if own.strip():
            raise BadRow("field 'system' beside a prompt that is text, expected messages: text has no place for it")
        if system is not None:
            raise DataError(f"{source}: the prompt is text, expected messages for data.system: text has no room for it")
        return prompt
    if prompt[0]["role"] == "system":
        if own.strip() and own != prompt[0]["content"]:
            raise BadRow("field 'system' beside a conversation that starts with another system message, expected one")
        return prompt
    text = own if own.strip() else system
    return prompt if text is None else [{"role": "system", "content": text}, *prompt]
