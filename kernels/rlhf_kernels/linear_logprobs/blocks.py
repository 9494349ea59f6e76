"""Blocks of rows, checks and gradients that the operations on an LM head share. Each loops over blocks:

logits = hidden @ weight.T           a block of rows, in one buffer that all blocks use
block  -> log-probs, gradient        `torch_path` or `triton_kernel`, in place
d hidden = gradient @ weight;  d weight += gradient.T @ hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.common import real_dtype


class HeadOptions(NamedTuple):
    """z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature; no tanh where softcap is None."""

    temperature: float
    scale: float
    softcap: float | None

    @property
    def slope(self) -> float:
        """The derivative d z / d (hidden @ weight.T) without that of the tanh."""
        return self.scale / self.temperature


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """Raise ValueError unless hidden (M, H), weight (V, H) and bias (V,) fit, with one dtype and on one device."""
    for name, x in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight)):
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"{name} of shape {tuple(x.shape)} and {x.dtype}: expected a matrix of a floating dtype")
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{prefix}weight of shape {tuple(weight.shape)}: expected (V, {hidden.shape[1]}), V at least 1"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"{prefix}weight is {weight.dtype} on {weight.device}, {prefix}hidden {hidden.dtype} on {hidden.device}: "
            "expected the same"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != hidden.device):
        raise ValueError(
            f"{prefix}bias of shape {tuple(bias.shape)} on {bias.device}: expected ({weight.shape[0]},) on "
            f"{hidden.device}"
        )


def check_options(scale: float, softcap: float | None) -> None:
    """Raise ValueError for a scale that is not finite and a softcap that is not positive."""
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale={scale}: expected a finite number")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raise ValueError unless `targets` is (M,) int64."""
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype}: expected ({len(hidden)},) of torch.int64"
        )


def blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` rows that cover all rows."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class Gradients:
    """The gradients of hidden, weight and bias of one head, summed over blocks; empty where not wanted.

    Sums over blocks are in float32 whatever the dtype of the model.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]):
        self.inputs, self.wanted = (hidden, weight, bias), wanted
        wants_hidden, wants_weight, wants_bias = wanted
        real = real_dtype(hidden.dtype)
        self.hidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
        self.weight = weight.new_zeros(weight.shape if wants_weight else (0,), dtype=real)
        self.bias = weight.new_zeros(weight.shape[:1] if wants_bias else (0,), dtype=real)

    def add(self, rows: slice, gradient: Tensor, coefficients: Tensor | None) -> None:
        """Add a block: the gradient of its logits, (r, V), each row times its coefficient if there are any.

        The coefficients are applied to the small side of each product, the rows of d hidden and of hidden, which saves
        a pass over the block. For half precision they are applied before the block is rounded.
        """
        hidden, weight, _ = self.inputs
        wants_hidden, wants_weight, wants_bias = self.wanted
        hidden = hidden[rows]
        if wants_bias:
            if coefficients is not None:
                self.bias.addmv_(gradient.T, coefficients)
            else:
                self.bias += gradient.sum(0, dtype=self.bias.dtype)
        if gradient.dtype != hidden.dtype:
            scaled = gradient if coefficients is None else torch.mul(gradient, coefficients[:, None])
            gradient, coefficients = scaled.to(hidden.dtype), None
        if wants_hidden:
            torch.mm(gradient, weight, out=self.hidden[rows])
            if coefficients is not None:
                self.hidden[rows].mul_(coefficients[:, None])
        if wants_weight:
            if coefficients is not None:
                hidden = hidden * coefficients[:, None]
            if self.weight.dtype == gradient.dtype:
                self.weight.addmm_(gradient.T, hidden)
            elif gradient.is_cuda and torch.version.cuda:
                torch.addmm(self.weight, gradient.T, hidden, out_dtype=self.weight.dtype, out=self.weight)
            else:  # a product in half precision would round each block's part
                self.weight.addmm_(gradient.T.to(self.weight.dtype), hidden.to(self.weight.dtype))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden, weight and bias, in the dtypes of the inputs."""
        _, weight, bias = self.inputs
        return self.hidden, self.weight.to(weight.dtype), self.bias if bias is None else self.bias.to(bias.dtype)
