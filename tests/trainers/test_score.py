"""`rlhf score` through the command line, against plain transformers reading the same folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from rlhf_core.cli import main
from rlhf_core.evaluation.score import in_steps, wanted_metrics


def write(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def score(tmp_path, capsys):
    """Scored rows and what was printed, as {name: number} with the rest of the text under None."""

    def run(model: Path, rows: list[dict] | Path, *options: str) -> tuple[list[dict], dict]:
        data, output = rows if isinstance(rows, Path) else write(tmp_path, rows), tmp_path / "scores.jsonl"
        command = ["score", "--model", model, "--data", data, "--output", output, *options]
        assert main([*map(str, command)]) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        assert said.err == f"score: {len(output.read_text().splitlines())} rows in {output}\n"
        numbers, _, rest = said.out.partition("\n\n")
        printed = {line.split()[0]: float(line.split()[1]) for line in numbers.splitlines()}
        return [json.loads(line) for line in output.read_text().splitlines()], printed | {None: rest}

    return run


def plainly(folder: Path, prompt: str, completion: str, kind=AutoModelForSequenceClassification) -> torch.Tensor:
    """The logits of plain transformers: (labels,), or (tokens of the completion, labels)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer(prompt)["input_ids"]
    ids = before + tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = kind.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    return logits if kind is AutoModelForSequenceClassification else logits[len(before) :]


def test_single_completions(material, score):
    rows = [json.loads(line) for line in (material / "sft.jsonl").read_text().splitlines()]
    scored, said = score(material / "reward_model", material / "sft.jsonl", "--batch-size", "3")
    expected = [plainly(material / "reward_model", row["prompt"], row["completion"]).item() for row in rows]
    assert [row.pop("score") for row in scored] == pytest.approx(expected, abs=1e-5)
    assert scored == rows  # each as it was, in its order
    assert said["completions"] == said["rows"] == 10
    assert said["score"] == pytest.approx(sum(expected) / 10, rel=1e-3)
    assert said["score_std"] == pytest.approx(torch.tensor(expected).std(correction=0).item(), rel=1e-3)
    assert (said["score_min"], said["score_max"]) == pytest.approx((min(expected), max(expected)), rel=1e-3)
    assert said[None] == ""


