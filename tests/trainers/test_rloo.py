"""RLOO: metrics and whole updates by hand with plain transformers, where a completion is one action."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_core.config import ConfigError, OptimConfig, SamplingConfig
from rlhf_core.trainers import rloo
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

VOWELS, PICKY, SILENT = (f"tests.trainers.plain:{name}" for name in ("vowels", "picky", "silent"))
ONE_UPDATE = dict(batch_size=5, num_generations=3, minibatch_size=15, rollout_epochs=1)
MEASURED = dict(batch_size=10, minibatch_size=30)


def advantages_by_hand(scores, kls: list[float], kl_coef: float, size: int) -> list[float]:
    """Each reward less the mean of the other rewards in its group; one without a score, or without a fellow, has 0."""
    valid = scores.valid.tolist()
    rewards = [score - kl_coef * kl for score, kl in zip(scores.total.tolist(), kls, strict=True)]
    advantages = []
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(i // size * size, i // size * size + size) if j != i and valid[j]]
        advantages.append(reward - mean(others) if valid[i] and others else 0.0)
    return advantages


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_metric_by_hand(train, material, talker, monkeypatch, temperature):
    """At the third step, away from the reference. One minibatch and one epoch: weights hold still."""
    played, scored = record(monkeypatch)
    run = train(
        "rloo", **ONE_UPDATE | MEASURED, reward_function=PICKY, max_steps=3, kl__coef=0.3,
        optim=OptimConfig(lr=3e-3, schedule="constant"), model=talker, reference=material / "policy",
        sampling=SamplingConfig(max_new_tokens=6, temperature=temperature),
    )  # fmt: skip
    row, scores, rollout = run.metrics[2], scored[2], played[2].rollout
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    in_loss = [i for i, valid in enumerate(scores.valid.tolist()) if valid]
    assert 3 < len(in_loss) < 30
    left_out = tuple({*range(30)} - {*in_loss})
    expected = expected_metrics(played[2], scores, reference, temperature, left_out=left_out)
    pairs = zip(*(all_logprobs(model, rollout, temperature) for model in (played[2].policy, reference)), strict=True)
    advantages = advantages_by_hand(scores, [(new - ref).sum().item() for new, ref in pairs], 0.3, 3)
    alike = [
        len({score for score, valid in zip(*group, strict=True) if valid}) < 2
        for group in zip(scores.total.view(10, 3).tolist(), scores.valid.view(10, 3).tolist(), strict=True)
    ]
    expected |= {
        "policy_loss": -mean([advantages[i] for i in in_loss]),  # ratios are 1
        "flat_groups": sum(alike),
        "clip_fraction": 0.0,
        "lr": 3e-3,
    }
    assert row.keys() == expected.keys() | {"step", "grad_norm"}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_two_updates_by_hand(train, material, talker, monkeypatch, micro_batch_size):
    """Two passes over one rollout, by gradient descent; the second has ratios of whole completions, and clips them."""
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "rloo", **ONE_UPDATE | {"rollout_epochs": 2}, reward_function=PICKY, max_steps=1, seed=3, kl__coef=0.3,
        clip=0.15, score__missing_eos="subtract", score__missing_eos_penalty=0.7,
        model=talker, reference=material / "policy",
        sampling=SamplingConfig(max_new_tokens=6), micro_batch_size=micro_batch_size,
        optim=OptimConfig(lr=0.01, schedule="constant", max_grad_norm=None),
    )  # fmt: skip
    policy, rollout, scores = played[0].policy, played[0].rollout, scored[0]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    old, ref = all_logprobs(policy, rollout), all_logprobs(reference, rollout)
    kls = [(a - b).sum().item() for a, b in zip(old, ref, strict=True)]
    assert max(map(abs, kls)) > 0.5
    charged = scores._replace(total=scores.total - 0.7 * ~rollout.finished)
    assert 0 < rollout.finished.sum() < 15
    advantages = advantages_by_hand(charged, kls, 0.3, 3)
    in_loss = [i for i, valid in enumerate(scores.valid.tolist()) if valid]
    norms, ratios, clipped = [], [], 0
    for _ in (1, 2):
        objective, ratios = 0.0, []
        for i in in_loss:
            new, _ = token_logprobs(policy, rollout.prompts[i], rollout.completions[i])
            ratio = (new.sum() - old[i].sum()).exp()
            cut = min(max(ratio, torch.tensor(0.85)), torch.tensor(1.15))
            objective += -min(ratio * advantages[i], cut * advantages[i]) / len(in_loss)
            ratios.append(ratio.item())
            clipped += cut.item() != ratio.item()
        norms.append(step_downhill(policy, objective, 0.01))
    assert 0 < clipped < len(in_loss)
    (row,) = run.metrics
    assert row["grad_norm"] == pytest.approx(mean(norms), rel=1e-3)
    assert row["ratio_max"] == pytest.approx(max(1.0, *ratios), rel=1e-3)
    assert row["clip_fraction"] == pytest.approx(clipped / len(in_loss) / 2)
    assert largest_difference(policy, run.folder) < 2e-5


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_an_update_with_the_full_kl_by_hand(train, material, talker, monkeypatch, micro_batch_size):
    """The reward of a completion is its score minus the exact KL of its states; the KL is a loss as well."""
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "rloo", **ONE_UPDATE, reward_function=PICKY, max_steps=1, seed=3, kl__coef=0.3, kl__estimator="full",
        model=talker, reference=material / "policy", micro_batch_size=micro_batch_size,
        sampling=SamplingConfig(max_new_tokens=6, temperature=0.7),
        optim=OptimConfig(lr=0.01, schedule="constant", max_grad_norm=None),
    )  # fmt: skip
    policy, rollout, scores = played[0].policy, played[0].rollout, scored[0]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")

    def everything(model, row: int) -> torch.Tensor:
        """(T, V) log-probs at the completion's states."""
        prompt, completion = rollout.prompts[row], rollout.completions[row]
        model.set_attn_implementation("eager")
        logits = model(input_ids=torch.tensor([prompt + completion])).logits
        return (logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)

    news = [everything(policy, row) for row in range(15)]
    with torch.no_grad():
        refs = [everything(reference, row) for row in range(15)]
    kls = [(new.exp() * (new - ref)).sum() for new, ref in zip(news, refs, strict=True)]
    advantages = advantages_by_hand(scores, [kl.item() for kl in kls], 0.3, 3)
    in_loss = [i for i, valid in enumerate(scores.valid.tolist()) if valid]
    assert 3 < len(in_loss) < 15
    objective = 0.0
    for i in in_loss:
        logprob = news[i].gather(-1, torch.tensor(rollout.completions[i])[:, None]).sum()
        objective += (-advantages[i] * logprob + 0.3 * kls[i]) / len(in_loss)
    norm = step_downhill(policy, objective, 0.01)
    (row,) = run.metrics
    expected = {
        "grad_norm": norm,
        "kl": mean([kls[i].item() for i in in_loss]),
        "kl_loss": 0.3 * mean([kls[i].item() for i in in_loss]),
        "policy_loss": -mean([advantages[i] for i in in_loss]),
        "ratio_max": 1.0,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert row["kl"] > 0.5
    assert largest_difference(policy, run.folder) < 2e-5


# ------------------------------------------------------------------------------------------------------------ it learns


def please(train, function: str = "likes", **changes) -> tuple[float, float]:
    """Liked words a completion at the start and at the end."""
    run = train(
        "rloo", reward_function=f"lumo_rewards:{function}", batch_size=10, num_generations=4, minibatch_size=20,
        max_steps=12, epochs=99, kl__coef=0.01, optim=OptimConfig(lr=1e-2, schedule="constant"),
        sampling=SamplingConfig(max_new_tokens=4), rollout_epochs=2, **changes,
    )  # fmt: skip
    sign = 1 if function == "likes" else -1
    scores = [sign * row["score"] for row in run.metrics]
    return scores[0], sum(scores[-3:]) / 3


def test_it_says_what_is_rewarded_more_often(train):
    start, end = please(train)
    assert start < 0.5
    assert end > 1.0


@pytest.mark.slow
def test_with_its_reward_negated_it_does_not(train):
    start, end = please(train, "dislikes")
    assert end <= start < 0.5


@pytest.mark.slow
def test_with_its_advantages_negated_it_does_not(train, monkeypatch):
    original = rloo.rloo_advantages
    monkeypatch.setattr(rloo, "rloo_advantages", lambda *args, **options: -original(*args, **options))
    start, end = please(train)
    assert end <= start


@pytest.mark.slow
def test_the_kl_penalty_is_applied(train, monkeypatch):
    """It keeps the policy near the reference, and one of 0 or of the wrong sign does not."""

    def drift(kl_coef: float) -> float:
        run = train(
            "rloo", reward_function="lumo_rewards:likes", max_steps=10, epochs=99, batch_size=10, num_generations=3,
            minibatch_size=15, kl__coef=kl_coef, kl__measure=True,
            optim=OptimConfig(lr=1e-2, schedule="constant"),
        )  # fmt: skip
        return sum(row["kl"] for row in run.metrics[-3:]) / 3

    free, penalised = drift(0.0), drift(1.0)
    assert penalised < 0.5 * free
    original = rloo.kl_penalty

    def negated(scores, logprobs, ref_logprobs, mask, **options):
        rewards, kl = original(scores, ref_logprobs, logprobs, mask, **options)
        return rewards, -kl  # the metric stays right

    monkeypatch.setattr(rloo, "kl_penalty", negated)
    assert drift(1.0) > 2 * penalised


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_first_ratio_is_one(train, micro_batch_size):
    """Exactly: the same batches give the same rounding."""
    one = dict(minibatch_size=12, rollout_epochs=1, max_steps=2, batch_size=6, micro_batch_size=micro_batch_size)
    for row in train("rloo", **one).metrics:
        assert row["approx_kl"] == 0 and row["clip_fraction"] == 0 and row["ratio_max"] == 1


# ----------------------------------------------------------------------------------------------------------- bad luck


def test_groups_of_equal_scores_are_counted_and_moved_by_the_kl_alone(train, material, plain_run):
    equal = dict(reward_function="lumo_rewards:always_one", reference=plain_run("sft").folder)
    free, penalised = train("rloo", kl__coef=0.0, **equal), train("rloo", kl__coef=0.2, **equal)
    for run in (free, penalised):
        assert [row["flat_groups"] for row in run.metrics] == [6, 4, 6, 4]
    assert all(row["grad_norm"] == 0 for row in free.metrics)
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), free.folder) == 0
    assert all(row["grad_norm"] > 0 for row in penalised.metrics)


