"""The completion's negative log-likelihood, plain, smoothed, DFT and z-loss; micro-batches add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.sft import sft_loss
from rlhf_core.ops.logprobs import vocab_statistics

LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, math.inf]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
OTHER = torch.tensor([[-5.0, -6.0, -7.0], [-8.0, math.nan, -math.inf]])  # a vocabulary's means, or its logsumexps

reductions = pytest.mark.parametrize("reduction", ["token", "sequence"])
variants = pytest.mark.parametrize("variant", ["plain", "smoothed", "dft", "z_loss"])


def options_of(variant: str, other: torch.Tensor) -> dict:
    return {
        "plain": {},
        "smoothed": dict(label_smoothing=0.2, vocab_mean_logprobs=other),
        "dft": dict(dft=True),
        "z_loss": dict(z_loss_coef=0.1, logsumexps=other),
    }[variant]


def draw(seed: int, rows: int = 8, width: int = 5):
    """Log-probs, another tensor of (B, T), and a ragged mask; the second row has no token at all."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, other = -torch.rand(2, rows, width, dtype=torch.float64, generator=generator)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask[1] = False
    return logprobs, other, mask


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


def test_label_smoothing_by_hand():
    """e = 0.2 with vocabulary means -5, -6, -7, -8: 0.8 l + 0.2 m is 1.8, 2.8, 3.8, 4.8, mean 3.3.

    By row 2.8 and 4.8, mean 3.8. The plain nll is 2.5 as before.
    """
    options = options_of("smoothed", OTHER)
    loss, stats = sft_loss(LOGPROBS, MASK, **options)
    assert loss.item() == pytest.approx(3.3) and stats["nll"] == 2.5
    assert sft_loss(LOGPROBS, MASK, reduction="sequence", **options)[0].item() == pytest.approx(3.8)


def test_label_smoothing_is_the_cross_entropy_with_a_smoothed_target():
    """Against torch's own: target (1 - e) on the label plus e / V everywhere. Its gradient by the logits too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 7, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(7, (6,), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.3)
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None]).T
    means = vocab_statistics(logits).mean_logprob[None]
    loss, _ = sft_loss(logprobs, torch.ones(1, 6, dtype=torch.bool), label_smoothing=0.3, vocab_mean_logprobs=means)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_dft_by_hand():
    """p = 1/2 and 1/4: (1/2 ln 2 + 1/4 ln 4) / 2 = ln 2 / 2. The factor is detached: gradients -p / 2, -1/4 and -1/8.

    With it the gradient by the logit of the token, -p (1 - p), vanishes for an unlikely token: the 1 / p is gone.
    """
    logprobs = torch.tensor([[math.log(0.5), math.log(0.25)]], requires_grad=True)
    loss, stats = sft_loss(logprobs, torch.ones(1, 2, dtype=torch.bool), dft=True)
    assert loss.item() == pytest.approx(math.log(2) / 2)
    assert stats["nll"].item() == pytest.approx(1.5 * math.log(2))
    loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-1 / 4, -1 / 8])


def test_z_loss_by_hand():
    """logsumexps -5, -6, -7, -8: squares 25, 36, 49, 64, mean 43.5, times 0.1: 4.35 on top of 2.5.

    Gradient by each logsumexp: 0.1 * 2 z / 4.
    """
    logsumexps = OTHER.clone().requires_grad_()
    loss, stats = sft_loss(LOGPROBS, MASK, z_loss_coef=0.1, logsumexps=logsumexps)
    assert loss.item() == pytest.approx(6.85)
    assert stats["nll"] == 2.5 and stats["z_loss"].item() == pytest.approx(4.35)
    loss.backward()
    torch.testing.assert_close(logsumexps.grad[MASK], 0.05 * OTHER[MASK])
    assert (logsumexps.grad[~MASK] == 0).all()


def test_the_z_loss_goes_with_the_others():
    """4.35 on top of the smoothed 3.3, and of DFT's."""
    z_loss = options_of("z_loss", OTHER)
    assert sft_loss(LOGPROBS, MASK, **options_of("smoothed", OTHER), **z_loss)[0].item() == pytest.approx(7.65)
    alone = sft_loss(LOGPROBS, MASK, dft=True)[0].item()
    assert sft_loss(LOGPROBS, MASK, dft=True, **z_loss)[0].item() == pytest.approx(alone + 4.35)


