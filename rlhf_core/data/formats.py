"""What rows mean: every format the library reads, and the one function that turns a path into records.

A format is recognised by its columns. All of them end as the same thing, a `Record`: a prompt and its completions, as
text or as chat messages, not yet rendered and not yet tokens (`chat.py` and `tokenize.py` do that).
"""

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.data.sources import BadRow, DataError, Row, kind_of, read_rows

__all__ = ["FORMATS", "DataError", "Format", "Message", "Record", "read_records"]

logger = logging.getLogger("rlhf_core.data")

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Prompt = str | list[Message]
Completion = str | list[Message]

# What a job can need of its data, and the commands that have that need.
COMMANDS = {
    "supervised": "rlhf sft",
    "preference": "rlhf dpo or rlhf reward",
    "unpaired": "rlhf kto",
    "prompts": "rlhf ppo",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt and its completions, as read."""

    prompt: Prompt | None  # None for plain text, which has no prompt
    completions: tuple[Completion, ...]  # none for prompts only; 1 supervised or unpaired; 2 as (chosen, rejected)
    row: Row  # the row as it was read, for reward functions that look at other columns
    source: str  # where it came from, "pairs.jsonl:12" or "data.json row 3", counted from 1
    label: bool | None = None  # unpaired only: True for a wanted completion


class Parts(NamedTuple):
    """What a format takes out of a row."""

    prompt: Prompt | None
    completions: tuple[Completion, ...]
    label: bool | None = None


# --------------------------------------------------------------------------------------------------------------- fields


def _field(row: Row, name: str, expected: str) -> Any:
    """The value of a field, which must be there and not null."""
    if name not in row:
        close = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadRow(f"field {name!r} is missing, expected {expected}{hint}")
    if row[name] is None:
        raise BadRow(f"field {name!r} is null, expected {expected}")
    return row[name]


def _text(row: Row, name: str) -> str:
    """A field that is text, perhaps empty."""
    return _checked_text(_field(row, name, "text"), f"field {name!r}")


def _checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: found {kind_of(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # tokenizers die of it without saying where
        raise BadRow(f"{where} holds half a surrogate pair (a broken emoji), expected valid Unicode text") from None
    return value


def _not_blank(text: str, name: str) -> str:
    """Text that a model is to learn: a blank one would teach it to say nothing."""
    if not text.strip():
        raise BadRow(f"field {name!r} is empty, expected text to learn from")
    return text


# ------------------------------------------------------------------------------------------------------------- messages

# The roles as every chat template knows them, and the names that ShareGPT exports use for the same three.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def _conversation(value: object, name: str) -> list[Message]:
    """A list of messages in the one spelling, {"role", "content"}, with its order of roles checked."""
    if not isinstance(value, list):
        raise BadRow(f"field {name!r}: found {kind_of(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"field {name!r} is an empty list, expected messages")
    messages = [_message(item, f"field {name!r}, message {number}") for number, item in enumerate(value, start=1)]
    first_turn = 1 if messages[0]["role"] == "system" else 0
    for position, message in enumerate(messages[first_turn:]):
        expected = ("user", "assistant")[position % 2]
        if message["role"] != expected:
            raise BadRow(
                f"field {name!r}, message {first_turn + position + 1}: found the role {message['role']!r}, expected "
                f"{expected!r} (at most one system message, then user and assistant in turn)"
            )
    if first_turn == len(messages):
        raise BadRow(f"field {name!r} has a system message only, expected a user turn after it")
    return messages


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadRow(f"{where}: found {kind_of(item)}, expected an object with role and content")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    missing = [key for key in (role_key, content_key) if item.get(key) is None]
    if missing:
        found = " and ".join(f"no {key!r}" for key in missing)
        raise BadRow(f"{where}: found {found}, expected role and content, or from and value")
    role = _checked_text(item[role_key], f"{where}, {role_key!r}")
    if role not in ROLES:
        raise BadRow(f"{where}: found the role {role[:40]!r}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _checked_text(item[content_key], f"{where}, {content_key!r}")}


def _last_answer(messages: list[Message], name: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation before its last message, which must be an assistant's turn with something in it."""
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"field {name!r} ends with a {messages[-1]['role']} turn, expected an assistant turn at the end")
    _not_blank(messages[-1]["content"], name)
    return messages[:-1], messages[-1:]


# --------------------------------------------------------------------------------- formats with a column for the prompt


