"""Our advantage estimation compared with Stable-Baselines3's, one episode per row, in float64: equal to 2e-16."""

from __future__ import annotations

import pytest

from rlhf_core.ops.advantages import gae
from tests.parity.golden import hold, read

SB3 = read("sb3")


@pytest.mark.parametrize("name", SB3.cases)
def test_gae(name):
    case, inputs = SB3.cases[name], SB3.inputs
    advantages, returns = gae(
        inputs["rewards"],
        inputs["values"],
        inputs["mask"],
        gamma=case.settings["gamma"],
        lam=case.settings["gae_lambda"],
        bootstrap=inputs["bootstrap"],
    )
    hold(case, advantages=advantages, returns=returns)
