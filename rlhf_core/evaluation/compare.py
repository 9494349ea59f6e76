"""`rlhf evaluate`: two models on the same prompts under one reward."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_core.config import ConfigError, DataConfig, ModelConfig, SamplingConfig, Settings
from rlhf_core.data.loader import load_examples
from rlhf_core.data.tokenize import Example, stop_ids
from rlhf_core.evaluation.win_rate import win_rate
from rlhf_core.models.forward import token_logprobs
from rlhf_core.models.load import freeze, load_policy, load_reference
from rlhf_core.plugins import import_function
from rlhf_core.rollout.rewards import Reward, function_reward, load_model_reward
from rlhf_core.rollout.sampling import Rollout, sample
from rlhf_core.seeding import generator


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Compare a model with a baseline: mean scores, KL to the baseline, and how often the model wins."""

    model: ModelConfig
    """The model."""
    baseline: ModelConfig
    """The model it is compared with, usually the one it started from."""
    data: DataConfig
    """Rows with prompts."""
    reward_model: ModelConfig | None = None
    """The reward model that scores both."""
    reward_function: str | None = None
    """module:function, called with lists of prompts, completions and data rows; returns their scores."""
    end_unfinished: bool = False
    """Score a completion that was cut off as if its end token had followed, as in all that a reward model has seen."""
    output: str | None = None
    """A JSON file for the numbers."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    seed: int = 0
    """Same seed, same completions."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        if (self.reward_model is None) == (self.reward_function is None):
            raise ConfigError("reward_model, reward_function: expected one of the two")


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """The numbers, also printed as a small table."""
    model, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    freeze(model)
    baseline = load_reference(
        config.baseline.path, policy_tokenizer=tokenizer, device=config.device, **config.baseline.options()
    )
    if config.reward_function is not None:
        reward = function_reward(import_function(config.reward_function), tokenizer)
    else:
        reward = load_model_reward(
            config.reward_model, tokenizer, device=config.device, end_unfinished=config.end_unfinished
        )
    examples = load_examples(
        config.data, tokenizer, need="prompts", model=model, reserve=config.sampling.max_new_tokens
    )
    numbers, _ = compare(model, baseline, examples, tokenizer, reward, config.sampling, seed=config.seed)
    width = max(map(len, numbers))
    print("\n".join(f"{name:<{width}}  {value:.4g}" for name, value in numbers.items()))
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


@torch.no_grad()
def compare(
    model: nn.Module,
    baseline: nn.Module,
    examples: list[Example],
    tokenizer: Any,
    reward: Reward,
    sampling: SamplingConfig,
    *,
    seed: int,
) -> tuple[dict[str, float], tuple[Rollout, Rollout]]:
    """One completion of each prompt by both: `score`, `baseline_score`, `win_rate` (a tie counts half), and `kl`.

    `kl` is KL(model || baseline) in nats a completion, estimated on the model's own samples, both at the temperature
    they are sampled with (at temperature 0, at 1); `kl_stderr` its standard error over prompts.
    """
    rollouts, scores = [], []
    for policy in (model, baseline):
        rollout = sample(
            policy,
            [example.prompt for example in examples],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            batch_size=sampling.batch_size,
            stop_ids=stop_ids(tokenizer, policy.generation_config),
            generator=generator(seed, "evaluate"),
        )
        rollouts.append(rollout)
        scores.append(reward(rollout.prompts, rollout.completions, [example.record.row for example in examples]))
    options = dict(temperature=sampling.temperature or 1.0)
    divergence = torch.cat(
        [
            (token_logprobs(model, batch, **options) - token_logprobs(baseline, batch, **options)).sum(-1).cpu()
            for batch in rollouts[0].packs(sampling.batch_size)
        ]
    )
    numbers = {
        "score": scores[0].mean().item(),
        "baseline_score": scores[1].mean().item(),
        "win_rate": win_rate(*scores),
        "kl": divergence.mean().item(),
        "kl_stderr": divergence.std(correction=0).item() / len(divergence) ** 0.5,
        "length": sum(map(len, rollouts[0].completions)) / len(examples),
        "prompts": len(examples),
    }
    return numbers, (rollouts[0], rollouts[1])
