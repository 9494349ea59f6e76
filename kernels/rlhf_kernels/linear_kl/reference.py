"""The definition: everything at once, in plain torch. Slow and large on purpose; the tests compare with it."""

import math

import torch
from torch import Tensor

from rlhf_kernels.linear_logprobs.reference import head_logits


def linear_kl(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kind: str = "reverse",
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence of each row's two distributions, and the policy's entropy, both (M,) float32 or float64.

    With p and q the softmax of policy and reference logits over the temperature, and m = (p + q) / 2:

        "reverse": sum of p log(p / q)    "forward": sum of q log(q / p)
        "js": (sum of p log(p / m) + sum of q log(q / m)) / 2
    """
    log_p, log_q = (
        torch.log_softmax(head_logits(hidden, weight, bias, scale=scale, softcap=softcap) / temperature, dim=-1)
        for hidden, weight, bias in ((policy_hidden, policy_weight, policy_bias), (ref_hidden, ref_weight, ref_bias))
    )

    def mean_gap(first: Tensor, second: Tensor) -> Tensor:
        probs = first.exp()
        return (probs * torch.where(probs > 0, first - second, 0.0)).sum(-1)  # 0 log 0 = 0

    if kind == "js":
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        divergence = (mean_gap(log_p, middle) + mean_gap(log_q, middle)) / 2
    else:
        divergence = mean_gap(log_p, log_q) if kind == "reverse" else mean_gap(log_q, log_p)
    return divergence, -mean_gap(log_p, torch.zeros_like(log_p))
