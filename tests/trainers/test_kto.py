"""KTO and its kin: labels, the reference point from mismatched rows, classes of any share, pairs as rows."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf_core import cli
from rlhf_core.config import ConfigError, DataConfig, OptimConfig
from rlhf_core.data.formats import DataError
from rlhf_core.data.labelled import SplitPairs, mismatched_rows
from rlhf_core.data.loader import load_examples
from rlhf_core.losses.unpaired import UNPAIRED_LOSSES
from rlhf_core.models.load import load_policy
from tests.trainers.plain import sweep

FAST = OptimConfig(lr=2e-2, schedule="constant")
SUBJECTS = ["solano", "kelano", "mutano", "vilano", "tavelu", "morelu", "binelu", "harelu", "galosh", "tirosh"]


def answers(folder, name: str, subjects: list[str], *, swapped: bool = False, share: int = 1):
    """Prompts answered with a liked or a disliked word, labelled; `share` bad rows to a good one."""
    rows = []
    for i, subject in enumerate(subjects):
        good = i % (share + 1) == 0
        completion = f"{'dolo' if good else 'misu'} {subject}"
        rows.append({"prompt": f"{subject} peta", "completion": completion, "label": good != swapped})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_logprob(model, prompt: list[int], completion: list[int]) -> float:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum().item()


@pytest.mark.parametrize("loss", sweep(sorted(UNPAIRED_LOSSES), ("kto",)))
def test_every_unpaired_loss_learns_the_labels_and_their_opposite(train, tmp_path, loss):
    """On evaluation subjects, with one good row to two bad ones."""
    evaluation = answers(tmp_path, "evaluation.jsonl", SUBJECTS[6:], share=1)
    for swapped in (False, True):
        data = answers(tmp_path, "train.jsonl", SUBJECTS[:6], swapped=swapped, share=2)
        shared = dict(data=data, eval_data=evaluation, loss=loss, max_steps=12, optim=FAST, desirable_weight=2.0)
        last = train("kto", **shared, undesirable_weight=1.0).metrics[-1]
        assert (last["eval_margin"] < -0.5) if swapped else (last["eval_margin"] > 0.5)


def test_it_runs_from_the_command_line(material, tmp_path):
    words = ["--model", material / "policy", "--data", material / "labelled.jsonl", "--output", tmp_path / "run",
             "--loss", "bco", "--loss-options", "delta:0.1", "--max-steps", "1", "--no-progress"]  # fmt: skip
    assert cli.main(["kto", *map(str, words)]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["job"] == "kto"


@pytest.mark.parametrize("swapped", [False, True])
def test_the_loss_and_the_reference_point_by_hand(train, material, plain_run, swapped):
    """From plain forwards of two models: each prompt with the completion of the row before, over the whole step.

    With the models swapped the estimate of the KL is negative, and the reference point is 0.
    """
    ours, other = plain_run("sft").folder, material / "policy"
    ours, other = (other, ours) if swapped else (ours, other)
    policy, tokenizer = load_policy(ours)
    reference, _ = load_policy(other)
    examples = load_examples(DataConfig(path=material / "labelled.jsonl"), tokenizer, need="unpaired")
    weights = dict(beta=0.5, desirable_weight=1.5, undesirable_weight=0.3)
    shared = dict(max_steps=1, batch_size=10, model=ours, reference=other, **weights)
    row = train("kto", **shared).metrics[0]
    # Who lends whom a completion follows from the order of the step.
    order = [examples[i] for i in _order(10, seed=0)]
    with torch.no_grad():

        def ratio(prompt, completion) -> float:
            return plain_logprob(policy, prompt, completion) - plain_logprob(reference, prompt, completion)

        mean = sum(ratio(order[i].prompt, order[i - 1].completions[0]) for i in range(10)) / 10
        ratios = [ratio(each.prompt, each.completions[0]) for each in order]
    kl = max(mean, 0.0)
    assert row["kl"] == pytest.approx(kl, rel=1e-4, abs=0)
    total, weight, right = 0.0, 0.0, 0
    for each, x in zip(order, ratios, strict=True):
        good = each.record.label
        value = 1 / (1 + math.exp(-0.5 * (x - kl) * (1 if good else -1)))
        total += each.weight * (1.5 if good else 0.3) * (1 - value)
        weight += each.weight
        right += (x > kl) == good
    assert row["loss"] == pytest.approx(total / weight, rel=1e-4)
    assert row["accuracy"] == pytest.approx(right / 10)
    rewards = {good: [0.5 * x for each, x in zip(order, ratios, strict=True) if each.record.label == good]
               for good in (True, False)}  # fmt: skip
    assert row["desirable_reward"] == pytest.approx(sum(rewards[True]) / 5, rel=1e-4)
    assert row["undesirable_reward"] == pytest.approx(sum(rewards[False]) / 5, rel=1e-4)
    assert mean < -0.01 if swapped else kl > 0.01


def _order(count: int, *, seed: int) -> list[int]:
    from rlhf_core.seeding import generator

    return torch.randperm(count, generator=generator(seed, "data", 0)).tolist()


def test_classes_of_any_share_have_their_own_means_whatever_the_micro_batches(train, tmp_path):
    """A micro-batch may have none of a class; so may a step."""
    data = answers(tmp_path, "train.jsonl", SUBJECTS, share=4)
    whole, parts = (
        train("kto", data=data, max_steps=4, batch_size=5, micro_batch_size=size, loss=loss).metrics
        for size, loss in ((None, "bco"), (2, "bco"))
    )
    for row, other in zip(whole, parts, strict=True):
        for name in row.keys() - ({"accuracy"} if row["step"] == 1 else set()):
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=2e-5), name
    only_bad = answers(tmp_path, "bad.jsonl", SUBJECTS, share=99)
    last = train("kto", data=DataConfig(path=only_bad, limit=8), max_steps=3, beta=0.5, optim=FAST).metrics[-1]
    assert last["loss"] < 0.3 * 0.5 + 0.05


def test_the_threshold_of_bco_is_the_mean_of_both_classes_before(train, material):
    """delta is logged; it is half the sum of the classes' running means over earlier steps, and 0 at first."""
    rows = train("kto", loss="bco", max_steps=4, batch_size=10, beta=0.5, optim=FAST).metrics
    assert rows[0]["delta"] == 0
    for number in range(1, 4):
        before = rows[:number]
        means = [sum(row[f"{side}_reward"] for row in before) / number for side in ("desirable", "undesirable")]
        assert rows[number]["delta"] == pytest.approx(sum(means) / 2, rel=1e-4, abs=1e-6)
    assert abs(rows[3]["delta"]) > 1e-3
    assert "delta" not in train("kto", loss="bco", max_steps=1, loss_options={"delta": 0.5}).metrics[0]


