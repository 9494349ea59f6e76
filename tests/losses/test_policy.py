"""PPO's clipped surrogate: numbers by hand, who gets a gradient, and gauges that point the right way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.policy import policy_loss

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, rows: int = 3, columns: int = 5) -> dict[str, torch.Tensor]:
    """Policies some way apart, advantages of both signs, a ragged mask with at least one token a row; float64."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(rows, columns, dtype=torch.float64, generator=generator)
    return dict(
        new_logprobs=logprobs + 0.3 * torch.randn(rows, columns, dtype=torch.float64, generator=generator),
        logprobs=logprobs,
        advantages=torch.randn(rows, columns, dtype=torch.float64, generator=generator),
        mask=torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=generator),
    )


def of_ratios(ratios: list[float], advantages: list[float]) -> dict[str, torch.Tensor]:
    """One row whose tokens have these ratios and advantages; the new log-probs want a gradient."""
    new = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    mask = torch.ones(new.shape, dtype=torch.bool)
    return dict(
        new_logprobs=new, logprobs=torch.zeros_like(new), advantages=torch.tensor([advantages]).double(), mask=mask
    )


@settings(max_examples=20, deadline=None)
@given(seed=seeds, clip=st.floats(0.01, 2))
def test_at_ratio_one_it_is_reinforce(seed, clip):
    """Loss -mean(A); gradient -A / N on each token, that of -mean(A log p). Nothing clipped, no KL."""
    batch = draw(seed)
    new = batch["logprobs"].clone().requires_grad_()
    loss, stats = policy_loss(**batch | {"new_logprobs": new}, clip=clip)
    loss.backward()
    mask, advantages = batch["mask"], batch["advantages"]
    torch.testing.assert_close(loss.detach(), -advantages[mask].mean())
    torch.testing.assert_close(new.grad, torch.where(mask, -advantages / mask.sum(), 0.0))
    assert stats["clip_fraction"] == 0 and stats["approx_kl"] == 0 and stats["ratio_max"] == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "slope"),
    [
        (1.5, 1.0, 1.2, 0.0),  # good, and likelier already: cut at 1 + clip
        (1.5, -1.0, -1.5, -1.5),  # bad, yet likelier: pushed down, the further the harder
        (0.5, 1.0, 0.5, 0.5),  # good, yet rarer: pushed up
        (0.5, -1.0, -0.8, 0.0),  # bad, and rarer already: cut at 1 - clip
        (1.1, 2.0, 2.2, 2.2),  # inside the range nothing is cut
        (0.9, -2.0, -1.8, -1.8),
        (7.0, 0.0, 0.0, 0.0),
    ],
)
def test_which_tokens_are_cut(ratio, advantage, surrogate, slope):
    """clip 0.2: min(ratio A, clamp(ratio) A), and its gradient ratio A by the log-prob, or exactly 0."""
    batch = of_ratios([ratio], [advantage])
    loss, _ = policy_loss(**batch, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-surrogate)
    assert batch["new_logprobs"].grad.item() == (pytest.approx(-slope) if slope else 0)


def test_a_batch_by_hand():
    """The surrogates 1.2, -1.5, 0.5, -0.8 sum to -0.6, so 0.15 over four tokens and 0.06 over a window of ten."""
    batch = of_ratios([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0])
    assert policy_loss(**batch, clip=0.2)[0].item() == pytest.approx(0.15)
    assert policy_loss(**batch, clip=0.2, normalizer=10)[0].item() == pytest.approx(0.06)
    assert policy_loss(**batch, clip=0.2, normalizer=torch.tensor(10))[0].item() == pytest.approx(0.06)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, clip=st.floats(0.05, 1.5))
def test_equals_a_loop_over_tokens(seed, clip):
    batch = draw(seed)
    total, count, outside = 0.0, 0, 0
    for new, old, advantage, kept in zip(*(tensor.flatten().tolist() for tensor in batch.values()), strict=True):
        if kept:
            ratio = math.exp(new - old)
            total -= min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
            count, outside = count + 1, outside + (abs(ratio - 1) > clip)
    loss, stats = policy_loss(**batch, clip=clip)
    assert loss.item() == pytest.approx(total / count, abs=1e-12)
    assert stats["clip_fraction"].item() == pytest.approx(outside / count)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_micro_batches_add_up(seed):
    """Row by row over the count of the whole minibatch: the same loss and the same gradient."""
    batch = draw(seed)
    whole, parts = (batch["new_logprobs"].clone().requires_grad_() for _ in range(2))
    loss, _ = policy_loss(**batch | {"new_logprobs": whole})
    loss.backward()
    total = 0.0
    for row in range(3):
        rows = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        rows["new_logprobs"] = parts[row : row + 1]
        part, _ = policy_loss(**rows, normalizer=batch["mask"].sum())
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_garbage_and_padding_change_nothing(garbage):
    """In the loss, the gradient and every gauge."""
    batch = draw(1)
    mask = batch["mask"]
    assert not mask.all()
    results = []
    for filling, extra in ((0.0, 0), (garbage, 4)):
        pad = torch.full((3, extra), filling, dtype=torch.float64)
        wide = {name: torch.cat([torch.where(mask, batch[name], filling), pad], 1) for name in batch if name != "mask"}
        wide["mask"] = torch.cat([mask, torch.zeros(3, extra, dtype=torch.bool)], 1)
        wide["new_logprobs"].requires_grad_()
        loss, stats = policy_loss(**wide)
        loss.backward()
        results.append((loss.detach(), wide["new_logprobs"].grad, stats))
    (loss, gradient, stats), (dirty_loss, dirty_gradient, dirty_stats) = results
    close = dict(rtol=1e-12, atol=0)  # a wider row may be added up in another order
    torch.testing.assert_close(dirty_loss, loss, **close)
    torch.testing.assert_close(dirty_gradient[:, :5], gradient, **close)
    assert (dirty_gradient[:, 5:] == 0).all()
    torch.testing.assert_close(dirty_stats, stats, **close)


