"""Plackett-Luce and RRHF over K completions: values by hand, equality with DPO for two, lists of different lengths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.preference import preference_loss, ranked_preference_loss
from rlhf_core.losses.ranking import RANKED_LOSSES
from tests.losses.pairs_of import pairs_of

NAMES = sorted(RANKED_LOSSES)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, prompts: int = 3, completions: int = 4, width: int = 3) -> dict[str, torch.Tensor]:
    """Random log-probs, float64; each completion has a token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, completions, width)
    logprobs, ref_logprobs = -3 * torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    mask = torch.arange(width) < torch.randint(1, width + 1, (*shape[:2], 1), generator=generator)
    return dict(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)


def three() -> dict[str, torch.Tensor]:
    """One prompt, three completions. Log-probs -1, (-2, -1) and -1/2; references 1/2 lower, equal, 1 higher in sum.

    So l = (-1, -3, -1/2), L = (1, 2, 1), p = l / L = (-1, -3/2, -1/2), x = (1/2, 0, -1). Best first.
    """
    nan = math.nan
    return dict(
        logprobs=torch.tensor([[[-1.0, nan], [-2.0, -1.0], [-0.5, nan]]], dtype=torch.float64),
        ref_logprobs=torch.tensor([[[-1.5, nan], [-2.0, -1.0], [0.5, nan]]], dtype=torch.float64),
        mask=torch.tensor([[[True, False], [True, True], [True, False]]]),
    )


def test_plackett_luce_by_hand():
    """beta 2: rewards 1, 0, -2. ln(e + 1 + e^-2) - 1 + ln(1 + e^-2) - 0 = .3490122 + .1269280 + 0."""
    loss, stats = ranked_preference_loss("plackett_luce", **three(), beta=2.0)
    expected = math.log(math.e + 1 + math.exp(-2)) - 1 + math.log(1 + math.exp(-2))
    assert expected == pytest.approx(0.4759402, abs=1e-7)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert stats["accuracy"] == 1 and not stats["accuracy"].requires_grad


def test_rrhf_by_hand():
    """p = (-1, -3/2, -1/2): the third exceeds the first by 1/2 and the second by 1; l of the best is -1.

    With equal scores of the first two, they are not compared; they added 0, so the sum stays 3/2.
    """
    loss, stats = ranked_preference_loss("rrhf", **three())
    assert loss.item() == pytest.approx(1.5 + 1)
    assert stats["accuracy"].item() == pytest.approx(1 / 3)  # on log-probs -1, -3, -1/2
    assert ranked_preference_loss("rrhf", **three(), nll_coef=0.5)[0].item() == pytest.approx(1.5 + 0.5)
    tied = ranked_preference_loss("rrhf", **three(), scores=torch.tensor([[2.0, 2.0, 1.0]]))
    assert tied[0].item() == pytest.approx(1.5 + 1) and tied[1]["accuracy"] == 0
    turned = ranked_preference_loss("rrhf", **three(), scores=torch.tensor([[1, 0, 2]]), nll_coef=0.0)
    assert turned[0] == 0  # the order of p itself


def test_accuracy_counts_a_tie_half_and_unequal_scores_only():
    """Log-ratios 1, 1, 0 with scores 2, 1, 1: pairs (1, 2) tied, (1, 3) right, (2, 3) not compared: 3/4."""
    rows = dict(logprobs=torch.tensor([[[1.0], [1.0], [0.0]]]), ref_logprobs=torch.zeros(1, 3, 1))
    rows |= dict(mask=torch.ones(1, 3, 1, dtype=torch.bool), scores=torch.tensor([[2.0, 1.0, 1.0]]))
    assert ranked_preference_loss("plackett_luce", **rows)[1]["accuracy"] == 0.75


