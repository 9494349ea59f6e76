"""Fused operations for RLHF. Each op has a folder: `reference.py` is its definition in plain torch."""

from rlhf_kernels.linear_logprobs import linear_logprobs

__all__ = ["linear_logprobs"]
