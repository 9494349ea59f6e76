"""The torch implementation: tiles of rows that stay in the cache, so that log_softmax writes no new memory."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.common import LOG_ZERO, clear_rows, read_tile, real_dtype, tile_buffers, tiles


def forward(
    rows: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (outer, inner) log-probs of (outer, inner, V) rows, entropies (empty if not wanted), no statistics."""
    real = real_dtype(rows.dtype)
    logprobs = rows.new_zeros(rows.shape[:2], dtype=real)
    entropies = rows.new_zeros(rows.shape[:2] if entropy else 0, dtype=real)
    logits, tile, probs = tile_buffers(rows, 3, real)
    if mask is not None:
        targets = torch.where(mask, targets, 0)
    for place in tiles(rows, mask):
        x = read_tile(rows, place, temperature, logits)
        all_logprobs = torch.log_softmax(x, -1, out=tile[: len(x)])
        logprobs[place] = all_logprobs.gather(-1, targets[place][:, None]).squeeze(-1)
        if entropy:
            torch.softmax(x, -1, out=probs[: len(x)])
            entropies[place] = -torch.linalg.vecdot(probs[: len(x)], all_logprobs.clamp_(min=LOG_ZERO))
    if mask is not None:
        logprobs.masked_fill_(~mask, 0)
        if entropy:
            entropies.masked_fill_(~mask, 0)
    return logprobs, entropies, rows.new_empty(0, dtype=real)


def backward(
    rows: Tensor,
    out: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    entropies: Tensor,
    stats: Tensor,
    temperature: float,
) -> None:
    """Write the gradient of the logits into `out`, (outer, inner, V) like the rows, or the rows themselves.

    With z = logits / temperature, p = softmax(z), H the entropy, g and h the gradients of log-prob and entropy:

        d / dz_v = g (1[v = target] - p_v) - h p_v (log p_v + H)

    A row outside the mask, or whose g and h are 0, gets 0 and is not read.
    """
    live = grad_logprobs != 0
    if grad_entropies is not None:
        live |= grad_entropies != 0
    if mask is not None:
        live &= mask
        targets = torch.where(mask, targets, 0)
    clear_rows(out, live)
    logits, tile, weights = tile_buffers(rows, 3, grad_logprobs.dtype)
    for place in tiles(rows, live):
        x = read_tile(rows, place, temperature, logits)
        direct = isinstance(place[1], slice) and out.dtype == tile.dtype and out is not rows
        gradient = torch.softmax(x, -1, out=out[place] if direct else tile[: len(x)])
        chosen = grad_logprobs[place][:, None] / temperature
        if grad_entropies is None:
            gradient.mul_(-chosen)
        else:
            surplus = torch.log_softmax(x, -1, out=weights[: len(x)]).clamp_(min=LOG_ZERO)
            surplus.add_(entropies[place][:, None]).mul_(grad_entropies[place][:, None] / temperature)
            gradient.mul_(surplus.add_(chosen).neg_())
        # Added before rounding to the dtype of the logits, so that 1 - p is exact for p near 1.
        gradient.scatter_add_(-1, targets[place][:, None], chosen)
        if rows.device.type != "cpu":
            gradient.masked_fill_(~live[place][:, None], 0)
        if not direct:
            out[place] = gradient.to(out.dtype)
