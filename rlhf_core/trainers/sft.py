"""Supervised fine-tuning: maximise the likelihood of completions.

    rows -> tokens -> PackedBatch -> log-probs -> negative log-likelihood per token -> AdamW

The loss covers completions only (for plain text all tokens; for conversations the assistant turns that are selected).
It is a mean over all tokens of the optimizer step, each weighted by its row:

    sum over rows i, tokens t of   weight_i * loss_it   /   sum over rows i, tokens t of   weight_i

so the step does not depend on the size of micro-batches.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from rlhf_core.config import DataConfig, LabelSmoothing, NonNegativeFloat, RunConfig, require
from rlhf_core.data.records import Example
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import policy_outputs, summed_loss
from rlhf_core.models.noise import noisy_embeddings
from rlhf_core.seeding import generator
from rlhf_core.training.metrics import Metrics, StepMetrics
from rlhf_core.training.offline import MicroBatch, OfflineRun, OfflineStep

SFTRun = OfflineRun["SFTConfig"]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Fine-tune a causal language model on prompts with completions, conversations or plain text."""

    job: ClassVar[str] = "sft"

    eval_data: DataConfig | None = None
    """Evaluation rows; their loss and token accuracy are logged as eval_nll, eval_accuracy, ..."""
    loss: Literal["nll", "dft"] = "nll"
    """Loss per token: the negative log-likelihood, or dft: multiplied by the token's own probability, so that unlikely
    tokens do not dominate the gradient (Wu et al. 2025)."""
    label_smoothing: LabelSmoothing = 0.0
    """Probability mass of the target that is spread evenly over the vocabulary."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Scale of the noise added to token embeddings in training (Jain et al. 2023); 5 is usual, 0 adds none."""
    router_aux_coef: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts; 0 leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = self.label_smoothing
        require(self.loss == "nll" or smoothing == 0, "label_smoothing", smoothing, "0 with loss='dft'")


def train(config: SFTConfig) -> Metrics:
    """Train and save the model in `config.output`. Return the metrics of the last evaluation."""
    with OfflineRun(config, need="supervised", evaluate=evaluate, show=("nll", "eval_nll", "lr")) as run:
        for step in run.steps():
            normalizer = step.total(weighted_tokens)
            for batch in step.micro_batches():
                with embedding_noise(run, step, batch):
                    loss, logprobs = training_loss(run, step, batch, normalizer)
                step.backward(loss)
                _, stats = sft_loss(logprobs, batch.packed.loss_mask.to(run.device))
                step.metrics.mean(stats, weight=batch.packed.num_supervised_tokens)
            step.metrics.sum({"tokens": sum(map(supervised_tokens, step.rows))})
    return run.evaluation


def training_loss(run: SFTRun, step: OfflineStep, batch: MicroBatch, normalizer: float) -> tuple[Tensor, Tensor]:
    """Return this micro-batch's part of the loss, and its log-probs, (B, T) without gradient.

    The gradient of the LM head is computed block by block and never stored; label smoothing needs the whole forward.
    """
    config, router = run.config, run.config.router_aux_coef > 0
    if config.label_smoothing:
        outputs = policy_outputs(run.policy, batch.packed, mean_logprob=True, router_loss=router)
        loss, _ = token_loss(
            outputs.logprobs,
            batch.packed.loss_mask.to(run.device),
            weights=batch.row_weights(run.device)[:, None],
            normalizer=normalizer,
            config=config,
            mean_logprobs=outputs.mean_logprob,
        )
        logprobs, balance = outputs.logprobs.detach(), outputs.router_loss
    else:
        loss_of = partial(token_loss, normalizer=normalizer, config=config)
        weights = batch.row_weights()
        loss, logprobs, balance = summed_loss(run.policy, batch.packed, loss_of, weights=weights, router_loss=router)
    step.metrics.mean({"loss": loss / batch.share}, weight=batch.share)
    if balance is not None:
        step.metrics.mean({"router_loss": balance}, weight=batch.share)
        loss = loss + config.router_aux_coef * batch.share * balance
    return loss, logprobs


def token_loss(
    logprobs: Tensor,
    mask: Tensor,
    *,
    weights: Tensor,
    normalizer: float,
    config: SFTConfig,
    mean_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `sft_loss` with the settings of the job, in training and in evaluation."""
    return sft_loss(
        logprobs,
        mask,
        normalizer=normalizer,
        weights=weights,
        dft=config.loss == "dft",
        label_smoothing=config.label_smoothing,
        vocab_mean_logprobs=mean_logprobs,
    )


def evaluate(run: SFTRun) -> Metrics:
    """Return metrics of the evaluation rows: `eval_loss` as in training, but without noise; `eval_nll` in nats per
    token, unweighted; `eval_perplexity`, its exponential; `eval_accuracy`, how often the argmax is the right token."""
    metrics, config = StepMetrics(), run.config
    with run.evaluation_batch() as rows:
        normalizer = rows.total(weighted_tokens)
        for batch in rows.micro_batches():
            outputs = policy_outputs(run.policy, batch.packed, mean_logprob=config.label_smoothing > 0, is_argmax=True)
            assert outputs.is_argmax is not None
            mask = batch.packed.loss_mask.to(run.device)
            loss, stats = token_loss(
                outputs.logprobs,
                mask,
                weights=batch.row_weights(run.device)[:, None],
                normalizer=normalizer,
                config=config,
                mean_logprobs=outputs.mean_logprob,
            )
            stats["accuracy"] = outputs.is_argmax[mask].float().mean()
            metrics.mean({"loss": loss / batch.share}, weight=batch.share)
            metrics.mean(stats, weight=batch.packed.num_supervised_tokens)
    means = metrics.read()
    means["perplexity"] = math.exp(min(means["nll"], 700.0))  # exp(710) overflows
    return {f"eval_{name}": value for name, value in means.items()}


def embedding_noise(run: SFTRun, step: OfflineStep, batch: MicroBatch) -> AbstractContextManager[None]:
    """Add NEFTune's noise inside; each row's noise does not depend on the rows it is packed with."""
    noise = [generator(run.config.seed, "neftune", step.number, place) for place in batch.places]
    return noisy_embeddings(run.policy, batch.packed, run.config.neftune_alpha, noise)


def supervised_tokens(row: Example) -> int:
    """Return the number of tokens of a row that the loss covers."""
    return len(row.completions[0]) if row.supervised is None else sum(row.supervised[0])


def weighted_tokens(row: Example) -> float:
    """Return the number of supervised tokens of a row, times its weight."""
    return row.weight * supervised_tokens(row)
