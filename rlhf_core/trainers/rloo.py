"""RLOO, REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): no critic, and no credit per token.

A completion is one action. Its reward is its score minus the KL penalty, and its baseline is the mean reward of the
other completions of its prompt:

    1. sample   a group of completions for each prompt
    2. score    R = score - kl.coef * log(policy / reference), summed over the completion's tokens
    3. credit   A = R - mean of the other R of its group
    4. improve  -A log policy(completion), with PPO's clipped ratio where a rollout is used for several updates

With kl.estimator="full" the KL is not estimated from the sampled tokens but summed exactly over the vocabulary, at each
token's state s: R = score - kl.coef * sum over t of KL(s_t). This R depends on the weights even for a fixed completion,
so the gradient of its mean has two parts, both unbiased; the second is added to the loss:

    grad E[R] = E[(R - baseline) grad log policy(completion)] - kl.coef * E[sum over t of grad KL(s_t)]

The ratio is that of the whole completion, the product of its tokens' ratios, so `ratio_max`, `clip_fraction` and
`approx_kl` are metrics of completions.

The KL is part of the reward, so a group of equal scores still has a gradient, from its KL alone; `flat_groups` counts
them. A completion without a score (None) is excluded from all baselines and from the loss; `excluded` counts those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from rlhf_core.config import AtLeastTwo, KLConfig, PolicyGradientConfig, PositiveFloat, require
from rlhf_core.losses.policy import policy_loss
from rlhf_core.models.forward import PolicyOutputs
from rlhf_core.ops.advantages import rloo_advantages
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_aggregate, masked_mean
from rlhf_core.rollout.experience import Experience, flat_groups
from rlhf_core.rollout.online import Minibatch, OnlineRun, RolloutStep
from rlhf_core.training.metrics import Metrics

RLOORun = OnlineRun["RLOOConfig"]


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(PolicyGradientConfig):
    """Improve a policy against a reward without a critic: the other completions of a prompt are the baseline."""

    job: ClassVar[str] = "rloo"
    common: ClassVar[tuple[str, ...]] = (*PolicyGradientConfig.common, "num_generations")
    kl_choices: ClassVar = {"apply_to": ("reward",), "estimator": ("k1", "full"), "ratio": (False,), "stop": (None,)}

    num_generations: AtLeastTwo = 4
    """Completions per prompt, each other's baseline."""
    batch_size: int = 16
    """Prompts per rollout."""
    minibatch_size: int = 64
    """Completions per optimizer step, in whole groups."""
    kl: KLConfig = KLConfig()
    """The KL penalty. With estimator=full it is also a term of the loss, because its dependence on the weights at each
    state is not part of the policy gradient."""
    clip: PositiveFloat = 0.2
    """Clipping range of a completion's ratio, for updates after a rollout's first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "none or sequence, because a completion is one action"
        require(self.importance != "token", "importance", "token", expected)

    @property
    def exact(self) -> bool:
        """Whether the KL is computed over the whole vocabulary."""
        return self.kl.estimator == "full" and self.kl.active


def train(config: RLOOConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OnlineRun(config, uses_reference=config.kl.active, needs_forward=config.exact) as run:
        forward = partial(run.forward, run.policy, reference=run.reference if config.exact else None)
        for step in run.steps():
            # 1. sample and 2. score
            experience = run.scores.exclude_truncated(run.shape_scores(step.rollout(n=config.num_generations)))
            step.metrics.set({"flat_groups": int(flat_groups(experience).sum())})

            # 3. credit
            plan = step.plan(experience)
            experience = run.with_logprobs(experience, plan, forward, whole_completions=True)
            if not config.exact:
                experience = run.with_ref_logprobs(experience, plan)
            experience = replace(experience, advantages=advantages(run, step, experience))

            # 4. improve
            for minibatch in step.minibatches(experience, plan):
                for batch in minibatch.micro_batches():
                    new = forward(batch, entropy=True)
                    minibatch.backward(rloo_loss(run, minibatch, batch, new))
    return run.evaluation


def advantages(run: RLOORun, step: RolloutStep, experience: Experience) -> Tensor:
    """Return (B,) advantages: each completion's reward, its score minus the KL penalty, minus the mean reward of the
    others of its group. Log the KL."""
    config = run.config
    rewards = experience.scores
    if run.reference is not None:
        # With the exact KL, the reference's log-probs of the sampled tokens are not used.
        ref_logprobs = experience.logprobs if config.exact else experience.ref_logprobs
        token_rewards, kl = kl_penalty(
            experience.scores,
            experience.logprobs,
            ref_logprobs,
            experience.completion_mask,
            kl_coef=run.kl.kl_coef,
            estimator=config.kl.estimator,
            kl=experience.exact_kl,
            with_loss=config.exact,
        )
        step.log_kl(kl, experience.mask)
        rewards = token_rewards.sum(-1)
    return rloo_advantages(rewards, group_size=config.num_generations, valid=experience.takes_part)


def rloo_loss(run: RLOORun, minibatch: Minibatch, batch: Experience, new: PolicyOutputs) -> Tensor:
    """Return a micro-batch's part of the minibatch's loss, the mean over completions, and log its metrics."""
    weights, share = minibatch.importance(batch), len(batch) / minibatch.completions
    loss, stats = policy_loss(
        new_logprobs=new.logprobs.sum(-1, keepdim=True),
        logprobs=batch.logprobs.sum(-1, keepdim=True),
        advantages=batch.advantages,
        mask=batch.takes_part[:, None],
        weights=None if weights is None else weights[:, :1],
        clip=run.config.clip,
        normalizer=minibatch.completions,
    )
    stats["policy_loss"] = loss / share
    if run.config.exact:  # the part of the gradient through KL(s_t) itself
        assert new.kl is not None
        kl = masked_aggregate(new.kl, batch.mask, "sequence_sum", normalizer=minibatch.completions)
        stats["kl_loss"] = run.kl.kl_coef * kl / share
        loss = loss + run.kl.kl_coef * kl
    if weights is not None:
        stats["engine_weight"] = weights[:, 0].mean()
    minibatch.log(stats, share)
    assert new.entropy is not None
    minibatch.log({"entropy": masked_mean(new.entropy, batch.mask)}, minibatch.share(batch))
    return loss
