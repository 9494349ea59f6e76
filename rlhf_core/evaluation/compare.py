"""`rlhf evaluate`: compare two models on the same prompts under one reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from rlhf_core.config import DataConfig, ModelConfig, SamplingConfig, ScoringConfig, require
from rlhf_core.data.loader import load_examples
from rlhf_core.data.records import Example
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.evaluation.win_rate import win_rate
from rlhf_core.models.forward import token_logprobs
from rlhf_core.models.load import freeze, load_policy, load_reference
from rlhf_core.rollout.engines import sample_completions
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.rewards import Reward, configured_reward, score_completions
from rlhf_core.seeding import generator


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringConfig):
    """Compare a model with a baseline: mean scores, KL to the baseline, and how often the model wins."""

    job: ClassVar[str] = "evaluate"
    common: ClassVar[tuple[str, ...]] = (
        "model", "baseline", "data", "reward_model", "reward_function", "checker", "output", "sampling.max_new_tokens",
        "sampling.temperature", "sampling.batch_size", "seed", "device",
    )  # fmt: skip

    model: ModelConfig
    """The model."""
    baseline: ModelConfig
    """The model to compare it with, usually the one that training started from."""
    data: DataConfig
    """Rows with prompts."""
    output: str | None = None
    """A JSON file for the results."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    seed: int = 0
    """Seed of the samples."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... None: a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refreshes = self.sampling.engine != "server" or self.sampling.server_refresh is not None
        require(refreshes, "sampling.server_refresh", None, "how the server gets one model, then the other")


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Compare the models of the config. Return the results of `compare`, after printing them as a table."""
    model, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    freeze(model)
    baseline = load_reference(
        config.baseline.path,
        policy=model,
        policy_tokenizer=tokenizer,
        device=config.device,
        **config.baseline.options(),
    )
    reward = configured_reward(config, tokenizer, device=config.device)
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
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    reward: Reward,
    sampling: SamplingConfig,
    *,
    seed: int,
) -> tuple[dict[str, float], tuple[Experience, Experience]]:
    """Sample one completion of each prompt from both models, and compare them.

    Returns:
        `score`, `baseline_score`: mean scores. `win_rate`: how often the model scores higher; a tie counts half.
        `kl`: KL(model || baseline) in nats per completion, estimated on the model's samples, with the log-probs of both
        at the sampling temperature (at 1 where that is 0); `kl_stderr`: its standard error over prompts. `length`: mean
        tokens of the model's completions. `prompts`: their number. `excluded`: prompts for which a completion got no
        score; they are not in the scores and the win rate. With several sources of reward, `reward/NAME` and
        `baseline_reward/NAME` are the means of each. And the samples of both models.

    Raises:
        ValueError: no prompt has two completions with a score.
    """
    prompts = [example.prompt for example in examples]
    samples = [
        sample_completions(policy, tokenizer, prompts, sampling, generator(seed, "evaluate"))
        for policy in (model, baseline)
    ]
    scores = [score_completions(reward, one, examples) for one in samples]
    both = scores[0].valid & scores[1].valid
    if not both.any():
        raise ValueError(f"no prompt of {len(examples)} has completions of both models that the reward gives a number")
    totals = [one.total[both] for one in scores]
    temperature = sampling.temperature or 1.0
    log_ratios = [
        token_logprobs(model, batch, temperature=temperature) - token_logprobs(baseline, batch, temperature=temperature)
        for batch in samples[0].packs(sampling.batch_size)
    ]
    divergence = torch.cat([log_ratio.sum(-1).cpu() for log_ratio in log_ratios])
    numbers = {
        "score": totals[0].mean().item(),
        "baseline_score": totals[1].mean().item(),
        "win_rate": win_rate(*totals),
        "kl": divergence.mean().item(),
        "kl_stderr": divergence.std(correction=0).item() / len(divergence) ** 0.5,
        "length": sum(map(len, samples[0].completions)) / len(examples),
        "prompts": len(examples),
        "excluded": int((~both).sum()),
    }
    if len(scores[0].components) > 1:
        for side, one in zip(("", "baseline_"), scores, strict=True):
            numbers |= {f"{side}reward/{name}": one.components[name][both].nanmean().item() for name in one.components}
    return numbers, (samples[0], samples[1])
