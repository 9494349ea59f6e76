"""Reward models: a score whose differences explain which completion was preferred (Bradley and Terry 1952).

    pairs     PackedBatch (prompt once) -> sequence_scores (2P,)    -> -log sigmoid(chosen - rejected - margin)
    rankings  PackedBatch (prompt once) -> sequence_scores (sum K,) -> Plackett-Luce of each list
    steps     PackedBatch               -> token_scores (B, T)      -> cross-entropy where a step ends

Each loss is a mean over the pairs, lists or steps of the optimizer step, weighted by their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import DataConfig, LabelSmoothing, NonNegativeFloat, PositiveInt, RunConfig, require
from rlhf_core.data.records import Example
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.evaluation.reward_accuracy import pair_metrics, pair_table, ranked_pairs, step_metrics, step_table
from rlhf_core.losses.reward import bradley_terry_loss, plackett_luce_loss, process_reward_loss
from rlhf_core.models.forward import sequence_scores, token_scores
from rlhf_core.models.load import load_reward_model
from rlhf_core.training.metrics import Metrics, StepMetrics
from rlhf_core.training.offline import MicroBatch, OfflineRun

NEEDS = {"pairs": "preference", "rankings": "ranking", "steps": "process"}

RewardRun = OfflineRun["RewardConfig"]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Train a reward model on preference pairs, ranked lists or solutions whose steps are labelled, from an SFT policy
    or an earlier reward model."""

    job: ClassVar[str] = "reward"
    common: ClassVar[tuple[str, ...]] = (*RunConfig.common, "learn_from")

    eval_data: DataConfig | None = None
    """Evaluation rows; accuracy, calibration and the correlation with length are logged as eval_accuracy, ..."""
    learn_from: Literal["pairs", "rankings", "steps"] = "pairs"
    """Kind of the rows: a chosen and a rejected completion; two or more completions, the best first; or one completion
    in steps, each with a label, for a process reward model."""
    margins: bool = True
    """Use the margin of a pair's row, or the difference of its two scores, as the margin of the loss."""
    center_coef: NonNegativeFloat = 0.0
    """Coefficient of (chosen + rejected)^2, which centers scores at 0."""
    label_smoothing: LabelSmoothing = 0.0
    """Probability that a pair's label is wrong."""
    ensemble: PositiveInt | None = None
    """Score heads on one trunk, initialised independently; their mean is the score and their standard deviation its
    uncertainty. None: as many as the model to start from has, or one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("center_coef", "label_smoothing"):
            unused = self.learn_from == "pairs" or not getattr(self, field)
            require(unused, field, getattr(self, field), "0, but for learn_from='pairs'")
        single = self.ensemble in (None, 1) or self.learn_from != "steps"
        require(single, "ensemble", self.ensemble, "1 with learn_from='steps'")


class Outcome(NamedTuple):
    """The loss of a micro-batch, its metrics each with a weight, and its scores."""

    loss: Tensor
    metrics: list[tuple[dict[str, Tensor], float]]
    scores: Tensor  # (sum K,) of completions, or (S,) of steps; without gradient


def train(config: RewardConfig) -> Metrics:
    """Train and save the reward model in `config.output`. Return the metrics of the last evaluation."""
    with OfflineRun(
        config,
        need=NEEDS[config.learn_from],
        evaluate=evaluate,
        show=("loss", "accuracy", "eval_loss", "eval_accuracy"),
        load_model=load_model,
        role="reward_model",
    ) as run:
        for step in run.steps():
            normalizer = step.total(num_comparisons)
            for batch in step.micro_batches():
                outcome = reward_loss(run, batch, normalizer)
                step.backward(outcome.loss)
                log(step.metrics, batch, outcome)
    return run.evaluation


def evaluate(run: RewardRun) -> Metrics:
    """Return the metrics of training for the evaluation rows, and those of `reward_accuracy`; print its table last."""
    metrics, rows, parts = StepMetrics(), list[Example](), list[Tensor]()
    with run.evaluation_batch() as evaluated:
        normalizer = evaluated.total(num_comparisons)
        for batch in evaluated.micro_batches():
            outcome = reward_loss(run, batch, normalizer)
            log(metrics, batch, outcome)
            rows += batch.rows
            parts.append(outcome.scores.cpu())
    means, scores = metrics.read(), torch.cat(parts)
    if run.config.learn_from == "steps":
        labels = torch.tensor([label for row in rows for label in row.step_labels or ()])
        means |= step_metrics(scores, labels)
        table = step_table(scores, labels)
    else:
        pairs = ranked_pairs(scores, rows)
        means |= pair_metrics(*pairs)
        table = pair_table(*pairs)
    if run.last_step + 1 == run.total_steps:
        run.message(table)
    return {f"eval_{name}": value for name, value in means.items()}


def load_model(config: RewardConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """Load the reward model to train, with new heads if it is a policy."""
    model, tokenizer = load_reward_model(
        config.model.path,
        device=config.device,
        seed=config.seed,
        heads=config.ensemble,
        steps=config.learn_from == "steps",
        lora=config.lora,
        quantize=config.quantize,
        **config.model.options(),
    )
    return model, tokenizer


def num_comparisons(row: Example) -> float:
    """Return the weight of a row's pair, of its list, or of all of its steps together."""
    return row.weight * (1 if row.step_ends is None else len(row.step_ends))


