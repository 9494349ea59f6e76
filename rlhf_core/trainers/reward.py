"""The reward model: a score whose differences explain which completion was preferred (Bradley and Terry).

    pairs     PackedBatch (prompt once) -> sequence_scores (2B,)    -> -log sigmoid(chosen - rejected - margin)
    rankings  PackedBatch (prompt once) -> sequence_scores (sum K,) -> Plackett-Luce of each list
    steps     PackedBatch               -> token_scores (B, T)      -> cross-entropy where a step ends

Each loss is a mean over the pairs, lists or steps of the optimizer step, each weighing what its row weighs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_core.batch import PackedBatch
from rlhf_core.config import DataConfig, RunConfig, require
from rlhf_core.data.loader import Steps, accounts, load_examples, pack_rows, split_rows
from rlhf_core.data.tokenize import Example
from rlhf_core.evaluation.reward_accuracy import pair_gauges, pair_table, ranked_pairs, step_gauges, step_table
from rlhf_core.losses.reward import bradley_terry_loss, plackett_luce_loss, process_reward_loss
from rlhf_core.models.forward import sequence_scores, token_scores
from rlhf_core.models.load import load_reward_model, save_model
from rlhf_core.rollout.sampling import evaluating
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Train a reward model on preference pairs, ranked lists or solutions whose steps are marked right or wrong, from
    an SFT policy or an earlier reward model."""

    eval_data: DataConfig | None = None
    """Held-out rows; accuracy, calibration and how much of it is length are logged as eval_accuracy, ..."""
    learn_from: Literal["pairs", "rankings", "steps"] = "pairs"
    """What the rows hold: a chosen and a rejected completion; two or more, the best first; or one in steps, each with a
    label, for a process reward model."""
    margins: bool = True
    """Ask of a pair whose row has a margin, or scores of both completions, that the scores differ by so much."""
    center_coef: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps scores around 0."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round."""
    ensemble: int | None = None
    """Score heads on one trunk, each drawn for itself; their mean is the score, their spread says how sure it is. None:
    as many as the model to start from has, or one."""

    def __post_init__(self):
        super().__post_init__()
        smoothing, pairs = self.label_smoothing, self.learn_from == "pairs"
        require(self.center_coef >= 0, "center_coef", self.center_coef, "0 or more")
        require(0 <= smoothing < 0.5, "label_smoothing", smoothing, "0 <= label_smoothing < 0.5")
        for field in ("center_coef", "label_smoothing"):
            require(pairs or not getattr(self, field), field, getattr(self, field), "0, but for learn_from='pairs'")
        heads = self.ensemble
        require(heads is None or heads > 0, "ensemble", heads, "more than 0")
        require(heads in (None, 1) or self.learn_from != "steps", "ensemble", heads, "1 with learn_from='steps'")


class Outcome(NamedTuple):
    """What some rows say: their part of the loss, gauges with the weight of each, and scores for a closer look."""

    loss: Tensor
    gauges: list[tuple[dict[str, Tensor], float]]
    scores: Tensor  # (sum K,) of completions, or (S,) of steps; without gradient


def train(config: RewardConfig) -> dict[str, float]:
    """Run to the end; the reward model is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    need = {"pairs": "preference", "rankings": "ranking", "steps": "process"}[config.learn_from]
    kind = dict(heads=config.ensemble, steps=config.learn_from == "steps")
    options = dict(lora=config.lora, quantize=config.quantize, **config.model.options())
    model, tokenizer = load_reward_model(config.model.path, device=config.device, seed=config.seed, **kind, **options)
    examples = load_examples(config.data, tokenizer, need=need, model=model)
    held_out = load_examples(config.eval_data, tokenizer, need=need, model=model) if config.eval_data else []
    optimizer = build_optimizer([model], config.optim)
    steps = Steps(examples, config)
    evaluation, table = {}, ""
    write = partial(save_model, model=model, tokenizer=tokenizer)
    kept = dict(modules={"reward_model": model}, optimizer=optimizer, write=write, about={"data": accounts(examples)})
    with Run("reward", config, steps.total, **kept) as run:
        for step in run.steps():
            rows = steps.rows(step)
            whole, averages = weight_of(rows), Averages()
            for part in split_rows(rows, config):
                outcome = judge(model, pack_rows(part), part, config, normalizer=whole)
                outcome.loss.backward()
                add(averages, outcome, share=len(part) / len(rows))
            metrics = averages.means() | optimizer_step(optimizer, config.optim, step, steps.total)
            if held_out and run.evaluate_now(step):
                evaluation, table = evaluate(model, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("loss", "accuracy", "eval_accuracy"))
        if table:
            run.say(table)
        run.save(summary={name: evaluation[name] for name in ("eval_loss", "eval_accuracy") if name in evaluation})
    return evaluation


def weight_of(rows: Iterable[Example]) -> float:
    """The weights of all pairs, lists or steps of these rows together."""
    return math.fsum(row.weight * (1 if row.step_ends is None else len(row.step_ends)) for row in rows)


def judge(
    model: Any, batch: PackedBatch, rows: Sequence[Example], config: RewardConfig, *, normalizer: float
) -> Outcome:
    """Score a batch and compare with what its rows say."""
    layout = config.model.layout
    if config.learn_from == "steps":
        return of_steps(token_scores(model, batch, layout=layout), rows, normalizer=normalizer)
    scores = sequence_scores(model, batch, layout=layout)
    members = scores[:, None] if scores.ndim == 1 else scores
    if config.learn_from == "rankings":
        return of_rankings(members, rows, normalizer=normalizer)
    return of_pairs(members, rows, config, normalizer=normalizer)


def of_pairs(members: Tensor, rows: Sequence[Example], config: RewardConfig, *, normalizer: float) -> Outcome:
    """Bradley-Terry with the rows' margins; the mean over members (2P, N) of what each alone would have."""
    asked = [row.margin or 0.0 for row in rows] if config.margins else [0.0] * len(rows)
    loss_of = partial(
        bradley_terry_loss,
        margin=members.new_tensor(asked),
        center_coef=config.center_coef,
        label_smoothing=config.label_smoothing,
        weights=weights_of(rows, members),
        normalizer=normalizer,
    )
    loss = torch.stack([loss_of(one[0::2], one[1::2])[0] for one in members.unbind(1)]).mean()
    mean = members.detach().mean(1)
    _, stats = loss_of(mean[0::2], mean[1::2])
    return Outcome(loss, [(stats | spread(members[0::2] - members[1::2]), len(rows))], mean)


