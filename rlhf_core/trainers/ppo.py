"""PPO for language models, as in InstructGPT (Ouyang et al. 2022) and lm-human-preferences (Ziegler et al. 2019).

Each step rolls out one batch of prompts and learns from it for a few epochs:

    1. sample   completions, with log-probs and values under the weights that sampled them
    2. score    one score per completion: centered, scaled, clipped, and with a penalty for a missing end
    3. credit   the score on the last token, minus the KL penalty per token; GAE; whitening
    4. improve  clipped policy and value losses over shuffled minibatches, and optional terms: the KL as a loss, an
                entropy bonus, the likelihood of pretraining texts

docs/ppo.md goes through the published implementation details one by one and names the field or function for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rlhf_core.batch import PackedBatch
from rlhf_core.config import (
    Bounds,
    DataConfig,
    Fraction,
    KLConfig,
    NonNegativeFloat,
    OptimConfig,
    PolicyGradientConfig,
    PositiveFloat,
    ValueConfig,
    require,
)
from rlhf_core.control import KLEarlyStop
from rlhf_core.data.loader import load_examples, micro_batches, step_examples
from rlhf_core.data.records import Example
from rlhf_core.losses.policy import entropy_bonus, kl_loss, policy_loss, ptx_loss
from rlhf_core.losses.value import explained_variance, value_loss
from rlhf_core.models.forward import PolicyOutputs, policy_outputs, summed_loss, token_values
from rlhf_core.models.heads import ValueHead
from rlhf_core.ops.advantages import gae
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_aggregate, masked_mean, masked_whiten
from rlhf_core.rollout.critic import Critic, critic_values, end_values, load_critic
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.online import Minibatch, OnlineRun, RolloutStep, require_scores
from rlhf_core.rollout.plan import Plan
from rlhf_core.training.metrics import Metrics

PPORun = OnlineRun["PPOConfig"]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyGradientConfig):
    """Improve a policy against a reward model or a reward function, with a KL penalty to a reference."""

    job: ClassVar[str] = "ppo"
    common: ClassVar[tuple[str, ...]] = (*PolicyGradientConfig.common, "kl.target", "value.model", "rollout_epochs")
    has_critic: ClassVar[bool] = True
    kl_choices: ClassVar = {"ratio": (False,)}  # a KL loss of k1 or k3 is multiplied by the ratio anyway

    optim: OptimConfig = OptimConfig(schedule="linear", eps=1e-5)
    """The optimizer. Adam's epsilon is that of OpenAI's PPO."""
    rollout_epochs: int = 4
    """Passes over each rollout."""
    clip: PositiveFloat = 0.2
    """Clipping range of the ratio."""
    kl: KLConfig = KLConfig(control="adaptive")
    """The KL penalty."""
    value: ValueConfig = ValueConfig()
    """The critic."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    whiten_rewards: bool = False
    """Scale the rewards of tokens, including their KL penalty, to variance 1 over the rollout; keep their mean."""
    whiten_advantages: bool | None = None
    """Normalise the advantages of tokens to mean 0 and variance 1 over the rollout. None: where the KL is in the
    rewards alone, since a KL loss is not scaled with the advantages and its coefficient would change meaning at every
    step; true with a KL loss is allowed, with a message."""
    ratio_limit: Annotated[float, Bounds(above=1)] | None = None
    """Skip a minibatch in which the ratio of any token exceeds this value."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus per token, in nats; above 0 a micro-batch's logits are in memory at once."""
    ptx_data: DataConfig | None = None
    """Texts whose likelihood is kept up (PPO-ptx), prompts with completions or plain; minibatch_size rows are added to
    each update."""
    ptx_coef: NonNegativeFloat = 0.0
    """Coefficient of the negative log-likelihood per token of the texts in ptx_data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_model = self.value.model != "reward" or self.reward_model is not None
        require(needs_model, "value.model", "reward", "a reward_model to start from")
        mixes = (self.ptx_data is not None) == (self.ptx_coef > 0)
        require(mixes, "ptx_coef", self.ptx_coef, "more than 0 with ptx_data, 0 without")

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.kl.apply_to == "reward" if self.whiten_advantages is None else self.whiten_advantages

    @property
    def exact(self) -> bool:
        """Whether the KL is computed over the whole vocabulary."""
        return self.kl.estimator == "full" and self.kl.active


def train(config: PPOConfig) -> Metrics:
    """Train and save policy and critic in `config.output`. Return the metrics of the last evaluation."""
    with OnlineRun(config, uses_reference=config.kl.active, needs_forward=config.exact) as run:
        critic = load_critic(run, config.value)
        texts = load_texts(run)
        early_stop = run.add_state("early_stop", KLEarlyStop(config.kl.stop or math.inf))
        for step in run.steps():
            # 1. sample and 2. score
            recording = critic if isinstance(critic, ValueHead) and run.recorded.wanted else None
            experience = select_scored(run, step.rollout(value_head=recording))

            # 3. credit
            plan = step.plan_units(torch.arange(len(experience))[:, None])
            experience = with_logprobs_and_values(run, critic, experience, plan)
            experience = with_advantages(run, critic, experience)

            # 4. improve
            warmup = step.number <= config.value.warmup
            for minibatch in step.minibatches(experience, plan):
                for batch in minibatch.micro_batches():
                    minibatch.backward(ppo_loss(run, critic, minibatch, batch, warmup=warmup))
                if config.kl.stop is not None and early_stop.stop(float(minibatch.metrics.total("approx_kl"))):
                    minibatch.discard()
                    break
                if exceeds_ratio_limit(minibatch, config.ratio_limit):
                    minibatch.discard()
                elif texts and not warmup:
                    step.metrics.mean(backward_texts(run, texts, step.number, minibatch.number))
            log_rollout(run, step, experience, plan)
    return run.evaluation


def load_texts(run: PPORun) -> Sequence[Example]:
    """Return the rows of `ptx_data`. Report a setting whose meaning is easily misread."""
    if run.config.whitens and run.config.kl.apply_to != "reward":
        run.message("ppo: whiten_advantages scales advantages to variance 1, which kl.coef is then relative to")
    data = run.config.ptx_data
    return [] if data is None else load_examples(data, run.tokenizer, need="supervised", model=run.policy)


# ----------------------------------------------------------------------------------------------------- score and credit


def select_scored(run: PPORun, experience: Experience) -> Experience:
    """Return the completions to learn from, with shaped scores: those with a score and, under missing_eos="mask", with
    an end. Raises ValueError if there are none."""
    experience = run.shape_scores(require_scores(experience))
    selected = run.scores.exclude_truncated(experience)
    if not selected.takes_part.any():
        longest, count = run.config.sampling.max_new_tokens, len(experience)
        found = f"sampling.max_new_tokens={longest}: none of {count} completions ended, and score.missing_eos='mask'"
        raise ValueError(f"{found} excludes all of them; expected a larger one, or another score.missing_eos")
    return require_scores(selected)


def with_logprobs_and_values(run: PPORun, critic: Critic, experience: Experience, plan: Plan) -> Experience:
    """Return the experience with log-probs under the policy that sampled and under the reference, and with values."""
    exact = run.config.exact
    of_policy = partial(forward, run, critic, reference=run.reference if exact else None)
    experience = run.with_logprobs(experience, plan, of_policy)
    if experience.values is None:  # log-probs were recorded, but a critic with its own trunk recorded no values
        assert not isinstance(critic, ValueHead)
        values = critic_values(critic, experience, run.micro_batch_size)
        experience = replace(experience, values=values)
    if exact or run.reference is None:  # the reference's log-probs are not used
        return replace(experience, ref_logprobs=experience.logprobs)
    return run.with_ref_logprobs(experience)


def with_advantages(run: PPORun, critic: Critic, experience: Experience) -> Experience:
    """Return the experience with advantages and returns: GAE of the tokens' rewards, whitened if the settings say."""
    config, mask = run.config, experience.mask
    rewards = token_rewards(run, experience)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, all_ranks=True)
    bootstrap = None
    if config.score.missing_eos == "bootstrap":
        bootstrap = end_values(run.policy, critic, experience, run.micro_batch_size)
    assert experience.values is not None
    advantages, returns = gae(rewards, experience.values, mask, gamma=config.gamma, lam=config.lam, bootstrap=bootstrap)
    if config.whitens:
        advantages = masked_whiten(advantages, mask, all_ranks=True)
    return replace(experience, advantages=advantages, returns=returns)


