"""What a reward model minimises with margins, lists, steps and several heads; and that each learns what it is told."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_core.config import ConfigError, DataConfig, ModelConfig, OptimConfig
from rlhf_core.data.loader import load_examples, pack_rows
from rlhf_core.models.forward import sequence_scores, token_scores
from rlhf_core.models.load import load_reward_model, load_value_model
from rlhf_core.rollout.rewards import load_model_reward
from tests.trainers.plain import sweep

FAST, STILL = OptimConfig(lr=2e-2, schedule="constant"), OptimConfig(lr=1e-12)
SUBJECTS = ["solano", "kelano", "mutano", "vilano", "tavelu", "morelu", "binelu", "harelu", "galosh", "tirosh"]
WORDS = ["dolo", "misu", "kapi"]  # from the best to the worst


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(material, name: str, need: str, **options):
    """The model a run starts from, the examples of a file of the material, and all of them in one batch."""
    model, tokenizer = load_reward_model(material / "policy", seed=0, **options)
    examples = load_examples(DataConfig(path=material / f"{name}.jsonl"), tokenizer, need=need, model=model)
    return model, examples, pack_rows(examples)


def first_row(train, job: str, **changes):
    return train(job, batch_size=10, max_steps=1, optim=STILL, **changes).metrics[0]


# ------------------------------------------------------------------------------------------------------- the first loss


@pytest.mark.parametrize("margins", [True, False])
def test_margins_and_weights_of_pairs(train, material, margins):
    """sum w log(1 + exp(-(chosen - rejected - margin))) / sum w, in a plain loop."""
    model, examples, batch = start(material, "margins", "preference")
    scores = sequence_scores(model, batch).tolist()
    total = weight = 0.0
    for row, chosen, rejected in zip(examples, scores[0::2], scores[1::2], strict=True):
        gap = chosen - rejected - (row.margin if margins else 0)
        total += row.weight * (0.8 * math.log1p(math.exp(-gap)) + 0.2 * math.log1p(math.exp(gap)))
        weight += row.weight
    changes = dict(data=material / "margins.jsonl", center_coef=0, label_smoothing=0.2, margins=margins)
    for size in (None, 3):
        found = first_row(train, "reward", micro_batch_size=size, **changes)
        assert found["loss"] == pytest.approx(total / weight, rel=1e-5)
        assert found["margin"] == pytest.approx(
            sum(a - b for a, b in zip(scores[0::2], scores[1::2], strict=True)) / 10, rel=1e-4
        )


def test_lists_of_any_length(train, material):
    """At each place the chance of drawing the best that is left, in a plain loop."""
    model, examples, batch = start(material, "rankings", "ranking")
    scores = sequence_scores(model, batch).tolist()
    total = weight = right = pairs = 0.0
    gaps = []
    for row in examples:
        own, scores = scores[: len(row.completions)], scores[len(row.completions) :]
        for place in range(len(own)):
            total += row.weight * (math.log(sum(map(math.exp, own[place:]))) - own[place])
            right += sum(own[place] > other for other in own[place + 1 :])
            pairs += len(own) - place - 1
        weight += row.weight
        gaps.append(own[0] - own[-1])
    assert {len(row.completions) for row in examples} == {2, 3, 4}
    for size in (None, 3):
        found = first_row(train, "reward-rankings", micro_batch_size=size)
        assert found["loss"] == pytest.approx(total / weight, rel=1e-5)
        assert found["accuracy"] == pytest.approx(right / pairs)
        assert found["margin"] == pytest.approx(sum(gaps) / 10, rel=1e-4)


def test_steps_weigh_alike_whatever_the_answer(train, material):
    model, examples, batch = start(material, "steps", "process", steps=True)
    scores = token_scores(model, batch).tolist()
    losses, right = [], []
    for row, own in zip(examples, scores, strict=True):
        for end, label in zip(row.step_ends, row.step_labels, strict=True):
            losses.append(math.log1p(math.exp(-own[end] if label else own[end])))
            right.append((own[end] > 0) == label)
    for size in (None, 3):
        found = first_row(train, "reward-steps", micro_batch_size=size)
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found["accuracy"] == pytest.approx(sum(right) / len(right))


def test_each_member_of_an_ensemble_has_its_own_loss(train, material):
    """The mean of what three models of one head would have; metrics are the mean score's."""
    model, _, batch = start(material, "pairs", "preference", heads=3)
    members = sequence_scores(model, batch)
    gaps = (members[0::2] - members[1::2]).double()
    changes = dict(data=material / "pairs.jsonl", label_smoothing=0.0)
    found = first_row(train, "reward-ensemble", **changes)
    assert found["loss"] == pytest.approx((1 + (-gaps).exp()).log().mean().item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((gaps.mean(1) > 0).float().mean().item())
    assert found["disagreement"] == pytest.approx(gaps.std(1, correction=0).mean().item(), rel=1e-4)
    heads = model.score.weight
    assert all((heads[i] - heads[j]).abs().max() > 0.1 for i in range(3) for j in range(i))  # drawn apart


# ------------------------------------------------------------------------------------------------------------- learning


def ranked_file(folder, name: str, subjects: list[str], words: list[str], kind: str):
    """Subjects with every word, ranked; or in steps that are right where the word is the first."""
    rows = []
    for subject in subjects:
        answers = [f"{word} {subject}" for word in words]
        if kind == "rankings":
            rows.append({"prompt": f"{subject} peta", "completions": answers})
        else:
            for turn in range(3):
                order = answers[turn:] + answers[:turn]
                labels = [answer == answers[0] for answer in order]
                rows.append({"prompt": f"{subject} peta", "completions": order, "labels": labels})
    return write(folder / name, rows)


@pytest.mark.parametrize("kind", ["rankings", "steps"])
@pytest.mark.parametrize("words", sweep([WORDS, WORDS[::-1]], [WORDS]), ids=["", "reversed"])
def test_orders_and_steps_are_learned_and_so_are_their_opposites(train, tmp_path, kind, words):
    """On subjects that were not trained on."""
    data = ranked_file(tmp_path, "train.jsonl", SUBJECTS[:6], words, kind)
    evaluation = ranked_file(tmp_path, "evaluation.jsonl", SUBJECTS[6:], WORDS, kind)
    run = train(f"reward-{kind}", data=data, eval_data=evaluation, max_steps=40, epochs=40, optim=FAST)
    row = run.metrics[-1]
    if words is WORDS:
        assert row["eval_accuracy"] > 0.9
    else:
        assert row["eval_accuracy"] < 0.4 if kind == "rankings" else row["eval_accuracy_right"] < 0.2


def test_the_members_agree_on_what_they_have_learned(train, tmp_path):
    """Drawn apart, they come together on the data; the spread of the margin falls beside the margin itself."""
    rows = [
        {"prompt": f"{subject} peta", "chosen": f"dolo {subject}", "rejected": f"misu {subject}"}
        for subject in SUBJECTS
    ]
    data = write(tmp_path / "train.jsonl", rows)
    changes = dict(learn_from="pairs", label_smoothing=0.0, data=data, optim=FAST)
    metrics = train("reward-ensemble", max_steps=15, epochs=15, **changes).metrics
    assert metrics[-1]["accuracy"] == 1
    relative = [row["disagreement"] / abs(row["margin"]) for row in metrics]
    assert relative[-1] < 0.3 < relative[0]


def test_a_length_bias_is_in_the_report(train, tmp_path, capfd):
    """Trained where the longer answer is always better, and asked where it is not: it likes length, and says so."""
    short, long = "misu", "dolo mutano rena vilano peta"
    rows = [{"prompt": f"{subject} peta", "chosen": long, "rejected": short} for subject in SUBJECTS[:6]]
    others = [{"prompt": f"{subject} peta", "chosen": short, "rejected": long} for subject in SUBJECTS[6:8]]
    others += [{"prompt": f"{subject} peta", "chosen": long, "rejected": short} for subject in SUBJECTS[8:]]
    data, evaluation = write(tmp_path / "train.jsonl", rows), write(tmp_path / "evaluation.jsonl", others)
    run = train("reward", data=data, eval_data=evaluation, max_steps=15, epochs=15, optim=FAST, progress=True)
    row = run.metrics[-1]
    assert row["eval_accuracy"] == row["eval_chosen_longer"] == 0.5
    assert (row["eval_accuracy_longer"], row["eval_accuracy_shorter"], row["eval_prefers_longer"]) == (1, 0, 1)
    assert row["eval_length_correlation"] > 0.9
    assert row["eval_calibration_error"] > 0.3  # sure, and wrong in half
    said = capfd.readouterr().err
    assert "chosen is shorter            2     0.000" in said
    assert "the longer one: scored higher in 100%, chosen in 50% of pairs of unlike length" in said


# --------------------------------------------------------------------------------------------------- what it is read by


def test_an_ensemble_is_a_reward_with_a_lower_bound(plain_run, train, material):
    """The reward of PPO is the members' mean less so many deviations; and its critic may start from their mean."""
    folder = plain_run("reward-ensemble").folder
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    _, tokenizer = load_reward_model(folder)
    prompt = tokenizer("solano peta")["input_ids"]
    completion = tokenizer("dolo misu", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        members = plain(torch.tensor([prompt + completion])).logits[0]
    source = ModelConfig(path=folder)
    for coef in (0.0, 1.5):
        scores = load_model_reward(source, tokenizer, lcb_coef=coef)([prompt], [completion], [{}])
        expected = members.mean() - coef * members.std(correction=0)
        assert scores.total.item() == pytest.approx(expected.item(), abs=1e-5)
    critic = load_value_model(folder)
    batch = pack_rows(load_examples(DataConfig(path=material / "pairs.jsonl"), tokenizer, need="preference"))
    ours, _ = load_reward_model(folder)
    torch.testing.assert_close(sequence_scores(critic, batch), sequence_scores(ours, batch).mean(1))
    rows = [
        train("ppo-reward", reward_model=folder, reward_lcb=coef, max_steps=1).metrics[0]["score"] for coef in (0, 2)
    ]
    assert rows[1] < rows[0]


def test_a_process_reward_model_is_a_reward_too(plain_run, train):
    """Of the last step, at the end of the completion."""
    row = train("ppo-head", reward_model=plain_run("reward-steps").folder, max_steps=1).metrics[0]
    assert math.isfinite(row["score"])


def test_what_a_reward_model_can_go_on_from(plain_run, train, material):
    """Pairs, then steps, then pairs again: the trunk and the head's matrix are kept, the bias comes and goes."""
    pairs = plain_run("reward").folder
    steps = train("reward-steps", model=pairs, max_steps=1, optim=STILL).folder
    back = train("reward", model=steps, max_steps=1, optim=STILL).folder
    models = [load_reward_model(folder)[0] for folder in (pairs, steps, back)]
    assert [type(model).__name__.removeprefix("LlamaFor") for model in models] == [
        "SequenceClassification", "TokenClassification", "SequenceClassification",
    ]  # fmt: skip
    assert abs(models[1].score.bias.item()) < 1e-9  # it had none, and starts from 0
    for model in models[1:]:
        torch.testing.assert_close(model.score.weight, models[0].score.weight)
    ensemble = plain_run("reward-ensemble").folder
    assert load_reward_model(ensemble)[0].score.out_features == 3
    train("reward", model=ensemble, max_steps=1)  # as many as there are
    with pytest.raises(ValueError, match="has 3 score heads; an ensemble of 2 starts from a policy, or from 2"):
        train("reward", model=ensemble, ensemble=2)
    with pytest.raises(ValueError, match="is an ensemble of 3 score heads; a process reward model starts from one"):
        train("reward-steps", model=ensemble)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn_from": "steps", "center_coef": 0, "ensemble": 2}, "ensemble=2: expected 1 with learn_from='steps'"),
        ({"learn_from": "rankings", "center_coef": 0.1}, "center_coef=0.1: expected 0, but for learn_from='pairs'"),
        (
            {"learn_from": "steps", "center_coef": 0, "label_smoothing": 0.1},
            "label_smoothing=0.1: expected 0, but for learn_from='pairs'",
        ),
    ],
)
def test_settings_that_contradict_each_other(configure, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("reward", **changes)


def test_an_untrained_head_is_no_reward(configure, train, material):
    with pytest.raises(ValueError, match="policy is no reward model: expected one with a trained score head"):
        train("ppo-head", reward_model=material / "policy")
    with pytest.raises(ValueError, match="reward_lcb=1.0: the reward model has one head, expected an ensemble, or 0"):
        train("ppo-head", reward_lcb=1.0)


def test_data_of_another_kind_is_named(train, material):
    with pytest.raises(ValueError, match="the data look like answers in steps, each with a label"):
        train("reward", data=material / "steps.jsonl")
    with pytest.raises(ValueError, match="the data look like preference pairs; that is for rlhf dpo or rlhf reward"):
        train("reward-steps", data=material / "pairs.jsonl")
