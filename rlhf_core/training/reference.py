"""A reference that moves: it follows the policy as a moving average, or is made equal to it now and then (TR-DPO,
Gorbatovski et al. 2024, arXiv:2404.09656; in PPO as well)."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import nn

from rlhf_core.config import require


class MovingReference(Protocol):
    """The settings of a job that has one."""

    reference_update: Literal["none", "ema", "sync"]
    reference_every: int
    reference_rate: float


def require_reference_settings(config: MovingReference) -> None:
    """ConfigError where they are out of range."""
    require(config.reference_every > 0, "reference_every", config.reference_every, "more than 0")
    require(0 <= config.reference_rate <= 1, "reference_rate", config.reference_rate, "between 0 and 1")


def require_same_shape(reference: nn.Module, policy: nn.Module, config: MovingReference) -> None:
    """ConfigError for a reference that cannot follow: one of another architecture, or without the policy's adapters."""
    ours, theirs = ({name: p.shape for name, p in model.named_parameters()} for model in (policy, reference))
    expected = "a reference of the policy's own architecture"
    require(ours == theirs, "reference_update", config.reference_update, expected)
    if config.reference_update == "ema" and config.reference_rate < 1:
        moved = [old for old, new in zip(reference.parameters(), policy.parameters(), strict=True) if old is not new]
        half = next((p.dtype for p in moved if torch.finfo(p.dtype).bits < 32), None)
        expected = f"sync, or a reference.dtype of float32: weights in {half} round a moving average's small steps away"
        require(half is None, "reference_update", "ema", expected)


def update_reference(reference: nn.Module, policy: nn.Module, step: int, config: MovingReference) -> None:
    """After an optimizer step: what `reference_update` says, every `reference_every` steps."""
    if config.reference_update != "none" and step % config.reference_every == 0:
        follow(reference, policy, 1.0 if config.reference_update == "sync" else config.reference_rate)


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, rate: float) -> None:
    """reference += rate (policy - reference), of every weight that they do not share; a rate of 1 is a copy."""
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        if old is not new:
            old.lerp_(new.to(old.dtype), rate)
