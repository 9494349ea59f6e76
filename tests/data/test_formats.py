"""Every kind of file and format, and every reason to refuse a row."""

import csv
import gzip
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_core.data.convert import ALPACA_WITH_INPUT
from rlhf_core.data.errors import DataError
from rlhf_core.data.formats import FORMATS, read_records, recognise

PAIR = {"prompt": "Name a colour.", "chosen": "Blue, gladly.", "rejected": "Blue."}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
REPLY = {"role": "assistant", "content": "Go away"}
SYSTEM = {"role": "system", "content": "Be kind."}
CONVERSATION = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "More"}, {"role": "assistant", "content": "More!"}]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path):
    """Return a function that writes rows to rows.jsonl and returns its path."""
    return lambda *rows: write_jsonl(tmp_path / "rows.jsonl", list(rows))


# ---------------------------------------------------------------------------------------- the formats, by their columns

FORMAT_CASES = {
    "text": ("supervised", {"text": "Once."}, None, ("Once.",)),
    "text beside a label": ("supervised", {"text": "Once.", "label": 1}, None, ("Once.",)),
    "prompt and completion": ("supervised", {"prompt": "a", "completion": "b"}, "a", ("b",)),
    "prompt and response": ("supervised", {"prompt": "a", "response": "b", "answer": "72"}, "a", ("b",)),
    "prompt and completion as messages": (
        "supervised",
        {"prompt": [USER], "completion": [ASSISTANT]},
        [USER],
        ([ASSISTANT],),
    ),
    "messages": ("supervised", {"messages": CONVERSATION}, CONVERSATION[:-1], (CONVERSATION[-1:],)),
    "messages that end with the user": ("supervised", {"messages": [USER, ASSISTANT, USER]}, [USER], ([ASSISTANT],)),
    "messages beside the prompt they start with": (
        "supervised",
        {"prompt": "Hi", "messages": [USER, ASSISTANT]},
        [USER],
        ([ASSISTANT],),
    ),
    "sharegpt": (
        "supervised",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [USER],
        ([ASSISTANT],),
    ),
    "sharegpt with system": (
        "supervised",
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "user", "value": "Hi"}, ASSISTANT]},
        [SYSTEM, USER],
        ([ASSISTANT],),
    ),
    "preference": ("preference", PAIR, "Name a colour.", ("Blue, gladly.", "Blue.")),
    "preference as messages": (
        "preference",
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [REPLY]},
        [USER],
        ([ASSISTANT], [REPLY]),
    ),
    "preference, messages answered by text": (
        "preference",
        {"prompt": [USER], "chosen": "Hello", "rejected": "Go away"},
        [USER],
        ([ASSISTANT], [REPLY]),
    ),
    "preference, text answered by whole conversations (UltraFeedback)": (
        "preference",
        {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, REPLY], "messages": [USER, ASSISTANT]},
        [USER],
        ([ASSISTANT], [REPLY]),
    ),
    "preference, the prompt inside both": (
        "preference",
        {"chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, REPLY]},
        [SYSTEM, USER],
        ([ASSISTANT], [REPLY]),
    ),
    "hh": (
        "preference",
        {"chosen": TRANSCRIPT + " Because.", "rejected": TRANSCRIPT + " No."},
        TRANSCRIPT,
        (" Because.", " No."),
    ),
    "prompts": ("prompts", {"prompt": "Go on", "answer": "72"}, "Go on", ()),
    "prompts as messages": ("prompts", {"prompt": [SYSTEM, USER]}, [SYSTEM, USER], ()),
}


@pytest.mark.parametrize(("need", "row", "prompt", "completions"), FORMAT_CASES.values(), ids=FORMAT_CASES.keys())
def test_a_format_is_recognised_by_its_columns(jsonl, need, row, prompt, completions):
    (record,) = read_records(jsonl(row), need=need)
    assert (record.prompt, record.completions, record.label) == (prompt, completions, None)
    assert record.row == row  # untouched, for reward functions
    assert record.source == "rows.jsonl:1"


@pytest.mark.parametrize(("label", "expected"), [(True, True), (False, False), (1, True), (0, False)])
@pytest.mark.parametrize("column", ["completion", "response"])
def test_unpaired_takes_a_label_that_is_true_false_0_or_1(jsonl, column, label, expected):
    (record,) = read_records(jsonl({"prompt": "a", column: "b", "label": label}), need="unpaired")
    assert record.label is expected
    assert (record.prompt, record.completions) == ("a", ("b",))


