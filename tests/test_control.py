"""The KL price: one update is a closed form."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.control import AdaptiveKL, FixedKL


def after(kl: float, sequences: int, *, start: float = 0.1, target: float = 6.0, horizon: int = 1000) -> float:
    """The price after one update."""
    control = AdaptiveKL(start, target=target, horizon=horizon)
    control.update(kl, sequences)
    return control.kl_coef


@pytest.mark.parametrize(
    ("kl", "sequences", "price"),
    [
        (6.0, 100, 0.1),  # on target: nothing happens
        (6.6, 100, 0.1 * 1.01),  # a tenth above: error 0.1, a tenth of the horizon
        (5.4, 100, 0.1 * 0.99),  # a tenth below
        (6.6, 500, 0.1 * 1.05),  # five times the completions, five times the step
        (7.2, 100, 0.1 * 1.02),  # 0.2 is the bound ...
        (7.21, 100, 0.1 * 1.02),  # ... past which nothing grows
        (1e9, 100, 0.1 * 1.02),
        (math.inf, 100, 0.1 * 1.02),
        (4.8, 100, 0.1 * 0.98),
        (0.0, 100, 0.1 * 0.98),
        (-3.0, 100, 0.1 * 0.98),  # a k1 estimate may be negative
        (-math.inf, 100, 0.1 * 0.98),
        (1e9, 1000, 0.1 * 1.2),
    ],
)
def test_one_update_by_hand(kl, sequences, price):
    """price * (1 + clip(kl / 6 - 1, -0.2, 0.2) * sequences / 1000)."""
    assert after(kl, sequences) == pytest.approx(price, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    kl=st.floats(-100, 100),
    sequences=st.integers(1, 10**6),
    start=st.floats(1e-6, 10),
    target=st.floats(1e-3, 100),
    horizon=st.integers(1, 10**6),
)
def test_direction_and_bounds(kl, sequences, start, target, horizon):
    """Too much KL never lowers the price, too little never raises it, and one update moves it by 20 % at most."""
    price = after(kl, sequences, start=start, target=target, horizon=horizon)
    assert (price >= start) if kl >= target else (price <= start)
    assert 0.8 * start * (1 - 1e-12) <= price <= 1.2 * start * (1 + 1e-12)


def test_a_batch_larger_than_the_horizon_counts_as_one_horizon():
    """1 - 0.2 * 5000 / 1000 = 0 would kill the price for good, and more completions would turn it negative."""
    assert after(0.0, 5000) == pytest.approx(0.08)
    assert after(100.0, 50_000) == pytest.approx(0.12)


def test_a_kl_that_is_not_a_number_changes_nothing():
    assert after(math.nan, 100) == 0.1


def test_updates_compound():
    """Twice 2 % up and once 1 % down: 0.1 * 1.02^2 * 0.99."""
    control = AdaptiveKL(0.1, target=6.0, horizon=1000)
    for kl in (20.0, 20.0, 5.4):
        control.update(kl, 100)
    assert control.kl_coef == pytest.approx(0.1 * 1.02**2 * 0.99, rel=1e-12)


def test_it_steers_to_the_target():
    """Against a policy whose KL is 1 / price nats, the price settles at 1 / target, from either side."""
    for start in (0.01, 10.0):
        control = AdaptiveKL(start, target=4.0, horizon=100)
        for _ in range(200):
            control.update(1 / control.kl_coef, 50)
        assert control.kl_coef == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("make", [lambda coef: AdaptiveKL(coef, target=6.0, horizon=1000), FixedKL])
def test_state_goes_through_json_and_continues_exactly(make):
    control, resumed = make(0.1), make(0.7)
    control.update(6.37, 64)
    resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for each in (control, resumed):
        each.update(9.1, 17)
    assert resumed.kl_coef == control.kl_coef


def test_a_fixed_price_stays():
    control = FixedKL(0.05)
    control.update(1e9, 10**6)
    assert control.kl_coef == 0.05
    assert FixedKL(0.0).kl_coef == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kl_coef=-0.1), "kl_coef=-0.1: expected 0 or more"),
        (dict(kl_coef=math.nan), "kl_coef=nan: expected 0 or more"),
        (dict(kl_coef=0.0), "kl_coef=0: an adaptive price multiplies"),
        (dict(target=0.0), "kl_target=0.0: expected more than 0"),
        (dict(target=-6.0), "kl_target=-6.0: expected more than 0"),
        (dict(target=math.nan), "kl_target=nan: expected more than 0"),
        (dict(horizon=0), "kl_horizon=0: expected more than 0"),
        (dict(horizon=-1), "kl_horizon=-1: expected more than 0"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveKL(**dict(kl_coef=0.1, target=6.0, horizon=1000) | options)


def test_a_fixed_price_may_not_be_negative():
    for kl_coef in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="expected 0 or more"):
            FixedKL(kl_coef)
