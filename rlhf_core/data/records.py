"""The forms that a row of data takes: as read (`Row`), with its format resolved (`Record`), tokenised (`Example`)."""

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, optionally with tool_calls and with keys that
# only a chat template reads, such as reasoning_content.
Message = dict[str, Any]
Tools = list[dict[str, Any]]  # JSON schemas of the tools that a chat template announces to the model

Prompt = str | list[Message]
Completion = str | list[Message]


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt and its completions, as text or messages."""

    prompt: Prompt | None  # None for plain text, which has no prompt
    # Empty for prompts only; 1 for supervised, unpaired or step-labelled rows; 2 as (chosen, rejected); K for rankings,
    # best first. In a completion of several messages only the assistant's are supervised.
    completions: tuple[Completion, ...]
    row: Row  # the row as read, for reward functions that use other columns
    source: str  # where it was read, "pairs.jsonl:12" or "data.json row 3", counted from 1
    label: bool | None = None  # unpaired only: True for a wanted completion
    tools: Tools | None = None
    weight: float = 1.0  # weight of the row in a loss
    margin: float | None = None  # preference only: how much better the chosen completion is, where the row has it
    steps: tuple[str, ...] | None = None  # the parts of a completion in steps; joined they are the completion
    step_labels: tuple[bool, ...] | None = None  # for each step, whether it is right


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its completions as token ids."""

    prompt: list[int]  # never empty; starts with BOS where the tokenizer or the template has one
    completions: tuple[list[int], ...]  # each ends with a stop id, which is supervised like any other token
    record: Record  # the record that was tokenised
    weight: float = 1.0  # weight of the row in a loss
    margin: float | None = None  # how much better the first completion is than the second, where the row has it
    supervised: tuple[list[bool], ...] | None = None  # for each completion, which tokens a loss counts; None: all
    step_ends: tuple[int, ...] | None = None  # index in completion 0 of the last token of each step
    step_labels: tuple[bool, ...] | None = None  # for each step, whether it is right
