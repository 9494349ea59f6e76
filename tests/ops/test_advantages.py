"""GAE against its definition as a sum, its two limits, and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.advantages import gae


def draw(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and values, float64, and a left-aligned mask of lengths 0 to `columns`."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator)
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    return rewards, values, torch.arange(columns) < lengths


def by_the_sum(rewards, values, mask, gamma, lam) -> tuple[torch.Tensor, torch.Tensor]:
    """A_t = sum over k >= t of (gamma lam)^(k - t) (r_k + gamma V_{k+1} - V_k), V = 0 past the end. Slow on purpose."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row, length in enumerate(mask.sum(-1).tolist()):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            deltas = ((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            advantages[row, t] = sum(deltas)
            returns[row, t] = advantages[row, t] + v[t]
    return advantages, returns


shapes = dict(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), columns=st.integers(1, 9))
fractions = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(**shapes, gamma=fractions, lam=fractions)
def test_equals_the_definition(seed, rows, columns, gamma, lam):
    rewards, values, mask = draw(seed, rows, columns)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    true_advantages, true_returns = by_the_sum(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, true_advantages, rtol=0, atol=1e-10)
    torch.testing.assert_close(returns, true_returns, rtol=0, atol=1e-10)


def test_by_hand():
    """r = (0, 0, 1), V = 1/2 everywhere, gamma 1, lam 1/2: delta = (0, 0, 1/2), A = (1/8, 1/4, 1/2).

    The same with gamma 1/2: delta_t = V/2 - V = -1/4 before the end, A_2 = 1/2, A_1 = -1/4 + A_2 / 4 = -1/8,
    A_0 = -1/4 - 1/32 = -9/32. The second row ends after two tokens: r = (0, 1), A = (1/4, 1/2).
    """
    rewards, values = torch.tensor([[0.0, 0, 1], [0, 1, 9]]), torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 9]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.125, 0.25, 0.5], [0.25, 0.5, 0]]
    assert returns.tolist() == [[0.625, 0.75, 1], [0.75, 1, 0]]
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages[0].tolist() == [-9 / 32, -0.125, 0.5]
    assert returns[0].tolist() == [7 / 32, 0.375, 1]


@settings(max_examples=20, deadline=None)
@given(**shapes, gamma=fractions)
def test_lam_one_is_the_return_minus_the_value(seed, rows, columns, gamma):
    """Every V but the first cancels: A_t = sum over k >= t of gamma^(k - t) r_k - V_t, return_t without any V."""
    rewards, values, mask = draw(seed, rows, columns)
    weights = gamma ** (torch.arange(columns) - torch.arange(columns)[:, None]).clamp(min=0).double()  # (t, k)
    monte_carlo = torch.where(mask, torch.where(mask, rewards, 0.0) @ weights.triu().T, 0.0)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    torch.testing.assert_close(advantages, monte_carlo - torch.where(mask, values, 0.0), rtol=0, atol=1e-10)
    torch.testing.assert_close(returns, monte_carlo, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(**shapes, gamma=fractions)
def test_lam_zero_is_the_td_error(seed, rows, columns, gamma):
    rewards, values, mask = draw(seed, rows, columns)
    kept = torch.where(mask, values, 0.0)
    following = torch.cat([kept[:, 1:], torch.zeros(rows, 1).double()], 1)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=0.0)
    torch.testing.assert_close(
        advantages, torch.where(mask, rewards + gamma * following - values, 0.0), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_masked_garbage_and_padding_change_nothing(garbage):
    rewards, values, mask = draw(1, 4, 5)
    assert not mask.all()
    clean = gae(torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), mask, gamma=0.9, lam=0.8)
    pad = torch.full((4, 3), garbage).double()
    dirty_rewards, dirty_values = (torch.cat([torch.where(mask, x, garbage), pad], 1) for x in (rewards, values))
    padded_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    dirty = gae(dirty_rewards, dirty_values, padded_mask, gamma=0.9, lam=0.8)
    for tensor, truth in zip(dirty, clean, strict=True):
        assert torch.equal(tensor[:, :5], truth)
        assert (tensor[:, 5:] == 0).all() and (tensor[~padded_mask] == 0).all()


def test_a_perfect_critic_has_no_advantage():
    """Where V_t is the discounted return itself, every delta is 0, whatever lam is."""
    rewards, _, mask = draw(2, 3, 6)
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, lam=1.0)
    advantages, _ = gae(rewards, returns, mask, gamma=0.9, lam=0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)


def test_the_inputs_are_left_alone():
    rewards, values, mask = draw(3, 2, 4)
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])
