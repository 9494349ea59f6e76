"""Log-probabilities of chosen tokens. The one place that calls `rlhf_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import linear_logprobs

__all__ = ["linear_logprobs", "logits_logprobs"]


def logits_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log p(target) under softmax(logits / temperature), for logits that are already there.

    Args:
        logits: (M, V). targets: (M,) int64.

    Returns:
        (M,) log-probs in float32 (float64 for float64 logits), and (M,) entropies in nats without gradient, or None.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return chosen, None
    with torch.no_grad():
        return chosen, torch.special.entr(logprobs.exp()).sum(-1)  # entr(0) = 0, where a logit is -inf