@settings(max_examples=20, deadline=None)
@given(seed=seeds, beta=st.floats(0.05, 2))
def test_two_completions_are_dpo(seed, beta):
    rows = draw(seed, completions=2)
    pairs = {
        f"{prefix}{side}_{what}": rows[f"{prefix}{what}"][:, place]
        for place, side in enumerate(("chosen", "rejected"))
        for prefix, what in (("", "logprobs"), ("ref_", "logprobs"), ("", "mask"))
    }
    loss, _ = ranked_preference_loss("plackett_luce", **rows, beta=beta)
    torch.testing.assert_close(loss, preference_loss("sigmoid", pairs_of(**pairs), beta=beta)[0])


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_the_probabilities_of_all_rankings_add_up_to_one(seed):
    """exp(-loss) is the Plackett-Luce probability of one order of four; the 24 orders exhaust the possibilities."""
    rows = draw(seed, prompts=1)
    total = sum(
        math.exp(-ranked_preference_loss("plackett_luce", **{k: t[:, order] for k, t in rows.items()})[0].item())
        for order in map(list, itertools.permutations(range(4)))
    )
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, cut=st.integers(1, 2))
def test_scores_padding_and_micro_batches(name, seed, cut):
    """Shuffled completions with scores, a slot without a completion, garbage columns, and any split of the prompts."""
    rows = draw(seed)
    loss, stats = ranked_preference_loss(name, **rows)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    nan = torch.full((3, 1, 3), math.nan, dtype=torch.float64)
    moved = {key: torch.cat([rows[key][:, order], nan], 1) for key in ("logprobs", "ref_logprobs")}
    moved["mask"] = torch.cat([rows["mask"][:, order], torch.zeros(3, 1, 3, dtype=torch.bool)], 1)
    scores = torch.cat([-order.double(), torch.tensor([math.nan]).double()]).expand(3, 5)
    moved_loss, moved_stats = ranked_preference_loss(name, **moved, scores=scores)
    torch.testing.assert_close(moved_loss, loss)
    torch.testing.assert_close(moved_stats, stats)
    parts = [
        ranked_preference_loss(name, **{key: tensor[part] for key, tensor in rows.items()}, normalizer=3)[0]
        for part in (slice(0, cut), slice(cut, 3))
    ]
    torch.testing.assert_close(sum(parts), loss)


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_one_is_not_counted_and_has_no_gradient(name):
    rows = draw(1)
    rows["mask"][0, 1:] = False
    logprobs = rows["logprobs"].requires_grad_()
    loss, _ = ranked_preference_loss(name, **rows)
    loss.backward()
    assert (logprobs.grad[0] == 0).all() and (logprobs.grad[1:] != 0).any()
    torch.testing.assert_close(loss, ranked_preference_loss(name, **{key: t[1:] for key, t in rows.items()})[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    rows = draw(2, prompts=2, completions=3)
    logprobs = rows.pop("logprobs").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ranked_preference_loss(name, logprobs=x, **rows, beta=0.7)[0], (logprobs,)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(name, dtype):
    logprobs = torch.tensor([[[0.0], [-1000.0], [0.0]]], dtype=dtype, requires_grad=True)
    reference = torch.tensor([[[-1000.0], [0.0], [0.0]]], dtype=dtype)
    mask = torch.ones(1, 3, 1, dtype=torch.bool)
    for order in itertools.permutations(range(3)):
        scores = torch.tensor([order])
        loss, _ = ranked_preference_loss(name, logprobs=logprobs, ref_logprobs=reference, mask=mask, scores=scores)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plackett_luce", {"beta": 0.0}, "beta=0.0: expected more than 0"),
        ("plackett_luce", {"ref_logprobs": None}, "loss 'plackett_luce' needs ref_logprobs"),
        ("plackett_luce", {"nll_coef": 1.0}, "nll_coef=1.0: plackett_luce has no such option"),
        ("rrhf", {"nll_coef": -1.0}, "nll_coef=-1.0: expected 0 or more"),
        ("rhf", {}, "no ranking loss named 'rhf'.*did you mean 'rrhf'"),
        ("rrhf", {"mask": torch.zeros(1, 3, 2, dtype=torch.bool)}, "False everywhere"),
        ("rrhf", {"logprobs": torch.zeros(3, 2)}, r"logprobs.dim\(\)=2: expected 3, \(prompts, completions, tokens\)"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        ranked_preference_loss(name, **three() | options)
