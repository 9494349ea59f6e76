"""GRPO (Shao et al. 2024, arXiv:2402.03300) and its family: the completions of one prompt are each other's baseline.

Each step rolls out one batch of prompts and learns from it:

    1. sample   a group of completions for each prompt
    2. score    one score per completion; with dynamic sampling, groups of equal scores are replaced
    3. credit   the score minus its group's mean, divided by its group's standard deviation: one advantage for all
                tokens of a completion
    4. improve  a policy loss by name plus kl.coef times the KL to the reference, over minibatches of whole groups

`loss` names a row of docs/losses.md, which gives the surrogate and the aggregation over tokens. Some papers change more
than the loss: the entry's recipe then also sets options of the loss, the KL coefficient and the scale of advantages,
unless a setting overrides it.

A group of equal scores has advantages of exactly 0, and only the KL changes its log-probs; `flat_groups` counts them. A
completion without a score (None) is excluded from its group's mean and from the loss; `excluded` counts those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_core.config import (
    AtLeastTwo,
    KLConfig,
    LossOptions,
    NonNegativeInt,
    PolicyGradientConfig,
    PositiveFloat,
)
from rlhf_core.losses.policy import POLICY_LOSSES, PolicyLoss, kl_loss, off_policy_mask, policy_loss
from rlhf_core.models.forward import PolicyOutputs
from rlhf_core.ops.advantages import group_advantages
from rlhf_core.ops.masked import masked_mean
from rlhf_core.rollout.experience import Experience, flat_groups
from rlhf_core.rollout.online import Minibatch, OnlineRun, RolloutStep
from rlhf_core.seeding import generator
from rlhf_core.training.loss_settings import find_losses, invalid_setting, read_loss_options
from rlhf_core.training.metrics import Metrics

GRPORun = OnlineRun["GRPOConfig"]


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(LossOptions, PolicyGradientConfig):
    """Improve a policy against a reward without a critic: each completion is compared with the others of its prompt."""

    job: ClassVar[str] = "grpo"
    common: ClassVar[tuple[str, ...]] = (*PolicyGradientConfig.common, "num_generations", "loss", "loss_options")
    kl_choices: ClassVar = {"apply_to": ("loss",), "estimator": ("k1", "k2", "k3", "abs"), "stop": (None,)}

    loss: str = "grpo"
    """Name of the policy loss: grpo, dr_grpo, dapo, gspo, cispo, sapo, luspo, bnpo, ... (docs/losses.md lists them)."""
    num_generations: AtLeastTwo = 8
    """Completions per prompt, its group."""
    batch_size: int = 8
    """Prompts per rollout."""
    minibatch_size: int = 64
    """Completions per optimizer step, in whole groups."""
    scale: Literal["auto", "group", "batch", "none"] = "auto"
    """Divide the difference between a score and its group's mean by the standard deviation of the group, of the batch,
    or by nothing. auto: as in the paper of the loss."""
    kl: KLConfig = KLConfig(coef=None, apply_to="loss", estimator="k2")
    """The KL penalty, a term of the loss. The coefficient is that of the loss's paper if not given; GRPO's paper has
    the estimator k3, whose gradient is that of another KL."""
    dynamic_sampling: NonNegativeInt | None = None
    """DAPO's dynamic sampling: replace groups of equal scores by groups of other prompts, at most this many times, and
    exclude those that remain. 0 only excludes them; none keeps them."""
    off_policy_threshold: PositiveFloat | None = None
    """Mask completions with a negative advantage whose mean log-ratio to the sampling policy, in nats per token, is
    below minus this value (DeepSeek-V3.2, arXiv:2512.02556, eq. 9); none masks nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl.coef is None:
            object.__setattr__(self, "kl", replace(self.kl, coef=self.entry.recipe.kl_coef))
        one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        with invalid_setting():
            policy_loss(
                self.loss,
                new_logprobs=one,
                logprobs=one,
                advantages=one,
                mask=mask,
                weights=None if self.importance == "none" and self.off_policy_threshold is None else one,
                max_length=self.sampling.max_new_tokens,
                **self.options,
            )

    @property
    def entry(self) -> PolicyLoss:
        """The table's entry of the loss."""
        return find_losses(POLICY_LOSSES, [self.loss])[self.loss]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the loss: those given, and else those of its paper."""
        given = read_loss_options(self.loss_options, {self.loss: self.entry.surrogate})
        return {**self.entry.recipe.options, **given}


def train(config: GRPOConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OnlineRun(config, uses_reference=config.kl.active) as run:
        for step in run.steps():
            # 1. sample and 2. score
            experience = run.shape_scores(step.rollout(n=config.num_generations))
            step.metrics.set({"flat_groups": int(flat_groups(experience).sum())})
            if config.dynamic_sampling is not None:
                experience = replace_flat_groups(run, step, experience)

            # 3. credit
            experience = replace(experience, advantages=advantages(experience, config))
            experience = run.scores.exclude_truncated(experience)

            # 4. improve
            plan = step.plan(experience)
            experience = run.with_ref_logprobs(experience, plan)
            if not plan.single_update:
                experience = run.with_logprobs(experience, plan)
            for minibatch in step.minibatches(experience, plan):
                for batch in minibatch.micro_batches():
                    new = run.forward(run.policy, batch, entropy=True)
                    batch = minibatch.with_own_logprobs(batch, new.logprobs)
                    minibatch.backward(grpo_loss(run, minibatch, batch, new))
            if run.reference is not None:
                step.log_kl(step.logprobs(experience) - experience.ref_logprobs, experience.mask)
    return run.evaluation


def replace_flat_groups(run: GRPORun, step: RolloutStep, experience: Experience) -> Experience:
    """Replace groups of equal scores by groups of other prompts, at most `dynamic_sampling` times, and exclude those
    that remain (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2)."""
    config = run.config
    size, tries = config.num_generations, config.dynamic_sampling or 0
    flat = flat_groups(experience)
    for attempt in range(tries):
        if not flat.any():
            break
        draw = generator(config.seed, "other prompts", step.number, attempt)
        others = torch.randint(len(run.examples), (int(flat.sum()),), generator=draw)
        rows = [run.examples[i] for i in others.tolist()]
        fresh, _ = run.rollout(rows, "rollout", step.number, "other prompts", attempt, n=size)
        experience = experience.select(~flat.repeat_interleave(size)).cat(run.shape_scores(fresh))
        flat = flat_groups(experience)
    step.metrics.set({"left_out_groups": int(flat.sum())})
    return experience.exclude(flat.repeat_interleave(size))


def advantages(experience: Experience, config: GRPOConfig) -> Tensor:
    """Return (B,) advantages, each score compared with its group."""
    scale = config.entry.recipe.scale if config.scale == "auto" else config.scale
    return group_advantages(
        experience.scores, group_size=config.num_generations, scale=scale, valid=experience.takes_part
    )


def grpo_loss(run: GRPORun, minibatch: Minibatch, batch: Experience, new: PolicyOutputs) -> Tensor:
    """Return a micro-batch's part of the minibatch's loss, and log its metrics.

    policy loss + kl.coef * KL, both aggregated over tokens as the entry of the loss says.
    """
    config, entry = run.config, run.config.entry
    normalizer = minibatch.tokens if entry.aggregation == "token" else minibatch.completions
    if entry.recipe.local_normalizer:
        normalizer = batch.mask.sum() * minibatch.num_micro_batches
    importance = weights = minibatch.importance(batch)
    if (threshold := config.off_policy_threshold) is not None:
        kept = off_policy_mask(
            new.logprobs.detach(), batch.engine_logprobs, batch.advantages, batch.mask, threshold=threshold
        ).to(new.logprobs.dtype)
        weights = kept if weights is None else weights * kept
    loss, stats = policy_loss(
        config.loss,
        new_logprobs=new.logprobs,
        logprobs=batch.logprobs,
        advantages=batch.advantages,
        mask=batch.mask,
        weights=weights,
        normalizer=normalizer,
        max_length=config.sampling.max_new_tokens,
        **config.options,
    )
    losses = {"policy_loss": loss}
    if run.kl.kl_coef:
        losses["kl_loss"], _ = kl_loss(
            new.logprobs,
            batch.ref_logprobs,
            batch.mask,
            estimator=config.kl.estimator,
            logprobs=batch.logprobs if config.kl.ratio else None,
            ratio_level=entry.ratio_level,
            aggregation=entry.aggregation,
            normalizer=normalizer,
            max_length=config.sampling.max_new_tokens,
        )
        loss = loss + run.kl.kl_coef * losses["kl_loss"]
    assert new.entropy is not None
    stats["entropy"] = masked_mean(new.entropy, batch.mask)
    if importance is not None:
        stats["engine_weight"] = masked_mean(importance, batch.mask)
    minibatch.log_losses(losses)
    minibatch.log(stats, minibatch.share(batch))
    return loss
