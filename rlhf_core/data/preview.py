"""The first rows as the model sees them: every token as text, with supervised tokens marked and roles named."""

import os
import sys
from collections.abc import Sequence
from itertools import groupby

from rlhf_core.data.records import Example
from rlhf_core.data.tokenizer import Tokenizer

_SUPERVISED, _QUIET, _BOLD, _PLAIN = "\033[32m", "\033[2m", "\033[1m", "\033[0m"


def show(examples: Sequence[Example], tokenizer: Tokenizer, *, need: str, colour: bool | None = None) -> str:
    """Return the examples as text. Supervised tokens are green, or between [[ and ]] without colour.

    colour: None uses colour where standard output is a terminal and NO_COLOR is not set.
    """
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    mark = "green" if colour else "between [[ and ]]"
    lines = [f"Supervised tokens are {mark}." if need != "prompts" else "Completions are sampled after these prompts."]
    for number, example in enumerate(examples, start=1):
        lines += ["", _painted(_title(number, example), _BOLD, colour)]
        lines += _part("prompt", [(example.prompt, False)], tokenizer, colour)
        for k in range(len(example.completions)):
            role = _role(example, k, need)
            if example.step_ends is None:
                lines += _part(role, _runs(example, k), tokenizer, colour)
                continue
            starts = [0, *(end + 1 for end in example.step_ends)]
            for start, end, right in zip(starts, starts[1:], example.step_labels or (), strict=False):
                step = [(example.completions[k][start:end], True)]
                lines += _part(f"{role}, a step that is {'right' if right else 'wrong'}", step, tokenizer, colour)
    return "\n".join(lines)


def _title(number: int, example: Example) -> str:
    prompt, completions = len(example.prompt), sum(map(len, example.completions))
    supervised = completions if example.supervised is None else sum(map(sum, example.supervised))
    title = f"{number}. {example.record.source}: {prompt} tokens of prompt"
    if example.completions:
        title += f", {completions} of completion, {supervised} of them supervised"
    title += f", weight {example.weight:g}" if example.weight != 1 else ""
    return title + (f", margin {example.margin:g}" if example.margin is not None else "")


def _role(example: Example, k: int, need: str) -> str:
    """Return the role of completion k in the job."""
    if need == "preference":
        return ("chosen", "rejected")[k]
    if need == "ranking":
        return f"completion {k + 1} of {len(example.completions)}" + (", the best" if k == 0 else "")
    if need == "unpaired" and example.record.label is not None:
        return "completion, wanted" if example.record.label else "completion, not wanted"
    return "completion"


def _runs(example: Example, k: int) -> list[tuple[list[int], bool]]:
    """Split completion k into runs of tokens that are all supervised, or all not."""
    ids = example.completions[k]
    if example.supervised is None:
        return [(ids, True)]
    grouped = groupby(zip(ids, example.supervised[k], strict=True), key=lambda pair: pair[1])
    return [([token for token, _ in pairs], supervised) for supervised, pairs in grouped]


def _part(role: str, runs: list[tuple[list[int], bool]], tokenizer: Tokenizer, colour: bool) -> list[str]:
    text = ""
    for ids, supervised in runs:
        piece = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if colour:
            piece = _painted(piece, _SUPERVISED if supervised else _QUIET, True)
        text += f"[[{piece}]]" if supervised and not colour else piece
    return [_painted(f"--- {role}", _BOLD, colour), text]


def _painted(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_PLAIN}" if colour else text
