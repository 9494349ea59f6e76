"""Weights, margins, ranked lists, steps and attributes of rows."""

import json
import math

import pytest

from rlhf_core.config import ConfigError, DataConfig, ModelConfig
from rlhf_core.data.errors import DataError
from rlhf_core.data.formats import FORMATS, read_records
from rlhf_core.data.loader import load_examples
from rlhf_core.data.tokenize import encode_records
from rlhf_core.rollout.generate import GenerateConfig, generate

USER = {"role": "user", "content": "Name a colour."}
PAIR = {"prompt": "Name a colour.", "chosen": "Blue, gladly.", "rejected": "Blue."}
NEEDS = {  # a row for every need, to which other columns are added
    "supervised": {"prompt": "a", "response": "b"},
    "preference": PAIR,
    "unpaired": {"prompt": "a", "response": "b", "label": True},
    "ranking": {"prompt": "a", "completions": ["b", "c", "d"]},
    "process": {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    "prompts": {"prompt": "a"},
}


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def write(tmp_path):
    def run(*rows: dict):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return run


# -------------------------------------------------------------------------------------------------- weights and margins


@pytest.mark.parametrize("need", NEEDS)
def test_a_row_has_a_weight(write, make_tokenizer, need):
    path = write(*[NEEDS[need] | {"weight": weight} for weight in (0.5, None, "2e-1", 3)])
    records = read_records(path, need=need)
    assert [record.weight for record in records] == [0.5, 1.0, 0.2, 3.0]
    tokenizer = make_tokenizer()
    examples = encode_records(records, tokenizer, stop_ids={tokenizer.eos_token_id})
    assert [example.weight for example in examples] == [0.5, 1.0, 0.2, 3.0]


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (0, "a number that is not above 0"),
        (-1, "a number that is not above 0"),
        (math.nan, "found a number that is not finite, expected a finite number"),
        ("much", "found a string, expected a finite number"),
        (True, "found a true/false value, expected a finite number"),
        ([1], "found a list, expected a finite number"),
    ],
)
def test_weights_that_cannot_be(write, weight, found):
    with pytest.raises(DataError, match=f"rows.jsonl:1: field 'weight': .*{found}"):
        read_records(write(PAIR | {"weight": weight}), need="preference")


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({}, None),
        ({"margin": None}, None),
        ({"margin": 1.5}, 1.5),
        ({"margin": -2}, -2.0),
        ({"score_chosen": 8.5, "score_rejected": 3}, 5.5),
        ({"score_chosen": 8.5, "score_rejected": None}, None),
        ({"score_chosen": 8.5}, None),
        ({"score_chosen": 8.5, "score_rejected": 3, "margin": 1}, 1.0),
    ],
)
def test_a_pair_may_say_by_how_much(write, make_tokenizer, columns, margin):
    records = read_records(write(PAIR | columns), need="preference")
    tokenizer = make_tokenizer()
    (example,) = encode_records(records, tokenizer, stop_ids={tokenizer.eos_token_id})
    assert (records[0].margin, example.margin) == (margin, margin)


def test_margins_that_cannot_be(write):
    with pytest.raises(DataError, match="rows.jsonl:1: field 'margin': found a string, expected a finite number"):
        read_records(write(PAIR | {"margin": "wide"}), need="preference")
    with pytest.raises(DataError, match="rows.jsonl:1: field 'score_chosen': found a list, expected a finite number"):
        read_records(write(PAIR | {"score_chosen": [1]}), need="preference")


