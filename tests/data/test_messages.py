"""Conversations in data sets: tools, several turns, system prompts, keys for the template."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_core.data.errors import DataError
from rlhf_core.data.formats import read_records

SYSTEM = {"role": "system", "content": "Be kind."}
USER, ASSISTANT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}
MORE, LATER = {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Gladly."}
FUNCTION = {"name": "add", "arguments": {"a": 1, "b": 1}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "content": "2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OFF = {"role": "assistant", "content": "No.", "weight": 0}
TOOL_USE = [USER, CALL, RESULT, ASSISTANT, MORE, LATER]


@pytest.fixture
def read(tmp_path):
    """Return a function that writes rows and reads them as records."""

    def run(*rows: dict, need: str = "supervised", **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_records(path, need=need, **options)

    return run


# ----------------------------------------------------------------------------------------------------- supervised turns


@pytest.mark.parametrize(
    ("row", "turns", "prompt", "completion"),
    [
        ({"messages": TOOL_USE}, "last", TOOL_USE[:5], [LATER]),
        ({"messages": TOOL_USE}, "all", [USER], TOOL_USE[1:]),
        ({"messages": [SYSTEM, *TOOL_USE]}, "all", [SYSTEM, USER], TOOL_USE[1:]),
        ({"messages": [*TOOL_USE, USER]}, "all", [USER], TOOL_USE[1:]),  # without an answer to the last
        ({"messages": [USER, CALL, RESULT]}, "last", [USER], [CALL]),  # nor to this one
        ({"messages": [USER, ASSISTANT]}, "all", [USER], [ASSISTANT]),
        ({"prompt": [USER], "completion": [CALL, RESULT, ASSISTANT]}, "last", [USER, CALL, RESULT], [ASSISTANT]),
        ({"prompt": [USER], "completion": [CALL, RESULT, ASSISTANT]}, "all", [USER], [CALL, RESULT, ASSISTANT]),
        # A turn of weight 0 is not supervised, wherever it is.
        ({"messages": [USER, OFF, *TOOL_USE]}, "all", [USER, OFF, USER], TOOL_USE[1:]),
        ({"messages": [*TOOL_USE, USER, OFF]}, "all", [USER], TOOL_USE[1:]),
        ({"messages": [*TOOL_USE, USER, OFF]}, "last", TOOL_USE[:5], [LATER]),
        ({"messages": [USER, LATER, USER, OFF, USER, LATER]}, "all", [USER], [LATER, USER, OFF, USER, LATER]),
        # The border between the columns holds: the turns of a prompt are not supervised.
        ({"prompt": TOOL_USE[:5], "completion": [LATER]}, "all", TOOL_USE[:5], [LATER]),
    ],
)
def test_the_turns_that_are_learned(read, row, turns, prompt, completion):
    (record,) = read(row, turns=turns)
    assert (record.prompt, record.completions) == (prompt, (completion,))


def test_a_prompt_may_end_with_a_tools_result(read):
    (record,) = read({"prompt": TOOL_USE[:3]}, need="prompts")
    assert (record.prompt, record.completions) == (TOOL_USE[:3], ())
    (record,) = read({"messages": TOOL_USE[:3]}, need="prompts")
    assert record.prompt == TOOL_USE[:3]
    row = {"prompt": TOOL_USE[:3], "chosen": [ASSISTANT], "rejected": [LATER]}
    (record,) = read(row, need="preference")
    assert (record.prompt, record.completions) == (TOOL_USE[:3], ([ASSISTANT], [LATER]))


def test_all_turns_are_for_supervised_jobs(read):
    with pytest.raises(DataError, match="data.turns='all' is for rlhf sft: here only the last answer"):
        read({"prompt": "a", "chosen": "b", "rejected": "c"}, need="preference", turns="all")
    with pytest.raises(ValueError, match="turns='each', expected 'last' or 'all'"):
        read({"messages": TOOL_USE}, turns="each")


# ----------------------------------------------------------------------------------------------------- the one spelling


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": FUNCTION}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": FUNCTION, "type": None, "id": None}]},
        {"role": "assistant", "content": "", "tool_calls": [FUNCTION]},
        {
            "role": "assistant",
            "tool_calls": [{"function": FUNCTION | {"arguments": json.dumps(FUNCTION["arguments"])}}],
        },
        {"from": "function_call", "value": json.dumps(FUNCTION)},
        {"from": "function_call", "value": json.dumps([FUNCTION])},
        {"from": "gpt", "value": "", "tool_calls": [FUNCTION]},
    ],
)
def test_a_call_of_tools_in_the_spellings_of_the_field(read, call):
    (record,) = read({"messages": [USER, call, RESULT, ASSISTANT]})
    assert record.prompt == [USER, CALL, RESULT]


def test_other_keys_of_messages_and_calls_stay_and_empty_ones_go(read):
    call = {"id": "c1", "function": FUNCTION}
    said = {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [call],
        "reasoning_content": "hm",
        "name": None,
    }
    result = RESULT | {"tool_call_id": "c1", "tool_calls": None}
    (record,) = read({"messages": [USER | {"tool_calls": []}, said, result, ASSISTANT]})
    assert record.prompt == [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"type": "function", "id": "c1", "function": FUNCTION}],
            "reasoning_content": "hm",
        },
        RESULT | {"tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    "both",
    [
        {"from": None, "value": None, "role": "user", "content": "1 + 1?"},
        {"from": "human", "value": "1 + 1?", "role": None, "content": None},
        {"from": "human", "value": "1 + 1?", "role": "assistant", "content": "another text"},
    ],
    ids=str,
)
def test_of_two_spellings_in_one_message_one_counts(read, both):
    (record,) = read({"messages": [both, ASSISTANT]})
    assert record.prompt == [USER]


def test_arguments_that_are_missing_are_none_at_all(read):
    (record,) = read({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "now"}]}]})
    (message,) = record.completions[0]
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_sharegpt_with_tools(read):
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in TOOL_USE]
    turns[1] = {"from": "function_call", "value": json.dumps(FUNCTION)}
    (record,) = read({"conversations": turns, "tools": json.dumps([TOOL]), "system": "Be kind."}, turns="all")
    assert (record.prompt, record.completions) == ([SYSTEM, USER], (TOOL_USE[1:],))
    assert record.tools == [TOOL]


def test_several_results_follow_several_calls(read):
    calls = {"role": "assistant", "tool_calls": [FUNCTION, FUNCTION]}
    (record,) = read({"messages": [USER, calls, RESULT, RESULT, ASSISTANT]})
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "tool", "tool"]


def test_results_may_follow_calls_that_are_written_in_the_text(read):
    written = {"role": "assistant", "content": '<tool_call>{"name": "add"}</tool_call>'}
    (record,) = read({"messages": [USER, written, RESULT, ASSISTANT]})
    assert record.prompt == [USER, written, RESULT]


def test_content_in_parts_that_are_text(read):
    parts = [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?"}]
    (record,) = read({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert record.prompt == [USER]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("row", [{"messages": TOOL_USE}, {"prompt": [USER], "chosen": "a", "rejected": "b"}])
def test_the_tools_column(read, row, tools):
    need = "preference" if "chosen" in row else "supervised"
    assert read(row | {"tools": tools}, need=need)[0].tools == [TOOL]
    assert read(row | {"tools": None}, need=need)[0].tools is None
    assert read(row | {"tools": "[]"}, need=need)[0].tools is None


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_tables_with_a_null_for_every_key_that_another_row_has(tmp_path, kind):
    """Arrow gives each message, and each call's arguments, the keys of all of them."""
    other = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "y"}}}]},
    ]
    rows = [{"messages": TOOL_USE, "tools": [TOOL]}, {"messages": other, "tools": None}]
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "rows"
        datasets.Dataset.from_list(rows).save_to_disk(path)
    first, second = read_records(path, need="supervised", turns="all")
    assert (first.prompt, first.completions, first.tools) == ([USER], (TOOL_USE[1:],), [TOOL])
    call = second.completions[0][0]["tool_calls"][0]["function"]
    assert (call, second.tools) == ({"name": "f", "arguments": {"x": "y"}}, None)