def test_pairs_are_two_labelled_rows_each(train, material, tmp_path):
    pairs = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}) + "\n"
            for pair in pairs
            for side in ("chosen", "rejected")
        )
    )
    shared = dict(eval_every=2, max_steps=4, batch_size=6)
    as_pairs = train("kto", data=material / "pairs.jsonl", eval_data=material / "pairs.jsonl", pairs=True, **shared)
    as_rows = train("kto", data=rows, eval_data=rows, **shared)
    assert as_pairs.same_weights(as_rows)
    assert as_pairs.metrics == as_rows.metrics
    with pytest.raises(DataError, match="pairs.jsonl"):
        train("kto", data=material / "pairs.jsonl")
    both = DataConfig(path=f"{material / 'pairs.jsonl'},{material / 'pairs.jsonl'}", weights=(1, 1))
    mixed = train("kto", data=both, pairs=True, epochs=1, max_steps=None, max_tokens_per_batch=30)
    tokens = json.loads((mixed.folder / "run.json").read_text())["data"]
    assert len(tokens) == 2 and len(mixed.metrics) > 40 / 6


def test_a_row_that_is_alone_borrows_a_completion_from_the_data(train, material):
    """Seven rows are steps of six and of one, whose reference point is not that of its own completion."""
    run = train("kto", data=DataConfig(path=material / "labelled.jsonl", limit=7), max_steps=4, optim=FAST)
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())
    with pytest.raises(ConfigError, match="batch_size=1: expected 2 or more, to mismatch rows"):
        train("kto", batch_size=1)
    with pytest.raises(DataError, match="one row; expected two or more"):
        train("kto", data=DataConfig(path=material / "labelled.jsonl", limit=1))
    train("kto", batch_size=1, loss="apo_zero_unpaired", max_steps=1)


def test_mismatched_rows_fit_the_model(material):
    _, tokenizer = load_policy(material / "policy")
    examples = load_examples(DataConfig(path=material / "labelled.jsonl"), tokenizer, need="unpaired")
    longest = max(len(each.prompt) + len(each.completions[0]) for each in examples)
    for max_length in (None, longest):
        rows = mismatched_rows(examples, examples, max_length)
        for number, (row, mixed) in enumerate(zip(examples, rows, strict=True)):
            assert mixed.completions == examples[number - 1].completions
            assert row.prompt[-len(mixed.prompt) :] == mixed.prompt
            assert max_length is None or len(mixed.prompt) + len(mixed.completions[0]) <= max_length
        assert (max_length is None) == all(a.prompt == b.prompt for a, b in zip(examples, rows, strict=True))
    (alone,) = mismatched_rows(examples[:1], examples, None)
    assert alone.completions == examples[1].completions


def test_no_prompt_is_given_an_answer_of_its_own_where_another_is_near(material):
    _, tokenizer = load_policy(material / "policy")
    rows = SplitPairs(load_examples(DataConfig(path=material / "pairs.jsonl"), tokenizer, need="preference"))
    own = {tuple(row.prompt): set() for row in rows}
    for row in rows:
        own[tuple(row.prompt)].add(tuple(row.completions[0]))
    mixed = mismatched_rows(rows[:], rows, None)
    assert len(mixed) == len(rows) == 20 and len(own) == 10
    assert all(tuple(row.completions[0]) not in own[tuple(row.prompt)] for row in mixed)


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_a_cached_reference_gives_the_same_run(train, material, loss):
    """KTO asks the reference itself about mismatched rows; BCO needs it no more."""
    live, cached = (train("kto", loss=loss, eval_data=material / "labelled.jsonl", reference__cache=choice)
                    for choice in ("off", "on"))  # fmt: skip
    assert (cached.folder / "reference_logprobs").is_dir()
    assert live.distance(cached) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [{"loss": "bco", "reference__cache": "on"}, {"reference__update": "ema", "reference__rate": 0.3}],
    ids=str,
)
def test_what_is_remembered_is_resumed_to_the_bit(configure, train, train_with_stops, changes):
    settings = dict(optim=FAST, **changes)
    whole = train("kto", **settings)
    resumed = train_with_stops(configure("kto", **settings), [1, 3])
    assert resumed.same_weights(whole)
    assert resumed.metrics == whole.metrics
