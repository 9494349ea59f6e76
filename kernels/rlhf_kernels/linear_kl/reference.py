"""The definition in plain torch, without blocks. Slow and large; the tests compare with it."""

import torch
from torch import Tensor

from rlhf_kernels.kl_divergence.reference import divergence_of
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
) -> Tensor:
    """Return the divergence of the two distributions at each row, (M,) float32 or float64; see `kl_divergence`."""
    p, q = (
        torch.log_softmax(head_logits(hidden, weight, bias, scale=scale, softcap=softcap) / temperature, dim=-1)
        for hidden, weight, bias in ((policy_hidden, policy_weight, policy_bias), (ref_hidden, ref_weight, ref_bias))
    )
    return divergence_of(p, q, kind)
