"""Transformations of scores, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_core.ops.shaping import (
    clip_scores,
    missing_eos_penalty,
    overlong_penalty,
    scale_scores,
)

SCORES = torch.tensor([3.0, -1.0, 0.5])
NAN = math.nan


def test_missing_eos_by_hand():
    """The second is truncated: -1 - 2 = -3 subtracted, -2 replaced."""
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
    """(3, -1, 1/2) over 2; minus 1 and over 2; eps added to the std."""
    assert scale_scores(SCORES, std=2.0, eps=0).tolist() == [1.5, -0.5, 0.25]
    assert scale_scores(SCORES, std=2.0, mean=1.0, eps=0).tolist() == [1, -1, -0.25]
    assert scale_scores(SCORES, std=1.5, eps=0.5).tolist() == [1.5, -0.5, 0.25]
    torch.testing.assert_close(scale_scores(SCORES, std=2.0), SCORES / 2)


def test_a_std_of_0_does_not_scale():
    """Dividing by 0 + eps would turn 3 into 3e8."""
    assert scale_scores(SCORES, std=0.0).tolist() == SCORES.tolist()
    assert scale_scores(SCORES, std=0.0, mean=1.0).tolist() == [2, -2, -0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: missing_eos_penalty(SCORES, SCORES > 0, penalty=-1), "penalty=-1: expected 0 or more"),
        (lambda: missing_eos_penalty(SCORES, SCORES > 0, penalty=NAN), "penalty=nan: expected 0 or more"),
        (
            lambda: missing_eos_penalty(SCORES, SCORES > 0, penalty=1, mode="add"),
            "mode='add': expected subtract or replace",
        ),
        (lambda: overlong_penalty(torch.tensor([1]), max_length=8, buffer=0), "buffer=0: expected 1 to max_length=8"),
        (lambda: overlong_penalty(torch.tensor([1]), max_length=8, buffer=9), "buffer=9: expected 1 to max_length=8"),
        (lambda: clip_scores(SCORES, low=1.0, high=0.0), "low=1.0: expected no more than high=0.0"),
        (lambda: clip_scores(SCORES, low=NAN, high=0.0), "low=nan: expected no more than high=0.0"),
        (lambda: scale_scores(SCORES, std=-1.0), "std=-1.0: expected 0 or more"),
        (lambda: scale_scores(SCORES, std=NAN), "std=nan: expected 0 or more"),
        (lambda: scale_scores(SCORES, std=1.0, eps=-1e-8), "eps=-1e-08: expected 0 or more"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
