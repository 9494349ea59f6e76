"""The completion's negative log-likelihood, and that it does not matter how a batch is cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.sft import sft_loss

LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, math.inf]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_by_hand():
    """Tokens: (1 + 2 + 3 + 4) / 4 = 2.5. Sequences: (mean(1, 2, 3) + mean(4)) / 2 = 3. `nll` is per token in both."""
    loss, stats = sft_loss(LOGPROBS, MASK)
    assert loss == 2.5 and stats["nll"] == 2.5
    loss, stats = sft_loss(LOGPROBS, MASK, reduction="sequence")
    assert loss == 3 and stats["nll"] == 2.5


def test_gradients_by_hand():
    """Tokens: -1/4 each. Sequences: -1/2 over the row's length, so -1/6 three times and -1/2. Masked: exactly 0."""
    for reduction, expected in [("token", [1 / 4] * 4), ("sequence", [1 / 6] * 3 + [1 / 2])]:
        logprobs = LOGPROBS.clone().requires_grad_()
        sft_loss(logprobs, MASK, reduction=reduction)[0].backward()
        torch.testing.assert_close(logprobs.grad[MASK], -torch.tensor(expected))
        assert (logprobs.grad[~MASK] == 0).all()


def test_normalizer_by_hand():
    """The sum of 10 over 20 tokens; the sum 2 + 4 of the rows' means over 3 sequences. A tensor will do."""
    assert sft_loss(LOGPROBS, MASK, normalizer=20)[0] == 0.5
    assert sft_loss(LOGPROBS, MASK, normalizer=torch.tensor(20))[0] == 0.5
    assert sft_loss(LOGPROBS, MASK, reduction="sequence", normalizer=3.0)[0] == 2


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), micro=st.sampled_from([1, 2, 3, 8]))
def test_eight_micro_batches_of_one_are_one_of_eight(reduction, seed, micro):
    """In value and gradient, with ragged completions, once the normalizer counts the whole window."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(8, 5, dtype=torch.float64, generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1), generator=generator)

    whole = logprobs.clone().requires_grad_()
    loss, _ = sft_loss(whole, mask, reduction=reduction)
    loss.backward()

    parts, total = logprobs.clone().requires_grad_(), 0.0
    count = mask.sum().item() if reduction == "token" else 8
    for rows in torch.arange(8).split(micro):
        part, _ = sft_loss(parts[rows], mask[rows], reduction=reduction, normalizer=count)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_nothing_to_learn_from(reduction):
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, stats = sft_loss(logprobs, torch.zeros_like(MASK), reduction=reduction)
    loss.backward()
    assert loss == 0 and stats["nll"] == 0 and (logprobs.grad == 0).all()


def test_stats_carry_no_graph_and_a_wrong_reduction_is_named():
    assert not sft_loss(LOGPROBS.clone().requires_grad_(), MASK)[1]["nll"].requires_grad
    with pytest.raises(ValueError, match="reduction='mean': expected token or sequence"):
        sft_loss(LOGPROBS, MASK, reduction="mean")
