"""docs/losses.md agrees with the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from rlhf_core.losses.preference import PREFERENCE_LOSSES, register_preference_loss

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def loss_table():
    spec = importlib.util.spec_from_file_location("loss_table", ROOT / "docs" / "loss_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_losses_is_that_of_the_code(loss_table):
    assert loss_table.page() == loss_table.PAGE.read_text(), "docs/losses.md is out of date: make docs"


def test_the_readme_counts_the_losses(loss_table):
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"any of (\d+) losses", readme) == [str(len(PREFERENCE_LOSSES))]
    rows = re.findall(r"^\| `", loss_table.page(), re.MULTILINE)
    assert re.findall(r"all (\d+) losses by name", readme) == [str(len(rows))]


def test_every_loss_has_a_formula_and_a_source(loss_table):
    for line in loss_table.page().splitlines():
        if line.startswith("| `"):
            name, title, formula, *_, proof = [each.strip() for each in line.strip("|").split(" | ")]
            assert title and formula.startswith("`") and proof, name


def test_a_loss_without_a_value_by_hand_is_an_error(loss_table):
    try:
        register_preference_loss("unproven_loss")(lambda pairs, *, beta: pairs.difference)
        with pytest.raises(SystemExit, match="unproven_loss: no value by hand"):
            loss_table.proofs("unproven_loss", "paired")
    finally:
        PREFERENCE_LOSSES.pop("unproven_loss", None)
