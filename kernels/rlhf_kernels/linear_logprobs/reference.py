"""The definition in plain torch, without blocks. Slow and large; the tests compare with it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and the entropy of softmax(logits / temperature), both (M,) float32 (or float64).

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), or without the tanh where softcap is None.
    """
    logits = head_logits(hidden, weight, bias, scale=scale, softcap=softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.exp()
    entropy = -(probs * torch.where(probs > 0, logprobs, 0.0)).sum(-1)  # 0 log 0 = 0
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Return the logits of a head, (M, V), in float32 or float64."""
    logits = F.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
