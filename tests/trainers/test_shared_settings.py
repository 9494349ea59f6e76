"""What on-policy jobs share: KL control and the reference, shaping of scores, options of losses, and minibatches."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from rlhf_core.config import ConfigError, OptimConfig
from rlhf_core.losses.policy import POLICY_LOSSES
from rlhf_core.rollout.online import OnlineRun
from rlhf_core.trainers import grpo
from rlhf_core.training import reference
from tests.trainers.plain import mean, record, spread

LIKES, VOWELS = "lumo_rewards:likes", "tests.trainers.plain:vowels"
FAST = OptimConfig(lr=3e-2, schedule="constant")
ONE_UPDATE = dict(rollout_epochs=1, minibatch_size=12, max_steps=1)


# -------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("job", ["ppo-head", "grpo", "rloo", "reinforce", "raft"])
def test_a_coefficient_of_0_loads_no_reference_unless_the_kl_is_to_be_measured(train, monkeypatch, job):
    loaded = []
    original = reference.load_reference
    monkeypatch.setattr(
        reference, "load_reference", lambda *args, **options: loaded.append(1) or original(*args, **options)
    )
    free = {"kl__coef": 0.0} | ({"kl__control": "fixed"} if job == "ppo-head" else {})
    without = train(job, **free, max_steps=2)
    assert loaded == [] and not any({"kl", "kl_coef", "kl_loss"} & row.keys() for row in without.metrics)
    measured = train(job, **free, kl__measure=True, max_steps=2)
    assert loaded == [1] and all("kl" in row for row in measured.metrics)
    assert measured.same_weights(without)


def test_the_kl_coefficient_is_that_of_the_losss_paper(material):
    def coef(**changes) -> float:
        common = dict(model="m", data="d", output="o", reward_function=LIKES)
        return grpo.GRPOConfig(**common, **changes).kl.coef

    assert {loss: coef(loss=loss) for loss in ("grpo", "dapo", "dr_grpo")} == {"grpo": 0.04, "dapo": 0, "dr_grpo": 0}
    assert coef(loss="dapo", kl={"coef": 0.1}) == 0.1


def test_a_reference_of_grpo_that_moves(train, monkeypatch):
    """Made equal to the policy after every second step."""
    played, _ = record(monkeypatch)
    rows = train("grpo", reference__update="sync", reference__every=2, optim=FAST).metrics
    alike = [
        all(torch.equal(a, b) for a, b in zip(each.policy.parameters(), each.reference.parameters(), strict=True))
        for each in played
    ]
    assert alike == [True, False, True, False]
    assert [abs(row["kl"]) < 1e-5 for row in rows] == alike


def test_the_coefficient_of_grpo_adapts_to_the_kl(train):
    run = train("grpo", kl__control="adaptive", kl__target=1e-3, kl__horizon=20, save_every=1, keep_checkpoints=9,
                optim=FAST)  # fmt: skip
    coefficient, found = 0.2, []
    for row in run.metrics:
        state = run.folder / "checkpoints" / f"step-{row['step']:06d}" / "state.json"
        found.append(json.loads(state.read_text())["states"]["kl"]["kl_coef"])
        count = (12, 8)[(row["step"] - 1) % 2]  # completions: the last batch of an epoch is smaller
        coefficient *= 1 + min(max(row["kl"] / 1e-3 - 1, -0.2), 0.2) * count / 20
        assert found[-1] == pytest.approx(coefficient)
    assert len({*found}) == 4
    fixed = train("grpo", optim=FAST)
    assert not fixed.same_weights(run)


# --------------------------------------------------------------------------------------------------- shaping of scores


def test_scores_of_grpo_are_centered_and_scaled(train, monkeypatch):
    """Centered on the starting policy's mean, then divided by the standard deviation of all scores so far."""
    played, _ = record(monkeypatch)
    shaped: list[torch.Tensor] = []
    original = grpo.advantages
    monkeypatch.setattr(grpo, "advantages", lambda one, config: shaped.append(one.scores) or original(one, config))
    settings = dict(reward_function=VOWELS, score__center=8, score__scale="scale", max_steps=2)
    run = train("grpo", **settings)
    first, *rollouts = played
    assert first.purpose == ("score_center",)
    center, seen = mean(first.scores.total.tolist()), []
    for row, each, found in zip(run.metrics, rollouts, shaped, strict=True):
        seen += [score - center for score in each.scores.total.tolist()]
        expected = (each.scores.total - center) / (spread(seen, 1) + 1e-8)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert row["score"] == pytest.approx(each.scores.total.mean().item(), rel=1e-5)  # as the reward gave them


