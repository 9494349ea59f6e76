"""PPO for language models, as in InstructGPT (Ouyang et al. 2022) and lm-human-preferences (Ziegler et al. 2019).

Each step rolls out one batch of prompts and learns from it for a few epochs:

    1. act      sample completions; log-probs and values under the weights that sampled them
    2. score    one score a completion, on its last token, minus a per-token price for leaving the reference
    3. credit   GAE, whitened over completion tokens
    4. improve  clipped policy and value losses over shuffled minibatches

Left out here, each a later room: reward normalisation, missing-EOS penalties, early stopping, PPO-ptx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig, require
from rlhf_core.control import AdaptiveKL, FixedKL
from rlhf_core.data.loader import count_steps, load_examples, step_examples
from rlhf_core.data.tokenize import Example, stop_ids
from rlhf_core.losses.policy import policy_loss
from rlhf_core.losses.value import explained_variance, value_loss
from rlhf_core.models.forward import PolicyOutputs, device_of, policy_outputs, token_values
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import (
    load_policy,
    load_reference,
    load_tokenizer,
    load_value_model,
    same_vocabulary,
    save_model,
)
from rlhf_core.ops.advantages import gae
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_mean, masked_whiten
from rlhf_core.plugins import import_function
from rlhf_core.rollout.rewards import Reward, function_reward, load_model_reward
from rlhf_core.rollout.sampling import Rollout, sample, sampling_disagreement
from rlhf_core.seeding import generator
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """Improve a policy against a reward model or a reward function, held near a reference by a KL price."""

    reward_model: ModelConfig | None = None
    """The reward model; it may have a tokenizer of its own."""
    reward_function: str | None = None
    """module:function, called with lists of prompts, completions and data rows; returns their scores."""
    end_unfinished: bool = False
    """Score a completion that was cut off as if its end token had followed, as in all that a reward model has seen."""
    reference: ModelConfig | None = None
    """The model that the policy is held to; the model to start from, if not given."""
    eval_data: DataConfig | None = None
    """Held-out prompts; their mean score and KL are logged as eval_score and eval_kl."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    optim: OptimConfig = OptimConfig(schedule="linear", eps=1e-5)
    """The optimizer. Adam's epsilon as in OpenAI's PPO."""
    batch_size: int = 64
    """Prompts to a rollout."""
    minibatch_size: int = 16
    """Completions to an optimizer step."""
    ppo_epochs: int = 4
    """Passes over each rollout."""
    value: Literal["head", "policy", "reward"] = "head"
    """The critic: a head on the policy's trunk, or a trunk of its own that starts as the policy or the reward model."""
    clip: float = 0.2
    """The ratio's clipping range."""
    value_clip: float | None = 0.2
    """How far a value may move from what it was; none for no limit."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's lambda."""
    kl_coef: float = 0.05
    """Price of one nat of KL to the reference; where an adaptive price starts."""
    kl_target: float | None = 6.0
    """KL in nats a completion that the price is adapted to; none keeps the price fixed."""
    kl_horizon: int = 10_000
    """Completions over which the price adapts; smaller is quicker."""

    def __post_init__(self):
        super().__post_init__()
        if (self.reward_model is None) == (self.reward_function is None):
            raise ConfigError("reward_model, reward_function: expected one of the two")
        require(
            self.value != "reward" or self.reward_model is not None, "value", "reward", "a reward_model to start from"
        )
        require(self.sampling.temperature > 0, "sampling.temperature", self.sampling.temperature, "more than 0 in PPO")
        for field in ("minibatch_size", "ppo_epochs", "clip", "kl_horizon"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        for field in ("value_clip", "kl_target"):
            require(
                getattr(self, field) is None or getattr(self, field) > 0, field, getattr(self, field), "more than 0"
            )
        for field in ("gamma", "lam"):
            require(0 <= getattr(self, field) <= 1, field, getattr(self, field), "between 0 and 1")
        require(self.value_coef >= 0, "value_coef", self.value_coef, "0 or more")
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, "0 or more")
        require(self.kl_coef > 0 or self.kl_target is None, "kl_coef", self.kl_coef, "more than 0, to be adapted")


