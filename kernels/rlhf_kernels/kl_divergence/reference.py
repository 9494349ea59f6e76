"""The definition: everything at once, in plain torch. Slow and large on purpose; the tests compare with it."""

import math

import torch
from torch import Tensor


def kl_divergence(
    policy_logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: str = "reverse",
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence of each row of (..., V) logits and the policy's entropy, both (...,) float32 or float64.

    With p and q the softmax of policy and reference logits over the temperature, and m = (p + q) / 2:

        "reverse": sum of p log(p / q)    "forward": sum of q log(q / p)
        "js": (sum of p log(p / m) + sum of q log(q / m)) / 2

    where 0 log 0 = 0. Rows outside the mask (...,) give 0.
    """
    if mask is not None:
        policy_logits, ref_logits = (torch.where(mask[..., None], x, 0.0) for x in (policy_logits, ref_logits))
    real = torch.float64 if torch.float64 in (policy_logits.dtype, ref_logits.dtype) else torch.float32
    p, q = (torch.log_softmax(x.to(real) / temperature, dim=-1) for x in (policy_logits, ref_logits))
    if kind == "js":
        # Where neither p nor q is, m's gradient would be 0 / 0; it is not used there.
        m = torch.logaddexp(p, torch.where((p == -math.inf) & (q == -math.inf), 0.0, q)) - math.log(2)
        divergence = (_expected_gap(p, m) + _expected_gap(q, m)) / 2
    else:
        divergence = _expected_gap(p, q) if kind == "reverse" else _expected_gap(q, p)
    entropies = -_expected_gap(p, torch.zeros_like(p))
    if mask is not None:
        divergence, entropies = (torch.where(mask, x, 0.0) for x in (divergence, entropies))
    return divergence, entropies


def _expected_gap(first: Tensor, second: Tensor) -> Tensor:
    probs = first.exp()
    return (probs * torch.where(probs > 0, first - second, 0.0)).sum(-1)
