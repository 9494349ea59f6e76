"""Reductions over a mask, against numbers by hand and against torch on the selected values alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.masked import masked_mean, masked_sum, masked_var, masked_whiten

MASK = torch.tensor([[True, True, False], [True, False, False]])
VALUES = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])  # 1, 2, 3 take part

# Each gives a tensor or a scalar that depends on every unmasked value.
FUNCTIONS = {
    "sum": masked_sum,
    "sum_rows": lambda values, mask: masked_sum(values, mask, -1),
    "mean": masked_mean,
    "mean_rows": lambda values, mask: masked_mean(values, mask, -1),
    "var": masked_var,
    "var_unbiased": lambda values, mask: masked_var(values, mask, unbiased=True),
    "whiten": masked_whiten,
    "whiten_keeping_mean": lambda values, mask: masked_whiten(values, mask, shift_mean=False),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values around 3 in float64, and a random mask with at least two places."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 + 2 * torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask.view(-1)[:2] = True
    return values, mask


def value_and_gradient(function, values, mask):
    """The function's value, and the gradient of a weighted sum of it whose weights differ from place to place."""
    values = values.clone().requires_grad_()
    output = function(values, mask)
    weights = torch.arange(1, output.numel() + 1, dtype=output.dtype).reshape(output.shape)
    (output * weights).sum().backward()
    return output.detach(), values.grad


def test_sums_and_means_by_hand():
    """1 + 2 + 3 = 6, mean 2; by row 1 + 2 = 3 and 3, means 3/2 and 3."""
    assert masked_sum(VALUES, MASK) == 6
    assert masked_mean(VALUES, MASK) == 2
    assert masked_sum(VALUES, MASK, -1).tolist() == [3, 3]
    assert masked_mean(VALUES, MASK, -1).tolist() == [1.5, 3]


def test_variance_by_hand():
    """Of 1, 2, 3: squares (1 + 0 + 1) / 3 = 2/3 biased, / 2 = 1 unbiased. Biased is the default."""
    assert masked_var(VALUES, MASK).item() == pytest.approx(2 / 3)
    assert masked_var(VALUES, MASK, unbiased=True).item() == pytest.approx(1)


def test_whitening_by_hand():
    """(1, 2, 3) - 2 over sqrt(2/3) is -sqrt(3/2), 0, sqrt(3/2); shift_mean=False puts the 2 back. Masked places 0."""
    root = math.sqrt(1.5)
    whitened = masked_whiten(VALUES, MASK)
    torch.testing.assert_close(whitened, torch.tensor([[-root, 0, 0], [root, 0, 0]]), atol=1e-6, rtol=0)
    kept = masked_whiten(VALUES, MASK, shift_mean=False)
    torch.testing.assert_close(kept, torch.tensor([[2 - root, 2, 0], [2 + root, 0, 0]]), atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, rows=st.integers(1, 4), columns=st.integers(2, 6))
def test_the_same_as_torch_on_the_selected_values(seed, rows, columns):
    values, mask = draw(seed, rows, columns)
    selected = values[mask]
    torch.testing.assert_close(masked_sum(values, mask), selected.sum())
    torch.testing.assert_close(masked_mean(values, mask), selected.mean())
    torch.testing.assert_close(masked_var(values, mask), selected.var(correction=0))
    torch.testing.assert_close(masked_var(values, mask, unbiased=True), selected.var(correction=1))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, rows=st.integers(1, 4), columns=st.integers(2, 6))
def test_whitening_gives_mean_zero_and_variance_one_over_the_mask(seed, rows, columns):
    """Its biased variance is v / (v + eps), 1 but for eps. shift_mean=False keeps the mean, and does not double it."""
    values, mask = draw(seed, rows, columns)
    whitened = masked_whiten(values, mask)[mask]
    assert abs(whitened.mean()) < 1e-9
    variance = values[mask].var(correction=0).item()
    assert whitened.var(correction=0).item() == pytest.approx(variance / (variance + 1e-8), abs=1e-12)
    kept = masked_whiten(values, mask, shift_mean=False)[mask]
    torch.testing.assert_close(kept.mean(), values[mask].mean())
    torch.testing.assert_close(kept - kept.mean(), whitened)


@every_function
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_masked_leaks_neither_value_nor_gradient(function, garbage):
    values, mask = draw(0, 3, 5)
    value, gradient = value_and_gradient(function, torch.where(mask, values, 0.0), mask)
    dirty_value, dirty_gradient = value_and_gradient(function, torch.where(mask, values, garbage), mask)
    assert torch.equal(value, dirty_value)
    assert torch.equal(gradient, dirty_gradient)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@every_function
def test_nothing_takes_part(function):
    """Zero, and a gradient of zeros: not 0 / 0."""
    value, gradient = value_and_gradient(function, VALUES, torch.zeros_like(MASK))
    assert (value == 0).all()
    assert (gradient == 0).all()


@every_function
def test_a_row_without_tokens_changes_nothing_for_the_others(function):
    """One empty row: its own sums and means are 0, every gradient is finite."""
    mask = MASK.clone()
    mask[1] = False
    value, gradient = value_and_gradient(function, torch.where(mask, VALUES, math.nan), mask)
    alone, gradient_alone = value_and_gradient(function, VALUES[:1], mask[:1])
    if value.ndim:
        assert (value[1] == 0).all()
        value, alone = value[0], alone[0]
    torch.testing.assert_close(value, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:1], gradient_alone, rtol=1e-6, atol=1e-6)
    assert (gradient[1] == 0).all()


@every_function
@settings(max_examples=15, deadline=None)
@given(seed=seeds, extra=st.integers(1, 4))
def test_padding_changes_nothing(function, seed, extra):
    values, mask = draw(seed, 3, 4)
    value = function(values, mask)
    pad = torch.full((3, extra), math.nan, dtype=values.dtype)
    padded = function(torch.cat([values, pad], 1), torch.cat([mask, torch.zeros(3, extra, dtype=torch.bool)], 1))
    if value.shape == values.shape:  # whitening returns every place
        assert (padded[:, 4:] == 0).all()
        padded = padded[:, :4]
    torch.testing.assert_close(padded, value, rtol=1e-12, atol=1e-12)
