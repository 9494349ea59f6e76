"""The critic: a head on the policy's trunk, which saw the decoding, or a trunk of its own, which did not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.config import OnPolicyConfig
from rlhf_core.models.forward import device_of, find_route, last_states, sequence_scores, token_values
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import load_value_model, without_dropout
from rlhf_core.rollout.sampling import Rollout


def load_critic(config: Any, policy: nn.Module) -> nn.Module:
    """What the settings `value`, `model`, `reward_model` and `device` name, on the policy's device."""
    if config.value == "head":
        return ValueHead(policy.config.hidden_size).to(device_of(policy))
    source = config.model if config.value == "policy" else config.reward_model
    options = dict(lora=config.lora, quantize=config.quantize, seed=config.seed, **source.options())
    return without_dropout(load_value_model(source.path, policy=policy, device=config.device, **options))


def trunk_values(critic: nn.Module, rollout: Rollout, config: OnPolicyConfig) -> Tensor:
    """(B, T) values of a critic with a trunk of its own, which saw nothing of the decoding."""
    with torch.no_grad():
        packs = rollout.packs(config.micro_batch_size or config.minibatch_size)
        return torch.cat([token_values(critic, batch) for batch in packs])


@torch.no_grad()
def end_values(policy: nn.Module, critic: nn.Module, rollout: Rollout, config: OnPolicyConfig) -> Tensor:
    """(B,) the critic's value of the state after the last token of a completion that was cut off, 0 of the others."""
    values = torch.zeros(len(rollout.completions), device=device_of(policy))
    for rows in (~rollout.finished).nonzero().flatten().split(config.micro_batch_size or config.minibatch_size):
        batch = rollout.pack(rows.tolist()).to(values.device)
        if isinstance(critic, ValueHead):
            values[rows] = critic(last_states(policy, batch, find_route(policy, config.model.layout)))
        else:
            values[rows] = sequence_scores(critic, batch)
    return values
