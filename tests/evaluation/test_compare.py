"""`rlhf evaluate`: a model against itself is a draw, and the results equal their definitions."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_core.cli import main
from rlhf_core.config import DataConfig, SamplingConfig
from rlhf_core.data.loader import load_examples
from rlhf_core.demo.language import build_model
from rlhf_core.evaluation.compare import EvaluateConfig, compare, evaluate
from rlhf_core.evaluation.win_rate import win_rate
from rlhf_core.models.load import load_reference, load_tokenizer
from rlhf_core.rollout.rewards import function_reward

PROMPTS = ["solano peta", "tavelu lari kapi lumira", "galosh", "lakune musa sorune", "zarak goni", "borak tesu vesa"]
SAMPLING = SamplingConfig(max_new_tokens=6, batch_size=4)


def words(prompts, completions, rows):
    """Score the number of words, plus a column of the row."""
    return [len(completion.split()) + row["more"] for completion, row in zip(completions, rows, strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two models, prompts and a reward function."""
    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("one", "two")):
        build_model(folder / name, seed=seed)
    rows = [json.dumps({"prompt": prompt, "more": 0.25}) + "\n" for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "counted_words.py").write_text(
        "def words(prompts, completions, rows):\n    return [float(len(one.split())) for one in completions]\n"
    )
    return folder


def run(models, name: str, baseline: str, sampling=SAMPLING, seed: int = 0, function=words):
    tokenizer = load_tokenizer(models / name)
    examples = load_examples(DataConfig(path=models / "prompts.jsonl"), tokenizer, need="prompts")
    return compare(
        load_reference(models / name), load_reference(models / baseline), examples, tokenizer,
        function_reward(function, tokenizer), sampling, seed=seed,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- win rate


@pytest.mark.parametrize(
    ("scores", "baseline", "expected"),
    [([1, 2], [0, 0], 1.0), ([0, 0], [1, 2], 0.0), ([1, 1], [1, 1], 0.5), ([2, 1, 0, 5], [1, 1, 1, 1], 0.625)],
)
def test_win_rate(scores, baseline, expected):
    assert win_rate(torch.tensor(scores), torch.tensor(baseline)) == expected


def test_win_rate_needs_the_same_prompts():
    with pytest.raises(ValueError, match=r"\(2,\) scores against \(1,\): expected the same prompts"):
        win_rate(torch.ones(2), torch.ones(1))


# -------------------------------------------------------------------------------------------------------------- compare


def test_a_model_against_itself_is_a_draw(models):
    numbers, (mine, its) = run(models, "one", "one")
    assert mine.completions == its.completions
    assert numbers["win_rate"] == 0.5
    assert numbers["kl"] == 0
    assert numbers["kl_stderr"] == 0
    assert numbers["score"] == numbers["baseline_score"]
    assert numbers["prompts"] == 6


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_numbers_of_two_models_by_hand(models, temperature):
    sampling = SamplingConfig(max_new_tokens=6, batch_size=4, temperature=temperature)
    numbers, rollouts = run(models, "one", "two", sampling)
    tokenizer = load_tokenizer(models / "one")
    plain = [AutoModelForCausalLM.from_pretrained(models / name) for name in ("one", "two")]

    def logprob(model, prompt, completion) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        return logits.log_softmax(-1)[range(len(completion)), completion].sum().item()

    divergences = [
        logprob(plain[0], prompt, completion) - logprob(plain[1], prompt, completion)
        for prompt, completion in zip(rollouts[0].prompts, rollouts[0].completions, strict=True)
    ]
    mean = sum(divergences) / 6
    assert numbers["kl"] == pytest.approx(mean, rel=1e-4)
    assert mean > 0.5
    spread = (sum((value - mean) ** 2 for value in divergences) / 6) ** 0.5
    assert numbers["kl_stderr"] == pytest.approx(spread / 6**0.5, rel=1e-3)

    scores = [
        [0.25 + len(text.split()) for text in tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)]
        for rollout in rollouts
    ]
    assert scores[0] != scores[1]
    assert numbers["score"] == pytest.approx(sum(scores[0]) / 6)
    assert numbers["baseline_score"] == pytest.approx(sum(scores[1]) / 6)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(*scores, strict=True)]
    assert numbers["win_rate"] == pytest.approx(sum(wins) / 6)
    assert numbers["length"] == sum(map(len, rollouts[0].completions)) / 6


def test_greedy_samples_are_measured_at_temperature_1(models):
    numbers, rollouts = run(models, "one", "two", SamplingConfig(max_new_tokens=6, temperature=0))
    assert numbers["kl"] > 0
    _, again = run(models, "one", "two", SamplingConfig(max_new_tokens=6, temperature=0), seed=1)
    assert rollouts[0].completions == again[0].completions


def test_win_rates_of_both_orders_add_up_to_1(models):
    one, _ = run(models, "one", "two")
    two, _ = run(models, "two", "one")
    assert one["win_rate"] + two["win_rate"] == pytest.approx(1)
    assert one["score"] == two["baseline_score"]


