"""The torch implementation: tiles of rows that stay in the cache, with what the kind needs and no more."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from rlhf_kernels.common import LOG_ZERO, Place, clear_rows, read_tile, tile_buffers, tiles


def forward(
    policy: Tensor, reference: Tensor, temperature: float, kind: str, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (outer, inner) divergences of (outer, inner, V) rows, entropies (empty if not wanted), no statistics."""
    real = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    divergence = policy.new_zeros(policy.shape[:2], dtype=real)
    entropies = policy.new_zeros(policy.shape[:2] if entropy else 0, dtype=real)
    names = {"log_p", "log_q"} | ({"p"} if kind != "forward" or entropy else set())
    names |= {"q"} if kind != "reverse" else set()
    for place, tile in _distributions(policy, reference, None, temperature, real, names):
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
    return divergence, entropies, policy.new_empty(0, dtype=real)


def backward(
    policy: Tensor,
    reference: Tensor,
    out: Tensor,
    grad_divergence: Tensor,
    grad_entropies: Tensor | None,
    divergence: Tensor,
    entropies: Tensor,
    stats: Tensor,
    temperature: float,
    kind: str,
) -> None:
    """Write the gradient of the policy's logits into `out`, (outer, inner, V).

    With g the gradient of the divergence D, h that of the policy's entropy H, and everything over the temperature:

        reverse    g p_v (log(p_v / q_v) - D)
        forward    g (p_v - q_v)
        js         g p_v (log(p_v / m_v) - KL(p || m)) / 2

    minus h p_v (log p_v + H). A row whose g and h are 0 gets 0 and is not read.
    """
    live = grad_divergence != 0
    if grad_entropies is not None:
        live |= grad_entropies != 0
    clear_rows(out, live)
    names = {"p"} | ({"q"} if kind != "reverse" else set()) | ({"log_p", "log_q"} if kind != "forward" else set())
    names |= {"log_p"} if grad_entropies is not None else set()
    for place, tile in _distributions(policy, reference, live, temperature, grad_divergence.dtype, names):
        g, probs = grad_divergence[place][:, None] / temperature, tile["p"]
        if kind == "js":
            gap = _gap(probs, tile["log_p"], _log_mixture(tile))
            gradient = gap.sub_(torch.linalg.vecdot(probs, gap)[:, None]).mul_(probs).mul_(g / 2)
        elif kind == "reverse":
            gap = _gap(probs, tile["log_p"], tile["log_q"])
            gradient = gap.sub_(divergence[place][:, None]).mul_(probs).mul_(g)
        else:
            gradient = (probs - tile["q"]).mul_(g)
        if grad_entropies is not None:
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
) -> Iterator[tuple[Place, dict[str, Tensor]]]:
    """Yield each tile's log_p, p (of the policy) and log_q, q, (r, V), those in `names`; valid until the next tile."""
    logits, *buffers = tile_buffers(policy, 1 + len(names), real)
    for place in tiles(policy, live):
        tile = {}
        for rows, side in ((policy, "p"), (reference, "q")):
            x = read_tile(rows, place, temperature, logits)
            for name, buffer in zip(names, buffers, strict=True):
                if name in (side, f"log_{side}"):
                    function = torch.softmax if name == side else torch.log_softmax
                    tile[name] = function(x, -1, out=buffer[: len(x)])
        yield place, tile


def _log_mixture(tile: dict[str, Tensor]) -> Tensor:
    """Return log m, m = (p + q) / 2."""
    return torch.logaddexp(tile["log_p"], tile["log_q"]).sub_(math.log(2))


def _gap(probs: Tensor, logprobs: Tensor, others: Tensor) -> Tensor:
    """Return log p minus the logarithm of another distribution, and 0 where p is 0: 0 log 0 = 0."""
    return torch.sub(logprobs, others).masked_fill_(probs == 0, 0)
