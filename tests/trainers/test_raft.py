"""RAFT and rejection sampling: what is chosen, metrics and whole updates by hand with plain transformers."""

import copy
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from rlhf_core.config import ConfigError, OptimConfig, SamplingConfig
from rlhf_core.trainers import raft
from tests.trainers.plain import (
    all_logprobs,
    descend,
    expected_metrics,
    largest_difference,
    mean,
    record,
    step_downhill,
    token_logprobs,
)

PICKY, SILENT, VOWELS = (f"tests.trainers.plain:{name}" for name in ("picky", "silent", "vowels"))
SLOW = OptimConfig(lr=0.05, schedule="constant", max_grad_norm=None)
WHOLE = dict(
    batch_size=10, minibatch_size=30, rollout_epochs=1, max_steps=1, kl__coef=0.0, kl__measure=True, optim=SLOW
)
POLICY_ONLY = {"entropy", "approx_kl", "ratio_max"}  # metrics of a policy gradient


def chosen_by_hand(score: dict[int, float], size: int, keep: str, min_score: float) -> list[int]:
    """Rows, from the scores of those that have one."""
    groups = [[row for row in score if row // size == prompt] for prompt in range(10)]
    if keep == "best":
        groups = [[max(group, key=score.get)] for group in groups if group]
    return [row for group in groups for row in group if score[row] >= min_score]


UPDATES = {
    "the best": {},
    "the best, micro-batches": dict(micro_batch_size=3),
    "the best, cooler": dict(sampling=SamplingConfig(max_new_tokens=6, temperature=0.7)),
    "the best that are good": dict(min_score=0.8),
    "all that are good": dict(keep="all", min_score=0.8),
    "all that are good, micro-batches": dict(keep="all", min_score=0.8, micro_batch_size=4),
    "the best, with a missing-EOS penalty": dict(score__missing_eos="subtract", score__missing_eos_penalty=1.5),
    "the best, with a KL penalty": dict(kl__coef=0.2),
}


@pytest.mark.parametrize("name", UPDATES)
def test_metrics_and_two_updates_by_hand(train, material, talker, monkeypatch, name):
    """Two passes over what was chosen, by gradient descent. Some scores do not exist."""
    settings = {"sampling": SamplingConfig(max_new_tokens=6), "num_generations": 3} | UPDATES[name]
    temperature = settings["sampling"].temperature
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "raft", reward_function=PICKY, model=talker, reference=material / "policy",
        **WHOLE | {"rollout_epochs": 2} | settings,
    )  # fmt: skip
    policy, rollout, scores = copy.deepcopy(played[0].policy), played[0].rollout, scored[0]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    logprobs, ref = all_logprobs(policy, rollout, temperature), all_logprobs(reference, rollout, temperature)

    def score_of(row: int, penalty: float, kl_coef: float) -> float:
        unfinished = rollout.completions[row][-1] != 2
        return scores.total[row].item() - penalty * unfinished - kl_coef * (logprobs[row] - ref[row]).sum().item()

    valid = [row for row in range(30) if scores.valid[row]]
    assert 3 < len(valid) < 30
    rule = dict(size=3, keep=settings.get("keep", "best"), min_score=settings.get("min_score", -1e9))
    penalties = settings.get("score__missing_eos_penalty", 0.0), settings.get("kl__coef", 0.0)
    final = {row: score_of(row, *penalties) for row in valid}
    chosen = chosen_by_hand(final, **rule)
    if any(penalties):
        assert chosen != chosen_by_hand({row: score_of(row, 0.0, 0.0) for row in valid}, **rule)  # else they go unseen
    if "min_score" in settings:
        assert 0 < len(chosen) < len(chosen_by_hand(final, **rule | {"min_score": -1e9}))

    tokens = sum(len(rollout.completions[row]) for row in chosen)
    norms, losses = [], []
    for _ in (1, 2):
        objective = 0.0
        for row in chosen:
            new, _ = token_logprobs(policy, rollout.prompts[row], rollout.completions[row], temperature)
            objective -= new.sum() / tokens
        losses.append(objective.item())
        norms.append(step_downhill(policy, objective, 0.05))
    assert largest_difference(policy, run.folder) < 2e-5
    assert largest_difference(played[0].policy, run.folder) > 1e-3

    groups = [[final[row] for row in valid if row // 3 == prompt] for prompt in range(10)]
    expected = expected_metrics(played[0], scores, reference, temperature)
    expected = {name: value for name, value in expected.items() if name not in POLICY_ONLY} | {
        "nll": mean(losses),
        "kept": len(chosen) / 30,
        "kept_score": mean([final[row] for row in chosen]),
        "flat_groups": sum(len({*group}) < 2 for group in groups),
        "skipped": 0,
        "grad_norm": mean(norms),
        "lr": 0.05,
    }
    (row,) = run.metrics
    assert row.keys() == expected.keys() | {"step"}
    for metric, value in expected.items():
        assert row[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric


# ------------------------------------------------------------------------------------------------------------ it learns


def please(train, function: str = "likes", **changes) -> tuple[float, float]:
    """Liked words a completion at the start and at the end."""
    settings = dict(
        batch_size=40, num_generations=4, minibatch_size=20, rollout_epochs=2, max_steps=12, epochs=99, kl__coef=0.0,
        optim=OptimConfig(lr=1e-2, schedule="constant"), sampling=SamplingConfig(max_new_tokens=4),
    )  # fmt: skip
    run = train("raft", reward_function=f"lumo_rewards:{function}", **settings | changes)
    sign = -1 if function == "dislikes" else 1
    scores = [sign * row["score"] for row in run.metrics]
    return scores[0], mean(scores[-3:])


@pytest.mark.parametrize("changes", [{}, {"keep": "all", "min_score": 1.0}], ids=["best", "rejection sampling"])
def test_it_says_what_is_rewarded_more_often(train, changes):
    start, end = please(train, **changes)
    assert start < 0.5
    assert end > 1.0


@pytest.mark.slow
def test_with_its_reward_negated_it_does_not(train):
    start, end = please(train, "dislikes")
    assert end <= start < 0.5


@pytest.mark.slow
def test_with_its_sign_negated_it_does_not(train, monkeypatch):
    original = raft.sft_loss

    def negated(*args, **options):
        loss, stats = original(*args, **options)
        return -loss, stats

    monkeypatch.setattr(raft, "sft_loss", negated)
    start, end = please(train, max_steps=6)
    assert end <= start


@pytest.mark.slow
def test_learning_the_worst_it_does_not(train, monkeypatch):
    original = raft.choose
    monkeypatch.setattr(
        raft, "choose", lambda experience, config: original(replace(experience, scores=-experience.scores), config)
    )
    start, end = please(train)
    assert end <= start


@pytest.mark.slow
def test_the_kl_penalty_is_applied(train):
    def drift(kl_coef: float) -> float:
        run = train(
            "raft", reward_function="lumo_rewards:likes", batch_size=20, num_generations=4, minibatch_size=20,
            max_steps=10, epochs=99, kl__coef=kl_coef, kl__measure=True,
            optim=OptimConfig(lr=1e-2, schedule="constant"),
        )  # fmt: skip
        return mean([row["kl"] for row in run.metrics[-3:]])

    assert drift(1.0) < 0.5 * drift(0.0)


# ----------------------------------------------------------------------------------------------------------- bad luck


@pytest.mark.parametrize(
    "changes", [{"reward_function": SILENT}, {"reward_function": VOWELS, "min_score": 1e6}], ids=["silent", "too much"]
)
def test_a_step_with_nothing_to_learn_is_skipped_and_counted(train, material, changes):
    run = train("raft", max_steps=2, eval_data=material / "prompts.jsonl", **changes)
    for row, prompts in zip(run.metrics, (6, 4), strict=True):
        assert row["skipped"] == 1 and row["kept"] == 0
        assert row["excluded"] == (3 * prompts if "min_score" not in changes else 0)
        assert not {"nll", "kept_score", "grad_norm", "lr"} & row.keys()
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), run.folder) == 0
    assert run.metrics[-1]["eval_kl"] == pytest.approx(0, abs=1e-5)


def test_groups_of_equal_scores_are_counted_and_their_first_is_the_best(train, monkeypatch):
    played, _ = record(monkeypatch)
    learned = []
    original = raft.choose
    monkeypatch.setattr(raft, "choose", lambda *args: learned.append(original(*args)) or learned[-1])
    run = train("raft", reward_function="lumo_rewards:always_one", max_steps=1, kl__coef=0.0)
    assert run.metrics[0]["flat_groups"] == 6
    assert learned[0].tolist() == [0, 3, 6, 9, 12, 15]


def test_one_completion_a_prompt_is_enough_to_reject(train):
    run = train(
        "raft", reward_function=VOWELS, num_generations=1, keep="all", min_score=1.0, max_steps=1, batch_size=10
    )
    row = run.metrics[0]
    assert 0 < row["kept"] < 1 and "flat_groups" not in row
    assert row["kept_score"] >= 1.0 > row["score"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations=1: expected 2 or more"),
        ({"num_generations": 0, "keep": "all", "min_score": 0.0}, "num_generations=0: expected more than 0"),
        ({"keep": "all"}, "min_score=None: expected a score with keep='all', else there is nothing to choose by"),
        ({"keep": "some"}, "keep='some': expected one of best, all"),
        ({"kl__coef": -0.1}, "kl.coef=-0.1: expected 0 or more"),
        (
            {"score__missing_eos": "subtract", "score__missing_eos_penalty": -0.1},
            "score.missing_eos_penalty=-0.1: expected 0 or more",
        ),
        ({"rollout_epochs": 0}, "rollout_epochs=0: expected more than 0"),
    ],
)
def test_invalid_settings(configure, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("raft", **changes)
