"""docs/architecture.md names what exists, and explains every metric that a job logs."""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from rlhf_core import cli
from rlhf_core.demo.language import build_model, write_couplet

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()

REWARDS = """
def vowels(prompts, completions, rows):
    return [float(completion.count("o")) for completion in completions]


def length(prompts, completions, rows):
    return [float(len(completion)) for completion in completions]


def longer(prompts, firsts, seconds, rows):
    return [int(len(second) > len(first)) for first, second in zip(firsts, seconds, strict=True)]
"""
SAMPLED = "--sampling.max-new-tokens 6 --batch-size 4 --minibatch-size 4"
SCORED = f"--data pairs.jsonl --reward-function metric_rewards:vowels,metric_rewards:length {SAMPLED}"
RUNS = [  # of each job, with settings that add metrics
    "sft --data texts.jsonl --eval-data texts.jsonl",
    "reward --data pairs.jsonl --eval-data pairs.jsonl --ensemble 2",
    "reward --data steps.jsonl --eval-data steps.jsonl --learn-from steps",
    "dpo --data pairs.jsonl --eval-data pairs.jsonl --loss sigmoid,bco_pair,beta_dpo",
    "kto --pairs --data pairs.jsonl --eval-data pairs.jsonl",
    "kto --pairs --data pairs.jsonl --loss bco",
    f"ppo --eval-data pairs.jsonl --ptx-data texts.jsonl --ptx-coef 0.1 --importance token {SCORED}",
    f"grpo --num-generations 2 --dynamic-sampling 1 {SCORED}",
    f"rloo --num-generations 2 --kl.estimator full {SCORED}",
    f"reinforce --baseline remax {SCORED}",
    f"online-dpo --xpo-alpha 0.1 {SCORED}",
    f"online-dpo --judge metric_rewards:longer --data pairs.jsonl --eval-data pairs.jsonl {SAMPLED}",
    f"raft --kl.coef 0.1 {SCORED}",
    f"rrhf {SCORED}",
]


def sections() -> dict[str, str]:
    """Return the text of each section by its heading."""
    parts = re.split(r"^##+ (.*)$", PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[0::2], parts[1::2], strict=True))


def explained_metrics() -> list[str]:
    """Return the names in the first column of the tables under "Metrics"."""
    rows = re.findall(r"^\| ([^|]+) \|", PAGE[PAGE.index("\n## Metrics") :], re.MULTILINE)
    return [name for row in rows if row != "metric" for name in row.split(", ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, rows and reward functions."""
    folder, rng = tmp_path_factory.mktemp("metrics"), random.Random(0)
    build_model(folder / "model", seed=0)
    lines = [write_couplet(rng, rhyming=1.0) for _ in range(8)]
    for name, rows in {
        "pairs": [{"prompt": first, "chosen": second, "rejected": "peta ."} for first, second in lines],
        "texts": [{"prompt": first, "completion": second} for first, second in lines],
        "steps": [
            {"prompt": first, "completions": [second, "peta ."], "labels": [True, False]} for first, second in lines
        ],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metric_rewards.py").write_text(REWARDS)
    return folder


@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(run.split()[:3]))
def test_every_metric_that_a_job_logs_is_explained(run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    options = ["--model", "model", "--output", "run", "--overwrite", "--max-steps", "1", "--no-progress"]
    assert cli.main([*run.split(), *options]) == 0
    [metrics] = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    explained = {*explained_metrics()}
    for name in metrics:
        plain = re.sub(r"^reward/.*", "reward/NAME", re.sub(r"^loss_.*", "loss_NAME", name.removeprefix("eval_")))
        assert name in explained or plain in explained, name


def test_every_metric_is_explained_once_in_its_table():
    tables = {name: text for name, text in sections().items() if "| metric |" in text}
    assert len(tables) >= 6
    for name, text in tables.items():
        for table in text.split("\n\n"):
            rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
            counts = Counter(each for row in rows for each in row.split(", "))
            assert set(counts.values()) <= {1}, name


def test_the_glossary_has_every_term_once():
    rows = re.findall(r"^\| ([^|]+) \|", sections()["Glossary"], re.MULTILINE)
    terms = Counter(term for row in rows for term in re.split(r", (?![^(]*\))", row))
    assert len(terms) > 80
    assert {term for term, count in terms.items() if count > 1} == set()


def test_every_file_and_class_on_the_page_exists():
    owners = re.findall(r"^\| `(\w+)` \| `([\w/]+\.py)` \|", PAGE, re.MULTILINE)
    assert len(owners) == 10
    for name, file in owners:
        body = ast.parse((ROOT / "rlhf_core" / file).read_text()).body
        assert name in {getattr(node, "name", None) for node in body}, f"{file}:{name}"
    for file in re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE):
        assert (ROOT / file).exists() or (ROOT / "rlhf_core" / file).exists(), file
