"""Preference pairs as tensors, the terms that paired preference losses are computed from, and the table of losses.

A new loss is a function and a decorator, in any file that is imported before its name is used:

    @register_preference_loss("mine")
    def mine(pairs: PairTerms, *, beta: float, label_smoothing: float = 0.0, tau: float = 1.0) -> Tensor:
        return -F.logsigmoid(beta * pairs.difference / tau)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.registry import Function, add_entry, require


@dataclass(frozen=True)
class Completions:
    """One side of P preference pairs, each tensor (P, T)."""

    logprobs: Tensor
    """Token log-probs under the policy."""
    mask: Tensor
    """Bool, True = completion token that the loss counts."""
    ref_logprobs: Tensor | None = None
    """Token log-probs under the reference; None where no loss needs them."""
    kl: Tensor | None = None
    """Exact KL(reference || policy) at each token, with gradient; for the losses that need it (TDPO)."""

    def __len__(self) -> int:
        return len(self.mask)

    @classmethod
    def cat(cls, parts: Sequence[Completions]) -> Completions:
        """Concatenate the rows of all parts, padded on the right with zeros to a common T."""
        return cls(
            logprobs=_cat_rows([part.logprobs for part in parts]),
            mask=_cat_rows([part.mask for part in parts]),
            ref_logprobs=_cat_optional([part.ref_logprobs for part in parts]),
            kl=_cat_optional([part.kl for part in parts]),
        )


@dataclass(frozen=True)
class Pairs:
    """P preference pairs. T may differ between the two sides."""

    chosen: Completions
    rejected: Completions
    weights: Tensor | None = None
    """(P,) factor of each pair's loss, used without gradient."""
    margin: Tensor | None = None
    """(P,) by how much the chosen completion is better; for the losses that need it (odpo)."""

    def __len__(self) -> int:
        return len(self.chosen)

    @classmethod
    def interleaved(
        cls,
        logprobs: Tensor,
        mask: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        kl: Tensor | None = None,
        weights: Tensor | None = None,
        margin: Tensor | None = None,
    ) -> Pairs:
        """Return pairs from rows in the order chosen, rejected, chosen, rejected, ...

        Args:
            logprobs, mask, ref_logprobs, kl: (2P, T). weights, margin: (P,), one value per pair.

        Raises ValueError for an odd number of rows.
        """
        require(len(mask) % 2 == 0, "len(mask)", len(mask), "an even number of rows: chosen, rejected, chosen, ...")
        chosen, rejected = (
            Completions(
                logprobs[side::2],
                mask[side::2],
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[side::2],
                kl=None if kl is None else kl[side::2],
            )
            for side in (0, 1)
        )
        return cls(chosen, rejected, weights=weights, margin=margin)

    @classmethod
    def cat(cls, parts: Sequence[Pairs]) -> Pairs:
        """Concatenate the pairs of all parts, each side padded on the right with zeros to a common T."""
        return cls(
            Completions.cat([part.chosen for part in parts]),
            Completions.cat([part.rejected for part in parts]),
            weights=_cat_optional([part.weights for part in parts]),
            margin=_cat_optional([part.margin for part in parts]),
        )


def _cat_rows(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].ndim == 2:
        width = max(tensor.shape[1] for tensor in tensors)
        tensors = [F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
    return torch.cat([*tensors])


def _cat_optional(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of all parts, or None where no part has any; ValueError where only some parts have them."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    require(len(present) == len(tensors), "parts", tensors, "a tensor in every part or in none")
    return _cat_rows(present)


@dataclass(frozen=True)
class PairTerms:
    """What a preference loss is computed from, each (P,). Log-probs are summed over the completion's tokens, or
    averaged for a loss that is registered with `length_normalized`."""

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
    margin: Tensor  # 0 where not given; a loss that needs it is registered with needs=("margin",)
    chosen_kl: Tensor  # summed over tokens; 0 where not given: needs=("kl",)
    rejected_kl: Tensor


@dataclass(frozen=True)
class RunningOption:
    """An option of a loss that is a running mean of metrics of earlier optimizer steps.

    The caller keeps one running mean per metric, starting from 0, and passes the mean of these means as the option.
    """

    option: str
    """Keyword-only parameter of the loss."""
    metrics: tuple[str, ...]
    """Metrics of a step, each a mean over its rows: of `running_metrics` for pairs, or from the stats of the loss."""
    momentum: float | None = None
    """m in mean = m * mean + (1 - m) * value; None: the plain mean over all rows so far."""


@dataclass(frozen=True)
class PreferenceLoss:
    """One entry of a table of losses: its function, the inputs it needs, and the options of the caller it supports."""

    function: Callable[..., Tensor]
    needs_reference: bool = True
    length_normalized: bool = False
    """Computed from mean log-probs instead of sums."""
    f_divergence: bool = False
    """Only `pairs.difference` enters, so that the log-ratio may be replaced by f' of the ratio."""
    ld_alpha: bool = True
    """Supports down-weighting the tokens of the longer completion beyond the length of the shorter one (LD-DPO)."""
    pair_weights: bool = True
    """A pair's loss depends on this pair only or on batch statistics without gradient, so it can be weighted."""
    across_pairs: bool = False
    """A pair's loss depends on the other pairs of its batch, so micro-batches alone would change it."""
    needs: tuple[str, ...] = ()
    """Inputs beyond the log-probs: "margin" and "kl" for pairs, "kl" (KTO's reference point) for single completions."""
    running_mean: RunningOption | None = None
    """An option whose value is a running mean that the caller keeps."""


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
    running_mean: RunningOption | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that adds a paired loss to `PREFERENCE_LOSSES`: `function(pairs, *, options)` returns each
    pair's loss, (P,).

    The function receives `beta` and `label_smoothing` if it declares them. Its other keyword-only parameters are
    options, passed to `preference_loss` by name. A label_smoothing other than 0 is an error for a loss without it.

    Args: the fields of `PreferenceLoss`. Raises ValueError for a name that is already registered.
    """

    def register(function: Function) -> Function:
        entry = PreferenceLoss(
            function,
            needs_reference=needs_reference,
            length_normalized=length_normalized,
            f_divergence=f_divergence,
            ld_alpha=ld_alpha,
            pair_weights=pair_weights,
            across_pairs=across_pairs,
            needs=needs,
            running_mean=running_mean,
        )
        add_entry(PREFERENCE_LOSSES, name, entry, "preference loss")
        return function

    return register
