"""Quality of a reward model's scores: accuracy, calibration, and dependence on length.

`pair_metrics` and `step_metrics` return numbers to log; `pair_table` and `step_table` the same as a table to print.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data.records import Example

ALIKE = 0.1
"""Lengths that differ by at most this fraction of the longer one are alike."""
BINS = 5
LENGTHS = ("longer", "alike", "shorter")  # of the chosen completion, compared with the rejected one


class Bin(NamedTuple):
    """Predictions of similar confidence."""

    low: float
    high: float
    count: int
    confidence: float  # mean over the bin
    accuracy: float


class LengthBucket(NamedTuple):
    """The pairs whose chosen completion is longer than the rejected one, alike in length, or shorter."""

    count: int
    accuracy: float


def calibration(logits: Tensor, right: Tensor | None = None, *, bins: int = BINS) -> tuple[float, list[Bin]]:
    """Compute the expected calibration error of sigmoid(logits) (Guo et al. 2017, arXiv:1706.04599, equation 5).

        sum over bins of   share of predictions in the bin * |its accuracy - its mean confidence|

    A prediction is the more likely of two sides, with confidence max(p, 1 - p); bins of equal width divide the range
    from 0.5 to 1. A tie counts as half right.

    Args:
        logits: (N,); for pairs the chosen score minus the rejected one. right: (N,) bool, the true side; None: always
            the positive one, as for pairs.

    Returns:
        The error, and the bins that are not empty.
    """
    logits = logits.double()
    true_side = torch.ones_like(logits) if right is None else right.to(logits) * 2 - 1
    accuracy = (1 + (logits * true_side).sign()) / 2
    confidence = logits.abs().sigmoid()
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=torch.float64)
    place = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, bins - 1)
    found, error = [], 0.0
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        if count:
            low, high = edges[number].item(), edges[number + 1].item()
            found.append(Bin(low, high, count, confidence[inside].mean().item(), accuracy[inside].mean().item()))
            error += count / len(logits) * abs(found[-1].accuracy - found[-1].confidence)
    return error, found


def length_buckets(margins: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> dict[str, LengthBucket]:
    """Return the accuracy where the chosen completion is longer, alike (within `ALIKE`) or shorter.

    A model whose score depends on length alone is right in the first bucket and wrong in the last. A bucket without
    pairs is absent.

    Args:
        margins: (N,) score differences; a tie counts as half right. chosen_lengths, rejected_lengths: (N,) tokens.
    """
    accuracy = (1 + margins.double().sign()) / 2
    gap = chosen_lengths - rejected_lengths
    alike = gap.abs() <= ALIKE * torch.maximum(chosen_lengths, rejected_lengths)
    found = {}
    for name, inside in zip(LENGTHS, (~alike & (gap > 0), alike, ~alike & (gap < 0)), strict=True):
        if inside.any():
            found[name] = LengthBucket(int(inside.sum()), accuracy[inside].mean().item())
    return found


def correlation(first: Tensor, second: Tensor) -> float | None:
    """Return Pearson's correlation of (N,) and (N,); None where one of them is constant."""
    centred = [values.double() - values.double().mean() for values in (first, second)]
    norms = [values.norm() for values in centred]
    if not all(norm > 1e-12 * (1 + values.abs().max()) for norm, values in zip(norms, (first, second), strict=True)):
        return None
    return ((centred[0] @ centred[1]) / (norms[0] * norms[1])).clamp(-1, 1).item()


