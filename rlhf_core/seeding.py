"""Randomness as a function of (seed, step, purpose): there is no hidden state, so that a resumed run draws the same."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a new CPU generator for one purpose, `generator(seed, "rollout", step)`, independent of all others."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
