"""GAE compared with a loop, its definition as a sum, its limits and values by hand; advantages without values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.advantages import (
    SCALES,
    _powers,
    discounted_returns,
    gae,
    group_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)


def draw(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and values, float64, and a left-aligned mask of lengths 0 to `columns`."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator)
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    return rewards, values, torch.arange(columns) < lengths


def gae_loop(rewards, values, mask, *, gamma=1.0, lam=0.95) -> tuple[torch.Tensor, torch.Tensor]:
    """The recursion of eq. 16, a column at a time from the last back; for left-aligned masks."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_advantage, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def walk(rewards, values, mask, *, gamma, lam, bootstrap=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row over the True tokens alone, from the last back, in Python's floats: any mask, any bootstrap."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(len(rewards)):
        next_value, next_advantage = (0.0 if bootstrap is None else bootstrap[row].item()), 0.0
        for t in reversed(mask[row].nonzero().flatten().tolist()):
            value = values[row, t].item()
            next_advantage = rewards[row, t].item() + gamma * next_value - value + gamma * lam * next_advantage
            next_value = value
            advantages[row, t], returns[row, t] = next_advantage, next_advantage + value
    return advantages, returns


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


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
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


def assert_all_close(found, expected, atol=1e-10):
    for tensor, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, truth, rtol=0, atol=atol)


@pytest.mark.parametrize("columns", [1, 2, 3, 49, 50, 98, 99, 500, 4100])
def test_equals_the_plain_loop_at_every_width(columns):
    """In one sum and in blocks: of 49 columns at a decay of 1/4, of 2 at 1e-12, below which two terms suffice."""
    rewards, values, mask = draw(columns, 3, columns)
    mask[0] = True
    decays = [(1, 0.95), (0.5, 0.5), (1, 1.1e-12)]
    if columns < 4000:  # the loop is slow
        decays += [(1, 1), (1, 0.999999), (0.99, 0.9), (0.9, 0.1), (1, 1e-6), (1, 1e-12), (1, 0.9e-12)]
        decays += [(1e-9, 1e-9), (0, 0.95), (1, 0), (0, 0)]
    for gamma, lam in decays:
        assert_all_close(
            gae(rewards, values, mask, gamma=gamma, lam=lam), gae_loop(rewards, values, mask, gamma=gamma, lam=lam)
        )


def test_float32_is_as_good_as_the_loop_in_float32():
    """Against the truth in float64, over 1,024 tokens: both are off by a few units of the last place of the largest."""
    rewards, values, mask = draw(0, 16, 1024)
    truth = gae_loop(rewards, values, mask, gamma=1.0, lam=0.99)
    found = gae(rewards.float(), values.float(), mask, gamma=1.0, lam=0.99)
    for tensor, exact in zip(found, truth, strict=True):
        assert tensor.dtype == torch.float32
        assert (tensor - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("dtype", "digits", "floor"), [(torch.float64, 1e-13, 1e-24), (torch.float32, 5e-7, 1e-20)])
def test_a_single_reward_is_discounted_by_powers_of_gamma(dtype, digits, floor):
    """To the last digit, over 4,100 tokens: gamma rounded to float32 first would be off by 1e-4.

    Values below `floor` are only bounded.
    """
    rewards = torch.zeros(1, 4100, dtype=dtype)
    rewards[0, -1] = 1
    for gamma in (1, 0.999, 0.9, 0.6, 0.25, 1e-3, 1e-6, 2e-12, 5e-13):
        returns = discounted_returns(rewards, torch.ones(1, 4100).bool(), gamma=gamma)[0].double()
        exact = gamma ** torch.arange(4099, -1, -1, dtype=torch.float64)
        kept = exact > floor
        torch.testing.assert_close(returns[kept], exact[kept], rtol=digits, atol=0)
        assert kept.sum() >= 2 and (returns[~kept].abs() <= 2 * floor).all()


