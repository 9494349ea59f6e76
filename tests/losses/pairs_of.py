"""`Pairs` from named tensors, which tests can replace one by one."""

from __future__ import annotations

from torch import Tensor

from rlhf_core.losses.pairs import Completions, Pairs


def pairs_of(
    *,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    weights: Tensor | None = None,
    margin: Tensor | None = None,
) -> Pairs:
    return Pairs(
        Completions(chosen_logprobs, chosen_mask, ref_chosen_logprobs, chosen_kl),
        Completions(rejected_logprobs, rejected_mask, ref_rejected_logprobs, rejected_kl),
        weights=weights,
        margin=margin,
    )