def log(metrics: StepMetrics, batch: MicroBatch, outcome: Outcome) -> None:
    """Add the metrics of a micro-batch."""
    metrics.mean({"loss": outcome.loss / batch.share}, weight=batch.share)
    for values, weight in outcome.metrics:
        metrics.mean(values, weight=weight)


# ------------------------------------------------------------------------------------------------------------ the loss


def reward_loss(run: RewardRun, batch: MicroBatch, normalizer: float) -> Outcome:
    """Return a micro-batch's part of the loss, in training and in evaluation."""
    if run.config.learn_from == "steps":
        return step_loss(token_scores(run.model, batch.packed), batch.rows, normalizer)
    scores = sequence_scores(run.model, batch.packed)
    members = scores[:, None] if scores.ndim == 1 else scores
    if run.config.learn_from == "rankings":
        return ranking_loss(members, batch.rows, normalizer)
    return pair_loss(members, batch.rows, run.config, normalizer)


def pair_loss(members: Tensor, rows: Sequence[Example], config: RewardConfig, normalizer: float) -> Outcome:
    """Return the Bradley-Terry loss with the rows' margins, the mean over the heads of `members` (2P, N)."""
    margins = members.new_tensor([row.margin or 0.0 if config.margins else 0.0 for row in rows])
    weights, mean = row_weights(rows, members), members.detach().mean(1)
    losses = []
    for scores in (*members.unbind(1), mean):
        loss, stats = bradley_terry_loss(
            scores[0::2],
            scores[1::2],
            margin=margins,
            center_coef=config.center_coef,
            label_smoothing=config.label_smoothing,
            weights=weights,
            normalizer=normalizer,
        )
        losses.append(loss)
    stats |= disagreement(members[0::2] - members[1::2])  # the last stats are those of the mean score
    return Outcome(torch.stack(losses[:-1]).mean(), [(stats, len(rows))], mean)


def ranking_loss(members: Tensor, rows: Sequence[Example], normalizer: float) -> Outcome:
    """Return the Plackett-Luce loss of lists of any lengths, best first, the mean over the heads of `members`
    (sum K, N)."""
    counts = torch.tensor([len(row.completions) for row in rows], device=members.device)
    mask = torch.arange(int(counts.max()), device=members.device) < counts[:, None]
    weights, mean = row_weights(rows, members), members.detach().mean(1)
    losses = []
    for scores in (*members.unbind(1), mean):
        lists = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        loss, stats = plackett_luce_loss(lists, mask=mask, weights=weights, normalizer=normalizer)
        losses.append(loss)
    lasts = counts.cumsum(0) - 1
    gap = members.detach()[lasts - counts + 1] - members.detach()[lasts]  # the best minus the worst
    num_pairs = int((counts * (counts - 1)).sum()) / 2  # what the accuracy is a mean over
    per_list = {"margin": gap.mean()} | disagreement(gap)
    return Outcome(torch.stack(losses[:-1]).mean(), [(stats, num_pairs), (per_list, len(rows))], mean)


def step_loss(scores: Tensor, rows: Sequence[Example], normalizer: float) -> Outcome:
    """Return the cross-entropy of the scores (B, T) at the last token of each step."""
    counts = torch.tensor([len(row.step_ends or ()) for row in rows], device=scores.device)
    place = torch.arange(len(rows), device=scores.device).repeat_interleave(counts)
    ends = torch.tensor([end for row in rows for end in row.step_ends or ()], device=scores.device)
    given = torch.tensor([label for row in rows for label in row.step_labels or ()], device=scores.device)
    mask = torch.zeros_like(scores, dtype=torch.bool).index_put((place, ends), torch.ones_like(given))
    labels = torch.zeros_like(mask).index_put((place, ends), given)
    loss, stats = process_reward_loss(scores, labels, mask, weights=row_weights(rows, scores), normalizer=normalizer)
    return Outcome(loss, [(stats, len(given))], scores.detach()[place, ends])


def row_weights(rows: Sequence[Example], like: Tensor) -> Tensor:
    """Return (R,) weights of the rows."""
    return like.new_tensor([row.weight for row in rows])


def disagreement(gaps: Tensor) -> dict[str, Tensor]:
    """Return the mean over pairs of the standard deviation over an ensemble's heads of score differences (P, N)."""
    return {"disagreement": gaps.detach().std(1, correction=0).mean()} if gaps.shape[1] > 1 else {}
