"""Randomness as a function of (seed, step, purpose): without hidden state, a resumed run draws what it would have."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A fresh CPU generator for one purpose: `generator(seed, "rollout", step)`. Other purposes draw independently."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
