"""Checks, views and tiles of rows that several operations use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of a tile of rows. On the CPU that is 2 MiB of float32 per thread, so that a tile stays in the cache while
# several passes read it.
_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 26

# Replaces log 0 = -inf where it is multiplied by 0. The exponential of anything lower is 0, in float64 too.
LOG_ZERO = -1e4

KL_KINDS = ("reverse", "forward", "js")

Place = tuple[int, slice | Tensor]
"""The index of a tile of (outer, inner) rows: an outer index, and a slice of the inner rows or their numbers."""


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of computations and results: float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_logits(logits: Tensor, *, name: str = "logits") -> None:
    """Raise ValueError unless `logits` is a floating (..., V) tensor with V at least 1."""
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} of shape {tuple(logits.shape)}: expected (..., V) with V at least 1")
    if not logits.is_floating_point():
        raise ValueError(f"{name}.dtype={logits.dtype}: expected a floating dtype")


def check_rows(rows: Tensor, logits: Tensor, dtype: torch.dtype, *, name: str) -> None:
    """Raise ValueError unless `rows` has one `dtype` number for each row of (..., V) logits, on their device."""
    if rows.shape != logits.shape[:-1]:
        raise ValueError(f"{name} of shape {tuple(rows.shape)}: expected {tuple(logits.shape[:-1])}, one for each row")
    if rows.dtype != dtype:
        raise ValueError(f"{name}.dtype={rows.dtype}: expected {dtype}")
    if rows.device != logits.device:
        raise ValueError(f"{name} is on {rows.device}, the logits on {logits.device}: expected one device")


def check_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind of divergence."""
    if kind not in KL_KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KL_KINDS)}")


def host_scalar(value: float, *, name: str) -> Tensor:
    """Return a positive number as a float64 scalar tensor on the CPU, which is read without a device synchronization.

    A product and not torch.tensor: dynamo then traces the number as an input. A float argument of an op would be
    compiled again for each value.

    Raises:
        ValueError: for a number that is not above 0.
    """
    if not value > 0:
        raise ValueError(f"{name}={value}: expected more than 0")
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """Return (..., V) tensors of one shape as (outer, inner, V) with common outer and inner; views where possible.

    One leading stride is enough for contiguous logits, two for logits[:, :-1], whose rows are not evenly spaced. Any
    other strides are copied.
    """
    *leading, vocabulary = tensors[0].shape
    for split in range(len(leading) + 1):
        shape = (math.prod(leading[:split]), math.prod(leading[split:]), vocabulary)
        try:
            return [tensor.view(shape) for tensor in tensors]
        except RuntimeError:  # these strides have no such view
            continue
    return [tensor.reshape(1, math.prod(leading), vocabulary) for tensor in tensors]


def rowwise(rows: Tensor, x: Tensor) -> Tensor:
    """Return a (...) tensor of one number per row as a contiguous (outer, inner) one; an empty (0,) as it is."""
    count = rows.shape[0] * rows.shape[1]
    return x.reshape(rows.shape[:2]).contiguous() if x.numel() == count else x


def rowwise_or_none(rows: Tensor, x: Tensor | None) -> Tensor | None:
    """Return `rowwise(rows, x)`, or None for None."""
    return None if x is None else rowwise(rows, x)


def tile_rows(rows: Tensor) -> int:
    """Return the number of rows of (outer, inner, V) in a tile."""
    size = _CPU_TILE * torch.get_num_threads() if rows.device.type == "cpu" else _GPU_TILE
    return max(1, min(rows.shape[0] * rows.shape[1], size // rows.shape[2]))


def tiles(rows: Tensor, live: Tensor | None) -> Iterator[Place]:
    """Yield indices that split (outer, inner, V) rows, or (outer, inner) tensors, into tiles of `tile_rows` rows.

    Args:
        live: (outer, inner) bool, the rows to include, or None for all. On the CPU the other rows are left out and the
            index holds row numbers instead of a slice. On a GPU that would need a device synchronization, so all rows
            are included and the caller masks the results.
    """
    outer, inner, _ = rows.shape
    size = tile_rows(rows)
    everything = live is None or live.device.type != "cpu" or bool(live.all())
    for first in range(outer):
        if live is None or everything:
            yield from ((first, slice(start, min(start + size, inner))) for start in range(0, inner, size))
        elif len(numbers := live[first].nonzero().squeeze(-1)):
            yield from ((first, part) for part in numbers.split(size))


def clear_rows(out: Tensor, live: Tensor) -> None:
    """Set the rows of (outer, inner, V) that `tiles` leaves out to 0."""
    if live.device.type == "cpu":
        outer, inner = (~live).nonzero(as_tuple=True)  # by number: a mask would pass over all of `out`
        if len(outer):
            out[outer, inner] = 0


def tile_buffers(rows: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Allocate `count` tiles of `dtype`, (tile_rows, V) each. Pages that are never written take no memory."""
    return [rows.new_empty((tile_rows(rows), rows.shape[2]), dtype=dtype) for _ in range(count)]


def read_tile(rows: Tensor, place: Place, temperature: float, buffer: Tensor) -> Tensor:
    """Return a tile of rows / temperature, (r, V) in the dtype of `buffer`.

    It is a view of `rows` where no conversion is needed, otherwise of `buffer`.
    """
    first, part = place
    if isinstance(part, slice):
        x = rows[first, part]
        if temperature == 1.0 and x.dtype == buffer.dtype:
            return x
        x = buffer[: len(x)].copy_(x)
    elif rows.dtype == buffer.dtype:
        x = torch.index_select(rows[first], 0, part, out=buffer[: len(part)])
    else:
        x = buffer[: len(part)].copy_(rows[first].index_select(0, part))
    return x if temperature == 1.0 else x.div_(temperature)


def refuse_second_derivative(backward_op: Any, name: str) -> None:
    """Make differentiating `backward_op` raise a RuntimeError that names the differentiable reference of op `name`."""

    def refuse(ctx: Any, *gradients: Tensor | None) -> None:
        raise RuntimeError(f"{name} has no second derivative; use {name}.reference.{name} for one")

    backward_op.register_autograd(refuse)
