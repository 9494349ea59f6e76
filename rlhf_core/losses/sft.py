"""Supervised fine-tuning: negative log-likelihood with label smoothing, DFT and z-loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.losses.registry import require_label_smoothing
from rlhf_core.ops.masked import masked_aggregate, masked_mean, masked_sum


def sft_loss(
    logprobs: Tensor,
    mask: Tensor,
    *,
    reduction: str = "token",
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    vocab_mean_logprobs: Tensor | None = None,
    dft: bool = False,
    z_loss_coef: float = 0.0,
    logsumexps: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the negative log-likelihood of completion tokens, in nats. For one token with l = log p(token):

        -l                                  plain
        -(1 - e) l - e mean_v log p(v)      label smoothing e (Szegedy et al. 2016, arXiv:1512.00567, section 7)
        -p(token) l, p(token) detached      DFT (Wu et al. 2025, arXiv:2508.05629)
        + z_loss_coef * logsumexp^2         z-loss, with any (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5)

    DFT's factor p cancels the factor 1 / p in the gradient of the likelihood, so unlikely tokens do not dominate the
    gradient. The z-loss keeps the normaliser of the softmax near 1 (PaLM: z_loss_coef 1e-4).

    Args:
        logprobs: (B, T). mask: (B, T) bool, True = completion token.
        reduction: "token" weights all tokens equally; "sequence" averages within each completion first. A row without
            tokens is not counted.
        normalizer: divide by this instead of the local count of tokens (or sequences). With the count of the whole
            accumulation window, over all ranks, eight micro-batches of one row equal one of eight rows.
        weights: (B, T) or (B, 1), 0 or more: the mean over tokens becomes sum w loss / sum w. The normalizer is then
            the sum of the window's weights.
        label_smoothing: 0 <= e < 0.5; needs vocab_mean_logprobs (B, T), `mean_logprob` of `vocab_statistics`.
        z_loss_coef: 0 or more; needs logsumexps (B, T), `logsumexp` of `vocab_statistics`.

    Returns:
        the loss, a scalar, and stats, means per token: `nll`, always plain and unweighted, and, with a z-loss,
        `z_loss` (times its coefficient).

    Raises ValueError for a parameter out of range, a tensor that is missing or not used, smoothing together with DFT,
    weights together with "sequence", or a mask that is False everywhere while no normalizer is given.
    """
    if reduction not in ("token", "sequence"):
        raise ValueError(f"reduction={reduction!r}: expected token or sequence")
    require_label_smoothing(label_smoothing)
    if not z_loss_coef >= 0:
        raise ValueError(f"z_loss_coef={z_loss_coef}: expected 0 or more")
    if (label_smoothing > 0) != (vocab_mean_logprobs is not None):
        raise ValueError(f"label_smoothing={label_smoothing}: vocab_mean_logprobs is needed above 0, and only there")
    if (z_loss_coef > 0) != (logsumexps is not None):
        raise ValueError(f"z_loss_coef={z_loss_coef}: logsumexps is needed above 0, and only there")
    if weights is not None and reduction != "token":
        raise ValueError(f"weights with reduction={reduction!r}: expected reduction='token'")
    if dft and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} with dft=True: DFT has no smoothed form")

    logprobs = torch.where(mask, logprobs, 0.0)
    losses = -logprobs
    stats = {"nll": masked_mean(losses.detach(), mask)}
    if dft:
        losses = losses * logprobs.detach().exp()
    if vocab_mean_logprobs is not None:
        losses = (1 - label_smoothing) * losses - label_smoothing * vocab_mean_logprobs
    if logsumexps is not None:
        z_losses = z_loss_coef * torch.where(mask, logsumexps, 0.0).square()
        losses = losses + z_losses
        stats["z_loss"] = masked_mean(z_losses.detach(), mask)
    if weights is not None:
        losses = losses * weights
        normalizer = masked_sum(weights.expand_as(losses), mask) if normalizer is None else normalizer
    return masked_aggregate(losses, mask, reduction, normalizer=normalizer), stats
