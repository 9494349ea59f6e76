"""KL estimators, summed exactly over three symbols, and the per-token price of divergence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.kl import kl_estimate, kl_penalty

LN2, LN3 = math.log(2), math.log(3)
# KL(A || B) = 1/2 ln 4 + 1/4 ln 2 + 1/4 ln(1/3) = 5/4 ln 2 - 1/4 ln 3       = 0.5918
# KL(B || A) = 1/8 ln(1/4) + 1/8 ln(1/2) + 3/4 ln 3 = 3/4 ln 3 - 3/8 ln 2    = 0.5640
A, B = [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]
KL_AB, KL_BA = 1.25 * LN2 - 0.25 * LN3, 0.75 * LN3 - 0.375 * LN2

both_ways = pytest.mark.parametrize(("policy", "reference", "kl"), [(A, B, KL_AB), (B, A, KL_BA)], ids=["AB", "BA"])
distributions = st.lists(st.floats(-3, 3), min_size=3, max_size=3).map(
    lambda logits: torch.tensor(logits, dtype=torch.float64).softmax(-1)
)


def expected(policy, reference, estimator: str) -> float:
    """E over the policy of the estimate, all three symbols weighed by their probability."""
    policy, reference = torch.as_tensor(policy).double(), torch.as_tensor(reference).double()
    return (policy * kl_estimate(policy.log(), reference.log(), estimator=estimator)).sum().item()


def loss_gradient(policy, reference, estimator: str) -> torch.Tensor:
    """Gradient of E_sampled[estimate] by the policy's logits: what a loss over sampled tokens learns from."""
    policy, reference = torch.as_tensor(policy).double(), torch.as_tensor(reference).double()
    logits = policy.log().requires_grad_()
    (policy * kl_estimate(logits.log_softmax(-1), reference.log(), estimator=estimator)).sum().backward()
    return logits.grad


@both_ways
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_and_of_the_right_direction(policy, reference, kl, estimator):
    """The two directions differ (0.5918, 0.5640), so an inverted ratio cannot pass."""
    assert expected(policy, reference, estimator) == pytest.approx(kl, abs=1e-12)


def test_k2_by_hand():
    """E[d^2] / 2. From A, d = (2 ln 2, ln 2, -ln 3): (4/2 + 1/4) ln2^2 / 2 + ln3^2 / 8 = 9/8 ln2^2 + 1/8 ln3^2.

    From B, d = (-2 ln 2, -ln 2, ln 3): (4/8 + 1/8) ln2^2 / 2 + 3/4 ln3^2 / 2 = 5/16 ln2^2 + 3/8 ln3^2.
    Neither is the KL.
    """
    assert expected(A, B, "k2") == pytest.approx(1.125 * LN2**2 + 0.125 * LN3**2, abs=1e-12)
    assert expected(B, A, "k2") == pytest.approx(0.3125 * LN2**2 + 0.375 * LN3**2, abs=1e-12)
    assert abs(expected(A, B, "k2") - KL_AB) > 0.09


@both_ways
def test_gradients_as_losses(policy, reference, kl):
    """d KL / d logit_j = p_j (d_j - KL). k2 gives exactly that; k1 gives 0; k3 gives p - q, of the *reverse* KL."""
    policy, reference = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    exact = policy * ((policy / reference).log() - kl)
    torch.testing.assert_close(loss_gradient(policy, reference, "k2"), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss_gradient(policy, reference, "k1"), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss_gradient(policy, reference, "k3"), policy - reference, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(policy=distributions, reference=distributions)
def test_estimators_on_any_pair_of_distributions(policy, reference):
    kl = (policy * (policy / reference).log()).sum().item()
    assert expected(policy, reference, "k1") == pytest.approx(kl, abs=1e-12)
    assert expected(policy, reference, "k3") == pytest.approx(kl, abs=1e-12)
    for estimator in ("k2", "k3"):
        assert (kl_estimate(policy.log(), reference.log(), estimator=estimator) >= -1e-15).all()


def test_k3_keeps_its_digits_near_zero():
    """d = 1e-4 in float32: d^2 / 2 = 5e-9, below the 6e-8 that exp(-d) - 1 + d would be rounded to."""
    k3 = kl_estimate(torch.tensor(1e-4), torch.tensor(0.0), estimator="k3")
    assert k3.item() == pytest.approx(5e-9, rel=1e-2)


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="estimator='k4': expected k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), estimator="k4")


MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])


def test_penalty_by_hand():
    """kl_coef 1/2. The score only on the last token of each row, the price on each of its tokens.

    row 0: d = (1, 2)       r = (-1/2, 10 - 1)          = (-1/2, 9)
    row 1: d = (-1, 0, 4)   r = (1/2, 0, 20 - 2)        = (1/2, 0, 18)
    row 2: d = (3)          r = (-3 - 3/2)              = (-9/2)
    """
    nan = math.nan
    logprobs = torch.tensor([[-1.0, -1.0, nan], [-3.0, -2.0, -1.0], [-1.0, math.inf, nan]])
    ref_logprobs = torch.tensor([[-2.0, -3.0, 0.0], [-2.0, -2.0, -5.0], [-4.0, nan, -math.inf]])
    rewards, kl = kl_penalty(torch.tensor([10.0, 20.0, -3.0]), logprobs, ref_logprobs, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 9, 0], [0.5, 0, 18], [-4.5, 0, 0]]
    assert kl.tolist() == [[1, 2, 0], [-1, 0, 4], [3, 0, 0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalty_takes_the_estimator_it_is_given(estimator):
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = -torch.rand(2, 3, 3, generator=generator)
    scores = torch.tensor([1.0, 2.0, 3.0])
    rewards, kl = kl_penalty(scores, logprobs, ref_logprobs, MASK, kl_coef=0.3, estimator=estimator)
    torch.testing.assert_close(kl[MASK], kl_estimate(logprobs, ref_logprobs, estimator=estimator)[MASK])
    torch.testing.assert_close(rewards.sum(-1), scores - 0.3 * kl.sum(-1))


def test_scores_of_another_dtype_are_taken():
    rewards, _ = kl_penalty(torch.tensor([2.0], dtype=torch.bfloat16), *torch.zeros(2, 1, 2), MASK[:1, :2], kl_coef=0.1)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [[0, 2]]


def test_an_empty_completion_is_refused():
    with pytest.raises(ValueError, match="completion without tokens"):
        kl_penalty(torch.zeros(3), *torch.zeros(2, 3, 3), MASK & torch.tensor([[True], [False], [True]]), kl_coef=0.1)