def of_rankings(members: Tensor, rows: Sequence[Example], *, normalizer: float) -> Outcome:
    """Plackett-Luce of lists of any lengths, best first; the mean over members (sum K, N)."""
    counts = torch.tensor([len(row.completions) for row in rows], device=members.device)
    mask = torch.arange(int(counts.max()), device=members.device) < counts[:, None]

    def lists(scores: Tensor) -> Tensor:
        return scores.new_zeros(mask.shape).masked_scatter(mask, scores)

    options = dict(mask=mask, weights=weights_of(rows, members), normalizer=normalizer)
    loss = torch.stack([plackett_luce_loss(lists(one), **options)[0] for one in members.unbind(1)]).mean()
    mean = members.detach().mean(1)
    _, stats = plackett_luce_loss(lists(mean), **options)
    lasts = counts.cumsum(0) - 1
    gap = members.detach()[lasts - counts + 1] - members.detach()[lasts]  # the best less the worst
    ordered = int((counts * (counts - 1)).sum()) / 2  # pairs that the accuracy is over
    return Outcome(loss, [(stats, ordered), ({"margin": gap.mean()} | spread(gap), len(rows))], mean)


def of_steps(scores: Tensor, rows: Sequence[Example], *, normalizer: float) -> Outcome:
    """Cross-entropy of the scores (B, T) at the last token of each step."""
    counts = torch.tensor([len(row.step_ends) for row in rows], device=scores.device)
    place = torch.arange(len(rows), device=scores.device).repeat_interleave(counts)
    ends = torch.tensor([end for row in rows for end in row.step_ends], device=scores.device)
    said = torch.tensor([label for row in rows for label in row.step_labels], device=scores.device)
    mask = torch.zeros_like(scores, dtype=torch.bool).index_put((place, ends), torch.ones_like(said))
    labels = torch.zeros_like(mask).index_put((place, ends), said)
    options = dict(weights=weights_of(rows, scores), normalizer=normalizer)
    loss, stats = process_reward_loss(scores, labels, mask, **options)
    return Outcome(loss, [(stats, len(said))], scores.detach()[place, ends])


def weights_of(rows: Sequence[Example], like: Tensor) -> Tensor:
    return like.new_tensor([row.weight for row in rows])


def spread(gaps: Tensor) -> dict[str, Tensor]:
    """How far the members of an ensemble differ in what they say of a pair, (P, N): the mean standard deviation."""
    return {"disagreement": gaps.detach().std(1, correction=0).mean()} if gaps.shape[1] > 1 else {}


def add(averages: Averages, outcome: Outcome, *, share: float) -> None:
    """Take the gauges of a part of the rows, which are this share of all, into their averages."""
    averages.add({"loss": outcome.loss / share}, weight=share)
    for gauges, weight in outcome.gauges:
        averages.add(gauges, weight=weight)


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], config: RewardConfig) -> tuple[dict[str, float], str]:
    """The gauges of training over held-out rows, those of `reward_accuracy`, and its table."""
    averages, whole, parts, scores = Averages(), weight_of(examples), [], []
    with evaluating(model):
        for part in split_rows(examples, config):
            outcome = judge(model, pack_rows(part), part, config, normalizer=whole)
            add(averages, outcome, share=len(part) / len(examples))
            parts += part
            scores.append(outcome.scores.cpu())
    means, scores = averages.means(), torch.cat(scores)
    if config.learn_from == "steps":
        labels = torch.tensor([label for row in parts for label in row.step_labels])
        means |= step_gauges(scores, labels)
        table = step_table(scores, labels)
    else:
        pairs = ranked_pairs(scores, parts)
        means |= pair_gauges(*pairs)
        table = pair_table(*pairs)
    return {f"eval_{name}": value for name, value in means.items()}, table
