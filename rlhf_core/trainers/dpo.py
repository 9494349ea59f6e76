"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its family: a policy from preference
pairs, without a reward model. IPO, ORPO, SimPO and CPO are the same loop with other defaults.

    pairs -> tokens -> PackedBatch (prompt once) -> token log-probs of policy and reference (B, T) -> loss -> AdamW

The policy starts as the reference, so the first step's sigmoid loss is ln 2; any other value means that they differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_core.config import Fraction, LabelSmoothing, OptimConfig, require
from rlhf_core.losses.pairs import Pairs, PreferenceLoss
from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss, running_metrics, wpo_weights
from rlhf_core.models.forward import PolicyOutputs, policy_outputs
from rlhf_core.training.loss_settings import find_losses, invalid_setting, read_loss_options
from rlhf_core.training.metrics import Metrics, StepMetrics
from rlhf_core.training.offline import MicroBatch, OfflineRun, RowBatch
from rlhf_core.training.preference import (
    JOB_SETTINGS,
    JointLoss,
    PreferenceConfig,
    RunningMeans,
    Stats,
    chosen_tokens,
    row_margins,
    row_pair_weights,
    row_weight,
    single_pair,
)

DPORun = OfflineRun["DPOConfig"]


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """Train a policy directly on preference pairs."""

    job: ClassVar[str] = "dpo"

    loss: tuple[str, ...] = ("sigmoid",)
    """Name of the preference loss (docs/losses.md lists them), or several with commas, which are added."""
    loss_weights: tuple[float, ...] | None = None
    """Weights of several losses; none: 1 each."""
    label_smoothing: LabelSmoothing = 0.0
    """Probability that a label is wrong."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence from the reference, for losses of the difference of two log-ratios."""
    f_alpha: float = 0.5
    """The alpha of f_divergence=alpha."""
    ld_alpha: Fraction | None = None
    """LD-DPO: weight of the longer completion's tokens beyond the length of the shorter one."""
    reference_free: bool = False
    """Use a uniform reference, so that none is loaded."""
    use_weighting: bool = False
    """WPO: weight each pair by the policy's own probability of both completions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len({*self.loss}) == len(self.loss), "loss", self.loss, "each name once")
        weights, count = self.loss_weights, len(self.loss)
        require(weights is None or len(weights) == count, "loss_weights", weights, f"{count}, one for each loss")
        require(weights is None or any(weights), "loss_weights", weights, "at least one that is not 0")
        require(not self.needs_reference or not self.reference_free, "reference_free", True, "False for this loss")
        if not self.needs_reference:
            free = "reference_free is True" if self.reference_free else f"{', '.join(self.loss)} needs none"
            self.require_no_reference(free)
        expected = "auto or off: this loss needs the reference's whole distribution"
        require(not self.exact_kl or self.reference.cache != "on", "reference.cache", "on", expected)
        joint = self.joint_losses
        expected = f"False, because {', '.join(joint)} looks across pairs"
        require(not (self.use_weighting and joint), "use_weighting", True, expected)
        with invalid_setting():
            compute_loss(single_pair(weights=self.use_weighting), self)

    @property
    def entries(self) -> dict[str, PreferenceLoss]:
        """The table's entries of the losses that are named."""
        return find_losses(PREFERENCE_LOSSES, self.loss)

    @property
    def joint_losses(self) -> list[str]:
        """Names of the losses that cannot weight single pairs."""
        return [name for name, entry in self.entries.items() if not entry.pair_weights]

    @property
    def exact_kl(self) -> bool:
        """Whether a loss needs the KL of the whole distribution at each token (TDPO)."""
        return any("kl" in entry.needs for entry in self.entries.values())

    @property
    def needs_reference(self) -> bool:
        """Whether a reference is loaded."""
        needed = any(entry.needs_reference for entry in self.entries.values()) and not self.reference_free
        return needed or self.exact_kl

    @property
    def options(self) -> dict[str, Any]:
        """`loss_options` as numbers."""
        functions = {name: entry.function for name, entry in self.entries.items()}
        return read_loss_options(self.loss_options, functions, reserved=JOB_SETTINGS)


@dataclass(frozen=True, kw_only=True)
class IPOConfig(DPOConfig):
    """Train on preference pairs with IPO: a squared loss with a finite target margin."""

    job: ClassVar[str] = "ipo"
    loss: tuple[str, ...] = ("ipo",)


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(DPOConfig):
    """Train on preference pairs with ORPO: fine-tuning and preference in one loss, from a base model, no reference."""

    job: ClassVar[str] = "orpo"
    loss: tuple[str, ...] = ("orpo",)
    beta: float = 0.1
    """Weight of the odds ratio relative to the chosen completions' log-likelihood; the paper's lambda."""
    optim: OptimConfig = OptimConfig(lr=5e-6)


@dataclass(frozen=True, kw_only=True)
class SimPOConfig(DPOConfig):
    """Train on preference pairs with SimPO: mean log-probs and a target margin, without a reference."""

    job: ClassVar[str] = "simpo"
    loss: tuple[str, ...] = ("simpo",)
    loss_options: tuple[str, ...] | None = ("gamma:1.0",)
    beta: float = 2.0
    """Scale of the difference of mean log-probs; a target margin gamma of about half of it is usual."""
    optim: OptimConfig = OptimConfig(lr=6e-7, warmup_ratio=0.1)
    batch_size: int = 128


