"""Several sources of reward: their weighted sum, what each said, and what happens where one says nothing."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_core.cli import parse
from rlhf_core.config import ConfigError, DataConfig, ScoringConfig, from_dict
from rlhf_core.data.loader import load_examples
from rlhf_core.data.records import Example, Record
from rlhf_core.models.load import save_model
from rlhf_core.rollout.checkers import CHECKERS, read_number
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.rewards import (
    Reward,
    Scores,
    configured_reward,
    function_reward,
    load_model_reward,
    model_reward,
    rollout_metrics,
    score_completions,
    score_metrics,
    weighted_sum,
)
from rlhf_core.trainers.ppo import PPOConfig

PROMPTS = [[1, 5, 6], [1, 7], [1, 8]]
COMPLETIONS = [[8, 9, 2], [10], [11, 12]]
ROWS = [{"answer": "w8 w9"}, {"answer": "w9"}, {"answer": None}]


@pytest.fixture
def tokenizer(make_tokenizer):
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 40))]
    return make_tokenizer(words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def says(tokenizer, name, *answers):
    return function_reward(lambda prompts, completions, records: list(answers), tokenizer, name=name)


def rounded(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 5) for value in values.tolist()]


# ----------------------------------------------------------------------------------------------------------------- None


def test_a_sample_without_a_score_is_left_out(tokenizer):
    scores = says(tokenizer, "judge", 2, None, -1)(PROMPTS, COMPLETIONS, ROWS)
    assert scores.total.tolist() == [2, 0, -1]
    assert scores.valid.tolist() == [True, False, True]
    assert rounded(scores.components["judge"]) == [2, None, -1]
    metrics = score_metrics(scores)
    assert metrics.pop("reward_seconds") >= 0
    assert metrics == {"score": 0.5, "score_std": 1.5, "excluded": 1}


def test_no_score_at_all_is_no_zero(tokenizer):
    metrics = score_metrics(says(tokenizer, "judge", None, None, None)(PROMPTS, COMPLETIONS, ROWS))
    assert math.isnan(metrics["score"])
    assert math.isnan(metrics["score_std"])
    assert metrics["excluded"] == 3


# ----------------------------------------------------------------------------------------------------------------- sums


def test_a_weighted_sum_by_hand(tokenizer):
    reward = weighted_sum([says(tokenizer, "a", 1, 2, 3), says(tokenizer, "b", 10, 0, -10)], [0.5, 0.1])
    scores = reward(PROMPTS, COMPLETIONS, ROWS)
    assert scores.total.dtype == torch.float32
    assert rounded(scores.total) == [1.5, 1.0, 0.5]
    assert scores.valid.all()
    assert {name: values.tolist() for name, values in scores.components.items()} == {"a": [1, 2, 3], "b": [10, 0, -10]}
    metrics = score_metrics(scores)
    assert metrics["reward/a"] == 2  # before its weight
    assert metrics["reward/b"] == 0
    assert metrics["score"] == 1


def test_a_sum_lacks_what_one_of_its_parts_lacks(tokenizer):
    reward = weighted_sum([says(tokenizer, "a", 1, None, 3), says(tokenizer, "b", 10, 20, None)], [1, 1])
    scores = reward(PROMPTS, COMPLETIONS, ROWS)
    assert scores.total.tolist() == [11, 0, 0]
    assert scores.valid.tolist() == [True, False, False]
    assert score_metrics(scores)["reward/a"] == 2  # of the two that it scored
    assert score_metrics(scores)["reward/b"] == 15


def test_a_weight_of_0_only_measures(tokenizer):
    reward = weighted_sum([says(tokenizer, "a", 1, 2, 3), says(tokenizer, "b", 10, None, 30)], [-2, 0])
    scores = reward(PROMPTS, COMPLETIONS, ROWS)
    assert scores.total.tolist() == [-2, -4, -6]
    assert scores.valid.all()
    assert rounded(scores.components["b"]) == [10, None, 30]


def test_a_sum_beyond_float32_is_an_error(tokenizer):
    reward = weighted_sum([says(tokenizer, "a", 1, 1e30, 3)], [-1e10])
    with pytest.raises(ValueError, match=r"reward_weights=\(-10000000000.0,\): the sum of sample 1 is -inf"):
        reward(PROMPTS, COMPLETIONS, ROWS)


def test_the_time_of_each_is_taken(tokenizer):
    def slow(prompts, completions, records):
        time.sleep(0.05)
        return [0, 0, 0]

    reward = weighted_sum([function_reward(slow, tokenizer), says(tokenizer, "quick", 1, 1, 1)], [1, 1])
    scores = reward(PROMPTS, COMPLETIONS, ROWS)
    assert [*scores.seconds] == ["slow", "quick"]
    assert 0 < scores.seconds["quick"] < scores.seconds["slow"]
    assert scores.seconds["slow"] >= 0.05
    assert score_metrics(scores)["reward_seconds"] == round(sum(scores.seconds.values()), 3)


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class Run(ScoringConfig):
    """The settings of a job that scores."""


def load_reward(config: ScoringConfig, tokenizer) -> Reward:
    return configured_reward(config, tokenizer, device="cpu")


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Modules of reward functions in the folder that the command is typed in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sum_rewards.py").write_text(
        "def length(prompts, completions, records):\n    return [len(one.split()) for one in completions]\n\n\n"
        "def numeric(prompts, completions, records):\n    return [0.25 for _ in completions]\n\n\n"
        "def model(prompts, completions, records):\n    return [0.125 for _ in completions]\n\n\n"
        "def hangs(prompts, completions, records):\n    import time\n\n    time.sleep(60)\n"
    )
    (tmp_path / "more_sum_rewards.py").write_text("from sum_rewards import length\n")


def test_one_function_is_its_own_score(functions, tokenizer):
    scores = load_reward(Run(reward_function="sum_rewards:length"), tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    assert scores.total.tolist() == [2, 1, 2]
    assert [*scores.components] == ["length"]
    assert [name for name in score_metrics(scores) if name.startswith("reward/")] == []  # it would be the score again


def test_model_functions_and_checkers_in_the_order_of_the_weights(functions, make_scorer, tokenizer, tmp_path):
    save_model(tmp_path / "scorer", make_scorer(), tokenizer)
    config = from_dict(
        Run,
        dict(
            reward_model=str(tmp_path / "scorer"),
            reward_function="sum_rewards:length,sum_rewards:numeric",
            checker=r"exact,regex:w(8\,x|10|12)$",
            reward_weights="1,10,100,1000,-1e4",
        ),
    )
    scores = load_reward(config, tokenizer)(PROMPTS, COMPLETIONS, ROWS[:2] + [{"answer": "w11"}])
    assert [*scores.components] == [*scores.seconds] == ["model", "length", "numeric", "exact", "regex"]
    alone = load_model_reward(config.reward_model, tokenizer, device="cpu")(PROMPTS, COMPLETIONS, ROWS).total
    assert alone.std() > 0.01
    by_hand = [20 + 25 + 1000 - 0, 10 + 25 + 0 - 1e4, 20 + 25 + 0 - 1e4]
    torch.testing.assert_close(scores.total, alone + torch.tensor(by_hand))


def test_names_in_full_where_two_are_alike(functions, make_scorer, tokenizer, tmp_path):
    config = Run(
        reward_function="sum_rewards:length,more_sum_rewards:length,sum_rewards:numeric,sum_rewards:model",
        checker="numeric:answer,exact,regex:a,regex:b",
    )
    rows = [{"answer": "3"}] * 3
    assert [*load_reward(config, tokenizer)(PROMPTS, COMPLETIONS, rows).components] == [
        "sum_rewards:length", "more_sum_rewards:length", "sum_rewards:numeric", "sum_rewards:model",
        "numeric:answer", "exact", "regex:a", "regex:b",
    ]  # fmt: skip


def test_the_timeout_and_the_end_of_the_settings_are_used(functions, make_scorer, tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"reward function hangs: sample 0: no answer within reward_timeout=0.2 seconds"
    ):
        load_reward(Run(reward_function="sum_rewards:hangs", reward_timeout=0.2), tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    save_model(tmp_path / "scorer", make_scorer(), tokenizer)
    config = Run(reward_model=str(tmp_path / "scorer"), end_unfinished=True)
    scores = load_reward(config, tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    ended = model_reward(make_scorer(), tokenizer, tokenizer)(PROMPTS, [[8, 9, 2], [10, 2], [11, 12, 2]], ROWS)
    torch.testing.assert_close(scores.total, ended.total)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(checker="numerc:answer"), "checker='numerc:answer': expected one of .*; did you mean numeric?"),
        (dict(checker="regex:("), r"checker='regex:\(': expected a regular expression: missing \)"),
        (dict(checker="regex"), "checker='regex': expected a pattern after the colon"),
        (dict(checker="format:a+a"), "checker='format:a.a': expected names of tags"),
        (dict(checker="format:a b"), "checker='format:a b': expected names of tags"),
        (dict(reward_function="sum_rewards:lenght"), "sum_rewards has no function lenght"),
    ],
)
def test_what_no_reward_is_made_of_is_refused_before_a_model_is_loaded(functions, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        load_reward(Run(**settings, reward_model="a/folder/that/is/not/there"), tokenizer)


def test_settings_that_are_no_reward():
    with pytest.raises(ConfigError, match="reward_model, reward_function, checker: expected at least one of them"):
        Run()
    with pytest.raises(ConfigError, match=r"reward_weights=\(1.0, 2.0\): expected a number for each of a:f, exact, b"):
        Run(reward_function="a:f", checker="exact,b", reward_weights=[1, 2])
    with pytest.raises(ConfigError, match=r"reward_weights=\(0.0, 0.0\): expected at least one that is not 0"):
        Run(reward_function="a:f,b:f", reward_weights="0,0")
    with pytest.raises(ConfigError, match="reward_weights='x': expected a finite number"):
        Run(reward_function="a:f", reward_weights="x")


# ---------------------------------------------------------------------------------------------------------- of rollouts


def test_every_completion_is_scored_with_the_row_of_its_prompt():
    seen = []

    def reward(prompts, completions, rows):
        seen.append((prompts, completions, rows))
        total = torch.tensor([1.0, 2.0, 3.0, 6.0])
        return Scores(total, torch.tensor([True, True, True, False]), {"one": total}, {"one": 0.5})

    records = [Record(prompt="p", completions=(), row={"number": number}, source="here") for number in (1, 2)]
    rollout = Experience.sampled(
        prompts=[[5], [5], [6], [6]],
        completions=[[7, 2], [8], [9], [9, 9]],
        logprobs=torch.zeros(4, 2),
        finished=torch.tensor([True, False, False, False]),
        group_size=2,
    )
    examples = [Example(prompt=[5 + i], completions=(), record=record) for i, record in enumerate(records)]
    scores = score_completions(reward, rollout, examples)
    assert seen == [(rollout.prompts, rollout.completions, [{"number": 1}] * 2 + [{"number": 2}] * 2)]
    assert rollout_metrics(rollout, scores) == {
        "score": 2.0, "score_std": pytest.approx((2 / 3) ** 0.5), "excluded": 1, "reward_seconds": 0.5,
        "length": 1.5, "eos_rate": 0.25,
    }  # fmt: skip


@pytest.mark.real
def test_gsm8k_from_file_to_score(shared):
    """Rows through the loader, solutions as tokens: of two completions each, its own solution and its neighbour's."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gpt2_tokenizer")
    data = DataConfig(path=shared / "data" / "gsm8k_test.jsonl.gz", limit=40)
    examples = load_examples(data, tokenizer, need="prompts")
    solutions = [tokenizer(example.record.row["response"])["input_ids"] for example in examples]
    pairs = list(zip(solutions, solutions[1:] + solutions[:1], strict=True))
    rollout = Experience.sampled(
        prompts=[example.prompt for example in examples for _ in range(2)],
        completions=[ids for pair in pairs for ids in pair],
        logprobs=torch.zeros(80, max(map(len, solutions))),
        finished=torch.zeros(80, dtype=torch.bool),
        group_size=2,
    )
    reward = load_reward(Run(checker=r"numeric,regex:####,format", reward_weights="1,0.5,1"), tokenizer)
    scores = score_completions(reward, rollout, examples)
    answers = [int(example.record.row["answer"].replace(",", "")) for example in examples]
    same = [float(a == b) for a, b in zip(answers, answers[1:] + answers[:1], strict=True)]
    assert scores.valid.all()
    assert scores.total.view(40, 2)[:, 0].tolist() == [1.5] * 40
    assert scores.total.view(40, 2)[:, 1].tolist() == [0.5 + one for one in same]
    assert sum(same) < 4