@pytest.mark.parametrize("job", ["rloo", "reinforce"])
def test_masked_truncated_completions_are_in_neither_baseline_nor_loss(train, talker, monkeypatch, job):
    """One update, at a ratio of 1: the loss is minus the mean advantage of those that take part, or minus its sum."""
    played, _ = record(monkeypatch)
    masked = dict(reward_function=VOWELS, model=talker, score__missing_eos="mask", kl__coef=0.0)
    masked |= dict(baseline="mean") if job == "reinforce" else dict(num_generations=4, minibatch_size=24)
    (row,) = train(job, **ONE_UPDATE | masked).metrics
    experience, scores = played[0].rollout, played[0].scores.total.tolist()
    kept, size = experience.finished.tolist(), 4 if job == "rloo" else len(experience)
    assert 2 < sum(kept) < len(kept)
    advantages = []
    for i in range(len(scores)):
        group = [j for j in range(i // size * size, i // size * size + size) if kept[j]]
        others = [scores[j] for j in group if job == "reinforce" or j != i]
        if kept[i]:
            advantages.append(scores[i] - mean(others) if others else 0.0)
    if job == "rloo":
        assert row["policy_loss"] == pytest.approx(-mean(advantages), rel=1e-4, abs=1e-6)
    else:  # each token has its completion's advantage
        lengths = [length for length, own in zip(experience.lengths.tolist(), kept, strict=True) if own]
        total = sum(length * one for length, one in zip(lengths, advantages, strict=True))
        assert row["policy_loss"] == pytest.approx(-total / len(advantages), rel=1e-4, abs=1e-6)


# --------------------------------------------------------------------------------------------------- options of losses


def test_options_are_read_from_the_losss_signature(train, configure):
    for job, loss, option in (("online-dpo", "simpo", {"gamma": 1.5}), ("grpo", "vespo", {"k_pos": 0.5})):
        plain, changed = (train(job, loss=loss, loss_options=options, max_steps=2) for options in (None, option))
        assert plain.distance(changed) > 1e-6
    message = r"loss_options='gama:1.0': expected an option of simpo: gamma; did you mean '?gamma"
    with pytest.raises(ConfigError, match=message):
        configure("online-dpo", loss="simpo", loss_options={"gama": 1.0})
    with pytest.raises(ConfigError, match="loss_options='k_poss:1.0': .*did you mean '?k_pos"):
        configure("grpo", loss="vespo", loss_options={"k_poss": 1.0})


def test_a_loss_of_ones_own_has_options_of_its_own(train, configure, tmp_path, monkeypatch):
    (tmp_path / "my_options.py").write_text(
        "from rlhf_core.losses.policy import register_policy_loss\n"
        "@register_policy_loss('with_option')\n"
        "def with_option(terms, *, sharpness=1.0):\n"
        "    return -(sharpness * terms.log_ratio).exp() * terms.advantages\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = dict(loss="with_option", loss_module="my_options", **ONE_UPDATE)
    try:
        norms = [
            train("grpo", **mine, kl__coef=0.0, loss_options=options).metrics[0]["grad_norm"]
            for options in (None, ("sharpness:3",))
        ]
        assert norms[1] == pytest.approx(3 * norms[0], rel=1e-4)  # at a ratio of 1
        with pytest.raises(ConfigError, match="did you mean '?sharpness"):
            configure("grpo", **mine, loss_options=("sharpnes:3",))
    finally:
        POLICY_LOSSES.pop("with_option", None)


def test_completions_far_from_the_engine_are_masked_where_their_advantage_is_negative(train, monkeypatch):
    """The engine's log-probs are made 1 nat per token too high, which is beyond a threshold of 0.5 and within 2."""
    original, credit, given = OnlineRun.sample, grpo.advantages, []

    def bent(self, *args, **options):
        experience = original(self, *args, **options)
        return replace(experience, logprobs=experience.logprobs + 1)

    def watch(experience, config):
        given.append(credit(experience, config))
        return given[-1]

    monkeypatch.setattr(grpo, "advantages", watch)
    settings = dict(ONE_UPDATE, reward_function=VOWELS, kl__coef=0.0)
    plain = train("grpo", **settings)
    monkeypatch.setattr(OnlineRun, "sample", bent)
    assert train("grpo", **settings, off_policy_threshold=2.0).same_weights(plain)
    (row,) = train("grpo", **settings, off_policy_threshold=0.5).metrics
    advantages = given[-1]
    assert (advantages < 0).any() and (advantages > 0).any()
    assert row["policy_loss"] == pytest.approx(-advantages.clamp(min=0).sum().item() / 12, rel=1e-4)  # ratios are 1


# ---------------------------------------------------------------------------------------------------------- minibatches


@pytest.mark.parametrize("discards", [False, True])
def test_leaving_the_minibatches_before_an_update_is_an_error_unless_it_is_discarded(configure, discards):
    config = configure("rloo", max_steps=1)
    message = r"rloo: the loop left step.minibatches\(\).*expected minibatch.discard\(\) before break"
    with contextlib.nullcontext() if discards else pytest.raises(RuntimeError, match=message), OnlineRun(config) as run:
        for step in run.steps():
            experience = step.rollout(n=config.num_generations)
            for minibatch in step.minibatches(experience, step.plan(experience)):
                if discards:
                    minibatch.discard()
                break
    assert run.last_step == int(discards)
