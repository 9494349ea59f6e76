"""Log-probs recorded while decoding, in every loop with a ratio: what they spare, and when they are not used."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.config import ConfigError
from rlhf_core.models.forward import PolicyOutputs
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.online import Minibatch, OnlineRun
from rlhf_core.rollout.plan import Plan
from rlhf_core.rollout.recorded import RecordedLogprobs

PICKY = "tests.trainers.plain:picky"
every_loop = pytest.mark.parametrize("job", ["ppo-head", "ppo-policy", "grpo", "rloo", "reinforce"])


@pytest.fixture
def recomputed(monkeypatch) -> list[int]:
    """Has an entry for each rollout of the runs that follow whose log-probs come from a forward of the policy."""
    seen: list[int] = []
    original = OnlineRun.compute

    def watch(self, experience, forward, *args):
        if forward != self._reference_forward:
            seen.append(len(experience))
        return original(self, experience, forward, *args)

    monkeypatch.setattr(OnlineRun, "compute", watch)
    return seen


@every_loop
def test_it_spares_a_forward_and_changes_nothing_but_rounding(train, recomputed, capsys, job):
    settings = dict(reward_function=PICKY, max_steps=2, progress=True)
    runs, counts = [], []
    for choice in ("off", "auto"):
        recomputed.clear()
        runs.append(train(job, recorded=choice, **settings))
        counts.append(len(recomputed))
    assert counts == [2, 1]
    assert 0 < runs[0].distance(runs[1]) < 1e-4
    assert "recorded" not in capsys.readouterr().err


@pytest.mark.parametrize("job", ["ppo-head", "rloo"])
def test_a_resumed_run_does_not_compare_again(configure, train_with_stops, train, recomputed, job):
    settings = dict(max_steps=2, recorded="on")
    whole = train(job, **settings)
    recomputed.clear()
    resumed = train_with_stops(configure(job, **settings), [1])
    assert len(recomputed) == 1
    assert resumed.same_weights(whole) and resumed.metrics == whole.metrics


def bend(monkeypatch, by: float, wrong: str = "logprobs") -> None:
    """One number of each rollout is recorded wrongly."""
    original = OnlineRun.sample

    def bent(self, *args, **options):
        experience = original(self, *args, **options)
        tensor = getattr(experience, wrong)
        if tensor is not None:
            tensor[0, 0] += by
        return experience

    monkeypatch.setattr(OnlineRun, "sample", bent)


@pytest.mark.parametrize(
    ("job", "wrong", "by"),
    [("ppo-head", "values", 0.01), ("ppo-head", "values", math.nan), ("grpo", "logprobs", 0.01)],
)
def test_what_is_wrong_is_not_used(train, monkeypatch, capsys, job, wrong, by):
    right = train(job, recorded="off", max_steps=2)
    bend(monkeypatch, by, wrong)
    assert train(job, recorded="auto", max_steps=2, progress=True).same_weights(right)
    said = [line for line in capsys.readouterr().err.splitlines() if "recorded log-probs differ" in line]
    assert len(said) == 1 and f"from a forward by {by:.2g}, more than 0.001; log-probs come from forwards" in said[0]
    message = f"^recorded='on': recorded log-probs differ from a forward by {by:.2g}"
    with pytest.raises(ValueError, match=message):
        train(job, recorded="on")


def test_one_update_of_grpo_asks_nothing(train, monkeypatch):
    """Its own forward is that of the policy that sampled."""
    monkeypatch.delattr(OnlineRun, "with_logprobs")
    runs = [
        train("grpo", recorded=choice, rollout_epochs=1, minibatch_size=12, max_steps=2) for choice in ("off", "on")
    ]
    assert runs[0].same_weights(runs[1])
    assert all(row["ratio_max"] == 1 for row in runs[1].metrics)


@pytest.mark.parametrize("job", ["ppo-head", "rloo"])
def test_the_exact_kl_needs_a_forward(configure, train, job):
    full = dict(kl__estimator="full", max_steps=1) | (dict(kl__apply_to="both") if job == "ppo-head" else {})
    with pytest.raises(ConfigError, match="recorded='on': expected off or auto: the full KL needs a forward pass"):
        configure(job, recorded="on", **full)
    assert train(job, recorded="auto", **full).same_weights(train(job, recorded="off", **full))


# ------------------------------------------------------------------------------------------------------- the comparison


EXPERIENCE = Experience.sampled(
    prompts=[[1], [1]],
    completions=[[4, 5], [6]],
    logprobs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
    finished=torch.tensor([True, False]),
)


def usable(logprobs: torch.Tensor, *, values: Any = None, recorded: Any = None, rows: Any = None, whole=False) -> bool:
    """Whether what was recorded is usable beside these numbers of a forward. There is a reason exactly if not."""
    checked = RecordedLogprobs("auto")
    outputs = PolicyOutputs(logprobs=logprobs, values=values)
    rows = slice(None) if rows is None else torch.tensor(rows)
    reason = checked.check(replace(EXPERIENCE, values=recorded), outputs, rows, whole_completions=whole)
    assert (reason is None) is checked.usable
    return checked.usable


@pytest.mark.parametrize(("gap", "good"), [(0.0009, True), (-0.0009, True), (0.0011, False), (math.nan, False)])
def test_how_far_is_too_far(gap, good):
    assert usable(EXPERIENCE.logprobs + torch.tensor([[0.0, gap], [0.0, 0.0]])) is good


def test_only_rows_of_the_forward_are_compared():
    wrong = EXPERIENCE.logprobs + torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    assert usable(wrong, rows=[0])
    assert not usable(wrong, rows=[0, 1])


def test_where_completions_have_the_ratio_their_sums_are_compared():
    for gaps, good, together in (([6e-4, 6e-4], True, False), ([2e-3, -2e-3], False, True)):
        forward = EXPERIENCE.logprobs + torch.tensor([gaps, [0.0, 0.0]])
        assert usable(forward) is good
        assert usable(forward, whole=True) is together


def test_large_values_are_compared_by_their_size():
    values = torch.tensor([[500.0, 0.5], [2.0, 0.0]])
    for place, good in (((0, 0), True), ((0, 1), False)):
        recorded = values.clone()
        recorded[place] += 0.4
        assert usable(EXPERIENCE.logprobs, values=values, recorded=recorded) is good


# ------------------------------------------------------------------------------------------------------ the first epoch


def test_the_micro_batches_of_the_first_epoch():
    epochs = [[[3, 1], [0, 4], [2]], [[4, 1], [2, 3], [0]]]
    plan = Plan([[torch.tensor(rows) for rows in (batch[:1], batch[1:]) if rows] for batch in sum(epochs, [])])
    assert [batch.tolist() for batch in plan.first_pass] == [[3], [1], [0], [4], [2]]
    assert not plan.single_update
    assert Plan([]).first_pass is None and Plan([]).single_update


# ------------------------------------------------------------------------ an engine whose numbers are not quite ours

ONE_UPDATE = dict(max_steps=1, rollout_epochs=1, minibatch_size=12, kl__coef=0.0, importance_max=1.5)


@pytest.mark.parametrize("job", ["ppo-head", "grpo", "rloo", "reinforce"])
def test_tokens_that_the_engine_found_too_unlikely_count_for_more(train, monkeypatch, job):
    """All are e times likelier than the engine says, so that every weight is cut off at 1.5; the gradient follows."""
    settings = ONE_UPDATE | dict(reward_function="tests.trainers.plain:vowels", importance="sequence")
    if job == "ppo-head":
        settings |= dict(kl__target=None, value__coef=0.0, batch_size=12)
    plain = train(job, **settings | {"importance": "none"}).metrics[0]
    true = train(job, **settings).metrics[0]
    original = OnlineRun.sample

    def bent(self, *args, **options):
        experience = original(self, *args, **options)
        return replace(experience, logprobs=experience.logprobs - 1)

    monkeypatch.setattr(OnlineRun, "sample", bent)
    weighed = train(job, **settings).metrics[0]
    assert "engine_weight" not in plain
    assert true.pop("engine_weight") == pytest.approx(1, abs=1e-5)
    assert true == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert weighed["engine_weight"] == pytest.approx(1.5)
    assert weighed["grad_norm"] == pytest.approx(1.5 * plain["grad_norm"], rel=1e-4)


def test_weights_by_hand(configure):
    """Log-ratios of (log 2, -log 4 | log 8): tokens weigh 2, 1/4 | 8, cut to 3; sequences 1/2, 1/2 | 3."""
    logprobs = EXPERIENCE.logprobs + torch.tensor([[2.0, 0.25], [8.0, 5.0]]).log()
    batch = replace(EXPERIENCE, logprobs=logprobs, engine_logprobs=EXPERIENCE.logprobs)
    expected = {"token": [[2.0, 0.25], [3.0, 0.0]], "sequence": [[0.5, 0.5], [3.0, 0.0]], "none": None}
    for level, right in expected.items():
        config = configure("grpo", importance=level, importance_max=3.0)
        minibatch = SimpleNamespace(step=SimpleNamespace(run=SimpleNamespace(config=config)))
        weights = Minibatch.importance(minibatch, batch)
        if right is None:
            assert weights is None
        else:
            torch.testing.assert_close(weights, torch.tensor(right))


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        ("grpo", dict(importance="token", recorded="auto"), "importance='token': expected none with recorded"),
        (
            "grpo",
            dict(importance="token", loss="vespo"),
            "weights: not defined for 'vespo', a nonlinear function of the ratio",
        ),
        (
            "rloo",
            dict(importance="token"),
            "importance='token': expected none or sequence, because a completion is one",
        ),
        ("ppo-head", dict(importance="words"), "importance='words': expected one of none, token, sequence"),
        ("ppo-head", dict(importance_max=1.0), "importance_max=1.0: expected more than 1"),
    ],
    ids=str,
)
def test_weights_that_cannot_be(configure, job, changes, message):
    with pytest.raises(ConfigError) as caught:
        configure(job, **changes)
    assert str(caught.value).startswith(message)
