"""docs/ppo.md names settings and functions that exist, and leaves out no setting of PPO's own."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

import pytest

from rlhf_core import cli
from rlhf_core.config import RunConfig, ScoringConfig, kinds_of
from rlhf_core.trainers.ppo import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "ppo.md"
NAMES = sorted({*re.findall(r"`([^`\n]+)`", PAGE.read_text())})
COMMANDS = {name for name in NAMES if name.startswith("rlhf ")}


def type_of(path: str) -> typing.Any:
    """Return the type of a setting of PPO, of a group's too: `kl`, `kl.coef`."""
    kind: typing.Any = PPOConfig
    for name in path.split("."):
        kind = kinds_of(kind)[name].type
    return kind


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COMMANDS])
def test_every_name_on_the_page_exists(name):
    if name.startswith("tests/"):
        assert (ROOT / name).is_file()
    elif name.startswith("test_"):
        body = ast.parse((ROOT / "tests" / "parity" / "test_trl_ppo.py").read_text()).body
        assert name in {getattr(node, "name", None) for node in body}
    elif ":" in name or "/" in name:
        file, _, function = name.partition(":")
        body = ast.parse((ROOT / "rlhf_core" / file).read_text()).body
        assert function in {getattr(node, "name", None) for node in body}
    elif name != "rlhf_core":
        field, equals, value = name.partition("=")
        assert type_of(field)
        assert not equals or value in typing.get_args(type_of(field))


def test_the_page_names_every_setting_that_ppo_adds():
    """All but those of every run, of the sources of scores, and of the groups that other pages explain."""
    elsewhere = {
        option.path.partition(".")[0] for kind in (RunConfig, ScoringConfig) for option in cli.options_of(kind)
    }
    elsewhere |= {"sampling", "eval_data", "ptx_data"}
    loading = {f"reference.{name}" for name in ("path", "dtype", "layout", "revision", "trust_remote_code")}
    own = {option.path for option in cli.options_of(PPOConfig) if option.path.partition(".")[0] not in elsewhere}
    own |= {"ptx_data"}
    assert own - loading - {name.partition("=")[0] for name in NAMES} == set()
    assert len(own - loading) > 35


def test_all_37_details_are_there():
    numbers: list[int] = []
    for first, _, last, second in re.findall(r"^\| (\d+)( to (\d+)|, (\d+))? \|", PAGE.read_text(), re.MULTILINE):
        numbers += range(int(first), int(last or second or first) + 1)
    assert numbers == list(range(1, 38))


def test_the_command_on_the_page_is_one(tmp_path):
    (command,) = COMMANDS
    words = command.split()[2:]
    config = cli.parse("ppo", PPOConfig, words, "")
    assert (config.model.path, config.reward_model.path, config.output) == ("POLICY", "REWARD_MODEL", "RUN")
