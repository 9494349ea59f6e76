"""docs/sft.md and docs/reward_models.md name what exists, and leave out no setting of theirs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import typing
from pathlib import Path

import pytest
import torch

from rlhf_core import cli
from rlhf_core.config import RunConfig
from rlhf_core.evaluation.reward_accuracy import pair_metrics, step_metrics
from rlhf_core.trainers.reward import RewardConfig
from rlhf_core.trainers.sft import SFTConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"sft.md": SFTConfig, "reward_models.md": RewardConfig}
every_page = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


@every_page
def test_every_function_and_file_on_the_page_exists(page):
    found = re.findall(r"`((?:\w+/)+\w+\.py)(?::(\w+))?`", text_of(page))
    assert len(found) >= 3
    for file, name in found:
        path = ROOT / file if file.startswith("tests/") else ROOT / "rlhf_core" / file
        names = {getattr(node, "name", None) for node in ast.parse(path.read_text()).body}
        assert not name or name in names, f"{file}:{name}"


@every_page
def test_the_page_names_every_setting_of_its_own(page):
    kind = PAGES[page]
    own = {field.name for field in dataclasses.fields(kind)} - {field.name for field in dataclasses.fields(RunConfig)}
    text = text_of(page)
    assert {name for name in own if name not in text and name.replace("_", "-") not in text} == set()


@every_page
def test_every_value_on_the_page_is_one(page):
    kinds = typing.get_type_hints(PAGES[page])
    for name, value in re.findall(r"`(loss|learn_from)=(\w+)`", text_of(page)):
        assert value in typing.get_args(kinds[name])


@every_page
def test_every_command_on_the_page_is_one(page):
    blocks = re.findall(r"^(rlhf (?:.*\\\n)*.*)$", text_of(page), re.MULTILINE)
    assert blocks
    for block in blocks:
        job, *words = block.replace("\\\n", " ").split()[1:]
        module, kind, _, summary = cli.JOBS[job]
        assert cli.parse(job, getattr(importlib.import_module(module), kind), words, summary)


def test_every_metric_of_a_reward_model_is_explained():
    metrics = pair_metrics(torch.tensor([1.0, 2.0, 0.0]), torch.zeros(3), torch.tensor([[3, 1], [1, 3], [2, 2]]))
    metrics |= step_metrics(torch.tensor([1.0, -1.0]), torch.tensor([True, False]))
    assert len(metrics) == 9
    rows = re.findall(r"^\| ([\w, ]+) \|", text_of("architecture.md"), re.MULTILINE)
    explained = {name for row in rows for name in row.split(", ")}
    assert {f"eval_{name}" for name in metrics} - explained == set()
