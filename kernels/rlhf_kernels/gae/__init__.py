"""Generalised advantage estimation over ragged rows, with optional whitening."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.gae.reference import common_dtype
from rlhf_kernels.registry import choose, implementation

__all__ = ["gae"]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t  = r_t + gamma * V_{t+1} - V_t
        A_t      = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t

    Here t + 1 is the next True token of the row: holes in the mask are skipped.

    Args:
        rewards: (B, T).
        values: (B, T); values[:, t] is that of the state before token t.
        mask: (B, T) bool, any layout.
        gamma, lam: 0 to 1.
        bootstrap: (B,) value of the state after the last True token; None is 0, the end of an episode.
        whiten: scale the advantages to mean 0 and (biased) variance 1 over the mask.
        impl: "auto", "torch" or "triton"; see `rlhf_kernels.registry`.

    Returns:
        Advantages and returns, (B, T) float32 (float64 where an input is), 0 outside the mask, where the inputs are not
        read. They have no derivative.

    Raises:
        ValueError: for gamma or lam outside 0 to 1, and for shapes that do not agree.
        RuntimeError: for an `impl` that cannot run here, and for a derivative.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: expected 0 to 1")
    if rewards.ndim != 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: expected (B, T)")
    for name, tensor in (("values", values), ("mask", mask)):
        if tensor.shape != rewards.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected that of rewards, {tuple(rewards.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask of dtype {mask.dtype}: expected bool")
    if bootstrap is not None and bootstrap.shape != rewards.shape[:1]:
        raise ValueError(
            f"bootstrap of shape {tuple(bootstrap.shape)}: expected one value a row, {tuple(rewards.shape[:1])}"
        )
    impl = choose("gae", rewards.device, impl)
    advantages, returns = _gae(rewards, values, mask, bootstrap, float(gamma), float(lam), whiten, impl)
    return advantages, returns


@torch.library.custom_op("rlhf_kernels::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    advantages, returns = implementation("gae", impl).gae(
        rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap, whiten=whiten
    )
    return advantages, returns


@_gae.register_fake
def _(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    advantages = rewards.new_empty(rewards.shape, dtype=common_dtype(rewards, values, bootstrap))
    return advantages, torch.empty_like(advantages)


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("gae has no derivative; use rlhf_kernels.gae.reference.gae for one")


_gae.register_autograd(_refuse)
