"""Answers that can be checked: each case by hand, and GSM8K's own rows."""

from __future__ import annotations

import gzip
import json
import time
from fractions import Fraction

import pytest

from rlhf_core.rollout.checkers import make_checker, marked_answer, read_number
from rlhf_core.rollout.rewards import function_reward


def check(spec: str, completion: str, answer: object = None, prompt: str = "") -> float | None:
    (score,) = make_checker(spec)([prompt], [completion], [{"answer": answer, "other": "x"}])
    return score


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("#### 18", 18),
        ("She makes 9 * 2 = 18 dollars.\n#### 18", 18),
        ("It is 7.\n#### 18\nNow 3 more apples", 18),  # what comes after its line is not the answer
        ("#### 1\nno:\n#### 2", 2),
        ("####18", 18),
        ("<answer>18</answer> as 9 * 2 = 19", 18),
        ("<answer>17</answer> no, <answer>\n18\n</answer>", 18),
        ("<answer>9 + 9 = 18</answer>", 18),
        ("<answer>17 <answer>18</answer>", 18),
        (r"so \boxed{18} of 20", 18),
        (r"\boxed{17} or rather \boxed{18}", 18),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{-\dfrac{3}{4}} ", Fraction(-3, 4)),
        (r"$1{,}234$", 1234),
        (r"1\,234", 1234),
        (r"\$18", 18),
        (r"18\%", 18),
        ("of 16 eggs she sells 9", 9),
        ("The answer is 18.", 18),
        ("**18**", 18),
        ("=18", 18),
        ("$18", 18),
        ("$ 18", 18),
        ("18 dollars", 18),
        ("US$18", 18),
        ("18€", 18),
        ("€18.50", Fraction(37, 2)),
        ("£1,234,567.89", Fraction(123456789, 100)),
        ("1,234", 1234),
        ("12,34", 34),  # two numbers
        ("1, 2, 3", 3),
        ("1,2345", 2345),
        ("-5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("- 5 of them", 5),  # an item of a list
        ("(-5)", -5),
        ("+5", 5),
        ("\u22125", -5),
        ("10-5", 5),
        ("10 - 5 = 5", 5),
        ("x=-5", -5),
        ("3.0", 3),
        ("3.14", Fraction(157, 50)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("0.1", Fraction(1, 10)),  # exactly, not the nearest float
        ("1e3", 1000),
        ("1.5E-3", Fraction(3, 2000)),
        ("1/2", Fraction(1, 2)),
        ("-1/2", Fraction(-1, 2)),
        ("5/2 = 2.5", Fraction(5, 2)),
        ("18 in CO2", 18),
        ("2nd", 2),
        ("007", 7),
        ("none", None),
        ("", None),
        ("#### none, though 5", 5),
        ("<answer>none</answer> 5", None),
        ("1/0", None),
        ("9" * 5000, None),
    ],
)
def test_the_number_of_a_text(text, number):
    assert read_number(text) == number


def test_an_endless_exponent_is_not_computed():
    began = time.monotonic()
    assert read_number("1e999999999") in (None, 1)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "text", ["<answer>" * 20_000, r"\boxed{" * 20_000, "1,111" * 20_000, "#" * 100_000, "-" * 100_000]
)
def test_long_nonsense_is_read_in_no_time(text):
    began = time.monotonic()
    read_number(text)
    check("format:think+answer", text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("18", "it is 18", 1),
        ("18", "it is 18.0", 1),
        (18, "it is $18.00", 1),
        (18.0, "18", 1),
        ("18", "it is 19", 0),
        ("18", "it is -18", 0),
        ("18", "nothing", 0),
        ("18", "", 0),
        ("1,200", "1200", 1),
        ("2,125", "2125 in all", 1),
        (0.5, "1/2", 1),
        (1e-05, "0.00001", 1),
        ("She has 9 * 2 = <<9*2=18>>18 left.\n#### 18", "So 18", 1),
        ("She has 9 * 2 = <<9*2=18>>18 left.\n#### 18", "So 9 * 2", 0),
        (["18", "19"], "19", 1),
        (["18", "19"], "20", 0),
        (None, "18", None),
        ([], "18", None),
    ],
)
def test_numeric_answers(answer, completion, score):
    assert check("numeric:answer", completion, answer) == score
    assert check("numeric", completion, answer) == score


