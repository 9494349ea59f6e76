"""The definition in plain torch, without blocks. Slow and large; the tests compare with it."""

import math

import torch
from torch import Tensor


def kl_divergence(
    policy_logits: Tensor, ref_logits: Tensor, *, kind: str = "reverse", temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the divergence at each row of (..., V) logits and the policy's entropy, both (...,) float32 or float64.

    With p and q the softmax of policy and reference logits over the temperature, and m = (p + q) / 2:

        "reverse": sum of p log(p / q)    "forward": sum of q log(q / p)
        "js": (sum of p log(p / m) + sum of q log(q / m)) / 2

    where 0 log 0 = 0.
    """
    real = torch.float64 if torch.float64 in (policy_logits.dtype, ref_logits.dtype) else torch.float32
    p, q = (torch.log_softmax(x.to(real) / temperature, dim=-1) for x in (policy_logits, ref_logits))
    return divergence_of(p, q, kind), -_expected_gap(p, torch.zeros_like(p))


def divergence_of(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Return the divergence of distributions with logarithms `p` and `q`, (..., V), as (...,)."""
    if kind == "js":
        # Where neither p nor q is, m's gradient would be 0 / 0; it is not used there.
        m = torch.logaddexp(p, torch.where((p == -math.inf) & (q == -math.inf), 0.0, q)) - math.log(2)
        return (_expected_gap(p, m) + _expected_gap(q, m)) / 2
    return _expected_gap(p, q) if kind == "reverse" else _expected_gap(q, p)


def _expected_gap(first: Tensor, second: Tensor) -> Tensor:
    probs = first.exp()
    return (probs * torch.where(probs > 0, first - second, 0.0)).sum(-1)
