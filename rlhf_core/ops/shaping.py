"""What is done to a completion's score before it becomes a reward. Each is a step of its own, in the caller's order."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def missing_eos_penalty(scores: Tensor, finished: Tensor, *, penalty: float, mode: str = "subtract") -> Tensor:
    """Completions that did not end by themselves score less: a reward model was never shown half a text.

        "subtract": score - penalty    (TRL's missing_eos_penalty)
        "replace":  -penalty           (lm-human-preferences, Ziegler et al. 2019; with penalty 1 the "EOS trick" of
                                        Huang et al. 2024, arXiv:2403.17031). What the score was does not matter.

    Args:
        scores: (B,). finished: (B,) bool, True where the completion holds its EOS. penalty: 0 or more.

    Raises ValueError for a negative penalty and an unknown mode.
    """
    if not penalty >= 0:
        raise ValueError(f"penalty={penalty}: expected 0 or more")
    if mode == "subtract":
        return torch.where(finished, scores, scores - penalty)
    if mode == "replace":
        return torch.where(finished, scores, -penalty)
    raise ValueError(f"mode={mode!r}: expected subtract or replace")


def length_penalty(scores: Tensor, lengths: Tensor, *, coef: float, free_length: int = 0) -> Tensor:
    """A price on every token past the first `free_length`: score - coef * max(length - free_length, 0).

    Args:
        scores: (B,). lengths: (B,) in tokens. coef: 0 or more. free_length: 0 or more.

    Raises ValueError for either below 0.
    """
    for name, value in (("coef", coef), ("free_length", free_length)):
        if not value >= 0:
            raise ValueError(f"{name}={value}: expected 0 or more")
    return scores - coef * (lengths - free_length).clamp(min=0).to(scores.dtype)


def length_normalize(scores: Tensor, lengths: Tensor, *, exponent: float = 1.0) -> Tensor:
    """score / length^exponent: 1 makes a sum over tokens their mean, 0 leaves it, and between lies what is between.

    Args:
        scores: (B,). lengths: (B,) in tokens, 1 or more. exponent: 0 or more.

    Raises ValueError for a negative exponent and a completion without tokens.
    """
    if not exponent >= 0:
        raise ValueError(f"exponent={exponent}: expected 0 or more")
    if bool((lengths < 1).any()):
        raise ValueError(f"lengths={lengths.tolist()}: expected 1 or more, a score per no token is not defined")
    return scores / lengths.to(scores.dtype) ** exponent


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13), to be added to the scores.

        0                                         length <= max_length - buffer
        (max_length - buffer - length) / buffer   up to max_length, where it reaches -1
        -1                                        beyond

    Args:
        lengths: (B,) in tokens. max_length: where the punishment is full. buffer: tokens over which it grows.

    Returns:
        (B,) float32, from -1 to 0. Raises ValueError for a buffer outside 1 to max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer={buffer}: expected 1 to max_length={max_length}")
    return ((max_length - buffer - lengths).float() / buffer).clamp(-1, 0)


def clip_scores(scores: Tensor, *, low: float | None = None, high: float | None = None) -> Tensor:
    """Scores held between `low` and `high`, either of which may be None: no bound. A NaN stays one.

    Raises ValueError for a low above high.
    """
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"low={low}: expected no more than high={high}")
    return scores if low is None and high is None else scores.clamp(low, high)


def scale_scores(scores: Tensor, *, std: float, mean: float = 0.0, eps: float = 1e-8) -> Tensor:
    """(score - mean) / (std + eps), with moments of past scores (`rlhf_core.control.RunningMoments`).

    With mean 0 only the spread changes, and no score its sign: reward scaling as PPO implementations have it (Engstrom
    et al. 2020, arXiv:2005.12729). A std of 0, where nothing has varied yet, is no scale: it leaves the spread alone.

    Args:
        scores: (B,). std: 0 or more. eps: 0 or more.

    Raises ValueError for either below 0.
    """
    for name, value in (("std", std), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name}={value}: expected 0 or more")
    return (scores - mean) / (std + eps if std > 0 else 1.0)


def best_of_n_kl(n: int) -> float:
    """An upper *bound* in nats on the KL from the reference of taking its best of n samples.

        KL(best of n || reference) <= log n - (n - 1) / n

    Often quoted as an equality. It is one in the limit where no two samples score alike and none repeats; on a finite
    set of completions the KL is less (Beirami et al. 2024, arXiv:2401.01879).

    Raises ValueError for n below 1.
    """
    if not n >= 1:
        raise ValueError(f"n={n}: expected 1 or more")
    return math.log(n) - (n - 1) / n