# ------------------------------------------------------------------------------------------------------------- bad rows

BAD_MESSAGES = [  # (messages, the reason)
    ([RESULT, ASSISTANT], "message 1: found the role 'tool', expected 'user'"),
    ([USER, RESULT], "message 2: found the role 'tool', expected 'assistant'"),
    ([USER, CALL, USER], "message 3: found the role 'user', expected 'tool'"),
    ([USER, CALL, ASSISTANT], "message 3: found the role 'assistant', expected 'tool'"),
    ([USER, CALL, RESULT, USER], "message 4: found the role 'user', expected 'assistant'"),
    ([USER, ASSISTANT, SYSTEM], "message 3: found the role 'system', expected 'user' .at most one system message"),
    ([USER | {"tool_calls": [FUNCTION]}], "message 1: found tool_calls in a message of role 'user'"),
    ([USER, {"role": "assistant", "tool_calls": {}}], "message 2: found no 'content'"),
    ([USER, {"role": "assistant", "tool_calls": "add"}], "message 2, 'tool_calls': found a string, expected a list"),
    ([USER, {"role": "assistant", "tool_calls": ["add"]}], "message 2, tool call 1 has no name, expected"),
    ([USER, {"role": "assistant", "tool_calls": [FUNCTION, {"function": {}}]}], "tool call 2 has no name, expected"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": ""}]}], "tool call 1 has no name, expected"),
    (
        [USER, {"role": "assistant", "tool_calls": [FUNCTION | {"arguments": "a=1"}]}],
        "arguments that are text but not JSON",
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [FUNCTION | {"arguments": [1]}]}],
        "found a list as arguments, expected an",
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [FUNCTION | {"arguments": "[1]"}]}],
        "found a list as arguments, expected an",
    ),
    ([USER, {"from": "function_call", "value": "add(1, 1)"}], "message 2: found a function_call that is not JSON"),
    ([USER, {"from": "function_call", "value": "3"}], "message 2, tool call 1 has no name"),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "found a part of type 'image_url' as number 1, expected parts",
    ),
    ([USER, ASSISTANT | {"reasoning_content": "\ud83d"}], "'reasoning_content' holds half a surrogate pair"),
    ([USER, ASSISTANT | {"content": " "}], "field 'messages' is empty in its last turn"),
    ([USER, OFF], "all assistant turns have the weight 0, expected one to learn from"),
    ([USER, OFF | {"weight": 0.5}], "message 2: found a weight other than 0 and 1, expected one of them"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_messages_that_cannot_be_used(read, messages, reason):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: (field 'messages'.*)?{reason}"):
        read({"messages": messages})


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("add(a, b)", "field 'tools': found text that is not JSON, expected a list of tools"),
        (TOOL, "field 'tools': expected a list of objects"),
        (["add"], "field 'tools': expected a list of objects"),
    ],
)
def test_tools_that_cannot_be_used(read, tools, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: {reason}"):
        read({"messages": TOOL_USE, "tools": tools})


def test_an_empty_turn_can_be_history_but_not_be_learned(read):
    row = {"messages": [USER, ASSISTANT | {"content": " "}, MORE, LATER]}
    assert read(row)[0].completions == ([LATER],)
    with pytest.raises(DataError, match="rows.jsonl:1: an assistant turn is empty, expected text to learn from in all"):
        read(row, turns="all")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ([CALL, RESULT], "field 'completion' ends with a tool turn"),
        ([USER, ASSISTANT], "message 1: found the role 'user', expected 'assistant'"),
        ([CALL, ASSISTANT], "message 2: found the role 'assistant', expected 'tool'"),
    ],
)
def test_completions_of_several_messages_are_in_order(read, completion, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{reason}"):
        read({"prompt": [SYSTEM, MORE], "completion": completion})


def test_pairs_have_one_answer_each(read):
    row = {"prompt": [USER], "chosen": [CALL, RESULT, ASSISTANT], "rejected": [LATER]}
    with pytest.raises(DataError, match="field 'chosen': expected one assistant message"):
        read(row, need="preference")


# ------------------------------------------------------------------------------------------------------- system prompts


@pytest.mark.parametrize(
    ("column", "setting", "own", "expected"),
    [
        (None, None, None, None),
        ("Be kind.", None, None, "Be kind."),
        ("", None, None, None),
        (None, "Be brief.", None, "Be brief."),
        (" ", "Be brief.", None, "Be brief."),
        ("Be kind.", "Be brief.", None, "Be kind."),  # the row takes precedence
        (None, "Be brief.", "Be kind.", "Be kind."),
        ("Be kind.", None, "Be kind.", "Be kind."),  # the same twice
    ],
)
@pytest.mark.parametrize("need", ["supervised", "prompts"])
def test_a_conversation_has_one_system_prompt(read, need, column, setting, own, expected):
    messages = [USER, ASSISTANT] if own is None else [{"role": "system", "content": own}, USER, ASSISTANT]
    (record,) = read({"messages": messages, "system": column}, need=need, system=setting)
    system = [] if expected is None else [{"role": "system", "content": expected}]
    assert record.prompt == [*system, USER]


def test_two_system_prompts_are_one_too_many(read):
    with pytest.raises(DataError, match="rows.jsonl:1: field 'system' beside a conversation that starts with another"):
        read({"messages": [SYSTEM, USER, ASSISTANT], "system": "Be brief."})


def test_text_has_no_room_for_a_system_prompt(read):
    with pytest.raises(DataError, match="rows.jsonl:1: field 'system' beside a prompt that is text, expected messages"):
        read({"prompt": "a", "response": "b", "system": "Be kind."})
    with pytest.raises(DataError, match="rows.jsonl:1: the prompt is text, expected messages for data.system"):
        read({"prompt": "a", "response": "b"}, system="Be kind.", skip_bad_rows=9)
    assert read({"prompt": "a", "response": "b", "system": ""})[0].prompt == "a"
    assert read({"text": "a", "system": "as it was rendered"})[0].prompt is None
