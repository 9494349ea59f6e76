"""Supervised fine-tuning: the negative log-likelihood of the completion."""

from __future__ import annotations

from torch import Tensor

from rlhf_core.ops.masked import masked_sum


def sft_loss(
    logprobs: Tensor, mask: Tensor, *, reduction: str = "token", normalizer: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of completion tokens, in nats.

    Args:
        logprobs: (B, T). mask: (B, T) bool, True = completion token.
        reduction: "token" weighs every token alike; "sequence" takes each completion's mean first.
        normalizer: divide by this instead of by the local count of tokens (or sequences). Give the count of the whole
            accumulation window, over all ranks, and eight micro-batches of one add up to one of eight.

    Returns:
        the loss, a scalar, and stats: `nll` (mean per token).
    """
    nll_sum, tokens = -masked_sum(logprobs, mask), mask.sum()
    nll = nll_sum / tokens.clamp(min=1)
    if reduction == "token":
        loss = nll_sum / (tokens.clamp(min=1) if normalizer is None else normalizer)
    elif reduction == "sequence":
        per_sequence = -masked_sum(logprobs, mask, -1) / mask.sum(-1).clamp(min=1)
        loss = per_sequence.sum() / (len(per_sequence) if normalizer is None else normalizer)
    else:
        raise ValueError(f"reduction={reduction!r}: expected token or sequence")
    return loss, {"nll": nll.detach()}
