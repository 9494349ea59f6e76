"""The torch path: tiles of rows that stay in the cache, with what the kind needs of the distributions and no more."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from rlhf_kernels.common import LOG_ZERO, clear_rows, read_tile, tile_buffers, tiles


def forward(
    policy: Tensor, reference: Tensor, mask: Tensor | None, temperature: float, kind: str, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(outer, inner) divergences of (outer, inner, V) rows, as many entropies (or none), no statistics."""
    real = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    divergence = policy.new_zeros(policy.shape[:2], dtype=real)
    entropies = policy.new_zeros(policy.shape[:2] if entropy else 0, dtype=real)
    names = {"log_p", "log_q"} | ({"p"} if kind != "forward" or entropy else set())
    names |= {"q"} if kind != "reverse" else set()
    for place, tile in _distributions(policy, reference, mask, temperature, real, names):
        if kind == "js":
            log_m = _log_mixture(tile)
            gaps = ((tile[side], _gap(tile[side], tile[f"log_{side}"], log_m)) for side in "pq")
            divergence[place] = sum(torch.linalg.vecdot(probs, gap) for probs, gap in gaps) / 2
        else:
            first, second = "pq" if kind == "reverse" else "qp"
            gap = _gap(tile[first], tile[f"log_{first}"], tile[f"log_{second}"])
            divergence[place] = torch.linalg.vecdot(tile[first], gap)
        if entropy:
            entropies[place] = -torch.linalg.vecdot(tile["p"], tile["log_p"].clamp_(min=LOG_ZERO))
    if mask is not None:
        divergence.masked_fill_(~mask, 0)
        if entropy:
            entropies.masked_fill_(~mask, 0)
    return divergence, entropies, policy.new_empty(0, dtype=real)


def backward(
    policy: Tensor,
    reference: Tensor,
    grad_policy: Tensor,
    grad_reference: Tensor | None,
    grad_divergence: Tensor,
    grad_entropies: Tensor | None,
    mask: Tensor | None,
    divergence: Tensor,
    entropies: Tensor,
    stats: Tensor,
    temperature: float,
    kind: str,
) -> None:
    """Writes the gradients to both sides' logits, (outer, inner, V) like the rows, the reference's where it is wanted.

    With g the gradient to the divergence D, h that to the policy's entropy H, and everything over the temperature:

        kind       d / dpolicy_v                     d / dreference_v
        reverse    g p_v (log(p_v / q_v) - D)        g (q_v - p_v)
        forward    g (p_v - q_v)                     g q_v (log(q_v / p_v) - D)
        js         g p_v (log(p_v / m_v) - A) / 2    g q_v (log(q_v / m_v) - B) / 2

    with A = KL(p || m), B = KL(q || m); and the policy's has - h p_v (log p_v + H) besides. A row outside the mask, or
    whose g and h are 0, gets 0 and is not read.
    """
    live = grad_divergence != 0
    if grad_entropies is not None:
        live |= grad_entropies != 0
    if mask is not None:
        live &= mask
    outputs = [out for out in (grad_policy, grad_reference) if out is not None]
    for out in outputs:
        clear_rows(out, live)
    names = {"p"} | ({"q"} if kind != "reverse" or grad_reference is not None else set())
    names |= {"log_p", "log_q"} if kind != "forward" or grad_reference is not None else set()
    names |= {"log_p"} if grad_entropies is not None else set()
    for place, tile in _distributions(policy, reference, live, temperature, grad_divergence.dtype, names):
        g, log_m = grad_divergence[place][:, None] / temperature, _log_mixture(tile) if kind == "js" else None
        for out, side, other in zip(outputs, "pq", "qp", strict=False):
            probs = tile[side]
            if kind == "js":
                gap = _gap(probs, tile[f"log_{side}"], log_m)
                gradient = gap.sub_(torch.linalg.vecdot(probs, gap)[:, None]).mul_(probs).mul_(g / 2)
            elif (kind == "reverse") == (side == "p"):
                gap = _gap(probs, tile[f"log_{side}"], tile[f"log_{other}"])
                gradient = gap.sub_(divergence[place][:, None]).mul_(probs).mul_(g)
            else:
                gradient = (probs - tile[other]).mul_(g)
            if side == "p" and grad_entropies is not None:
                surplus = tile["log_p"].clamp(min=LOG_ZERO).add_(entropies[place][:, None]).mul_(probs)
                gradient.sub_(surplus.mul_(grad_entropies[place][:, None] / temperature))
            if policy.device.type != "cpu":
                gradient.masked_fill_(~live[place][:, None], 0)
            out[place] = gradient.to(out.dtype)


def _distributions(
    policy: Tensor,
    reference: Tensor,
    live: Tensor | None,
    temperature: float,
    real: torch.dtype,
    names: Collection[str],
) -> Iterator[tuple[tuple, dict[str, Tensor]]]:
    """Tile by tile, those named of log_p, p (the policy's) and log_q, q, each (r, V), until the next tile comes."""
    logits, *buffers = tile_buffers(policy, 1 + len(names), real)
    for place in tiles(policy, live):
        tile = {}
        for rows, side in ((policy, "p"), (reference, "q")):
            x = read_tile(rows, place, temperature, None, logits)
            for name, buffer in zip(names, buffers, strict=True):
                if name in (side, f"log_{side}"):
                    function = torch.softmax if name == side else torch.log_softmax
                    tile[name] = function(x, -1, out=buffer[: len(x)])
        yield place, tile


def _log_mixture(tile: dict[str, Tensor]) -> Tensor:
    """log m, m = (p + q) / 2."""
    return torch.logaddexp(tile["log_p"], tile["log_q"]).sub_(math.log(2))


def _gap(probs: Tensor, logprobs: Tensor, others: Tensor) -> Tensor:
    """How far log p is above another distribution's logarithm, and 0 where p is: 0 log 0 = 0."""
    return torch.sub(logprobs, others).masked_fill_(probs == 0, 0)
