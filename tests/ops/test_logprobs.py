"""Log-probs of logits that are already there. The fused head has its own tests, with the kernels."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_core.ops.logprobs import linear_logprobs, logits_logprobs


def test_by_hand():
    """Logits (ln 3, 0) are p = (3/4, 1/4): log-probs ln 3 - ln 4 and -ln 4, entropy ln 4 - 3/4 ln 3.

    At temperature 1/2 the logits double to (ln 9, 0): p = (9/10, 1/10).
    """
    logits, targets = torch.tensor([[math.log(3), 0.0]]).expand(2, 2), torch.tensor([0, 1])
    logprobs, entropy = logits_logprobs(logits, targets, entropy=True)
    assert logprobs.tolist() == pytest.approx([math.log(0.75), math.log(0.25)], abs=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2, abs=1e-6)
    logprobs, nothing = logits_logprobs(logits, targets, temperature=0.5)
    assert logprobs.tolist() == pytest.approx([math.log(0.9), math.log(0.1)], abs=1e-6)
    assert nothing is None


def test_the_fused_head_agrees():
    """linear_logprobs with an identity for its weight sees the same logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(5, (6,), generator=generator)
    ours = logits_logprobs(logits, targets, temperature=0.7, entropy=True)
    fused = linear_logprobs(logits, torch.eye(5).double(), targets, temperature=0.7, entropy=True)
    torch.testing.assert_close(ours, fused, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_left_before_the_softmax(dtype, result):
    """The result is that of the float32 softmax over the rounded logits, to float32 digits."""
    logits = torch.linspace(-3, 3, 12).reshape(3, 4).to(dtype)
    logprobs, entropy = logits_logprobs(logits, torch.tensor([0, 1, 3]), entropy=True)
    assert logprobs.dtype == entropy.dtype == result
    truth = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), truth[torch.arange(3), [0, 1, 3]], rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).sum(-1), rtol=0, atol=1e-6)


def test_gradient_is_one_minus_p_and_the_entropy_has_none():
    """d log p_y / d logit = (1[y] - p) / temperature; p = (3/4, 1/4), y = 0, temperature 2 on logits 2 ln 3, 0."""
    logits = torch.tensor([[2 * math.log(3), 0.0]], requires_grad=True)
    logprobs, entropy = logits_logprobs(logits, torch.tensor([0]), temperature=2.0, entropy=True)
    assert not entropy.requires_grad
    logprobs.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0.125, -0.125], abs=1e-6)


def test_a_symbol_ruled_out_by_minus_infinity():
    """0 log 0 = 0: the entropy of (1/2, 1/2, 0) is ln 2, and not NaN."""
    logprobs, entropy = logits_logprobs(torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([1]), entropy=True)
    assert logprobs.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}: expected more than 0"):
        logits_logprobs(torch.zeros(1, 2), torch.tensor([0]), temperature=temperature)
