"""f-DPO: the same preference losses with another divergence between policy and reference (Wang et al. 2023).

DPO's implicit reward is beta log(pi / ref), because its regulariser is the reverse KL. With the divergence
D_f = E_ref[f(pi / ref)] it is beta f'(pi / ref) up to a constant of the prompt, which cancels between the two
completions of a pair (arXiv:2309.16240, theorem 1). With u = log(pi / ref):

    reverse_kl   f'(e^u) = u            (+ 1, which cancels)
    forward_kl   f'(e^u) = -e^-u
    js           f'(e^u) = log sigmoid(u)            (+ log 2, which cancels)
    alpha        f'(e^u) = (e^((alpha - 1) u) - 1) / (alpha - 1);  alpha = 0: forward_kl, alpha -> 1: reverse_kl

The paper counts its alpha from the other end: theirs is 1 - alpha.
"""

from __future__ import annotations

import math

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
    """f'(chosen ratio) / chosen_length - f'(rejected ratio) / rejected_length, (B,).

    Args:
        *_log_ratio: (B,), of whole completions. *_length: 1, or their lengths where a loss is length-normalised.
        alpha: of the alpha divergence; any finite number.

    Finite for any log-ratios: where two exponentials differ by more than a float can hold, see `exp_difference`.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"f_divergence={divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return chosen_log_ratio / chosen_length - rejected_log_ratio / rejected_length
    if divergence == "js":
        log2 = math.log(2)
        chosen, rejected = log2 + F.logsigmoid(chosen_log_ratio), log2 + F.logsigmoid(rejected_log_ratio)
        return chosen / chosen_length - rejected / rejected_length
    slope = -1.0 if divergence == "forward_kl" else alpha - 1
    if not math.isfinite(slope):
        raise ValueError(f"f_alpha={alpha}: expected a finite number")
    # e^x / L = e^(x - log L): the lengths move into the exponents, so the two cancel there and not after overflow.
    log_lengths = [torch.as_tensor(length).to(chosen_log_ratio).log() for length in (chosen_length, rejected_length)]
    difference = exp_difference(slope * chosen_log_ratio - log_lengths[0], slope * rejected_log_ratio - log_lengths[1])
    return (difference - (log_lengths[0].neg().exp() - log_lengths[1].neg().exp())) / slope


def exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """e^a - e^b without inf - inf: exact up to a millionth of the root of the largest float, and saturated there.

    The gradient, e^a and -e^b, saturates at the same value. A norm is made of squares, hence the root; the millionth
    leaves room for what a model multiplies it by and for sums. So it stays a direction that gradient clipping can use;
    0 * inf cannot occur in it.
    """
    return _ExpDifference.apply(*torch.broadcast_tensors(a, b))


class _ExpDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        largest, gap = torch.maximum(a, b), (a - b).abs()
        fraction = -torch.expm1(-gap)  # e^largest (1 - e^-gap)
        magnitude = torch.where(
            largest <= _limit(a), largest.exp() * fraction, (largest + fraction.log()).clamp(max=_limit(a)).exp()
        )
        return torch.sign(a - b) * magnitude

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        limit = _limit(a)
        return gradient * a.clamp(max=limit).exp(), -gradient * b.clamp(max=limit).exp()


def _limit(tensor: Tensor) -> float:
    """The exponent of a millionth of the root of the largest float of this dtype: 30.5 in float32."""
    return math.log(torch.finfo(tensor.dtype).max) / 2 - math.log(1e6)
