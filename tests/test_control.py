"""The KL coefficient after one update by hand; when to stop; and moments against the statistics module."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.control import AdaptiveKL, FixedKL, KLEarlyStop, LinearKL, RunningMean, RunningMoments


def after(kl: float, sequences: int, *, start: float = 0.1, target: float = 6.0, horizon: int = 1000) -> float:
    """Return the coefficient after one update."""
    control = AdaptiveKL(start, target=target, horizon=horizon)
    control.update(kl, sequences)
    return control.kl_coef


@pytest.mark.parametrize(
    ("kl", "sequences", "coef"),
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
def test_one_update_by_hand(kl, sequences, coef):
    """coef * (1 + clip(kl / 6 - 1, -0.2, 0.2) * sequences / 1000)."""
    assert after(kl, sequences) == pytest.approx(coef, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    kl=st.floats(-100, 100),
    sequences=st.integers(1, 10**6),
    start=st.floats(1e-6, 10),
    target=st.floats(1e-3, 100),
    horizon=st.integers(1, 10**6),
)
def test_direction_and_bounds(kl, sequences, start, target, horizon):
    """A KL above the target never lowers the coefficient, one below never raises it; an update is at most 20 %."""
    coef = after(kl, sequences, start=start, target=target, horizon=horizon)
    assert (coef >= start) if kl >= target else (coef <= start)
    assert 0.8 * start * (1 - 1e-12) <= coef <= 1.2 * start * (1 + 1e-12)


def test_a_batch_larger_than_the_horizon_counts_as_one_horizon():
    """1 - 0.2 * 5000 / 1000 = 0 would end the penalty for good, and more completions would make it negative."""
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
    """If the policy's KL is 1 / coef nats, the coefficient converges to 1 / target, from either side."""
    for start in (0.01, 10.0):
        control = AdaptiveKL(start, target=4.0, horizon=100)
        for _ in range(200):
            control.update(1 / control.kl_coef, 50)
        assert control.kl_coef == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(
    "make", [lambda coef: AdaptiveKL(coef, target=6.0, horizon=1000), FixedKL, lambda coef: LinearKL(coef, 0.9, 7)]
)
def test_state_goes_through_json_and_continues_exactly(make):
    control, resumed = make(0.1), make(0.1)
    if not isinstance(control, LinearKL):  # its state does not hold its line
        resumed = make(0.7)
    control.update(6.37, 64)
    assert all(type(number) in (int, float) for number in control.state_dict().values())
    resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for each in (control, resumed):
        each.update(9.1, 17)
    assert resumed.kl_coef == control.kl_coef


def test_a_fixed_coefficient_stays():
    control = FixedKL(0.05)
    control.update(1e9, 10**6)
    assert control.kl_coef == 0.05
    assert FixedKL(0.0).kl_coef == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kl_coef=-0.1), "kl_coef=-0.1: expected 0 or more"),
        (dict(kl_coef=math.nan), "kl_coef=nan: expected 0 or more"),
        (dict(kl_coef=0.0), "kl_coef=0: expected more than 0"),
        (dict(target=0.0), "target=0.0: expected more than 0"),
        (dict(target=-6.0), "target=-6.0: expected more than 0"),
        (dict(target=math.nan), "target=nan: expected more than 0"),
        (dict(horizon=0), "horizon=0: expected more than 0"),
        (dict(horizon=-1), "horizon=-1: expected more than 0"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveKL(**dict(kl_coef=0.1, target=6.0, horizon=1000) | options)


def test_a_fixed_coefficient_is_not_negative():
    for kl_coef in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="expected 0 or more"):
            FixedKL(kl_coef)


def test_a_line_by_hand():
    """From 0.2 to 0.1 in four updates, 0.025 each, then level; whatever KL is measured."""
    control, coefs = LinearKL(0.2, 0.1, 4), []
    for kl in (0.0, math.nan, 1e9, -5.0, 6.0, 6.0):
        control.update(kl, 64)
        coefs.append(control.kl_coef)
    assert LinearKL(0.2, 0.1, 4).kl_coef == 0.2
    assert coefs == pytest.approx([0.175, 0.15, 0.125, 0.1, 0.1, 0.1], rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(start=st.floats(0, 10), end=st.floats(0, 10), num_updates=st.integers(1, 20))
def test_a_line_is_monotone_and_ends_exactly(start, end, num_updates):
    control = LinearKL(start, end, num_updates)
    coefs = [control.kl_coef]
    for _ in range(num_updates + 3):
        control.update(1.0, 1)
        coefs.append(control.kl_coef)
    steps = [later - earlier for earlier, later in zip(coefs, coefs[1:], strict=False)]
    assert coefs[0] == start and set(coefs[num_updates:]) == {end}
    assert steps[:num_updates] == pytest.approx([(end - start) / num_updates] * num_updates, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, 0.1, 4), "start=-0.1: expected a finite coefficient, 0 or more"),
        ((math.nan, 0.1, 4), "start=nan: expected"),
        ((math.inf, 0.1, 4), "start=inf: expected"),
        ((0.1, -1, 4), "end=-1: expected a finite coefficient, 0 or more"),
        ((0.1, math.nan, 4), "end=nan: expected"),
        ((0.1, 0.2, 0), "num_updates=0: expected more than 0"),
        ((0.1, 0.2, -3), "num_updates=-3: expected more than 0"),
    ],
)
def test_a_line_that_is_none_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearKL(*arguments)


