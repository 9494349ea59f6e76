"""Scores: what a function returns is checked, and a reward model's scores depend on neither tokenizer nor batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ModelConfig
from rlhf_core.models.forward import sequence_scores
from rlhf_core.models.load import load_reward_model, same_vocabulary, save_model
from rlhf_core.rollout.rewards import function_reward, load_model_reward, model_reward

# ------------------------------------------------------------------------------------------------------------ functions

PROMPTS = [[1, 5, 6], [1, 7]]
COMPLETIONS = [[8, 9, 2], [10]]
ROWS = [{"answer": 4}, {"answer": 5}]


@pytest.fixture
def tokenizer(make_tokenizer):
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 40))]
    return make_tokenizer(words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_function_sees_texts_without_special_tokens_and_the_rows(tokenizer):
    seen = []

    def remember(prompts, completions, records):
        seen.append((prompts, completions, records))
        return [1, 2.5]

    scores = function_reward(remember, tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    assert seen == [(["w5 w6", "w7"], ["w8 w9", "w10"], ROWS)]
    assert (scores.total.dtype, scores.valid.dtype) == (torch.float32, torch.bool)
    assert scores.total.tolist() == [1.0, 2.5]
    assert scores.valid.tolist() == [True, True]
    assert scores.components["remember"].tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "answer",
    [
        [0.5, -2],
        (0.5, -2.0),
        torch.tensor([0.5, -2.0]),
        torch.tensor([[0.5], [-2.0]], dtype=torch.float64),
        np.array([0.5, -2.0]),
        np.array([0.5, -2.0], dtype=np.float32),
        [np.float32(0.5), np.int64(-2)],
        [torch.tensor(0.5), -2],
        (score for score in [0.5, -2.0]),
        {"a": 0.5, "b": -2.0}.values(),
    ],
)
def test_every_usual_kind_of_number(tokenizer, answer):
    scores = function_reward(lambda prompts, completions, records: answer, tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    assert scores.total.dtype == torch.float32
    assert scores.total.tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "reward function judge: 1 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "reward function judge: 3 scores for 2 completions"),
        (torch.ones(3), "reward function judge: 3 scores for 2 completions"),
        (None, "reward function judge: None for 2 completions"),
        (0.5, "reward function judge: 0.5 for 2 completions"),
        ([1.0, math.nan], "reward function judge: sample 1 got nan, .* completion begins 'w10'"),
        ([math.inf, 1.0], "reward function judge: sample 0 got inf, .* completion begins 'w8 w9'"),
        ([1.0, [[0.5]]], r"reward function judge: sample 1 got \[0.5\] for token 0, expected a finite number"),
        ([1e39, 1.0], "reward function judge: sample 0 got 1e.39, expected a finite number"),  # inf in float32
        ([10**400, 1.0], "reward function judge: sample 0 got 1000"),
        (torch.tensor([1j, 1.0]), r"reward function judge: sample 0 got tensor\(0.\+1.j\)"),
        ({0: 1.0, 1: 2.0}, "reward function judge: {0: 1.0, 1: 2.0} for 2 completions"),  # its keys are no scores
        ({1.0, 2.0}, "reward function judge: {1.0, 2.0} for 2 completions"),  # a set has no order
        ("12", "reward function judge: '12' for 2 completions"),
        (np.array(0.5), r"reward function judge: array\(0.5\) for 2 completions"),
        (torch.tensor(0.5), r"reward function judge: tensor\(0.5000\) for 2 completions"),
        (["0.5", 1.0], "reward function judge: sample 0 got '0.5'"),
        ([1.0, 1j], "reward function judge: sample 1 got 1j"),
        (torch.tensor([1.0, math.nan]), r"reward function judge: sample 1 got tensor\(nan\)"),
        (torch.ones(2, 3), "reward function judge: sample 1 got 3 numbers, expected one for each of its 1 tokens"),
        (torch.ones(2, 3, 1), r"reward function judge: sample 0 got tensor\(\[\[1.\],"),
        ([np.float32("nan"), 1.0], "reward function judge: sample 0 got .*nan"),
    ],
)
def test_what_is_no_score_is_an_error_that_names_function_and_sample(tokenizer, answer, message):
    def judge(prompts, completions, records):
        return answer

    with pytest.raises(ValueError, match=message):
        function_reward(judge, tokenizer)(PROMPTS, COMPLETIONS, ROWS)


def test_a_function_without_a_name(tokenizer):
    class Judge:
        def __call__(self, prompts, completions, records):
            return []

        def __repr__(self):
            return "the judge"

    with pytest.raises(ValueError, match="reward function the judge: 0 scores for 2 completions"):
        function_reward(Judge(), tokenizer)(PROMPTS, COMPLETIONS, ROWS)


# -------------------------------------------------------------------------------------------------------- reward models


def completions_for(prompts: list[list[int]]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, 40, (length,), generator=generator).tolist() for length in range(1, 1 + len(prompts))]


def pack(prompts: list[list[int]], completions: list[list[int]]) -> PackedBatch:
    return PackedBatch.pack([(prompt, [line]) for prompt, line in zip(prompts, completions, strict=True)])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_ids_go_as_they_are_where_the_vocabulary_is_the_same(
    make_scorer, tokenizer, prompts, batch_size, layout, monkeypatch
):
    model = make_scorer(layout=layout, attention_dropout=0.5)  # in training mode: scores are read in evaluation
    completions = completions_for(prompts)
    truth = sequence_scores(make_scorer().eval(), pack(prompts, completions))
    monkeypatch.setattr(type(tokenizer), "decode", None)  # no text is ever made
    monkeypatch.setattr(type(tokenizer), "batch_decode", None)
    reward = model_reward(model, tokenizer, tokenizer, batch_size=batch_size)
    scores = reward(prompts, completions, [{}] * len(prompts)).total
    torch.testing.assert_close(scores, truth.detach(), rtol=1e-5, atol=1e-5)
    assert (scores.dtype, scores.device.type, scores.requires_grad) == (torch.float32, "cpu", False)
    assert model.training


def test_another_tokenizer_is_given_the_text(make_scorer, make_tokenizer, tokenizer):
    """The same words under other numbers: the scores are those of the translated ids, its own BOS and EOS included."""
    words = ["<none>", "<end>", "<start>", *(f"w{number}" for number in range(39, 2, -1))]
    other = make_tokenizer(words, unk_token="<none>", bos_token="<start>", eos_token="<end>")
    model = make_scorer().eval()
    prompts = [[1, 5, 6], [7], [1]]
    completions = [[8, 9, 2], [10, 11], [2]]
    #      w5 w6 | w8 w9 end       w7 | w10 w11, not ended       start for an empty text | nothing but the end
    translated = [([37, 36], [[34, 33, 1]]), ([35], [[32, 31]]), ([2], [[1]])]
    scores = model_reward(model, other, tokenizer)(prompts, completions, [{}] * 3).total
    truth = sequence_scores(model, PackedBatch.pack(translated))
    torch.testing.assert_close(scores, truth.detach(), rtol=1e-5, atol=1e-5)


def test_an_empty_prompt_begins_with_the_bos_of_a_tokenizer_that_has_it_first(make_scorer, make_tokenizer, tokenizer):
    """Its id is 0, which is an id like any other."""
    words = ["<start>", "<end>", *(f"w{number}" for number in range(3, 41))]
    other = make_tokenizer(words, unk_token="w40", bos_token="<start>", eos_token="<end>")
    model = make_scorer().eval()
    scores = model_reward(model, other, tokenizer)([[1]], [[3, 2]], [{}]).total
    truth = sequence_scores(model, PackedBatch.pack([([0], [[2, 1]])]))
    torch.testing.assert_close(scores, truth.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.real
def test_real_tokenizers_from_one_to_the_other(make_scorer, shared, stories):
    """No space is lost between prompt and completion, and every stop token of the source is an end in the target."""
    source, target = (
        AutoTokenizer.from_pretrained(stories),
        AutoTokenizer.from_pretrained(shared / "models" / "gpt2_tokenizer"),
    )
    model = make_scorer("gpt2", vocab_size=50_257).eval()
    prompt, completion = source("Once upon a time")["input_ids"], source("there was a dog.")["input_ids"][1:]
    assert source.decode([*prompt, *completion]).endswith("time there was a dog.")
    completions = [completion, [*completion, 1], [*completion, 2]]
    scores = model_reward(model, target, source)([prompt] * 3, completions, [{}] * 3).total
    ids, end = target(" there was a dog.")["input_ids"], target.eos_token_id
    batch = PackedBatch.pack([(target("Once upon a time")["input_ids"], [ids, [*ids, end], [*ids, end]])])
    torch.testing.assert_close(scores, sequence_scores(model, batch).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        (dict(eos_token="w2"), dict(eos_token="w2"), True),
        (dict(eos_token="w2"), dict(eos_token="w2", pad_token="<pad>"), True),  # a new word, for padding only
        (dict(eos_token="w2", pad_token="<pad>"), dict(eos_token="w2"), True),
        (dict(eos_token="w2", pad_token="w2"), dict(eos_token="w2", pad_token="<pad>"), True),
        (dict(eos_token="w2", pad_token="w2"), dict(eos_token="w2", pad_token="w0"), True),
        (dict(eos_token="w2"), dict(eos_token="w2", bos_token="<start>"), False),  # a new word with a meaning
    ],
)
def test_a_pad_token_of_its_own_does_not_make_another_vocabulary(make_tokenizer, ours, theirs, same):
    assert same_vocabulary(make_tokenizer(**ours), make_tokenizer(**theirs)) is same
    assert same_vocabulary(make_tokenizer(**theirs), make_tokenizer(**ours)) is same


def test_the_same_words_under_other_numbers_are_another_vocabulary(make_tokenizer):
    words = [f"w{number}" for number in range(40)]
    swapped = [*words[:38], "w39", "w38"]
    assert not same_vocabulary(make_tokenizer(words), make_tokenizer(swapped))
    assert not same_vocabulary(make_tokenizer(words, pad_token="w39"), make_tokenizer(swapped, pad_token="w39"))


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_a_reward_model_made_from_a_policy_shares_its_vocabulary(make_policy, make_tokenizer, tmp_path, pad):
    """Loaded from its own folder by the config of a run, with another pad token than the policy's."""
    words = ["</s>", *(f"w{number}" for number in range(1, 40))]
    tokenizer = make_tokenizer(words, unk_token="</s>", eos_token="</s>", pad_token=pad)
    save_model(tmp_path / "policy", make_policy(), tokenizer)
    model, reward_tokenizer = load_reward_model(tmp_path / "policy", device="cpu")
    assert reward_tokenizer.pad_token_id == 40
    assert same_vocabulary(reward_tokenizer, tokenizer)
    save_model(tmp_path / "reward", model, reward_tokenizer)
    reward = load_model_reward(ModelConfig(path=str(tmp_path / "reward")), tokenizer, device="cpu")
    truth = sequence_scores(model.eval(), PackedBatch.pack([([5, 6], [[7, 0]])])).detach()
    torch.testing.assert_close(reward([[5, 6]], [[7, 0]], [{}]).total, truth, rtol=1e-5, atol=1e-5)