def test_a_prompt_that_one_model_gets_no_score_for_is_left_out_for_both(models):
    _, rollouts = run(models, "one", "two")
    tokenizer = load_tokenizer(models / "one")
    texts = [tokenizer.batch_decode(rollout.completions, skip_special_tokens=True) for rollout in rollouts]
    dropped = {texts[0][0], texts[1][1]}
    kept = [i for i in range(6) if not {texts[0][i], texts[1][i]} & dropped]
    assert 0 < len(kept) < 6

    def some(prompts, completions, rows):
        scores = words(prompts, completions, rows)
        return [None if text in dropped else score for text, score in zip(completions, scores, strict=True)]

    numbers, _ = run(models, "one", "two", function=some)
    scores = [[0.25 + len(side[i].split()) for i in kept] for side in texts]
    assert numbers["excluded"] == 6 - len(kept)
    assert numbers["score"] == pytest.approx(sum(scores[0]) / len(kept))
    assert numbers["baseline_score"] == pytest.approx(sum(scores[1]) / len(kept))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(*scores, strict=True)]
    assert numbers["win_rate"] == pytest.approx(sum(wins) / len(kept))
    with pytest.raises(
        ValueError, match="no prompt of 6 has completions of both models that the reward gives a number"
    ):
        run(models, "one", "two", function=lambda prompts, completions, rows: [None] * len(prompts))


# ------------------------------------------------------------------------------------------------------- rlhf evaluate


def settings(models, tmp_path, **changes) -> EvaluateConfig:
    return EvaluateConfig(
        **dict(
            model=models / "one",
            baseline=models / "two",
            data=models / "prompts.jsonl",
            reward_function="counted_words:words",
            output=tmp_path / "deep" / "numbers.json",
            sampling=SAMPLING,
        )
        | changes
    )


def test_evaluate_prints_writes_and_returns_the_same_numbers(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)  # the folder of counted_words
    numbers = evaluate(settings(models, tmp_path))
    assert json.loads((tmp_path / "deep" / "numbers.json").read_text()) == numbers
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed == {name: f"{value:.4g}" for name, value in numbers.items()}
    assert evaluate(settings(models, tmp_path, output=None)) == numbers
    assert evaluate(settings(models, tmp_path, output=None, seed=1)) != numbers


def test_evaluate_from_the_command_line_with_a_reward_model(models, tmp_path, capsys):
    from rlhf_core.models.load import load_reward_model, save_model

    save_model(tmp_path / "reward", *load_reward_model(models / "one"))
    command = ["evaluate", "--model", models / "one", "--baseline", models / "one", "--data", models / "prompts.jsonl"]
    command += ["--reward-model", tmp_path / "reward", "--sampling.max-new-tokens", 4]
    assert main([str(word) for word in command]) == 0
    assert "win_rate        0.5\n" in capsys.readouterr().out


def test_evaluate_with_several_sources_of_reward(models, tmp_path, monkeypatch, capsys):
    """A column of the rows, a pattern and a function as sources: their sum, and the mean of each."""
    monkeypatch.chdir(models)
    command = ["evaluate", "--model", models / "one", "--baseline", models / "two", "--data", models / "prompts.jsonl"]
    command += ["--reward-function", "counted_words:words", "--checker", r"numeric:more,regex:^\w{0\,4}\b"]
    command += ["--reward-weights", "0.5,0,-3", "--output", tmp_path / "numbers.json"]
    command += ["--sampling.max-new-tokens", 6]
    assert main([str(word) for word in command]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    for side in ("", "baseline_"):
        assert numbers[f"{side}reward/numeric"] == 0  # the language has no numbers
        assert 0 <= numbers[f"{side}reward/regex"] <= 1
        by_hand = 0.5 * numbers[f"{side}reward/words"] - 3 * numbers[f"{side}reward/regex"]
        assert numbers[f"{side}score"] == pytest.approx(by_hand)
    assert numbers["reward/words"] > 0
    assert numbers["excluded"] == 0
    assert main([str(word) for word in [*command, "--checker", "numeric:mroe"]]) == 2  # three weights for four sources
    command[command.index("--reward-weights") + 1] = "0.5,1"
    assert main([str(word) for word in [*command, "--checker", "numeric:mroe"]]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "rlhf evaluate: checker numeric: sample 0: the row has no column 'mroe', only 'prompt', 'more'"
    )


def test_prompts_leave_room_for_the_completion(models, tmp_path, capsys):
    command = ["evaluate", "--model", models / "one", "--baseline", models / "two", "--data", models / "prompts.jsonl"]
    command += ["--reward-function", "counted_words:words", "--sampling.max-new-tokens", 63]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        assert main([str(word) for word in command]) == 2
    assert "sampling.max_new_tokens=63: expected at most 62" in capsys.readouterr().err