@reductions
@variants
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_a_loop_over_tokens(reduction, variant, seed):
    logprobs, other, mask = draw(seed)
    one = {
        "plain": lambda logprob, _: -logprob,
        "smoothed": lambda logprob, mean: -0.8 * logprob - 0.2 * mean,
        "dft": lambda logprob, _: -math.exp(logprob) * logprob,
        "z_loss": lambda logprob, logsumexp: -logprob + 0.1 * logsumexp**2,
    }[variant]
    rows = [
        [one(x.item(), y.item()) for x, y in zip(logprobs[i][m], other[i][m], strict=True)] for i, m in enumerate(mask)
    ]
    rows = [losses for losses in rows if losses]
    if reduction == "token":
        expected = sum(map(sum, rows)) / sum(map(len, rows))
    else:
        expected = sum(sum(losses) / len(losses) for losses in rows) / len(rows)
    loss, _ = sft_loss(logprobs, mask, reduction=reduction, **options_of(variant, other))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@reductions
@variants
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), micro=st.sampled_from([1, 2, 3, 8]))
def test_eight_micro_batches_of_one_are_one_of_eight(reduction, variant, seed, micro):
    """In value and gradient, with ragged and empty completions, once the normalizer counts the whole window."""
    logprobs, other, mask = draw(seed)
    whole = logprobs.clone().requires_grad_()
    loss, _ = sft_loss(whole, mask, reduction=reduction, **options_of(variant, other))
    loss.backward()

    parts, total = logprobs.clone().requires_grad_(), 0.0
    count = mask.sum().item() if reduction == "token" else mask.any(-1).sum().item()
    for rows in torch.arange(8).split(micro):
        options = options_of(variant, other[rows])
        part, _ = sft_loss(parts[rows], mask[rows], reduction=reduction, normalizer=count, **options)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


@reductions
@variants
def test_masked_garbage_padding_and_order_change_nothing(reduction, variant):
    """In the loss, the metrics and the gradients, which are 0 at masked places and in rows without tokens."""
    logprobs, other, mask = draw(11)
    results = []
    rows = torch.arange(8)
    for filling, extra, order in ((0.0, 0, rows), (math.nan, 3, rows.flip(0)), (1e30, 1, rows.roll(2))):
        wide = torch.nn.functional.pad(mask[order], (0, extra))
        inputs = []
        for values in (logprobs, other):
            values = torch.nn.functional.pad(values[order], (0, extra))
            inputs.append(torch.where(wide, values, filling).requires_grad_())
        loss, stats = sft_loss(inputs[0], wide, reduction=reduction, **options_of(variant, inputs[1]))
        loss.backward()
        gradients = [torch.zeros_like(wide) if x.grad is None else x.grad for x in inputs]  # the second may be unused
        assert all((gradient[~wide] == 0).all() for gradient in gradients)
        back = [gradient[order.argsort(), :5].double() for gradient in gradients]
        results.append((loss.detach(), stats, back))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-15)


@reductions
@variants
def test_a_part_without_tokens(reduction, variant):
    """With a normalizer: loss and gradient 0. Otherwise an error."""
    logprobs, nothing = LOGPROBS.clone().requires_grad_(), torch.zeros_like(MASK)
    options = options_of(variant, OTHER)
    loss, stats = sft_loss(logprobs, nothing, reduction=reduction, normalizer=4, **options)
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all() and all(value == 0 for value in stats.values())
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) is False everywhere"):
        sft_loss(LOGPROBS, nothing, reduction=reduction, **options)


