"""RRHF: lists, metrics and whole updates by hand with plain transformers."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_core.config import ConfigError, OptimConfig, SamplingConfig
from rlhf_core.trainers import rrhf
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

PICKY, SILENT, VOWELS, BY_PROMPT = (
    f"tests.trainers.plain:{name}" for name in ("picky", "silent", "vowels", "by_prompt")
)
SLOW = OptimConfig(lr=0.01, schedule="constant", max_grad_norm=None)
WHOLE = dict(batch_size=10, minibatch_size=10, rollout_epochs=1, max_steps=1, optim=SLOW)
POLICY_ONLY = {"entropy", "approx_kl", "ratio_max"}  # metrics of a policy gradient


def rrhf_by_hand(logprobs: list, score: list[float], nll_coef: float):
    """The difference of mean log-probs where the worse completion is more likely, and the NLL of the best."""
    best = max(range(len(score)), key=score.__getitem__)
    loss = -nll_coef * logprobs[best].sum()
    for i, better in enumerate(score):
        for j, worse in enumerate(score):
            if better > worse:
                loss = loss + max(logprobs[j].mean() - logprobs[i].mean(), torch.tensor(0.0))
    return loss


def plackett_luce_by_hand(ratios: list, score: list[float], beta: float):
    """The best is drawn from all, the second from the rest, ..."""
    order = sorted(range(len(score)), key=lambda i: -score[i])
    values = [beta * ratios[i] for i in order]
    return sum(torch.stack(values[k:]).logsumexp(0) - values[k] for k in range(len(values)))


UPDATES = {
    "rrhf": {},
    "rrhf of four, micro-batches": dict(num_generations=4, micro_batch_size=3),
    "rrhf, cooler": dict(sampling=SamplingConfig(max_new_tokens=6, temperature=0.7)),
    "rrhf by rank alone": dict(loss_options={"nll_coef": 0.0}),
    "rrhf with a missing-EOS penalty": dict(score__missing_eos="subtract", score__missing_eos_penalty=1.5),
    "plackett_luce": dict(loss="plackett_luce", beta=0.5),
}


@pytest.mark.parametrize("name", UPDATES)
def test_metrics_and_two_updates_by_hand(train, material, talker, monkeypatch, name):
    """Two passes over one rollout by gradient descent. Some scores do not exist."""
    settings = {"sampling": SamplingConfig(max_new_tokens=6), "num_generations": 3} | UPDATES[name]
    size, temperature = settings["num_generations"], settings["sampling"].temperature
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "rrhf", reward_function=PICKY, model=talker, reference=material / "policy",
        **WHOLE | {"rollout_epochs": 2} | settings,
    )  # fmt: skip
    policy, rollout, scores = copy.deepcopy(played[0].policy), played[0].rollout, scored[0]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    ref = all_logprobs(reference, rollout, temperature)
    penalty = settings.get("score__missing_eos_penalty", 0.0)
    score = [
        total - penalty * (ids[-1] != 2) for total, ids in zip(scores.total.tolist(), rollout.completions, strict=True)
    ]
    groups = [[row for row in range(first, first + size) if scores.valid[row]] for first in range(0, 10 * size, size)]
    lists = [rows for rows in groups if len(rows) > 1]
    assert len(lists) > 2 and len({len(rows) for rows in lists}) > 1

    norms, losses, right, told = [], [], 0.0, 0
    for _ in (1, 2):
        objective = 0.0
        for rows in lists:
            new = {
                row: token_logprobs(policy, rollout.prompts[row], rollout.completions[row], temperature)[0]
                for row in rows
            }
            ratio = {row: (new[row] - ref[row]).sum() for row in rows}
            own = [score[row] for row in rows]
            if settings.get("loss"):
                objective += plackett_luce_by_hand([ratio[row] for row in rows], own, 0.5) / len(lists)
                height = {row: ratio[row].item() for row in rows}
            else:
                loss = rrhf_by_hand(
                    [new[row] for row in rows], own, settings.get("loss_options", {}).get("nll_coef", 1.0)
                )
                objective += loss / len(lists)
                height = {row: new[row].sum().item() for row in rows}
            decided = [(i, j) for i in rows for j in rows if score[i] > score[j]]
            told += len(decided)
            right += sum(height[i] > height[j] for i, j in decided)
        losses.append(objective.item())
        norms.append(step_downhill(policy, objective, 0.01))
    assert largest_difference(policy, run.folder) < 2e-5
    assert largest_difference(played[0].policy, run.folder) > 1e-3

    expected = expected_metrics(played[0], scores, reference, temperature)
    expected = {name: value for name, value in expected.items() if name not in POLICY_ONLY} | {
        "loss": mean(losses),
        "accuracy": right / told,
        "kept": len(lists) / 10,
        "flat_groups": sum(len({score[row] for row in rows}) < 2 for rows in groups),
        "skipped": 0,
        "grad_norm": mean(norms),
        "lr": 0.01,
    }
    (row,) = run.metrics
    assert row.keys() == expected.keys() | {"step"}
    for metric, value in expected.items():
        assert row[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric


# ------------------------------------------------------------------------------------------------------------ it learns


def please(train, function: str = "likes", **changes) -> tuple[float, float]:
    """Liked words a completion at the start and at the end."""
    settings = dict(
        batch_size=20, num_generations=4, minibatch_size=10, rollout_epochs=2, max_steps=12, epochs=99,
        optim=OptimConfig(lr=1e-2, schedule="constant"), sampling=SamplingConfig(max_new_tokens=4),
    )  # fmt: skip
    run = train("rrhf", reward_function=f"lumo_rewards:{function}", **settings | changes)
    sign = -1 if function == "dislikes" else 1
    scores = [sign * row["score"] for row in run.metrics]
    return scores[0], mean(scores[-3:])


@pytest.mark.parametrize("changes", [{}, {"loss": "plackett_luce"}], ids=str)
def test_it_says_what_is_rewarded_more_often(train, changes):
    start, end = please(train, **changes)
    assert start < 0.5
    assert end > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"loss": "plackett_luce"}], ids=str)
def test_with_its_reward_negated_it_does_not(train, changes):
    start, end = please(train, "dislikes", **changes)
    assert end <= start < 0.5


@pytest.mark.slow
def test_with_its_ranks_turned_round_it_does_not(train, monkeypatch):
    original = rrhf.ranked_preference_loss

    def turned(*args, scores=None, **options):
        return original(*args, scores=scores if scores is None else -scores, **options)

    monkeypatch.setattr(rrhf, "ranked_preference_loss", turned)
    start, end = please(train)
    assert end <= start


# ----------------------------------------------------------------------------------------------------------- bad luck


def test_a_step_without_a_list_is_skipped_and_counted(train, material):
    run = train("rrhf", max_steps=2, eval_data=material / "prompts.jsonl", reward_function=SILENT)
    for row, prompts in zip(run.metrics, (6, 4), strict=True):
        assert row["skipped"] == 1 and row["kept"] == 0 and row["excluded"] == 3 * prompts
        assert not {"loss", "accuracy", "grad_norm", "lr"} & row.keys()
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), run.folder) == 0


def test_where_all_score_alike_only_the_first_is_learned(train, material, monkeypatch):
    """By rrhf, which has a best one anyhow; by rank alone nothing is."""
    equal = dict(reward_function="lumo_rewards:always_one", max_steps=2)
    learned, still = train("rrhf", **equal), train("rrhf", loss_options={"nll_coef": 0.0}, **equal)
    for run in (learned, still):
        assert [row["flat_groups"] for row in run.metrics] == [6, 4]
        assert all(row["kept"] == 1 and "accuracy" not in row for row in run.metrics)
    assert all(row["grad_norm"] > 0 for row in learned.metrics)
    assert all(row["grad_norm"] == 0 for row in still.metrics)
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), still.folder) == 0


def test_some_flat_groups_are_counted(train):
    row = train("rrhf", reward_function=BY_PROMPT, batch_size=10, max_steps=1).metrics[0]
    assert 0 < row["flat_groups"] < 10 and row["kept"] == 1
    assert 0 <= row["accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations=1: expected 2 or more"),
        ({"loss": "rhrf"}, "loss='rhrf': expected one of .*; did you mean rrhf"),
        ({"loss_options": {"nll_coef": -1.0}}, "nll_coef=-1.0: expected 0 or more"),
        (
            {"loss": "plackett_luce", "loss_options": {"nll_coef": 1.0}},
            "loss_options='nll_coef:1.0': expected an option of plackett_luce: there is none",
        ),
        ({"loss": "plackett_luce", "beta": 0.0}, "beta=0.0: expected more than 0"),
        (
            {"score__missing_eos": "subtract", "score__missing_eos_penalty": -0.1},
            "score.missing_eos_penalty=-0.1: expected 0 or more",
        ),
        ({"rollout_epochs": 0}, "rollout_epochs=0: expected more than 0"),
    ],
)
def test_invalid_settings(configure, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("rrhf", **changes)
