"""REINFORCE (Williams 1992) with a choice of baselines, including those of ReMax and of REINFORCE++.

Each step rolls out one batch of prompts and learns from it:

    1. sample   one completion for each prompt, or several
    2. score    one score per completion, on its last token, except for parts of it that a reward assigns to single
                tokens; and on every token minus kl.coef * log(policy / reference)
    3. credit   each token gets the sum of the rewards from it on, minus a baseline:

                none     nothing
                mean     the mean score of the batch
                remax    the score of the greedy completion of the same prompt (ReMax, Li et al. 2023, arXiv:2310.10505)
                global   nothing; returns are whitened over all tokens (REINFORCE++, Hu et al. 2025, arXiv:2501.03262)

    4. improve  -A log policy(token), with PPO's clipped ratio where a rollout is used for several updates; summed over
                a completion's tokens, or averaged over all tokens with `global`

A completion without a score (None), or whose greedy completion has none, is excluded; `excluded` counts those without a
score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from rlhf_core.config import Fraction, PolicyGradientConfig, PositiveFloat, PositiveInt, require
from rlhf_core.losses.policy import policy_loss
from rlhf_core.models.forward import PolicyOutputs
from rlhf_core.ops.advantages import discounted_returns, reinforce_pp_advantages, remax_advantages
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_mean
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.online import Minibatch, OnlineRun, RolloutStep
from rlhf_core.training.metrics import Metrics

ReinforceRun = OnlineRun["ReinforceConfig"]


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(PolicyGradientConfig):
    """Improve a policy against a reward by the plain policy gradient, with a baseline or REINFORCE++'s whitening."""

    job: ClassVar[str] = "reinforce"
    common: ClassVar[tuple[str, ...]] = (*PolicyGradientConfig.common, "baseline")
    kl_choices: ClassVar = {"apply_to": ("reward",), "estimator": ("k1",), "ratio": (False,), "stop": (None,)}

    baseline: Literal["none", "mean", "remax", "global"] = "mean"
    """Baseline of the scores: none; the mean of the batch; the greedy completion of the same prompt (one more
    completion per prompt); or none but whitening over all tokens of the batch, which is REINFORCE++."""
    num_generations: PositiveInt = 1
    """Completions per prompt."""
    minibatch_size: int = 64
    """Completions per optimizer step; those of a prompt stay together."""
    gamma: Fraction = 1.0
    """Discount per token."""
    clip: PositiveFloat | None = 0.2
    """Clipping range of the ratio, for updates after a rollout's first; none uses no ratio in any update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.baseline == "mean" and self.batch_size * self.num_generations == 1
        require(not alone, "batch_size", self.batch_size, "2 or more: baseline='mean' of one score is that score")


def train(config: ReinforceConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OnlineRun(config, uses_reference=config.kl.active) as run:
        for step in run.steps():
            # 1. sample and 2. score
            experience = run.scores.exclude_truncated(run.shape_scores(step.rollout(n=config.num_generations)))
            experience = subtract_baseline(run, step, experience)

            # 3. credit
            plan = step.plan(experience)
            experience = run.with_ref_logprobs(run.with_logprobs(experience, plan), plan)
            experience = replace(experience, advantages=advantages(run, experience))
            if run.reference is not None:
                step.log_kl(experience.logprobs - experience.ref_logprobs, experience.mask)

            # 4. improve
            for minibatch in step.minibatches(experience, plan):
                for batch in minibatch.micro_batches():
                    new = run.forward(run.policy, batch, entropy=True)
                    minibatch.backward(reinforce_loss(run, minibatch, batch, new))
    return run.evaluation


def subtract_baseline(run: ReinforceRun, step: RolloutStep, experience: Experience) -> Experience:
    """Return the experience with scores minus the baseline. With remax, completions whose greedy completion has no
    score are excluded."""
    if run.config.baseline == "mean":
        return replace(experience, scores=experience.scores - masked_mean(experience.scores, experience.takes_part))
    if run.config.baseline != "remax":
        return experience
    sampled = run.sample(run.policy, step.rows, "greedy", step.number, temperature=0.0)
    greedy, metrics = run.score(sampled, step.rows)
    step.metrics.set({"greedy_score": metrics["score"]})
    greedy = run.scores.shape(greedy, update=False)
    size = run.config.num_generations
    experience = experience.exclude(~greedy.takes_part.repeat_interleave(size))
    scores = remax_advantages(experience.scores, greedy.scores.repeat_interleave(size))
    return replace(experience, scores=scores)


def advantages(run: ReinforceRun, experience: Experience) -> Tensor:
    """Return (B, T) advantages: the discounted sum of rewards from each token on, whitened with baseline=global."""
    config = run.config
    ref_logprobs = experience.logprobs if run.reference is None else experience.ref_logprobs
    rewards, _ = kl_penalty(
        experience.scores,
        experience.logprobs,
        ref_logprobs,
        experience.completion_mask,
        kl_coef=run.kl.kl_coef,
        token_scores=experience.token_scores,
    )
    if config.baseline == "global":
        return reinforce_pp_advantages(rewards, experience.mask, gamma=config.gamma, all_ranks=True)
    return discounted_returns(rewards, experience.mask, gamma=config.gamma)


def reinforce_loss(run: ReinforceRun, minibatch: Minibatch, batch: Experience, new: PolicyOutputs) -> Tensor:
    """Return a micro-batch's part of the minibatch's loss, and log its metrics."""
    config, weights = run.config, minibatch.importance(batch)
    options: dict[str, Any] = {} if config.clip is None else {"clip": config.clip}
    per_token = config.baseline == "global"
    loss, stats = policy_loss(
        "reinforce" if config.clip is None else "ppo",
        new_logprobs=new.logprobs,
        logprobs=batch.logprobs,
        advantages=batch.advantages,
        mask=batch.mask,
        weights=weights,
        aggregation="token" if per_token else "sequence_sum",
        normalizer=minibatch.tokens if per_token else minibatch.completions,
        **options,
    )
    assert new.entropy is not None
    stats["entropy"] = masked_mean(new.entropy, batch.mask)
    if weights is not None:
        stats["engine_weight"] = masked_mean(weights, batch.mask)
    minibatch.log_losses({"policy_loss": loss})
    minibatch.log(stats, minibatch.share(batch))
    return loss
