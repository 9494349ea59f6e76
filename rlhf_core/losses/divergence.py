"""f-DPO: preference losses with another divergence between policy and reference (Wang et al. 2023).

The implicit reward of DPO is beta log(pi / ref), because its regulariser is the reverse KL. With the divergence
D_f = E_ref[f(pi / ref)] it is beta f'(pi / ref) up to a constant of the prompt, which cancels between the two
completions of a pair (arXiv:2309.16240, theorem 1). With u = log(pi / ref):

    reverse_kl   f'(e^u) = u            (+ 1, which cancels)
    forward_kl   f'(e^u) = -e^-u
    js           f'(e^u) = log sigmoid(u)            (+ log 2, which cancels)
    alpha        f'(e^u) = (e^((alpha - 1) u) - 1) / (alpha - 1);  alpha = 0: forward_kl, alpha -> 1: reverse_kl

The alpha of the paper is 1 - alpha here.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def score_difference(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    *,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    chosen_length: Tensor | float = 1.0,
    rejected_length: Tensor | float = 1.0,
) -> Tensor:
    """Compute f'(chosen ratio) / chosen_length - f'(rejected ratio) / rejected_length.

    Args:
        chosen_log_ratio, rejected_log_ratio: (B,), summed over each completion.
        divergence: one of `DIVERGENCES`. alpha: parameter of the alpha divergence, any finite number.
        chosen_length, rejected_length: 1, or (B,) lengths in tokens for a length-normalised loss.

    Returns:
        (B,), finite for any finite log-ratios: exponentials saturate as in `exp_difference`.

    Raises ValueError for an unknown divergence and an alpha that is not finite.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"f_divergence={divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return chosen_log_ratio / chosen_length - rejected_log_ratio / rejected_length
    if divergence == "js":
        log2 = math.log(2)
        chosen, rejected = log2 + F.logsigmoid(chosen_log_ratio), log2 + F.logsigmoid(rejected_log_ratio)
        return chosen / chosen_length - rejected / rejected_length
    factor = -1.0 if divergence == "forward_kl" else alpha - 1
    if not math.isfinite(factor):
        raise ValueError(f"f_alpha={alpha}: expected a finite number")
    # e^x / L = e^(x - log L): with the lengths in the exponents, the two terms cancel there and not after overflow.
    log_lengths = [torch.as_tensor(length).to(chosen_log_ratio).log() for length in (chosen_length, rejected_length)]
    difference = exp_difference(
        factor * chosen_log_ratio - log_lengths[0], factor * rejected_log_ratio - log_lengths[1]
    )
    return (difference - (log_lengths[0].neg().exp() - log_lengths[1].neg().exp())) / factor


def exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """Compute e^a - e^b without inf - inf.

    It is exact up to 1e-6 times the square root of the largest float of the dtype, and clamped there. The gradient,
    e^a and -e^b, is clamped at the same value: a gradient norm sums squares, hence the square root, and the factor 1e-6
    leaves a margin for the derivatives of the model and for sums. So gradient clipping works, and 0 * inf cannot occur.
    """
    return cast(Tensor, _ExpDifference.apply(*torch.broadcast_tensors(a, b)))  # type: ignore[no-untyped-call]


class _ExpDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        largest, gap = torch.maximum(a, b), (a - b).abs()
        fraction = -torch.expm1(-gap)  # e^largest (1 - e^-gap)
        magnitude = torch.where(
            largest <= _limit(a), largest.exp() * fraction, (largest + fraction.log()).clamp(max=_limit(a)).exp()
        )
        return torch.sign(a - b) * magnitude

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        limit = _limit(a)
        return gradient * a.clamp(max=limit).exp(), -gradient * b.clamp(max=limit).exp()


def _limit(tensor: Tensor) -> float:
    """Return log(1e-6 sqrt(largest float of this dtype)): 30.5 for float32."""
    return math.log(torch.finfo(tensor.dtype).max) / 2 - math.log(1e6)
