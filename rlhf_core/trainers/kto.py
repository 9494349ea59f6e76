"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306) and related losses: a policy from single completions, labelled
desirable or undesirable.

    rows -> tokens -> PackedBatch -> token log-probs of policy and reference (B, T) -> loss -> AdamW

KTO's reference point, the KL of the policy to the reference, is estimated in each step on mismatched rows: every prompt
with the completion of the row before it. It is one number for the whole step, whatever the micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_core.config import OptimConfig, PositiveFloat, require
from rlhf_core.data.errors import DataError
from rlhf_core.data.labelled import labelled_rows, mismatched_rows
from rlhf_core.losses.pairs import PreferenceLoss
from rlhf_core.losses.preference import unpaired_preference_loss
from rlhf_core.losses.unpaired import UNPAIRED_LOSSES, class_means, unpaired_metrics
from rlhf_core.models.forward import policy_outputs, token_logprobs
from rlhf_core.ops.masked import masked_sum
from rlhf_core.training.loss_settings import find_losses, invalid_setting, read_loss_options
from rlhf_core.training.metrics import Metrics, StepMetrics
from rlhf_core.training.offline import MicroBatch, OfflineRun, RowBatch
from rlhf_core.training.preference import JOB_SETTINGS, PreferenceConfig, RunningMeans, Stats, row_weight

KTORun = OfflineRun["KTOConfig"]


@dataclass(frozen=True, kw_only=True)
class KTOConfig(PreferenceConfig):
    """Train a policy on completions that are labelled desirable or undesirable one by one."""

    job: ClassVar[str] = "kto"

    loss: str = "kto"
    """Name of the loss: kto, bco or apo_zero_unpaired (docs/losses.md), or one of your own."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of the loss of desirable completions."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of the loss of undesirable completions. KTO recommends that the total weight of the desirable rows
    is 1 to 3/2 times that of the undesirable ones."""
    pairs: bool = False
    """The data are preference pairs: each becomes a desirable row (chosen) and an undesirable one (rejected)."""
    optim: OptimConfig = OptimConfig(lr=5e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size > 1 or not self.needs_kl, "batch_size", self.batch_size, "2 or more, to mismatch rows")
        if not self.entry.needs_reference:
            self.require_no_reference(f"{self.loss} needs none")
        one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        with invalid_setting():
            compute_loss(one, one, mask, mask[0], self, kl=torch.zeros(()) if self.needs_kl else None)

    @property
    def entry(self) -> PreferenceLoss:
        """The table's entry of the loss."""
        return find_losses(UNPAIRED_LOSSES, [self.loss])[self.loss]

    @property
    def needs_kl(self) -> bool:
        """Whether the loss has a reference point."""
        return "kl" in self.entry.needs

    @property
    def options(self) -> dict[str, Any]:
        """`loss_options` as numbers."""
        return read_loss_options(self.loss_options, {self.loss: self.entry.function}, reserved=JOB_SETTINGS)


def train(config: KTOConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OfflineRun(
        config,
        need="preference" if config.pairs else "unpaired",
        evaluate=evaluate,
        show=("loss", "accuracy", "eval_accuracy"),
        convert_rows=labelled_rows,
    ) as run:
        if config.needs_kl and len(run.examples) < 2:
            raise DataError(f"{config.data.path}: one row; expected two or more, to mismatch their completions")
        if config.entry.needs_reference:
            run.load_reference(config.reference, whole_distribution=config.needs_kl)
        means = run.add_state("running_means", RunningMeans([config.entry], fixed=config.options))
        for step in run.steps():
            for batch, loss, stats in row_losses(run, step, means):
                step.backward(loss)
                step.metrics.mean(stats, weight=batch.share)
            metrics = step.finish(class_means)
            share = metrics["desirable"]
            counts = {"desirable_reward": share, "undesirable_reward": 1 - share}
            means.update(metrics, {name: round(part * len(step.rows)) for name, part in counts.items()})
    return run.evaluation


def evaluate(run: KTORun) -> Metrics:
    """Return the metrics of training for the evaluation rows."""
    metrics, means = StepMetrics(), run.states["running_means"]
    assert isinstance(means, RunningMeans)
    with run.evaluation_batch() as rows:
        for batch, _, stats in row_losses(run, rows, means):
            metrics.mean(stats, weight=batch.share)
    return {f"eval_{name}": value for name, value in class_means(metrics.read()).items()}


def row_losses(run: KTORun, rows: RowBatch, means: RunningMeans) -> Iterator[tuple[MicroBatch, Tensor, Stats]]:
    """Yield each micro-batch with its part of the loss over all rows and its metrics, in training and in evaluation."""
    config = run.config
    kl, running, normalizer = (
        reference_point(run, rows) if config.needs_kl else None,
        means.values,
        rows.total(row_weight),
    )
    zero = (config.options | running).get("delta", 0.0) if kl is None else config.beta * kl
    for batch in rows.micro_batches():
        outputs = policy_outputs(run.policy, batch.packed, router_loss=config.router_aux_coef > 0)
        logprobs, ref_logprobs = outputs.logprobs, run.ref_logprobs(batch)
        mask = batch.packed.loss_mask.to(run.device)
        labels = torch.tensor([row.record.label for row in batch.rows], device=run.device)
        loss, _ = compute_loss(
            logprobs,
            ref_logprobs,
            mask,
            labels,
            config,
            kl=kl,
            row_weights=batch.row_weights(run.device),
            normalizer=normalizer,
            running=running,
        )
        stats = {
            "loss": loss.detach() / batch.share,
            **unpaired_metrics(logprobs, ref_logprobs, mask, labels, config.beta, zero),
        }
        stats |= {name: torch.tensor(value, dtype=torch.float64) for name, value in running.items()}
        if kl is not None:
            stats["kl"] = kl
        if outputs.router_loss is not None:
            stats["router_loss"] = outputs.router_loss.detach()
            loss = loss + config.router_aux_coef * batch.share * outputs.router_loss
        yield batch, loss, stats


def compute_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    labels: Tensor,
    config: KTOConfig,
    *,
    kl: Tensor | None,
    row_weights: Tensor | None = None,
    normalizer: float | None = None,
    running: dict[str, float] | None = None,
) -> tuple[Tensor, Stats]:
    """Return `unpaired_preference_loss` with the settings of the job; `running`: current values of running means."""
    return unpaired_preference_loss(
        config.loss,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        labels=labels,
        row_weights=row_weights,
        kl=kl,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        normalizer=normalizer,
        **config.options | (running or {}),
    )


@torch.no_grad()
def reference_point(run: KTORun, rows: RowBatch) -> Tensor:
    """Return KTO's estimate of KL(policy || reference) over all rows of a step, in nats, at least 0."""
    max_length = run.config.data.max_length or getattr(run.policy.config, "max_position_embeddings", None)
    total = torch.zeros((), device=run.device)
    mismatched = RowBatch(mismatched_rows(rows.rows, run.examples, max_length), run.config, cached=False)
    for batch in mismatched.micro_batches():
        mask = batch.packed.loss_mask.to(run.device)
        ref_logprobs = run.ref_logprobs(batch)
        assert ref_logprobs is not None
        total += masked_sum(token_logprobs(run.policy, batch.packed) - ref_logprobs, mask, -1).sum()
    return (total / len(rows.rows)).clamp(min=0)
