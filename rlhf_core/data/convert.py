"""What each format takes out of a row: a prompt and its completions, as text or as chat messages.

For each format of `formats.FORMATS` there is a function from a row to `Parts`, and one from a row to the prompt alone,
for jobs that need no more. All raise `BadRow` for a row that cannot be used.
"""

from typing import NamedTuple

from rlhf_core.data.errors import BadRow
from rlhf_core.data.messages import (
    check_order,
    checked_messages,
    checked_number,
    checked_text,
    checked_truth,
    conversation,
    last_answer,
    not_blank,
    read_field,
    read_items,
    read_text,
)
from rlhf_core.data.records import Completion, Message, Prompt, Row
from rlhf_core.data.sources import kind_of


class Parts(NamedTuple):
    """What a format takes out of a row."""

    prompt: Prompt | None
    completions: tuple[Completion, ...]
    label: bool | None = None
    steps: tuple[str, ...] | None = None
    step_labels: tuple[bool, ...] | None = None
    tied: int = 0  # ranked completions that were left out because they have the rank or the text of another


# --------------------------------------------------------------------------------- formats with a column for the prompt


def prompt_column(row: Row, *completions: str) -> Prompt:
    """Return the `prompt` column: text, or messages that do not end with an assistant's.

    A text prompt becomes a user message where one of the columns `completions` holds messages.
    """
    return _prompt(row, chat=any(isinstance(row.get(name), list) for name in completions))


def _prompt(row: Row, *, chat: bool) -> Prompt:
    value = read_field(row, "prompt", "text or messages")
    if isinstance(value, list):
        messages = conversation(value, "prompt")
        if messages[-1]["role"] == "assistant":
            raise BadRow("field 'prompt' ends with an assistant turn, expected a user turn at the end")
        return messages
    text = read_text(row, "prompt")
    return [{"role": "user", "content": text}] if chat else text


def _completion(row: Row, name: str, prompt: Prompt, *, turns: bool = False) -> Completion:
    return _checked_completion(read_field(row, name, "text or messages"), name, prompt, turns=turns)


