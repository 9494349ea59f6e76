"""docs/ppo.md names fields and functions that exist, and leaves out no setting of PPO's own."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from rlhf_core.config import RunConfig
from rlhf_core.trainers.ppo import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted({*re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "ppo.md").read_text())})
COMMANDS = {name for name in NAMES if name.startswith("rlhf ")}


def hint_of(path: str) -> typing.Any:
    """The type of a field of PPOConfig, of `optim.eps` too."""
    kind: typing.Any = PPOConfig
    for name in path.split("."):
        kind = next((one for one in typing.get_args(kind) if dataclasses.is_dataclass(one)), kind)
        kind = typing.get_type_hints(kind)[name]
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
        assert not equals or value in typing.get_args(hint_of(field))
        assert hint_of(field)


def test_the_page_speaks_of_every_setting_that_ppo_adds():
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    own = {field.name for field in dataclasses.fields(PPOConfig)} - shared
    own &= {*PPOConfig.__annotations__}
    spoken = {name.partition("=")[0].partition(".")[0] for name in NAMES}
    assert own - spoken == set()
    assert len(own) > 30


def test_all_37_details_are_there():
    text = (ROOT / "docs" / "ppo.md").read_text()
    numbers: list[int] = []
    for first, _, last, second in re.findall(r"^\| (\d+)( to (\d+)|, (\d+))? \|", text, re.MULTILINE):
        numbers += range(int(first), int(last or second or first) + 1)
    assert numbers == list(range(1, 38))


def test_the_command_on_the_page_is_one(tmp_path):
    from rlhf_core import cli

    (command,) = COMMANDS
    words = command.split()[2:]
    config = cli.parse("ppo", PPOConfig, words, "")
    assert (config.model.path, config.reward_model.path, config.output) == ("POLICY", "REWARD_MODEL", "RUN")
