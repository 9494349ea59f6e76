"""The objective of RLHF: expected reward minus beta times the KL to the reference.

    max over pi of   E_pi[r] - beta KL(pi || ref)        has the maximiser   pi* = ref exp(r / beta) / Z
                                                         and the maximum     beta log Z

(Rafailov et al. 2023, arXiv:2305.18290, eq. 3 to 5.) The KL is the library's, exact or as the enumerated expectation of
an estimate, and the maximum is found by LBFGS over the logits.
"""

from __future__ import annotations

import pytest
import torch

from rlhf_core.ops.kl import kl_estimate, kl_full

BETA = 0.5


def expected(estimator: str):
    """The exact E_pi of an estimate, with gradient through both."""

    def kl(logits, reference):
        logprobs = logits.log_softmax(-1)
        return (logprobs.exp() * kl_estimate(logprobs, reference.log(), estimator=estimator)).sum()

    return kl


def exact(logits, reference):
    return kl_full(logits, reference.log())


def best(space, minimise, kl):
    """The maximiser and the maximum."""

    def negative_objective(logits):
        return BETA * kl(logits, space.reference) - logits.softmax(-1) @ space.rewards

    logits = minimise(negative_objective, len(space))
    return logits.softmax(-1), -negative_objective(logits).item()


@pytest.mark.parametrize("kl", [exact, expected("k1"), expected("k3")], ids=["full", "k1", "k3"])
def test_the_optimum_is_the_tilted_reference(space, minimise, total_variation, kl):
    """Without the reference it would be softmax(r / beta), which differs: the check can fail."""
    policy, value = best(space, minimise, kl)
    assert total_variation(policy, space.tilted(space.rewards / BETA)) < 1e-8
    assert total_variation(policy, (space.rewards / BETA).softmax(-1)) > 0.1
    log_z = torch.logsumexp(space.reference.log() + space.rewards / BETA, 0)
    assert value == pytest.approx(BETA * log_z.item(), abs=1e-8)


def test_the_other_direction_of_the_kl_is_another_problem(space, minimise, total_variation):
    """KL(ref || pi): the optimum is ref / (lambda - r) up to a factor, not pi*."""
    policy, _ = best(space, minimise, lambda logits, reference: kl_full(logits, reference.log(), direction="forward"))
    assert total_variation(policy, space.tilted(space.rewards / BETA)) > 0.01
    # Stationary: r_i + beta ref_i / pi_i is one number lambda for all i.
    multipliers = space.rewards + BETA * space.reference / policy
    torch.testing.assert_close(multipliers, multipliers.mean().expand(8), rtol=0, atol=1e-8)
