"""Win rate of one model over another."""

from __future__ import annotations

from torch import Tensor


def win_rate(scores: Tensor, baseline_scores: Tensor) -> float:
    """Return the share of prompts whose `scores` (B,) exceed `baseline_scores` (B,); a tie counts half."""
    if scores.shape != baseline_scores.shape:
        raise ValueError(
            f"{tuple(scores.shape)} scores against {tuple(baseline_scores.shape)}: expected the same prompts"
        )
    wins = (scores > baseline_scores).float() + 0.5 * (scores == baseline_scores).float()
    return wins.mean().item()
