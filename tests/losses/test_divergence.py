"""f-DPO's reward differences, compared with arithmetic that cannot overflow."""

from __future__ import annotations

import itertools
import math
from decimal import Context, Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.divergence import exp_difference, score_difference
from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss
from tests.losses.pairs_of import pairs_of

CASES = [
    ("forward_kl", 0.5),
    ("js", 0.5),
    ("alpha", 0.5),
    ("alpha", 1.5),
    ("alpha", 0.0),
    ("alpha", -1.0),
    ("alpha", 1.0),
]
log_ratios = st.floats(-1000, 1000)


def derivative(x: Decimal, divergence: str, alpha: float) -> Decimal:
    """f'(e^x), to 60 digits and for any exponent."""
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return x
    if divergence == "forward_kl":
        return 1 - (-x).exp()
    if divergence == "js":
        return Decimal(2).ln() - (1 + (-x).exp()).ln()
    return (((Decimal(alpha) - 1) * x).exp() - 1) / (Decimal(alpha) - 1)


def exactly(chosen: float, rejected: float, divergence: str, alpha: float, lengths=(1, 1)) -> float:
    with localcontext(Context(prec=60, Emax=10**6, Emin=-(10**6))):
        c, r = (derivative(Decimal(x), divergence, alpha) for x in (chosen, rejected))
        return float(c / lengths[0] - r / lengths[1])


@pytest.mark.parametrize(
    ("divergence", "alpha", "expected"),
    [
        ("reverse_kl", 0.5, 3.0),
        ("forward_kl", 0.5, 3.5),  # -1/2 + 4
        ("js", 0.5, 1.2039728),  # ln(2/3) - ln(1/5) = ln(10/3)
        ("alpha", 0.5, 2.5857864),  # (2^-1/2 - 2) / (-1/2) = 4 - sqrt 2
        ("alpha", 2.0, 1.75),  # 2 - 1/4
        ("alpha", 0.0, 3.5),  # forward_kl
    ],
)
def test_by_hand(divergence, alpha, expected):
    """Ratios 2 and 1/4, so u = ln 2 and -2 ln 2. In units of ln 2 the reverse KL's difference is 3."""
    chosen, rejected = torch.tensor([2.0]).double().log(), torch.tensor([0.25]).double().log()
    value = score_difference(chosen, rejected, divergence=divergence, alpha=alpha).item()
    assert value == pytest.approx(expected * (math.log(2) if divergence == "reverse_kl" else 1), abs=1e-7)


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
@settings(max_examples=50, deadline=None)
@given(chosen=log_ratios, rejected=log_ratios, lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_equals_exact_arithmetic(divergence, alpha, chosen, rejected, lengths):
    """In float64, with lengths: relative to the larger part where it is representable, clamped beyond."""
    c, r = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected))
    c_length, r_length = (torch.tensor([length]) for length in lengths)
    value = score_difference(c, r, divergence=divergence, alpha=alpha, chosen_length=c_length, rejected_length=r_length)
    truth = exactly(chosen, rejected, divergence, alpha, lengths)
    saturated = torch.finfo(torch.float64).max ** 0.5 / 1e6
    if abs(truth) < saturated / 4:
        parts = [
            exactly(x, 0.0, divergence, alpha, (length, 1))
            for x, length in zip((chosen, rejected), lengths, strict=True)
        ]
        size = max(1.0, *(min(abs(part), saturated) for part in parts))
        assert value.item() == pytest.approx(truth, rel=1e-11, abs=1e-11 * size)
    else:
        assert value.item() * math.copysign(1, truth) > saturated / 100
    value.backward()
    assert c.grad.isfinite() and r.grad.isfinite() and c.grad >= 0 >= r.grad


@settings(max_examples=50, deadline=None)
@given(a=st.floats(-80, 80), gap=st.floats(-1e-3, 1e-3))
def test_nearly_equal_exponentials_keep_their_digits(a, gap):
    """e^a - e^b = e^a (1 - e^(b - a)): for close exponents the plain difference loses digits that expm1 keeps."""
    value = exp_difference(*torch.tensor([a + gap, a], dtype=torch.float64)).item()
    exact_gap = (a + gap) - a
    assert value == pytest.approx(math.exp(a) * math.expm1(exact_gap), rel=1e-12, abs=0)


def test_equal_exponents_that_overflow_cancel():
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([1000.0], dtype=dtype, requires_grad=True)
        value = exp_difference(x, x.detach().clone())
        value.backward()
        assert value == 0 and x.grad.isfinite() and x.grad > 1e13


def test_gradcheck():
    a = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.5, 1.0, 0.4, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exp_difference, (a, b))
    assert torch.autograd.gradgradcheck(exp_difference, (a, b))
    for divergence, alpha in CASES:
        options = dict(divergence=divergence, alpha=alpha, chosen_length=2.0)
        assert torch.autograd.gradcheck(lambda c, r, options=options: score_difference(c, r, **options), (a, b))


F_LOSSES = [name for name, entry in PREFERENCE_LOSSES.items() if entry.f_divergence]


@pytest.mark.parametrize("name", F_LOSSES)
def test_no_loss_turns_into_nan(name):
    """All pairs of log-ratios from -1000 to 1000, every divergence, in the value and the gradient of both sides."""
    values = [-1000.0, -100.0, -10.0, 0.0, 10.0, 100.0, 1000.0]
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    for dtype, (divergence, alpha) in itertools.product((torch.float32, torch.float64), CASES):
        options = dict(f_divergence=divergence, f_alpha=alpha, normalizer=1) | smoothing
        grid = torch.tensor(values, dtype=dtype)
        chosen, rejected = (x.reshape(-1, 1).clone() for x in torch.meshgrid(grid, grid, indexing="ij"))
        # One pair at a time where pairs depend on each other, or to compare each value; otherwise all at once.
        rows = [slice(i, i + 1) for i in range(49)] if name in ("beta_dpo", "sigmoid") else [slice(0, 49)]
        for row in rows:
            c, r = (x[row].requires_grad_() for x in (chosen, rejected))
            mask, zeros = torch.ones(len(c), 1, dtype=torch.bool), torch.zeros(len(c), 1, dtype=dtype)
            pairs = pairs_of(
                chosen_logprobs=c,
                rejected_logprobs=r,
                chosen_mask=mask,
                rejected_mask=mask,
                ref_chosen_logprobs=zeros,
                ref_rejected_logprobs=zeros,
                margin=torch.ones(len(c), dtype=dtype),
            )
            loss, _ = preference_loss(name, pairs, **options)
            gradients = torch.autograd.grad(loss, (c, r))
            assert not loss.isnan() and not any(gradient.isnan().any() for gradient in gradients)
            if name == "sigmoid":  # the true value, where it is not clamped
                z = 0.1 * exactly(c.item(), r.item(), divergence, alpha)
                truth = max(-z, 0.0) + math.log1p(math.exp(-abs(z)))
                if truth < torch.finfo(dtype).max ** 0.5 / 1e7:
                    assert loss.item() == pytest.approx(truth, rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_reverse_kl_is_the_default_and_a_limit_of_alpha():
    """alpha -> 1 is the reverse KL, alpha = 0 the forward KL."""
    generator = torch.Generator().manual_seed(0)
    c, r = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    assert torch.equal(score_difference(c, r), c - r)
    assert torch.equal(score_difference(c, r, divergence="alpha", alpha=1.0), c - r)
    torch.testing.assert_close(score_difference(c, r, divergence="alpha", alpha=1 + 1e-7), c - r, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        score_difference(c, r, divergence="alpha", alpha=0.0), score_difference(c, r, divergence="forward_kl")
    )
