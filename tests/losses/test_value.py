"""The clipped value loss, and the explained variance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.value import explained_variance, value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)
seeds = st.integers(0, 2**32 - 1)


def one_token(new: float, old: float, target: float, **options):
    """Loss, gradient by the new value, and stats of a single token, float64."""
    value = torch.tensor([[new]], dtype=torch.float64, requires_grad=True)
    old, target = (torch.tensor([[x]], dtype=torch.float64) for x in (old, target))
    loss, stats = value_loss(new_values=value, values=old, returns=target, mask=ONE, **options)
    loss.backward()
    return loss.item(), value.grad.item(), stats


def draw(seed: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random values, some moved beyond the clip range, returns, rows of different lengths of at least one token."""
    generator = torch.Generator().manual_seed(seed)
    values, returns, move = torch.randn(3, 3, 5, generator=generator, dtype=dtype)
    mask = torch.arange(5) < torch.randint(1, 6, (3, 1), generator=generator)
    return dict(new_values=values + 0.3 * move, values=values, returns=returns, mask=mask)


@pytest.mark.parametrize(
    ("new", "target", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, 3.24 / 2, 0.0, 1),  # moved 1 towards 2, clipped at 0.2: (0.2 - 2)^2, gradient 0
        (1.0, 0.0, 1.0 / 2, 1.0, 0),  # moved away: the plain error is larger, gradient V - R
        (-1.0, -3.0, 7.84 / 2, 0.0, 1),  # below: (-0.2 + 3)^2
        (0.1, 1.0, 0.81 / 2, -0.9, 0),  # inside the range nothing is clipped
        (1.0, 1.0, 0.64 / 2, 0.0, 1),  # right, but too far: (0.2 - 1)^2
    ],
)
def test_clipping_by_hand(new, target, loss, slope, clipped):
    """From an old value of 0 with value_clip 0.2: max of the two squared errors, halved."""
    value, gradient, stats = one_token(new, 0.0, target, value_clip=0.2)
    assert (value, gradient) == (pytest.approx(loss), pytest.approx(slope))
    assert stats["value_clip_fraction"] == clipped and stats["value_mean"] == new
    assert not any(stat.requires_grad for stat in stats.values())


def test_without_clipping_it_is_half_the_squared_error():
    """(1 - 3)^2 / 2 = 2, gradient V - R = -2, however far the old value."""
    assert one_token(1.0, -50.0, 3.0, value_clip=None)[:2] == (2.0, -2.0)


def test_mean_and_normalizer_by_hand():
    """Squared errors 1 and 9 over two tokens, halved: 2.5; over a window of ten, 0.5. The third token is masked."""
    mask = torch.tensor([[True, True, False]])
    tensors = dict(new_values=torch.tensor([[1.0, 3.0, 7.0]]), values=torch.zeros(1, 3), returns=torch.zeros(1, 3))
    assert value_loss(**tensors, mask=mask, value_clip=None)[0] == 2.5
    assert value_loss(**tensors, mask=mask, value_clip=None, normalizer=10)[0] == 0.5
    assert value_loss(**tensors, mask=mask, value_clip=None, normalizer=torch.tensor(10))[0] == 0.5


@settings(max_examples=30, deadline=None)
@given(seed=seeds, value_clip=st.floats(0.05, 1))
def test_equals_a_loop_over_tokens(seed, value_clip):
    batch = draw(seed)
    total, count, clips = 0.0, 0, 0
    for new, old, target, kept in zip(*(tensor.flatten().tolist() for tensor in batch.values()), strict=True):
        if kept:
            clipped = (min(max(new, old - value_clip), old + value_clip) - target) ** 2
            total += max((new - target) ** 2, clipped) / 2
            count, clips = count + 1, clips + (clipped > (new - target) ** 2)
    loss, stats = value_loss(**batch, value_clip=value_clip)
    assert loss.item() == pytest.approx(total / count, abs=1e-12)
    assert stats["value_clip_fraction"].item() == pytest.approx(clips / count)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_rounding_is_not_clipping(seed):
    """In float32 old + (new - old) need not be new; inside the range the clip fraction must be 0 all the same."""
    batch = draw(seed, torch.float32)
    _, stats = value_loss(**batch | {"values": 100 * batch["values"]}, value_clip=1e4)
    assert stats["value_clip_fraction"] == 0


@pytest.mark.parametrize("value_clip", [0.2, None])
@pytest.mark.parametrize("garbage", [math.nan, 1e30])
def test_masked_garbage_and_padding_change_nothing(value_clip, garbage):
    """In the loss, the gradient and every metric."""
    batch = draw(1)
    mask = batch["mask"]
    assert not mask.all()
    results = []
    for filling, extra in ((0.0, 0), (garbage, 4)):
        pad = torch.full((3, extra), filling, dtype=torch.float64)
        wide = {name: torch.cat([torch.where(mask, batch[name], filling), pad], 1) for name in batch if name != "mask"}
        wide["mask"] = torch.cat([mask, torch.zeros(3, extra, dtype=torch.bool)], 1)
        wide["new_values"].requires_grad_()
        loss, stats = value_loss(**wide, value_clip=value_clip)
        loss.backward()
        stats["explained"] = explained_variance(wide["values"], wide["returns"], wide["mask"])
        results.append((loss.detach(), wide["new_values"].grad, stats))
    (loss, gradient, stats), (dirty_loss, dirty_gradient, dirty_stats) = results
    close = dict(rtol=1e-12, atol=0)  # a wider row may be added up in another order
    torch.testing.assert_close(dirty_loss, loss, **close)
    torch.testing.assert_close(dirty_gradient[:, :5], gradient, **close)
    assert (dirty_gradient[:, 5:] == 0).all()
    torch.testing.assert_close(dirty_stats, stats, **close)


