"""The definition: everything at once, in plain torch. Slow and large on purpose; the tests compare with it."""

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of softmax(z / temperature), both (...,) float32 (float64 stays float64).

    z = softcap * tanh(logits / softcap), or the logits (..., V) themselves where softcap is None. Rows outside the
    mask (...,) give 0.
    """
    if mask is not None:
        logits = torch.where(mask[..., None], logits, 0.0)
        targets = torch.where(mask, targets, 0)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.exp()
    entropies = -(probs * torch.where(probs > 0, logprobs, 0.0)).sum(-1)  # 0 log 0 = 0
    chosen = logprobs.gather(-1, targets[..., None]).squeeze(-1)
    if mask is not None:
        chosen, entropies = (torch.where(mask, x, 0.0) for x in (chosen, entropies))
    return chosen, entropies
