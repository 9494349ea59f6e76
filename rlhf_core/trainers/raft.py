"""RAFT (Dong et al. 2023, arXiv:2304.06767): fine-tune on the best of the policy's own samples.

Each step rolls out one batch of prompts and learns from it:

    1. sample   num_generations completions for each prompt
    2. score    one score per completion, minus kl.coef * log(policy / reference) if the coefficient is not 0
    3. choose   the best completion of each prompt, or all that score at least min_score (rejection sampling)
    4. improve  the negative log-likelihood per token of the chosen completions, over minibatches

The likelihood is that of the distribution that was sampled from, at its temperature, so that only the choice changes
the policy: at another temperature, training on one's own samples would already sharpen or flatten it.

If all completions of a prompt have the same score, the first is chosen; `flat_groups` counts such prompts. A completion
without a score (None) is never chosen; `excluded` counts them. `kept` is the fraction of completions that were chosen,
`kept_score` their mean score after all penalties. A step without any is skipped: it has no loss and changes no weight;
`skipped` marks it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlhf_core.config import KLConfig, OnPolicyConfig, PositiveInt, require
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import summed_loss
from rlhf_core.ops.masked import masked_sum
from rlhf_core.rollout.experience import Experience, flat_groups
from rlhf_core.rollout.online import Minibatch, OnlineRun, RolloutStep
from rlhf_core.training.metrics import Metrics

RAFTRun = OnlineRun["RAFTConfig"]


@dataclass(frozen=True, kw_only=True)
class RAFTConfig(OnPolicyConfig):
    """Fine-tune a policy on the best of its own completions, by a reward."""

    job: ClassVar[str] = "raft"
    common: ClassVar[tuple[str, ...]] = (*OnPolicyConfig.common, "num_generations", "keep")

    num_generations: PositiveInt = 4
    """Completions per prompt."""
    keep: Literal["best", "all"] = "best"
    """Learn the best of a prompt's completions, or all that reach min_score."""
    min_score: float | None = None
    """Never learn a completion with a lower score after all penalties; none sets no bound."""
    kl: KLConfig = KLConfig(coef=0.0)
    """The KL penalty, subtracted from scores before completions are chosen."""
    batch_size: int = 32
    """Prompts per rollout."""
    minibatch_size: int = 32
    """Chosen completions per optimizer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 if self.keep == "best" else 1
        require(self.num_generations >= least, "num_generations", self.num_generations, f"{least} or more")
        bounded = self.keep == "best" or self.min_score is not None
        require(bounded, "min_score", None, "a score with keep='all', else there is nothing to choose by")
        default = KLConfig(coef=self.kl.coef, measure=self.kl.measure)
        require(self.kl == default, "kl", self.kl, "coef and measure alone: the other settings have no effect")


def train(config: RAFTConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OnlineRun(config, uses_reference=config.kl.active, show=("score", "kl", "nll")) as run:
        for step in run.steps():
            # 1. sample and 2. score
            experience = run.with_ref_logprobs(step.rollout(n=config.num_generations))
            experience = subtract_kl(run, step, run.shape_scores(experience))
            experience = run.scores.exclude_truncated(experience)

            # 3. choose
            chosen = choose(experience, config)
            log_choice(step, experience, chosen)

            # 4. improve
            plan = step.plan_units(chosen[:, None], sort=True)
            for minibatch in step.minibatches(experience, plan):
                for batch in minibatch.micro_batches():
                    minibatch.backward(raft_loss(run, minibatch, batch.trimmed()))
    return run.evaluation


def subtract_kl(run: RAFTRun, step: RolloutStep, experience: Experience) -> Experience:
    """Return the experience with scores minus the KL penalty, summed over each completion. Log the KL."""
    if run.reference is None:
        return experience
    kl = experience.logprobs - experience.ref_logprobs
    step.log_kl(kl, experience.completion_mask)
    penalty = (run.config.kl.coef or 0.0) * masked_sum(kl, experience.completion_mask, -1)
    return replace(experience, scores=torch.where(experience.takes_part, experience.scores - penalty, 0.0))


def choose(experience: Experience, config: RAFTConfig) -> Tensor:
    """Return (R,) row numbers of the completions to learn, ascending."""
    chosen = experience.takes_part
    if config.keep == "best":
        scores = experience.scores.masked_fill(~experience.takes_part, -torch.inf).view(-1, config.num_generations)
        best = scores.argmax(-1, keepdim=True)
        chosen = chosen & torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True).flatten()
    if config.min_score is not None:
        chosen = chosen & (experience.scores >= config.min_score)
    return chosen.nonzero().flatten().cpu()


def log_choice(step: RolloutStep, experience: Experience, chosen: Tensor) -> None:
    """Log how many completions were chosen, and their scores."""
    step.metrics.set({"kept": len(chosen) / len(experience), "skipped": int(len(chosen) == 0)})
    if experience.group_size > 1:
        step.metrics.set({"flat_groups": int(flat_groups(experience).sum())})
    if len(chosen):
        step.metrics.set({"kept_score": experience.scores[chosen].mean().item()})


def raft_loss(run: RAFTRun, minibatch: Minibatch, batch: Experience) -> Tensor:
    """Return a micro-batch's part of the mean negative log-likelihood per token, and log its metrics."""
    packed, loss_of = batch.pack(), partial(sft_loss, normalizer=int(minibatch.tokens))
    loss, logprobs, _ = summed_loss(run.policy, packed, loss_of, temperature=run.config.sampling.temperature)
    _, stats = sft_loss(logprobs, batch.completion_mask)
    minibatch.log(stats, packed.num_completion_tokens)
    return loss
