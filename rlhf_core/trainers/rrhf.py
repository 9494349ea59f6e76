"""RRHF (Yuan et al. 2023, arXiv:2304.05302): make the better of a prompt's completions more likely, by their rank.

Each step rolls out one batch of prompts and learns from it:

    1. sample   num_generations completions for each prompt
    2. score    one score per completion; only their order matters
    3. improve  a ranking loss by name (docs/losses.md) on each prompt's list of completions, over minibatches

`rrhf` ranks mean log-probs in the order of the scores and adds the negative log-likelihood of the best completion;
`plackett_luce`, DPO over rankings, ranks log-ratios to the reference. Log-probs are those of the distribution that was
sampled from, at its temperature.

Two completions with the same score are not ranked. `flat_groups` counts the prompts without any two that differ: rrhf
still learns the first of them as the best. A completion without a score (None) is in no list; `excluded` counts them.
`kept` is the fraction of prompts with two scores or more, which are learned from. A step without any is skipped: it has
no loss and changes no weight; `skipped` marks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_core.config import AtLeastTwo, LossOptions, OnPolicyConfig, PositiveFloat, PositiveInt
from rlhf_core.losses.ranking import RANKED_LOSSES, ranked_preference_loss
from rlhf_core.rollout.experience import Experience, flat_groups
from rlhf_core.rollout.online import Minibatch, OnlineRun, RolloutStep
from rlhf_core.training.loss_settings import find_losses, invalid_setting, read_loss_options
from rlhf_core.training.metrics import Metrics

RRHFRun = OnlineRun["RRHFConfig"]


@dataclass(frozen=True, kw_only=True)
class RRHFConfig(LossOptions, OnPolicyConfig):
    """Improve a policy by a ranking loss on its own completions, in the order of their scores."""

    job: ClassVar[str] = "rrhf"
    common: ClassVar[tuple[str, ...]] = (*OnPolicyConfig.common, "num_generations", "loss", "beta")

    loss: str = "rrhf"
    """Name of the ranking loss: rrhf, plackett_luce (docs/losses.md lists them)."""
    beta: PositiveFloat = 0.1
    """Strength of the KL regularisation towards the reference, in losses that have one; rrhf has none."""
    num_generations: AtLeastTwo = 4
    """Completions per prompt, a list to be ranked."""
    batch_size: int = 16
    """Prompts per rollout."""
    minibatch_size: int = 16
    """Prompts per optimizer step, each with all of its completions."""
    micro_batch_size: PositiveInt | None = None
    """Prompts, each with all of its completions, per forward pass; memory grows with it, results do not change. None:
    minibatch_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        two, mask = torch.zeros(1, 2, 1), torch.ones(1, 2, 1, dtype=torch.bool)
        with invalid_setting():
            ranked_preference_loss(self.loss, logprobs=two, ref_logprobs=two, mask=mask, beta=self.beta, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """`loss_options` as numbers."""
        entry = find_losses(RANKED_LOSSES, [self.loss])[self.loss]
        return read_loss_options(self.loss_options, {self.loss: entry.function}, reserved=frozenset({"beta"}))


def train(config: RRHFConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OnlineRun(config, show=("score", "kl", "accuracy")) as run:
        for step in run.steps():
            # 1. sample and 2. score
            experience = run.with_ref_logprobs(step.rollout(n=config.num_generations))
            step.log_kl(experience.logprobs - experience.ref_logprobs, experience.completion_mask)
            experience = run.scores.exclude_truncated(run.shape_scores(experience))

            # 3. improve
            plan = step.plan_units(rankable_lists(step, experience))
            for minibatch in step.minibatches(experience, plan):
                for batch in minibatch.micro_batches():
                    minibatch.backward(rrhf_loss(run, minibatch, batch))
    return run.evaluation


def rankable_lists(step: RolloutStep, experience: Experience) -> Tensor:
    """Return (P, K) rows of the prompts with two scores or more, and log how many there are."""
    rows = torch.arange(len(experience)).view(-1, experience.group_size)
    lists = rows[(experience.takes_part.cpu().view(rows.shape).sum(-1) > 1)]
    step.metrics.set(
        {
            "flat_groups": int(flat_groups(experience).sum()),
            "kept": len(lists) / len(rows),
            "skipped": int(len(lists) == 0),
        }
    )
    return lists


def rrhf_loss(run: RRHFRun, minibatch: Minibatch, batch: Experience) -> Tensor:
    """Return a micro-batch's part of the minibatch's loss, the mean over prompts, and log its metrics."""
    config, size = run.config, run.config.num_generations
    lists, prompts, total = (-1, size, batch.mask.shape[1]), len(batch) // size, minibatch.completions // size
    scores = batch.scores.view(-1, size)
    loss, stats = ranked_preference_loss(
        config.loss,
        logprobs=run.forward(run.policy, batch).logprobs.view(lists),
        mask=batch.mask.view(lists),  # False for a completion that does not take part
        ref_logprobs=batch.ref_logprobs.view(lists),
        scores=scores,
        beta=config.beta,
        normalizer=total,
        **config.options,
    )
    minibatch.log({"loss": loss * total / prompts}, prompts)
    if pairs := unequal_pairs(scores, batch.takes_part.view(-1, size)):
        minibatch.log(stats, pairs)
    return loss


def unequal_pairs(scores: Tensor, valid: Tensor) -> int:
    """Return how many pairs of completions of one prompt, (P, K), have different scores."""
    both = valid[:, :, None] & valid[:, None, :]
    return int((both & (scores[:, :, None] > scores[:, None, :])).sum())