@pytest.mark.parametrize(
    ("label", "found"), [("true", "a string"), ("0", "a string"), (2, "a number"), (1.0, "a number"), ([], "a list")]
)
def test_unpaired_refuses_any_other_label(jsonl, label, found):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: field 'label': found {found}, expected true, false, 0 or 1"):
        read_records(jsonl({"prompt": "a", "completion": "b", "label": label}), need="unpaired")


ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nName {a} colour.\n\n### Response:"
)
ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nName {a} colour.\n\n### Input:\nNot {b}lue\n\n### Response:"
)


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({}, ALPACA_PLAIN),
        ({"input": ""}, ALPACA_PLAIN),
        ({"input": None}, ALPACA_PLAIN),
        ({"input": "Not {b}lue"}, ALPACA_CONTEXT),
    ],
)
def test_alpaca_uses_the_published_wording_and_braces_in_the_data_are_harmless(jsonl, extra, prompt):
    row = {"instruction": "Name {a} colour.", "output": "Red", "text": "a rendered copy, as on the hub"} | extra
    (record,) = read_records(jsonl(row), need="supervised")
    assert (record.prompt, record.completions) == (prompt, ("Red",))


PROMPTS_OF_OTHER_FORMATS = {
    "preference": (PAIR, "Name a colour."),
    "preference of conversations": ({"chosen": [USER, ASSISTANT], "rejected": [USER, REPLY]}, [USER]),
    "hh": ({"chosen": TRANSCRIPT + " Because.", "rejected": TRANSCRIPT + " No."}, TRANSCRIPT),
    "unpaired": ({"prompt": "a", "completion": "b", "label": True}, "a"),
    "messages": ({"messages": CONVERSATION}, CONVERSATION[:-1]),
    "messages that wait for an answer": ({"messages": CONVERSATION[:-1]}, CONVERSATION[:-1]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}]}, [USER]),
    "alpaca, whose empty output does not matter": ({"instruction": "Name {a} colour.", "output": ""}, ALPACA_PLAIN),
    "prompt and response": ({"prompt": "a", "response": "b"}, "a"),
}


@pytest.mark.parametrize(("row", "prompt"), PROMPTS_OF_OTHER_FORMATS.values(), ids=PROMPTS_OF_OTHER_FORMATS.keys())
def test_every_format_with_a_prompt_serves_jobs_that_need_prompts(jsonl, row, prompt):
    (record,) = read_records(jsonl(row), need="prompts")
    assert (record.prompt, record.completions, record.row) == (prompt, (), row)


def test_a_format_can_be_named(jsonl):
    path = jsonl({"prompt": "a", "completion": "b", "label": "sport"})  # has the columns of unpaired rows
    (record,) = read_records(path, need="supervised", format="prompt_completion")
    assert record.completions == ("b",)


# ----------------------------------------------------------------------------------------- data that are something else


def test_an_unknown_format_name_is_an_error_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match="unknown data format 'alpacca', expected one of .*; did you mean 'alpaca'"):
        read_records(tmp_path / "never_opened.jsonl", need="supervised", format="alpacca")


