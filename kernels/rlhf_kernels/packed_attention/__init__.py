"""Attention over a packed stream: a token sees its own stretch so far, and the prefix that the stretch continues."""

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
    softcap: float | None = None,
    dropout: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """softmax(c * tanh(scale * query @ key^T / c), where visible) @ value; without a softcap c no tanh.

    Args:
        query: (1, heads, N, D). key: (1, K, N, D), the K key-value heads a divisor of `heads`. value: (1, K, N, E).
        layout: which keys each query sees, see `Layout`.
        scale: None is 1 / sqrt(D).
        sliding_window: a token sees itself and the sliding_window - 1 before it, counted along its own sequence.
        dropout: of the attention weights; impl "torch" alone has it.
        impl: "auto", "torch" (a loop over the layout's groups) or "triton" (flex_attention, one kernel; on the CPU its
            forward alone).

    Returns:
        (1, heads, N, E) in the query's dtype, with gradients to query, key and value.

    Raises ValueError for shapes that do not fit, and RuntimeError where impl "triton" cannot do what is asked.
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
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")
    # Imported up there, as torch.compile can import nothing while it traces.
    torch_alone = choose("packed_attention", query.device, impl) == "torch"
    path = torch_path if torch_alone else implementation("packed_attention", "triton")
    return path.packed_attention(
        query, key, value, layout, scale=scale, sliding_window=sliding_window, softcap=softcap, dropout=dropout
    )