@reductions
@variants
def test_gradcheck(reduction, variant):
    """By the log-probs and by the vocabulary's tensor. DFT's factor is detached, so it is a constant here too."""
    logprobs, other, mask = draw(3, rows=3, width=3)
    inputs = (logprobs.requires_grad_(), other.requires_grad_())
    if variant != "dft":
        assert torch.autograd.gradcheck(
            lambda x, y: sft_loss(x, mask, reduction=reduction, **options_of(variant, y))[0], inputs
        )
        return
    loss = sft_loss(logprobs, mask, reduction=reduction, dft=True)[0]
    factor, start = logprobs.detach().exp(), logprobs.detach()
    twin = sft_loss(start + (logprobs - start) * factor, mask, reduction=reduction)[0]  # the same slope, undetached
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs), torch.autograd.grad(twin, logprobs))


def test_stats_carry_no_graph():
    logprobs, other, mask = draw(0)
    options = options_of("z_loss", other.requires_grad_())
    stats = sft_loss(logprobs.requires_grad_(), mask, **options)[1]
    assert set(stats) == {"nll", "z_loss"}
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(reduction="mean"), "reduction='mean': expected token or sequence"),
        (dict(label_smoothing=0.5), "label_smoothing=0.5: expected 0 <= label_smoothing < 0.5"),
        (dict(label_smoothing=-0.1), "label_smoothing=-0.1: expected 0 <="),
        (dict(label_smoothing=math.nan), "label_smoothing=nan: expected 0 <="),
        (dict(label_smoothing=0.1), "label_smoothing=0.1: vocab_mean_logprobs is needed"),
        (dict(vocab_mean_logprobs=OTHER), "label_smoothing=0.0: vocab_mean_logprobs is needed above 0, and only there"),
        (dict(z_loss_coef=-1.0), "z_loss_coef=-1.0: expected 0 or more"),
        (dict(z_loss_coef=math.nan), "z_loss_coef=nan: expected 0 or more"),
        (dict(z_loss_coef=1.0), "z_loss_coef=1.0: logsumexps is needed"),
        (dict(logsumexps=OTHER), "z_loss_coef=0.0: logsumexps is needed above 0, and only there"),
        (dict(dft=True, label_smoothing=0.1, vocab_mean_logprobs=OTHER), "label_smoothing=0.1 with dft=True"),
    ],
)
def test_what_is_out_of_range_or_does_not_fit_is_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        sft_loss(LOGPROBS, MASK, **options)


# -------------------------------------------------------------------------------------------------------------- weights


def test_weights_by_hand():
    """Rows of weight 1 and 4: (1 + 2 + 3 + 4 * 4) / (3 + 4) = 22 / 7. The metric is unweighted."""
    loss, stats = sft_loss(LOGPROBS, MASK, weights=torch.tensor([[1.0], [4.0]]))
    assert loss.item() == pytest.approx(22 / 7) and stats["nll"] == 2.5
    assert sft_loss(LOGPROBS, MASK, weights=torch.tensor([[1.0], [0.0]]))[0] == 2
    assert sft_loss(LOGPROBS, MASK, weights=torch.tensor([[1.0], [4.0]]), normalizer=11)[0] == 2


@variants
def test_a_weight_of_two_is_a_row_that_is_there_twice(variant):
    logprobs, other, mask = draw(0)
    twice = [0, 0, 1, 2, 3, 3, 4, 5, 6, 7]
    weights = torch.tensor([2.0, 1, 1, 2, 1, 1, 1, 1], dtype=torch.float64)[:, None]
    weighed, _ = sft_loss(logprobs, mask, weights=weights, **options_of(variant, other))
    repeated, _ = sft_loss(logprobs[twice], mask[twice], **options_of(variant, other[twice]))
    assert weighed.item() == pytest.approx(repeated.item(), abs=1e-12)


def test_weights_need_tokens():
    with pytest.raises(ValueError, match="weights with reduction='sequence': expected reduction='token'"):
        sft_loss(LOGPROBS, MASK, weights=torch.ones(2, 1), reduction="sequence")