@pytest.mark.parametrize(
    ("need", "row", "parts"),
    [
        (
            "supervised",
            {"promt": "a", "respons": "b"},
            [
                "nearest is 'prompt_completion'",
                "did you mean 'promt' for 'prompt'",
                "did you mean 'respons' for 'response'",
            ],
        ),
        (
            "preference",
            {"promt": "a", "chosn": "b", "rejected": "c"},
            ["nearest is 'preference', which needs prompt, chosen, rejected", "did you mean 'chosn' for 'chosen'"],
        ),
        (
            "preference",
            {"chosen": "b", "rejected": "c"},
            ["nearest is 'preference', which needs prompt, chosen, rejected"],
        ),
        (
            "supervised",
            {"a": "b", "c": "d"},
            ["expected one of: ", "alpaca (instruction, output, (input))", "text (text)"],
        ),
    ],
)
def test_wrong_columns_name_what_was_found_and_the_nearest_format(jsonl, need, row, parts):
    with pytest.raises(DataError) as caught:
        read_records(jsonl(row), need=need)
    for part in [f"rows.jsonl:1: found columns {list(row)}; none of the formats fits", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("row", "need", "parts"),
    [
        (
            PAIR,
            "supervised",
            ["look like preference pairs", "(or rlhf kto --pairs), not for rlhf sft"],
        ),
        ({"prompt": "a"}, "supervised", ["prompts without completions", "for rlhf ppo"]),
        ({"prompt": "a", "respnse": "b"}, "supervised", ["did you mean 'respnse' for 'response'"]),
        ({"text": "a"}, "prompts", ["look like plain text", "for rlhf sft, not for rlhf ppo"]),
        ({"text": "a"}, "preference", ["look like plain text", "preference (prompt, chosen, rejected)"]),
        ({"prompt": "a", "completion": "b", "label": True}, "supervised", ["--data.format prompt_completion"]),
        ({"prompt": "a", "completion": "b"}, "unpaired", ["nearest is 'unpaired', which needs prompt, completion or"]),
        ({"prompt": "a", "chosn": "b", "rejected": "c"}, "preference", ["did you mean 'chosn' for 'chosen'"]),
    ],
)
def test_data_of_another_need_name_the_command_that_takes_them(jsonl, row, need, parts):
    with pytest.raises(DataError) as caught:
        read_records(jsonl(row), need=need)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("options", [{"need": "sft"}, {"limit": 0}, {"skip_bad_rows": -1}])
