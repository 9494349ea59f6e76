"""REINFORCE with each of its baselines: metrics and whole updates by hand with plain transformers."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_core.config import ConfigError, OptimConfig, SamplingConfig
from rlhf_core.trainers import reinforce
from tests.trainers.plain import (
    all_logprobs,
    descend,
    expected_metrics,
    largest_difference,
    mean,
    record,
    step_downhill,
    sweep,
    token_logprobs,
)

VOWELS, PICKY, SILENT, STEPWISE = (f"tests.trainers.plain:{name}" for name in ("vowels", "picky", "silent", "stepwise"))
BASELINES = ["none", "mean", "remax", "global"]
ONE_UPDATE = dict(batch_size=5, num_generations=2, minibatch_size=10, rollout_epochs=1)
MEASURED = dict(batch_size=10, minibatch_size=20)


def credit_by_hand(baseline, scores, greedy, kls, in_loss, *, kl_coef: float, gamma: float) -> dict[int, list[float]]:
    """What each token of each completion in the loss is credited with."""
    total = scores.total.tolist()
    against = [0.0] * len(total)
    if baseline == "mean":
        against = [mean([total[i] for i in in_loss])] * len(total)
    elif baseline == "remax":
        against = [score for score in greedy.total.tolist() for _ in (1, 2)]
    credit = {}
    for i in in_loss:
        own = [0.0] * len(kls[i]) if scores.tokens is None else scores.tokens[i].tolist()[: len(kls[i])]
        rewards = [reward - kl_coef * kl for reward, kl in zip(own, kls[i], strict=True)]
        rewards[-1] += total[i] - sum(own) - against[i]
        earned, credit[i] = 0.0, []
        for reward in reversed(rewards):
            earned = reward + gamma * earned
            credit[i].insert(0, earned)
    if baseline == "global":
        every = [one for each in credit.values() for one in each]
        center, variance = mean(every), mean([(one - mean(every)) ** 2 for one in every])
        credit = {i: [(one - center) / variance**0.5 for one in each] for i, each in credit.items()}
    return credit


def known(scores, greedy) -> list[int]:
    """Completions that have a score, and whose greedy completion has one."""
    return [
        i for i, valid in enumerate(scores.valid.tolist()) if valid and (greedy is None or bool(greedy.valid[i // 2]))
    ]


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_metric_by_hand(train, material, talker, monkeypatch, baseline):
    """At the third step, away from the reference. One minibatch and one epoch: weights hold still."""
    played, scored = record(monkeypatch)
    run = train(
        "reinforce", **ONE_UPDATE | MEASURED, baseline=baseline, reward_function=PICKY, max_steps=3, kl__coef=0.3,
        gamma=0.9,
        optim=OptimConfig(lr=3e-3, schedule="constant"), sampling=SamplingConfig(max_new_tokens=6, temperature=0.7),
        model=talker, reference=material / "policy",
    )  # fmt: skip
    greedy = scored[5] if baseline == "remax" else None  # sampled and greedy take turns
    one, scores, row = played[4 if greedy else 2], scored[4 if greedy else 2], run.metrics[2]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    in_loss = known(scores, greedy)
    assert 3 < len(in_loss) < 20
    expected = expected_metrics(one, scores, reference, 0.7, left_out=tuple({*range(20)} - {*in_loss}))
    pairs = zip(*(all_logprobs(model, one.rollout, 0.7) for model in (one.policy, reference)), strict=True)
    kls = [(new - ref).tolist() for new, ref in pairs]
    credit = credit_by_hand(baseline, scores, greedy, kls, in_loss, kl_coef=0.3, gamma=0.9)
    sums = [sum(credit[i]) for i in in_loss]
    tokens = sum(len(credit[i]) for i in in_loss)
    expected |= {
        "policy_loss": -sum(sums) / tokens if baseline == "global" else -mean(sums),  # ratios are 1
        "clip_fraction": 0.0,
        "lr": 3e-3,
    }
    if greedy:
        assert played[5].rollout.completions != one.rollout.completions[::2]
        expected["greedy_score"] = mean(greedy.total[greedy.valid].tolist())
    assert row.keys() == expected.keys() | {"step", "grad_norm"}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("baseline", "clip", "reward"),
    [(baseline, clip, PICKY) for baseline in BASELINES for clip in (None, 0.15)]
    + [(baseline, 0.15, STEPWISE) for baseline in ("mean", "global")],
)
def test_two_updates_by_hand(train, material, talker, monkeypatch, baseline, clip, reward):
    """Two passes over one rollout, by gradient descent; the second has ratios, unless they are left out."""
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    lr = 0.5 if baseline == "global" else 0.1
    run = train(
        "reinforce", **ONE_UPDATE | {"rollout_epochs": 2}, baseline=baseline, clip=clip, gamma=0.9, kl__coef=0.3,
        seed=3, reward_function=reward, max_steps=1, model=talker, reference=material / "policy",
        micro_batch_size=4, score__missing_eos="subtract", score__missing_eos_penalty=0.7,
        sampling=SamplingConfig(max_new_tokens=6),
        optim=OptimConfig(lr=lr, schedule="constant", max_grad_norm=None),
    )  # fmt: skip
    policy, rollout, scores = played[0].policy, played[0].rollout, scored[0]
    assert 0 < rollout.finished.sum() < 10
    scores = scores._replace(total=scores.total - 0.7 * ~rollout.finished)
    assert (scores.tokens is not None) == (reward == STEPWISE)
    greedy = None
    if baseline == "remax":
        greedy = scored[1]._replace(total=scored[1].total - 0.7 * ~played[1].rollout.finished)
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    old, ref = all_logprobs(policy, rollout), all_logprobs(reference, rollout)
    in_loss = known(scores, greedy)
    kls = [(a - b).tolist() for a, b in zip(old, ref, strict=True)]
    credit = credit_by_hand(baseline, scores, greedy, kls, in_loss, kl_coef=0.3, gamma=0.9)
    divisor = sum(len(each) for each in credit.values()) if baseline == "global" else len(in_loss)
    ratios = []
    for _ in (1, 2):
        objective = 0.0
        for i in in_loss:
            new, _ = token_logprobs(policy, rollout.prompts[i], rollout.completions[i])
            ratios += (new - old[i]).exp().tolist()
            for one, before, advantage in zip(new, old[i], credit[i], strict=True):
                if clip is None:
                    objective += -advantage * one / divisor
                else:
                    ratio = (one - before).exp()
                    cut = min(max(ratio, torch.tensor(1 - clip)), torch.tensor(1 + clip))
                    objective += -min(ratio * advantage, cut * advantage) / divisor
        step_downhill(policy, objective, lr)
    assert max(ratios) > 1.2 and min(ratios) < 0.8  # past every clip
    (row,) = run.metrics
    assert row["ratio_max"] == pytest.approx(max(ratios), rel=1e-3)
    assert ("clip_fraction" in row) == (clip is not None)
    assert largest_difference(policy, run.folder) < 2e-5


def test_the_greedy_completion_takes_the_likeliest_tokens(train, monkeypatch):
    played, _ = record(monkeypatch)
    train("reinforce", baseline="remax", max_steps=1, num_generations=2)
    sampled, greedy = played
    assert [len(one.rollout.prompts) for one in played] == [12, 6]
    assert greedy.rollout.prompts == sampled.rollout.prompts[::2]
    for prompt, completion in zip(greedy.rollout.prompts, greedy.rollout.completions, strict=True):
        for t, token in enumerate(completion):
            logits = greedy.policy(input_ids=torch.tensor([prompt + completion[:t]])).logits[0, -1]
            assert logits[token] == logits.max()


# ------------------------------------------------------------------------------------------------------------ it learns


def please(train, function: str = "likes", **changes) -> tuple[float, float]:
    """Liked words a completion at the start and at the end."""
    run = train(
        "reinforce", reward_function=f"lumo_rewards:{function}", batch_size=10, num_generations=4, minibatch_size=20,
        max_steps=12, epochs=99, kl__coef=0.01, optim=OptimConfig(lr=1e-2, schedule="constant"),
        sampling=SamplingConfig(max_new_tokens=4), rollout_epochs=2, **changes,
    )  # fmt: skip
    sign = 1 if function == "likes" else -1
    scores = [sign * row["score"] for row in run.metrics]
    return scores[0], sum(scores[-3:]) / 3


@pytest.mark.parametrize("baseline", sweep(BASELINES, ("global",)))
def test_it_says_what_is_rewarded_more_often_and_with_its_advantages_negated_does_not(train, monkeypatch, baseline):
    start, end = please(train, baseline=baseline)
    assert start < 0.5
    assert end > 1.0
    for name in ("discounted_returns", "reinforce_pp_advantages"):
        original = getattr(reinforce, name)
        monkeypatch.setattr(reinforce, name, lambda *args, original=original, **options: -original(*args, **options))
    start, end = please(train, baseline=baseline)
    assert end <= start


@pytest.mark.slow
def test_with_its_reward_negated_it_does_not(train):
    start, end = please(train, "dislikes")
    assert end <= start < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["mean", "global"])
def test_the_kl_penalty_is_applied(train, baseline):
    def drift(kl_coef: float) -> float:
        run = train(
            "reinforce", reward_function="lumo_rewards:likes", baseline=baseline, max_steps=20, epochs=99,
            batch_size=30, minibatch_size=30, num_generations=1, rollout_epochs=1, kl__coef=kl_coef,
            kl__measure=True,
            optim=OptimConfig(lr=1e-2, schedule="constant"),
        )  # fmt: skip
        return sum(row["kl"] for row in run.metrics[-3:]) / 3

    assert drift(1.0) < 0.5 * drift(0.0)


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_first_ratio_is_one(train, micro_batch_size):
    """Exactly: the same batches give the same rounding."""
    one = dict(minibatch_size=12, rollout_epochs=1, max_steps=2, batch_size=6, micro_batch_size=micro_batch_size)
    for row in train("reinforce", **one).metrics:
        assert row["approx_kl"] == 0 and row["clip_fraction"] == 0 and row["ratio_max"] == 1


# ----------------------------------------------------------------------------------------------------------- bad luck


@pytest.mark.parametrize("baseline", ["mean", "remax"])
def test_equal_scores_move_nothing(train, material, baseline):
    run = train("reinforce", baseline=baseline, reward_function="lumo_rewards:always_one", kl__coef=0.0)
    assert all(row["grad_norm"] == 0 for row in run.metrics)
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), run.folder) == 0


@pytest.mark.parametrize("baseline", BASELINES)
def test_completions_without_a_score_are_excluded(train, material, baseline):
    run = train("reinforce", baseline=baseline, reward_function=SILENT)
    assert all(row["excluded"] > 0 and row["score"] == row["kl"] == "nan" for row in run.metrics)  # never 0
    assert all("grad_norm" not in row for row in run.metrics)
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), run.folder) == 0


def test_when_every_completion_is_truncated(train):
    cut = SamplingConfig(max_new_tokens=2)
    row = train("reinforce", reward_function=VOWELS, sampling=cut, max_steps=1, seed=1).metrics[0]
    assert row["eos_rate"] == 0 and row["length"] == 2
    assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "mean", "batch_size": 1, "num_generations": 1}, "batch_size=1: expected 2 or more"),
        ({"num_generations": 0}, "num_generations=0: expected more than 0"),
        ({"num_generations": 3}, "minibatch_size=4: expected a multiple of num_generations=3"),
        ({"baseline": "group"}, "baseline='group': expected one of none, mean, remax, global"),
        ({"clip": 0.0}, "clip=0.0: expected more than 0, or none"),
        ({"gamma": 1.1}, "gamma=1.1: expected between 0 and 1"),
        ({"rollout_epochs": 0}, "rollout_epochs=0: expected more than 0"),
        ({"kl__coef": math.nan}, "kl.coef=nan: expected a finite number"),
    ],
)
def test_invalid_settings(configure, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("reinforce", **changes)
