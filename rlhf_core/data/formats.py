"""What rows mean: every format the library reads, and the one function that turns a path into records.

A format is recognised by its columns. All of them end as the same thing, a `Record`: a prompt and its completions, as
text or as chat messages, not yet rendered and not yet tokens (`chat.py` and `tokenize.py` do that).
"""

import contextlib
import difflib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_core.data.account import Account, listed
from rlhf_core.data.messages import (
    Message,
    check_order,
    checked_messages,
    checked_number,
    checked_text,
    checked_truth,
    conversation,
    is_learned,
    last_answer,
    not_blank,
    optional_number,
    read_field,
    read_items,
    read_text,
    read_tools,
    says_something,
)
from rlhf_core.data.sources import BadRow, DataError, Row, formatted, kind_of, read_rows

__all__ = ["FORMATS", "DataError", "Format", "Message", "Record", "iter_records", "read_records", "with_attributes"]

logger = logging.getLogger("rlhf_core.data")

Prompt = str | list[Message]
Completion = str | list[Message]

# What a job can need of its data, and the commands that have that need.
COMMANDS = {
    "supervised": "rlhf sft",
    "preference": "rlhf dpo or rlhf reward (or rlhf kto --pairs)",
    "unpaired": "rlhf kto",
    "ranking": "rlhf reward",
    "process": "rlhf reward",
    "prompts": "rlhf ppo",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt and its completions, as read."""

    prompt: Prompt | None  # None for plain text, which has no prompt
    # None for prompts only; 1 supervised, unpaired or in steps; 2 as (chosen, rejected); K ranked, the best first. Of a
    # completion of several messages the assistant's are learned alone.
    completions: tuple[Completion, ...]
    row: Row  # the row as it was read, for reward functions that look at other columns
    source: str  # where it came from, "pairs.jsonl:12" or "data.json row 3", counted from 1
    label: bool | None = None  # unpaired only: True for a wanted completion
    tools: list[dict[str, Any]] | None = None  # what a chat template is told of the tools, as JSON schemas
    weight: float = 1.0  # how much the row counts
    margin: float | None = None  # preference only: how much better the chosen completion is, where the row says so
    steps: tuple[str, ...] | None = None  # of a completion in steps, its parts; together they are the whole
    step_labels: tuple[bool, ...] | None = None  # for each of them, whether it is right


class Parts(NamedTuple):
    """What a format takes out of a row."""

    prompt: Prompt | None
    completions: tuple[Completion, ...]
    label: bool | None = None
    steps: tuple[str, ...] | None = None
    step_labels: tuple[bool, ...] | None = None
    tied: int = 0  # ranked answers that were left out, because they have the rank or the words of another


# --------------------------------------------------------------------------------- formats with a column for the prompt


def _prompt(row: Row, *answers: str) -> Prompt:
    """The `prompt` column: text, or messages that end where an answer is wanted.

    A text prompt whose answers (columns of these names) are messages is the user's turn of that conversation.
    """
    return _prompt_of(row, chat=any(isinstance(row.get(name), list) for name in answers))


def _prompt_of(row: Row, *, chat: bool) -> Prompt:
    value = read_field(row, "prompt", "text or messages")
    if isinstance(value, list):
        messages = conversation(value, "prompt")
        if messages[-1]["role"] == "assistant":
            raise BadRow("field 'prompt' ends with an assistant turn, expected a user turn at the end")
        return messages
    text = read_text(row, "prompt")
    return [{"role": "user", "content": text}] if chat else text


def _answer(row: Row, name: str, prompt: Prompt) -> Completion:
    """The completion in a column: of the same kind as its prompt."""
    return _completion(read_field(row, name, "text or messages"), name, prompt)


def _completion(value: object, name: str, prompt: Prompt, *, turns: bool = False) -> Completion:
    """A completion of the same kind as its prompt: text after text, one assistant message after messages.

    Some sets repeat the prompt's messages at the head of the answer's; they are taken off. With `turns` an answer may
    be several messages, from an assistant's to an assistant's.
    """
    if isinstance(prompt, str):
        return not_blank(checked_text(value, f"field {name!r}"), name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": not_blank(checked_text(value, f"field {name!r}"), name)}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"field {name!r}: found {'an empty list' if value == [] else kind_of(value)}, expected messages")
    messages = checked_messages(value, name)
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if turns and messages:
        check_order(messages, name, before=prompt[-1])
    elif [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"field {name!r}: expected one assistant message, alone or after the very messages of the prompt")
    before, answer = last_answer(messages, name)
    return [*before, *answer]


def _completion_column(row: Row) -> str:
    return "response" if "response" in row and "completion" not in row else "completion"


def _completion_prompt(row: Row) -> Prompt:
    return _prompt(row, _completion_column(row))


def _prompt_completion(row: Row) -> Parts:
    prompt, name = _completion_prompt(row), _completion_column(row)
    return Parts(prompt, (_completion(read_field(row, name, "text or messages"), name, prompt, turns=True),))


def _unpaired(row: Row) -> Parts:
    label = checked_truth(read_field(row, "label", "true, false, 0 or 1"), "field 'label'")
    prompt = _completion_prompt(row)
    return Parts(prompt, (_answer(row, _completion_column(row), prompt),), label=label)


def _preference_prompt(row: Row) -> Prompt:
    return _prompt(row, "chosen", "rejected")


def _preference(row: Row) -> Parts:
    prompt = _preference_prompt(row)
    return Parts(prompt, (_answer(row, "chosen", prompt), _answer(row, "rejected", prompt)))


def _prompts(row: Row) -> Parts:
    return Parts(_prompt(row), ())


def _list_column(row: Row) -> str:
    return "responses" if "responses" in row and "completions" not in row else "completions"


def _ranking_prompt(row: Row) -> Prompt:
    answers = row.get(_list_column(row))
    return _prompt_of(row, chat=isinstance(answers, list) and any(isinstance(answer, list) for answer in answers))


def _ranking(row: Row) -> Parts:
    """A list of answers, the best first, or in any order with `ranks` (1 is the best) or `scores` (more is better).

    A ranking has no place for a tie: of answers of the same rank, or in the same words, the first stays.
    """
    name, prompt = _list_column(row), _ranking_prompt(row)
    values = read_items(row, name, "texts, or of lists of messages", least=2)
    answers = [_completion(value, f"{name}[{place}]", prompt) for place, value in enumerate(values)]
    given = [column for column in ("ranks", "scores") if row.get(column) is not None]
    if len(given) > 1 or (name == "responses" and not given):
        found = " and ".join(given) or "no ranks and no scores"
        raise BadRow(f"found {found} beside {name!r}, expected one of the two")
    places = list(range(len(answers)))
    if given:
        numbers = read_items(row, given[0], "numbers", least=0)
        if len(numbers) != len(answers):
            count = f"{len(numbers)} items for {len(answers)} answers"
            raise BadRow(f"field {given[0]!r} has {count}, expected one for each")
        sign = -1 if given[0] == "scores" else 1
        places = [sign * checked_number(number, f"field {given[0]!r}") for number in numbers]
    ranked: dict[float, Completion] = {}
    for place, answer in sorted(zip(places, answers, strict=True), key=lambda pair: pair[0]):
        if place not in ranked and answer not in ranked.values():
            ranked[place] = answer
    return Parts(prompt, tuple(ranked.values()), tied=len(answers) - len(ranked))


def _process_prompt(row: Row) -> Prompt:
    return _prompt_of(row, chat=False)


def _process(row: Row) -> Parts:
    """An answer in steps, and for each step whether it is right."""
    values, labels = read_items(row, "completions", "steps", least=1), read_items(row, "labels", "labels", least=1)
    if len(values) != len(labels):
        raise BadRow(f"field 'labels' has {len(labels)} items for {len(values)} steps, expected one for each")
    steps = [
        not_blank(checked_text(value, f"field 'completions[{place}]'"), f"completions[{place}]")
        for place, value in enumerate(values)
    ]
    truths = tuple(checked_truth(label, f"field 'labels[{place}]'") for place, label in enumerate(labels))
    return Parts(_process_prompt(row), (), steps=tuple(steps), step_labels=truths)


# --------------------------------------------------------------------- formats where the prompt has to be found or made


def _plain_text(row: Row) -> Parts:
    return Parts(None, (not_blank(read_text(row, "text"), "text"),))


# The two prompts of Stanford Alpaca (Taori et al. 2023), to the letter: models trained on it expect this wording.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def _alpaca_prompt(row: Row) -> str:
    instruction = not_blank(read_text(row, "instruction"), "instruction")
    context = "" if row.get("input") is None else read_text(row, "input")
    if context.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def _alpaca(row: Row) -> Parts:
    return Parts(_alpaca_prompt(row), (not_blank(read_text(row, "output"), "output"),))


def _messages(row: Row, name: str) -> Parts:
    """What comes before the first assistant turn is the prompt, the rest the completion, up to the last such turn."""
    messages = conversation(read_field(row, name, "a list of messages"), name)
    while messages and messages[-1]["role"] != "assistant":  # nobody answered it
        messages = messages[:-1]
    if not messages:
        raise BadRow(f"field {name!r} has no assistant turn, expected one to learn from")
    last_answer(messages, name)
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return Parts(messages[:first], (messages[first:],))


def _messages_prompt(row: Row, name: str) -> list[Message]:
    """The conversation up to where an answer is wanted: without its last turn if that is an assistant's."""
    messages = conversation(read_field(row, name, "a list of messages"), name)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _same_prompt(chosen_prompt: Prompt, rejected_prompt: Prompt) -> Prompt:
    if chosen_prompt != rejected_prompt:
        raise BadRow("fields 'chosen' and 'rejected' have different prompts, expected the same up to the last answer")
    return chosen_prompt


def _preference_implicit(row: Row) -> Parts:
    conversations = [conversation(read_field(row, name, "messages"), name) for name in ("chosen", "rejected")]
    chosen_prompt, chosen = last_answer(conversations[0], "chosen")
    rejected_prompt, rejected = last_answer(conversations[1], "rejected")
    return Parts(_same_prompt(chosen_prompt, rejected_prompt), (chosen, rejected))


def _split_transcript(row: Row, name: str) -> tuple[str, str]:
    """A raw HH transcript, split after its last "\\n\\nAssistant:". Earlier ones belong to the prompt."""
    transcript = read_text(row, name)
    if not transcript.startswith("\n\nHuman:"):
        raise BadRow(
            f"field {name!r} does not start with '\\n\\nHuman:', expected a whole HH transcript "
            "(answers without their prompt need a 'prompt' column beside them)"
        )
    before, mark, answer = transcript.rpartition("\n\nAssistant:")
    if not mark or "\n\nHuman:" in answer:
        raise BadRow(f"field {name!r} does not end with an Assistant turn, expected one after the last Human turn")
    return before + mark, answer


def _hh(row: Row) -> Parts:
    chosen_prompt, chosen = _split_transcript(row, "chosen")
    rejected_prompt, rejected = _split_transcript(row, "rejected")
    prompt = _same_prompt(chosen_prompt, rejected_prompt)
    return Parts(prompt, (not_blank(chosen, "chosen"), not_blank(rejected, "rejected")))


def _holds_messages(row: Row) -> bool:
    return isinstance(row["chosen"], list) or isinstance(row["rejected"], list)


def _holds_transcripts(row: Row) -> bool:
    return any(isinstance(row[name], str) and row[name].startswith("\n\nHuman:") for name in ("chosen", "rejected"))


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True, slots=True)
class Format:
    """One shape of data: what it is called, which columns it has, whom it serves and how it is read."""

    need: str  # the need it serves in full, a key of COMMANDS
    looks_like: str  # for error messages: "the data look like ..."
    required: tuple[tuple[str, ...], ...]  # for each required column, the names it may have
    convert: Callable[[Row], Parts]  # raises BadRow
    prompt: Callable[[Row], Prompt] | None  # the prompt alone, for jobs that need no more; None when there is none
    optional: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True  # tells apart formats that have the same columns

    def matches(self, row: Row) -> bool:
        return all(any(name in row for name in names) for names in self.required) and self.fits(row)

    def serves(self, need: str) -> bool:
        pairs_are_rankings = (self.need, need) == ("preference", "ranking")
        return self.need == need or pairs_are_rankings or (need == "prompts" and self.prompt is not None)

    def columns(self) -> str:
        """'prompt, completion or response, (input)': what the format wants, optional columns in parentheses."""
        return ", ".join([" or ".join(names) for names in self.required] + [f"({name})" for name in self.optional])


