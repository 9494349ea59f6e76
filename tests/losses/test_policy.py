"""Policy losses: PPO's clipped surrogate in depth, the table and its recipes, added terms, and off-policy weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.policy import (
    POLICY_LOSSES,
    PolicyTerms,
    Recipe,
    entropy_bonus,
    importance_weights,
    kl_loss,
    off_policy_mask,
    policy_loss,
    ptx_loss,
    register_policy_loss,
)
from rlhf_core.ops.logprobs import vocab_statistics

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, rows: int = 3, columns: int = 5) -> dict[str, torch.Tensor]:
    """Two different policies, advantages of both signs, rows of different lengths of at least one token; float64."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(rows, columns, dtype=torch.float64, generator=generator)
    return dict(
        new_logprobs=logprobs + 0.3 * torch.randn(rows, columns, dtype=torch.float64, generator=generator),
        logprobs=logprobs,
        advantages=torch.randn(rows, columns, dtype=torch.float64, generator=generator),
        mask=torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=generator),
    )


def of_ratios(ratios: list[float], advantages: list[float]) -> dict[str, torch.Tensor]:
    """One row whose tokens have these ratios and advantages; the new log-probs require a gradient."""
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
        (1.5, 1.0, 1.2, 0.0),  # A > 0 and more likely already: clipped at 1 + clip
        (1.5, -1.0, -1.5, -1.5),  # A < 0 but more likely: not clipped
        (0.5, 1.0, 0.5, 0.5),  # A > 0 but less likely: not clipped
        (0.5, -1.0, -0.8, 0.0),  # A < 0 and less likely already: clipped at 1 - clip
        (1.1, 2.0, 2.2, 2.2),  # inside the range
        (0.9, -2.0, -1.8, -1.8),
        (7.0, 0.0, 0.0, 0.0),
    ],
)
def test_which_tokens_are_clipped(ratio, advantage, surrogate, slope):
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


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
def test_masked_garbage_and_padding_change_nothing(garbage):
    """In the loss, the gradient and every metric."""
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
    """An error; with a normalizer, a micro-batch that adds 0."""
    batch = draw(2) | {"mask": torch.zeros(3, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match="False everywhere"):
        policy_loss(**batch)
    new = batch["new_logprobs"].clone().requires_grad_()
    loss, stats = policy_loss(**batch | {"new_logprobs": new}, normalizer=7)
    loss.backward()
    assert loss == 0 and (new.grad == 0).all()
    assert all(value == 0 for value in stats.values())


A, B = (2, 1, 1), (1, 1, 6)  # in quarters and in eighths, as in tests/ops/test_kl.py
KL_AB, KL_BA = 1.25 * math.log(2) - 0.25 * math.log(3), 0.75 * math.log(3) - 0.375 * math.log(2)


@pytest.mark.parametrize(("sampling", "new", "kl"), [(A, B, KL_AB), (B, A, KL_BA)], ids=["AB", "BA"])
def test_approx_kl_is_that_of_the_sampling_policy(sampling, new, kl):
    """Tokens in exactly the sampling policy's proportions, so their mean is its expectation: KL(sampling || new).

    With an inverted ratio k3 would be E[exp(-log_ratio) - 1 + log_ratio], another number (0.99 and 0.78).
    """
    symbols = torch.arange(3).repeat_interleave(torch.tensor(sampling))[None]
    old, now = ((torch.tensor(p, dtype=torch.float64) / sum(p)).log() for p in (sampling, new))
    batch = dict(logprobs=old[symbols], new_logprobs=now[symbols], advantages=torch.zeros(symbols.shape).double())
    _, stats = policy_loss(**batch, mask=torch.ones(symbols.shape, dtype=torch.bool))
    assert stats["approx_kl"].item() == pytest.approx(kl, abs=1e-12)
    inverted = ((old - now).exp() - 1 - (old - now))[symbols].mean().item()
    assert abs(inverted - kl) > 0.2


def test_metrics_by_hand_over_unmasked_tokens_only():
    """Ratios 1.5, 0.5, 1.1, 1 with clip 0.2: two of four outside, the largest 1.5. Two masked ones are ignored."""
    batch = of_ratios([1.5, 0.5, 1.1, 1.0, 9.0, 0.01], [1.0] * 6)
    batch["mask"] = torch.tensor([[True] * 4 + [False] * 2])
    _, stats = policy_loss(**batch, clip=0.2)
    assert not any(value.requires_grad for value in stats.values())
    assert stats["clip_fraction"].item() == 0.5
    assert stats["ratio_max"].item() == pytest.approx(1.5)


@pytest.mark.parametrize("log_ratio", [100.0, 1e4])  # float32 overflows above exp(88.7)
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
    with pytest.raises(ValueError, match="no policy loss named 'grppo'.*did you mean 'grpo'"):
        policy_loss("grppo", **batch)
    for clip in (0.0, -0.2, math.nan):
        with pytest.raises(ValueError, match=f"clip={clip}: expected more than 0"):
            policy_loss(**batch, clip=clip)
    for name, options, message in [
        ("ppo", {"clip_high": 0.0}, "clip_high=0.0: expected more than 0"),
        ("ppo", {"dual_clip": 1.1}, "dual_clip=1.1: expected more than 1 . clip_high = 1.2"),
        ("ppo", {"ratio_max": 2.0}, "ratio_max=2.0: ppo has no such option"),
        ("ppo", {"ratio_level": "word"}, "ratio_level='word': expected 'token' or 'sequence'"),
        ("ppo", {"aggregation": "mean"}, "aggregation='mean': expected one of"),
        ("dr_grpo", {}, "max_length=None: expected more than 0 for aggregation 'max_length'"),
        ("cispo", {"ratio_max": 0.0}, "ratio_max=0.0: expected more than 0"),
        ("sapo", {"temperature_neg": 0.0}, "temperature_neg=0.0: expected more than 0"),
        ("gmpo", {"clip": -1.0}, "clip=-1.0: expected more than 0"),
        ("gmpo", {"clip_high": -1.0}, "clip_high=-1.0: expected more than 0"),
        ("vespo", {"k_pos": 0.0}, "k_pos=0.0: expected more than 0"),
        ("vespo", {"weights": torch.ones(3, 5)}, "weights: not defined for 'vespo'"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy_loss(name, **batch, **options)


# ------------------------------------------------------------------------------------------------------------ the table


def two_completions() -> dict[str, torch.Tensor]:
    """Ratios 3/2, 1/2 with A = 1; ratio 2 with A = -1, then NaN. Sampling log-probs 0: new = ln ratio."""
    nan = math.nan
    return dict(
        new_logprobs=torch.tensor([[1.5, 0.5], [2.0, nan]], dtype=torch.float64).log().requires_grad_(),
        logprobs=torch.tensor([[0.0, 0.0], [0.0, nan]], dtype=torch.float64),
        advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
        mask=torch.tensor([[True, True], [True, False]]),
    )


# clip 0.2 clips the tokens' losses to -1.2, -0.5 and 2; the sequences' ratios are sqrt(3/4) = .8660254 and 2.
# ln 1.5 = .4054651, ln 2 = .6931472
BY_HAND = {
    "ppo": ({}, 0.1),  # (-1.2 - .5 + 2) / 3
    "dapo": ({}, 0.1),
    "bnpo": ({}, 0.1),
    "grpo": ({}, 0.575),  # (-1.7 / 2 + 2) / 2
    "dr_grpo": ({"max_length": 4}, 0.0375),  # (-1.7 / 4 + 2 / 4) / 2
    "gspo": ({}, 0.5669873),  # (-.8660254 + 2) / 2
    "luspo": ({}, 0.1339746),  # (-2 * .8660254 + 2) / 2
    "reinforce": ({}, 0.4904146),  # (-(.4054651 - .6931472) + .6931472) / 2
    "cispo": ({"ratio_max": 1.25}, 0.2353921),  # (-(1.25 * .4054651 - .5 * .6931472) + 1.25 * .6931472) / 3
    "sapo": ({}, 0.4109999),  # (-(4 s(.5) + 4 s(-.5)) / 2 + 4 / 1.05 s(1.05)) / 2 = (-2 + 2.8219998) / 2
    "gmpo": ({}, 0.5681690),  # (-exp((.4 - .6931472) / 2) + 2) / 2
    "vespo": (
        {},
        0.3643445,
    ),  # w = 3/4 and 2: phi = exp(3 + 2 ln w - 3 w) = 1.1908123, exp(2 + 3 ln w - 2 w) = 1.0826823
}


def test_every_policy_loss_has_its_number():
    assert set(BY_HAND) == set(POLICY_LOSSES)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_the_table_by_hand(name):
    options, expected = BY_HAND[name]
    loss, stats = policy_loss(name, **two_completions(), **options)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    assert not any(value.requires_grad for value in stats.values())


def table_options(name: str) -> dict:
    return {"max_length": 7} if name == "dr_grpo" else {}


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_on_policy_each_is_the_policy_gradient(name, seed):
    """At ratio 1 every surrogate's gradient is -A grad log p under its aggregation: no clip, weight 1."""
    batch = draw(seed)
    batch["advantages"] = batch["advantages"][:, :1].expand(-1, 5)
    new = batch["logprobs"].clone().requires_grad_()
    options = table_options(name)
    loss, stats = policy_loss(name, **batch | {"new_logprobs": new}, **options)
    (gradient,) = torch.autograd.grad(loss, new)
    aggregation = options | {"aggregation": POLICY_LOSSES[name].aggregation}
    (expected,) = torch.autograd.grad(policy_loss("reinforce", **batch | {"new_logprobs": new}, **aggregation)[0], new)
    if POLICY_LOSSES[name].ratio_level == "sequence":  # its gradient is spread evenly over the completion's tokens
        lengths = batch["mask"].sum(-1, keepdim=True)
        expected = torch.where(batch["mask"], expected.sum(-1, keepdim=True) / lengths, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert stats.get("clip_fraction", torch.tensor(0)) == 0 and stats["ratio_max"] == 1


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"cispo", "vespo"}))
def test_gradcheck_of_the_table(name):
    """Ratios on either side of every kink, advantages of both signs. (cispo and vespo stop a gradient: below.)"""
    batch = draw(3)
    new = batch.pop("new_logprobs").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(name, new_logprobs=x, **batch, **table_options(name))[0], (new,)
    )