# ------------------------------------------------------------------------------------------------------------- rankings


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"prompt": "a", "completions": ["x", "y", "z"]}, "a", ("x", "y", "z")),
        ({"prompt": "a", "completions": ["x", "y", "z"], "ranks": None}, "a", ("x", "y", "z")),
        ({"prompt": "a", "responses": ["x", "y", "z"], "ranks": [3, 1, 2]}, "a", ("y", "z", "x")),
        ({"prompt": "a", "responses": ["x", "y", "z"], "scores": [0.1, -7, 4]}, "a", ("z", "x", "y")),
        ({"prompt": "a", "completions": ["x", "y"], "scores": ["1", "2"]}, "a", ("y", "x")),
        ({"prompt": [USER], "completions": ["x", "y"]}, [USER], (said("x"), said("y"))),
        ({"prompt": "Name a colour.", "completions": [said("x"), [USER, *said("y")]]}, [USER], (said("x"), said("y"))),
        (PAIR, "Name a colour.", ("Blue, gladly.", "Blue.")),
        ({"chosen": [USER, *said("x")], "rejected": [USER, *said("y")]}, [USER], (said("x"), said("y"))),
    ],
)
def test_a_ranking_is_a_list_of_answers_the_best_first(write, row, prompt, completions):
    (record,) = read_records(write(row), need="ranking")
    assert (record.prompt, record.completions) == (prompt, completions)


def test_the_tokens_of_a_ranking(write, make_tokenizer):
    tokenizer = make_tokenizer()
    records = read_records(write({"prompt": "a", "responses": ["x", "yy", "z"], "ranks": [2, 1, 3]}), need="ranking")
    (example,) = encode_records(records, tokenizer, stop_ids={tokenizer.eos_token_id})
    assert [tokenizer.decode(ids) for ids in example.completions] == ["yy</s>", "x</s>", "z</s>"]


def test_a_ranking_has_no_ties(write, caplog):
    """The second row keeps one of each rank; the third keeps the better rank of equal texts."""
    path = write(
        {"prompt": "a", "responses": ["x", "y"], "scores": [1, 2]},
        {"prompt": "a", "responses": ["x", "y", "z", "w"], "scores": [1, 2, 2.0, 1]},
        {"prompt": "a", "responses": ["x", "y", "x"], "scores": [1, 2, 3]},
        {"prompt": "a", "responses": ["x", "y"], "scores": [2, 2]},
        {"prompt": "a", "responses": ["x", "x"], "scores": [1, 2]},
    )
    records = read_records(path, need="ranking")
    assert [record.completions for record in records] == [("y", "x"), ("y", "x"), ("x", "y")]
    assert "answers with the rank, or the text, of another are left out (first: rows.jsonl:2)" in caplog.text
    assert "dropped 2 of 5 rows" in caplog.text and "(first: rows.jsonl:4)" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"responses": "x"}, "field 'responses': found a string, expected a list of texts"),
        ({"responses": ["x"]}, "field 'responses' has 1 items, expected 2 or more"),
        ({"responses": ["x", " "]}, r"field 'responses\[1\]' is empty"),
        ({"responses": ["x", {"text": "y"}]}, r"field 'responses\[1\]': found an object, expected text"),
        ({"responses": ["x", said("y")]}, None),  # one conversation makes them all
        ({"ranks": None}, "found no ranks and no scores beside 'responses', expected one of the two"),
        ({"scores": [1, 2]}, "found ranks and scores beside 'responses', expected one of the two"),
        ({"ranks": [1]}, "field 'ranks' has 1 items for 2 answers, expected one for each"),
        ({"ranks": 1}, "field 'ranks': found a number, expected a list of numbers"),
        ({"ranks": [1, "best"]}, "field 'ranks': found a string, expected a finite number"),
    ],
)
def test_rankings_that_cannot_be_used(write, change, reason):
    path = write({"prompt": "a", "responses": ["x", "y"], "ranks": [1, 2]} | change)
    if reason is None:
        assert read_records(path, need="ranking")[0].completions == (said("x"), said("y"))
        return
    with pytest.raises(DataError, match=f"rows.jsonl:1: {reason}"):
        read_records(path, need="ranking")


# ---------------------------------------------------------------------------------------------------------------- steps