# ---------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("yes", " yes\n", 1),
        ("yes", "Yes", 0),
        ("yes", "yes, it is", 0),
        ("a green bird", "a  green\nbird", 1),
        ("B", "first A, then <answer> B </answer>", 1),
        ("B", "<answer>A</answer> B", 0),
        ("B", r"thus \boxed{B}.", 1),
        ("B", "because\n#### B", 1),
        ("because\n#### B", "B", 1),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", 1),
        (["B", "C"], "C", 1),
        (["B", "C"], "D", 0),
        (4, "4", 1),
        ("", "", 1),
        ("B", "", 0),
        (None, "B", None),
    ],
)
def test_exact_answers(answer, completion, score):
    assert check("exact:answer", completion, answer) == score


def test_the_whole_text_where_nothing_is_marked():
    assert marked_answer(" <answer> never closed \n") == "<answer> never closed"
    assert marked_answer(r"\boxed{never closed ") == r"\boxed{never closed"


def test_another_column():
    rows = [{"answer": "1", "gold": "2"}, {"answer": "1", "gold": "3"}]
    assert make_checker("numeric:gold")(["", ""], ["1 2", "1 2"], rows) == [1, 0]
    assert make_checker("exact:gold")(["", ""], ["2", "2"], rows) == [1, 0]


# -------------------------------------------------------------------------------------------------- regular expressions


@pytest.mark.parametrize(
    ("pattern", "completion", "score"),
    [
        ("cat", "a cat", 1),
        ("cat", "a Cat", 0),
        ("(?i)cat", "a Cat", 1),
        ("^cat$", "a cat", 0),
        (r"\bcat\b", "concatenate", 0),
        ("a:b", "a:b", 1),  # colons belong to the pattern
        ("", "anything", None),
    ],
)
def test_regular_expressions(pattern, completion, score):
    if not pattern:
        with pytest.raises(ValueError, match="expected a pattern"):
            check("regex:", completion)
    else:
        assert check(f"regex:{pattern}", completion) == score


# --------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>9 * 2</think><answer>18</answer>", 1),
        ("\n<think>9\n* 2</think>\n\n<answer>18</answer> ", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>1 < 2 and <b>so</b></think><answer>18</answer>", 1),
        ("<think>9 * 2</think> so <answer>18</answer>", 0),
        ("Well: <think>9 * 2</think><answer>18</answer>", 0),
        ("<think>9 * 2</think><answer>18</answer> Done.", 0),
        ("<answer>18</answer><think>9 * 2</think>", 0),
        ("<think>9 * 2<answer>18</answer>", 0),
        ("<think>9 * 2<answer>18</answer></think>", 0),
        ("<think>a</think><think>b</think><answer>18</answer>", 0),
        ("<think>a</think><answer>17</answer><answer>18</answer>", 0),
        ("<think>a</think><answer>18", 0),
        ("<answer>18</answer>", 0),
        ("9 * 2</think><answer>18</answer>", 0),
        ("", 0),
    ],
)
def test_the_format_of_thoughts_and_answers(completion, score):
    assert check("format", completion) == score
    assert check("format:think+answer", completion) == score


def test_a_tag_that_the_prompt_has_opened():
    assert check("format", "9 * 2</think><answer>18</answer>", prompt="How many?\n<think>\n") == 1
    assert check("format", "<answer>18</answer>", prompt="How many?\n<think>\n") == 0


