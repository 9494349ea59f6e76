"""What several ops share on the way in and out: rows of any layout, scalars, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a tile of rows. On the CPU 2 MiB of float32 a thread, which its cache keeps between the passes over it.
_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 26

# In place of log 0 = -inf where it is multiplied by 0. The exponential of anything lower is 0, in float64 too.
LOG_ZERO = -1e4


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and what is returned: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_logits(logits: Tensor, *, name: str = "logits") -> None:
    """Raises ValueError unless `logits` is a floating (..., V) tensor with V at least 1."""
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} of shape {tuple(logits.shape)}: expected (..., V) with V at least 1")
    if not logits.is_floating_point():
        raise ValueError(f"{name}.dtype={logits.dtype}: expected a floating dtype")


def check_rows(rows: Tensor, logits: Tensor, dtype: torch.dtype, *, name: str) -> None:
    """Raises ValueError unless `rows` holds one `dtype` for each row of (..., V) logits, beside them."""
    if rows.shape != logits.shape[:-1]:
        raise ValueError(f"{name} of shape {tuple(rows.shape)}: expected {tuple(logits.shape[:-1])}, one for each row")
    if rows.dtype != dtype:
        raise ValueError(f"{name}.dtype={rows.dtype}: expected {dtype}")
    if rows.device != logits.device:
        raise ValueError(f"{name} is on {rows.device}, the logits on {logits.device}")


def host_scalar(value: float, *, name: str) -> Tensor:
    """A positive float as a float64 scalar tensor on the CPU, read there without waiting for any device.

    A product and not torch.tensor: dynamo then traces the number as an input, where it would compile a float argument
    of an op anew for each value. Raises ValueError for a number that is not above 0.
    """
    if not value > 0:
        raise ValueError(f"{name}={value}: expected more than 0")
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """(..., V) tensors of one shape as (outer, inner, V) with common outer and inner: views wherever strides allow.

    One stride is enough for contiguous logits; two hold logits[:, :-1], whose rows are not evenly spaced. Anything
    stranger is copied.
    """
    *leading, vocabulary = tensors[0].shape
    for split in range(len(leading) + 1):
        shape = (math.prod(leading[:split]), math.prod(leading[split:]), vocabulary)
        try:
            return [tensor.view(shape) for tensor in tensors]
        except RuntimeError:  # not a view of these strides
            continue
    return [tensor.reshape(1, math.prod(leading), vocabulary) for tensor in tensors]


def rowwise(rows: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """(...) tensors, one number a row, as contiguous (outer, inner) ones. None, and (0,) for none, stay as they are."""
    count = rows.shape[0] * rows.shape[1]
    return [x if x is None or x.numel() != count else x.reshape(rows.shape[:2]).contiguous() for x in tensors]


def tile_rows(rows: Tensor) -> int:
    """Rows of (outer, inner, V) that a tile holds."""
    size = _CPU_TILE * torch.get_num_threads() if rows.device.type == "cpu" else _GPU_TILE
    return max(1, min(rows.shape[0] * rows.shape[1], size // rows.shape[2]))


def tiles(rows: Tensor, live: Tensor | None) -> Iterator[tuple[int, slice | Tensor]]:
    """Indices that cut (outer, inner, V) rows, or (outer, inner) tensors, into tiles of at most `tile_rows(rows)` rows.

    Args:
        live: (outer, inner) bool, the rows that count, or None for all. On the CPU the others are left out, and the
            index is one of row numbers, not a slice; elsewhere that would need to wait for the device, so they come
            along and the caller masks what they give.
    """
    outer, inner, _ = rows.shape
    size = tile_rows(rows)
    everything = live is None or live.device.type != "cpu" or bool(live.all())
    for first in range(outer):
        if everything:
            yield from ((first, slice(start, min(start + size, inner))) for start in range(0, inner, size))
        elif len(numbers := live[first].nonzero().squeeze(-1)):
            yield from ((first, part) for part in numbers.split(size))


def clear_rows(out: Tensor, live: Tensor) -> None:
    """Zeroes the rows of (outer, inner, V) that `tiles` leaves out."""
    if live.device.type == "cpu":
        outer, inner = (~live).nonzero(as_tuple=True)  # by their numbers: a mask would pass over all of `out`
        if len(outer):
            out[outer, inner] = 0


def tile_buffers(rows: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Space for `count` tiles of `dtype`, (tile_rows, V) each. Memory that is never written to costs nothing."""
    return [rows.new_empty((tile_rows(rows), rows.shape[2]), dtype=dtype) for _ in range(count)]


def read_tile(
    rows: Tensor, place: tuple[int, slice | Tensor], temperature: float, softcap: float | None, buffer: Tensor
) -> Tensor:
    """A tile of softcap * tanh(rows / softcap) / temperature, (r, V) in the buffer's dtype.

    It is a view of the rows where that is what they hold, else lies in buffer[:r].
    """
    first, part = place
    if isinstance(part, slice):
        x = rows[first, part]
        if softcap is None and temperature == 1.0 and x.dtype == buffer.dtype:
            return x
        x = buffer[: len(x)].copy_(x)
    elif rows.dtype == buffer.dtype:
        x = torch.index_select(rows[first], 0, part, out=buffer[: len(part)])
    else:
        x = buffer[: len(part)].copy_(rows[first].index_select(0, part))
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x if temperature == 1.0 else x.div_(temperature)


def capped_slope(x: Tensor, temperature: float, softcap: float) -> Tensor:
    """1 - tanh^2(logits / softcap), the slope of the softcap, in the place of the `x` that `read_tile` made of them."""
    return x.mul_(temperature / softcap).square_().neg_().add_(1)


def refuse_second_derivative(backward_op, name: str) -> None:
    """Makes differentiating `backward_op` raise a RuntimeError that says where a second derivative is to be had."""

    def refuse(ctx, *gradients):
        raise RuntimeError(f"{name} has no second derivative; use {name}.reference.{name} for one")

    backward_op.register_autograd(refuse)
