"""Log-probs recorded while decoding, in every loop with a ratio: what they spare, and when they are not believed."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.config import ConfigError
from rlhf_core.models.forward import PolicyOutputs
from rlhf_core.rollout import recorded as recording
from rlhf_core.rollout.recorded import Recorded, behaviour, engine_weights
from rlhf_core.rollout.rewards import Scores
from rlhf_core.rollout.sampling import Rollout
from rlhf_core.rollout.steps import first_epoch
from rlhf_core.trainers import grpo, ppo, reinforce, rloo

PICKY = "tests.trainers.plain:picky"
LOOPS = {"ppo-head": ppo, "ppo-policy": ppo, "grpo": grpo, "rloo": rloo, "reinforce": reinforce}
every_loop = pytest.mark.parametrize("job", LOOPS)


@every_loop
def test_it_spares_a_forward_and_changes_nothing_but_rounding(train, monkeypatch, capsys, job):
    asked = []
    original = recording.recall
    monkeypatch.setattr(recording, "recall", lambda *args: asked.append(1) or original(*args))
    settings = dict(reward_function=PICKY, max_steps=2, progress=True)
    runs, counts = [], []
    for choice in ("off", "auto"):
        asked.clear()
        runs.append(train(job, recorded=choice, **settings))
        counts.append(len(asked))
    assert counts == [2, 1]
    assert 0 < runs[0].distance(runs[1]) < 1e-4
    assert "recorded" not in capsys.readouterr().err


@pytest.mark.parametrize("job", ["ppo-head", "rloo"])
def test_a_resumed_run_does_not_ask_again(configure, train_with_stops, train, monkeypatch, job):
    settings = dict(max_steps=2, recorded="on")
    whole = train(job, **settings)
    asked = []
    original = recording.recall
    monkeypatch.setattr(recording, "recall", lambda *args: asked.append(1) or original(*args))
    resumed = train_with_stops(configure(job, **settings), [1])
    assert asked == [1]
    assert resumed.same_weights(whole) and resumed.metrics == whole.metrics


def bend(monkeypatch, module, by: float, wrong: str = "logprobs") -> None:
    """One number of each rollout is recorded wrongly."""
    original = module.act

    def bent(*args, **options):
        rollout = original(*args, **options)
        tensor = getattr(rollout, wrong)
        if tensor is not None:
            tensor[0, 0] += by
        return rollout

    monkeypatch.setattr(module, "act", bent)


@pytest.mark.parametrize(
    ("job", "wrong", "by"),
    [("ppo-head", "values", 0.01), ("ppo-head", "values", math.nan), ("grpo", "logprobs", 0.01)],
)
def test_what_is_wrong_is_not_used(train, monkeypatch, capsys, job, wrong, by):
    right = train(job, recorded="off", max_steps=2)
    bend(monkeypatch, LOOPS[job], by, wrong)
    assert train(job, recorded="auto", max_steps=2, progress=True).same_weights(right)
    said = [line for line in capsys.readouterr().err.splitlines() if "recorded while decoding" in line]
    assert len(said) == 1 and f"is {by:.2g} from a forward, not within 0.001; log-probs come from forwards" in said[0]
    message = f"^recorded='on': what was recorded while decoding is {by:.2g} from a forward"
    with pytest.raises(ValueError, match=message):
        train(job, recorded="on")


def test_one_update_of_grpo_asks_nothing(train, monkeypatch):
    """Its own forward is that of the policy that sampled."""
    monkeypatch.delattr(grpo, "behaviour")
    runs = [
        train("grpo", recorded=choice, rollout_epochs=1, minibatch_size=12, max_steps=2) for choice in ("off", "on")
    ]
    assert runs[0].same_weights(runs[1])
    assert all(row["ratio_max"] == 1 for row in runs[1].metrics)


def test_groups_that_made_room_took_their_length_along():
    """The longest completion was one of theirs: what is recorded has the columns of those that stayed."""
    first = Rollout(
        prompts=[[1]] * 4,
        completions=[[4, 5, 6, 7], [4], [5, 2], [6]],
        logprobs=-torch.ones(4, 4) * torch.arange(1, 5)[:, None],
        finished=torch.tensor([False, False, True, False]),
        group_size=2,
    )
    second = replace(first.keep([2, 3]), logprobs=-torch.full((2, 2), 9.0), completions=[[8], [9]])
    scores = Scores(torch.arange(4.0), torch.ones(4, dtype=torch.bool), {}, {}, tokens=torch.ones(4, 4))
    joined, their_scores = grpo.join((first, scores), (second, scores.keep([0, 1])), torch.tensor([False, True]))
    assert joined.completions == [[5, 2], [6], [8], [9]]
    assert joined.logprobs.tolist() == [[-3.0, -3.0], [-4.0, -4.0], [-9.0, -9.0], [-9.0, -9.0]]
    assert their_scores.total.tolist() == [2.0, 3.0, 0.0, 1.0] and their_scores.tokens is None


@pytest.mark.parametrize("job", ["ppo-head", "rloo"])
def test_the_exact_kl_needs_a_forward(configure, train, job):
    full = dict(kl_estimator="full", max_steps=1) | (dict(kl_in="both") if job == "ppo-head" else {})
    with pytest.raises(ConfigError, match="recorded='on': expected off or auto: kl_estimator='full' needs a forward"):
        configure(job, recorded="on", **full)
    assert train(job, recorded="auto", **full).same_weights(train(job, recorded="off", **full))


# ------------------------------------------------------------------------------------------------------- the comparison


def ask(
    rollout: Rollout, logprobs: torch.Tensor, batches: Any = None, choice: str = "auto", values: Any = None, **more
):
    recorded, said = Recorded(choice), []
    run = SimpleNamespace(job="ppo", say=said.append)
    outputs = PolicyOutputs(logprobs=logprobs, values=values)

    def function(batch):
        rows = [[4, 5], [6]].index(batch.input_ids.tolist()[1:])
        return PolicyOutputs(*(None if t is None else t[rows : rows + 1] for t in (outputs.logprobs, None, values)))

    config = SimpleNamespace(micro_batch_size=1, minibatch_size=1)
    got = behaviour(rollout, config, function, batches, recorded, run, **more)
    return recorded, said, got


ROLLOUT = Rollout(
    prompts=[[1], [1]],
    completions=[[4, 5], [6]],
    logprobs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
    finished=torch.tensor([True, False]),
)


@pytest.mark.parametrize(("gap", "good"), [(0.0009, True), (-0.0009, True), (0.0011, False), (math.nan, False)])
def test_how_far_is_too_far(gap, good):
    forward = ROLLOUT.logprobs + torch.tensor([[0.0, gap], [0.0, 0.0]])
    recorded, said, got = ask(ROLLOUT, forward)
    assert recorded.good is good and len(said) == (not good)
    torch.testing.assert_close(got.logprobs, forward, equal_nan=True)  # this once in any case


def test_only_rows_that_were_asked_are_compared():
    wrong = ROLLOUT.logprobs + torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    assert ask(ROLLOUT, wrong, [torch.tensor([0])])[0].good
    assert not ask(ROLLOUT, wrong, [torch.tensor([0]), torch.tensor([1])])[0].good


def test_where_completions_have_the_ratio_their_sums_are_compared():
    for gaps, good, together in (([6e-4, 6e-4], True, False), ([2e-3, -2e-3], False, True)):
        forward = ROLLOUT.logprobs + torch.tensor([gaps, [0.0, 0.0]])
        assert ask(ROLLOUT, forward)[0].good is good
        assert ask(ROLLOUT, forward, whole=True)[0].good is together


def test_large_values_are_compared_by_their_size():
    values = torch.tensor([[500.0, 0.5], [2.0, 0.0]])
    rollout = replace(ROLLOUT, values=values + torch.tensor([[0.4, 0.0], [0.0, 0.0]]))
    assert ask(rollout, ROLLOUT.logprobs, values=values)[0].good
    rollout = replace(ROLLOUT, values=values + torch.tensor([[0.0, 0.4], [0.0, 0.0]]))
    assert not ask(rollout, ROLLOUT.logprobs, values=values)[0].good


# ------------------------------------------------------------------------------------------------------ the first epoch


def test_the_micro_batches_of_the_first_epoch():
    order = [torch.tensor(rows) for rows in ([3, 1], [0, 4], [2], [4, 1], [2, 3], [0])]
    assert [batch.tolist() for batch in first_epoch(order, 2)] == [[3, 1], [0, 4], [2]]
    assert [batch.tolist() for batch in first_epoch(order, 1)] == [[3], [1], [0], [4], [2]]
    assert [batch.tolist() for batch in first_epoch(order[:3], 9)] == [[3, 1], [0, 4], [2]]
    assert first_epoch([], 2) is None


# ------------------------------------------------------------------------ an engine whose numbers are not quite ours

ONE_UPDATE = dict(max_steps=1, rollout_epochs=1, minibatch_size=12, kl_coef=0.0, importance_max=1.5)


@pytest.mark.parametrize("job", ["ppo-head", "grpo", "rloo", "reinforce"])
def test_tokens_that_the_engine_found_too_unlikely_count_for_more(train, monkeypatch, job):
    """All are e times likelier than the engine says, so that every weight is cut off at 1.5; the gradient follows."""
    settings = ONE_UPDATE | dict(reward_function="tests.trainers.plain:vowels", importance="sequence")
    if job == "ppo-head":
        del settings["rollout_epochs"]
        settings |= dict(ppo_epochs=1, kl_target=None, value_coef=0.0, batch_size=12)
    plain = train(job, **settings | {"importance": "none"}).metrics[0]
    true = train(job, **settings).metrics[0]
    original = LOOPS[job].act

    def bent(*args, **options):
        rollout = original(*args, **options)
        return replace(rollout, logprobs=rollout.logprobs - 1)

    monkeypatch.setattr(LOOPS[job], "act", bent)
    weighed = train(job, **settings).metrics[0]
    assert "engine_weight" not in plain
    assert true.pop("engine_weight") == pytest.approx(1, abs=1e-5)
    assert true == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert weighed["engine_weight"] == pytest.approx(1.5)
    assert weighed["grad_norm"] == pytest.approx(1.5 * plain["grad_norm"], rel=1e-4)


def test_weights_by_hand():
    """Log-ratios of (log 2, -log 4 | log 8): tokens weigh 2, 1/4 | 8, cut to 3; sequences 1/2, 1/2 | 3."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = ROLLOUT.logprobs + torch.tensor([[2.0, 0.25], [8.0, 5.0]]).log()
    for level, expected in {"token": [[2.0, 0.25], [3.0, 0.0]], "sequence": [[0.5, 0.5], [3.0, 0.0]]}.items():
        config = SimpleNamespace(importance=level, importance_max=3.0)
        weights = engine_weights(logprobs, ROLLOUT, torch.tensor([0, 1]), mask, config)
        torch.testing.assert_close(weights, torch.tensor(expected))
        part = engine_weights(logprobs[1:], ROLLOUT, torch.tensor([1]), mask[1:], config)
        torch.testing.assert_close(part, torch.tensor(expected[1:]))
    assert engine_weights(logprobs, ROLLOUT, torch.tensor([0, 1]), mask, SimpleNamespace(importance="none")) is None


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        ("grpo", dict(importance="token", recorded="auto"), "importance='token': expected none with recorded"),
        ("grpo", dict(importance="token", loss="vespo"), "weights: 'vespo' bends its importance ratio"),
        (
            "rloo",
            dict(importance="token"),
            "importance='token': expected none or sequence, because a completion is one",
        ),
        ("ppo-head", dict(importance="words"), "importance='words': expected one of none, token, sequence"),
        ("ppo-head", dict(importance_max=1.0), "importance_max=1.0: expected more than 1, where weights start"),
    ],
    ids=str,
)
def test_weights_that_cannot_be(configure, job, changes, message):
    with pytest.raises(ConfigError) as caught:
        configure(job, **changes)
    assert str(caught.value).startswith(message)