def _prompt(row: Row, *answers: str) -> Prompt:
    """The `prompt` column: text, or messages that end with a user's turn.

    A text prompt whose answers (columns of these names) are messages is the user's turn of that conversation.
    """
    value = _field(row, "prompt", "text or messages")
    if isinstance(value, list):
        messages = _conversation(value, "prompt")
        if messages[-1]["role"] != "user":
            raise BadRow("field 'prompt' ends with an assistant turn, expected a user turn at the end")
        return messages
    text = _text(row, "prompt")
    if any(isinstance(row.get(name), list) for name in answers):
        return [{"role": "user", "content": text}]
    return text


def _answer(row: Row, name: str, prompt: Prompt) -> Completion:
    """A completion of the same kind as its prompt: text after text, one assistant message after messages.

    Some sets repeat the prompt's messages at the head of the answer's; they are taken off.
    """
    value = _field(row, name, "text or messages")
    if isinstance(prompt, str):
        return _not_blank(_text(row, name), name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": _not_blank(_text(row, name), name)}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"field {name!r}: found {'an empty list' if value == [] else kind_of(value)}, expected messages")
    messages = [_message(item, f"field {name!r}, message {number}") for number, item in enumerate(value, start=1)]
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"field {name!r}: expected one assistant message, alone or after the very messages of the prompt")
    _not_blank(messages[0]["content"], name)
    return messages


def _completion_column(row: Row) -> str:
    return "response" if "response" in row and "completion" not in row else "completion"


def _completion_prompt(row: Row) -> Prompt:
    return _prompt(row, _completion_column(row))


def _prompt_completion(row: Row) -> Parts:
    prompt = _completion_prompt(row)
    return Parts(prompt, (_answer(row, _completion_column(row), prompt),))


def _unpaired(row: Row) -> Parts:
    label = _field(row, "label", "true, false, 0 or 1")
    # A string is refused: "false" is a true value in Python, and a wrong guess shows only in a bad model.
    if not isinstance(label, int) or label not in (0, 1):  # bool is a kind of int
        raise BadRow(f"field 'label': found {kind_of(label)}, expected true, false, 0 or 1")
    return _prompt_completion(row)._replace(label=bool(label))


def _preference_prompt(row: Row) -> Prompt:
    return _prompt(row, "chosen", "rejected")


def _preference(row: Row) -> Parts:
    prompt = _preference_prompt(row)
    return Parts(prompt, (_answer(row, "chosen", prompt), _answer(row, "rejected", prompt)))


def _prompts(row: Row) -> Parts:
    return Parts(_prompt(row), ())


# --------------------------------------------------------------------- formats where the prompt has to be found or made


def _plain_text(row: Row) -> Parts:
    return Parts(None, (_not_blank(_text(row, "text"), "text"),))


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
    instruction = _not_blank(_text(row, "instruction"), "instruction")
    context = "" if row.get("input") is None else _text(row, "input")
    if context.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def _alpaca(row: Row) -> Parts:
    return Parts(_alpaca_prompt(row), (_not_blank(_text(row, "output"), "output"),))


def _messages(row: Row, name: str) -> Parts:
    """All before the last assistant turn is the prompt, that turn the completion; a user turn after it is left out."""
    messages = _conversation(_field(row, name, "a list of messages"), name)
    if messages[-1]["role"] == "user":
        messages = messages[:-1]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"field {name!r} has no assistant turn, expected one to learn from")
    prompt, answer = _last_answer(messages, name)
    return Parts(prompt, (answer,))


def _messages_prompt(row: Row, name: str) -> list[Message]:
    """The conversation up to where an answer is wanted: the whole when a user has the last word, else without it."""
    messages = _conversation(_field(row, name, "a list of messages"), name)
    return messages if messages[-1]["role"] == "user" else messages[:-1]


def _same_prompt(chosen_prompt: Prompt, rejected_prompt: Prompt) -> Prompt:
    if chosen_prompt != rejected_prompt:
        raise BadRow("fields 'chosen' and 'rejected' have different prompts, expected the same up to the last answer")
    return chosen_prompt


def _preference_implicit(row: Row) -> Parts:
    conversations = [_conversation(_field(row, name, "messages"), name) for name in ("chosen", "rejected")]
    chosen_prompt, chosen = _last_answer(conversations[0], "chosen")
    rejected_prompt, rejected = _last_answer(conversations[1], "rejected")
    return Parts(_same_prompt(chosen_prompt, rejected_prompt), (chosen, rejected))


