"""What paired preference losses are made of, and the table that holds them.

A new loss is a function and a decorator, in any file that is imported before its name is used:

    @register_preference_loss("mine")
    def mine(pairs: PairTerms, *, beta, label_smoothing=0.0, tau=1.0):
        return -F.logsigmoid(beta * pairs.difference / tau)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PairTerms:
    """What a preference loss is made of, each (B,). Log-probs are summed over the completion's tokens, or averaged for
    a loss that is registered with `length_normalized`."""

    chosen_logprob: Tensor
    rejected_logprob: Tensor
    ref_chosen_logprob: Tensor  # 0 where the loss needs no reference
    ref_rejected_logprob: Tensor
    chosen_log_ratio: Tensor  # log-prob minus the reference's
    rejected_log_ratio: Tensor
    difference: Tensor  # chosen minus rejected log-ratio; of f'(ratio) under another f-divergence
    chosen_length: Tensor  # tokens
    rejected_length: Tensor
    chosen_nll: Tensor  # each pair's share of the chosen tokens' NLL: the mean over pairs is the mean over tokens
    margin: Tensor | None = None
    chosen_kl: Tensor | None = None  # summed over tokens
    rejected_kl: Tensor | None = None


@dataclass(frozen=True)
class PreferenceLoss:
    """One entry of a table of losses: its function, what it needs, and which options of the caller it can honour."""

    function: Callable[..., Tensor]
    needs_reference: bool = True
    paired: bool = True
    length_normalized: bool = False
    """Over mean log-probs instead of sums."""
    f_divergence: bool = False
    """Only `pairs.difference` enters, so that the log-ratio may become f' of the ratio."""
    ld_alpha: bool = True
    """Down-weighting the longer completion's surplus (LD-DPO) means something."""
    pair_weights: bool = True
    """A pair's loss is its own, so that it can be weighted (WPO)."""
    across_pairs: bool = False
    """A pair's loss depends on the others of its batch, so that micro-batches alone would change it."""
    needs: tuple[str, ...] = ()
    """Tensors beyond the log-probs: margin, chosen_kl, rejected_kl, kl."""


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}


def register_preference_loss(
    name: str,
    *,
    needs_reference: bool = True,
    length_normalized: bool = False,
    f_divergence: bool = False,
    ld_alpha: bool = True,
    pair_weights: bool = True,
    across_pairs: bool = False,
    needs: tuple[str, ...] = (),
) -> Callable:
    """Decorator that puts a paired loss into the table: `function(pairs, *, options)` gives each pair's loss, (B,).

    Of `beta` and `label_smoothing` the function gets those it declares; any other keyword-only parameter is an option
    of its own, given to `preference_loss` by name. A label_smoothing other than 0 is refused for a loss without it.

    Raises ValueError for a name that is taken.
    """

    return register_into(
        PREFERENCE_LOSSES,
        name,
        needs_reference=needs_reference,
        length_normalized=length_normalized,
        f_divergence=f_divergence,
        ld_alpha=ld_alpha,
        pair_weights=pair_weights,
        across_pairs=across_pairs,
        needs=needs,
    )


def register_into(table: dict[str, PreferenceLoss], name: str, **facts: Any) -> Callable:
    """Decorator that makes a function an entry of `table`, with these fields of `PreferenceLoss`."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in table:
            raise ValueError(f"a preference loss named {name!r} is registered already")
        table[name] = PreferenceLoss(function, **facts)
        return function

    return register
