"""Online DPO and XPO: pairs, metrics and whole updates by hand with plain transformers; and pairs that are none."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_core.config import ConfigError, OptimConfig, SamplingConfig
from rlhf_core.rollout.experience import Experience
from rlhf_core.trainers import online_dpo
from rlhf_core.trainers.online_dpo import best_and_worst
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

PICKY, SILENT, VOWELS = (f"tests.trainers.plain:{name}" for name in ("picky", "silent", "vowels"))
BY_PROMPT = "tests.trainers.plain:by_prompt"
LIKES, ALWAYS_ONE = "lumo_rewards:likes", "lumo_rewards:always_one"
SLOW = OptimConfig(lr=0.05, schedule="constant", max_grad_norm=None)
WHOLE = dict(batch_size=10, minibatch_size=10, rollout_epochs=1, max_steps=1, optim=SLOW)
POLICY_ONLY = {"entropy", "approx_kl", "ratio_max"}  # metrics of a policy gradient


def pairs_by_hand(rollout, scores, size: int, penalty: float = 0.0) -> tuple[list[tuple[int, int]], int]:
    """Rows of the best and of the worst completion of each prompt that has two scores which differ; and ties."""
    pairs, ties = [], 0
    for first in range(0, len(rollout.completions), size):
        rows = [row for row in range(first, first + size) if scores.valid[row]]
        score = {row: scores.total[row].item() - penalty * (rollout.completions[row][-1] != 2) for row in rows}
        if len(rows) > 1 and max(score.values()) > min(score.values()):
            pairs.append((max(rows, key=score.get), min(rows, key=score.get)))
        elif len(rows) > 1:
            ties += 1
    return pairs, ties


def loss_by_hand(loss: str, beta: float, policy, ref: list, rows, rollout, temperature: float):
    """Of one pair, with gradient; its implicit rewards; and the log-probs of both sides."""
    logprobs = [token_logprobs(policy, rollout.prompts[row], rollout.completions[row], temperature)[0] for row in rows]
    ratios = [(new - ref[row]).sum() for new, row in zip(logprobs, rows, strict=True)]
    if loss == "ipo":
        ratios = [ratio / len(rollout.completions[row]) for ratio, row in zip(ratios, rows, strict=True)]
        value = (ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2
    else:
        value = (1 + (-beta * (ratios[0] - ratios[1])).exp()).log()
    return value, [beta * ratio.item() for ratio in ratios], [each.sum().item() for each in logprobs]


UPDATES = {
    "sigmoid": dict(num_generations=3),
    "sigmoid of two, micro-batches": dict(num_generations=2, micro_batch_size=3),
    "sigmoid, cooler": dict(num_generations=3, sampling=SamplingConfig(max_new_tokens=6, temperature=0.7)),
    "sigmoid with a missing-EOS penalty": dict(
        num_generations=3, score__missing_eos="subtract", score__missing_eos_penalty=1.5
    ),
    "ipo": dict(num_generations=3, beta=0.3),
}


@pytest.mark.parametrize("name", UPDATES)
def test_metrics_and_two_updates_by_hand(train, material, talker, monkeypatch, name):
    """Two passes over one rollout by gradient descent, away from the reference. Some scores do not exist."""
    settings = {"sampling": SamplingConfig(max_new_tokens=6), "beta": 0.5} | UPDATES[name]
    loss, size, temperature = name[:7].split(" ")[0], settings["num_generations"], settings["sampling"].temperature
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "online-dpo", reward_function=PICKY, model=talker, reference=material / "policy", loss=loss,
        **WHOLE | {"rollout_epochs": 2} | settings,
    )  # fmt: skip
    policy, rollout, scores = copy.deepcopy(played[0].policy), played[0].rollout, scored[0]
    reference = AutoModelForCausalLM.from_pretrained(material / "policy")
    pairs, ties = pairs_by_hand(rollout, scores, size, settings.get("score__missing_eos_penalty", 0.0))
    if "score__missing_eos_penalty" in settings:
        assert pairs != pairs_by_hand(rollout, scores, size)[0]  # else the penalty is not seen
    assert 3 < len(pairs) < 10
    ref = all_logprobs(reference, rollout, temperature)

    norms, losses, rewards, logprobs = [], [], [], []
    for _ in (1, 2):
        terms = [loss_by_hand(loss, settings["beta"], policy, ref, rows, rollout, temperature) for rows in pairs]
        objective = sum(value for value, _, _ in terms) / len(pairs)
        losses.append(objective.item())
        rewards += [both for _, both, _ in terms]
        logprobs += [both for _, _, both in terms]
        norms.append(step_downhill(policy, objective, 0.05))
    assert largest_difference(policy, run.folder) < 2e-5
    assert largest_difference(played[0].policy, run.folder) > 1e-3

    expected = expected_metrics(played[0], scores, reference, temperature)
    expected = {name: value for name, value in expected.items() if name not in POLICY_ONLY} | {
        "loss": mean(losses),
        "accuracy": mean([float(chosen > rejected) for chosen, rejected in rewards]),
        "margin": mean([chosen - rejected for chosen, rejected in rewards]),
        "chosen_reward": mean([chosen for chosen, _ in rewards]),
        "rejected_reward": mean([rejected for _, rejected in rewards]),
        "kept": len(pairs) / 10,
        "ties": ties,
        "skipped": 0,
        "grad_norm": mean(norms),
        "lr": 0.05,
    }
    if loss != "ipo":  # there they are means over tokens
        expected["chosen_logprob"] = mean([chosen for chosen, _ in logprobs])
        expected["rejected_logprob"] = mean([rejected for _, rejected in logprobs])
    (row,) = run.metrics
    assert row.keys() == expected.keys() | {"step", "chosen_logprob", "rejected_logprob"}
    for metric, value in expected.items():
        assert row[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_an_update_of_xpo_by_hand(train, material, talker, monkeypatch, micro_batch_size):
    """A completion of the policy against one of the reference, whose log-prob is pressed down."""
    played, scored = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "online-dpo", reward_function=VOWELS, model=talker, reference=material / "policy", xpo_alpha=0.2, beta=0.5,
        num_generations=2, sampling=SamplingConfig(max_new_tokens=6), micro_batch_size=micro_batch_size, **WHOLE,
    )  # fmt: skip
    (own, other), scores = played, scored[0]
    assert own.purpose == ("rollout", 1) and other.purpose == ("reference", 1)
    policy, reference = copy.deepcopy(own.policy), AutoModelForCausalLM.from_pretrained(material / "policy")
    assert largest_difference(other.policy, material / "policy") == 0
    assert own.rollout.prompts == other.rollout.prompts and own.rollout.completions != other.rollout.completions
    ref = [all_logprobs(reference, side.rollout) for side in played]

    objective, wins, explored, pairs = 0.0, 0, [], 0
    for i in range(10):
        if not (scores.valid[2 * i] and scores.valid[2 * i + 1]) or scores.total[2 * i] == scores.total[2 * i + 1]:
            continue
        new = [token_logprobs(policy, own.rollout.prompts[i], side.rollout.completions[i])[0] for side in played]
        ours, theirs = ((new[k] - ref[k][i]).sum() for k in (0, 1))
        won = bool(scores.total[2 * i] > scores.total[2 * i + 1])
        objective += -F.logsigmoid(0.5 * (ours - theirs) * (1 if won else -1)) + 0.2 * new[1].sum()
        explored.append(new[1].sum().item())
        wins, pairs = wins + won, pairs + 1
    assert 0 < wins < pairs
    norm = step_downhill(policy, objective / pairs, 0.05)
    assert largest_difference(policy, run.folder) < 2e-5

    (row,) = run.metrics
    halves = scores._replace(total=scores.total[::2], valid=scores.valid[::2])
    expected = expected_metrics(own, halves, reference, 1.0)
    expected = {name: value for name, value in expected.items() if name not in POLICY_ONLY} | {
        "loss": objective.item() / pairs,
        "explored_logprob": mean(explored),
        "win_rate": wins / pairs,
        "kept": pairs / 10,
        "grad_norm": norm,
    }
    for metric, value in expected.items():
        assert row[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric


def test_the_bonus_of_xpo_leaves_the_reference(train, talker):
    def explored(alpha: float) -> float:
        run = train(
            "online-dpo", reward_function=VOWELS, model=talker, xpo_alpha=alpha, num_generations=2, max_steps=12,
            optim=OptimConfig(lr=3e-3, schedule="constant"), epochs=99,
        )  # fmt: skip
        return mean([row["explored_logprob"] for row in run.metrics[-3:]])

    assert explored(0.3) < explored(0.0) - 1


def test_the_reference_stops_where_the_policy_does(train, material, tmp_path, monkeypatch):
    """Whatever its own generation settings have: completions are compared that were ended alike."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for path in (material / "policy").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    GenerationConfig(eos_token_id=[*range(3, 40)]).save_pretrained(folder)
    played, _ = record(monkeypatch)
    run = train("online-dpo", reward_function=VOWELS, reference=folder, xpo_alpha=0.1, num_generations=2, max_steps=1)
    assert max(map(len, played[1].rollout.completions)) == 5
    assert [ids[-1] == 2 for ids in played[1].rollout.completions] == played[1].rollout.finished.tolist()
    assert run.metrics[0]["kept"] > 0