def test_no_tokens_at_all():
    batch = draw(2)
    new = batch["new_logprobs"].clone().requires_grad_()
    loss, stats = policy_loss(**batch | {"new_logprobs": new, "mask": torch.zeros(3, 5, dtype=torch.bool)})
    loss.backward()
    assert loss == 0 and (new.grad == 0).all()
    assert all(value == 0 for value in stats.values())


A, B = (2, 1, 1), (1, 1, 6)  # in quarters and in eighths, as in tests/ops/test_kl.py
KL_AB, KL_BA = 1.25 * math.log(2) - 0.25 * math.log(3), 0.75 * math.log(3) - 0.375 * math.log(2)


@pytest.mark.parametrize(("behaviour", "new", "kl"), [(A, B, KL_AB), (B, A, KL_BA)], ids=["AB", "BA"])
def test_approx_kl_is_that_of_the_sampling_policy(behaviour, new, kl):
    """Tokens in exactly the behaviour policy's proportions, so their mean is its expectation: KL(behaviour || new).

    With the ratio upside down k3 would give E[exp(-log_ratio) - 1 + log_ratio], another number (0.99 and 0.78).
    """
    symbols = torch.arange(3).repeat_interleave(torch.tensor(behaviour))[None]
    old, now = ((torch.tensor(p, dtype=torch.float64) / sum(p)).log() for p in (behaviour, new))
    batch = dict(logprobs=old[symbols], new_logprobs=now[symbols], advantages=torch.zeros(symbols.shape).double())
    _, stats = policy_loss(**batch, mask=torch.ones(symbols.shape, dtype=torch.bool))
    assert stats["approx_kl"].item() == pytest.approx(kl, abs=1e-12)
    inverted = ((old - now).exp() - 1 - (old - now))[symbols].mean().item()
    assert abs(inverted - kl) > 0.2


def test_gauges_by_hand_over_unmasked_tokens_only():
    """Ratios 1.5, 0.5, 1.1, 1 with clip 0.2: two of four outside, the largest 1.5. Two masked ones are ignored."""
    batch = of_ratios([1.5, 0.5, 1.1, 1.0, 9.0, 0.01], [1.0] * 6)
    batch["mask"] = torch.tensor([[True] * 4 + [False] * 2])
    _, stats = policy_loss(**batch, clip=0.2)
    assert not any(value.requires_grad for value in stats.values())
    assert stats["clip_fraction"].item() == 0.5
    assert stats["ratio_max"].item() == pytest.approx(1.5)


@pytest.mark.parametrize("log_ratio", [100.0, 1e4])  # exp(88.7) is the last that float32 holds
def test_a_ratio_that_overflows(log_ratio):
    """Where A >= 0 there is a finite answer, (1 + clip) A with gradient 0; where A < 0 the loss is infinite."""
    new = torch.tensor([[log_ratio, log_ratio, 0.0]], requires_grad=True)
    batch = dict(new_logprobs=new, logprobs=torch.zeros(1, 3), mask=torch.ones(1, 3, dtype=torch.bool))
    loss, stats = policy_loss(**batch, advantages=torch.tensor([[2.0, 0.0, 1.0]]), clip=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.5 * 2 + 0 + 1) / 3)
    assert new.grad.tolist() == [pytest.approx([0, 0, -1 / 3])]
    assert stats["ratio_max"] == math.inf and stats["clip_fraction"].item() == pytest.approx(2 / 3)
    loss, _ = policy_loss(**batch, advantages=torch.tensor([[-1.0, 1.0, 1.0]]))
    assert loss == math.inf


def test_gradcheck():
    """Away from the kinks: ratios inside, above and below the range, advantages of both signs."""
    batch = of_ratios([1.1, 1.5, 0.5, 0.95, 1.4, 0.6], [1.0, 0.7, 0.3, -1.0, -0.2, -0.9])
    new = batch.pop("new_logprobs")
    assert torch.autograd.gradcheck(lambda now: policy_loss(new_logprobs=now, **batch, clip=0.2)[0], (new,))


def test_wrong_arguments_are_named():
    batch = draw(0)
    with pytest.raises(ValueError, match="no policy loss named 'pg'; there is 'ppo'"):
        policy_loss("pg", **batch)
    for clip in (0.0, -0.2, math.nan):
        with pytest.raises(ValueError, match=f"clip={clip}: expected more than 0"):
            policy_loss(**batch, clip=clip)
