"""Fused operations for RLHF. Each has a folder, whose `reference.py` is its definition in plain torch."""

from rlhf_kernels.gae import gae
from rlhf_kernels.kl_divergence import kl_divergence
from rlhf_kernels.linear_kl import linear_kl
from rlhf_kernels.linear_logprobs import linear_logprobs, linear_token_loss
from rlhf_kernels.packed_attention import packed_attention
from rlhf_kernels.registry import use_impl
from rlhf_kernels.token_logprobs import token_logprobs

__all__ = [
    "gae",
    "kl_divergence",
    "linear_kl",
    "linear_logprobs",
    "linear_token_loss",
    "packed_attention",
    "token_logprobs",
    "use_impl",
]