# ------------------------------------------------------------------------------------------------------------ it learns


def please(train, **changes) -> tuple[float, float]:
    """Liked words a completion at the start and at the end, counted on evaluation draws where only a judge looks on."""
    settings = dict(
        batch_size=40, num_generations=2, minibatch_size=40, rollout_epochs=2, max_steps=12, epochs=99, beta=0.1,
        optim=OptimConfig(lr=1e-2, schedule="constant"), sampling=SamplingConfig(max_new_tokens=4),
    )  # fmt: skip
    run = train("online-dpo", **settings | changes)
    return run.metrics[0]["score"], mean([row["score"] for row in run.metrics[-3:]])


LEARNERS = {"sigmoid": {}, "ipo": dict(loss="ipo", beta=0.1), "best and worst of four": dict(num_generations=4),
            "xpo": dict(xpo_alpha=1e-3)}  # fmt: skip


@pytest.mark.parametrize("name", sweep(LEARNERS, ("sigmoid",)))
def test_it_says_what_is_rewarded_more_often(train, name):
    start, end = please(train, reward_function=LIKES, **LEARNERS[name])
    assert start < 0.5
    assert end > 1.0


@pytest.mark.slow
def test_with_its_reward_negated_it_does_not(train):
    start, end = please(train, reward_function="lumo_rewards:dislikes")
    assert end >= start > -0.5  # of minus the liked words
    assert end > -0.1