def token_rewards(run: PPORun, experience: Experience) -> Tensor:
    """Return (B, T) rewards: the scores of single tokens, the rest of a completion's score on its last token and,
    unless the KL is a loss alone, the KL penalty on all tokens."""
    kl, in_reward = run.config.kl, run.config.kl.apply_to != "loss"
    exact = run.config.exact and in_reward
    rewards, _ = kl_penalty(
        experience.scores,
        experience.logprobs,
        experience.ref_logprobs,
        experience.mask,
        kl_coef=run.kl.kl_coef if in_reward else 0.0,
        estimator="full" if exact else kl.estimator if in_reward and kl.estimator != "full" else "k1",
        kl=experience.exact_kl if exact else None,
        with_loss=kl.apply_to == "both",
        token_scores=experience.token_scores,
    )
    return rewards


# -------------------------------------------------------------------------------------------------------------- improve


def forward(
    run: PPORun,
    critic: Critic,
    batch: PackedBatch,
    *,
    reference: torch.nn.Module | None = None,
    detach: bool = False,
) -> PolicyOutputs:
    """Return log-probs and entropies of the policy and values of the critic, in one forward if they share a trunk.

    `reference` adds the exact KL to it. `detach` stops the gradient of a value head at the trunk, as value.detach does.
    """
    config, training = run.config, torch.is_grad_enabled()
    head = None
    if isinstance(critic, ValueHead):
        head = critic.detached if detach or config.value.detach else critic
    outputs = policy_outputs(
        run.policy,
        batch,
        value_head=head,
        reference=reference,
        temperature=config.sampling.temperature,
        entropy=training,  # a metric of the updates
        entropy_gradient=config.entropy_coef > 0 and training,
    )
    return outputs if isinstance(critic, ValueHead) else replace(outputs, values=token_values(critic, batch))


