"""How good the scores of a reward model are: right how often, sure with how much right, and swayed by length.

Numbers for the log (`pair_gauges`, `step_gauges`), and the same as a small table for people (`pair_table`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data.tokenize import Example

ALIKE = 0.1
"""Lengths that differ by at most this share of the longer one count as alike."""
BINS = 5
LENGTHS = ("longer", "alike", "shorter")  # the chosen completion, beside the rejected one


class Bin(NamedTuple):
    """Predictions of like confidence."""

    low: float
    high: float
    count: int
    confidence: float  # mean of those in it
    accuracy: float


class LengthBucket(NamedTuple):
    """Pairs whose chosen completion is longer than the rejected one, alike in length, or shorter."""

    count: int
    accuracy: float


def calibration(logits: Tensor, right: Tensor | None = None, *, bins: int = BINS) -> tuple[float, list[Bin]]:
    """The expected calibration error of sigmoid(logits) and the bins that it is made of (Guo et al. 2017,
    arXiv:1706.04599, equation 5; bins of equal width).

        sum over bins of   share of predictions in it * |its accuracy - its mean confidence|

    A prediction is the likelier of two sides, its confidence max(p, 1 - p). Confidences lie between a half and one, and
    the bins divide that. A tie is right by half.

    Args:
        logits: (N,); for pairs the score difference, chosen less rejected. right: (N,) bool, the side that was true;
            None: the positive one always, as for pairs.

    Returns:
        the error, and those bins that have anything in them.
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
    """Accuracy where the chosen completion is longer, alike (within `ALIKE`), shorter; what no pair is in is absent.

    A model that has only learned to like length is right in the first and wrong in the last.

    Args:
        margins: (N,) score differences; a tie is right by half. chosen_lengths, rejected_lengths: (N,) tokens.
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
    """Pearson's, of (N,) and (N,); None where one of them does not vary."""
    centred = [values.double() - values.double().mean() for values in (first, second)]
    norms = [values.norm() for values in centred]
    if not all(norm > 1e-12 * (1 + values.abs().max()) for norm, values in zip(norms, (first, second), strict=True)):
        return None
    return ((centred[0] @ centred[1]) / (norms[0] * norms[1])).clamp(-1, 1).item()


def ranked_pairs(scores: Tensor, rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Every better completion beside every worse one of its list, for `pair_gauges`: (P,) and (P,) scores, (P, 2)
    lengths.

    Args:
        scores: (sum K,) of the completions of these rows in turn, which have them best first.
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


def pair_gauges(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> dict[str, float]:
    """What is worth logging of N scored pairs, apart from their loss and accuracy.

    `calibration_error`; `accuracy_longer`, `accuracy_alike`, `accuracy_shorter` by the chosen completion's length
    beside the rejected one's; `prefers_longer`, the share of pairs of unlike length whose longer completion gets the
    higher score, and `chosen_longer`, in which it was chosen; `length_correlation` of score and length over all
    completions. What no pair tells anything of is absent.

    Args:
        chosen, rejected: (N,) scores. lengths: (N, 2) tokens of both.
    """
    margins = chosen - rejected
    gauges = {"calibration_error": calibration(margins)[0]}
    buckets = length_buckets(margins, *lengths.unbind(1))
    gauges |= {f"accuracy_{name}": bucket.accuracy for name, bucket in buckets.items()}
    if unlike := [name for name in ("longer", "shorter") if name in buckets]:
        total = sum(buckets[name].count for name in unlike)
        longer, shorter = (buckets.get(name, LengthBucket(0, 0.0)) for name in ("longer", "shorter"))
        won = longer.count * longer.accuracy + shorter.count * (1 - shorter.accuracy)
        gauges |= {"prefers_longer": won / total, "chosen_longer": longer.count / total}
    related = correlation(torch.stack([chosen, rejected], 1).flatten(), lengths.flatten())
    return gauges | ({} if related is None else {"length_correlation": related})


def pair_table(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> str:
    """The same for people: accuracy by length, and how often what was said with a confidence was right."""
    margins, gauges = chosen - rejected, pair_gauges(chosen, rejected, lengths)
    buckets = length_buckets(margins, *lengths.unbind(1))
    names = {"longer": "chosen is longer", "alike": "lengths alike (10 %)", "shorter": "chosen is shorter"}
    lines = [f"{'':<22}{'pairs':>8}{'accuracy':>10}"]
    lines += [f"{names[name]:<22}{bucket.count:>8}{bucket.accuracy:>10.3f}" for name, bucket in buckets.items()]
    if "prefers_longer" in gauges:
        lines.append(f"the longer one: scored higher in {gauges['prefers_longer']:.0%}, ")
        lines[-1] += f"chosen in {gauges['chosen_longer']:.0%} of pairs of unlike length"
    if "length_correlation" in gauges:
        lines.append(f"score and length correlate by {gauges['length_correlation']:+.2f}")
    return "\n".join([*lines, *_calibration_lines(margins, None, "pairs")])


def step_gauges(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """What is worth logging of N scored steps: `calibration_error`, and `accuracy_right` and `accuracy_wrong` of the
    steps of each label, since most steps are right and one number hides the rest. A label that no step has is absent.

    Args:
        scores: (N,) logits. labels: (N,) bool.
    """
    gauges = {"calibration_error": calibration(scores, labels)[0]}
    for name, inside, side in (("right", labels, 1), ("wrong", ~labels, -1)):
        if inside.any():
            gauges[f"accuracy_{name}"] = ((1 + side * scores[inside].double().sign()) / 2).mean().item()
    return gauges


def step_table(scores: Tensor, labels: Tensor) -> str:
    """The same for people."""
    gauges = step_gauges(scores, labels)
    lines = [f"{'':<22}{'steps':>8}{'accuracy':>10}"]
    for name, inside in (("right", labels), ("wrong", ~labels)):
        if inside.any():
            lines.append(f"{name + ' steps':<22}{int(inside.sum()):>8}{gauges[f'accuracy_{name}']:>10.3f}")
    return "\n".join([*lines, *_calibration_lines(scores, labels, "steps")])


def _calibration_lines(logits: Tensor, right: Tensor | None, unit: str) -> list[str]:
    error, bins = calibration(logits, right)
    lines = [f"{'said with confidence':<22}{unit:>8}{'accuracy':>10}"]
    lines += [f"{f'{one.low:.1f} to {one.high:.1f}':<22}{one.count:>8}{one.accuracy:>10.3f}" for one in bins]
    return [*lines, f"expected calibration error {error:.3f}"]