def test_early_stop():
    """Target 0.02, so past 0.03; 0.03 itself goes on. A distance that is not a number stops. Each is counted."""
    stopper = KLEarlyStop(0.02)
    seen = [stopper.stop(kl) for kl in (0.0, 0.02, 1.5 * 0.02, 0.0301, -1.0, math.nan, math.inf, 0.0)]
    assert seen == [False, False, False, True, False, True, True, False]
    assert stopper.stops == 3
    assert KLEarlyStop(0.02, factor=1.0).stop(0.021) and not KLEarlyStop(0.02, factor=2.0).stop(0.039)
    assert KLEarlyStop(0.02).stop(torch.tensor(0.04)) is True
    resumed = KLEarlyStop(0.02)
    resumed.load_state_dict(json.loads(json.dumps(stopper.state_dict())))
    resumed.stop(1.0)
    assert resumed.stops == 4


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_early_stop_parameters_out_of_range_are_named(value):
    with pytest.raises(ValueError, match=f"kl_target={value}: expected more than 0"):
        KLEarlyStop(value)
    with pytest.raises(ValueError, match=f"factor={value}: expected more than 0"):
        KLEarlyStop(0.02, factor=value)


def test_moments_by_hand():
    """1, 2 | 3, 4, 10: mean 4; squares 9 + 4 + 1 + 0 + 36 = 50; var 50 / 4, by n - 1."""
    moments = RunningMoments()
    moments.update([1, 2])
    assert (moments.count, moments.mean, moments.var) == (2, 1.5, 0.5)
    moments.update(torch.tensor([3.0, 4.0, 10.0]))
    assert (moments.count, moments.mean, moments.var) == (5, 4, 12.5)
    assert moments.std == math.sqrt(12.5)


@settings(max_examples=50, deadline=None)
@given(batches=st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), max_size=5), shift=st.sampled_from([0.0, 1e6]))
def test_batches_merge_into_what_all_values_have(batches, shift):
    """And 1e6 away from 0 the spread keeps its digits, which a running sum of squares would have lost."""
    moments, everything = RunningMoments(), [value + shift for batch in batches for value in batch]
    for batch in batches:
        moments.update([value + shift for value in batch])
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(statistics.fmean(everything) if everything else 0.0, rel=1e-12, abs=1e-9)
    variance = statistics.variance(everything) if len(everything) > 1 else 0.0
    assert moments.var == pytest.approx(variance, rel=1e-9, abs=1e-9 if shift == 0 else 1e-3)


def test_what_is_masked_does_not_count():
    """NaN and infinity included; any shape, and a sequence of tensors too."""
    moments, plain = RunningMoments(), RunningMoments()
    moments.update(torch.tensor([[1.0, math.nan], [5.0, math.inf]]), torch.tensor([[True, False], [True, False]]))
    moments.update([9, 7, 9], [False, True, False])
    moments.update(torch.tensor([math.nan]), torch.tensor([False]))
    moments.update([])
    plain.update([torch.tensor(1.0), torch.tensor(5.0), torch.tensor(7.0)])
    assert moments.state_dict() == pytest.approx(plain.state_dict(), rel=1e-12)
    assert moments.count == 3


def test_fewer_than_two_values_have_no_spread():
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.var, moments.std) == (0, 0, 0, 0)
    moments.update([3.0])
    assert (moments.count, moments.mean, moments.var, moments.std) == (1, 3, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_and_nothing_taken_in(bad):
    moments = RunningMoments()
    moments.update([1.0, 2.0])
    before = moments.state_dict()
    for values in ([5.0, bad], torch.tensor([[bad, 5.0]])):
        with pytest.raises(ValueError, match=f"values hold {bad}: expected finite numbers"):
            moments.update(values)
    with pytest.raises(ValueError, match="mask of 1 places for 2 values"):
        moments.update([1.0, 2.0], [True])
    assert moments.state_dict() == before


def test_moments_go_through_json_and_continue_exactly():
    moments, resumed = RunningMoments(), RunningMoments()
    moments.update([0.1, 1 / 3, 7.7])
    assert all(type(number) in (int, float) for number in moments.state_dict().values())
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    for each in (moments, resumed):
        each.update(torch.tensor([0.3, -2.0]))
    assert resumed.state_dict() == moments.state_dict() and resumed.std == moments.std


# -------------------------------------------------------------------------------------------------------- running means


def test_a_running_mean_by_hand():
    """Of 1, 1, 4: 2. With momentum 3/4: 1/4, then 3/4 * 1/4 + 1/4 * 4 = 19/16, however many each stands for."""
    mean, recent = RunningMean(), RunningMean(0.75)
    assert mean.mean == recent.mean == 0
    for value, count in ((1.0, 2), (4.0, 1), (math.nan, 5), (7.0, 0)):
        mean.update(value, count)
        recent.update(value, count)
    assert mean.mean == pytest.approx(2)
    assert recent.mean == pytest.approx(19 / 16)
    with pytest.raises(ValueError, match="momentum=1: expected 0 <= momentum < 1"):
        RunningMean(1)


def test_a_running_mean_goes_through_json_and_continues_exactly():
    for momentum in (None, 0.9):
        mean, resumed = RunningMean(momentum), RunningMean(momentum)
        mean.update(1 / 3, 7)
        resumed.load_state_dict(json.loads(json.dumps(mean.state_dict())))
        for each in (mean, resumed):
            each.update(0.1, 3)
        assert resumed.mean == mean.mean
