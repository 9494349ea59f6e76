"""Checks of the fields of a row, and the normal form of numbers, texts, lists and chat messages.

All functions raise `BadRow` for a value that cannot be used, with a message that names the field and what was found.
"""

import difflib
import json
import math
from typing import Any

from rlhf_core.data.errors import BadRow
from rlhf_core.data.records import Message, Row, Tools
from rlhf_core.data.sources import kind_of

# --------------------------------------------------------------------------------------------------------------- fields


def read_field(row: Row, name: str, expected: str) -> Any:
    """Return the value of a field, which must be present and not null."""
    if name not in row:
        close = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadRow(f"field {name!r} is missing, expected {expected}{hint}")
    if row[name] is None:
        raise BadRow(f"field {name!r} is null, expected {expected}")
    return row[name]


def read_text(row: Row, name: str) -> str:
    """Return a field that is text, possibly empty."""
    return checked_text(read_field(row, name, "text"), f"field {name!r}")


def checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: found {kind_of(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # tokenizers fail on it without naming the row
        raise BadRow(f"{where} holds half a surrogate pair (a broken emoji), expected valid Unicode text") from None
    return value


def not_blank(text: str, name: str) -> str:
    """Return a text to train on, checked not to be blank."""
    if not text.strip():
        raise BadRow(f"field {name!r} is empty, expected text to learn from")
    return text


def checked_number(value: object, where: str) -> float:
    """Return a finite number, also from text: all values of a CSV file are text."""
    try:
        number = float("nan" if isinstance(value, bool) or not isinstance(value, int | float | str) else value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        found = "a number that is not finite" if isinstance(value, float) else kind_of(value)
        raise BadRow(f"{where}: found {found}, expected a finite number")
    return number


def optional_number(row: Row, name: str) -> float | None:
    value = row.get(name)
    blank = isinstance(value, str) and not value.strip()  # null in a CSV file
    return None if value is None or blank else checked_number(value, f"field {name!r}")


def checked_truth(value: object, where: str) -> bool:
    # A string is refused: "false" is true in Python, and the error would show only in a bad model.
    if not isinstance(value, int) or value not in (0, 1):  # bool is a subclass of int
        raise BadRow(f"{where}: found {kind_of(value)}, expected true, false, 0 or 1")
    return bool(value)


def read_items(row: Row, name: str, what: str, *, least: int) -> list[Any]:
    """Return a field that is a list of at least `least` items."""
    value = read_field(row, name, f"a list of {what}")
    if not isinstance(value, list):
        raise BadRow(f"field {name!r}: found {kind_of(value)}, expected a list of {what}")
    if len(value) < least:
        raise BadRow(f"field {name!r} has {len(value)} items, expected {least} or more")
    return value


# ------------------------------------------------------------------------------------------------------------- messages

# The roles of chat templates, and the names that ShareGPT exports use for them. A function_call is the turn of an
# assistant that calls tools.
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
# Which roles may follow which; error messages name the first. None: the beginning.
FOLLOWS = {
    None: ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def conversation(value: object, name: str) -> list[Message]:
    """Return a list of messages in the normal form {"role", "content"}, with the order of roles checked."""
    if not isinstance(value, list):
        raise BadRow(f"field {name!r}: found {kind_of(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"field {name!r} is an empty list, expected messages")
    messages = checked_messages(value, name)
    check_order(messages, name)
    return messages


def checked_messages(items: list[object], name: str) -> list[Message]:
    """Return the messages of a field, each in the normal form; their order is not checked."""
    return [_message(item, f"field {name!r}, message {number}") for number, item in enumerate(items, start=1)]


def check_order(messages: list[Message], name: str, *, before: Message | None = None) -> None:
    """Check the order of roles: at most one system message, then user and assistant in turn; after tool calls, tools.

    before: the message that precedes them.
    """
    for number, message in enumerate(messages, start=1):
        calls = before is not None and "tool_calls" in before
        expected = ("tool",) if calls else FOLLOWS[None if before is None else before["role"]]
        if message["role"] not in expected:
            raise BadRow(
                f"field {name!r}, message {number}: found the role {message['role']!r}, expected {expected[0]!r} "
                "(at most one system message, then user and assistant in turn; tool messages after an assistant's)"
            )
        before = message
    if messages[-1]["role"] == "system":
        raise BadRow(f"field {name!r} has a system message only, expected a user turn after it")


def _message(item: object, where: str) -> Message:
    """Return a message in the normal form. Keys without a value are removed; others stay, for the template to read."""
    if not isinstance(item, dict):
        raise BadRow(f"{where}: found {kind_of(item)}, expected an object with role and content")
    role_key, content_key = ("from", "value") if item.get("from") is not None else ("role", "content")
    content, calls = item.get(content_key), item.get("tool_calls") or []
    missing = [] if item.get(role_key) is not None else [role_key]
    missing += [content_key] * (content is None and not calls)
    if missing:
        found = " and ".join(f"no {key!r}" for key in missing)
        raise BadRow(f"{where}: found {found}, expected role and content, or from and value")
    role = checked_text(item[role_key], f"{where}, {role_key!r}")
    if role not in ROLES:
        raise BadRow(f"{where}: found the role {role[:40]!r}, expected one of {', '.join(ROLES)}")
    content = _content("" if content is None else content, f"{where}, {content_key!r}")
    if role == "function_call":
        calls = _written_calls(content, where)
        content = ""
    message: Message = {"role": ROLES[role], "content": content}
    if calls:
        if ROLES[role] != "assistant":
            raise BadRow(f"{where}: found tool_calls in a message of role {role!r}, expected them in an assistant's")
        message["tool_calls"] = _tool_calls(calls, where)
    if message["role"] == "assistant" and item.get("weight") not in (None, 0, 1):
        raise BadRow(
            f"{where}: found a weight other than 0 and 1, expected one of them (rows have weights of any size)"
        )
    for key, value in item.items():
        if key not in (role_key, content_key, "role", "content", "tool_calls") and value is not None:
            message[key] = _without_nulls(value, f"{where}, {key[:40]!r}")
    return message


def _content(value: object, where: str) -> str:
    """Return a message's text. Content in parts, as for models that read images, is joined if all of them are text."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return checked_text(value, where)
    for number, part in enumerate(value, start=1):
        if not isinstance(part.get("text"), str):
            kind = str(part.get("type"))[:40]
            raise BadRow(f"{where}: found a part of type {kind!r} as number {number}, expected parts that are text")
    return checked_text("".join(part["text"] for part in value), where)


def _written_calls(text: str, where: str) -> list[Any]:
    """Parse the calls in a ShareGPT message from function_call: JSON of one call or of a list of them."""
    try:
        calls = json.loads(text)
    except json.JSONDecodeError:
        reason = f"{where}: found a function_call that is not JSON, expected an object with name and arguments"
        raise BadRow(reason) from None
    return calls if isinstance(calls, list) else [calls]


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Return calls in the normal form {"type": "function", "function": {"name", "arguments"}}, arguments an object.

    Arguments may be JSON text, as an API returns them; they are parsed, since a template would write text in quotes.
    """
    if not isinstance(calls, list):
        raise BadRow(f"{where}, 'tool_calls': found {kind_of(calls)}, expected a list of calls")
    found = []
    for number, call in enumerate(calls, start=1):
        place = f"{where}, tool call {number}"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(f"{place} has no name, expected {{'function': {{'name': ..., 'arguments': {{...}}}}}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except json.JSONDecodeError:
                raise BadRow(f"{place}: found arguments that are text but not JSON, expected an object") from None
        if not isinstance(arguments or {}, dict):
            raise BadRow(f"{place}: found {kind_of(arguments)} as arguments, expected an object")
        others = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
        function = {"name": function["name"], "arguments": arguments or {}}
        found.append({"type": "function"} | _without_nulls(others | {"function": function}, place))
    return found


def _without_nulls(value: object, where: str) -> Any:
    """Return a JSON value without nulls and with its text checked: a table has a null for every key of another row."""
    if isinstance(value, dict):
        return {key: _without_nulls(item, where) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item, where) for item in value]
    return checked_text(value, where) if isinstance(value, str) else value


def is_supervised(message: Message) -> bool:
    """Whether a message is an assistant's and does not have the `weight` 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def not_empty(message: Message) -> bool:
    """Whether a message has text or tool calls."""
    return bool(message["content"].strip()) or "tool_calls" in message


def last_answer(messages: list[Message], name: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation before its last message, which must be an assistant's and not empty."""
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"field {name!r} ends with a {messages[-1]['role']} turn, expected an assistant turn at the end")
    if not not_empty(messages[-1]):
        raise BadRow(f"field {name!r} is empty in its last turn, expected text to learn from")
    return messages[:-1], messages[-1:]


def read_tools(row: Row) -> Tools | None:
    """Return the `tools` column: a list of JSON schemas, or that list as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise BadRow("field 'tools': found text that is not JSON, expected a list of tools") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("field 'tools': expected a list of objects, each the JSON schema of a tool")
    schemas: Tools = _without_nulls(tools, "field 'tools'")
    return schemas
