"""Transformations of completion scores before they become rewards, applied by the caller in any order."""

from __future__ import annotations

import torch
from torch import Tensor


def missing_eos_penalty(scores: Tensor, finished: Tensor, *, penalty: float, mode: str = "subtract") -> Tensor:
    """Lower the scores of truncated completions, since reward models are trained on complete texts.

        "subtract": score - penalty    (TRL's missing_eos_penalty)
        "replace":  -penalty           (lm-human-preferences, Ziegler et al. 2019; with penalty 1 the "EOS trick" of
                                        Huang et al. 2024, arXiv:2403.17031), whatever the score

    Args:
        scores: (B,). finished: (B,) bool, True where the completion ends with an end token. penalty: 0 or more.

    Returns:
        (B,); the scores of finished completions are unchanged.

    Raises ValueError for a negative penalty and an unknown mode.
    """
    if not penalty >= 0:
        raise ValueError(f"penalty={penalty}: expected 0 or more")
    if mode == "subtract":
        return torch.where(finished, scores, scores - penalty)
    if mode == "replace":
        return torch.where(finished, scores, -penalty)
    raise ValueError(f"mode={mode!r}: expected subtract or replace")


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """Compute DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13), to be added to the scores.

        0                                         length <= max_length - buffer
        (max_length - buffer - length) / buffer   up to max_length, where it reaches -1
        -1                                        beyond

    Args:
        lengths: (B,) in tokens. max_length: length at which the punishment reaches -1. buffer: tokens over which it
            grows.

    Returns:
        (B,) float32, from -1 to 0. Raises ValueError for a buffer outside 1 to max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer={buffer}: expected 1 to max_length={max_length}")
    return ((max_length - buffer - lengths).float() / buffer).clamp(-1, 0)


def clip_scores(scores: Tensor, *, low: float | None = None, high: float | None = None) -> Tensor:
    """Clamp scores to [low, high]; None is no bound. NaN stays NaN.

    Raises ValueError for a low above high.
    """
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"low={low}: expected no more than high={high}")
    return scores if low is None and high is None else scores.clamp(low, high)


def scale_scores(scores: Tensor, *, std: float, mean: float = 0.0, eps: float = 1e-8) -> Tensor:
    """Compute (score - mean) / (std + eps), with moments of past scores (`rlhf_core.control.RunningMoments`).

    With mean 0 no score changes its sign: reward scaling as in PPO implementations (Engstrom et al. 2020,
    arXiv:2005.12729). With a std of 0, for example before the second score, scores are not divided.

    Args:
        scores: (B,). std: 0 or more. eps: 0 or more.

    Raises ValueError for either below 0.
    """
    for name, value in (("std", std), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name}={value}: expected 0 or more")
    return (scores - mean) / (std + eps if std > 0 else 1.0)