def test_completions_without_a_score_are_excluded(train, material):
    run = train("rloo", reward_function=SILENT)
    assert [row["excluded"] for row in run.metrics] == [12, 8, 12, 8]
    assert all(row["score"] == row["kl"] == "nan" for row in run.metrics)  # never 0
    assert all("grad_norm" not in row for row in run.metrics)
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), run.folder) == 0


def test_when_every_completion_is_truncated(train):
    cut = SamplingConfig(max_new_tokens=2)
    row = train("rloo", reward_function=VOWELS, sampling=cut, max_steps=1, seed=1).metrics[0]
    assert row["eos_rate"] == 0 and row["length"] == 2
    assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations=1: expected 2 or more"),
        ({"minibatch_size": 7}, "minibatch_size=7: expected a multiple of num_generations=2"),
        ({"clip": 0.0}, "clip=0.0: expected more than 0"),
        ({"rollout_epochs": 0}, "rollout_epochs=0: expected more than 0"),
        ({"kl__coef": -0.1}, "kl.coef=-0.1: expected 0 or more"),
        ({"kl__estimator": "k3"}, "kl.estimator='k3': expected k1 or full"),
        ({"kl__coef": math.inf}, "kl.coef=inf: expected a finite number"),
    ],
)
def test_invalid_settings(configure, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("rloo", **changes)
