"""Every loop that acts: sources of reward are logged apart, samples without a score left out, bad functions named."""

from __future__ import annotations

import sys

import pytest
import torch

ACTING = ["ppo-head", "grpo", "rloo", "reinforce", "online-dpo", "raft", "rrhf"]
every_loop = pytest.mark.parametrize("job", ACTING)

ODD = '''
def some(prompts, completions, rows):
    """Every third has no score, whatever it is."""
    return [None if i % 3 == 0 else float("dolo" in completion) for i, completion in enumerate(completions)]


def nobody(prompts, completions, rows):
    return [None] * len(prompts)


def broken(prompts, completions, rows):
    return [0.0] * (len(prompts) - 1) + [float("nan")]


def short(prompts, completions, rows):
    return [0.0]


def failing(prompts, completions, rows):
    return [1 / 0 for _ in prompts]


def hanging(prompts, completions, rows):
    while True:
        pass
'''


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_rewards.py").write_text(ODD)
    sys.path.insert(0, str(folder))
    yield "odd_rewards"
    sys.path.remove(str(folder))


@every_loop
def test_the_sources_are_logged_and_summed(train, job):
    sources = dict(reward_function="lumo_rewards:likes,lumo_rewards:always_one", checker="regex:o")
    run = train(job, **sources, reward_weights="1,0,2", max_steps=2)
    for row in run.metrics:
        assert row["reward/always_one"] == 1
        assert row["score"] == pytest.approx(row["reward/likes"] + 2 * row["reward/regex"])
    assert any(row["reward/regex"] > 0 for row in run.metrics)


@every_loop
def test_samples_without_a_score_are_left_out_and_counted(train, odd, job):
    run = train(job, reward_function=f"{odd}:some", max_steps=2)
    assert all(row["excluded"] > 0 for row in run.metrics)
    assert all(weights.isfinite().all() for weights in run.weights.values())
    assert all(0 <= row["score"] <= 1 for row in run.metrics)


@every_loop
def test_where_nothing_has_a_score_nothing_is_learnt_or_it_is_an_error(train, odd, job, material):
    refusal = None
    try:
        run = train(job, reward_function=f"{odd}:nobody", max_steps=1)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "score" in refusal
    else:
        from safetensors.torch import load_file

        assert run.metrics[0]["score"] == "nan"
        before = load_file(material / "policy" / "model.safetensors")
        after = load_file(run.folder / "model.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("job", ["ppo-head", "online-dpo"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", r"reward function broken: sample \d+ got nan, expected a finite number"),
        ("short", r"reward function short: 1 scores for \d+ completions"),
        ("failing", r"reward function failing: sample 0: ZeroDivisionError: division by zero \(.*odd_rewards.py:20\)"),
        ("hanging", r"reward function hanging: sample 0: no answer within reward_timeout=0.2 seconds"),
    ],
)
def test_a_bad_reward_stops_the_run_by_name(train, odd, job, function, message):
    with pytest.raises(ValueError, match=message):
        train(
            job, reward_function=f"{odd}:{function}", reward_timeout=0.2 if function == "hanging" else 60, max_steps=1
        )
