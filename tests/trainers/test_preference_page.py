"""docs/preference.md names what exists, leaves out no setting, and its commands are commands."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from rlhf_core import cli
from rlhf_core.config import RunConfig
from rlhf_core.losses.preference import PREFERENCE_LOSSES
from rlhf_core.losses.unpaired import UNPAIRED_LOSSES
from rlhf_core.trainers.dpo import CPOConfig, DPOConfig, IPOConfig, ORPOConfig, SimPOConfig
from rlhf_core.trainers.kto import KTOConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "preference.md").read_text()


def test_every_function_and_file_exists():
    found = re.findall(r"`((?:\w+/)+\w+\.py)(?::(\w+))?`", TEXT)
    assert len(found) > 6
    for file, name in found:
        names = {getattr(node, "name", None) for node in ast.parse((ROOT / "rlhf_core" / file).read_text()).body}
        assert not name or name in names, f"{file}:{name}"


def test_every_setting_of_these_jobs_is_spoken_of_and_no_other():
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    own = {field.name for kind in (DPOConfig, KTOConfig) for field in dataclasses.fields(kind)} - shared
    spoken = {name.partition("=")[0] for name in re.findall(r"`([a-z_]+(?:=\w+)?)`", TEXT)}
    spoken |= {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", TEXT)}
    assert own - spoken == set()
    columns = {"margin", "score_chosen", "score_rejected", "weight", "label", "gap", "reward", "eval_", "delta",
               "desirable", "router_loss", "run.json", "rlhf_core"}  # fmt: skip
    known = own | shared | columns | {*PREFERENCE_LOSSES} | {*UNPAIRED_LOSSES}
    assert spoken - known == set()


@pytest.mark.parametrize("words", re.findall(r"^    (rlhf .*?)(?:  .*)?$", TEXT, re.MULTILINE))
def test_the_commands_are_commands(words):
    job, *options = words.replace("...", "--model m --data d --output o").split()[1:]
    assert cli.parse(job, DPOConfig, options, "").loss_weights


def test_the_defaults_are_those_of_the_code():
    rows = re.findall(r"^\| `rlhf (\w+)` \| `(\w+)` \| (.*?) \|", TEXT, re.MULTILINE)
    kinds = {kind.job: kind for kind in (DPOConfig, IPOConfig, ORPOConfig, SimPOConfig, CPOConfig, KTOConfig)}
    assert {job for job, *_ in rows} == kinds.keys()
    for job, loss, defaults in rows:
        config = kinds[job](model="m", data="d", output="o")
        assert config.loss in (loss, (loss,))
        said = dict(re.findall(r"(\w[\w-]*?)(?: of)? ([\d.e-]+)", defaults))
        assert float(said["beta"]) == config.beta
        assert float(said.get("rate", 1e-5)) == config.optim.lr
        assert float(said.get("warm-up", 0)) == config.optim.warmup_ratio
        assert int(said.get("batches", 16)) == config.batch_size
        options = {name: float(said[name]) for name in ("gamma", "nll_coef") if name in said}
        assert options == {name: float(value) for name, _, value in map(_parts, config.loss_options or ())}


def _parts(option: str) -> tuple[str, str, str]:
    return option.partition(":")


def test_values_on_the_page_are_values():
    hints = typing.get_type_hints(DPOConfig)
    for name, value in re.findall(r"`(reference_update)=(\w+)`", TEXT):
        assert value in typing.get_args(hints[name])