_COMPLETION = ("completion", "response")

# In the order of recognition, the first match wins: a format stands before those whose columns are among its own
# (`unpaired` before `prompt_completion` before `prompts`), and `text` late: many sets carry a rendered `text` along.
FORMATS: dict[str, Format] = {
    "preference": Format(
        need="preference",
        looks_like="preference pairs",
        required=(("prompt",), ("chosen",), ("rejected",)),
        convert=_preference,
        prompt=_preference_prompt,
    ),
    "preference_implicit": Format(
        need="preference",
        looks_like="preference pairs of whole conversations",
        required=(("chosen",), ("rejected",)),
        convert=_preference_implicit,
        prompt=partial(_messages_prompt, name="chosen"),
        fits=_holds_messages,
    ),
    "hh": Format(
        need="preference",
        looks_like="preference pairs of whole transcripts (Anthropic HH)",
        required=(("chosen",), ("rejected",)),
        convert=_hh,
        prompt=lambda row: _split_transcript(row, "chosen")[0],
        fits=_holds_transcripts,
    ),
    "unpaired": Format(
        need="unpaired",
        looks_like="single completions with a good/bad label",
        required=(("prompt",), _COMPLETION, ("label",)),
        convert=_unpaired,
        prompt=_completion_prompt,
    ),
    "messages": Format(
        need="supervised",
        looks_like="conversations",
        required=(("messages",),),
        convert=partial(_messages, name="messages"),
        prompt=partial(_messages_prompt, name="messages"),
    ),
    "sharegpt": Format(
        need="supervised",
        looks_like="ShareGPT conversations",
        required=(("conversations",),),
        convert=partial(_messages, name="conversations"),
        prompt=partial(_messages_prompt, name="conversations"),
    ),
    "alpaca": Format(
        need="supervised",
        looks_like="Alpaca instructions",
        required=(("instruction",), ("output",)),
        optional=("input",),
        convert=_alpaca,
        prompt=_alpaca_prompt,
    ),
    "prompt_completion": Format(
        need="supervised",
        looks_like="prompts with one completion each",
        required=(("prompt",), _COMPLETION),
        convert=_prompt_completion,
        prompt=_completion_prompt,
    ),
    "text": Format(
        need="supervised",
        looks_like="plain text",
        required=(("text",),),
        convert=_plain_text,
        prompt=None,
    ),
    "process": Format(
        need="process",
        looks_like="answers in steps, each with a label",
        required=(("prompt",), ("completions",), ("labels",)),
        convert=_process,
        prompt=_process_prompt,
    ),
    "ranking": Format(
        need="ranking",
        looks_like="ranked lists of answers",
        required=(("prompt",), ("completions", "responses")),
        optional=("ranks or scores",),
        convert=_ranking,
        prompt=_ranking_prompt,
    ),
    "prompts": Format(
        need="prompts",
        looks_like="prompts without completions",
        required=(("prompt",),),
        convert=_prompts,
        prompt=_prompt,
    ),
}