def _checked_completion(value: object, name: str, prompt: Prompt, *, turns: bool = False) -> Completion:
    """Return a completion of the same kind as its prompt: text after text, one assistant message after messages.

    Some data sets repeat the prompt's messages at the start of the completion's; these are removed. With `turns` a
    completion may be several messages, the first and the last of them an assistant's.
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
        raise BadRow(f"field {name!r}: expected one assistant message, alone or after the messages of the prompt")
    before, answer = last_answer(messages, name)
    return [*before, *answer]


def _completion_name(row: Row) -> str:
    return "response" if "response" in row and "completion" not in row else "completion"


def completion_prompt(row: Row) -> Prompt:
    return prompt_column(row, _completion_name(row))


def prompt_completion(row: Row) -> Parts:
    prompt = completion_prompt(row)
    return Parts(prompt, (_completion(row, _completion_name(row), prompt, turns=True),))


def unpaired(row: Row) -> Parts:
    label = checked_truth(read_field(row, "label", "true, false, 0 or 1"), "field 'label'")
    prompt = completion_prompt(row)
    return Parts(prompt, (_completion(row, _completion_name(row), prompt),), label=label)


def preference_prompt(row: Row) -> Prompt:
    return prompt_column(row, "chosen", "rejected")


def preference(row: Row) -> Parts:
    prompt = preference_prompt(row)
    return Parts(prompt, (_completion(row, "chosen", prompt), _completion(row, "rejected", prompt)))


def prompts(row: Row) -> Parts:
    return Parts(prompt_column(row), ())


def _list_name(row: Row) -> str:
    return "responses" if "responses" in row and "completions" not in row else "completions"


def ranking_prompt(row: Row) -> Prompt:
    values = row.get(_list_name(row))
    return _prompt(row, chat=isinstance(values, list) and any(isinstance(value, list) for value in values))


def ranking(row: Row) -> Parts:
    """Return a list of completions, best first.

    The row has them best first, or in any order with `ranks` (1 is the best) or `scores` (more is better). A ranking
    cannot represent a tie: of completions with the same rank, or the same text, the first is kept.
    """
    name, prompt = _list_name(row), ranking_prompt(row)
    values = read_items(row, name, "texts, or of lists of messages", least=2)
    completions = [_checked_completion(value, f"{name}[{i}]", prompt) for i, value in enumerate(values)]
    given = [column for column in ("ranks", "scores") if row.get(column) is not None]
    if len(given) > 1 or (name == "responses" and not given):
        found = " and ".join(given) or "no ranks and no scores"
        raise BadRow(f"found {found} beside {name!r}, expected one of the two")
    ranks: list[float] = list(range(len(completions)))
    if given:
        numbers = read_items(row, given[0], "numbers", least=0)
        if len(numbers) != len(completions):
            count = f"{len(numbers)} items for {len(completions)} answers"
            raise BadRow(f"field {given[0]!r} has {count}, expected one for each")
        sign = -1 if given[0] == "scores" else 1
        ranks = [sign * checked_number(number, f"field {given[0]!r}") for number in numbers]
    ranked: dict[float, Completion] = {}
    for rank, completion in sorted(zip(ranks, completions, strict=True), key=lambda pair: pair[0]):
        if rank not in ranked and completion not in ranked.values():
            ranked[rank] = completion
    return Parts(prompt, tuple(ranked.values()), tied=len(completions) - len(ranked))


def process_prompt(row: Row) -> Prompt:
    return _prompt(row, chat=False)


def process(row: Row) -> Parts:
    """Return a completion in steps, and for each step whether it is right."""
    values, labels = read_items(row, "completions", "steps", least=1), read_items(row, "labels", "labels", least=1)
    if len(values) != len(labels):
        raise BadRow(f"field 'labels' has {len(labels)} items for {len(values)} steps, expected one for each")
    steps = [
        not_blank(checked_text(value, f"field 'completions[{i}]'"), f"completions[{i}]")
        for i, value in enumerate(values)
    ]
    right = tuple(checked_truth(label, f"field 'labels[{i}]'") for i, label in enumerate(labels))
    return Parts(process_prompt(row), (), steps=tuple(steps), step_labels=right)


# ------------------------------------------------------------------- formats where the prompt is part of another column


def plain_text(row: Row) -> Parts:
    return Parts(None, (not_blank(read_text(row, "text"), "text"),))


# The two prompts of Stanford Alpaca (Taori et al. 2023), verbatim: models trained on it expect this wording.
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


def alpaca_prompt(row: Row) -> str:
    instruction = not_blank(read_text(row, "instruction"), "instruction")
    context = "" if row.get("input") is None else read_text(row, "input")
    if context.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def alpaca(row: Row) -> Parts:
    return Parts(alpaca_prompt(row), (not_blank(read_text(row, "output"), "output"),))


def messages(row: Row, name: str) -> Parts:
    """Split a conversation before its first assistant turn; turns after the last assistant turn are dropped."""
    turns = conversation(read_field(row, name, "a list of messages"), name)
    while turns and turns[-1]["role"] != "assistant":  # turns without an answer
        turns = turns[:-1]
    if not turns:
        raise BadRow(f"field {name!r} has no assistant turn, expected one to learn from")
    last_answer(turns, name)
    first = next(i for i, message in enumerate(turns) if message["role"] == "assistant")
    return Parts(turns[:first], (turns[first:],))


def messages_prompt(row: Row, name: str) -> list[Message]:
    """Return a conversation without its last turn, if that is an assistant's."""
    turns = conversation(read_field(row, name, "a list of messages"), name)
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def _same_prompt(chosen_prompt: Prompt, rejected_prompt: Prompt) -> Prompt:
    if chosen_prompt != rejected_prompt:
        raise BadRow("fields 'chosen' and 'rejected' have different prompts, expected the same up to the last answer")
    return chosen_prompt


def preference_implicit(row: Row) -> Parts:
    conversations = [conversation(read_field(row, name, "messages"), name) for name in ("chosen", "rejected")]
    chosen_prompt, chosen = last_answer(conversations[0], "chosen")
    rejected_prompt, rejected = last_answer(conversations[1], "rejected")
    return Parts(_same_prompt(chosen_prompt, rejected_prompt), (chosen, rejected))


def _split_transcript(row: Row, name: str) -> tuple[str, str]:
    """Split an HH transcript after its last "\\n\\nAssistant:"; earlier ones belong to the prompt."""
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


def hh_prompt(row: Row) -> str:
    return _split_transcript(row, "chosen")[0]


def hh(row: Row) -> Parts:
    chosen_prompt, chosen = _split_transcript(row, "chosen")
    rejected_prompt, rejected = _split_transcript(row, "rejected")
    prompt = _same_prompt(chosen_prompt, rejected_prompt)
    return Parts(prompt, (not_blank(chosen, "chosen"), not_blank(rejected, "rejected")))


def holds_messages(row: Row) -> bool:
    """Whether a pair without a prompt column is two conversations."""
    return isinstance(row["chosen"], list) or isinstance(row["rejected"], list)


def holds_transcripts(row: Row) -> bool:
    """Whether a pair without a prompt column is two HH transcripts."""
    return any(isinstance(row[name], str) and row[name].startswith("\n\nHuman:") for name in ("chosen", "rejected"))
