"""Rewards for single tokens: where they belong, that they add up, and what is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from rlhf_core.rollout.rewards import Scores, function_reward, weighted_sum

PROMPTS = [[1, 5, 6], [1, 7], [1, 8]]
COMPLETIONS = [[8, 9, 2], [10], [11, 12]]  # "w8 w9", "w10", "w11 w12"; 2 is the end
ROWS = [{}, {}, {}]


@pytest.fixture
def tokenizer(make_tokenizer):
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 40))]
    return make_tokenizer(words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def scores_of(answer, tokenizer, name: str = "judge") -> Scores:
    return function_reward(lambda *columns: answer, tokenizer, name=name)(PROMPTS, COMPLETIONS, ROWS)


@pytest.mark.parametrize(
    "first", [[0.5, -1, 2.0], (0.5, -1, 2.0), torch.tensor([0.5, -1, 2]), np.array([0.5, -1, 2])], ids=repr
)
def test_a_number_for_each_token(tokenizer, first):
    scores = scores_of([first, None, [1, 0.25]], tokenizer)
    assert scores.total.tolist() == [1.5, 0.0, 1.25]
    assert scores.valid.tolist() == [True, False, True]
    assert scores.tokens.tolist() == [[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.25, 0.0]]
    assert scores.tokens.dtype == torch.float32
    assert scores.components["judge"].tolist() == [1.5, pytest.approx(math.nan, nan_ok=True), 1.25]


def test_one_number_belongs_to_no_token(tokenizer):
    """Some completions may have one and others several; all that is not in `tokens` is paid at the end."""
    assert scores_of([1.0, None, 2.0], tokenizer).tokens is None
    scores = scores_of([[0.5, 0.0, 0.0], 7.0, 3], tokenizer)
    assert scores.total.tolist() == [0.5, 7.0, 3.0]
    assert scores.tokens.tolist() == [[0.5, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    assert scores_of([1.0, [4.0], 2.0], tokenizer).tokens.tolist() == [[0.0] * 3, [4.0, 0.0, 0.0], [0.0] * 3]


def test_numbers_by_their_places_in_the_text(tokenizer):
    """ "w8 w9": characters 0 and 1 are the first token's, 2 to 4 the second's, and 5 is the end."""
    scores = scores_of([{0: 1.0, 1: 0.5, 2: 4, 4: 8.0, 5: -2.0}, {2: 1.0}, {}], tokenizer)
    assert scores.tokens.tolist() == [[1.5, 12.0, -2.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert scores.total.tolist() == [11.5, 1.0, 0.0]
    at_the_end = scores_of([0.0, {3: 1.0}, {7: 2.0, np.int64(0): 3.0}], tokenizer)  # no end token: the last one's
    assert at_the_end.tokens.tolist() == [[0.0] * 3, [1.0, 0.0, 0.0], [3.0, 2.0, 0.0]]


def test_a_character_of_several_tokens_is_there_with_its_last():
    """Three bytes are one dash. Half of it is decoded too, as another character, and is not yet what was meant."""
    alphabet = ByteLevel.alphabet()
    backend = Tokenizer(BPE({"<s>": 0} | {byte: number for number, byte in enumerate(sorted(alphabet), 1)}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    ids = tokenizer("a\u2014b")["input_ids"]
    assert len(ids) == 5
    paid = [
        function_reward(lambda *columns, k=k: [{k: 1.0}], tokenizer)([[0]], [ids], [{}]).tokens[0].nonzero().item()
        for k in range(3)
    ]
    assert paid == [0, 3, 4]


def test_a_function_that_wants_the_ids_gets_copies_of_them(tokenizer):
    seen = []

    def shorter(prompts, completions, records, completion_ids):
        seen.append([list(ids) for ids in completion_ids])
        answer = [[-1.0] * len(ids) for ids in completion_ids]
        completion_ids[0].clear()
        return answer

    scores = function_reward(shorter, tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    assert seen == [COMPLETIONS] == [[[8, 9, 2], [10], [11, 12]]]
    assert scores.total.tolist() == [-3.0, -1.0, -2.0]


def test_one_that_wants_the_ids_and_fails_is_asked_one_by_one(tokenizer):
    def picky(prompts, completions, records, *, completion_ids):
        return [1 / (ids[0] - 11) for ids in completion_ids]

    with pytest.raises(ValueError, match=r"^reward function picky: sample 2: ZeroDivisionError: .* begins 'w11 w12'$"):
        function_reward(picky, tokenizer)(PROMPTS, COMPLETIONS, ROWS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[1.0, 2.0], 0, 0], "sample 0 got 2 numbers, expected one for each of its 3 tokens; .* begins 'w8 w9'"),
        ([0, [], 0], "sample 1 got 0 numbers, expected one for each of its 1 tokens; .* begins 'w10'"),
        ([0, 0, [1.0, math.nan]], "sample 2 got nan for token 1, expected a finite number; .* begins 'w11 w12'"),
        ([0, 0, [None, 1.0]], "sample 2 got None for token 0, expected a finite number"),
        ([0, 0, [3e38, 3e38]], "sample 2 got numbers whose sum is 6e.38, expected a finite one"),
        ([0, 0, [[1.0], 1.0]], r"sample 2 got \[1.0\] for token 0, expected a finite number"),
        ([0, {4: 1.0}, 0], "sample 1 got a number for character 4, expected one from 0 to 3; .* begins 'w10'"),
        ([0, {-1: 1.0}, 0], "sample 1 got a number for character -1, expected one from 0 to 3"),
        ([0, {True: 1.0}, 0], "sample 1 got a number for character True, expected one from 0 to 3"),
        ([0, {0.0: 1.0}, 0], "sample 1 got a number for character 0.0, expected one from 0 to 3"),
        ([0, {"w": 1.0}, 0], "sample 1 got a number for character 'w', expected one from 0 to 3"),
        ([0, {0: math.inf}, 0], "sample 1 got inf for character 0, expected a finite number"),
        ([0, {0: [1.0]}, 0], r"sample 1 got \[1.0\] for character 0, expected a finite number"),
    ],
    ids=str,
)
def test_what_is_no_reward_of_tokens(tokenizer, answer, message):
    with pytest.raises(ValueError, match=f"^reward function judge: {message}"):
        scores_of(answer, tokenizer)


# ----------------------------------------------------------------------------------------------------------------- sums


def test_sums_of_sources_add_up_token_by_token(tokenizer):
    sources = [
        function_reward(lambda *columns, answer=answer: answer, tokenizer, name=name)
        for name, answer in {
            "steps": [[1.0, 2.0, 0.0], {0: 1.0}, None],
            "whole": [5.0, 7.0, 9.0],
            "length": [[-1.0] * 3, [-1.0], [-1.0] * 2],
        }.items()
    ]
    scores = weighted_sum(sources, [2.0, 1.0, 0.5])(PROMPTS, COMPLETIONS, ROWS)
    assert scores.total.tolist() == [6.0 + 5.0 - 1.5, 2.0 + 7.0 - 0.5, 0.0]
    assert scores.tokens.tolist() == [[1.5, 3.5, -0.5], [1.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert scores.components["steps"].tolist()[:2] == [3.0, 1.0]
    assert weighted_sum(sources[1:2], [1.0])(PROMPTS, COMPLETIONS, ROWS).tokens is None
    measured = weighted_sum(sources, [0.0, 1.0, 0.0])(PROMPTS, COMPLETIONS, ROWS)
    assert measured.tokens is None and measured.total.tolist() == [5.0, 7.0, 9.0]


@pytest.mark.parametrize("rows", [slice(0, 3, 2), torch.tensor([True, False, True]), [0, 2]], ids=str)
def test_selecting_rows(tokenizer, rows):
    scores = scores_of([[1.0, 2.0, 3.0], None, 4.0], tokenizer)
    kept = scores.select(rows)
    assert kept.total.tolist() == [6.0, 4.0] == kept.components["judge"].tolist()
    assert kept.valid.tolist() == [True, True]
    assert kept.tokens.tolist() == [[1.0, 2.0, 3.0], [0.0] * 3]
    assert scores._replace(tokens=None).select(rows).tokens is None
