"""Losses of reward models: Bradley-Terry, Plackett-Luce, process rewards; and ensembles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.registry import require_label_smoothing, smoothed_logistic
from rlhf_core.ops.masked import masked_aggregate, masked_mean, masked_sum, require_tokens


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float = 0.0,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the negative log-likelihood of preferences (Bradley and Terry 1952) as the mean over pairs.

        -(1 - e) log sigmoid(d) - e log sigmoid(-d) + center_coef * (chosen + rejected)^2
        d = chosen - rejected - margin

    The margin is Llama 2's (Touvron et al. 2023, arXiv:2307.09288, eq. 2). e = label_smoothing is the probability that
    a label is wrong, as in conservative DPO (Mitchell 2023, eq. 3). The centering term keeps the scores near 0, because
    their differences alone do not determine their level (Eisenstein et al. 2023, arXiv:2312.09244).

    Args:
        chosen_scores, rejected_scores: (B,).
        margin: a float, 0 or more, or (B,) of any values.
        center_coef: 0 or more. label_smoothing: 0 <= e < 0.5.
        weights: (B,), 0 or more: the mean becomes sum w loss / sum w; stats stay plain means.
        normalizer: divide by this instead of the local count of pairs, or sum of weights (see `sft_loss`).

    Returns:
        the loss, a scalar, and stats over pairs: `accuracy` (a tie counts half), `margin` (mean score difference,
        without subtracting the argument margin), `chosen_score`, `rejected_score`.

    Raises ValueError for a parameter out of range, shapes that differ, or no pair while no normalizer is given.
    """
    if not center_coef >= 0:
        raise ValueError(f"center_coef={center_coef}: expected 0 or more")
    if not isinstance(margin, Tensor) and not margin >= 0:
        raise ValueError(f"margin={margin}: expected 0 or more")
    require_label_smoothing(label_smoothing)
    difference = chosen_scores - rejected_scores
    logits = difference - margin
    if not chosen_scores.shape == rejected_scores.shape == logits.shape:
        shapes = [tuple(tensor.shape) for tensor in (chosen_scores, rejected_scores, logits)]
        raise ValueError("chosen_scores {}, rejected_scores {}, less margin {}: expected one shape".format(*shapes))
    if normalizer is None and not difference.numel():
        raise ValueError(f"chosen_scores of shape {tuple(chosen_scores.shape)}: expected at least one pair")

    losses = smoothed_logistic(logits, label_smoothing)
    if center_coef:
        losses = losses + center_coef * (chosen_scores + rejected_scores).square()
    gap = difference.detach()
    per_pair = {
        "accuracy": (1 + gap.sign().float()) / 2,
        "margin": gap,
        "chosen_score": chosen_scores.detach(),
        "rejected_score": rejected_scores.detach(),
    }
    stats = {name: values.sum() / max(losses.numel(), 1) for name, values in per_pair.items()}
    divisor: int | Tensor = losses.numel()
    if weights is not None:
        losses, divisor = losses * weights, weights.sum()
    return losses.sum() / (divisor if normalizer is None else normalizer), stats


def plackett_luce_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the negative log-likelihood of whole rankings (Luce 1959; Plackett 1975) as the mean over lists.

        sum over places k of   log sum_{j >= k} exp(score_j) - score_k

    Args:
        scores: (B, K), each list from best to worst. mask: (B, K) bool, False past the end of a shorter list; None:
            all True. A list with fewer than two entries is not counted.
        weights: (B,), 0 or more: the mean becomes sum w loss / sum w; stats stay plain means.
        normalizer: divide by this instead of the local count of lists, or sum of weights (see `sft_loss`).

    Returns:
        the loss, a scalar, and stats: `accuracy` over all ordered pairs within lists (a tie counts half).

    Raises ValueError where no list has two entries while no normalizer is given.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    ranks = mask.sum(-1) > 1
    require_tokens(ranks, normalizer, "mask.sum(-1) > 1")
    weights = ranks.to(scores.dtype) if weights is None else weights * ranks
    loss = (plackett_luce_nll(scores, mask) * weights).sum() / (weights.sum() if normalizer is None else normalizer)
    with torch.no_grad():
        pairs = (mask[:, :, None] & mask[:, None, :]).triu(1)  # (B, K, K): row above column
        correct = (1 + (scores[:, :, None] - scores[:, None, :]).sign().float()) / 2
    return loss, {"accuracy": masked_mean(correct, pairs)}


