"""What the jobs share that learn from preferences without a reward model: settings, losses that look across
micro-batches, and options that are running means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_core.config import (
    CachedReferenceConfig,
    DataConfig,
    LossOptions,
    NonNegativeFloat,
    PositiveFloat,
    RunConfig,
    require,
)
from rlhf_core.control import RunningMean
from rlhf_core.data.errors import DataError
from rlhf_core.data.records import Example
from rlhf_core.losses.pairs import Completions, Pairs, PreferenceLoss
from rlhf_core.training.metrics import Metrics

JOB_SETTINGS = frozenset({"beta", "label_smoothing"})
"""Parameters of losses that are settings of the job and not loss options."""
Stats = dict[str, Tensor]
PairLoss = Callable[[Pairs], tuple[Tensor, Stats]]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(LossOptions, RunConfig):
    """Settings of the jobs that learn from preference data without a reward model."""

    common: ClassVar[tuple[str, ...]] = (*RunConfig.common, "loss", "loss_options", "beta", "reference")

    eval_data: DataConfig | None = None
    """Evaluation rows; all metrics of the training rows are logged for them too, as eval_accuracy, ..."""
    reference: CachedReferenceConfig = CachedReferenceConfig()
    """The reference; the model to start from, if no path is given."""
    beta: PositiveFloat = 0.1
    """Strength of the KL regularisation towards the reference."""
    router_aux_coef: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts, over the tokens of each micro-batch."""

    def require_no_reference(self, reason: str) -> None:
        """Raise ConfigError for settings of a reference where the loss uses none."""
        for field, default in (("path", None), ("update", "none"), ("cache_folder", None)):
            value = getattr(self.reference, field)
            require(value == default, f"reference.{field}", value, f"{default}, because {reason}")
        require(self.reference.cache != "on", "reference.cache", "on", f"auto or off, because {reason}")


@dataclass(frozen=True)
class JointLoss:
    """A loss that looks across pairs, computed over all micro-batches of a step in the memory of one.

    The log-probs of all micro-batches are computed first, without a graph. The loss of them has a gradient with respect
    to each log-prob. Every micro-batch then runs again and multiplies its log-probs by those gradients: by the chain
    rule the sum is the gradient of the whole loss.
    """

    loss: Tensor
    stats: Stats
    gradients: list[list[Tensor | None]]
    """For each micro-batch, the gradients with respect to the tensors of `_differentiable`."""

    @classmethod
    def compute(cls, parts: Sequence[Pairs], loss_of: PairLoss) -> JointLoss:
        """Compute the loss of all parts together, and its gradients."""
        whole = Pairs.cat(parts)
        inputs = [None if tensor is None else tensor.requires_grad_() for tensor in _differentiable(whole)]
        with torch.enable_grad():
            loss, stats = loss_of(whole)
        given = [tensor for tensor in inputs if tensor is not None]
        found = iter(torch.autograd.grad(loss, given, allow_unused=True))
        whole_gradients = [None if tensor is None else next(found) for tensor in inputs]
        gradients, start = [], 0
        for part in parts:
            rows = slice(start, start := start + len(part))
            gradients.append(
                [
                    None if gradient is None or tensor is None else gradient[rows, : tensor.shape[1]]
                    for gradient, tensor in zip(whole_gradients, _differentiable(part), strict=True)
                ]
            )
        return cls(loss.detach(), stats, gradients)

    def part(self, number: int, pairs: Pairs, share: float) -> tuple[Tensor, Stats]:
        """Return a micro-batch's share of the loss, with the gradient of the whole loss in its log-probs."""
        terms = [
            (tensor * gradient).sum()
            for tensor, gradient in zip(_differentiable(pairs), self.gradients[number], strict=True)
            if tensor is not None and gradient is not None
        ]
        carrier = torch.stack(terms).sum()
        return carrier - carrier.detach() + self.loss * share, dict(self.stats)


def _differentiable(pairs: Pairs) -> list[Tensor | None]:
    """Return the tensors of pairs that the policy's gradient flows through."""
    return [pairs.chosen.logprobs, pairs.rejected.logprobs, pairs.chosen.kl, pairs.rejected.kl]


def single_pair(*, weights: bool = False) -> Pairs:
    """Return a pair of one token each, with everything a loss may need: to check settings before anything is loaded."""
    one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    side = Completions(logprobs=one, mask=mask, ref_logprobs=one, kl=one)
    return Pairs(chosen=side, rejected=side, weights=torch.ones(1) if weights else None, margin=torch.zeros(1))


class RunningMeans:
    """Options of losses that are running means of metrics of earlier steps, see `RunningOption`.

    Args:
        entries: the losses. fixed: names of options that the settings give a value.
    """

    def __init__(self, entries: Iterable[PreferenceLoss], *, fixed: Collection[str]):
        declared = [entry.running_mean for entry in entries if entry.running_mean is not None]
        self._options = [option for option in declared if option.option not in fixed]
        self._means = {name: RunningMean(each.momentum) for each in self._options for name in each.metrics}

    @property
    def metrics(self) -> Collection[str]:
        """Names of the metrics that the means are updated with."""
        return self._means.keys()

    @property
    def values(self) -> dict[str, float]:
        """The current value of each option."""
        return {
            each.option: sum(self._means[name].mean for name in each.metrics) / len(each.metrics)
            for each in self._options
        }

    def update(self, metrics: Metrics, counts: Mapping[str, int]) -> None:
        """Update the means with the metrics of a step, each the mean over so many rows."""
        for name, mean in self._means.items():
            mean.update(metrics[name], counts[name])

    def state_dict(self) -> dict[str, Any]:
        return {name: mean.state_dict() for name, mean in self._means.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, mean in self._means.items():
            mean.load_state_dict(state[name])


def row_weight(row: Example) -> float:
    """Return the weight of a row."""
    return row.weight


def chosen_tokens(row: Example) -> float:
    """Return the number of tokens of the chosen completion that the loss covers, times the row's weight."""
    count = len(row.completions[0]) if row.supervised is None else sum(row.supervised[0])
    return row.weight * count


def row_pair_weights(
    rows: Sequence[Example], losses: Mapping[str, PreferenceLoss], device: torch.device
) -> Tensor | None:
    """Return (P,) weights of the rows; None if a loss cannot weight pairs. Raises DataError for a row that has one."""
    unweighted = [name for name, entry in losses.items() if not entry.pair_weights]
    for row in rows if unweighted else ():
        if row.weight != 1:
            raise DataError(f"{row.record.source}: its weight is not 1, which the loss {unweighted[0]!r} cannot honour")
    return None if unweighted else torch.tensor([row.weight for row in rows], device=device)


def row_margins(rows: Sequence[Example], losses: Mapping[str, PreferenceLoss], device: torch.device) -> Tensor | None:
    """Return (P,) margins of the rows if one of the losses needs them. Raises DataError for a row without one."""
    needing = [name for name, entry in losses.items() if "margin" in entry.needs]
    if not needing:
        return None
    for row in rows:
        if row.margin is None:
            raise DataError(
                f"{row.record.source}: no margin, which the loss {needing[0]!r} needs; expected a column margin, or "
                "score_chosen and score_rejected"
            )
    return torch.tensor([row.margin for row in rows], device=device)
