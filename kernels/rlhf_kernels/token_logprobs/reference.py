"""The definition in plain torch, without blocks. Slow and large; the tests compare with it."""

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and the entropy of softmax(logits / temperature), both (...,) float32 (or float64).

    Rows outside the mask (...,) give 0.
    """
    if mask is not None:
        logits = torch.where(mask[..., None], logits, 0.0)
        targets = torch.where(mask, targets, 0)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.exp()
    entropies = -(probs * torch.where(probs > 0, logprobs, 0.0)).sum(-1)  # 0 log 0 = 0
    chosen = logprobs.gather(-1, targets[..., None]).squeeze(-1)
    if mask is not None:
        chosen, entropies = (torch.where(mask, x, 0.0) for x in (chosen, entropies))
    return chosen, entropies