def test_autocast_and_low_precision_inputs_do_not_round_the_scan():
    """For bfloat16 only the inputs and the returns are rounded."""
    rewards, values, mask = draw(0, 4, 200)
    rewards, values = rewards.float(), values.float()
    plain = gae(rewards, values, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_close(gae(rewards, values, mask), plain, atol=1e-5)
    half = rewards.bfloat16()
    exact = discounted_returns(half.double(), mask, gamma=0.99)
    assert torch.equal(discounted_returns(half, mask, gamma=0.99), exact.bfloat16())


@settings(max_examples=50, deadline=None)
@given(**shapes, gamma=fractions, lam=fractions, density=st.floats(0, 1), bootstrapped=st.booleans())
def test_any_mask_equals_the_walk_over_its_true_tokens(seed, rows, columns, gamma, lam, density, bootstrapped):
    rewards, values, _ = draw(seed, rows, columns)
    generator = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(rows, columns, generator=generator) < density
    bootstrap = torch.randn(rows, dtype=torch.float64, generator=generator) if bootstrapped else None
    options = dict(gamma=gamma, lam=lam, bootstrap=bootstrap)
    assert_all_close(gae(rewards, values, mask, **options), walk(rewards, values, mask, **options))


@pytest.mark.parametrize("columns", [7, 200])
@pytest.mark.parametrize("layout", ["right", "left", "both", "hole", "empty"])
def test_layouts(layout, columns):
    """Padded on the right, the left and both sides; with a hole in one row only; and with nothing in a row."""
    rewards, values, mask = draw(5, 4, columns)
    if layout == "left":
        mask = mask.flip(1)
    elif layout == "both":
        mask = torch.ones_like(mask)
        mask[:, 0] = mask[:, -2:] = False
    elif layout == "hole":
        mask[1] = True
        mask[1, 2:4] = False
    elif layout == "empty":
        mask[2] = False
    bootstrap = torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    for option in (None, bootstrap):
        options = dict(gamma=0.9, lam=0.8, bootstrap=option)
        assert_all_close(gae(rewards, values, mask, **options), walk(rewards, values, mask, **options))


def test_a_hole_by_hand():
    """The tokens in the middle come from a tool. r = (0, -, -, 1), V = (1/2, -, -, 1/4), gamma 1/2, lam 1:

    A_3 = 1 - 1/4 = 3/4; delta_0 = 0 + 1/2 * 1/4 - 1/2 = -3/8; A_0 = -3/8 + 1/2 * 3/4 = 0. Returns 1/2 and 1.
    """
    nan = math.nan
    rewards, values = torch.tensor([[0.0, nan, 5, 1]]), torch.tensor([[0.5, 7, nan, 0.25]])
    mask = torch.tensor([[True, False, False, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert advantages.tolist() == [[0, 0, 0, 0.75]]
    assert returns.tolist() == [[0.5, 0, 0, 1]]


def test_bootstrap_by_hand():
    """r = (0, 1), V = (1/2, 1/2), gamma 1/2, lam 1/2, and 4 after the end:

    delta_1 = 1 + 1/2 * 4 - 1/2 = 5/2, delta_0 = 0 + 1/4 - 1/2 = -1/4, A_0 = -1/4 + 1/4 * 5/2 = 3/8.
    The second row ends after one token: A_0 = 0 + 1/2 * 4 - 1/2 = 3/2. The third is empty: its NaN is ignored.
    """
    rewards, values = torch.tensor([[0.0, 1], [0, 9], [9, 9]]), torch.tensor([[0.5, 0.5], [0.5, 9], [9, 9]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    bootstrap = torch.tensor([4.0, 4.0, math.nan])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=bootstrap)
    assert advantages.tolist() == [[0.375, 2.5], [1.5, 0], [0, 0]]
    assert returns.tolist() == [[0.875, 3], [2, 0], [0, 0]]


def test_the_end_of_an_episode_is_a_bootstrap_of_zero():
    rewards, values, mask = draw(4, 3, 6)
    assert_all_close(gae(rewards, values, mask, bootstrap=torch.zeros(3).double()), gae(rewards, values, mask), atol=0)


def test_a_cut_episode_with_the_true_value_after_it_is_a_whole_one():
    """Cut after three of six tokens, with the return from there as the bootstrap: the same returns as uncut, lam 1."""
    rewards, values, _ = draw(6, 4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    whole = discounted_returns(rewards, mask, gamma=0.9)
    cut = discounted_returns(rewards, mask & (torch.arange(6) < 3), gamma=0.9, bootstrap=whole[:, 3])
    torch.testing.assert_close(cut[:, :3], whole[:, :3], rtol=0, atol=1e-12)
    advantages, _ = gae(rewards[:, :3], values[:, :3], mask[:, :3], gamma=0.9, lam=1.0, bootstrap=whole[:, 3])
    torch.testing.assert_close(advantages, whole[:, :3] - values[:, :3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", [5, 140])
@pytest.mark.parametrize("holes", [False, True])
def test_gradients(columns, holes):
    """Of rewards, values and bootstrap: one sum, blocks of 52 columns, and compacted rows. Masked places get none."""
    rewards, values, mask = draw(8, 3, columns)
    mask[0] = True
    if holes:
        mask[0, 1:3] = False
    bootstrap = torch.tensor([1.0, 2.0, 3.0]).double()
    rows = slice(0, 2) if columns > 100 else slice(None)  # the numeric gradient is slow
    inputs = [x[rows].clone().requires_grad_() for x in (rewards, values, bootstrap)]
    assert torch.autograd.gradcheck(
        lambda r, v, b: gae(r, v, mask[rows], gamma=0.9, lam=0.3, bootstrap=b), inputs, fast_mode=columns > 100
    )
    dirty = [torch.where(mask, x, math.nan).requires_grad_() for x in (rewards, values)]
    sum(x.sum() for x in gae(*dirty, mask)).backward()
    for x in dirty:
        assert (x.grad[~mask] == 0).all() and x.grad.isfinite().all()


def test_a_call_in_inference_mode_does_not_break_autograd():
    """The powers of the decay are cached between calls, and here the first call is in inference mode."""
    _powers.cache_clear()
    rewards, values, mask = draw(9, 3, 140)
    with torch.inference_mode():
        gae(rewards, values, mask, lam=0.77)
    assert _powers.cache_info().misses > 0
    rewards.requires_grad_()
    gae(rewards, values, mask, lam=0.77)[0].sum().backward()
    assert rewards.grad.isfinite().all()


@pytest.mark.parametrize("columns", [0, 3, 150])
def test_no_rows_or_no_columns(columns):
    for shape in ((0, columns), (2, columns)):
        empty = torch.zeros(shape)
        for tensor in gae(empty, empty, empty.bool(), bootstrap=torch.ones(shape[0])):
            assert tensor.shape == shape and (tensor == 0).all()


@pytest.mark.parametrize("function", [gae, lambda r, v, m: (discounted_returns(r, m, gamma=0.9),)])
def test_a_row_depends_on_itself_alone(function):
    """Permuted, or one at a time; and an infinity reaches only the tokens before it, as in the recursion."""
    rewards, values, mask = draw(10, 4, 50)
    found = function(rewards, values, mask)
    order = torch.tensor([2, 0, 3, 1])
    assert_all_close(function(rewards[order], values[order], mask[order]), [x[order] for x in found], atol=1e-12)
    for row in range(4):
        alone = function(*(x[row : row + 1] for x in (rewards, values, mask)))
        assert_all_close(alone, [x[row : row + 1] for x in found], atol=1e-12)
    mask[1] = torch.arange(50) < 20
    clean_row = [x[1] for x in function(rewards, values, mask)]
    rewards[1, 10] = math.inf
    others = [0, 2, 3]
    for infinite, clean, row in zip(function(rewards, values, mask), found, clean_row, strict=True):
        torch.testing.assert_close(infinite[others], clean[others], rtol=0, atol=1e-12)
        assert (infinite[1, :11] == math.inf).all() and (infinite[~mask] == 0).all()
        torch.testing.assert_close(infinite[1, 11:], row[11:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gamma=-0.1), "gamma=-0.1: expected 0 to 1"),
        (dict(gamma=1.1), "gamma=1.1: expected 0 to 1"),
        (dict(gamma=math.nan), "gamma=nan: expected 0 to 1"),
        (dict(lam=-1), "lam=-1: expected 0 to 1"),
        (dict(lam=1.5), "lam=1.5: expected 0 to 1"),
        (dict(bootstrap=torch.zeros(2, 1)), r"bootstrap of shape \(2, 1\): expected one value a row, \(2,\)"),
        (dict(bootstrap=torch.zeros(1)), r"bootstrap of shape \(1,\): expected one value a row, \(2,\)"),
    ],
)
def test_wrong_arguments_of_gae_are_named(options, message):
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, False, True]] * 2)):
        with pytest.raises(ValueError, match=message):
            gae(torch.zeros(2, 3), torch.zeros(2, 3), mask, **options)


def test_returns_by_hand():
    """gamma 1/2, r = (1, 2, 4): 4, 2 + 2 = 4, 1 + 2 = 3. With 8 after the end: 8, 6, 4."""
    rewards, mask = torch.tensor([[1.0, 2, 4, math.nan]]), torch.tensor([[True, True, True, False]])
    assert discounted_returns(rewards, mask, gamma=0.5).tolist() == [[3, 4, 4, 0]]
    assert discounted_returns(rewards, mask, gamma=0.5, bootstrap=torch.tensor([8.0])).tolist() == [[4, 6, 8, 0]]
    assert discounted_returns(rewards, mask).tolist() == [[7, 6, 4, 0]]


# Scores in groups. 1, 2, 6 and 5, 5, 8: the leave-one-out means are 4, 3.5, 1.5 and 6.5, 6.5, 5.
SCORES = torch.tensor([1.0, 2, 6, 5, 5, 8])


def test_leave_one_out_by_hand():
    """1 - 4, 2 - 3.5, 6 - 1.5; 5 - 6.5, 5 - 6.5, 8 - 5. Both shapes."""
    expected = [-3, -1.5, 4.5, -1.5, -1.5, 3]
    assert rloo_advantages(SCORES, group_size=3).tolist() == expected
    assert rloo_advantages(SCORES.view(2, 3)).flatten().tolist() == expected
    assert rloo_advantages(SCORES.view(2, 3), group_size=3).shape == (2, 3)


def test_group_by_hand():
    """Means 3 and 6, deviations (-2, -1, 3) and (-1, -1, 2); std sqrt(14 / 2) and sqrt(6 / 2).

    Over the batch the mean is 4.5, squares 12.25 + 6.25 + 2.25 + 0.25 + 0.25 + 12.25 = 33.5, std sqrt(33.5 / 5).
    """
    centred = torch.tensor([-2.0, -1, 3, -1, -1, 2])
    assert group_advantages(SCORES, group_size=3, scale="none").tolist() == centred.tolist()
    std = torch.tensor([7.0, 7, 7, 3, 3, 3]).sqrt()
    torch.testing.assert_close(group_advantages(SCORES, group_size=3), centred / (std + 1e-4))
    torch.testing.assert_close(group_advantages(SCORES.view(2, 3), eps=0.5).flatten(), centred / (std + 0.5))
    batch = group_advantages(SCORES, group_size=3, scale="batch")
    torch.testing.assert_close(batch, centred / (math.sqrt(6.7) + 1e-4))


def test_invalid_scores_are_ignored():
    """1, NaN, 6 is a group of two: baselines 6 and 1, mean 3.5, std 5 / sqrt(2). NaN, 5, NaN: 5 is alone."""
    nan = math.nan
    scores = torch.tensor([1.0, nan, 6, nan, 5, math.inf])
    valid = torch.tensor([True, False, True, False, True, False])
    assert rloo_advantages(scores, group_size=3, valid=valid).tolist() == [-5, 0, 5, 0, 0, 0]
    assert group_advantages(scores, group_size=3, valid=valid, scale="none").tolist() == [-2.5, 0, 2.5, 0, 0, 0]
    scaled = group_advantages(scores, group_size=3, valid=valid)
    half = 2.5 / (5 / math.sqrt(2) + 1e-4)
    torch.testing.assert_close(scaled, torch.tensor([-half, 0, half, 0, 0, 0]))
    # All three, 1, 6 and 5: mean 4, squares 9 + 4 + 1 = 14, std sqrt(14 / 2).
    whole = 2.5 / (math.sqrt(7) + 1e-4)
    batch = group_advantages(scores, group_size=3, valid=valid, scale="batch")
    torch.testing.assert_close(batch, torch.tensor([-whole, 0, whole, 0, 0, 0]))
    for scale in SCALES:
        nothing = torch.zeros(6, dtype=torch.bool)
        assert (group_advantages(scores, group_size=3, valid=nothing, scale=scale) == 0).all()
    assert (rloo_advantages(scores, group_size=3, valid=nothing) == 0).all()


groups = st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(scores=groups, shift=st.floats(-50, 50), seed=st.integers(0, 2**32 - 1))
def test_identities_of_groups(scores, shift, seed):
    """Each group sums to 0, is invariant to a shift, equivariant to permutations, and independent of other groups.

    Leave-one-out is the centred score times G / (G - 1), and equals its definition sample by sample.
    """
    scores = torch.tensor(scores, dtype=torch.float64)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    close = dict(rtol=0, atol=1e-9)
    functions = [rloo_advantages, *(lambda x, scale=scale: group_advantages(x, scale=scale) for scale in SCALES)]
    for function in functions:
        advantages = function(scores)
        assert advantages.sum(-1).abs().max() < 1e-8
        torch.testing.assert_close(function(scores[:, order]), advantages[:, order], **close)
        if function is not functions[2]:  # the std of the batch is every group's
            torch.testing.assert_close(function(scores[:1]), advantages[:1], **close)
        torch.testing.assert_close(function(scores + shift), advantages, rtol=0, atol=1e-6)
    for row, group in enumerate(scores.tolist()):
        for i in range(3):
            others = (sum(group) - group[i]) / 2
            assert rloo_advantages(scores)[row, i].item() == pytest.approx(group[i] - others, abs=1e-9)
    torch.testing.assert_close(rloo_advantages(scores), 1.5 * group_advantages(scores, scale="none"), **close)


def test_equal_scores_have_advantage_zero_exactly():
    """0.1 + 0.1 + 0.1 over 3 is not 0.1 in float32, and the remainder would be divided by eps."""
    for value, size in itertools.product((0.1, 0.3, 1 / 3, -1e-7, 1e6 + 0.1, 0.0), (2, 3, 7, 8, 13)):
        scores = torch.full((2, size), value)
        for scale in SCALES:
            assert (group_advantages(scores, scale=scale) == 0).all()
        assert (rloo_advantages(scores) == 0).all()


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (SCORES, dict(group_size=1), "group_size=1: expected 2 or more"),
        (SCORES, dict(group_size=0), "group_size=0: expected 2 or more"),
        (SCORES, dict(group_size=4), r"group_size=4: expected a divisor of scores of shape \(6,\)"),
        (SCORES, dict(), r"group_size=None with scores of shape \(6,\)"),
        (SCORES.view(6, 1), dict(), "group_size=1: expected 2 or more"),
        (SCORES.view(2, 3), dict(group_size=2), r"group_size=2: expected a divisor of scores of shape \(2, 3\)"),
        (
            SCORES,
            dict(group_size=3, valid=torch.ones(2, 3).bool()),
            r"valid of shape \(2, 3\): expected that of scores",
        ),
    ],
)
def test_wrong_groups_are_named(scores, options, message):
    for function in (rloo_advantages, group_advantages):
        with pytest.raises(ValueError, match=message):
            function(scores, **options)


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="scale='std': expected one of group, batch, none"):
        group_advantages(SCORES, group_size=3, scale="std")
    for eps in (0.0, -1e-4, math.nan):
        with pytest.raises(ValueError, match=f"eps={eps}: expected more than 0"):
            group_advantages(SCORES, group_size=3, eps=eps)
    with pytest.raises(ValueError, match="gamma=0.9: expected 1 with group_size=2"):
        reinforce_pp_advantages(torch.zeros(2, 3), torch.ones(2, 3).bool(), gamma=0.9, group_size=2)
    with pytest.raises(ValueError, match="gamma=2: expected 0 to 1"):
        reinforce_pp_advantages(torch.zeros(2, 3), torch.ones(2, 3).bool(), gamma=2)
    with pytest.raises(ValueError, match=r"greedy_scores of shape \(3, 1\): expected that of scores, \(3,\)"):
        remax_advantages(torch.zeros(3), torch.zeros(3, 1))


