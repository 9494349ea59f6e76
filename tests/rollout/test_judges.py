"""Judges: what they are shown, what their answers mean, and what is no answer."""

import time

import numpy as np
import pytest
import torch

from rlhf_core.rollout.judges import function_judge, in_random_order, load_judge

WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", *"abcdefghij"]
PROMPTS = [[2, 4, 5], [2, 6], [2, 7]]
FIRSTS, SECONDS = [[8, 3], [9], [10, 3]], [[11], [12, 3], [13]]
ROWS = [{"number": number} for number in range(3)]


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(WORDS, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_a_judge_sees_texts_without_special_tokens_and_rows(tokenizer):
    seen = []

    def judge(*columns):
        seen.append(columns)
        return [0, 1, None]

    verdicts = function_judge(judge, tokenizer)(PROMPTS, FIRSTS, SECONDS, ROWS)
    assert seen == [(["a b", "c", "d"], ["e", "f", "g"], ["h", "i", "j"], ROWS)]
    assert verdicts.second.tolist() == [False, True, False]
    assert verdicts.valid.tolist() == [True, True, False]
    assert verdicts.second.dtype == verdicts.valid.dtype == torch.bool


def test_what_a_judge_does_to_a_row_it_does_to_a_copy(tokenizer):
    def judge(prompts, firsts, seconds, rows):
        rows[0]["number"] = 7
        return [0] * 3

    function_judge(judge, tokenizer)(PROMPTS, FIRSTS, SECONDS, ROWS)
    assert ROWS[0] == {"number": 0}


@pytest.mark.parametrize("answers", [[0, 1, 1], (0, 1, 1), torch.tensor([0, 1, 1]), np.array([0, 1, 1])], ids=repr)
def test_answers_may_be_any_sequence_of_whole_numbers(tokenizer, answers):
    verdicts = function_judge(lambda *columns: answers, tokenizer)(PROMPTS, FIRSTS, SECONDS, ROWS)
    assert verdicts.second.tolist() == [False, True, True]
    assert verdicts.valid.all()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([0, 1], r"judge picky: 2 answers for 3 pairs"),
        ([], r"judge picky: 0 answers for 3 pairs"),
        (None, r"judge picky: None for 3 pairs"),
        ("011", r"judge picky: '011' for 3 pairs"),
        (1, r"judge picky: 1 for 3 pairs"),
        ({0: 0, 1: 1, 2: 1}, r"judge picky: \{0: 0, 1: 1, 2: 1\} for 3 pairs"),
        ([0, 2, 1], r"judge picky: pair 1 got 2, expected 0 .* 1 .* or None; the first completion begins 'f'"),
        ([0, 1, -1], r"judge picky: pair 2 got -1, expected 0"),
        ([True, 1, 0], r"judge picky: pair 0 got True, expected 0"),
        ([0, 1.0, 0], r"judge picky: pair 1 got 1.0, expected 0"),
        ([0, float("nan"), 0], r"judge picky: pair 1 got nan, expected 0"),
        ([0, "1", 0], r"judge picky: pair 1 got '1', expected 0"),
        (torch.tensor([[0], [1], [1]]), r"judge picky: pair 0 got \[0\], expected 0"),
        (torch.tensor(1), r"judge picky: 1 for 3 pairs"),
    ],
    ids=repr,
)
def test_what_is_no_answer(tokenizer, answers, message):
    def picky(*columns):
        return answers

    with pytest.raises(ValueError, match=message):
        function_judge(picky, tokenizer)(PROMPTS, FIRSTS, SECONDS, ROWS)


def test_a_judge_that_raises_is_named_with_the_pair(tokenizer):
    def shy(prompts, firsts, seconds, rows):
        return [0 if row["number"] < 2 else row["answer"] for row in rows]

    place = shy.__code__.co_firstlineno + 1
    with pytest.raises(ValueError) as caught:
        function_judge(shy, tokenizer)(PROMPTS, FIRSTS, SECONDS, ROWS)
    said = f"judge shy: pair 2: KeyError: 'answer' ({__file__}:{place}); the first completion begins 'g'"
    assert str(caught.value) == said
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_judge_that_hangs_is_named_with_the_pair(tokenizer):
    def slow(prompts, firsts, seconds, rows):
        time.sleep(60 if "f" in firsts else 0)
        return [0] * len(prompts)

    began = time.monotonic()
    message = "judge slow: pair 1: no answer within reward_timeout=0.1 seconds; the first completion begins 'f'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        function_judge(slow, tokenizer, timeout=0.1)(PROMPTS, FIRSTS, SECONDS, ROWS)
    assert time.monotonic() - began < 30


def test_a_judge_that_fails_on_all_pairs_together(tokenizer):
    def small(prompts, *columns):
        if len(prompts) > 1:
            raise MemoryError("too many")
        return [0]

    with pytest.raises(ValueError, match=r"judge small: MemoryError: too many \(.*\) for 3 pairs together, though"):
        function_judge(small, tokenizer)(PROMPTS, FIRSTS, SECONDS, ROWS)


def test_a_judge_is_loaded_by_its_name(tokenizer):
    verdicts = load_judge("tests.trainers.judges:undecided", tokenizer)(PROMPTS, FIRSTS, SECONDS, ROWS)
    assert not verdicts.valid.any()
    with pytest.raises(ValueError, match="tests.trainers.judges has no function fair"):
        load_judge("tests.trainers.judges:fair", tokenizer)


# ------------------------------------------------------------------------------------------------------------ the order

MANY = 2000
ODD = [[3 + pair % 2] for pair in range(MANY)]  # 3, 4, 3, 4, ...
EVEN = [[4 - pair % 2] for pair in range(MANY)]  # 4, 3, 4, 3, ...


def test_a_judge_who_looks_gives_the_same_verdicts_in_any_order(tokenizer):
    """Of every third pair it does not decide."""

    def looks(prompts, firsts, seconds, rows):
        assert {*zip(firsts, seconds, strict=True)} == {("", "a"), ("a", "")}
        return [None if row["pair"] % 3 == 0 else int(second == "a") for second, row in zip(seconds, rows, strict=True)]

    judge = function_judge(looks, tokenizer)
    columns = [[2]] * MANY, ODD, EVEN, [{"pair": pair} for pair in range(MANY)]
    plain, shuffled = judge(*columns), in_random_order(judge, 0, "x")(*columns)
    expected = [pair % 3 != 0 and EVEN[pair] == [4] for pair in range(MANY)]
    assert plain.second.tolist() == shuffled.second.tolist() == expected
    assert shuffled.valid.tolist() == [pair % 3 != 0 for pair in range(MANY)]


def test_a_judge_who_always_takes_the_first_takes_either_half_of_the_time(tokenizer):
    judge = function_judge(lambda *columns: [0] * MANY, tokenizer)
    columns = [[2]] * MANY, ODD, EVEN, [{}] * MANY
    seconds = [in_random_order(judge, *seed)(*columns).second for seed in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))]
    for second in seconds:
        assert abs(second.float().mean().item() - 0.5) < 0.05  # more than four standard deviations
    assert torch.equal(seconds[0], seconds[1])
    for other in seconds[2:]:
        assert abs((seconds[0] == other).float().mean().item() - 0.5) < 0.05