def test_other_tags():
    assert check("format:a", "<a>1</a>") == 1
    assert check("format:a+b+c", "<a>1</a> <b>2</b> <c>3</c>") == 1
    assert check("format:a+b+c", "<a>1</a> <c>3</c> <b>2</b>") == 0
    assert check("format:b", "<think></think><answer></answer>") == 0


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(["<unk>", *(f"w{number}" for number in range(1, 40))], unk_token="<unk>")


@pytest.mark.parametrize(
    ("spec", "row", "message"),
    [
        ("numeric:anwer", {"answer": 1}, "the row has no column 'anwer', only 'answer'; did you mean 'answer'\\?"),
        ("exact:gold", {"answer": 1}, "the row has no column 'gold', only 'answer'"),
        ("numeric", {"answer": "many"}, "the row's 'answer' holds no number"),
        ("numeric", {"answer": ["1", "many"]}, "the row's 'answer' holds no number"),
    ],
)
def test_a_row_that_cannot_be_checked_is_named(tokenizer, spec, row, message):
    reward = function_reward(make_checker(spec), tokenizer, name=spec, kind="checker")
    good = {"answer": 1, "anwer": 1, "gold": 1}
    with pytest.raises(ValueError, match=f"^checker {spec}: sample 1: {message}; its completion begins 'w4'"):
        reward([[1], [2]], [[3], [4]], [good, row])


# ------------------------------------------------------------------------------------------------------------ real rows


def rows_of(path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.real
@pytest.mark.parametrize("part", ["train", "test"])
def test_gsm8k_solutions_are_right_by_their_own_answers(shared, part):
    """Solution against answer and against itself; with another's answer, right only where the numbers agree."""
    rows = rows_of(shared / "data" / f"gsm8k_{part}.jsonl.gz")
    assert len(rows) == {"train": 7473, "test": 1319}[part]
    prompts, solutions = [row["prompt"] for row in rows], [row["response"] for row in rows]
    assert make_checker("numeric:answer")(prompts, solutions, rows) == [1.0] * len(rows)
    assert make_checker("numeric:response")(prompts, solutions, rows) == [1.0] * len(rows)
    assert make_checker("exact:answer")(prompts, [f"<answer>{row['answer']}</answer>" for row in rows], rows) == [
        1.0
    ] * len(rows)
    shifted = make_checker("numeric:answer")(prompts, solutions[1:] + solutions[:1], rows)
    answers = [float(row["answer"].replace(",", "")) for row in rows]
    assert shifted == [float(a == b) for a, b in zip(answers, answers[1:] + answers[:1], strict=True)]
    assert sum(shifted) < 0.1 * len(rows)


@pytest.mark.real
def test_gsm8k_in_other_words(shared):
    rows = rows_of(shared / "data" / "gsm8k_test.jsonl.gz")
    numbers = [int(row["answer"].replace(",", "")) for row in rows]
    for spell in ("So it is ${:,}.", "{:.2f}", "#### {:,}", r"\boxed{{{}}}", "<think>1 + 1</think><answer>{}</answer>"):
        completions = [spell.format(number) for number in numbers]
        assert make_checker("numeric:answer")([""] * len(rows), completions, rows) == [1.0] * len(rows)
        wrong = [spell.format(number + 1) for number in numbers]
        assert make_checker("numeric:answer")([""] * len(rows), wrong, rows) == [0.0] * len(rows)


@pytest.mark.real
def test_right_against_wrong_solutions(shared):
    """Of pairs of a right and a wrong solution, written by models, all are told apart, by the last number in each."""
    rows = rows_of(shared / "data" / "pref_gsm8k_solutions_test.jsonl.gz")
    answers = {
        row["prompt"]: row["answer"]
        for part in ("train", "test")
        for row in rows_of(shared / "data" / f"gsm8k_{part}.jsonl.gz")
    }
    for row in rows:
        row["answer"] = answers[row["prompt"]]
    check = make_checker("numeric:answer")
    assert check([""] * 300, [row["chosen"] for row in rows], rows) == [1.0] * 300
    assert check([""] * 300, [row["rejected"] for row in rows], rows) == [0.0] * 300