# ------------------------------------------------------------------------------------------------------------- the page

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()


def test_the_command_of_the_page_is_read_as_the_page_says():
    (command,) = re.findall(r"```\nrlhf ppo (.*?)```", PAGE, flags=re.DOTALL)
    config = parse("ppo", PPOConfig, command.replace("\\\n", "").split(), "")
    weights = dict(zip(config.reward_sources(), config.reward_weights, strict=True))
    assert weights == {"my_rewards:brevity": 0.1, "numeric:answer": 1.0, "format:think+answer": 0.2}


def test_the_functions_of_the_page_are_rewards(tokenizer):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    scores = function_reward(names["brevity"], tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    assert rounded(scores.total) == [-0.05, -0.03, -0.07]
    terse = function_reward(names["terse"], tokenizer)(PROMPTS, COMPLETIONS, ROWS)
    assert rounded(terse.total) == [round(-0.01 * len(ids), 6) for ids in COMPLETIONS]
    assert names["steps"]([], ["a\nbc\n", "d"], []) == [{1: 0.1, 4: 0.1}, {}]


def test_the_page_names_every_checker_and_equal_numbers_are_equal():
    assert re.findall(r"^\| `(\w+):\w", PAGE, flags=re.MULTILINE) == [*CHECKERS]
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `numeric:COLUMN`")]
    equal = re.findall(r"`([^`]+)`", row)[1:]
    assert len(equal) == 4
    assert {read_number(one) for one in equal} == {1200}
