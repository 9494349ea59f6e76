"""Steps between a score and a reward, by hand; and the bound on best-of-n's KL against its exact value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.shaping import (
    best_of_n_kl,
    clip_scores,
    length_normalize,
    length_penalty,
    missing_eos_penalty,
    overlong_penalty,
    scale_scores,
)

SCORES = torch.tensor([3.0, -1.0, 0.5])
NAN = math.nan


def test_missing_eos_by_hand():
    """The second never ended: -1 - 2 = -3 subtracted, -2 replaced."""
    finished = torch.tensor([True, False, True])
    assert missing_eos_penalty(SCORES, finished, penalty=2).tolist() == [3, -3, 0.5]
    assert missing_eos_penalty(SCORES, finished, penalty=2, mode="replace").tolist() == [3, -2, 0.5]
    assert missing_eos_penalty(SCORES, finished, penalty=0.0).tolist() == SCORES.tolist()


def test_a_score_that_is_replaced_may_be_anything():
    scores = torch.tensor([1.0, NAN, math.inf], requires_grad=True)
    replaced = missing_eos_penalty(scores, torch.tensor([True, False, False]), penalty=1, mode="replace")
    assert replaced.tolist() == [1, -1, -1]
    replaced.sum().backward()
    assert scores.grad.tolist() == [1, 0, 0]


def test_length_penalty_by_hand():
    """0.5 a token past the first 10: of 8, 10, 13 tokens the last pays 1.5."""
    lengths = torch.tensor([8, 10, 13])
    assert length_penalty(SCORES, lengths, coef=0.5, free_length=10).tolist() == [3, -1, -1]
    assert length_penalty(SCORES, lengths, coef=0.5).tolist() == [-1, -6, -6]
    assert length_penalty(SCORES, lengths, coef=0.0).tolist() == SCORES.tolist()


def test_length_normalize_by_hand():
    """Over 1, 4, 16 tokens; the root of them; and their 0th power, 1."""
    scores, lengths = torch.tensor([8.0, -8.0, 8.0]), torch.tensor([1, 4, 16])
    assert length_normalize(scores, lengths).tolist() == [8, -2, 0.5]
    assert length_normalize(scores, lengths, exponent=0.5).tolist() == [8, -4, 2]
    assert length_normalize(scores, lengths, exponent=0.0).tolist() == scores.tolist()


def test_lengths_keep_float64():
    """An exponent or a price is not rounded to float32 on the way."""
    scores, lengths = torch.tensor([1.0], dtype=torch.float64), torch.tensor([3])
    assert length_normalize(scores, lengths, exponent=0.7).item() == pytest.approx(3**-0.7, rel=1e-15)
    assert length_penalty(scores, lengths, coef=0.1).item() == pytest.approx(0.7, rel=1e-15)


def test_overlong_by_hand():
    """Max 20, buffer 4: free up to 16, a quarter a token, -1 at 20 and beyond."""
    lengths = torch.tensor([0, 15, 16, 17, 18, 19, 20, 21, 1000])
    expected = [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert overlong_penalty(lengths, max_length=20, buffer=4).tolist() == expected
    assert overlong_penalty(torch.tensor([0, 1, 2]), max_length=2, buffer=2).tolist() == [0, -0.5, -1]


def test_clip_by_hand():
    assert clip_scores(SCORES, low=-0.5, high=1).tolist() == [1, -0.5, 0.5]
    assert clip_scores(SCORES, low=0.0).tolist() == [3, 0, 0.5]
    assert clip_scores(SCORES, high=0.0).tolist() == [0, -1, 0]
    assert clip_scores(SCORES).tolist() == SCORES.tolist()
    assert clip_scores(torch.tensor([NAN]), low=-1, high=1).isnan()


def test_scale_by_hand():
    """(3, -1, 1/2) over 2; around 1 and over 2; and eps beside the std."""
    assert scale_scores(SCORES, std=2.0, eps=0).tolist() == [1.5, -0.5, 0.25]
    assert scale_scores(SCORES, std=2.0, mean=1.0, eps=0).tolist() == [1, -1, -0.25]
    assert scale_scores(SCORES, std=1.5, eps=0.5).tolist() == [1.5, -0.5, 0.25]
    torch.testing.assert_close(scale_scores(SCORES, std=2.0), SCORES / 2)


def test_no_spread_is_no_scale():
    """Where all scores were 3, dividing by 0 + eps would make 3e8 of a 3."""
    assert scale_scores(SCORES, std=0.0).tolist() == SCORES.tolist()
    assert scale_scores(SCORES, std=0.0, mean=1.0).tolist() == [2, -2, -0.5]


def exact_best_of_n_kl(probs: list[float], n: int) -> float:
    """With symbols in the order of their scores, the best of n is i where all are at most i and not all below it."""
    kl, below = 0.0, 0.0
    for prob in probs:
        at_most = below + prob
        best = at_most**n - below**n
        kl += best * math.log(best / prob) if best > 0 else 0.0
        below = at_most
    return kl


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), n=st.integers(1, 30))
def test_best_of_n_is_a_bound(weights, n):
    probs = [weight / sum(weights) for weight in weights]
    assert exact_best_of_n_kl(probs, n) <= best_of_n_kl(n) + 1e-9


def test_best_of_n_by_hand():
    """One sample is the reference. Of a fair coin, the better of two is heads 3/4 of the time:

    3/4 ln(3/2) + 1/4 ln(1/2) = 0.131, where the bound is ln 2 - 1/2 = 0.193.
    """
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 1 / 2)
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)
    coin = exact_best_of_n_kl([0.5, 0.5], 2)
    assert coin == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert coin < best_of_n_kl(2) - 0.06


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_is_close_for_many_symbols(n):
    """20,000 alike: no two of n samples meet, and the bound is reached from below."""
    exact = exact_best_of_n_kl([1 / 20_000] * 20_000, n)
    assert best_of_n_kl(n) - 1e-3 < exact <= best_of_n_kl(n) + 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: missing_eos_penalty(SCORES, SCORES > 0, penalty=-1), "penalty=-1: expected 0 or more"),
        (lambda: missing_eos_penalty(SCORES, SCORES > 0, penalty=NAN), "penalty=nan: expected 0 or more"),
        (
            lambda: missing_eos_penalty(SCORES, SCORES > 0, penalty=1, mode="add"),
            "mode='add': expected subtract or replace",
        ),
        (lambda: length_penalty(SCORES, SCORES.long(), coef=-0.1), "coef=-0.1: expected 0 or more"),
        (lambda: length_penalty(SCORES, SCORES.long(), coef=1, free_length=-2), "free_length=-2: expected 0 or more"),
        (lambda: length_normalize(SCORES, torch.tensor([1, 2, 3]), exponent=-1), "exponent=-1: expected 0 or more"),
        (lambda: length_normalize(SCORES, torch.tensor([1, 0, 3])), r"lengths=\[1, 0, 3\]: expected 1 or more"),
        (lambda: overlong_penalty(torch.tensor([1]), max_length=8, buffer=0), "buffer=0: expected 1 to max_length=8"),
        (lambda: overlong_penalty(torch.tensor([1]), max_length=8, buffer=9), "buffer=9: expected 1 to max_length=8"),
        (lambda: clip_scores(SCORES, low=1.0, high=0.0), "low=1.0: expected no more than high=0.0"),
        (lambda: clip_scores(SCORES, low=NAN, high=0.0), "low=nan: expected no more than high=0.0"),
        (lambda: scale_scores(SCORES, std=-1.0), "std=-1.0: expected 0 or more"),
        (lambda: scale_scores(SCORES, std=NAN), "std=nan: expected 0 or more"),
        (lambda: scale_scores(SCORES, std=1.0, eps=-1e-8), "eps=-1e-08: expected 0 or more"),
        (lambda: best_of_n_kl(0), "n=0: expected 1 or more"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
