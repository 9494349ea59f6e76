"""What stands in a row: numbers, texts, lists and chat messages, checked and brought to one spelling.

What cannot be used raises `BadRow`, whose reason names the field and what was found there, never its content.
"""

import difflib
import json
import math
from typing import Any

from rlhf_core.data.sources import BadRow, Row, kind_of

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, perhaps with tool_calls and with keys of the
# template's own, such as reasoning_content, which are handed to it as they are.
Message = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------- fields


def read_field(row: Row, name: str, expected: str) -> Any:
    """The value of a field, which must be there and not null."""
    if name not in row:
        close = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadRow(f"field {name!r} is missing, expected {expected}{hint}")
    if row[name] is None:
        raise BadRow(f"field {name!r} is null, expected {expected}")
    return row[name]


def read_text(row: Row, name: str) -> str:
    """A field that is text, perhaps empty."""
    return checked_text(read_field(row, name, "text"), f"field {name!r}")


def checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: found {kind_of(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # tokenizers die of it without saying where
        raise BadRow(f"{where} holds half a surrogate pair (a broken emoji), expected valid Unicode text") from None
    return value


def not_blank(text: str, name: str) -> str:
    """Text that a model is to learn: a blank one would teach it to say nothing."""
    if not text.strip():
        raise BadRow(f"field {name!r} is empty, expected text to learn from")
    return text


def checked_number(value: object, where: str) -> float:
    """A finite number; written as text too, since a CSV file has nothing else."""
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
    blank = isinstance(value, str) and not value.strip()  # what a CSV file has for null
    return None if value is None or blank else checked_number(value, f"field {name!r}")


def checked_truth(value: object, where: str) -> bool:
    # A string is refused: "false" is a true value in Python, and a wrong guess shows only in a bad model.
    if not isinstance(value, int) or value not in (0, 1):  # bool is a kind of int
        raise BadRow(f"{where}: found {kind_of(value)}, expected true, false, 0 or 1")
    return bool(value)


def read_items(row: Row, name: str, what: str, *, least: int) -> list[Any]:
    """A field that is a list of at least so many items."""
    value = read_field(row, name, f"a list of {what}")
    if not isinstance(value, list):
        raise BadRow(f"field {name!r}: found {kind_of(value)}, expected a list of {what}")
    if len(value) < least:
        raise BadRow(f"field {name!r} has {len(value)} items, expected {least} or more")
    return value


# ------------------------------------------------------------------------------------------------------------- messages

# The roles as chat templates know them, and the names that ShareGPT exports use for the same. A function_call is the
# turn of an assistant that calls tools.
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
# Which roles may follow which; the first is what an error expects. None: the beginning.
FOLLOWS = {
    None: ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def conversation(value: object, name: str) -> list[Message]:
    """A list of messages in the one spelling, {"role", "content"}, with its order of roles checked."""
    if not isinstance(value, list):
        raise BadRow(f"field {name!r}: found {kind_of(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"field {name!r} is an empty list, expected messages")
    messages = checked_messages(value, name)
    check_order(messages, name)
    return messages


def checked_messages(items: list[object], name: str) -> list[Message]:
    """The messages of a field, each in the one spelling; their order is not looked at."""
    return [_message(item, f"field {name!r}, message {number}") for number, item in enumerate(items, start=1)]


def check_order(messages: list[Message], name: str, *, before: Message | None = None) -> None:
    """At most one system message, then user and assistant in turn; after a call of tools their answers."""
    for number, message in enumerate(messages, start=1):
        calls = before is not None and "tool_calls" in before
        expected = ("tool",) if calls else FOLLOWS[before and before["role"]]
        if message["role"] not in expected:
            raise BadRow(
                f"field {name!r}, message {number}: found the role {message['role']!r}, expected {expected[0]!r} "
                "(at most one system message, then user and assistant in turn; tool messages after an assistant's)"
            )
        before = message
    if messages[-1]["role"] == "system":
        raise BadRow(f"field {name!r} has a system message only, expected a user turn after it")


def _message(item: object, where: str) -> Message:
    """One message in the one spelling. Keys without a value are left out; others stay, for the template to read."""
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
        content, calls = "", _written_calls(content, where)
    message = {"role": ROLES[role], "content": content}
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
    """A message's text. Content in parts, as of models that also read images, is joined if all of them are text."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return checked_text(value, where)
    for number, part in enumerate(value, start=1):
        if not isinstance(part.get("text"), str):
            kind = str(part.get("type"))[:40]
            raise BadRow(f"{where}: found a part of type {kind!r} as number {number}, expected parts that are text")
    return checked_text("".join(part["text"] for part in value), where)


def _written_calls(text: str, where: str) -> list[Any]:
    """The calls in a ShareGPT message from function_call: JSON, of one call or of a list of them."""
    try:
        calls = json.loads(text)
    except json.JSONDecodeError:
        reason = f"{where}: found a function_call that is not JSON, expected an object with name and arguments"
        raise BadRow(reason) from None
    return calls if isinstance(calls, list) else [calls]


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Calls in the one spelling, {"type": "function", "function": {"name", "arguments"}}, arguments an object.

    Arguments may come as JSON text, as an API returns them: a template would write such text in quotes.
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
    """A value of JSON, its text checked, less the nulls: a table's file has one for every key that another row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item, where) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item, where) for item in value]
    return checked_text(value, where) if isinstance(value, str) else value


def is_learned(message: Message) -> bool:
    """Whether a message is the assistant's, and not one that its own `weight` of 0 makes mere history."""
    return message["role"] == "assistant" and message.get("weight") != 0


def says_something(message: Message) -> bool:
    return bool(message["content"].strip()) or "tool_calls" in message


def last_answer(messages: list[Message], name: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation before its last message, which must be an assistant's turn with something in it."""
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"field {name!r} ends with a {messages[-1]['role']} turn, expected an assistant turn at the end")
    if not says_something(messages[-1]):
        raise BadRow(f"field {name!r} is empty in its last turn, expected text to learn from")
    return messages[:-1], messages[-1:]


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of JSON schemas, or that list as JSON text."""
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
    return _without_nulls(tools, "field 'tools'")