@pytest.mark.parametrize("value_clip", [0.2, None])
def test_micro_batches_add_up(value_clip):
    batch = draw(3)
    whole, parts = (batch["new_values"].clone().requires_grad_() for _ in range(2))
    value_loss(**batch | {"new_values": whole}, value_clip=value_clip)[0].backward()
    for row in range(3):
        rows = {name: tensor[row : row + 1] for name, tensor in batch.items()} | {"new_values": parts[row : row + 1]}
        value_loss(**rows, value_clip=value_clip, normalizer=batch["mask"].sum())[0].backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value_clip", [0.2, None])
def test_a_part_without_tokens(value_clip):
    """With a normalizer: loss, gradient and metrics 0. Otherwise an error."""
    batch = draw(2) | {"mask": torch.zeros(3, 5, dtype=torch.bool)}
    new = batch["new_values"].clone().requires_grad_()
    loss, stats = value_loss(**batch | {"new_values": new}, value_clip=value_clip, normalizer=7)
    loss.backward()
    assert loss == 0 and (new.grad == 0).all() and all(value == 0 for value in stats.values())
    with pytest.raises(ValueError, match=r"mask of shape \(3, 5\) is False everywhere"):
        value_loss(**batch, value_clip=value_clip)


@pytest.mark.parametrize("value_clip", [0.2, None])
def test_a_row_without_tokens_is_not_there(value_clip):
    """Its gradient is exactly 0, and the others' loss and gradients are those of a batch without it."""
    batch = draw(5)
    batch["mask"][1] = False
    others = {name: tensor[[0, 2]] for name, tensor in batch.items()}
    new, alone = (each["new_values"].clone().requires_grad_() for each in (batch, others))
    loss, stats = value_loss(**batch | {"new_values": new}, value_clip=value_clip)
    loss_alone, stats_alone = value_loss(**others | {"new_values": alone}, value_clip=value_clip)
    (loss + loss_alone).backward()
    assert (new.grad[1] == 0).all()
    torch.testing.assert_close(
        (loss, stats, new.grad[[0, 2]]), (loss_alone, stats_alone, alone.grad), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("value_clip", [0.2, None])
def test_gradcheck(value_clip):
    """With respect to new values and returns; some values are clipped, none is at a kink."""
    batch = draw(4)
    mask, old = batch["mask"], batch["values"]
    assert 0 < value_loss(**batch, value_clip=0.2)[1]["value_clip_fraction"] < 1
    assert torch.autograd.gradcheck(
        lambda new, returns: value_loss(new_values=new, values=old, returns=returns, mask=mask, value_clip=value_clip)[
            0
        ],
        (batch["new_values"].requires_grad_(), batch["returns"].requires_grad_()),
    )


@pytest.mark.parametrize("value_clip", [0.0, -0.2, math.nan])
def test_a_clip_out_of_range_is_named(value_clip):
    with pytest.raises(ValueError, match=f"value_clip={value_clip}: expected more than 0, or None"):
        value_loss(**draw(0), value_clip=value_clip)


RETURNS = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])


@pytest.mark.parametrize(
    ("values", "explained"),
    [
        ([-1.0, 1.0, -1.0, 1.0], 1.0),  # V = R: Var(0) = 0
        ([4.0, 6.0, 4.0, 6.0], 1.0),  # V = R + 5: a bias is no variance
        ([7.0, 7.0, 7.0, 7.0], 0.0),  # a constant: Var(R) / Var(R)
        ([-0.5, 0.5, -0.5, 0.5], 0.75),  # V = R / 2: Var(R / 2) = Var(R) / 4
        ([1.0, -1.0, 1.0, -1.0], -3.0),  # V = -R: Var(2R) = 4 Var(R)
    ],
)
def test_explained_variance_by_hand(values, explained):
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert explained_variance(torch.tensor([values]), RETURNS, mask).item() == pytest.approx(explained)
    with_garbage = torch.tensor([[*values, 9.0, math.nan]]), torch.tensor([[*RETURNS[0], math.inf, -9.0]])
    wide = torch.tensor([[True] * 4 + [False] * 2])
    assert explained_variance(*with_garbage, wide).item() == pytest.approx(explained)


def test_constant_returns_do_not_divide_by_zero():
    """Both variances are 0: the result is 1."""
    returns = torch.full((1, 3), 2.0)
    assert explained_variance(returns, returns, torch.ones(1, 3, dtype=torch.bool)) == 1