def train(config: PPOConfig) -> dict[str, float]:
    """Run to the end; policy and critic are saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    source = config.reference or config.model
    reference = load_reference(source.path, policy_tokenizer=tokenizer, device=config.device, **source.options())
    critic = load_critic(config, policy)
    reward = load_reward(config, tokenizer)
    options = dict(need="prompts", model=policy, reserve=config.sampling.max_new_tokens)
    examples = load_examples(config.data, tokenizer, **options)
    held_out = load_examples(config.eval_data, tokenizer, **options) if config.eval_data else []
    optimizer = build_optimizer([policy, critic], config.optim)
    if config.kl_target is None:
        kl_control = FixedKL(config.kl_coef)
    else:
        kl_control = AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    evaluation: dict[str, float] = {}

    def act(rows: list[Example], *purpose: str | int) -> tuple[Rollout, Tensor]:
        """Sampled completions and their scores (B,)."""
        rollout = sample(
            policy,
            [row.prompt for row in rows],
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            batch_size=config.sampling.batch_size,
            stop_ids=stop_ids(tokenizer, policy.generation_config),
            generator=generator(config.seed, *purpose),
        )
        scores = reward(rollout.prompts, rollout.completions, [row.record.row for row in rows])
        return rollout, scores.to(device_of(policy))

    run = Run(
        "ppo",
        config,
        total_steps,
        modules={"policy": policy, "critic": critic},
        optimizer=optimizer,
        controllers={"kl": kl_control},
    )
    with run:
        if disagreement := sampling_disagreement(policy.generation_config):
            run.say(f"ppo: samples from the whole distribution, though the generation config says {disagreement}")
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act and 2. score. Log-probs come from the forward that the update uses, so its first ratio is 1.
            rollout, scores = act(rows, "rollout", step)
            mask = rollout.pack().completion_mask.to(scores.device)
            with torch.no_grad():
                logprobs, values = recall(rollout, config, lambda batch: forward(policy, critic, batch, config))
                (ref_logprobs,) = recall(rollout, config, lambda batch: forward(reference, None, batch, config))

            # 3. credit
            rewards, kl = kl_penalty(scores, logprobs, ref_logprobs, mask, kl_coef=kl_control.kl_coef)
            advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
            advantages = masked_whiten(advantages, mask)

            # 4. improve
            averages, ratio_max = Averages(), torch.zeros((), device=mask.device)
            for minibatch in shuffled_minibatches(len(rows), config, step):
                tokens = mask[minibatch].sum()
                for part in minibatch.split(config.micro_batch_size or len(minibatch)):
                    new = forward(policy, critic, rollout.pack(part.tolist(), width=mask.shape[1]), config)
                    policy_term, policy_stats = policy_loss(
                        new_logprobs=new.logprobs,
                        logprobs=logprobs[part],
                        advantages=advantages[part],
                        mask=mask[part],
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
                    (policy_term + config.value_coef * value_term).backward()
                    ratio_max = torch.maximum(ratio_max, policy_stats.pop("ratio_max"))
                    share = mask[part].sum() / tokens
                    averages.add({"policy_loss": policy_term / share, "value_loss": value_term / share}, share)
                    averages.add(policy_stats | value_stats | {"entropy": masked_mean(new.entropy, mask[part])}, share)
                averages.add(optimizer_step(optimizer, config.optim, step, total_steps))

            sequence_kl = kl.sum(-1).mean().item()
            metrics = averages.means() | {
                "ratio_max": ratio_max.item(),
                "score": scores.mean().item(),
                "score_std": scores.std(correction=0).item(),
                "kl": sequence_kl,
                "kl_coef": kl_control.kl_coef,
                "explained_variance": explained_variance(values, returns, mask).item(),
                "length": mask.sum(-1).float().mean().item(),
                "eos_rate": rollout.finished.float().mean().item(),
            }
            kl_control.update(sequence_kl, len(rows))
            if held_out and run.evaluate_now(step):
                evaluation = evaluate(policy, reference, config, *act(held_out, "evaluation"))
                metrics |= evaluation
            run.log(step, metrics, show=("score", "kl", "entropy"))

        def write(folder: Path) -> None:
            save_model(folder, policy, tokenizer)
            if isinstance(critic, ValueHead):
                critic.save(folder)
            else:
                save_model(folder / "value_model", critic, tokenizer)

        run.save(write, summary=evaluation)
    return evaluation


def forward(policy: nn.Module, critic: nn.Module | None, batch: PackedBatch, config: PPOConfig) -> PolicyOutputs:
    """Log-probs and entropies of the policy and values of the critic: one forward where they share a trunk."""
    options = dict(temperature=config.sampling.temperature, layout=config.model.layout, entropy=True)
    if critic is None or isinstance(critic, ValueHead):
        return policy_outputs(policy, batch, value_head=critic, **options)
    return replace(policy_outputs(policy, batch, **options), values=token_values(critic, batch))


def recall(rollout: Rollout, config: PPOConfig, function: Callable[[PackedBatch], PolicyOutputs]) -> list[Tensor]:
    """Log-probs, and values if there are any, (B, T) of the whole rollout, a micro-batch at a time."""
    outputs = [function(batch) for batch in rollout.packs(config.micro_batch_size or config.minibatch_size)]
    logprobs = torch.cat([output.logprobs for output in outputs])
    return [logprobs] if outputs[0].values is None else [logprobs, torch.cat([output.values for output in outputs])]


def shuffled_minibatches(num_rows: int, config: PPOConfig, step: int) -> Iterator[Tensor]:
    """Row numbers of each minibatch, every epoch in a new order."""
    for epoch in range(config.ppo_epochs):
        order = torch.randperm(num_rows, generator=generator(config.seed, "minibatches", step, epoch))
        yield from order.split(config.minibatch_size)


def load_critic(config: PPOConfig, policy: nn.Module) -> nn.Module:
    if config.value == "head":
        return ValueHead(policy.config.hidden_size).to(device_of(policy))
    source = config.model if config.value == "policy" else config.reward_model
    return load_value_model(source.path, device=config.device, **source.options())


def load_reward(config: PPOConfig, tokenizer: Any) -> Reward:
    if config.reward_function is not None:
        return function_reward(import_function(config.reward_function), tokenizer)
    if config.value == "reward" and not same_vocabulary(load_tokenizer(config.reward_model.path), tokenizer):
        raise ConfigError("value='reward': expected a reward model with the policy's own vocabulary")
    return load_model_reward(config.reward_model, tokenizer, device=config.device, end_unfinished=config.end_unfinished)


@torch.no_grad()
def evaluate(
    policy: nn.Module, reference: nn.Module, config: PPOConfig, rollout: Rollout, scores: Tensor
) -> dict[str, float]:
    """Mean score and KL to the reference, in nats a completion, on held-out prompts."""
    (logprobs,) = recall(rollout, config, lambda batch: forward(policy, None, batch, config))
    (ref_logprobs,) = recall(rollout, config, lambda batch: forward(reference, None, batch, config))
    return {"eval_score": scores.mean().item(), "eval_kl": (logprobs - ref_logprobs).sum(-1).mean().item()}
