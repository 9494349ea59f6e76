"""Attention over a packed stream: a token attends to its own sequence so far, and to the prefix that it continues."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.packed_attention import torch_path
from rlhf_kernels.packed_attention.layout import Group, Layout
from rlhf_kernels.registry import choose, implementation

__all__ = ["Group", "Layout", "packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Compute softmax(scale * query @ key^T, where visible) @ value.

    Args:
        query: (1, heads, N, D).
        key: (1, K, N, D), with a number K of key-value heads that divides `heads`.
        value: (1, K, N, E).
        layout: which keys each query attends to, see `Layout`.
        scale: None is 1 / sqrt(D).
        sliding_window: a token attends to itself and the sliding_window - 1 tokens before it in its own sequence.
        dropout: probability of dropping an attention weight; only in "torch".
        impl: "auto", "torch" (a loop over the layout's groups) or "triton" (flex_attention, one kernel; on the CPU only
            its forward).

    Returns:
        (1, heads, N, E) in the query's dtype, with gradients to query, key and value.

    Raises:
        ValueError: for shapes that do not fit and a window below 1.
        RuntimeError: for an `impl` that cannot run here or does not support the arguments.
    """
    if query.ndim != 4 or len(query) != 1:
        raise ValueError(f"query of shape {tuple(query.shape)}: expected (1, heads, N, D)")
    heads, num_tokens, size = query.shape[1:]
    if key.ndim != 4 or key.shape != (1, key.shape[1], num_tokens, size) or heads % key.shape[1]:
        raise ValueError(
            f"key of shape {tuple(key.shape)}: expected (1, a divisor of {heads}, {num_tokens}, {size}) for a query of "
            f"shape {tuple(query.shape)}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value of shape {tuple(value.shape)}: expected {tuple(key.shape[:-1])} and its own size")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: expected 1 or more, or None")
    if choose("packed_attention", query.device, impl) == "torch":  # not imported here: torch.compile cannot trace that
        return torch_path.packed_attention(
            query, key, value, layout, scale=scale, sliding_window=sliding_window, dropout=dropout
        )
    output: Tensor = implementation("packed_attention", "triton").packed_attention(
        query, key, value, layout, scale=scale, sliding_window=sliding_window, dropout=dropout
    )
    return output