@pytest.mark.parametrize("name", ["cispo", "vespo"])
def test_a_stopped_weight_is_a_constant(name):
    """The gradient is -weight A on each token, divided by the number of tokens."""
    batch = draw(4)
    new = batch["new_logprobs"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(name, **batch | {"new_logprobs": new})[0], new)
    mask, log_ratio = batch["mask"], torch.where(batch["mask"], batch["new_logprobs"] - batch["logprobs"], 0.0)
    if name == "cispo":
        weight = log_ratio.exp().clamp(max=5.0)
    else:
        w = log_ratio.sum(-1, keepdim=True).exp()
        weight = torch.where(
            batch["advantages"] >= 0, math.e**3 * w**2 * (-3 * w).exp(), math.e**2 * w**3 * (-2 * w).exp()
        )
    torch.testing.assert_close(gradient, torch.where(mask, -weight * batch["advantages"] / mask.sum(), 0.0))


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@settings(max_examples=10, deadline=None)
@given(seed=seeds, cut=st.integers(1, 2))
def test_the_table_ignores_order_padding_and_splits(name, seed, cut):
    batch = draw(seed)
    entry, options = POLICY_LOSSES[name], table_options(name)
    loss, _ = policy_loss(name, **batch, **options)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    moved = {}
    for key, tensor in batch.items():
        wide = torch.nn.functional.pad(tensor[order], (0, 2), value=0 if key == "mask" else math.nan)
        empty = torch.zeros_like(wide[:1]) if key == "mask" else torch.full_like(wide[:1], math.inf)
        moved[key] = torch.cat([wide, empty])
    torch.testing.assert_close(policy_loss(name, **moved, **options)[0], loss)
    count = batch["mask"].sum() if entry.aggregation == "token" else 3
    parts = [
        policy_loss(name, **{key: tensor[part] for key, tensor in batch.items()}, **options, normalizer=count)[0]
        for part in (slice(0, cut), slice(cut, 3))
    ]
    torch.testing.assert_close(sum(parts), loss)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_the_table_is_never_nan(name):
    """Ratios that overflow or underflow: infinite only where A < 0 and nothing bounds the surrogate."""
    mask = torch.ones(2, 2, dtype=torch.bool)
    dtypes, log_ratios, advantages = (torch.float32, torch.float64), (-1000.0, 1000.0), (1.0, 0.0, -1.0)
    for dtype, log_ratio, advantage in itertools.product(dtypes, log_ratios, advantages):
        new = torch.full((2, 2), log_ratio, dtype=dtype, requires_grad=True)
        loss, _ = policy_loss(
            name, new_logprobs=new, logprobs=torch.zeros(2, 2, dtype=dtype), mask=mask,
            advantages=torch.full((2,), advantage, dtype=dtype), **table_options(name),
        )  # fmt: skip
        unbounded = advantage < 0 and log_ratio > 0 and name not in ("reinforce", "cispo", "sapo", "vespo")
        assert loss == math.inf if unbounded else loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, new)
        assert unbounded or gradient.isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "slope"),
    [
        (1.25, 1.0, 1.25, 1.25),  # between 1 + clip and 1 + clip_high
        (1.5, 1.0, 1.3, 0.0),
        (0.5, -1.0, -0.8, 0.0),  # the lower bound is clip's
        (2.9, -1.0, -2.9, -2.9),
        (4.0, -1.0, -3.0, 0.0),  # dual clip: at least -3
        (1e30, -1.0, -3.0, 0.0),
        (4.0, 1.0, 1.3, 0.0),
    ],
)
def test_clip_higher_and_dual_clip(ratio, advantage, surrogate, slope):
    """clip 0.2, clip_high 0.3, dual_clip 3."""
    batch = of_ratios([ratio], [advantage])
    loss, stats = policy_loss(**batch, clip=0.2, clip_high=0.3, dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(-surrogate)
    assert batch["new_logprobs"].grad.item() == (pytest.approx(-slope) if slope else 0)
    assert stats["clip_fraction"] == float(not 0.8 <= ratio <= 1.3)


def test_aggregation_and_ratio_level_can_be_overridden():
    """Any surrogate with any aggregation and any ratio: "ppo" with GRPO's is "grpo", with GSPO's "gspo"."""
    batch = two_completions()
    for name in ("grpo", "gspo", "luspo"):
        entry = POLICY_LOSSES[name]
        loss, _ = policy_loss("ppo", **batch, aggregation=entry.aggregation, ratio_level=entry.ratio_level)
        assert torch.equal(loss, policy_loss(name, **batch)[0])
    assert policy_loss("sapo", **batch, aggregation="token")[0] != policy_loss("sapo", **batch)[0]


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_one_advantage_a_completion_in_any_shape(seed):
    batch = draw(seed)
    per_row = batch["advantages"][:, 0]
    losses = [
        policy_loss("gmpo", **batch | {"advantages": shape})[0]
        for shape in (per_row, per_row[:, None], per_row[:, None].expand(3, 5))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_weights_multiply_each_tokens_loss():
    """-1.2, -0.5 and 2 with weights 1/2, 2 and 1: (-0.6 - 1 + 2) / 3; no gradient through the weights."""
    weights = torch.tensor([[0.5, 2.0], [1.0, math.nan]], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(**two_completions(), weights=weights)
    assert loss.item() == pytest.approx(0.4 / 3)
    assert torch.autograd.grad(loss, weights, allow_unused=True) == (None,)


def test_a_policy_loss_of_ones_own():
    try:

        @register_policy_loss("squared", aggregation="sequence_sum", recipe=Recipe({"scale": 3.0}, kl_coef=0.0))
        def squared(terms: PolicyTerms, *, scale=1.0):
            return scale * terms.log_ratio.square()

        batch = of_ratios([math.e, math.e], [1.0, 1.0])
        assert policy_loss("squared", **batch, scale=3.0)[0].item() == pytest.approx(6)
        assert policy_loss("squared", **batch)[0].item() == pytest.approx(2)  # the recipe is the job's
        assert POLICY_LOSSES["squared"].recipe.options == {"scale": 3.0}
        masked = of_ratios([math.e, math.nan], [1.0, 1.0]) | {"mask": torch.tensor([[True, False]])}
        policy_loss("squared", **masked)[0].backward()
        assert masked["new_logprobs"].grad[0].tolist() == pytest.approx([2, 0])
        with pytest.raises(ValueError, match="'squared' is registered already"):
            register_policy_loss("squared")(squared)
    finally:
        POLICY_LOSSES.pop("squared", None)


def test_recipes_of_the_papers():
    """KL coefficient, scale, clip ranges and normalizer where they differ from GRPO's; options exist and are valid."""
    plain = Recipe(options={}, kl_coef=0.04, scale="group", local_normalizer=False)
    expected = {
        "dr_grpo": replace(plain, kl_coef=0.0, scale="none"),
        "dapo": replace(plain, kl_coef=0.0, options={"clip_high": 0.28}),
        "gspo": replace(plain, options={"clip": 3e-4, "clip_high": 4e-4}),
        "bnpo": replace(plain, local_normalizer=True),
    }
    for name, entry in POLICY_LOSSES.items():
        assert entry.recipe == expected.get(name, plain)
        loss, _ = policy_loss(name, **two_completions(), **table_options(name), **entry.recipe.options)
        assert loss.isfinite()


# ---------------------------------------------------------------------------------------------- terms added to a loss


def test_kl_loss_by_hand():
    """d = new - ref = 1/2, -1 and 2: k2 = 1/8, 1/2 and 2, in three tokens 2.625 / 3; by sequences (0.625 / 2 + 2) / 2.

    With the ratio: k3 = e^-d - 1 + d = .1065307, .7182818, 1.1353353 times 3/2, 1/2 and 2.
    """
    batch = two_completions()
    new, mask, nan = batch["new_logprobs"], batch["mask"], math.nan
    reference = new.detach() - torch.tensor([[0.5, -1.0], [2.0, nan]], dtype=torch.float64)
    loss, stats = kl_loss(new, reference, mask)
    assert loss.item() == pytest.approx(2.625 / 3) and stats["kl"].item() == pytest.approx(2.625 / 3)
    assert kl_loss(new, reference, mask, aggregation="sequence")[0].item() == pytest.approx((0.625 / 2 + 2) / 2)
    assert kl_loss(new, reference, mask, normalizer=6)[0].item() == pytest.approx(2.625 / 6)
    loss, stats = kl_loss(new, reference, mask, estimator="k3", logprobs=batch["logprobs"])
    assert loss.item() == pytest.approx((1.5 * 0.1065307 + 0.5 * 0.7182818 + 2 * 1.1353353) / 3)
    assert stats["kl"].item() == pytest.approx((0.1065307 + 0.7182818 + 1.1353353) / 3)
    loss, _ = kl_loss(new, reference, mask, estimator="k3", logprobs=batch["logprobs"], ratio_level="sequence")
    assert loss.item() == pytest.approx((0.8660254 * (0.1065307 + 0.7182818) + 2 * 1.1353353) / 3)


@pytest.mark.parametrize(("estimator", "weighted"), [("k2", False), ("k3", True), ("k1", True)])
def test_kl_loss_has_the_gradient_of_the_kl(estimator, weighted):
    """Three symbols in exactly the policy's proportions (1/2, 1/4, 1/4): the mean over tokens is the expectation.

    d KL / d logit_j = p_j (log(p_j / q_j) - KL), for a reference q of (1/8, 1/8, 3/4).
    """
    symbols = torch.tensor([[0, 0, 1, 2]])
    logits = torch.tensor([1 / 2, 1 / 4, 1 / 4]).double().log().requires_grad_()
    reference = torch.tensor([1 / 8, 1 / 8, 3 / 4]).double().log()
    new = logits.log_softmax(-1)
    old = {"logprobs": new.detach()[symbols]} if weighted else {}
    loss, _ = kl_loss(new[symbols], reference[symbols], torch.ones(1, 4, dtype=torch.bool), estimator=estimator, **old)
    (gradient,) = torch.autograd.grad(loss, logits)
    p = new.detach().exp()
    d = new.detach() - reference
    torch.testing.assert_close(gradient, p * (d - (p * d).sum()))


@pytest.mark.parametrize(("estimator", "weighted"), [("k1", False), ("k3", False), ("k2", True)])
def test_kl_loss_warns_of_a_wrong_gradient(estimator, weighted):
    batch = draw(5)
    old = {"logprobs": batch["logprobs"]} if weighted else {}
    with pytest.warns(UserWarning, match=f"KL estimator '{estimator}' as a {'weighted ' if weighted else ''}loss"):
        kl_loss(batch["new_logprobs"], batch["logprobs"], batch["mask"], estimator=estimator, **old)


def test_entropy_bonus_has_the_exact_gradient():
    """-coef times the mean of H, dH / dz = -p (log p + H)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    entropy = vocab_statistics(logits).entropy
    loss, stats = entropy_bonus(entropy, mask, entropy_coef=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    p = logits.detach().softmax(-1)
    h = torch.special.entr(p).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, torch.where(mask[..., None], 0.1 * p * (p.log() + h) / 3, 0.0))
    torch.testing.assert_close(stats["entropy"], h[..., 0][mask].mean())
    torch.testing.assert_close(loss.detach(), -0.1 * stats["entropy"])
    assert torch.autograd.gradcheck(
        lambda z: entropy_bonus(vocab_statistics(z).entropy, mask, entropy_coef=0.1, aggregation="sequence")[0],
        (logits,),
    )
    with pytest.raises(ValueError, match="entropy_coef=-0.1: expected 0 or more"):
        entropy_bonus(entropy, mask, entropy_coef=-0.1)


def test_ptx_by_hand():
    """-1, -2 and -3 in three tokens: coefficient 27.8 times 2; over a window of six tokens half of it."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = ptx_loss(logprobs, mask, ptx_coef=27.8)
    assert loss.item() == pytest.approx(55.6) and stats["ptx_nll"].item() == pytest.approx(2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -27.8 / 3, 0.0).double())
    assert ptx_loss(logprobs, mask, ptx_coef=27.8, normalizer=6)[0].item() == pytest.approx(27.8)
    with pytest.raises(ValueError, match="ptx_coef=-1: expected 0 or more"):
        ptx_loss(logprobs, mask, ptx_coef=-1)


# -------------------------------------------------------------------------------------------------- off-policy samples


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[3.0, 0.5], [2.0, 0.0]]),
        ({"weight_max": 10.0}, [[4.0, 0.5], [2.0, 0.0]]),
        ({"weight_min": 0.8}, [[3.0, 0.8], [2.0, 0.0]]),
        ({"mode": "mask"}, [[0.0, 0.5], [2.0, 0.0]]),
        ({"mode": "mask", "weight_min": 0.8}, [[0.0, 0.0], [2.0, 0.0]]),
        ({"level": "sequence"}, [[2.0, 2.0], [2.0, 0.0]]),
        ({"level": "sequence", "weight_max": 1.5}, [[1.5, 1.5], [1.5, 0.0]]),
        ({"level": "sequence", "mode": "mask", "weight_max": 1.5}, [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_importance_weights_by_hand(options, expected):
    """Ratios policy / engine of 4, 1/2 in one completion (product 2) and 2 in another."""
    ratios = torch.tensor([[4.0, 0.5], [2.0, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    weights = importance_weights(ratios.log().requires_grad_(), torch.zeros(2, 2).double(), mask, **options)
    torch.testing.assert_close(weights, torch.tensor(expected).double())
    assert not weights.requires_grad


def test_importance_weights_out_of_range():
    batch = draw(6)
    for options, message in [
        ({"level": "word"}, "level='word': expected 'token' or 'sequence'"),
        ({"mode": "drop"}, "mode='drop': expected 'truncate' or 'mask'"),
        ({"weight_min": 4.0}, "weight_min=4.0: expected between 0 and weight_max = 3.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            importance_weights(batch["new_logprobs"], batch["logprobs"], batch["mask"], **options)


def test_importance_weights_give_expectations_under_the_policy():
    """Untruncated, the weighted mean of any f over the engine's symbols is its mean under the policy."""
    engine, policy = torch.tensor([1 / 2, 1 / 4, 1 / 4]).double(), torch.tensor([1 / 8, 1 / 8, 3 / 4]).double()
    symbols = torch.tensor([[0, 0, 1, 2]])
    weights = importance_weights(policy.log()[symbols], engine.log()[symbols], torch.ones(1, 4, dtype=torch.bool))
    f = torch.tensor([3.0, -1.0, 2.0]).double()
    torch.testing.assert_close((weights * f[symbols]).mean(), (policy * f).sum())


def test_off_policy_mask_by_hand():
    """Mean log(p_rollout / p_new) of 1, 0.3 and 1 with A = -1, -1, 1 and threshold 1/2: drops the first."""
    rollout = torch.tensor([[1.5, 0.5], [0.3, math.nan], [1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    new, advantages = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor([-1.0, -1.0, 1.0])
    kept = off_policy_mask(new, rollout, advantages, mask, threshold=0.5)
    assert kept.tolist() == [[False, False], [True, False], [True, True]]
    by_token = torch.tensor([[-1.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    assert off_policy_mask(new, rollout, by_token, mask, threshold=0.5).tolist()[0] == [False, True]
    with pytest.raises(ValueError, match="threshold=0: expected more than 0"):
        off_policy_mask(new, rollout, advantages, mask, threshold=0)


@pytest.mark.parametrize("name", ["ppo", "gmpo", "vespo"])
def test_half_precision_goes_in_and_float32_comes_out(name):
    batch = {key: tensor.bfloat16() if key != "mask" else tensor for key, tensor in draw(7).items()}
    exact = {key: tensor.float() if key != "mask" else tensor for key, tensor in batch.items()}
    loss, _ = policy_loss(name, **batch, **table_options(name))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, policy_loss(name, **exact, **table_options(name))[0])


def test_shapes_that_would_broadcast_are_refused():
    batch = draw(8)
    with pytest.raises(ValueError, match=r"logprobs of shape \(3, 1\): expected that of its mask, \(3, 5\)"):
        policy_loss(**batch | {"logprobs": batch["logprobs"][:, :1]})
    with pytest.raises(ValueError, match="mask.dtype=torch.int64: expected torch.bool"):
        policy_loss(**batch | {"mask": batch["mask"].long()})
