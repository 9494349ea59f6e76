"""`rlhf evaluate`: two models on the same prompts under one reward."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_core.config import DataConfig, ModelConfig, SamplingConfig, ScoringConfig, require
from rlhf_core.data.loader import load_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.evaluation.win_rate import win_rate
from rlhf_core.models.forward import token_logprobs
from rlhf_core.models.load import freeze, load_policy, load_reference
from rlhf_core.rollout.rewards import Reward
from rlhf_core.rollout.sampling import Rollout
from rlhf_core.rollout.steps import load_reward, roll_out, score
from rlhf_core.seeding import generator


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringConfig):
    """Compare a model with a baseline: mean scores, KL to the baseline, and how often the model wins."""

    model: ModelConfig
    """The model."""
    baseline: ModelConfig
    """The model it is compared with, usually the one it started from."""
    data: DataConfig
    """Rows with prompts."""
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
        one = self.sampling.engine == "server" and self.sampling.server_refresh is None
        require(not one, "sampling.server_refresh", None, "how the server gets one model, then the other")


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """The numbers, also printed as a small table."""
    model, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    freeze(model)
    baseline = load_reference(
        config.baseline.path,
        policy=model,
        policy_tokenizer=tokenizer,
        device=config.device,
        **config.baseline.options(),
    )
    reward = load_reward(config, tokenizer)
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

    Of several sources of reward there is also the mean of each, as `reward/NAME` and `baseline_reward/NAME`. A prompt
    of which a completion gets no number (None) takes no part in scores and win rate, and `excluded` counts it.

    `kl` is KL(model || baseline) in nats a completion, estimated on the model's own samples, both at the temperature
    they are sampled with (at temperature 0, at 1); `kl_stderr` its standard error over prompts.
    """
    rollouts, scores = [], []
    for policy in (model, baseline):
        prompts = [example.prompt for example in examples]
        rollout = roll_out(policy, tokenizer, prompts, sampling, generator(seed, "evaluate"))
        rollouts.append(rollout)
        scores.append(score(reward, rollout, examples))
    both = scores[0].valid & scores[1].valid
    if not both.any():
        raise ValueError(f"no prompt of {len(examples)} has completions of both models that the reward gives a number")
    totals = [one.total[both] for one in scores]
    options = dict(temperature=sampling.temperature or 1.0)
    divergence = torch.cat(
        [
            (token_logprobs(model, batch, **options) - token_logprobs(baseline, batch, **options)).sum(-1).cpu()
            for batch in rollouts[0].packs(sampling.batch_size)
        ]
    )
    numbers = {
        "score": totals[0].mean().item(),
        "baseline_score": totals[1].mean().item(),
        "win_rate": win_rate(*totals),
        "kl": divergence.mean().item(),
        "kl_stderr": divergence.std(correction=0).item() / len(divergence) ** 0.5,
        "length": sum(map(len, rollouts[0].completions)) / len(examples),
        "prompts": len(examples),
        "excluded": int((~both).sum()),
    }
    if len(scores[0].components) > 1:
        for side, one in zip(("", "baseline_"), scores, strict=True):
            numbers |= {f"{side}reward/{name}": one.components[name][both].nanmean().item() for name in one.components}
    return numbers, (rollouts[0], rollouts[1])
