"""The reference of a run: loading it, and moving it (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656).

A moving reference follows the policy as an exponential moving average, or is made equal to it every few steps.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_core.config import ReferenceConfig, RunConfig, require
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.models.load import load_reference


def load_run_reference(
    config: RunConfig, settings: ReferenceConfig, policy: PreTrainedModel, tokenizer: Tokenizer
) -> PreTrainedModel:
    """Load the reference that the settings name, or the model to start from if they name none.

    Raises ValueError if its vocabulary is not the policy's.
    """
    path, options = settings.path, settings.options()
    if path is None:
        path, options = config.model.path, config.model.options()
    reference: PreTrainedModel = load_reference(
        path,
        policy=policy,
        policy_tokenizer=tokenizer,
        follows=settings.update != "none",
        device=config.device,
        quantize=config.quantize,
        **options,
    )
    return reference


def require_same_shape(reference: nn.Module, policy: nn.Module, settings: ReferenceConfig) -> None:
    """Raise ConfigError for a reference that cannot follow the policy: another architecture, or half precision."""
    ours, theirs = ({name: p.shape for name, p in model.named_parameters()} for model in (policy, reference))
    expected = "a reference of the policy's own architecture"
    require(ours == theirs, "reference.update", settings.update, expected)
    if settings.update == "ema" and settings.rate < 1:
        moved = [old for old, new in zip(reference.parameters(), policy.parameters(), strict=True) if old is not new]
        half = next((p.dtype for p in moved if torch.finfo(p.dtype).bits < 32), None)
        expected = f"sync, or a reference.dtype of float32: weights in {half} lose a moving average's small steps"
        require(half is None, "reference.update", "ema", expected)


def update_reference(reference: nn.Module, policy: nn.Module, step: int, settings: ReferenceConfig) -> None:
    """Move the reference after an optimizer step, as `settings.update` says, every `settings.every` steps."""
    if settings.update != "none" and step % settings.every == 0:
        move_towards(reference, policy, 1.0 if settings.update == "sync" else settings.rate)


@torch.no_grad()
def move_towards(reference: nn.Module, policy: nn.Module, rate: float) -> None:
    """Update every weight that the two models do not share: reference += rate (policy - reference)."""
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        if old is not new:
            old.lerp_(new.to(old.dtype), rate)
