"""Calibration, accuracy by length and correlation, by hand and against naive second implementations."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.evaluation.reward_accuracy import (
    calibration,
    correlation,
    length_buckets,
    pair_metrics,
    pair_table,
    ranked_pairs,
    step_metrics,
    step_table,
)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_by_hand():
    """Confidences 0.55, 0.58 (one right, one wrong) and 0.95, 0.98, 0.97 (all right) and a tie.

    The first bin has 0.5, 0.55 and 0.58: mean 0.543333, accuracy (0.5 + 1 + 0) / 3 = 0.5, three of six. The last has
    mean 0.966667, accuracy 1, three of six. Error: (0.043333 + 0.033333) / 2 = 0.038333.
    """
    margins = torch.tensor([0.0, logit(0.55), -logit(0.58), logit(0.95), logit(0.98), logit(0.97)])
    error, bins = calibration(margins)
    assert error == pytest.approx(0.0383333, abs=1e-6)
    assert [one.count for one in bins] == [3, 3]
    assert (bins[0].low, bins[0].high, bins[-1].high) == (0.5, 0.6, 1.0)
    assert bins[0].accuracy == pytest.approx(0.5)
    assert bins[1].confidence == pytest.approx(0.966667, abs=1e-6)


def test_calibration_of_steps_is_of_the_more_likely_side():
    """A score of logit(0.2) predicts "wrong" with confidence 0.8, which is right where the label is False."""
    logits = torch.tensor([logit(0.2)] * 4)
    error, [only] = calibration(logits, torch.tensor([False, False, False, True]))
    assert (only.count, only.accuracy, only.confidence) == (4, 0.75, pytest.approx(0.8))
    assert error == pytest.approx(0.05)


def test_calibrated_scores_have_no_calibration_error():
    """Labels drawn from the model's own probabilities; twice the logits would be overconfident."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200_000, generator=generator)
    labels = torch.rand(200_000, generator=generator) < logits.sigmoid()
    assert calibration(logits, labels)[0] < 0.005
    assert calibration(2 * logits, labels)[0] > 0.05


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), bins=st.integers(1, 7))
def test_calibration_equals_a_loop_over_predictions(seed, count, bins):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, generator=generator)
    labels = torch.rand(count, generator=generator) < 0.5
    boxes: dict[int, list[tuple[float, float]]] = {}
    for x, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        confidence, right = max(p, 1 - p), (p > 0.5) == label
        boxes.setdefault(min(int((confidence - 0.5) / (0.5 / bins)), bins - 1), []).append((confidence, right))
    expected = sum(abs(sum(r for _, r in box) - sum(c for c, _ in box)) for box in boxes.values()) / count
    error, found = calibration(logits, labels, bins=bins)
    assert error == pytest.approx(expected, abs=1e-6)
    assert [one.count for one in found] == [len(boxes[number]) for number in sorted(boxes)]


def test_length_buckets_by_hand():
    """Lengths 100 and 90 differ by 10 % of the longer and are alike; 100 and 89 are not."""
    margins = torch.tensor([1.0, 1.0, -1.0, 0.0, 2.0, -3.0])
    chosen, rejected = torch.tensor([100, 100, 90, 89, 5, 7]), torch.tensor([90, 89, 100, 100, 50, 7])
    buckets = length_buckets(margins, chosen, rejected)
    assert buckets["longer"] == (1, 1.0)
    assert buckets["alike"] == (3, pytest.approx(1 / 3))  # one of (1, -1, -3) is right
    assert buckets["shorter"] == (2, 0.75)  # a tie and a hit


def test_metrics_of_pairs_by_hand():
    """Three pairs in which the longer one was chosen and scored higher in two, and one in which it lost both."""
    chosen, rejected = torch.tensor([3.0, 2.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    lengths = torch.tensor([[30, 10], [20, 10], [20, 10], [10, 20]])
    metrics = pair_metrics(chosen, rejected, lengths)
    assert metrics["accuracy_longer"] == pytest.approx(2 / 3)
    assert metrics["accuracy_shorter"] == 1.0
    assert "accuracy_alike" not in metrics
    assert metrics["prefers_longer"] == 0.5  # the first two; not the third, and not the last, where the shorter won
    assert metrics["chosen_longer"] == 0.75


def test_a_model_that_scores_length():
    """Scores that are the lengths: right wherever the chosen one is longer, wrong wherever it is shorter."""
    lengths = torch.tensor([[30, 10], [20, 10], [25, 24], [10, 40]])
    metrics = pair_metrics(*(lengths.float() / 10).unbind(1), lengths)
    assert (metrics["accuracy_longer"], metrics["accuracy_shorter"], metrics["prefers_longer"]) == (1, 0, 1)
    assert metrics["length_correlation"] == pytest.approx(1)
    table = pair_table(*(lengths.float() / 10).unbind(1), lengths)
    assert "scored higher in 100%, chosen in 67% of pairs of unlike length" in table
    assert "chosen is shorter            1     0.000" in table
    assert "correlate by +1.00" in table


def test_correlation_by_hand_and_where_there_is_none():
    """(1, 2, 3) and (2, 2, 5): covariance 1, deviations sqrt(2/3) and sqrt(2): 1 / (0.8165 * 1.4142) = 0.8660."""
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 2, 5])) == pytest.approx(0.8660254)
    assert correlation(torch.tensor([1.0, 1.0]), torch.tensor([1, 2])) is None
    assert "length_correlation" not in pair_metrics(torch.ones(1), torch.ones(1), torch.tensor([[1, 2]]))


def test_pairs_of_ranked_lists():
    """Of a list of three: first over second, first over third, second over third; then the pair."""
    rows = [SimpleNamespace(completions=([0], [0, 0], [0, 0, 0])), SimpleNamespace(completions=([0] * 4, [0] * 5))]
    better, worse, lengths = ranked_pairs(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), rows)
    assert better.tolist() == [5, 5, 4, 2]
    assert worse.tolist() == [4, 3, 3, 1]
    assert lengths.tolist() == [[1, 2], [1, 3], [2, 3], [4, 5]]


def test_steps_of_each_label_have_an_accuracy_of_their_own():
    """A model that predicts "right" always is right for nine of ten steps, and for no wrong step."""
    scores, labels = torch.full((10,), 2.0), torch.arange(10) < 9
    metrics = step_metrics(scores, labels)
    assert (metrics["accuracy_right"], metrics["accuracy_wrong"]) == (1, 0)
    assert "wrong steps                  1     0.000" in step_table(scores, labels)
    assert "accuracy_wrong" not in step_metrics(scores, torch.ones(10, dtype=torch.bool))