STEPS = {"prompt": "3 + 4 + 5?", "completions": ["3 + 4 = 7.", "7 + 5 = 13."], "labels": [True, False]}


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ки "])
def test_an_answer_in_steps(write, make_tokenizer, separator):
    """Each step ends with its separator, the last with EOS; `step_ends` has the index of that token."""
    (record,) = read_records(write(STEPS), need="process", step_separator=separator)
    assert record.completions == (f"3 + 4 = 7.{separator}7 + 5 = 13.",)
    assert (record.steps, record.step_labels) == ((f"3 + 4 = 7.{separator}", "7 + 5 = 13."), (True, False))


def test_the_tokens_of_steps(write, make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [
        STEPS,
        STEPS | {"completions": ["a\n", "b", "c</s>"], "labels": [1, 0, 1]},
        STEPS | {"completions": ["12"], "labels": [0]},
    ]
    records = read_records(write(*rows), need="process")
    examples = encode_records(records, tokenizer, stop_ids={tokenizer.eos_token_id})
    ends = [[tokenizer.decode(example.completions[0][: end + 1]) for end in example.step_ends] for example in examples]
    assert ends == [
        ["3 + 4 = 7.\n", "3 + 4 = 7.\n7 + 5 = 13.</s>"],
        ["a\n", "a\nb\n", "a\nb\nc</s>"],
        ["12</s>"],
    ]
    assert [example.step_labels for example in examples] == [(True, False), (True, False, True), (False,)]
    assert [example.supervised for example in examples] == [None] * 3


def test_no_token_bridges_two_steps(write, shared):
    """GPT-2 has a token for two line breaks, and one for a point and a quotation mark."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gpt2_tokenizer")
    row = {"prompt": "a", "completions": ["One.", '"Two."', "\nThree"], "labels": [1, 1, 0]}
    for separator in ("\n", "."):
        records = read_records(write(row), need="process", step_separator=separator)
        (example,) = encode_records(records, tokenizer, stop_ids={50256})
        borders = [0, *(end + 1 for end in example.step_ends)]
        found = [tokenizer.decode(example.completions[0][a:b]) for a, b in zip(borders, borders[1:], strict=False)]
        assert found == ["One." + separator * (separator != "."), f'"Two."{separator}', "\nThree<|endoftext|>"]


def test_steps_in_a_conversation(write, make_tokenizer):
    """Text that a template writes before and after the answer belongs to its first and last step."""
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    row = STEPS | {"prompt": [USER], "completions": ["one", "two", "three"], "labels": [1, 0, 0]}
    records = read_records(write(row), need="process")
    (example,) = encode_records(records, tokenizer, stop_ids={tokenizer.eos_token_id})
    text = [tokenizer.decode(example.completions[0][: end + 1]) for end in example.step_ends]
    assert text == [" one\n", " one\ntwo\n", " one\ntwo\nthree</s>"]
    shouting = template.replace("m.content", "m.content | upper")
    with pytest.raises(
        DataError, match="rows.jsonl:1: the chat template changes the text of an answer, so that its steps"
    ):
        encode_records(records, tokenizer, stop_ids={tokenizer.eos_token_id}, chat_template=shouting)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [True]}, "field 'labels' has 1 items for 2 steps, expected one for each"),
        ({"labels": [True, "no"]}, r"field 'labels\[1\]': found a string, expected true, false, 0 or 1"),
        ({"labels": [True, 0.5]}, r"field 'labels\[1\]': found a number, expected true, false, 0 or 1"),
        ({"labels": None}, "field 'labels' is null, expected a list of labels"),
        ({"completions": []}, "field 'completions' has 0 items, expected 1 or more"),
        ({"completions": ["a", " "]}, r"field 'completions\[1\]' is empty"),
        ({"completions": ["a", 3]}, r"field 'completions\[1\]': found a number, expected text"),
    ],
)
def test_steps_that_cannot_be_used(write, change, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: {reason}"):
        read_records(write(STEPS | change), need="process")


@pytest.mark.parametrize(
    ("need", "given", "reason"),
    [
        (
            "ranking",
            "process",
            "look like answers in steps, each with a label; .*name the format: --data.format ranking",
        ),
        ("process", "ranking", "look like ranked lists of answers; that is for rlhf reward.*nearest is 'process'"),
        ("supervised", "ranking", "look like ranked lists of answers; that is for rlhf reward, not for rlhf sft"),
        ("process", "preference", "look like preference pairs"),
    ],
)
def test_lists_for_another_job(write, need, given, reason):
    with pytest.raises(DataError, match=reason):
        read_records(write(NEEDS[given]), need=need)


@pytest.mark.parametrize("name", ["ranking", "process"])
def test_lists_have_prompts(write, name):
    assert FORMATS[name].columns()
    (record,) = read_records(write(NEEDS[name]), need="prompts")
    assert (record.prompt, record.completions) == ("a", ())


# ----------------------------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize(
    ("attributes", "line"),
    [
        (("helpfulness", "verbosity"), "helpfulness:4,verbosity:2"),
        (("verbosity", "helpfulness"), "verbosity:2,helpfulness:4"),
        (("helpfulness", "quality:9"), "helpfulness:4,quality:9"),
        (("helpfulness:0", "half", "safe", "language"), "helpfulness:0,half:0.5,safe:true,language:en"),
        (("text",), "text:3"),
    ],
)
def test_attributes_are_the_last_line_of_a_prompt(write, attributes, line):
    columns = {"helpfulness": 4, "verbosity": 2.0, "half": 0.5, "safe": True, "language": " en ", "text": "3.0"}
    (record,) = read_records(write(NEEDS["supervised"] | columns), need="supervised", attributes=attributes)
    assert record.prompt == f"a\n\nAttributes: {line}\n"
    messages = {"messages": [USER, *said("x"), USER, *said("y")]} | columns
    (record,) = read_records(write(messages), need="supervised", attributes=attributes)
    asked = {"role": "user", "content": f"Name a colour.\n\nAttributes: {line}"}
    assert record.prompt == [USER, *said("x"), asked]


@pytest.mark.parametrize(
    ("value", "written"), [(4.0, "4"), (0.5, "0.5"), (1234567, "1234567"), (20240115.0, "20240115")]
)
def test_whole_numbers_are_written_in_full(write, value, written):
    (record,) = read_records(write(NEEDS["supervised"] | {"score": value}), need="supervised", attributes=("score",))
    assert record.prompt.endswith(f"\n\nAttributes: score:{written}\n")


@pytest.mark.parametrize("need", NEEDS)
def test_every_job_takes_attributes(write, need):
    (record,) = read_records(write(NEEDS[need] | {"score": 3}), need=need, attributes=("score", "tone:calm"))
    assert record.prompt.endswith("\n\nAttributes: score:3,tone:calm\n")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "field 'score' is null, expected a number, true, false or a few words"),
        ([4], "field 'score': found a list, expected a number, true, false or a few words"),
        ("a,b", "field 'score': found a string, expected a number, true, false or a few words without commas"),
        ("a:b", "field 'score': found a string, expected"),
        ("a\nb", "field 'score': found a string, expected"),
        ("", "field 'score': found a string, expected"),
        (float("nan"), "field 'score': found a number that is not finite, expected"),
        (float("inf"), "field 'score': found a number that is not finite, expected"),
    ],
)
def test_attributes_that_cannot_be_written(write, value, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: {reason}"):
        read_records(write({"prompt": "a", "score": value}), need="prompts", attributes=("score",))


def test_a_row_without_the_attribute_and_text_without_a_prompt(write):
    with pytest.raises(DataError, match="rows.jsonl:1: field 'score' is missing, expected .*; did you mean 'scored'?"):
        read_records(write({"prompt": "a", "scored": 3}), need="prompts", attributes=("score",))
    with pytest.raises(
        DataError, match="rows.jsonl:1: the row is plain text, expected a prompt to write the attributes"
    ):
        read_records(write({"text": "a", "score": 3}), need="supervised", attributes=("score",))


def test_attributes_are_of_one_answer(write):
    with pytest.raises(DataError, match="data.attributes with data.turns='all': expected one of the two"):
        read_records(write(NEEDS["supervised"]), need="supervised", attributes=("a:1",), turns="all")


@pytest.mark.parametrize("attributes", ["a,a", "a:1,a:2", "a:", ":1", "a:b:c", "a: "])
def test_settings_of_attributes_that_cannot_be(attributes):
    with pytest.raises(ConfigError, match="attributes=.*: expected names of columns, or NAME:VALUE, each name once"):
        DataConfig(path="rows.jsonl", attributes=attributes)
    with pytest.raises(ConfigError, match="attributes=.*: expected NAME:VALUE, each name once"):
        GenerateConfig(model=ModelConfig(path="m"), prompt="a", attributes=attributes)


def test_generation_asks_in_the_words_of_training(write, stories, tmp_path):
    """The prompt of `rlhf generate --attributes` has the same tokens as the rows of training."""
    settings = dict(model={"path": str(stories)}, sampling={"max_new_tokens": 1, "temperature": 0}, device="cpu")
    path = write({"prompt": "Once upon a time", "response": "x", "good": 4, "long": 2})
    (trained,) = read_records(path, need="supervised", attributes=("good", "long"))
    from_file = dict(data={"path": str(path)}, output=str(tmp_path / "out.jsonl"))
    for source in (dict(prompt="Once upon a time"), from_file):
        (asked,) = generate(GenerateConfig(**settings, **source, attributes="good:4.0,long:2"))
        assert asked["prompt"] == trained.prompt == "Once upon a time\n\nAttributes: good:4,long:2\n"
    (asked,) = generate(GenerateConfig(**settings, data={"path": str(path), "attributes": "good,long"}))
    assert asked["prompt"] == trained.prompt


def test_generation_is_told_of_attributes_once(tmp_path):
    with pytest.raises(ConfigError, match="attributes=.*: expected none beside data.attributes"):
        GenerateConfig(model={"path": "m"}, data={"path": "d", "attributes": "good"}, attributes="good:4")
    with pytest.raises(ConfigError, match="attributes=.'good',.: expected NAME:VALUE, each name once"):
        GenerateConfig(model={"path": "m"}, prompt="a", attributes="good")


# ---------------------------------------------------------------------------------------------------------- by settings


def test_the_settings_reach_the_rows(write, make_tokenizer):
    """Turns, system prompt, attributes and separator of a DataConfig affect the tokens."""
    tokenizer = make_tokenizer()
    path = str(write({"messages": [USER, *said("x"), USER, *said("y")], "score": 3}))
    plain = dict(path=path, chat_template="plain", system="S")
    (example,) = load_examples(DataConfig(**plain, turns="all"), tokenizer, need="supervised")
    assert tokenizer.decode(example.prompt) == "<s>System: S\n\nUser: Name a colour.\n\nAssistant:"
    supervised = [token for token, flag in zip(example.completions[0], example.supervised[0], strict=True) if flag]
    assert tokenizer.decode(supervised) == " x y</s>"
    (example,) = load_examples(DataConfig(**plain, attributes="score"), tokenizer, need="supervised")
    assert tokenizer.decode(example.prompt).endswith(
        "Assistant: x\n\nUser: Name a colour.\n\nAttributes: score:3\n\nAssistant:"
    )
    assert (tokenizer.decode(example.completions[0]), example.supervised) == (" y</s>", None)
    path = write(STEPS)
    (example,) = load_examples(DataConfig(path=str(path), step_separator=";"), tokenizer, need="process")
    assert tokenizer.decode(example.completions[0]) == "3 + 4 = 7.;7 + 5 = 13.</s>"
