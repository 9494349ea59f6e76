"""Reward modelling: scores whose differences explain the preferences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | float = 0.0, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(chosen - rejected - margin), the mean over pairs.

    Sources: Bradley and Terry (1952); margin: Llama 2 (arXiv:2307.09288), eq. 2; `center_coef` adds
    center_coef * (chosen + rejected)^2, which keeps scores around 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    Args:
        chosen_scores, rejected_scores: (B,). margin: scalar or (B,), 0 or more.

    Returns:
        the loss, a scalar, and stats: `accuracy` (a tie counts half), `margin` (mean score difference), `chosen_score`,
        `rejected_score`.
    """
    if not center_coef >= 0:
        raise ValueError(f"center_coef={center_coef}: expected 0 or more")
    if not isinstance(margin, Tensor) and not margin >= 0:
        raise ValueError(f"margin={margin}: expected 0 or more")
    difference = chosen_scores - rejected_scores
    loss = -F.logsigmoid(difference - margin)
    if center_coef:
        loss = loss + center_coef * (chosen_scores + rejected_scores).square()
    gap = difference.detach()
    stats = {
        "accuracy": ((gap > 0).float() + 0.5 * (gap == 0).float()).mean(),
        "margin": gap.mean(),
        "chosen_score": chosen_scores.detach().mean(),
        "rejected_score": rejected_scores.detach().mean(),
    }
    return loss.mean(), stats
