"""Options of losses: read from signatures, parsed from texts."""

from __future__ import annotations

import math

import pytest

from rlhf_core.losses.policy import POLICY_LOSSES
from rlhf_core.losses.preference import PREFERENCE_LOSSES
from rlhf_core.losses.registry import options_of, parse_options


def functions(*names: str) -> dict:
    return {name: PREFERENCE_LOSSES[name].function for name in names}


RESERVED = frozenset({"beta", "label_smoothing"})


def test_options_are_the_keyword_only_parameters():
    assert options_of(POLICY_LOSSES["ppo"].surrogate) == {"clip": 0.2, "clip_high": None, "dual_clip": None}


def test_options_are_parsed_for_any_table():
    """Texts as on the command line, a mapping as in YAML, several losses, and none."""
    losses = functions("simpo", "dpop")
    assert parse_options(["gamma:0.5", "dpop_lambda:3"], losses, reserved=RESERVED) == {"gamma": 0.5, "dpop_lambda": 3}
    assert parse_options({"gamma": 5e-1}, losses, reserved=RESERVED) == {"gamma": 0.5}
    assert parse_options(None, losses) == parse_options((), losses) == {}
    assert parse_options(("clip_high:2.8e-1",), {"dapo": POLICY_LOSSES["dapo"].surrogate}) == {"clip_high": 0.28}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["gama:1"], "loss_options='gama:1': expected an option of simpo: gamma; did you mean 'gamma'"),
        (["beta:1"], "loss_options='beta:1': expected an option of simpo: gamma"),
        (["gamma:1", "gamma:1"], "loss_options='gamma:1': expected gamma once"),
        (["gamma"], "loss_options='gamma': expected name:number"),
        (["gamma:high"], "loss_options='gamma:high': expected name:number"),
        (["gamma:inf"], "loss_options='gamma:inf': expected name:number"),
        ({"gamma": math.nan}, "loss_options='gamma:nan': expected name:number"),
    ],
)
def test_invalid_options_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_options(texts, functions("simpo"), reserved=RESERVED)


def test_a_loss_without_options():
    with pytest.raises(ValueError, match="loss_options='gamma:1': expected an option of hinge: there is none$"):
        parse_options(["gamma:1"], functions("hinge"), reserved=RESERVED)