def ranked_pairs(scores: Tensor, rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Pair every completion of a ranking with every worse one, for `pair_metrics`.

    Args:
        scores: (sum K,) of the completions of all rows in order, best first in each row.

    Returns:
        (P,) scores of the better ones, (P,) scores of the worse ones, and (P, 2) lengths in tokens.
    """
    better, worse, start = [], [], 0
    for row in rows:
        ordered = combinations(range(start, start + len(row.completions)), 2)
        first, second = zip(*ordered, strict=True)
        better += first
        worse += second
        start += len(row.completions)
    lengths = torch.tensor([len(completion) for row in rows for completion in row.completions])
    return scores[better], scores[worse], torch.stack([lengths[better], lengths[worse]], 1)


def pair_metrics(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> dict[str, float]:
    """Return the metrics of N scored pairs, apart from their loss and accuracy.

    Args:
        chosen, rejected: (N,) scores. lengths: (N, 2) tokens of both.

    Returns:
        `calibration_error`; `accuracy_longer`, `accuracy_alike`, `accuracy_shorter`: accuracy by the chosen
        completion's length compared with the rejected one's; `prefers_longer`: share of pairs of different length whose
        longer completion has the higher score, and `chosen_longer`: of those whose longer completion was chosen;
        `length_correlation` of score and length over all completions. Metrics without pairs are absent.
    """
    margins = chosen - rejected
    metrics = {"calibration_error": calibration(margins)[0]}
    buckets = length_buckets(margins, *lengths.unbind(1))
    metrics |= {f"accuracy_{name}": bucket.accuracy for name, bucket in buckets.items()}
    if unlike := [name for name in ("longer", "shorter") if name in buckets]:
        total = sum(buckets[name].count for name in unlike)
        longer, shorter = (buckets.get(name, LengthBucket(0, 0.0)) for name in ("longer", "shorter"))
        won = longer.count * longer.accuracy + shorter.count * (1 - shorter.accuracy)
        metrics |= {"prefers_longer": won / total, "chosen_longer": longer.count / total}
    related = correlation(torch.stack([chosen, rejected], 1).flatten(), lengths.flatten())
    return metrics | ({} if related is None else {"length_correlation": related})


def pair_table(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> str:
    """Return a table of accuracy by length and by confidence."""
    margins, metrics = chosen - rejected, pair_metrics(chosen, rejected, lengths)
    buckets = length_buckets(margins, *lengths.unbind(1))
    names = {"longer": "chosen is longer", "alike": "lengths alike (10 %)", "shorter": "chosen is shorter"}
    lines = [f"{'':<22}{'pairs':>8}{'accuracy':>10}"]
    lines += [f"{names[name]:<22}{bucket.count:>8}{bucket.accuracy:>10.3f}" for name, bucket in buckets.items()]
    if "prefers_longer" in metrics:
        lines.append(f"the longer one: scored higher in {metrics['prefers_longer']:.0%}, ")
        lines[-1] += f"chosen in {metrics['chosen_longer']:.0%} of pairs of unlike length"
    if "length_correlation" in metrics:
        lines.append(f"score and length correlate by {metrics['length_correlation']:+.2f}")
    return "\n".join([*lines, *_calibration_lines(margins, None, "pairs")])


def step_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics of N scored steps, apart from their loss and accuracy.

    Args:
        scores: (N,) logits. labels: (N,) bool.

    Returns:
        `calibration_error`; `accuracy_right`, `accuracy_wrong`: accuracy on the steps of each label, since most steps
        are right and a single accuracy hides the others. A label without steps is absent.
    """
    metrics = {"calibration_error": calibration(scores, labels)[0]}
    for name, inside, side in (("right", labels, 1), ("wrong", ~labels, -1)):
        if inside.any():
            metrics[f"accuracy_{name}"] = ((1 + side * scores[inside].double().sign()) / 2).mean().item()
    return metrics


def step_table(scores: Tensor, labels: Tensor) -> str:
    """Return a table of accuracy by label and by confidence."""
    metrics = step_metrics(scores, labels)
    lines = [f"{'':<22}{'steps':>8}{'accuracy':>10}"]
    for name, inside in (("right", labels), ("wrong", ~labels)):
        if inside.any():
            lines.append(f"{name + ' steps':<22}{int(inside.sum()):>8}{metrics[f'accuracy_{name}']:>10.3f}")
    return "\n".join([*lines, *_calibration_lines(scores, labels, "steps")])


def _calibration_lines(logits: Tensor, right: Tensor | None, unit: str) -> list[str]:
    error, bins = calibration(logits, right)
    lines = [f"{'confidence':<22}{unit:>8}{'accuracy':>10}"]
    lines += [f"{f'{one.low:.1f} to {one.high:.1f}':<22}{one.count:>8}{one.accuracy:>10.3f}" for one in bins]
    return [*lines, f"expected calibration error {error:.3f}"]
