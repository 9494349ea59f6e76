"""docs/lora.md: its code runs, its commands are commands, its settings exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from rlhf_core import cli

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "lora.md").read_text()


def test_the_code_on_the_page_does_what_the_page_says():
    """The blocks as they stand, one after another, with their own assertions."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 7 and sum(block.count("assert") for block in blocks) > 12
    names: dict = {"__name__": "lora_page"}
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("command", re.findall(r"^rlhf (.*)$", PAGE, flags=re.MULTILINE))
def test_every_command_is_one(command):
    job, *words = command.split()
    module, kind, _, summary = cli.JOBS[job]
    assert cli.parse(job, getattr(importlib.import_module(module), kind), words, summary)


def test_every_setting_is_one():
    jobs = [cli.JOBS[name] for name in ("ppo", "dpo", "merge")]
    kinds = [(name, getattr(importlib.import_module(module), kind)) for module, kind, name, _ in jobs]
    known = {
        option
        for name, kind in kinds
        for action in cli.build_parser(name, kind, "")._actions
        for option in action.option_strings
    }
    named = {*re.findall(r"`(--[a-z.-]+)", PAGE)}
    assert len(named) > 12
    assert named <= known