def _split_transcript(row: Row, name: str) -> tuple[str, str]:
    """A raw HH transcript, split after its last "\\n\\nAssistant:". Earlier ones belong to the prompt."""
    transcript = _text(row, name)
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
    return Parts(prompt, (_not_blank(chosen, "chosen"), _not_blank(rejected, "rejected")))


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
        return self.need == need or (need == "prompts" and self.prompt is not None)

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


def read_records(
    path: str | Path,
    *,
    need: str,
    format: str | None = None,
    split: str | None = None,
    skip_bad_rows: int = 0,
    limit: int | None = None,
) -> list[Record]:
    """Read every row behind `path` as a record that serves `need`.

    path, split: see `read_rows`: files, folders, `datasets` folders and hub names.
    need: "supervised", "preference", "unpaired" or "prompts" (any format with a prompt; completions are left out).
    format: a name in FORMATS; None recognises it by the columns of the first row, and every row must then match.
    skip_bad_rows: how many unusable rows to skip, count and report before they are an error.
    limit: stop after this many records; None reads all.

    Pairs whose two answers are the same say nothing about preference: they are dropped and counted in a warning.
    Raises DataError for data that cannot be used, ValueError for arguments that make no sense.
    """
    if need not in COMMANDS:
        raise ValueError(f"need={need!r}, expected one of {', '.join(COMMANDS)}")
    if skip_bad_rows < 0:
        raise ValueError(f"skip_bad_rows={skip_bad_rows}, expected 0 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}, expected 1 or more, or None")
    if format is not None:
        named_format(format)  # a misspelt name is an error before anything is read
    settled: Format | None = None
    records: list[Record] = []
    bad: list[tuple[str, str]] = []  # (source, reason)
    identical: list[str] = []  # sources
    for source, row in read_rows(path, split):
        try:
            if isinstance(row, BadRow):
                raise row
            if settled is None:
                settled = _settle_format(row, name=format, need=need, source=source)
            record = _record(row, settled, need=need, source=source)
        except BadRow as reason:
            bad.append((source, str(reason)))
            continue
        if need == "preference" and record.completions[0] == record.completions[1]:
            identical.append(source)
            continue
        records.append(record)
        if len(records) == limit:
            break
    _report(path, bad, identical, skip_bad_rows=skip_bad_rows, kept=len(records))
    return records


def _record(row: Row, format: Format, *, need: str, source: str) -> Record:
    if need == "prompts":
        return Record(prompt=format.prompt(row), completions=(), row=row, source=source)
    parts = format.convert(row)
    return Record(prompt=parts.prompt, completions=parts.completions, label=parts.label, row=row, source=source)


def _report(
    path: str | Path, bad: list[tuple[str, str]], identical: list[str], *, skip_bad_rows: int, kept: int
) -> None:
    """Say what was left out: an error when it is more than was allowed or when nothing is left, a warning otherwise."""
    total = len(bad) + len(identical) + kept
    counted = _count_reasons([reason for _, reason in bad])
    if len(bad) > skip_bad_rows:
        source, reason = bad[skip_bad_rows]
        raise DataError(
            f"{source}: {reason}\n{len(bad)} of the {total} rows read cannot be used: {counted}. "
            f"Mend them, or have them skipped: --data.skip-bad-rows {len(bad)}"
        )
    if bad:
        logger.warning(f"{path}: skipped {len(bad)} of {total} rows: {counted} (first: {bad[0][0]})")
    if identical:
        same = "chosen and rejected are the same"
        logger.warning(f"{path}: dropped {len(identical)} of {total} pairs: {same} (first: {identical[0]})")
    if not kept:
        reasons = [counted] * bool(bad) + [f"{len(identical)} x chosen and rejected are the same"] * bool(identical)
        raise DataError(f"{path}: 0 of {total} rows left: {', '.join(reasons) or 'there is nothing in it'}")


def _count_reasons(reasons: list[str], *, most: int = 5) -> str:
    """'2 x this, 1 x that', the commonest first."""
    counts = Counter(reasons)
    parts = [f"{count} x {reason}" for reason, count in counts.most_common(most)]
    rest = len(reasons) - sum(count for _, count in counts.most_common(most))
    return ", ".join(parts + [f"{rest} x other reasons"] * bool(rest))
