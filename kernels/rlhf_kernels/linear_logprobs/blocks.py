"""The loop over blocks of rows that every linear op here is made of, and what a block needs from its head.

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
        """d z / d (hidden @ weight.T), but for the tanh."""
        return self.scale / self.temperature


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """Raises ValueError unless hidden (M, H), weight (V, H) and bias (V,) make a head of one dtype on one device."""
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
    """Raises ValueError for what `HeadOptions` cannot mean."""
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale={scale}: expected a finite number")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")


def live_rows(mask: Tensor | None, *per_row: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
    """The rows of the mask as indices, and the tensors cut down to them; everything as it is where mask is None."""
    if mask is None:
        return None, list(per_row)
    index = mask.nonzero().squeeze(-1)
    return index, [None if x is None else x.index_select(0, index) for x in per_row]


def all_rows(index: Tensor | None, x: Tensor, num_rows: int) -> Tensor:
    """Undoes `live_rows`: rows of x put back among zeros."""
    return x if index is None else x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, index, x)


def blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover them all."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class Gradients:
    """d hidden, d weight and d bias of one head, gathered block by block; a part that is not wanted stays empty.

    Sums over many blocks are kept in float32 whatever the model's dtype.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]):
        self.inputs, self.wanted = (hidden, weight, bias), wanted
        wants_hidden, wants_weight, wants_bias = wanted
        real = real_dtype(hidden.dtype)
        self.hidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
        self.weight = weight.new_zeros(weight.shape if wants_weight else (0,), dtype=real)
        self.bias = weight.new_zeros(weight.shape[:1] if wants_bias else (0,), dtype=real)

    def add(self, rows: slice, gradient: Tensor, coefficients: Tensor | None) -> None:
        """Of loss to logits, a block: gradient (r, V), each row of it times its coefficient where there are any.

        The coefficients go to the small side of each product, d hidden's rows and the hidden rows, which spares a pass
        over the block. Where the model is of half precision they are multiplied in before the block is rounded to it.
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
            gradient, coefficients = torch.mul(gradient, coefficients[:, None]).to(hidden.dtype), None
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
            else:  # a product in half precision would round every block's share
                self.weight.addmm_(gradient.T.to(self.weight.dtype), hidden.to(self.weight.dtype))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """d hidden, d weight, d bias, in the dtypes of their inputs."""
        _, weight, bias = self.inputs
        return self.hidden, self.weight.to(weight.dtype), self.bias if bias is None else self.bias.to(bias.dtype)
