"""The critic: a value head on the policy's trunk, or a model with a trunk of its own."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.config import ConfigError, ModelConfig, ValueConfig
from rlhf_core.models.forward import device_of, last_states, sequence_scores, token_values
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import load_tokenizer, load_value_model, same_vocabulary, save_model, without_dropout
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.online import OnlineRun

Critic: TypeAlias = "ValueHead | PreTrainedModel"


def load_critic(run: OnlineRun[Any], value: ValueConfig) -> Critic:
    """Load the critic that the settings name, on the policy's device, and add it to the run.

    Raises ConfigError for a reward model with another vocabulary than the policy's.
    """
    config = run.config
    if value.model == "head":
        head = ValueHead(run.policy.config.hidden_size).to(run.device)
        return run.add_model("critic", head, write=head.save)
    source: ModelConfig | None = config.model if value.model == "policy" else config.reward_model
    assert source is not None
    critic = load_value_model(
        source.path,
        policy=run.policy,
        device=config.device,
        lora=config.lora,
        quantize=config.quantize,
        seed=config.seed,
        **source.options(),
    )
    if value.model == "reward" and not same_vocabulary(load_tokenizer(source.path), run.tokenizer):
        raise ConfigError("value.model='reward': expected a reward model with the policy's own vocabulary")
    return run.add_model(
        "critic",
        without_dropout(critic),
        write=lambda folder: save_model(folder / "value_model", critic, run.tokenizer),
    )


@torch.no_grad()
def critic_values(critic: PreTrainedModel, experience: Experience, micro_batch_size: int) -> Tensor:
    """Return the values, (B, T), of a critic with a trunk of its own."""
    return torch.cat([token_values(critic, batch) for batch in experience.packs(micro_batch_size)])


@torch.no_grad()
def end_values(policy: nn.Module, critic: Critic, experience: Experience, micro_batch_size: int) -> Tensor:
    """Return (B,) the critic's value of the state after the last token of a truncated completion, 0 for the others."""
    values = torch.zeros(len(experience), device=device_of(policy))
    truncated = (~experience.finished).nonzero().flatten()
    for rows in truncated.split(micro_batch_size) if len(truncated) else ():
        batch = experience.select(rows).trimmed().pack().to(values.device)
        if isinstance(critic, ValueHead):
            values[rows] = critic(last_states(policy, batch))
        else:
            values[rows] = sequence_scores(critic, batch)
    return values
