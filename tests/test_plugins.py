"""The user's own code, found by the name that a config gives."""

from __future__ import annotations

import sys
import textwrap

import pytest

from rlhf_core.config import ConfigError
from rlhf_core.losses.preference import PREFERENCE_LOSSES
from rlhf_core.plugins import import_function, import_module
from rlhf_core.trainers.dpo import DPOConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that a command is typed in, with a module for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def shorter(prompts, completions, records):\n    return []\nnumber = 3\n")
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    yield tmp_path
    for name in ("my_rewards", "needs_more"):
        sys.modules.pop(name, None)


def test_a_function_by_name(folder):
    path = list(sys.path)
    assert import_function("my_rewards:shorter").__name__ == "shorter"
    assert import_function("os.path:basename")("a/b") == "b"
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards", "'my_rewards': expected module:function"),
        ("my_rewards:", "expected module:function"),
        (":shorter", "expected module:function"),
        ("no_such_rewards:shorter", "'no_such_rewards': No module named 'no_such_rewards'"),
        ("my_rewards:longer", "my_rewards has no function longer"),
        ("my_rewards:number", "my_rewards has no function number"),
        ("needs_more:shorter", "'needs_more': No module named 'a_module_that_is_not_there'"),
    ],
)
def test_a_name_that_leads_nowhere(folder, name, message):
    path = list(sys.path)
    with pytest.raises(ValueError, match=message):
        import_function(name)
    assert sys.path == path


def test_a_module_by_name(folder):
    assert import_module("my_rewards").number == 3
    with pytest.raises(ValueError, match="'no_such_losses': No module named 'no_such_losses'"):
        import_module("no_such_losses")


@pytest.fixture
def losses_file(tmp_path, monkeypatch):
    """A file of the user's own with a loss in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_losses.py").write_text(
        textwrap.dedent("""
        from rlhf_core.losses.preference import register_preference_loss

        @register_preference_loss("squared_gap", needs_reference=False)
        def squared_gap(pairs, *, beta, target=3.0):
            return (beta * pairs.difference - target).square()
        """)
    )
    yield tmp_path
    sys.modules.pop("my_losses", None)
    PREFERENCE_LOSSES.pop("squared_gap", None)


def test_a_loss_of_ones_own_by_name(losses_file):
    config = DPOConfig(model="m", data="d", output="o", loss="squared_gap", loss_module="my_losses")
    assert config.loss == ("squared_gap",) and "squared_gap" in PREFERENCE_LOSSES


def test_without_its_module_the_name_is_unknown(losses_file):
    with pytest.raises(ConfigError, match="loss='squared_gap': expected one of alphapo, "):
        DPOConfig(model="m", data="d", output="o", loss="squared_gap")
    with pytest.raises(ValueError, match="'mine': No module named 'mine'"):
        DPOConfig(model="m", data="d", output="o", loss_module="mine")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss="sigmod"), "loss='sigmod': expected one of .*; did you mean sigmoid"),
        (dict(beta=0.0), "beta=0.0: expected more than 0"),
        (dict(label_smoothing=0.5), "label_smoothing=0.5: expected 0 <= label_smoothing < 0.5"),
        (dict(loss="ipo", label_smoothing=0.1), "label_smoothing=0.1: not defined for 'ipo'"),
        (dict(loss="exo_pair"), "label_smoothing=0.0: expected more than 0 for 'exo_pair'"),
    ],
)
def test_dpo_refuses_what_its_loss_would_refuse_before_anything_is_loaded(settings, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(model="m", data="d", output="o", **settings)
