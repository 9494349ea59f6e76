"""Mistakes found in public code, one test each."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_core.losses.policy import policy_loss
from rlhf_core.losses.preference import preference_loss
from rlhf_core.losses.reward import bradley_terry_loss
from rlhf_core.losses.unpaired import unpaired_preference_loss
from rlhf_core.losses.value import value_loss
from rlhf_core.ops.advantages import gae, group_advantages
from rlhf_core.ops.kl import kl_estimate, kl_penalty
from rlhf_core.ops.masked import masked_mean, masked_whiten
from tests.losses.pairs_of import pairs_of

POLICY, REFERENCE = torch.tensor([1 / 2, 1 / 4, 1 / 4]).double(), torch.tensor([1 / 8, 1 / 8, 3 / 4]).double()


def one_pair(chosen: list[float], rejected: list[float], ref_chosen: list[float], ref_rejected: list[float]) -> dict:
    tensors = dict(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    pair = {f"{name}_logprobs": torch.tensor([values], dtype=torch.float64) for name, values in tensors.items()}
    return pair | {f"{side}_mask": pair[f"{side}_logprobs"].isfinite() for side in ("chosen", "rejected")}


def test_the_kl_is_not_inverted():
    """Expectation under the policy of KL(policy || reference): 0.5918, not 0.5640 or a negative number.

    An inverted ratio goes unnoticed near 0, where both directions agree; these two distributions are far apart.
    """
    exact = (POLICY * (POLICY / REFERENCE).log()).sum()
    for estimator in ("k1", "k3"):
        estimate = kl_estimate(POLICY.log(), REFERENCE.log(), estimator=estimator)
        torch.testing.assert_close((POLICY * estimate).sum(), exact)


def test_whitening_with_shift_mean_has_mean_0():
    """Implementations have added the mean back for `shift_mean=True`."""
    values, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert masked_whiten(values, mask).mean().item() == pytest.approx(0, abs=1e-6)
    assert masked_whiten(values, mask, shift_mean=False).mean().item() == pytest.approx(3)


def test_padding_is_in_no_mean():
    """Metrics do not depend on the values of padding."""
    mask = torch.tensor([[True, True, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, 1.0, 1.0]])  # 1 is a sentinel that has been used
    new = logprobs + torch.tensor([[0.5, 0.5, 3.0, 3.0]])
    batch = dict(new_logprobs=new, logprobs=logprobs, advantages=torch.ones(1, 4))
    _, stats = policy_loss(**batch, mask=mask)
    assert stats["approx_kl"].item() == pytest.approx(math.exp(0.5) - 1.5)
    assert masked_mean(-logprobs, mask) == 1.5


def test_dpo_sums_and_its_rewards_carry_beta():
    """Two tokens of log-ratio 1/2 each: reward 2 * (1/2 + 1/2), not their mean, and not without the 2."""
    _, stats = preference_loss("sigmoid", pairs_of(**one_pair([-1, -1], [-1, -1], [-1.5, -1.5], [-1, -1])), beta=2.0)
    assert stats["chosen_reward"] == 2 and stats["rejected_reward"] == 0


def test_ipo_is_over_means():
    """Log-ratios 1 a token in two tokens: 1 - 1 / (2 beta) = 0 at beta 1/2, where sums would leave 1."""
    loss, _ = preference_loss("ipo", pairs_of(**one_pair([-1, -1], [-1, -1], [-2, -2], [-1, -1])), beta=0.5)
    assert loss == 0


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_a_logistic_loss_does_not_overflow(gap):
    """log(1 + e^x) as it is written is infinite from x = 89 on."""
    loss, _ = bradley_terry_loss(torch.tensor([gap]), torch.tensor([0.0]))
    assert loss.item() == max(-gap, 0.0)


def test_a_large_kl_is_not_cut():
    """An estimate clamped to +-10 hides that a run has left its reference."""
    assert kl_estimate(torch.tensor(0.0), torch.tensor(-50.0), estimator="k1") == 50
    assert kl_estimate(torch.tensor(-50.0), torch.tensor(0.0), estimator="k3") > 1e20


def test_the_score_is_on_the_last_token_and_not_behind_it():
    """Placed on the first pad token, it would reach the completion only discounted, as a bootstrap."""
    mask = torch.tensor([[True, True, False]])
    rewards, _ = kl_penalty(torch.tensor([3.0]), torch.zeros(1, 3), torch.zeros(1, 3), mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 3, 0]]
    advantages, _ = gae(rewards, torch.zeros(1, 3), mask, gamma=1.0, lam=0.0)
    assert advantages.tolist() == [[0, 3, 0]]


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "sft"])
def test_options_are_supported_or_an_error(name):
    """Elsewhere label smoothing was ignored for "sigmoid", and pair weights crashed for "hinge" and "sft"."""
    tensors = one_pair([-1.0], [-2.0], [-1.5], [-1.5])
    pair = pairs_of(**tensors)
    loss, _ = preference_loss(name, pairs_of(**tensors, weights=torch.tensor([0.5])))
    torch.testing.assert_close(2 * loss, preference_loss(name, pair)[0])
    if name.startswith("sigmoid"):
        assert preference_loss(name, pair, label_smoothing=0.1)[0] > preference_loss(name, pair)[0]
    else:
        with pytest.raises(ValueError, match="label_smoothing=0.1: not defined"):
            preference_loss(name, pair, label_smoothing=0.1)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_an_f_divergence_survives_its_exponentials(divergence):
    """e^-x is infinite in float32 below a log-ratio of -88; for equal sides the loss is still ln 2."""
    pair = {name: t.float() if t.is_floating_point() else t for name, t in one_pair([-99], [-99], [0], [0]).items()}
    loss, _ = preference_loss("sigmoid", pairs_of(**pair), f_divergence=divergence)
    assert loss.item() == pytest.approx(math.log(2))


def test_kto_takes_odd_batches():
    """Three rows, one of them desirable; one row alone."""
    rows = dict(logprobs=-torch.rand(3, 2), ref_logprobs=-torch.rand(3, 2), mask=torch.ones(3, 2, dtype=torch.bool))
    labels = torch.tensor([True, False, False])
    for count in (3, 1):
        part = {name: tensor[:count] for name, tensor in rows.items()}
        loss, _ = unpaired_preference_loss("kto", **part, labels=labels[:count], kl=0.0)
        assert loss.isfinite()


def test_a_group_without_variance_has_no_advantage():
    """(r - mean) / (std + eps) of equal scores is rounding noise over eps."""
    scores = torch.full((1, 7), 0.1)
    assert (group_advantages(scores) == 0).all()


def test_a_clipped_value_is_the_worse_of_two():
    """max, not min: a value must not gain from having moved too far towards its return."""
    loss, _ = value_loss(
        new_values=torch.tensor([[1.0]]),
        values=torch.tensor([[0.0]]),
        returns=torch.tensor([[1.0]]),
        mask=torch.tensor([[True]]),
        value_clip=0.25,
    )
    assert loss.item() == pytest.approx(0.5 * 0.75**2)


def test_micro_batches_of_unequal_length_are_one_batch():
    """The mean of the micro-batches' means is another number where they hold unequal numbers of tokens."""
    logprobs = torch.tensor([[-1.0, -1.0, -1.0], [-4.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch = dict(new_logprobs=logprobs, logprobs=logprobs, advantages=-logprobs, mask=mask)
    whole, _ = policy_loss("dapo", **batch)
    parts = [policy_loss("dapo", **{n: t[i : i + 1] for n, t in batch.items()}, normalizer=4)[0] for i in (0, 1)]
    assert sum(parts).item() == pytest.approx(whole.item()) == pytest.approx(-7 / 4)