def test_arguments_that_make_no_sense_are_refused(jsonl, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        read_records(jsonl(PAIR), **{"need": "preference"} | options)


# -------------------------------------------------------------------------------------------------------- unusable rows

GOOD_ROWS = {  # a row that sets the format, and the need it serves
    "preference": ("preference", PAIR),
    "of messages": ("preference", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [REPLY]}),
    "implicit": ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, REPLY]}),
    "hh": ("preference", {"chosen": TRANSCRIPT + " Because.", "rejected": TRANSCRIPT + " No."}),
    "text": ("supervised", {"text": "Once."}),
    "alpaca": ("supervised", {"instruction": "Name a colour.", "output": "Red"}),
    "messages": ("supervised", {"messages": [USER, ASSISTANT]}),
    "prompts": ("prompts", {"prompt": [USER]}),
}
BAD_ROWS = [  # (format, what is changed in its good row, the reason; ... takes a field away)
    ("preference", {"rejected": ...}, "field 'rejected' is missing, expected text or messages"),
    ("preference", {"rejected": ..., "rejectd": "c"}, "field 'rejected' is missing.*; did you mean 'rejectd'?"),
    ("preference", {"chosen": None}, "field 'chosen' is null, expected text or messages"),
    ("preference", {"chosen": 3}, "field 'chosen': found a number, expected text"),
    ("preference", {"prompt": {"a": 1}}, "field 'prompt': found an object, expected text"),
    ("preference", {"chosen": []}, "field 'chosen': found an empty list, expected messages"),
    ("preference", {"chosen": ""}, "field 'chosen' is empty"),
    ("preference", {"rejected": " \n"}, "field 'rejected' is empty"),
    ("of messages", {"chosen": [ASSISTANT, USER]}, "field 'chosen': expected one assistant message"),
    ("of messages", {"prompt": "Ho", "chosen": [USER, ASSISTANT]}, "after the messages of the prompt"),
    ("of messages", {"prompt": [USER, ASSISTANT]}, "field 'prompt' ends with an assistant turn"),
    ("of messages", {"rejected": [{"role": "assistant", "content": " "}]}, "field 'rejected' is empty"),
    ("implicit", {"rejected": [SYSTEM, USER, REPLY]}, "fields 'chosen' and 'rejected' have different prompts"),
    ("implicit", {"chosen": [USER]}, "field 'chosen' ends with a user turn"),
    ("hh", {"rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "fields 'chosen' and 'rejected' have different prompts"),
    ("hh", {"chosen": TRANSCRIPT + " "}, "field 'chosen' is empty"),
    ("hh", {"chosen": TRANSCRIPT + " a\n\nHuman: b"}, "field 'chosen' does not end with an Assistant turn"),
    ("hh", {"chosen": "\n\nHuman: a"}, "field 'chosen' does not end with an Assistant turn"),
    ("hh", {"chosen": "Hi"}, "field 'chosen' does not start with"),
    ("text", {"text": ""}, "field 'text' is empty"),
    ("text", {"text": "\ud83d"}, "field 'text' holds half a surrogate pair"),
    ("alpaca", {"output": ""}, "field 'output' is empty"),
    ("alpaca", {"instruction": ""}, "field 'instruction' is empty"),
    ("alpaca", {"input": 3}, "field 'input': found a number, expected text"),
    ("messages", {"messages": "Hi"}, "field 'messages': found a string, expected a list of messages"),
    ("messages", {"messages": []}, "field 'messages' is an empty list"),
    ("messages", {"messages": ["Hi"]}, "message 1: found a string, expected an object with role and content"),
    ("messages", {"messages": [USER]}, "field 'messages' has no assistant turn"),
    ("messages", {"messages": [SYSTEM]}, "field 'messages' has a system message only"),
    ("messages", {"messages": [ASSISTANT, USER]}, "message 1: found the role 'assistant', expected 'user'"),
    ("messages", {"messages": [USER, USER, ASSISTANT]}, "message 2: found the role 'user', expected 'assistant'"),
    ("messages", {"messages": [USER, SYSTEM]}, "message 2: found the role 'system', expected 'assistant'"),
    ("messages", {"messages": [{"role": "king", "content": "x"}]}, "found the role 'king', expected one of system, us"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: found no 'content'"),
    ("messages", {"messages": [{"content": "x"}]}, "message 1: found no 'role'"),
    ("messages", {"messages": [{"role": "user", "content": ["x"]}]}, "'content': found a list, expected text"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, "field 'messages' is empty"),
    ("prompts", {"prompt": [USER, ASSISTANT]}, "field 'prompt' ends with an assistant turn"),
]


@pytest.mark.parametrize(("format", "change", "reason"), BAD_ROWS)
def test_a_bad_row_is_an_error_unless_it_may_be_skipped(jsonl, caplog, format, change, reason):
    need, good = GOOD_ROWS[format]
    bad = {name: value for name, value in (good | change).items() if value is not ...}
    path = jsonl(good, bad, good)
    with pytest.raises(DataError) as caught:
        read_records(path, need=need)
    message = str(caught.value)
    assert re.match(f"rows.jsonl:2: .*{reason}", message)
    assert "1 of the 3 rows read cannot be used" in message and "--data.skip-bad-rows 1" in message
    with caplog.at_level(logging.WARNING, "rlhf_core.data"):
        records = read_records(path, need=need, skip_bad_rows=1)
    assert [record.source for record in records] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert "dropped 1 of 3 rows: 1 x" in caplog.text and "(first: rows.jsonl:2)" in caplog.text


def test_skipped_rows_are_counted_by_reason_and_one_too_many_is_the_error(jsonl, caplog):
    empty, missing = PAIR | {"chosen": ""}, {"prompt": "a", "rejected": "b"}
    path = jsonl(PAIR, empty, missing, empty, PAIR)
    with pytest.raises(DataError, match=r"^rows.jsonl:4: field 'chosen' is empty.*\n3 of the 5 rows .*: 2 x "):
        read_records(path, need="preference", skip_bad_rows=2)
    assert len(read_records(path, need="preference", skip_bad_rows=3)) == 2
    assert "dropped 3 of 5 rows: 2 x field 'chosen' is empty" in caplog.text
    assert ", 1 x field 'chosen' is missing" in caplog.text


def test_errors_quote_no_content(jsonl):
    secret = "a very private sentence"
    with pytest.raises(DataError) as caught:
        read_records(jsonl({"prompt": secret, "chosen": secret, "rejected": [secret]}), need="preference")
    assert secret not in str(caught.value)


def test_pairs_without_a_difference_are_dropped_and_counted(jsonl, caplog):
    same = PAIR | {"chosen": "Blue."}
    assert len(read_records(jsonl(same, PAIR, same), need="preference")) == 1
    assert "dropped 2 of 3 rows: 2 x chosen and rejected are the same (first: rows.jsonl:1)" in caplog.text


def test_nothing_left_is_an_error_with_the_reasons(jsonl):
    path = jsonl(PAIR | {"chosen": "Blue."}, PAIR | {"chosen": ""})
    reasons = "1 x chosen and rejected are the same, 1 x field 'chosen' is empty"
    with pytest.raises(DataError, match=f"0 of 2 rows left: {reasons}"):
        read_records(path, need="preference", skip_bad_rows=9)


def test_an_empty_file_is_an_error(tmp_path):
    for content in (b"", b"\n\n", b"[]", b"\xef\xbb\xbf"):
        (tmp_path / "empty.json").write_bytes(content)
        with pytest.raises(DataError, match="empty.json: 0 of 0 rows left"):
            read_records(tmp_path / "empty.json", need="prompts")


def test_slow_libraries_are_imported_only_when_they_are_needed():
    code = (
        "import sys, rlhf_core.data.formats, rlhf_core.data.chat, rlhf_core.data.tokenize\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_limit_stops_after_so_many_records(jsonl):
    path = jsonl(PAIR | {"chosen": "Blue."}, PAIR, PAIR, {"a row": "that is never reached"})
    records = read_records(path, need="preference", limit=2)
    assert [record.source for record in records] == ["rows.jsonl:2", "rows.jsonl:3"]


# ------------------------------------------------------------------------------------------------------- kinds of files

ROWS = [{"prompt": f"{number}: Grüße,\u2028\n“you”", "completion": "x" * number} for number in range(1, 4)]


def as_jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: list[dict], **options) -> None:
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


FILE_KINDS = {
    "rows.jsonl": as_jsonl,
    "rows.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "gzip_by_content.jsonl": lambda rows: gzip.compress(as_jsonl(rows)),
    "rows.json": lambda rows: json.dumps(rows, indent=4).encode(),
    "list_with_mark.json": lambda rows: b"\xef\xbb\xbf\n " + json.dumps(rows).encode(),
    "rows.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "lines.json": as_jsonl,
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + as_jsonl(rows),
    "windows.jsonl": lambda rows: as_jsonl(rows).replace(b"\n", b"\r\n"),
    "blank_at_the_end.jsonl": lambda rows: as_jsonl(rows) + b"\n  \r\n\n",
    "no_newline_at_the_end.jsonl": lambda rows: as_jsonl(rows).rstrip(b"\n"),
}


@pytest.mark.parametrize("name", FILE_KINDS)
def test_json_files_of_every_kind_give_the_same_records(tmp_path, name):
    (tmp_path / name).write_bytes(FILE_KINDS[name](ROWS))
    records = read_records(tmp_path / name, need="supervised")
    assert [record.row for record in records] == ROWS
    is_list = name in ("rows.json", "list_with_mark.json", "rows.json.gz")
    assert [record.source for record in records] == [f"{name} row {n}" if is_list else f"{name}:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path, encoding):
    write_csv(tmp_path / "rows.csv", ROWS, encoding=encoding)
    records = read_records(tmp_path / "rows.csv", need="supervised")
    assert [record.row for record in records] == ROWS
    assert records[2].source == "rows.csv row 3"


def test_csv_gzipped_and_with_fields_longer_than_the_standard_limit(tmp_path):
    rows = [{"prompt": "a", "completion": "x" * 200_000}]
    write_csv(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    assert read_records(tmp_path / "rows.csv.gz", need="supervised")[0].row == rows[0]


def test_csv_labels_are_read_for_csv_has_no_other_type_than_text(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in ("1", "0", "true", "False", "yes")]
    write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(DataError, match="rows.csv row 5: field 'label': found a string"):
        read_records(tmp_path / "rows.csv", need="unpaired")
    records = read_records(tmp_path / "rows.csv", need="unpaired", limit=4)
    assert [record.label for record in records] == [True, False, True, False]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prompt,completion\na,b\na,b,c\n", "rows.csv row 2: the row has more fields than the header"),
        ("prompt,completion\na,b\na\n", "rows.csv row 2: field 'completion' is null"),
        ("prompt,prompt\na,b\n", "rows.csv: found columns .*, expected each name once"),
        ('prompt,completion\na,b\na,"b\n', "rows.csv after row 1: the file is not valid CSV"),
    ],
)
def test_broken_csv(tmp_path, content, reason):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        read_records(tmp_path / "rows.csv", need="supervised")


def test_csv_in_another_encoding(tmp_path):
    (tmp_path / "rows.csv").write_bytes("prompt,completion\nGrüße,b\n".encode("latin-1"))
    with pytest.raises(DataError, match="rows.csv after row 0: the file is not UTF-8 text"):
        read_records(tmp_path / "rows.csv", need="supervised")


def test_parquet(tmp_path):
    rows = [{"messages": [USER, ASSISTANT], "score": number} for number in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "named_otherwise.bin")
    records = read_records(tmp_path / "named_otherwise.bin", need="supervised")
    assert [record.row for record in records] == rows
    assert records[2].source == "named_otherwise.bin row 3"


def test_parquet_with_a_null_and_parquet_that_is_damaged(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR | {"chosen": None}]), path)
    with pytest.raises(DataError, match="rows.parquet row 2: field 'chosen' is null"):
        read_records(path, need="preference")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="rows.parquet row 1: the parquet file cannot be read"):
        read_records(path, need="preference")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "completion": "b', r"the line is not valid JSON \(Unterminated string starting at\)"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' comes twice in one object"),
        ('{"prompt": "ü", "completion": "c"}'.encode("latin-1"), "the line is not UTF-8 text"),
        (b'"just text"', "found a string, expected an object"),
    ],
)
def test_a_broken_line_is_a_bad_row(tmp_path, caplog, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + as_jsonl(ROWS[:1]) + line + b"\n" + as_jsonl(ROWS[1:]))
    with pytest.raises(DataError, match=f"^rows.jsonl:3: {reason}"):
        read_records(path, need="supervised")
    records = read_records(path, need="supervised", skip_bad_rows=1)
    assert [record.source for record in records] == ["rows.jsonl:2", "rows.jsonl:4", "rows.jsonl:5"]