def test_pairs(material, score):
    scored, said = score(material / "reward_model", material / "pairs.jsonl")
    for row in scored:
        for side in ("chosen", "rejected"):
            expected = plainly(material / "reward_model", row["prompt"], row[side]).item()
            assert row[f"{side}_score"] == pytest.approx(expected, abs=1e-5)
    margins = [row["chosen_score"] - row["rejected_score"] for row in scored]
    assert said["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))
    assert said["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert said["completions"] == 20
    assert "chosen is longer" in said[None] and "expected calibration error" in said[None]


def test_lists_keep_their_ranking_and_are_data_for_rankings(material, score, train, tmp_path):
    rows = [
        {"prompt": "solano peta", "responses": ["misu", "dolo mutano", "kapi"], "ranks": [3, 1, 2]},
        {"prompt": "galosh", "responses": ["kapi", "misu"], "ranks": [1, 2]},
    ]
    scored, said = score(material / "reward_model", rows)
    assert [row["completions"] for row in scored] == [["dolo mutano", "kapi", "misu"], ["kapi", "misu"]]
    assert all(row.keys() == {"prompt", "completions", "scores"} for row in scored)
    for row in scored:
        expected = [plainly(material / "reward_model", row["prompt"], answer).item() for answer in row["completions"]]
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
    pairs = [(s[i], s[j]) for s in (row["scores"] for row in scored) for i in range(len(s)) for j in range(i)]
    assert said["accuracy"] == pytest.approx(sum(better > worse for worse, better in pairs) / 4)
    train("reward-rankings", data=tmp_path / "scores.jsonl", max_steps=1)


def test_lists_without_an_order_have_no_accuracy(material, score):
    _, said = score(material / "reward_model", [{"prompt": "galosh", "completions": ["kapi", "misu"]}])
    assert "accuracy" not in said and said["completions"] == 2


def test_an_ensemble_has_a_mean_and_a_deviation(plain_run, material, score):
    folder = plain_run("reward-ensemble").folder
    scored, said = score(folder, material / "pairs.jsonl", "--name", "liking")
    deviations = []
    for row in scored:
        for side in ("chosen", "rejected"):
            members = plainly(folder, row["prompt"], row[side])
            assert members.shape == (3,)
            assert row[f"{side}_liking"] == pytest.approx(members.mean().item(), abs=1e-5)
            assert row[f"{side}_liking_std"] == pytest.approx(members.std(correction=0).item(), abs=1e-5)
            deviations.append(row[f"{side}_liking_std"])
    assert said["disagreement"] == pytest.approx(sum(deviations) / 20, rel=1e-3)


def test_the_steps_of_an_answer(plain_run, material, score):
    """At each step's last token, the last one's being the end token; their product is the chance that all are right."""
    folder = plain_run("reward-steps").folder
    scored, said = score(folder, material / "steps.jsonl")
    for row in scored:
        logits = plainly(folder, row["prompt"], "\n".join(row["completions"]), AutoModelForTokenClassification)[:, 0]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        steps = [step + "\n" * (place + 1 < len(row["completions"])) for place, step in enumerate(row["completions"])]
        lengths = [len(tokenizer(step, add_special_tokens=False)["input_ids"]) for step in steps]
        lengths[-1] += 1  # <eos>
        ends = [sum(lengths[: place + 1]) - 1 for place in range(len(lengths))]
        assert ends[-1] == len(logits) - 1
        expected = logits.sigmoid()[ends].tolist()
        assert row["step_scores"] == pytest.approx(expected, abs=1e-5)
        assert row["score"] == pytest.approx(math.prod(expected), abs=1e-5)
    truths = [(p > 0.5) == label for row in scored for p, label in zip(row["step_scores"], row["labels"], strict=True)]
    assert said["accuracy"] == pytest.approx(sum(truths) / len(truths), rel=1e-3)
    assert said["steps"] == len(truths)
    assert "right steps" in said[None]


@pytest.mark.parametrize("how", ["product", "min", "last"])
def test_answers_without_labels_are_cut_into_steps(plain_run, material, score, how):
    """The same text gets the same scores with and without labels beside it; pairs and lists are cut as well."""
    folder, steps = plain_run("reward-steps").folder, ["dolo mutano", "misu", "rena vilano"]
    labelled = [{"prompt": "galosh", "completions": steps, "labels": [True, True, False]}]
    [truth], _ = score(folder, labelled)
    expected = {"product": math.prod, "min": min, "last": lambda scores: scores[-1]}[how](truth["step_scores"])
    [row], _ = score(folder, [{"prompt": "galosh", "completion": "\n".join(steps)}], "--combine", how)
    assert row["step_scores"] == pytest.approx(truth["step_scores"], abs=1e-5)
    assert row["score"] == pytest.approx(expected, abs=1e-5)
    [pair], said = score(
        folder, [{"prompt": "galosh", "chosen": "kapi", "rejected": "\n".join(steps)}], "--combine", how
    )
    assert pair["rejected_score"] == pytest.approx(expected, abs=1e-5)
    assert len(pair["chosen_step_scores"]) == 1
    assert said["accuracy"] == (pair["chosen_score"] > pair["rejected_score"])


def test_steps_of_text_that_is_cut_on_the_right(plain_run, score):
    folder, text = plain_run("reward-steps").folder, "dolo mutano\nmisu\nrena vilano peta"
    [whole], _ = score(folder, [{"text": text}])
    [cut], _ = score(folder, [{"text": text}], "--data.max-length", "5")
    assert len(whole["step_scores"]) == 3 > len(cut["step_scores"]) > 0
    assert cut["step_scores"] == pytest.approx(whole["step_scores"][: len(cut["step_scores"])], abs=1e-5)


def test_where_an_answer_is_cut():
    assert in_steps("one\ntwo\n\nthree", "\n") == ("one\n", "two\n\n", "three")
    assert in_steps("\none", "\n") == ("\none",)
    assert in_steps("one\n", "\n") == ("one\n",)
    assert in_steps([{"role": "assistant", "content": "a. b"}], ". ") == ("a. ", "b")


def test_labelled_completions_have_a_metric_that_needs_no_threshold(material, score):
    """AUC by hand: wanted 3 and 1 against 2, 1 and 0: won 3 + 1.5 of 6."""
    metrics = wanted_metrics(torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0]), torch.tensor([True, False, True, False, False]))
    assert metrics == {"wanted_score": 2.0, "unwanted_score": 1.0, "auc": 0.75}
    assert wanted_metrics(torch.tensor([3.0]), torch.tensor([True])) == {"wanted_score": 3.0}
    rows = [{"prompt": "galosh", "completion": word, "label": word == "kapi"} for word in ("kapi", "misu", "sani")]
    scored, said = score(material / "reward_model", rows)
    others = [row["score"] for row in scored[1:]]
    assert said["auc"] == pytest.approx(sum(scored[0]["score"] > other for other in others) / 2)


@pytest.mark.parametrize(
    ("model", "rows", "options", "message"),
    [
        ("policy", [{"prompt": "a", "completion": "b"}], [], "policy is no reward model: expected one with a trained"),
        ("reward_model", [{"prompt": "a"}], [], "rows.jsonl:1: found columns ['prompt']: prompts without completions"),
        (
            "reward_model",
            [{"prompt": "solano", "completion": "misu", "score": 1}],
            [],
            "the rows have a column 'score' already; --name gives the new one another name",
        ),
        ("reward_model", [{"question": "a"}], [], "rows.jsonl:1: found columns ['question']; none of the formats fits"),
        ("reward_model", [{"prompt": "solano", "completion": "  "}], [], "field 'completion' is empty"),
        ("nowhere", [{"prompt": "a", "completion": "b"}], [], "no model folder at"),
        (
            "reward_model",
            [{"prompt": "a", "completion": "b"}],
            ["--combine", "mean"],
            "combine='mean': expected one of",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(material, tmp_path, capsys, model, rows, options, message):
    data, output = write(tmp_path, rows), tmp_path / "scores.jsonl"
    command = ["score", "--model", material / model, "--data", data, "--output", output, *options]
    assert main([*map(str, command)]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_scores_that_are_not_finite_are_an_error(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "rlhf_core.evaluation.score.sequence_scores", lambda model, batch, **_: torch.full((1,), float("nan"))
    )
    data = write(tmp_path, [{"prompt": "galosh", "completion": "misu"}])
    assert main(["score", "--model", str(material / "reward_model"), "--data", str(data)]) == 1
    assert "rows.jsonl:1: the reward model gives a score that is not finite" in capsys.readouterr().err