def plackett_luce_nll(scores: Tensor, mask: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each list: the best is drawn from all entries, the next from the rest, ...

    For two entries this is the Bradley-Terry loss; for fewer it is 0.

    Args:
        scores: (B, K), each list from best to worst. mask: (B, K) bool.

    Returns:
        (B,).
    """
    remaining = (mask[:, :, None] & mask[:, None, :]).triu()  # (B, K, K): entry k and all entries ranked below it
    # Not logcumsumexp, whose gradient loses a digit of float32 for each digit of the scores. The fill is finite: its
    # exponential is 0 like that of -inf, but a row that is masked everywhere has no NaN gradient.
    log_sums = torch.where(remaining, scores[:, None, :], torch.finfo(scores.dtype).min).logsumexp(-1)
    return masked_sum(log_sums - scores, mask, -1)


def process_reward_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    reduction: str = "token",
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the binary cross-entropy of the correctness of each step of a solution, at the steps' last tokens.

        -y log sigmoid(score) - (1 - y) log sigmoid(-score)

    Sources: Uesato et al. 2022, arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050.

    Args:
        scores: (B, T) logits. labels: (B, T) bool, or the probability in [0, 1] that the step is correct; values where
            the mask is False are ignored. mask: (B, T) bool, True = last token of a step.
        reduction: "token" weights all steps equally; "sequence" averages within each solution first.
        weights: (B,), 0 or more, of solutions: the mean becomes sum w loss / sum w; stats stay plain means.
        normalizer: divide by this instead of the local count of steps (or solutions), or the sum of their weights (see
            `sft_loss`).

    Returns:
        the loss, a scalar, and stats: `accuracy` over steps, 1 where the score has the sign of label - 1/2 (a score of
        0 or a label of 1/2 counts half).

    Raises ValueError for a label outside [0, 1] where the mask is True, an unknown reduction, or a mask that is False
    everywhere while no normalizer is given.
    """
    if reduction not in ("token", "sequence"):
        raise ValueError(f"reduction={reduction!r}: expected token or sequence")
    scores, labels = torch.where(mask, scores, 0.0), torch.where(mask, labels.to(scores.dtype), 0.5)
    if not torch.compiler.is_compiling() and not bool(((labels >= 0) & (labels <= 1)).all()):
        wrong = labels[~((labels >= 0) & (labels <= 1))][0].item()
        raise ValueError(f"labels={wrong}: expected 0 <= label <= 1 wherever the mask is True")
    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    correct = (1 + (scores.detach().sign() * (labels - 0.5).sign()).float()) / 2
    if weights is not None:
        losses = losses * weights[:, None]
        counts = mask.sum(-1) if reduction == "token" else mask.any(-1)
        normalizer = (weights * counts).sum() if normalizer is None else normalizer
    return masked_aggregate(losses, mask, reduction, normalizer=normalizer), {"accuracy": masked_mean(correct, mask)}


def ensemble_scores(member_scores: Tensor, *, lcb_coef: float = 0.0) -> Tensor:
    """Combine the scores of several reward models: their mean minus a multiple of their standard deviation (a lower
    confidence bound).

        mean_e s_e - lcb_coef * std_e s_e

    Where a policy exploits the errors of one model, the members disagree. Coste et al. 2023 (arXiv:2310.02743) subtract
    the members' variance (uncertainty-weighted optimisation) or take their minimum (worst-case optimisation). The
    standard deviation has the unit of the scores, so lcb_coef does not depend on their scale. It is the biased one,
    divided by E, like the paper's variance.

    Args:
        member_scores: (E, ...), one row per member. lcb_coef: 0 or more; must be 0 for a single member.

    Returns:
        (...,) scores. Where all members agree the standard deviation is not differentiable; its gradient is taken as 0.

    Raises ValueError for a negative lcb_coef, or one above 0 with a single member.
    """
    if not lcb_coef >= 0:
        raise ValueError(f"lcb_coef={lcb_coef}: expected 0 or more")
    if lcb_coef and len(member_scores) < 2:
        raise ValueError(f"lcb_coef={lcb_coef} with {len(member_scores)} member: expected 2 members or more, or 0")
    mean = member_scores.mean(0)
    if not lcb_coef:
        return mean
    variance = (member_scores - mean).square().mean(0)
    apart = variance > 0
    # Zeros are replaced before the square root, whose gradient at 0 is infinite.
    std = torch.where(apart, torch.where(apart, variance, 1.0).sqrt(), 0.0)
    return mean - lcb_coef * std