def test_a_gzip_file_that_is_cut_short_keeps_the_rows_before_the_cut(tmp_path):
    rows = [{"text": f"A story about number {number * number}."} for number in range(5000)]
    whole = gzip.compress(as_jsonl(rows))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz:\d+: the gzip file is cut short"):
        read_records(tmp_path / "cut.jsonl.gz", need="supervised")
    records = read_records(tmp_path / "cut.jsonl.gz", need="supervised", skip_bad_rows=1)
    assert 1000 < len(records) < 5000
    assert [record.row for record in records] == rows[: len(records)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[\n{"prompt": "a"},\n{"prompt": }\n]', "rows.json:3: .* not valid JSON: Expecting value, column 12"),
        (b'[{"prompt": "a"}, {"prompt": "a", "prompt": "b"}]', "rows.json: the key 'prompt' comes twice"),
        (b'[{"prompt": "a"}, "b"]', "rows.json row 2: found a string, expected an object"),
        (b'[{"prompt": "\xfc"}]', "rows.json: byte 13 is not UTF-8 text"),
        (gzip.compress(json.dumps(list(range(9999))).encode())[:9000], "rows.json: the gzip file is cut short"),
    ],
)
def test_a_broken_json_list(tmp_path, content, reason):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_records(tmp_path / "rows.json", need="prompts")