@dataclass(frozen=True, kw_only=True)
class CPOConfig(DPOConfig):
    """Train on preference pairs with CPO: DPO against a uniform reference, plus the chosen completions' likelihood."""

    job: ClassVar[str] = "cpo"
    loss: tuple[str, ...] = ("cpo",)
    loss_options: tuple[str, ...] | None = ("nll_coef:1.0",)
    beta: float = 0.1
    """Scale of the difference of log-probs."""


def train(config: DPOConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OfflineRun(config, need="preference", evaluate=evaluate, show=("loss", "accuracy", "eval_accuracy")) as run:
        if config.needs_reference:
            run.load_reference(config.reference, whole_distribution=config.exact_kl)
        means = run.add_state("running_means", RunningMeans(config.entries.values(), fixed=config.options))
        for step in run.steps():
            for batch, loss, stats in pair_losses(run, step, means):
                step.backward(loss)
                step.metrics.mean(stats, weight=batch.share)
            means.update(step.finish(), dict.fromkeys(means.metrics, len(step.rows)))
    return run.evaluation


def evaluate(run: DPORun) -> Metrics:
    """Return the metrics of training for the evaluation rows."""
    metrics, means = StepMetrics(), run.states["running_means"]
    assert isinstance(means, RunningMeans)
    with run.evaluation_batch() as rows:
        for batch, _, stats in pair_losses(run, rows, means):
            metrics.mean(stats, weight=batch.share)
    return {f"eval_{name}": value for name, value in metrics.read().items()}


# ------------------------------------------------------------------------------------------------------------ the loss


def pair_losses(run: DPORun, rows: RowBatch, means: RunningMeans) -> Iterator[tuple[MicroBatch, Tensor, Stats]]:
    """Yield each micro-batch with its part of the loss over all rows and its metrics, in training and in evaluation.

    A loss that looks across pairs is computed for all micro-batches together, see `JointLoss`.
    """
    loss_of = BatchLoss(run.config, means, rows.total(row_weight), rows.total(chosen_tokens))
    joint = None
    if any(entry.across_pairs for entry in run.config.entries.values()) and rows.num_micro_batches > 1:
        with torch.no_grad():
            joint = JointLoss.compute([forward(run, batch)[0] for batch in rows.micro_batches()], loss_of)
    for number, batch in enumerate(rows.micro_batches()):
        pairs, outputs = forward(run, batch)
        if joint is None:
            loss, stats = loss_of(pairs)
            # The losses of a mix are parts of the step's loss, as their sum is.
            stats |= {name: stats[name] / batch.share for name in stats if name.startswith("loss_")}
        else:
            loss, stats = joint.part(number, pairs, batch.share)
        stats["loss"] = loss.detach() / batch.share
        if outputs.router_loss is not None:
            stats["router_loss"] = outputs.router_loss.detach()
            loss = loss + run.config.router_aux_coef * batch.share * outputs.router_loss
        yield batch, loss, stats


@dataclass(frozen=True)
class BatchLoss:
    """The loss of the settings for pairs of a batch with these normalizers, and the metrics of the running means."""

    config: DPOConfig
    means: RunningMeans
    normalizer: float
    token_normalizer: float

    def __call__(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        config = self.config
        loss, stats = compute_loss(pairs, config, self.normalizer, self.token_normalizer, self.means.values)
        metrics = running_metrics(
            pairs,
            self.means.metrics,
            beta=config.beta,
            reference_free=config.reference_free,
            f_divergence=config.f_divergence,
            f_alpha=config.f_alpha,
            ld_alpha=config.ld_alpha,
        )
        return loss, stats | metrics


def compute_loss(
    pairs: Pairs,
    config: DPOConfig,
    normalizer: float | None = None,
    token_normalizer: float | None = None,
    running: dict[str, float] | None = None,
) -> tuple[Tensor, Stats]:
    """Return `preference_loss` with the settings of the job; `running`: current values of the running means."""
    return preference_loss(
        config.loss,
        pairs,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        loss_weights=config.loss_weights,
        reference_free=config.reference_free,
        f_divergence=config.f_divergence,
        f_alpha=config.f_alpha,
        ld_alpha=config.ld_alpha,
        normalizer=normalizer,
        token_normalizer=token_normalizer,
        **config.options | (running or {}),
    )


def forward(run: DPORun, batch: MicroBatch) -> tuple[Pairs, PolicyOutputs]:
    """Return the pairs of a micro-batch with log-probs of policy and reference, and the policy's outputs."""
    config = run.config
    outputs = policy_outputs(
        run.policy,
        batch.packed,
        reference=run.reference if config.exact_kl else None,
        kl_kind="forward",
        log_sum_sq_probs=config.use_weighting,
        router_loss=config.router_aux_coef > 0,
    )
    mask = batch.packed.loss_mask.to(run.device)
    weights = row_pair_weights(batch.rows, config.entries, run.device)
    if config.use_weighting and weights is not None and outputs.log_sum_sq_probs is not None:
        for side in (slice(0, None, 2), slice(1, None, 2)):
            weights = weights * wpo_weights(outputs.logprobs[side], outputs.log_sum_sq_probs[side], mask[side])
    pairs = Pairs.interleaved(
        outputs.logprobs,
        mask,
        ref_logprobs=run.ref_logprobs(batch),
        kl=outputs.kl,
        weights=weights,
        margin=row_margins(batch.rows, config.entries, run.device),
    )
    return pairs, outputs
