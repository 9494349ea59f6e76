"""Reward modelling: scores whose differences explain the preferences."""

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
    """The negative log-likelihood of the preferences (Bradley and Terry 1952), the mean over pairs.

        -(1 - e) log sigmoid(d) - e log sigmoid(-d) + center_coef * (chosen + rejected)^2
        d = chosen - rejected - margin

    The margin is Llama 2's (Touvron et al. 2023, arXiv:2307.09288, eq. 2); e = label_smoothing supposes that a label is
    wrong with this probability, as conservative DPO does (Mitchell 2023, eq. 3); centering keeps the scores around 0,
    where their differences alone would leave them free (Eisenstein et al. 2023, arXiv:2312.09244).

    Args:
        chosen_scores, rejected_scores: (B,).
        margin: a float of 0 or more, or (B,), whose values are not looked at.
        center_coef: 0 or more. label_smoothing: 0 <= e < 0.5.
        weights: (B,), 0 or more: the mean becomes sum w loss / sum w; stats stay plain means.
        normalizer: divide by this instead of the local count of pairs, or sum of weights (see `sft_loss`).

    Returns:
        the loss, a scalar, and stats over pairs: `accuracy` (a tie counts half), `margin` (mean score difference, the
        margin asked for not taken off), `chosen_score`, `rejected_score`.

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
    gap, pairs = difference.detach(), losses.numel()
    stats = {
        "accuracy": (1 + gap.sign().float()) / 2,
        "margin": gap,
        "chosen_score": chosen_scores.detach(),
        "rejected_score": rejected_scores.detach(),
    }
    stats = {name: values.sum() / max(pairs, 1) for name, values in stats.items()}
    if weights is not None:
        losses, pairs = losses * weights, weights.sum()
    return losses.sum() / (pairs if normalizer is None else normalizer), stats


def plackett_luce_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative log-likelihood of whole rankings (Luce 1959; Plackett 1975), the mean over lists.

        sum over places k of   log sum_{j >= k} exp(score_j) - score_k

    Args:
        scores: (B, K), each list from best to worst. mask: (B, K) bool, False where a list is shorter; None: all full.
            A list with fewer than two entries ranks nothing: it adds to neither sum nor count.
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
        right = (1 + (scores[:, :, None] - scores[:, None, :]).sign().float()) / 2
    return loss, {"accuracy": masked_mean(right, pairs)}


def plackett_luce_nll(scores: Tensor, mask: Tensor) -> Tensor:
    """Each list's part of `plackett_luce_loss`, (B,): the first is drawn from all, the next from those left, and so on.

    Two entries are Bradley-Terry; one or none has 0.

    Args:
        scores: (B, K), each list from best to worst. mask: (B, K) bool.
    """
    behind = (mask[:, :, None] & mask[:, None, :]).triu()  # (B, K, K): entry k, and all that are ranked behind it
    # Not logcumsumexp, whose gradient loses a digit of float32 with each of the scores'. And a finite floor: its
    # exponential is 0, as that of -inf is, but where all are masked the log-sum's gradient is not NaN.
    left = torch.where(behind, scores[:, None, :], torch.finfo(scores.dtype).min).logsumexp(-1)
    return masked_sum(left - scores, mask, -1)


def process_reward_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    reduction: str = "token",
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Is each step of a solution right: binary cross-entropy at the steps' last tokens.

        -y log sigmoid(score) - (1 - y) log sigmoid(-score)

    Sources: Uesato et al. 2022, arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050.

    Args:
        scores: (B, T) logits. labels: (B, T) bool, or the probability in [0, 1] that the step is right; masked places
            may hold anything. mask: (B, T) bool, True = last token of a step.
        reduction: "token" weighs every step alike; "sequence" takes each solution's mean first.
        weights: (B,), 0 or more, of solutions: the mean becomes sum w loss / sum w; stats stay plain means.
        normalizer: divide by this instead of the local count of steps (or solutions), or the sum of their weights (see
            `sft_loss`).

    Returns:
        the loss, a scalar, and stats: `accuracy` over steps of the side of 0 that the score is on against the side of
        1/2 that the label is on (either in the middle counts half).

    Raises ValueError for a label outside [0, 1] at an unmasked place, an unknown reduction, or a mask that is False
    everywhere while no normalizer is given.
    """
    if reduction not in ("token", "sequence"):
        raise ValueError(f"reduction={reduction!r}: expected token or sequence")
    scores, labels = torch.where(mask, scores, 0.0), torch.where(mask, labels.to(scores.dtype), 0.5)
    if not torch.compiler.is_compiling() and not bool(((labels >= 0) & (labels <= 1)).all()):
        wrong = labels[~((labels >= 0) & (labels <= 1))][0].item()
        raise ValueError(f"labels={wrong}: expected 0 <= label <= 1 at every unmasked place")
    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    right = (1 + (scores.detach().sign() * (labels - 0.5).sign()).float()) / 2
    if weights is not None:
        losses = losses * weights[:, None]
        counts = mask.sum(-1) if reduction == "token" else mask.any(-1)
        normalizer = (weights * counts).sum() if normalizer is None else normalizer
    return masked_aggregate(losses, mask, reduction, normalizer=normalizer), {"accuracy": masked_mean(right, mask)}


def ensemble_scores(member_scores: Tensor, *, lcb_coef: float = 0.0) -> Tensor:
    """One score from several reward models: the members' mean, less their disagreement (a lower confidence bound).

        mean_e s_e - lcb_coef * std_e s_e

    A policy that climbs one model's errors finds the members apart there. Coste et al. 2023 (arXiv:2310.02743) subtract
    the members' variance (uncertainty-weighted optimisation) or take their minimum (worst-case optimisation); the
    standard deviation has the scores' own unit, so that lcb_coef is a plain number whatever their scale. It is the
    biased one, divided by E, as their variance is: the spread of these members, not an estimate beyond them.

    Args:
        member_scores: (E, ...), one row a member. lcb_coef: 0 or more; a single member has no spread, so 0 there.

    Returns:
        (...,) scores. Where all members agree the standard deviation has a kink and its gradient is taken as 0.
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
    # Replaced before the root, whose gradient at 0 is infinite.
    std = torch.where(apart, torch.where(apart, variance, 1.0).sqrt(), 0.0)
    return mean - lcb_coef * std