@pytest.mark.slow
def test_with_its_pairs_turned_round_it_does_not(train, monkeypatch):
    original = online_dpo.best_and_worst

    def turned(*args):
        pairs, ties = original(*args)
        return pairs.flip(1), ties

    monkeypatch.setattr(online_dpo, "best_and_worst", turned)
    start, end = please(train, reward_function=LIKES)
    assert end <= start


@pytest.mark.parametrize("judge", ["likes", "dislikes"])
def test_it_learns_from_a_judge_what_it_likes(train, material, judge):
    run = train(
        "online-dpo", judge=f"tests.trainers.judges:{judge}", batch_size=40, num_generations=2, minibatch_size=40,
        rollout_epochs=2, max_steps=12, epochs=99, optim=OptimConfig(lr=1e-2, schedule="constant"),
        sampling=SamplingConfig(max_new_tokens=4), eval_data=material / "prompts.jsonl",
    )  # fmt: skip
    if judge == "likes":  # the other finds few dolos to be against
        assert run.metrics[-1]["eval_win_rate"] > 0.75
    words = json.loads((material / "policy" / "tokenizer.json").read_text())["model"]["vocab"]
    after, before = (
        AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[1]])).logits[0, -1].log_softmax(-1)[words["dolo"]]
        for folder in (run.folder, material / "policy")
    )
    assert after > before + 1 if judge == "likes" else after < before - 1


# ------------------------------------------------------------------------------------------------------------ the judge


