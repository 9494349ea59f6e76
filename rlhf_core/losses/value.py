"""The loss of a value model."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.ops.masked import masked_aggregate, masked_mean, masked_var


def value_loss(
    *,
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute half the squared error to the returns, the larger of clipped and unclipped, as the mean over tokens.

        mean max((V - R)^2, (clamp(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2

    as in OpenAI's baselines and lm-human-preferences. `value_clip=None` is the plain squared error.

    Args:
        new_values: (B, T) of the value model now, with gradient. values: (B, T) at the time of sampling. returns:
            (B, T). mask: (B, T) bool.
        value_clip: more than 0, in the unit of the values, or None.
        normalizer: divide by this instead of the local count of tokens (see `sft_loss`).

    Returns:
        the loss, a scalar, and stats: `value_clip_fraction` and `value_mean`.

    Raises ValueError for a clip out of range, or a mask that is False everywhere while no normalizer is given.
    """
    if value_clip is not None and not value_clip > 0:
        raise ValueError(f"value_clip={value_clip}: expected more than 0, or None for no clipping")
    new_values, returns = torch.where(mask, new_values, 0.0), torch.where(mask, returns, 0.0)
    error = (new_values - returns).square()
    clipped = torch.zeros_like(error)
    if value_clip is not None:
        values = torch.where(mask, values, 0.0)
        clipped = (new_values.clamp(values - value_clip, values + value_clip) - returns).square()
    loss = 0.5 * masked_aggregate(torch.maximum(error, clipped), mask, "token", normalizer=normalizer)
    with torch.no_grad():
        stats = {
            "value_clip_fraction": masked_mean((clipped > error).float(), mask),
            "value_mean": masked_mean(new_values, mask),
        }
    return loss, stats


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Compute 1 - Var(R - V) / Var(R) over completion tokens: 1 for perfect values, 0 for constant ones."""
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)
