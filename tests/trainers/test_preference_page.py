"""docs/preference.md names what exists, leaves out no setting, and its commands are commands."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

import pytest

from rlhf_core import cli
from rlhf_core.config import CachedReferenceConfig, RunConfig, kinds_of
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


def settings_of(kind: type) -> set[str]:
    """Return the settings of a job by their dotted names; a group that has a path, also by its own name."""
    paths = {option.path for option in cli.options_of(kind)}
    return paths | {path.removesuffix(".path") for path in paths}


def test_the_page_names_every_setting_of_these_jobs_and_no_other():
    shared = settings_of(RunConfig)
    own = {name for kind in (DPOConfig, KTOConfig) for name in settings_of(kind)} - shared
    named = {name.partition("=")[0] for name in re.findall(r"`([a-z_.]+(?:=\w+)?)`", TEXT)}
    named |= {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z.-]+)", TEXT)}
    of_the_data = {name for name in own if name.startswith("eval_data.")} | {"reference.path"}  # --reference PATH
    assert own - of_the_data - named == set()
    columns = {"margin", "score_chosen", "score_rejected", "weight", "label", "gap", "reward", "eval_", "delta",
               "desirable", "router_loss", "loss", "run.json", "rlhf_core"}  # fmt: skip
    known = own | shared | columns | {*PREFERENCE_LOSSES} | {*UNPAIRED_LOSSES}
    assert named - known == set()


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
        stated = dict(re.findall(r"(\w[\w-]*?)(?: of)? ([\d.e-]+)", defaults))
        assert float(stated["beta"]) == config.beta
        assert float(stated.get("rate", 1e-5)) == config.optim.lr
        assert float(stated.get("warm-up", 0)) == config.optim.warmup_ratio
        assert int(stated.get("batches", 16)) == config.batch_size
        assert config.options == {name: float(stated[name]) for name in ("gamma", "nll_coef") if name in stated}


def test_values_on_the_page_are_values():
    values = re.findall(r"`reference\.(\w+)=(\w+)`", TEXT)
    assert len(values) >= 4
    for name, value in values:
        assert value in typing.get_args(kinds_of(CachedReferenceConfig)[name].type)
