"""PPO for language models, as in InstructGPT (Ouyang et al. 2022) and lm-human-preferences (Ziegler et al. 2019).

Each step rolls out one batch of prompts and learns from it for a few epochs:

    1. act      sample completions; log-probs and values under the weights that sampled them
    2. score    one score a completion: centred, scaled, clipped, and less where the end is missing
    3. credit   the score on the last token, minus a price for leaving the reference; GAE; whitening
    4. improve  clipped policy and value losses over shuffled minibatches, and what is mixed in: the price of KL as a
                loss, an entropy bonus, texts to stay good at

docs/ppo.md goes through the published implementation details one by one and says which field or function does each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ConfigError, DataConfig, OptimConfig, PolicyGradientConfig, require
from rlhf_core.control import AdaptiveKL, FixedKL, KLEarlyStop, LinearKL, RunningMoments
from rlhf_core.data.loader import count_steps, load_examples, micro_batches, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.policy import entropy_bonus, kl_loss, policy_loss, ptx_loss
from rlhf_core.losses.value import explained_variance, value_loss
from rlhf_core.models.forward import (
    PolicyOutputs,
    device_of,
    policy_outputs,
    summed_loss,
    token_values,
)
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import load_tokenizer, same_vocabulary, save_model
from rlhf_core.ops.advantages import gae
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_aggregate, masked_mean, masked_whiten
from rlhf_core.ops.shaping import clip_scores, missing_eos_penalty, scale_scores
from rlhf_core.rollout.critic import end_values, load_critic, trunk_values
from rlhf_core.rollout.recorded import Recorded, behaviour, engine_weights
from rlhf_core.rollout.rewards import Reward, Scores
from rlhf_core.rollout.sampling import Rollout
from rlhf_core.rollout.steps import (
    act,
    evaluate_held_out,
    first_epoch,
    load_actors,
    policy_forward,
    recall,
    rollout_gauges,
    say_how_it_samples,
    score,
    sequence_kl,
    shuffled_minibatches,
)
from rlhf_core.seeding import generator
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.reference import require_same_shape, update_reference
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyGradientConfig):
    """Improve a policy against a reward model or a reward function, held near a reference by a KL price."""

    optim: OptimConfig = OptimConfig(schedule="linear", eps=1e-5)
    """The optimizer. Adam's epsilon as in OpenAI's PPO."""
    ppo_epochs: int = 4
    """Passes over each rollout."""
    clip: float = 0.2
    """The ratio's clipping range."""
    value: Literal["head", "policy", "reward"] = "head"
    """The critic: a head on the policy's trunk, or a trunk of its own that starts as the policy or the reward model."""
    value_detach: bool = False
    """Keep the gradient of a value head out of the policy's trunk."""
    value_clip: float | None = 0.2
    """How far a value may move from what it was; none for no limit."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_warmup: int = 0
    """Steps at the start that train the critic alone; the policy and the trunk under a value head stay as they are."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's lambda."""
    whiten_rewards: bool = False
    """Scale the tokens' rewards, the price of KL in them, to variance 1 over the rollout; their mean stays."""
    whiten_advantages: bool | None = None
    """Bring the tokens' advantages to mean 0 and variance 1 over the rollout. None: where KL is paid in the rewards
    alone. A loss beside the advantages is not scaled with them, so that its price would mean something else at every
    step; true with such a loss is allowed, and said."""
    kl_coef: float = 0.05
    """Price of one nat of KL to the reference; where an adaptive or a linear price starts."""
    kl_control: Literal["adaptive", "fixed", "linear"] = "adaptive"
    """How the price moves: steered to kl_target, not at all, or in a straight line to kl_coef_end."""
    kl_target: float | None = 6.0
    """KL in nats a completion that an adaptive price is steered to; none keeps the price fixed."""
    kl_horizon: int = 10_000
    """Completions over which an adaptive price moves; smaller is quicker."""
    kl_coef_end: float = 0.0
    """Where a linear price is at the last step."""
    kl_in: Literal["reward", "loss", "both"] = "reward"
    """Where KL is paid: in each token's reward, as a loss of its own, or in both, as the full KL must be to be right
    over whole completions."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """How KL is measured where it is paid: from the sampled tokens (k2 is also called mse), or in full, exactly, over
    the vocabulary. rlhf_core/ops/kl.py tells which are right where; a wrong one warns."""
    score_center: int = 0
    """Completions of the starting policy to sample once, before the first step: their mean is taken off every score."""
    score_scale: Literal["none", "scale", "normalize"] = "none"
    """Divide scores by the standard deviation of all so far; normalize takes off their mean as well."""
    score_clip: float | None = None
    """Hold scores between minus this and this, after they were centred and scaled."""
    missing_eos: Literal["none", "subtract", "replace", "mask", "bootstrap"] = "none"
    """A completion that was cut off: nothing special; its score less missing_eos_penalty, or replaced by minus that;
    left out of the step; or credited with the critic's value of what would have followed."""
    missing_eos_penalty: float = 1.0
    """What a missing end costs, in units of the scores after they were centred, scaled and clipped."""
    kl_stop: float | None = None
    """End a rollout's updates once the policy is 1.5 times this far, in nats a token, from the one that sampled it."""
    ratio_limit: float | None = None
    """Skip a minibatch in which the ratio of any token exceeds this."""
    entropy_coef: float = 0.0
    """Weight of a bonus for entropy, in nats a token; above 0 all logits of a micro-batch are in memory at once."""
    ptx_data: DataConfig | None = None
    """Texts to stay good at, prompts with completions or plain; minibatch_size rows are mixed into each update."""
    ptx_coef: float = 0.0
    """Weight of the negative log-likelihood, a token, of the texts in ptx_data."""
    reference_update: Literal["none", "ema", "sync"] = "none"
    """Whether the reference stays as it is, follows as a moving average of the policy, or is made equal to it."""
    reference_every: int = 1
    """Steps between two updates of the reference."""
    reference_rate: float = 0.01
    """How far a moving average goes towards the policy at each update, 0 to 1."""

    def __post_init__(self):
        super().__post_init__()
        needs_model = self.value != "reward" or self.reward_model is not None
        require(needs_model, "value", "reward", "a reward_model to start from")
        for field in ("ppo_epochs", "clip", "kl_horizon", "reference_every"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        for field in ("value_clip", "kl_target", "score_clip", "kl_stop"):
            value = getattr(self, field)
            require(value is None or value > 0, field, value, "more than 0")
        for field in ("gamma", "lam", "reference_rate"):
            require(0 <= getattr(self, field) <= 1, field, getattr(self, field), "between 0 and 1")
        for field in ("value_coef", "value_warmup", "kl_coef", "kl_coef_end", "score_center", "missing_eos_penalty",
                      "entropy_coef", "ptx_coef"):  # fmt: skip
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(self.kl_coef > 0 or not self.adapts, "kl_coef", self.kl_coef, "more than 0, to be adapted")
        require(not self.value_detach or self.value == "head", "value_detach", True, "value='head', which has a trunk")
        once = self.kl_in != "both" or self.kl_estimator == "full"
        require(once, "kl_in", "both", "kl_estimator='full': any other would be paid twice")
        limit = self.ratio_limit
        require(limit is None or limit > 1, "ratio_limit", limit, "more than 1, where ratios start")
        mixes = (self.ptx_data is not None) == (self.ptx_coef > 0)
        require(mixes, "ptx_coef", self.ptx_coef, "more than 0 with ptx_data, 0 without")

    @property
    def whitens(self) -> bool:
        return self.kl_in == "reward" if self.whiten_advantages is None else self.whiten_advantages

    @property
    def adapts(self) -> bool:
        return self.kl_control == "adaptive" and self.kl_target is not None


def train(config: PPOConfig) -> dict[str, float]:
    """Run to the end; policy and critic are saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer, reference, reward, examples, held_out = load_actors(config)
    critic = load_critic(config, policy)
    if config.value == "reward" and not same_vocabulary(load_tokenizer(config.reward_model.path), tokenizer):
        raise ConfigError("value='reward': expected a reward model with the policy's own vocabulary")
    texts = load_examples(config.ptx_data, tokenizer, need="supervised", model=policy) if config.ptx_data else []
    optimizer = build_optimizer([policy, critic], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    kl_control = build_kl_control(config, total_steps)
    kl_stop = KLEarlyStop(config.kl_stop or math.inf)
    start_scores, all_scores = RunningMoments(), RunningMoments()
    exact = config.kl_estimator == "full"
    recorded = Recorded("off" if exact else config.recorded)  # the exact KL asks a forward, which tells the rest
    modules = {"policy": policy, "critic": critic}
    if config.reference_update != "none":
        require_same_shape(reference, policy, config)
        modules["reference"] = reference
    size, micro_size = config.minibatch_size, config.micro_batch_size or config.minibatch_size
    evaluation: dict[str, float] = {}

    def ask(batch: PackedBatch) -> PolicyOutputs:
        """What there is to know before the updates."""
        return forward(policy, critic, batch, config, reference=reference if exact else None)

    controllers = dict(kl=kl_control, kl_stop=kl_stop, start_scores=start_scores, all_scores=all_scores)
    controllers["recorded"] = recorded

    def write(folder: Path) -> None:
        save_model(folder, policy, tokenizer)
        if isinstance(critic, ValueHead):
            critic.save(folder)
        else:
            save_model(folder / "value_model", critic, tokenizer)

    held = dict(modules=modules, optimizer=optimizer, controllers=controllers, write=write)
    run = Run("ppo", config, total_steps, **held)
    with run:
        say_how_it_samples(run, policy)
        if config.whitens and config.kl_in != "reward":
            run.say("ppo: whiten_advantages scales what KL is held against, not its loss; kl_coef is no price of a nat")
        if config.score_center and start_scores.count == 0:  # else a checkpoint had them
            measure_start(start_scores, policy, tokenizer, examples, reward, config)
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act and 2. score. Of what is left out here, nothing takes part in anything below.
            head = critic if isinstance(critic, ValueHead) and recorded.wanted else None
            rollout = act(policy, tokenizer, rows, config, "rollout", step, value_head=head)
            scores = score(reward, rollout, rows)
            metrics = rollout_gauges(rollout, scores)
            rollout, paid = learnable(rollout, scores, config, start_scores, all_scores)
            mask = rollout.pack().completion_mask.to(device_of(policy))
            order = list(shuffled_minibatches(len(mask), size, config.ppo_epochs, seed=config.seed, step=step))
            batches = first_epoch(order, micro_size)
            old = behaviour(rollout, config, ask, batches, recorded, run)
            logprobs, exact_kl = old.logprobs.to(mask.device), old.kl
            values = trunk_values(critic, rollout, config) if old.values is None else old.values.to(mask.device)
            ref_logprobs = logprobs  # where the exact KL is paid nobody looks at them
            if not exact:
                ref_logprobs = recall(rollout, config, lambda batch: policy_forward(reference, batch, config)).logprobs

            # 3. credit
            kl_coef = kl_control.kl_coef
            rewards = token_rewards(paid, logprobs, ref_logprobs, mask, exact_kl, kl_coef, config)
            if config.whiten_rewards:
                rewards = masked_whiten(rewards, mask, shift_mean=False, all_ranks=True)
            bootstrap = end_values(policy, critic, rollout, config) if config.missing_eos == "bootstrap" else None
            advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam, bootstrap=bootstrap)
            if config.whitens:
                advantages = masked_whiten(advantages, mask, all_ranks=True)

            # 4. improve
            warming = step <= config.value_warmup
            kl_target = reference if exact and config.kl_in != "reward" and not warming else None
            averages, ratio_max, updates = Averages(), torch.zeros((), device=mask.device), 0
            for number, minibatch in enumerate(order):
                tokens = mask[minibatch].sum()
                ratio, distance = torch.zeros_like(ratio_max), torch.zeros_like(ratio_max)
                for part in minibatch.split(micro_size):
                    batch = rollout.pack(part.tolist(), width=mask.shape[1])
                    new = forward(policy, critic, batch, config, reference=kl_target, detach=warming)
                    weights = engine_weights(logprobs[part], rollout, part, mask[part], config)
                    policy_term, policy_stats = policy_loss(
                        new_logprobs=new.logprobs,
                        logprobs=logprobs[part],
                        advantages=advantages[part],
                        mask=mask[part],
                        weights=weights,
                        clip=config.clip,
                        normalizer=tokens,
                    )
                    value_term, value_stats = value_loss(
                        new_values=new.values,
                        values=values[part],
                        returns=returns[part],
                        mask=mask[part],
                        value_clip=config.value_clip,
                        normalizer=tokens,
                    )
                    loss = config.value_coef * value_term
                    if not warming:
                        loss = loss + policy_term
                        if config.kl_in != "reward":
                            kl_term = kl_price(new, logprobs[part], ref_logprobs[part], mask[part], tokens, config)
                            loss = loss + kl_coef * kl_term
                        if config.entropy_coef:
                            weight = dict(entropy_coef=config.entropy_coef, normalizer=tokens)
                            loss = loss + entropy_bonus(new.entropy, mask[part], **weight)[0]
                    loss.backward()
                    ratio = torch.maximum(ratio, policy_stats.pop("ratio_max"))
                    share = mask[part].sum() / tokens
                    distance = distance + policy_stats["approx_kl"] * share
                    averages.add({"policy_loss": policy_term / share, "value_loss": value_term / share}, share)
                    if weights is not None:
                        policy_stats["engine_weight"] = masked_mean(weights, mask[part])
                    averages.add(policy_stats | value_stats | {"entropy": masked_mean(new.entropy, mask[part])}, share)
                ratio_max = torch.maximum(ratio_max, ratio)
                if config.kl_stop is not None and kl_stop.stop(distance.item()):
                    optimizer.zero_grad(set_to_none=True)
                    break
                if config.ratio_limit is not None and not ratio.item() <= config.ratio_limit:
                    optimizer.zero_grad(set_to_none=True)
                    continue
                if texts and not warming:
                    averages.add(mix_in(policy, texts, config, step, number))
                averages.add(optimizer_step(optimizer, config.optim, step, total_steps))
                updates += 1

            kl = sequence_kl(exact_kl if exact else logprobs - ref_logprobs, mask)
            metrics |= averages.means() | {
                "ratio_max": ratio_max.item(),
                "kl": kl,
                "kl_coef": kl_coef,
                "explained_variance": explained_variance(values, returns, mask).item(),
                "paid_score": paid.total.mean().item(),
                "skipped": len(order) - updates,
            }
            kl_control.update(kl, len(mask))
            if held_out and run.evaluate_now(step):
                evaluation = evaluate_held_out(policy, reference, tokenizer, reward, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("score", "kl", "entropy"))
            update_reference(reference, policy, step, config)
        run.save(summary=evaluation)
    return evaluation


# ------------------------------------------------------------------------------------------------------ before the loop


def build_kl_control(config: PPOConfig, total_steps: int) -> FixedKL:
    """The price of KL. A linear one is kl_coef at the first step and kl_coef_end at the last."""
    if config.kl_control == "linear":
        return LinearKL(config.kl_coef, config.kl_coef_end, max(total_steps - 1, 1))
    if config.adapts:
        return AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
    return FixedKL(config.kl_coef)


def measure_start(
    moments: RunningMoments,
    policy: nn.Module,
    tokenizer: Any,
    examples: list[Example],
    reward: Reward,
    config: PPOConfig,
) -> None:
    """Take in the scores of the policy as it starts, on prompts in an order of their own."""
    order = torch.randperm(len(examples), generator=generator(config.seed, "score_center")).tolist()
    rows = [examples[order[i % len(order)]] for i in range(config.score_center)]
    rollout = act(policy, tokenizer, rows, config, "score_center")
    scores = score(reward, rollout, rows)
    moments.update(scores.total[valid_rows(scores)], all_ranks=True)


# -------------------------------------------------------------------------------------------------------- act and score


def forward(
    policy: nn.Module,
    critic: nn.Module | None,
    batch: PackedBatch,
    config: PPOConfig,
    *,
    reference: nn.Module | None = None,
    detach: bool = False,
) -> PolicyOutputs:
    """Log-probs and entropies of the policy and values of the critic: one forward where they share a trunk.

    With a `reference` also the exact KL to it. `detach` keeps a value head's gradient from the trunk, as value_detach.
    """
    shared = critic is None or isinstance(critic, ValueHead)
    head = critic if shared else None
    if head is not None and (detach or config.value_detach):

        def head(states: Tensor) -> Tensor:
            return critic(states.detach())

    outputs = policy_outputs(
        policy,
        batch,
        value_head=head,
        reference=reference,
        temperature=config.sampling.temperature,
        entropy=torch.is_grad_enabled(),  # a gauge of the updates
        entropy_gradient=config.entropy_coef > 0 and torch.is_grad_enabled(),
        layout=config.model.layout,
    )
    return outputs if shared else replace(outputs, values=token_values(critic, batch))


def learnable(
    rollout: Rollout, scores: Scores, config: PPOConfig, start: RunningMoments, seen: RunningMoments
) -> tuple[Rollout, Scores]:
    """The completions that a step learns from, and what the policy is paid for them: `shape_scores`.

    Left out is what got no score and, under missing_eos="mask", what has no end. Raises ValueError where that is all.
    """
    rows = valid_rows(scores)
    rollout = rollout.keep(rows)
    paid = shape_scores(scores.keep(rows), rollout.finished, config, start, seen)
    if config.missing_eos == "mask":
        if not rollout.finished.any():
            raise ValueError(
                f"missing_eos='mask': none of {len(rows)} completions ended within "
                f"sampling.max_new_tokens={config.sampling.max_new_tokens}, so there is nothing to learn from; "
                "expected a larger one, or another missing_eos"
            )
        paid, rollout = paid.keep(rollout.finished), rollout.keep(rollout.finished.nonzero().flatten().tolist())
    return rollout, paid


def valid_rows(scores: Scores) -> list[int]:
    rows = scores.valid.nonzero().flatten().tolist()
    if not rows:
        raise ValueError(f"the reward scored none of {len(scores.valid)} completions: there is nothing to learn from")
    return rows


def shape_scores(
    scores: Scores, finished: Tensor, config: PPOConfig, start: RunningMoments, seen: RunningMoments
) -> Scores:
    """What the policy is paid for its scores: centred, scaled, clipped, and last the price of a missing end.

    `start` holds the starting policy's scores (its mean is 0 where there are none). `seen` takes these in before it
    scales them. The price of a missing end comes last, so that no clip forgives it and no moment holds it.

    What belongs to single tokens is scaled alike and else left as it is: a completion's last token gets what is left.
    """
    total, tokens = scores.total - start.mean, scores.tokens
    if config.score_scale != "none":
        seen.update(total, all_ranks=True)
        total = scale_scores(total, std=seen.std, mean=seen.mean if config.score_scale == "normalize" else 0.0)
        tokens = None if tokens is None else scale_scores(tokens, std=seen.std)
    if config.score_clip is not None:
        total = clip_scores(total, low=-config.score_clip, high=config.score_clip)
    if config.missing_eos in ("subtract", "replace"):
        total = missing_eos_penalty(total, finished, penalty=config.missing_eos_penalty, mode=config.missing_eos)
    return scores._replace(total=total, tokens=tokens)


# ---------------------------------------------------------------------------------------------------- credit and losses


def token_rewards(
    paid: Scores,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    exact_kl: Tensor | None,
    kl_coef: float,
    config: PPOConfig,
) -> Tensor:
    """(B, T): what belongs to single tokens, the rest of a completion's score on its last token and, unless it is a
    loss alone, the price of KL on all.
    """
    price = dict(kl_coef=kl_coef, estimator=config.kl_estimator, kl=exact_kl, with_loss=config.kl_in == "both")
    if config.kl_in == "loss":
        price = dict(kl_coef=0.0)
    if paid.tokens is not None:
        price["token_scores"] = paid.tokens[:, : mask.shape[1]].to(mask.device)
    return kl_penalty(paid.total.to(mask.device), logprobs, ref_logprobs, mask, **price)[0]


def kl_price(
    new: PolicyOutputs, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, tokens: Tensor, config: PPOConfig
) -> Tensor:
    """The mean KL over a minibatch's tokens as a loss, this part's share of it, with the gradient that is right for it:

    of the exact KL itself, of k1 and k3 times the ratio, and of k2 as it is.
    """
    if config.kl_estimator == "full":
        return masked_aggregate(new.kl, mask, normalizer=tokens)
    behaviour = logprobs if config.kl_estimator in ("k1", "k3") else None
    options = dict(estimator=config.kl_estimator, logprobs=behaviour, normalizer=tokens)
    return kl_loss(new.logprobs, ref_logprobs, mask, **options)[0]


def mix_in(policy: nn.Module, texts: list[Example], config: PPOConfig, step: int, number: int) -> dict[str, Tensor]:
    """Add the gradient of ptx_coef times the mean NLL of this update's texts, which follow from step and number."""
    most = config.ppo_epochs * math.ceil(config.batch_size / config.minibatch_size)
    rows = step_examples(texts, config.minibatch_size, seed=config.seed, step=(step - 1) * most + number + 1)
    batches = micro_batches(rows, config.micro_batch_size)
    tokens = sum(batch.num_supervised_tokens for batch in batches)
    loss_of = partial(ptx_loss, ptx_coef=config.ptx_coef, normalizer=tokens)
    total = torch.zeros((), device=device_of(policy))
    for batch in batches:
        loss, _ = summed_loss(policy, batch, loss_of, layout=config.model.layout)
        loss.backward()
        total += loss.detach()
    return {"ptx_nll": total / config.ptx_coef}