def test_a_judge_decides_which_is_chosen(train, material, talker, monkeypatch):
    """Each update by hand, though the judge is shown the two in an order by lot; it does not say of some."""
    played, _ = record(monkeypatch)
    descend(monkeypatch)
    run = train(
        "online-dpo", judge="tests.trainers.judges:alphabet", model=talker, reference=material / "policy", beta=0.5,
        num_generations=2, sampling=SamplingConfig(max_new_tokens=6), **WHOLE,
    )  # fmt: skip
    policy, rollout = copy.deepcopy(played[0].policy), played[0].rollout
    ref = all_logprobs(AutoModelForCausalLM.from_pretrained(material / "policy"), rollout)
    tokenizer = AutoTokenizer.from_pretrained(material / "policy")
    texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
    prompts = tokenizer.batch_decode(rollout.prompts, skip_special_tokens=True)
    pairs = []
    for first in range(0, 20, 2):
        if "h" not in prompts[first] and texts[first] != texts[first + 1]:
            pairs.append(sorted((first, first + 1), key=texts.__getitem__, reverse=True))
    assert 3 < len(pairs) < 10
    assert 0 < sum(rows[0] % 2 for rows in pairs) < len(pairs)
    objective = sum(loss_by_hand("sigmoid", 0.5, policy, ref, rows, rollout, 1.0)[0] for rows in pairs) / len(pairs)
    norm = step_downhill(policy, objective, 0.05)
    assert largest_difference(policy, run.folder) < 2e-5
    (row,) = run.metrics
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert row["kept"] == len(pairs) / 10 and row["ties"] == 10 - len(pairs)
    assert row["length"] == mean([len(completion) for completion in rollout.completions])
    assert not {"score", "score_std", "excluded"} & row.keys()  # nobody scored


def test_evaluation_prompts_are_judged_against_the_reference(train, material):
    """Two runs of weights that hold still: the reference against itself, by a judge who always decides, or never."""
    still = dict(eval_data=material / "prompts.jsonl", max_steps=1, num_generations=2, optim=OptimConfig(lr=1e-12))
    row = train("online-dpo", judge="tests.trainers.judges:alphabet", **still).metrics[0]
    assert 0.1 < row["eval_win_rate"] < 0.9
    assert row["eval_kl"] == pytest.approx(0, abs=1e-5)
    row = train("online-dpo", judge="tests.trainers.judges:undecided", **still).metrics[0]
    assert row["eval_win_rate"] == 0.5
    assert {name for name in row if name.startswith("eval_")} == {"eval_win_rate", "eval_kl"}


def test_a_judge_that_does_not_answer_stops_the_run(train):
    with pytest.raises(ValueError, match=r"judge tests.trainers.judges:talkative: pair 0 got 'the first, I think'"):
        train("online-dpo", judge="tests.trainers.judges:talkative", num_generations=2)


@pytest.mark.parametrize(
    "source",
    [{"reward_function": VOWELS, "xpo_alpha": 0.1}, {"judge": "tests.trainers.judges:alphabet"}],
    ids=["xpo", "judge"],
)
def test_it_is_resumed_to_the_bit(configure, train, train_with_stops, source):
    settings = dict(num_generations=2, max_steps=3, **source)
    whole, stopped = train("online-dpo", **settings), train_with_stops(configure("online-dpo", **settings), [1, 2])
    assert stopped.same_weights(whole)
    assert stopped.metrics == whole.metrics


# ------------------------------------------------------------------------------------------------- pairs that are none


def scored(*groups: list[float | None]) -> Experience:
    """Completions of one token, with these scores."""
    flat = [score for group in groups for score in group]
    tokens, finished = [[1]] * len(flat), torch.ones(len(flat), dtype=torch.bool)
    experience = Experience.sampled(tokens, tokens, torch.zeros(len(flat), 1), finished, group_size=len(groups[0]))
    experience = replace(experience, scores=torch.tensor([score or 0.0 for score in flat]))
    return experience.exclude(torch.tensor([score is None for score in flat]))


def test_the_best_and_the_worst():
    """The first of several; those without a score are neither, and a group needs two that differ."""
    pairs, ties = best_and_worst(
        scored([1, 3, 2], [None, -2, -1], [5, 5, 5], [None, 4, None], [None, 0, 0], [2, 2, 1], [None] * 3)
    )
    assert pairs.tolist() == [[1, 0], [5, 4], [15, 17]]
    assert ties == 2