def ppo_loss(run: PPORun, critic: Critic, minibatch: Minibatch, batch: Experience, *, warmup: bool) -> Tensor:
    """Return a micro-batch's part of the minibatch's loss, and log its metrics.

    policy loss + value.coef * value loss + kl.coef * KL - entropy_coef * entropy; during the critic's warm-up the value
    loss alone.
    """
    config, share = run.config, minibatch.share(batch)
    kl_in_loss = config.kl.apply_to != "reward" and run.reference is not None and not warmup
    reference = run.reference if config.exact and kl_in_loss else None
    new = forward(run, critic, batch.pack(), reference=reference, detach=warmup)
    assert new.values is not None and new.entropy is not None and batch.values is not None
    weights = minibatch.importance(batch)
    policy_term, policy_stats = policy_loss(
        new_logprobs=new.logprobs,
        logprobs=batch.logprobs,
        advantages=batch.advantages,
        mask=batch.mask,
        weights=weights,
        clip=config.clip,
        normalizer=minibatch.tokens,
    )
    value_term, value_stats = value_loss(
        new_values=new.values,
        values=batch.values,
        returns=batch.returns,
        mask=batch.mask,
        value_clip=config.value.clip,
        normalizer=minibatch.tokens,
    )
    loss = config.value.coef * value_term
    if not warmup:
        loss = loss + policy_term
    if kl_in_loss:
        loss = loss + run.kl.kl_coef * kl_term(new, batch, minibatch.tokens, config)
    if config.entropy_coef and not warmup:
        loss = (
            loss
            + entropy_bonus(new.entropy, batch.mask, entropy_coef=config.entropy_coef, normalizer=minibatch.tokens)[0]
        )
    stats = policy_stats | value_stats | {"policy_loss": policy_term / share, "value_loss": value_term / share}
    stats["entropy"] = masked_mean(new.entropy, batch.mask)
    if weights is not None:
        stats["engine_weight"] = masked_mean(weights, batch.mask)
    minibatch.log(stats, share)
    return loss


def kl_term(new: PolicyOutputs, batch: Experience, tokens: Tensor, config: PPOConfig) -> Tensor:
    """Return a micro-batch's part of the mean KL over a minibatch's tokens as a loss, with an unbiased gradient: of the
    exact KL itself, of k1 and k3 times the ratio, and of k2 as it is."""
    if config.exact:
        assert new.kl is not None
        return masked_aggregate(new.kl, batch.mask, normalizer=tokens)
    loss, _ = kl_loss(
        new.logprobs,
        batch.ref_logprobs,
        batch.mask,
        estimator=config.kl.estimator,
        logprobs=batch.logprobs if config.kl.estimator in ("k1", "k3") else None,
        normalizer=tokens,
    )
    return loss


def exceeds_ratio_limit(minibatch: Minibatch, limit: float | None) -> bool:
    """Return whether a ratio in the minibatch exceeds the limit, or is not a number."""
    return limit is not None and not minibatch.metrics.largest("ratio_max").item() <= limit


def backward_texts(run: PPORun, texts: Sequence[Example], step: int, number: int) -> dict[str, Tensor]:
    """Add the gradient of ptx_coef times the mean NLL of an update's texts, which follow from `step` and `number`."""
    config = run.config
    updates_per_step = config.rollout_epochs * math.ceil(config.batch_size / config.minibatch_size)
    position = (step - 1) * updates_per_step + number + 1
    rows = step_examples(texts, config.minibatch_size, seed=config.seed, step=position)
    batches = micro_batches(rows, config.micro_batch_size)
    tokens = sum(batch.num_supervised_tokens for batch in batches)
    loss_of = partial(ptx_loss, ptx_coef=config.ptx_coef, normalizer=tokens)
    total = torch.zeros((), device=run.device)
    for batch in batches:
        loss = summed_loss(run.policy, batch, loss_of).loss
        loss.backward()
        total += loss.detach()
    return {"ptx_nll": total / config.ptx_coef}


def log_rollout(run: PPORun, step: RolloutStep, experience: Experience, plan: Plan) -> None:
    """Log the metrics of the rollout as a whole."""
    assert experience.values is not None
    variance = explained_variance(experience.values, experience.returns, experience.mask).item()
    step.metrics.set(
        {
            "explained_variance": variance,
            "paid_score": experience.scores.mean().item(),
            "skipped": len(plan.minibatches) - step.updates,
        }
    )
    if run.reference is not None:
        log_ratio = experience.logprobs - experience.ref_logprobs
        step.metrics.set({"kl_coef": run.kl.kl_coef})
        step.log_kl(log_ratio if experience.exact_kl is None else experience.exact_kl, experience.mask)