# --------------------------------------------------------------------------------------------------- which format it is


def named_format(name: str) -> Format:
    """The format of that name. Raises DataError, with the nearest name, for any other."""
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"unknown data format {name!r}, expected one of {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def recognise(row: Row, *, need: str, source: str) -> Format:
    """The first format of the table that the row fits. Raises DataError when there is none.

    What the job needs plays no part in the choice: pairs stay pairs when they are given to a job that cannot use them,
    and the person hears of it.
    """
    for format in FORMATS.values():
        if format.matches(row):
            return format
    raise DataError(f"{source}: found columns {list(row)}; none of the formats fits; {_nearest_format(row, need)}")


def _settle_format(row: Row, *, name: str | None, need: str, source: str) -> Format:
    """The format of a whole data set, from its first row unless it is named. Raises DataError if it cannot serve."""
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
    """For an error: the format which the columns come closest to, of those that serve the need."""
    columns = list(row)
    served = {name: format for name, format in FORMATS.items() if format.serves(need)}
    nearness = {name: _nearness(columns, format) for name, format in served.items()}
    # Below zero is not near. A format without a gap was refused for what its columns hold: renaming would not help.
    nearness = {name: value for name, value in nearness.items() if 0 <= value < len(served[name].required)}
    if not nearness:
        return "expected one of: " + "; ".join(f"{name} ({format.columns()})" for name, format in served.items())
    nearest = max(nearness, key=nearness.__getitem__)  # the first of equals
    hints = [f"; did you mean {column!r} for {name!r}?" for column, name in _misspelt(columns, served[nearest])]
    return f"nearest is {nearest!r}, which needs {served[nearest].columns()}{''.join(hints)}"