@pytest.mark.parametrize(
    ("source", "ties"),
    [({"reward_function": ALWAYS_ONE}, 6), ({"reward_function": SILENT}, 0),
     ({"judge": "tests.trainers.judges:undecided"}, 6), ({"reward_function": ALWAYS_ONE, "xpo_alpha": 0.1}, 6)],
    ids=str,
)  # fmt: skip
def test_a_step_without_a_pair_is_skipped_and_counted(train, material, source, ties):
    run = train("online-dpo", num_generations=2, max_steps=2, eval_data=material / "prompts.jsonl", **source)
    for row, share in zip(run.metrics, (1, 4 / 6), strict=True):
        assert row["skipped"] == 1 and row["kept"] == 0 and row["ties"] == ties * share
        assert not {"loss", "grad_norm", "lr", "accuracy"} & row.keys()
        assert row["excluded"] == (12 * share if SILENT in source.values() else 0) if "judge" not in source else True
    assert largest_difference(AutoModelForCausalLM.from_pretrained(material / "policy"), run.folder) == 0
    assert run.metrics[-1]["eval_kl"] == pytest.approx(0, abs=1e-5)


def test_a_step_with_some_pairs_is_not_skipped(train):
    row = train("online-dpo", num_generations=2, reward_function=BY_PROMPT, batch_size=10, max_steps=1).metrics[0]
    assert 0 < row["kept"] < 1 and row["skipped"] == 0
    assert row["ties"] == 10 - round(10 * row["kept"])
    assert row["grad_norm"] > 0


def test_when_every_completion_is_truncated_the_penalty_changes_nothing(train):
    cut = dict(
        reward_function=VOWELS, sampling=SamplingConfig(max_new_tokens=2), max_steps=1, num_generations=2, seed=1
    )
    free, penalised = (
        train("online-dpo", score__missing_eos="subtract", score__missing_eos_penalty=penalty, **cut)
        for penalty in (0.0, 2.0)
    )
    assert free.metrics[0]["eos_rate"] == 0
    assert free.same_weights(penalised)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations=1: expected 2 or more"),
        ({"num_generations": 3, "judge": "a:b"}, "num_generations=3: expected 2, because judge='a:b' compares two"),
        ({"num_generations": 3, "xpo_alpha": 0.1}, "num_generations=3: expected 2, because xpo_alpha=0.1 compares two"),
        ({"judge": "a:b", "reward_function": LIKES}, "judge='a:b': expected a judge or a reward, not both"),
        ({"judge": "a:b", "reward_weights": (1.0,)}, "judge='a:b': expected a judge or a reward, not both"),
        (
            {"judge": "a:b", "num_generations": 2, "score__missing_eos": "subtract", "score__missing_eos_penalty": 1.0},
            "score=.*: expected the defaults, because a judge gives no scores",
        ),
        (
            {"score__missing_eos": "subtract", "score__missing_eos_penalty": -1.0},
            "score.missing_eos_penalty=-1.0: expected 0 or more",
        ),
        ({"xpo_alpha": -1.0, "num_generations": 2}, "xpo_alpha=-1.0: expected 0 or more, or none"),
        ({"rollout_epochs": 0}, "rollout_epochs=0: expected more than 0"),
        ({"loss": "sigmoyd"}, "loss='sigmoyd': expected one of .*; did you mean sigmoid"),
        ({"loss": "odpo"}, "loss 'odpo' needs ref_chosen_logprobs and ref_rejected_logprobs and margin|needs margin"),
        ({"beta": 0.0}, "beta=0.0: expected more than 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1: not defined for 'ipo'"),
        ({"loss": "aot", "micro_batch_size": 2}, "micro_batch_size=2: expected none, because loss='aot' looks across"),
    ],
)
def test_invalid_settings(configure, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("online-dpo", **changes)


def test_something_must_rank(material):
    with pytest.raises(ConfigError, match="reward_model, reward_function, checker, judge: expected at least one"):
        online_dpo.OnlineDPOConfig(model=material / "policy", data=material / "prompts.jsonl", output="nowhere")


@pytest.mark.parametrize(
    ("judge", "message"),
    [("lumo_rewards", "expected module:function"), ("no_such_module:f", "No module named"),
     ("lumo_rewards:adores", "has no function adores")],
)  # fmt: skip
def test_a_judge_that_is_not_there(train, judge, message):
    with pytest.raises(ValueError, match=message):
        train("online-dpo", judge=judge, num_generations=2)
