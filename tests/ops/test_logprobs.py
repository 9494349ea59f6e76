"""Log-probs from existing logits, and sums over the vocabulary. tests/kernels tests the fused head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.logprobs import VocabStatistics, linear_logprobs, logits_logprobs, vocab_statistics


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
    """linear_logprobs with an identity as its weight has the same logits."""
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


# --------------------------------------------------------------------------------------------- sums over the vocabulary

QUARTERS = [math.log(3), 0.0]  # p = (3/4, 1/4)
GRADIENTS = {  # d / dz, z = logits / temperature, from the probabilities alone
    "logsumexp": lambda p: p,
    "entropy": lambda p: -p * (p.log() + torch.special.entr(p).sum(-1, keepdim=True)),
    "mean_logprob": lambda p: 1 / p.shape[-1] - p,
    "log_sum_sq_probs": lambda p: 2 * (p.square() / p.square().sum(-1, keepdim=True) - p),
}
each_statistic = pytest.mark.parametrize("name", VocabStatistics._fields)


def test_vocabulary_by_hand():
    """p = (3/4, 1/4) of logits (ln 3, 0): log(3 + 1) = ln 4; entropy ln 4 - 3/4 ln 3; mean of ln p (ln 3)/2 - ln 4;
    log(9/16 + 1/16) = ln 5/8. Temperature 2 on doubled logits is the same; a shift moves the first alone.
    """
    expected = [math.log(4), math.log(4) - 0.75 * math.log(3), math.log(3) / 2 - math.log(4), math.log(5 / 8)]
    logits = torch.tensor(QUARTERS, dtype=torch.float64)
    assert [x.item() for x in vocab_statistics(logits)] == pytest.approx(expected, abs=1e-12)
    assert [x.item() for x in vocab_statistics(2 * logits, temperature=2.0)] == pytest.approx(expected, abs=1e-12)
    expected[0] += 5
    assert [x.item() for x in vocab_statistics(logits + 5)] == pytest.approx(expected, abs=1e-12)


def test_uniform_by_hand():
    """V = 4: entropy ln 4, every log p and the log of sum p^2 = 4 / 16 are -ln 4."""
    statistics = vocab_statistics(torch.zeros(4, dtype=torch.float64))
    assert [x.item() for x in statistics] == pytest.approx([math.log(4), math.log(4), -math.log(4), -math.log(4)])


@each_statistic
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.floats(0.3, 3))
def test_values_and_gradients_are_the_definitions(name, seed, temperature):
    """Any leading shape; by the logits the gradients are those by z over the temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    p = torch.exp(logits / temperature)
    total = p.sum(-1)
    p = p / total[..., None]
    value = {
        "logsumexp": total.log(),
        "entropy": -(p * p.log()).sum(-1),
        "mean_logprob": p.log().sum(-1) / 5,
        "log_sum_sq_probs": (p * p).sum(-1).log(),
    }[name]
    found = getattr(vocab_statistics(logits.requires_grad_(), temperature=temperature), name)
    torch.testing.assert_close(found, value.detach(), rtol=0, atol=1e-12)
    found.sum().backward()
    torch.testing.assert_close(logits.grad, GRADIENTS[name](p).detach() / temperature, rtol=0, atol=1e-12)


@each_statistic
def test_gradcheck(name):
    logits = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: getattr(vocab_statistics(x, temperature=0.7), name), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symbols_ruled_out(dtype):
    """-inf beside (ln 3, 0): all but the mean are as without it, whose value is -inf and true.

    Every gradient is finite, 0 at the ruled-out place for the three, and 1/V - p for the mean: 1/3 - (3/4, 1/4, 0).
    """
    logits = torch.tensor([*QUARTERS, -math.inf], dtype=dtype, requires_grad=True)
    found, without = vocab_statistics(logits), vocab_statistics(logits[:2].detach())
    assert found.mean_logprob == -math.inf
    for name in VocabStatistics._fields:
        value = getattr(found, name)
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        if name == "mean_logprob":
            assert gradient.tolist() == pytest.approx([1 / 3 - 3 / 4, 1 / 3 - 1 / 4, 1 / 3], abs=1e-6)
            continue
        torch.testing.assert_close(value, getattr(without, name))
        expected = GRADIENTS[name](torch.tensor([0.75, 0.25], dtype=dtype)).tolist()
        assert gradient.tolist() == pytest.approx([*expected, 0], abs=1e-6)


def test_the_mean_does_not_poison_the_others():
    """Used together, as a smoothed loss with an entropy bonus would be: the sum's gradient is the gradients' sum."""
    logits = torch.tensor([[*QUARTERS, -math.inf], [0.0, 0.0, 0.0]], requires_grad=True)
    found = vocab_statistics(logits)
    rows = torch.tensor([False, True])  # where nothing is ruled out the mean is used
    (torch.where(rows, found.mean_logprob, 0.0) + found.entropy + found.log_sum_sq_probs).sum().backward()
    p = torch.tensor([0.75, 0.25])
    expected = (GRADIENTS["entropy"](p) + GRADIENTS["log_sum_sq_probs"](p)).tolist()
    assert logits.grad[0].tolist() == pytest.approx([*expected, 0], abs=1e-6)
    assert logits.grad[1].tolist() == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_extreme_logits_are_a_certainty(size):
    """p = (1, 0) to the last bit: entropy 0, log of sum p^2 is 0, gradients 0 but the mean's 1/2 - p = -+ 1/2."""
    logits = torch.tensor([size, 0.0], requires_grad=True)
    found = vocab_statistics(logits)
    assert found.logsumexp.item() == pytest.approx(size) and found.mean_logprob.item() == pytest.approx(-size / 2)
    assert found.entropy == 0 and found.log_sum_sq_probs == 0
    sum(found[1:]).backward()
    assert logits.grad.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_vocabulary_in_half_precision(dtype):
    """As for the log-probs: float32 sums over the rounded logits. The entropy is that of `logits_logprobs`."""
    logits = torch.linspace(-3, 3, 12).reshape(3, 4).to(dtype)
    found, truth = vocab_statistics(logits, temperature=0.5), vocab_statistics(logits.double(), temperature=0.5)
    for ours, exact in zip(found, truth, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    _, entropy = logits_logprobs(logits, torch.tensor([0, 1, 3]), temperature=0.5, entropy=True)
    torch.testing.assert_close(entropy, found.entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_the_vocabularys_temperature_must_be_positive_too(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}: expected more than 0"):
        vocab_statistics(torch.zeros(2), temperature=temperature)