# -------------------------------------------------------------------------------------------------- folders and the hub


def test_a_folder_of_files_is_read_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:1]))
    (tmp_path / "README.md").write_text("not data")
    records = read_records(tmp_path, need="supervised")
    assert [record.row for record in records] == ROWS
    assert [record.source for record in records] == ["a.json row 1", "b.jsonl:1", "b.jsonl:2"]


@pytest.mark.parametrize(("split", "expected"), [(None, 0), ("train", 0), ("test", 1)])
def test_the_split_of_a_folder_is_in_the_names_of_its_files(tmp_path, split, expected):
    write_jsonl(tmp_path / "train-00000-of-00001.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "sets_test.jsonl", ROWS[1:2])
    (record,) = read_records(tmp_path, need="supervised", split=split)
    assert record.row == ROWS[expected]


def test_a_split_that_is_not_there(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file is named after the split 'test'; found \['train.jsonl'\]"):
        read_records(tmp_path, need="supervised", split="test")
    with pytest.raises(DataError, match="a single file has no splits"):
        read_records(path, need="supervised", split="train")


def test_a_folder_without_data(tmp_path):
    with pytest.raises(DataError, match="no data file in there, expected .jsonl"):
        read_records(tmp_path, need="supervised")


def test_a_folder_saved_by_datasets(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "single")
    records = read_records(tmp_path / "single", need="supervised")
    assert [record.row for record in records] == ROWS
    assert records[2].source == "single row 3"
    with pytest.raises(DataError, match="single: split 'test' was asked for, but the folder holds a single dataset"):
        read_records(tmp_path / "single", need="supervised", split="test")


def test_a_folder_of_splits_saved_by_datasets(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    assert len(read_records(tmp_path / "splits", need="supervised")) == 2
    assert len(read_records(tmp_path / "splits", need="supervised", split="test")) == 1
    with pytest.raises(DataError, match=r"no split 'dev', found \['test', 'train'\]"):
        read_records(tmp_path / "splits", need="supervised", split="dev")


def test_a_damaged_folder_saved_by_datasets(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "single")
    (tmp_path / "single" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"single: datasets cannot load the folder \(FileNotFoundError"):
        read_records(tmp_path / "single", need="supervised")


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("owner/name", None, ("owner/name", None, "train")),
        ("name", "test[:5%]", ("name", None, "test[:5%]")),
        ("openai/gsm8k:main", None, ("openai/gsm8k", "main", "train")),
    ],
)
def test_a_hub_name(monkeypatch, tmp_path, name, split, asked):
    calls = []

    def load_dataset(repository, configuration, *, split):
        calls.append((repository, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = read_records(name, need="supervised", split=split)
    assert calls == [asked]
    assert [record.row for record in records] == ROWS
    assert records[0].source == f"{name} row 1"


def test_a_hub_error_keeps_its_reason(monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("the hub is down for tea")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/name: neither a file .* \(ConnectionError: the hub is down for tea\)"):
        read_records("owner/name", need="supervised")


def test_a_misspelt_file_is_never_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("went to the hub"))
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    monkeypatch.chdir(tmp_path)
    for name in ("pars.jsonl", "./pars.jsonl", str(tmp_path / "pars.jsonl")):
        with pytest.raises(DataError, match="pars.jsonl: no such file or folder; did you mean .*pairs.jsonl"):
            read_records(name, need="preference")


# ------------------------------------------------------------------------------------------------------------ real data


def real_path(shared: Path, name: str) -> Path:
    return shared / "data" / (name if "." in name else f"{name}.jsonl.gz")


def test_alpaca_as_published(shared, caplog):
    """52,002 rows, of which 28 have an empty output."""
    path = real_path(shared, "alpaca_data.json.gz")
    with pytest.raises(DataError, match="row 285: field 'output' is empty.*\n28 of the 52002 rows"):
        read_records(path, need="supervised")
    records = read_records(path, need="supervised", skip_bad_rows=28)
    assert len(records) == 51_974 and "dropped 28 of 52,002 rows" in caplog.text
    row = next(record for record in records if record.row["input"])
    assert row.prompt == ALPACA_WITH_INPUT.format(instruction=row.row["instruction"], input=row.row["input"])


def test_hh_as_published(shared):
    """2,312 rows; in 5 the dialogues differ before the last answer, in 4 an answer is empty."""
    path = real_path(shared, "hh_rlhf_harmless_base_raw_test")
    with pytest.raises(DataError, match="9 of the 2312 rows .*: 5 x fields .* have different prompts.*, 4 x"):
        read_records(path, need="preference")
    records = read_records(path, need="preference", skip_bad_rows=9)
    assert len(records) == 2303
    for record in records:
        assert record.prompt.startswith("\n\nHuman:") and record.prompt.endswith("\n\nAssistant:")
        assert [record.prompt + answer for answer in record.completions] == [
            record.row["chosen"],
            record.row["rejected"],
        ]
        assert not any("\n\nHuman:" in answer for answer in record.completions)


def test_llmbar_has_one_pair_without_a_difference(shared, caplog):
    records = read_records(real_path(shared, "pref_llmbar_test"), need="preference", skip_bad_rows=1)
    assert len(records) == 883 and "dropped 2 of 885 rows: 1 x chosen and rejected are the same" in caplog.text


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_a_row_of_every_format():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \| .* \| `(\{.*\})` \|$", page, flags=re.MULTILINE))
    assert list(shown) == list(FORMATS)
    for name, row in shown.items():
        format = recognise(json.loads(row), need=FORMATS[name].need, source="the page")
        assert format is FORMATS[name]
        assert format.convert(json.loads(row))


def test_the_conversation_on_the_page(jsonl):
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    (record,) = read_records(jsonl(json.loads(block)), need="supervised")
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "tool"]
    assert record.tools[0]["function"]["name"] == "multiply"