def _nearness(columns: Sequence[str], format: Format) -> int:
    """How many of the required columns are there, less how many are missing; a misspelt one counts as neither."""
    present = sum(any(name in columns for name in names) for names in format.required)
    missing = len(format.required) - present - len(_misspelt(columns, format))
    return present - missing


def _misspelt(columns: Sequence[str], format: Format) -> list[tuple[str, str]]:
    """(column found, name probably meant) for each required column that is missing under its right name."""
    pairs = []
    for names in format.required:
        if not any(name in columns for name in names):
            close = [(column, name) for name in names for column in difflib.get_close_matches(name, columns, n=1)]
            pairs.extend(close[:1])
    return pairs


# ----------------------------------------------------------------------------------------------------------- the reader


_IDENTICAL = "chosen and rejected are the same"
_ALL_TIED = "all answers have the same rank, or are in the same words"
_LEFT_OUT = "the formatting function leaves it out"
_TIED = "answers that have the rank, or the very words, of another are left out"


def read_records(path: str | Path, **options: Any) -> list[Record]:
    """Every row behind `path` as a record; the options are those of `iter_records`."""
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

    path, split: see `read_rows`: files, folders, `datasets` folders and hub names.
    need: "supervised", "preference", "unpaired", "ranking" (pairs are rankings of two), "process" (answers in steps) or
        "prompts" (any format with a prompt; completions are left out).
    format: a name in FORMATS; None recognises it by the columns of the first row, and every row must then match.
    skip_bad_rows: how many unusable rows to skip, count and report before they are an error.
    limit: stop after this many records; None reads all.
    turns: what of a conversation is learned: the last assistant turn, or all of them.
    system: a system message for conversations that have none, in a message or a `system` column.
    attributes: what is written into the prompt (see `with_attributes`): names of columns, or NAME:VALUE.
    step_separator: what stands between the steps of an answer.
    formatting: a function of the user's, module:function, that every row goes through first (see `formatted`).
    account: told of every row that is left out, in place of warnings.

    Pairs whose two answers are the same say nothing about preference: they are dropped and counted. With one bad row
    more than may be skipped the rest is only counted, for the error that comes at the end.
    Raises DataError for data that cannot be used, ValueError for arguments that make no sense.
    """
    if need not in COMMANDS:
        raise ValueError(f"need={need!r}, expected one of {', '.join(COMMANDS)}")
    if turns not in ("last", "all"):
        raise ValueError(f"turns={turns!r}, expected 'last' or 'all'")
    if turns == "all" and need != "supervised":
        raise DataError(f"data.turns='all' is for {COMMANDS['supervised']}: here the last answer alone is learned")
    if turns == "all" and attributes:
        raise DataError("data.attributes with data.turns='all': expected one of the two, as they are of one answer")
    if skip_bad_rows < 0:
        raise ValueError(f"skip_bad_rows={skip_bad_rows}, expected 0 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}, expected 1 or more, or None")
    if format is not None:
        named_format(format)  # a misspelt name is an error before anything is read
    rows = read_rows(path, split)
    if formatting is not None:
        rows = formatted(rows, formatting)
    options = dict(turns=turns, system=system, attributes=attributes, step_separator=step_separator)
    return _records(path, rows, format, need=need, most_bad=skip_bad_rows, limit=limit, account=account, **options)


def _records(
    path: str | Path,
    rows: Iterable[tuple[str, Row | BadRow | None]],
    format: str | None,
    *,
    need: str,
    most_bad: int,
    limit: int | None,
    account: Account | None,
    **options: Any,
) -> Iterator[Record]:
    losses = Account(source=str(path)) if account is None else account
    settled: Format | None = None
    kept, num_read, bad = 0, 0, Account()  # the losses may be shared with whoever encodes the records
    one_too_many: tuple[str, BadRow] | None = None  # (source, reason)
    for source, row in rows:
        num_read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if row is None:
                losses.drop(_LEFT_OUT, source)
                continue
            if settled is None:
                settled = _settle_format(row, name=format, need=need, source=source)
            record, tied = _record(row, settled, need=need, source=source, **options)
        except BadRow as reason:
            bad.drop(str(reason), source)
            losses.drop(str(reason), source)
            if bad.rows_dropped == most_bad + 1:
                one_too_many = source, reason
            continue
        first, *others = record.completions or [None]
        if need in ("preference", "ranking") and first in (others or [first]):
            losses.drop(_IDENTICAL if others else _ALL_TIED, source)
            continue
        if tied:
            losses.note(_TIED, source)
        kept += 1
        if one_too_many is None:
            yield record
        if kept == limit:
            break
    if one_too_many is not None:
        source, reason = one_too_many
        raise DataError(
            f"{source}: {reason}\n{bad.rows_dropped} of the {num_read} rows read cannot be used: "
            f"{listed(bad.dropped)}. Mend them, or have them skipped: --data.skip-bad-rows {bad.rows_dropped}"
        ) from reason.__cause__
    if not kept:
        raise DataError(losses.nothing_left())
    if account is None:
        for line in losses.losses(num_read):
            logger.warning(line)


def _record(
    row: Row,
    format: Format,
    *,
    need: str,
    source: str,
    turns: str,
    system: str | None,
    attributes: Sequence[str] | None,
    step_separator: str,
) -> tuple[Record, int]:
    """The record of a row, and how many ranked answers are left out of it."""
    parts = Parts(format.prompt(row), ()) if need == "prompts" else format.convert(row)
    prompt, completions = _chosen_turns(parts.prompt, parts.completions, turns)
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
    """The `margin` column, or else the difference of the columns `score_chosen` and `score_rejected`."""
    margin = optional_number(row, "margin")
    chosen, rejected = optional_number(row, "score_chosen"), optional_number(row, "score_rejected")
    return chosen - rejected if margin is None and chosen is not None and rejected is not None else margin


def _chosen_turns(
    prompt: Prompt | None, completions: tuple[Completion, ...], turns: str
) -> tuple[Prompt | None, tuple[Completion, ...]]:
    """What of a conversation is learned: all assistant turns of its completion, or only the last of them."""
    if len(completions) != 1 or isinstance(completions[0], str):
        return prompt, completions
    messages = completions[0]
    learned = [place for place, message in enumerate(messages) if is_learned(message)]
    if not learned:
        raise BadRow("all assistant turns have the weight 0, expected one to learn from")
    if turns == "last":
        learned = learned[-1:]
    if not all(says_something(messages[place]) for place in learned):
        raise BadRow("an assistant turn is empty, expected text to learn from in all of them (or --data.turns last)")
    return [*prompt, *messages[: learned[0]]], (messages[learned[0] : learned[-1] + 1],)


def _with_system(prompt: Prompt | None, row: Row, system: str | None, source: str) -> Prompt | None:
    """A conversation with the system prompt that stands in its row, or else the one that is given for all."""
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


# ----------------------------------------------------------------------------------------------------------- attributes


def with_attributes(prompt: Prompt | None, attributes: Sequence[str], row: Row, source: str) -> Prompt:
    """A prompt that says what its answer is like, in its last line, which follows an empty one:

        Attributes: helpfulness:4,verbosity:2

    In a conversation that is the end of the last user message. A model trained on rated answers in this way gives, when
    asked for high ratings, the answers that had them. Source: SteerLM (Dong et al. 2023, arXiv:2310.05344), whose own
    layout has special tokens of one model family.

    attributes: NAME:VALUE, or the NAME of a column of the row.
    Raises DataError for plain text, which has no prompt, and BadRow for a row without the value.
    """
    if prompt is None:
        raise DataError(f"{source}: the row is plain text, expected a prompt to write the attributes into")
    line = f"\n\nAttributes: {','.join(_attribute(row, attribute) for attribute in attributes)}"
    if isinstance(prompt, str):
        return f"{prompt}{line}\n"
    last = max(place for place, message in enumerate(prompt) if message["role"] == "user")
    asked = prompt[last] | {"content": prompt[last]["content"] + line}
    return [*prompt[:last], asked, *prompt[last + 1 :]]


def _attribute(row: Row, attribute: str) -> str:
    """'helpfulness' -> 'helpfulness:4', from the row's column of that name; 'helpfulness:4' stays. 4.0 is written 4."""
    name, _, value = attribute.partition(":")
    value = value or read_field(row, name, "a number, true, false or a few words")
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    found = kind_of(value)
    with contextlib.suppress(ValueError):
        number = float(text)
        text = f"{number:.0f}" if number.is_integer() else f"{number:g}"
        found = found if math.isfinite(number) else "a number that is not finite"
    usable = isinstance(value, str | int | float) and text and not set(text) & set(",:\n")
    if not usable or found == "a number that is not finite":
        raise BadRow(
            f"field {name!r}: found {found}, expected a number, true, false or a few words without commas, "
            "colons and line breaks"
        )
    return f"{name}:{text}"
