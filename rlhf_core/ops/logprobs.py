"""Log-probabilities of given tokens, statistics over the vocabulary, and the choice of kernels."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import linear_logprobs, linear_token_loss, token_logprobs
from rlhf_kernels.registry import choose, use_impl

__all__ = [
    "VocabStatistics",
    "linear_logprobs",
    "linear_token_loss",
    "logits_logprobs",
    "require_kernels",
    "use_kernels",
    "vocab_statistics",
]


def require_kernels(impl: str, device: torch.device | str) -> None:
    """Raise RuntimeError if the fused operations cannot run as `impl`, "torch" or "triton", on this device."""
    choose("rlhf_kernels", device, impl)


def use_kernels(impl: str) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which every fused operation runs as "torch" or "triton"; "auto" changes nothing."""
    return contextlib.nullcontext() if impl == "auto" else use_impl(impl)


def logits_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute log p(target) under softmax(logits / temperature) from existing logits.

    Args:
        logits: (M, V). targets: (M,) int64. temperature: more than 0. entropy: also return entropies.

    Returns:
        (M,) log-probs in float32 (float64 for float64 logits), and (M,) entropies in nats without gradient, or None.
        For the entropy with its gradient, see `vocab_statistics`.
    """
    logprobs, entropies = token_logprobs(logits, targets, temperature=temperature, entropy=entropy)
    return logprobs, None if entropies is None else entropies.detach()


class VocabStatistics(NamedTuple):
    """Statistics of a distribution p over the vocabulary that losses need, each (...,)."""

    logsumexp: Tensor  # log sum_v exp(logit_v), for the z-loss
    entropy: Tensor  # -sum_v p_v log p_v, in nats, for the entropy bonus
    mean_logprob: Tensor  # mean_v log p_v, for label smoothing; -inf where a logit is
    log_sum_sq_probs: Tensor  # log sum_v p_v^2, the probability that two samples are equal, for WPO


def vocab_statistics(logits: Tensor, *, temperature: float = 1.0) -> VocabStatistics:
    """Compute four sums over the vocabulary of p = softmax(logits / temperature), each with its exact gradient.

    With z = logits / temperature:

        logsumexp          d/dz_j = p_j
        entropy            d/dz_j = -p_j (log p_j + entropy)
        mean_logprob       d/dz_j = 1 / V - p_j
        log_sum_sq_probs   d/dz_j = 2 (p_j^2 / sum_v p_v^2 - p_j)

    A logit of -inf excludes its token (p = 0). `mean_logprob` is then -inf, its true value; the other three and all
    gradients are finite, as long as each row has a finite logit.

    Args:
        logits: (..., V), of any floating dtype. temperature: more than 0.

    Returns:
        `VocabStatistics` of (...,) tensors, float32 (float64 for float64 logits).

    Raises ValueError for a temperature that is not positive.
    """
    logits = _tempered(logits, temperature)
    logprobs = torch.log_softmax(logits, dim=-1)
    return VocabStatistics(
        logsumexp=logits.logsumexp(-1),
        entropy=_entropy(logprobs),
        mean_logprob=logprobs.mean(-1),
        log_sum_sq_probs=(2 * logprobs).logsumexp(-1),
    )


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def _entropy(logprobs: Tensor) -> Tensor:
    probs = logprobs.exp()
    # 0 log 0 = 0. Infinite logarithms are replaced before the product: the gradient of 0 * -inf would be NaN.
    return -(probs * torch.where(probs > 0, logprobs, 0.0)).sum(-1)
