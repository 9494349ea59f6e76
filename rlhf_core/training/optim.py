"""The optimizer, its schedule and the step, as functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from rlhf_core.config import OptimConfig


def build_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over every trainable parameter. Weight decay applies to matrices only, not to biases and norms."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One fused kernel over all parameters instead of a loop over each.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step 1, 2, ..., total_steps: a linear warm-up, then the schedule."""
    warmup = round(config.warmup_ratio * total_steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - 1 - warmup) / max(total_steps - warmup, 1)  # 0 at the first step after the warm-up
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_step(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total_steps: int
) -> dict[str, float]:
    """Clip the gradients, make the optimizer step and clear them. Return `grad_norm` (before clipping) and `lr`.

    With a norm that is not finite no step is made: one such batch must not write NaN into every weight.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    max_norm = float("inf") if config.max_grad_norm is None else config.max_grad_norm
    norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
    lr = learning_rate(config, step, total_steps)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, "lr": lr}
