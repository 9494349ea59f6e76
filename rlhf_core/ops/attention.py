"""Attention over a packed stream, from `rlhf_kernels`."""

from __future__ import annotations

from rlhf_kernels.packed_attention import packed_attention

__all__ = ["packed_attention"]