def test_scores_of_any_dtype():
    """Whole numbers and halves become float32; float64 stays."""
    for dtype, out in ((torch.int64, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for function in (rloo_advantages, group_advantages):
            assert function(SCORES.to(dtype), group_size=3).dtype == out
    assert rloo_advantages(SCORES.long(), group_size=3).tolist() == [-3, -1.5, 4.5, -1.5, -1.5, 3]


def test_reinforce_pp_by_hand():
    """r = (0, 1) and (4), gamma 1/2: returns 1/2, 1, 4; mean 11/6; the baseline-free advantage of the last is largest.

    With groups of two and r = (1, 1 | 4): totals 2 and 4 around 3, so -1, -1, 1 over the three tokens, mean -1/3,
    squares 4/9 + 4/9 + 16/9 = 24/9, variance 8/9: (-2/3, -2/3, 4/3) / sqrt(8/9) = (-1, -1, 2) / sqrt 2.
    """
    mask = torch.tensor([[True, True], [True, False]])
    whitened = reinforce_pp_advantages(torch.tensor([[0.0, 1], [4, math.nan]]), mask, gamma=0.5)
    returns = torch.tensor([0.5, 1, 4])
    expected = (returns - 11 / 6) / returns.std(correction=0)
    torch.testing.assert_close(whitened[mask], expected)
    assert whitened[1, 1] == 0
    baseline = reinforce_pp_advantages(torch.tensor([[1.0, 1], [4, math.nan]]), mask, group_size=2)
    torch.testing.assert_close(baseline, torch.tensor([[-1.0, -1], [2, 0]]) / math.sqrt(2))


def test_reinforce_pp_is_whitened_over_the_batch_and_groups_are_apart():
    """Mean 0, variance 1 over all tokens; a constant added to one group's totals changes nothing."""
    rewards, _, mask = draw(11, 6, 5)
    mask[:, 0] = True
    for options in (dict(gamma=0.9), dict(group_size=3)):
        advantages = reinforce_pp_advantages(rewards, mask, **options)
        assert abs(advantages[mask].mean()) < 1e-12
        assert advantages[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
        assert (advantages[~mask] == 0).all()
    lifted = rewards.clone()
    lifted[:3, 0] += 7
    torch.testing.assert_close(reinforce_pp_advantages(lifted, mask, group_size=3), advantages, rtol=0, atol=1e-12)
    assert (reinforce_pp_advantages(lifted, mask) - reinforce_pp_advantages(rewards, mask)).abs().max() > 0.1


def test_a_completion_without_tokens_is_in_no_group_mean():
    """Totals 1, 3 and nothing, around 2 and not around 4/3; and 5, 5, 8 around 6: -1, 1, -1, -1, 2, variance 8/5."""
    rewards = torch.tensor([[1.0], [3], [9], [5], [5], [8]])
    advantages = reinforce_pp_advantages(rewards, rewards != 9, group_size=3)
    expected = torch.tensor([[-1.0], [1], [0], [-1], [-1], [2]]) / math.sqrt(1.6)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)


def test_remax_by_hand():
    assert remax_advantages(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([3.0, 1.0, 2.0])).tolist() == [-2, 4, 0]
