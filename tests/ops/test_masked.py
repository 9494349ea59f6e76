"""Reductions over a mask, compared with values by hand and with torch on the selected values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.masked import (
    AGGREGATIONS,
    masked_aggregate,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    require_tokens,
)

MASK = torch.tensor([[True, True, False], [True, False, False]])
VALUES = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])  # 1, 2, 3 are counted

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
def test_what_is_masked_leaks_neither_value_nor_gradient(function):
    values, mask = draw(0, 3, 5)
    value, gradient = value_and_gradient(function, torch.where(mask, values, 0.0), mask)
    for garbage in (math.nan, 1e30):
        dirty_value, dirty_gradient = value_and_gradient(function, torch.where(mask, values, garbage), mask)
        assert torch.equal(value, dirty_value)
        assert torch.equal(gradient, dirty_gradient)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@every_function
def test_a_mask_that_is_false_everywhere(function):
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


# -------------------------------------------------------------------------------------------------------- aggregation

each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def test_aggregations_by_hand():
    """Rows (1, 2) and (3): tokens 6 / 3 = 2; sequences (3/2 + 3) / 2 = 9/4; their sums (3 + 3) / 2 = 3; over a
    max_length of 4, (3/4 + 3/4) / 2 = 3/4. A third row without tokens changes nothing.
    """
    for rows in (2, 3):
        values = torch.nn.functional.pad(VALUES, (0, 0, 0, rows - 2), value=math.nan)
        mask = torch.nn.functional.pad(MASK, (0, 0, 0, rows - 2))
        assert masked_aggregate(values, mask) == 2
        assert masked_aggregate(values, mask, "token") == 2
        assert masked_aggregate(values, mask, "sequence") == 2.25
        assert masked_aggregate(values, mask, "sequence_sum") == 3
        assert masked_aggregate(values, mask, "max_length", max_length=4) == 0.75


def test_gradients_of_the_aggregations_by_hand():
    """What each token weighs: 1/3; 1 / (rows * length); 1 / rows; 1 / (rows * max_length)."""
    for aggregation, weights in {
        "token": [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]],
        "sequence": [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0]],
        "sequence_sum": [[1 / 2, 1 / 2, 0], [1 / 2, 0, 0]],
        "max_length": [[1 / 8, 1 / 8, 0], [1 / 8, 0, 0]],
    }.items():
        values = VALUES.clone().requires_grad_()
        masked_aggregate(values, MASK, aggregation, max_length=4).backward()
        torch.testing.assert_close(values.grad, torch.tensor(weights))


def test_a_normalizer_takes_the_place_of_the_count():
    """The sum 6 over 12 tokens; over 12 sequences 9/2, 6 and 3/2. A tensor will do."""
    for aggregation, expected in [("token", 0.5), ("sequence", 0.375), ("sequence_sum", 0.5), ("max_length", 0.125)]:
        for normalizer in (12, torch.tensor(12)):
            found = masked_aggregate(VALUES, MASK, aggregation, normalizer=normalizer, max_length=4)
            assert found.item() == pytest.approx(expected)


@each_aggregation
@settings(max_examples=40, deadline=None)
@given(seed=seeds, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_any_split_of_a_batch_adds_up(aggregation, seed, sizes):
    """Divided by the whole batch's count, the parts sum to the whole, in value and gradient; empty rows among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(sum(sizes), 4, generator=generator) < 0.4
    mask[0, 0] = True
    whole, parts = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss = masked_aggregate(whole, mask, aggregation, max_length=9)
    loss.backward()
    count, total = mask.sum() if aggregation == "token" else mask.any(-1).sum(), 0.0
    for rows in torch.arange(sum(sizes)).split(sizes):
        part = masked_aggregate(parts[rows], mask[rows], aggregation, normalizer=count, max_length=9)
        part.backward()
        total = total + part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)
    assert (whole.grad[~mask] == 0).all()


@each_aggregation
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_aggregations_equal_a_loop(aggregation, seed):
    values, mask = draw(seed, 4, 5)
    mask[2] = False
    rows = [row[kept].tolist() for row, kept in zip(values, mask, strict=True) if kept.any()]
    expected = {
        "token": sum(map(sum, rows)) / sum(map(len, rows)),
        "sequence": sum(sum(row) / len(row) for row in rows) / len(rows),
        "sequence_sum": sum(map(sum, rows)) / len(rows),
        "max_length": sum(map(sum, rows)) / 7 / len(rows),
    }[aggregation]
    assert masked_aggregate(values, mask, aggregation, max_length=7).item() == pytest.approx(expected, abs=1e-12)


@each_aggregation
def test_aggregations_ignore_masked_values(aggregation):
    values, mask = draw(0, 3, 5)
    mask[1] = False
    results = []
    for filling in (0.0, math.nan, 1e30):
        dirty = torch.where(mask, values, filling).requires_grad_()
        value = masked_aggregate(dirty, mask, aggregation, max_length=6)
        value.backward()
        results.append((value.detach(), dirty.grad))
    for result in results[1:]:
        assert all(torch.equal(clean, dirty) for clean, dirty in zip(results[0], result, strict=True))
    assert (results[0][1][~mask] == 0).all() and (results[0][1][mask] != 0).all()


@each_aggregation
def test_a_part_without_tokens_is_zero_and_a_whole_is_refused(aggregation):
    nothing, values = torch.zeros_like(MASK), VALUES.clone().requires_grad_()
    part = masked_aggregate(values, nothing, aggregation, normalizer=5, max_length=4)
    part.backward()
    assert part == 0 and (values.grad == 0).all()
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) is False everywhere: expected at least one token"):
        masked_aggregate(VALUES, nothing, aggregation, max_length=4)


def test_unknown_aggregations_and_lengths_are_named():
    with pytest.raises(
        ValueError, match="aggregation='mean': expected one of token, sequence, sequence_sum, max_length"
    ):
        masked_aggregate(VALUES, MASK, "mean")
    for length in (None, 0, -3):
        with pytest.raises(ValueError, match=f"max_length={length}: expected more than 0 for aggregation 'max_length'"):
            masked_aggregate(VALUES, MASK, "max_length", max_length=length)


def test_require_tokens():
    """One token is enough, and so is a normalizer; otherwise the mask is named, by its own name where it has one."""
    nothing = torch.zeros_like(MASK)
    require_tokens(MASK)
    require_tokens(nothing, 3)
    require_tokens(nothing, torch.tensor(3))
    for empty in (nothing, torch.zeros(0, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^mask of shape \(\d, 3\) is False everywhere"):
            require_tokens(empty)
    with pytest.raises(ValueError, match=r"^chosen_mask of shape \(2, 3\)"):
        require_tokens(nothing, name="chosen_mask")
