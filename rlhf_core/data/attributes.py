"""Attributes of the wanted answer, written into a prompt (SteerLM)."""

import contextlib
import math
from collections.abc import Sequence

from rlhf_core.data.errors import BadRow, DataError
from rlhf_core.data.messages import read_field
from rlhf_core.data.records import Prompt, Row
from rlhf_core.data.sources import kind_of


def with_attributes(prompt: Prompt | None, attributes: Sequence[str], row: Row, source: str) -> Prompt:
    """Append a line with the attributes of the wanted answer to a prompt, after an empty line:

        Attributes: helpfulness:4,verbosity:2

    In a conversation it is appended to the last user message. A model trained on rated answers in this way produces
    highly rated answers when the prompt has high ratings. Source: SteerLM (Dong et al. 2023, arXiv:2310.05344), whose
    own layout uses special tokens of one model family.

    attributes: NAME:VALUE, or the NAME of a column of the row.
    Raises DataError for plain text, which has no prompt, and BadRow for a row without the value.
    """
    if prompt is None:
        raise DataError(f"{source}: the row is plain text, expected a prompt to write the attributes into")
    line = f"\n\nAttributes: {','.join(_attribute(row, attribute) for attribute in attributes)}"
    if isinstance(prompt, str):
        return f"{prompt}{line}\n"
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    extended = prompt[last] | {"content": prompt[last]["content"] + line}
    return [*prompt[:last], extended, *prompt[last + 1 :]]


def _attribute(row: Row, attribute: str) -> str:
    """Return NAME:VALUE, with the value of the row's column where only a NAME is given; 4.0 is written 4."""
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
