"""What the tables of losses share: names looked up with a suggestion, and a loss's options told from its signature.

A loss in a table is a function whose first parameter holds what the loss is made of and whose keyword-only parameters
are its options:

    def simpo(pairs, *, beta, label_smoothing, gamma=0.5): ...

so `preference_loss("simpo", ..., gamma=0.8)` needs no second list of options, and one that nobody takes is an error.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def look_up(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """The entry of that name; ValueError with the nearest name where there is none."""
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {kind} named {name!r}; there are {sorted(table)}{hint}")
    return table[name]


def options_of(function: Callable) -> dict[str, Any]:
    """Keyword-only parameters and their defaults (`inspect.Parameter.empty` where there is none)."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def share_options(functions: Mapping[str, Callable], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each function's part of `options`, by its name; ValueError for an option that none of them has."""
    declared = {name: options_of(function) for name, function in functions.items()}
    for option in options:
        if not any(option in own for own in declared.values()):
            known = sorted(set().union(*declared.values()))
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{option}={options[option]!r}: {', '.join(functions)} has no such option{hint}")
    return {name: {key: value for key, value in options.items() if key in own} for name, own in declared.items()}


def call_declared(function: Callable, terms: Any, **offered: Any) -> Any:
    """`function(terms, ...)` with those of `offered` that it declares; the rest is not its business."""
    return function(terms, **{name: offered[name] for name in options_of(function) if name in offered})


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """ValueError naming the parameter and its value. Conditions are written so that NaN does not meet them."""
    if not condition:
        raise ValueError(f"{name}={value}: expected {expected}")


def require_beta(beta: float) -> None:
    """ValueError unless beta is finite and more than 0."""
    require(0 < beta < math.inf, "beta", beta, "more than 0")


def require_label_smoothing(label_smoothing: float) -> None:
    """ValueError unless 0 <= label_smoothing < 0.5: from 0.5 on, the labels say nothing or the opposite."""
    require(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "0 <= label_smoothing < 0.5")


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(logits) - e log sigmoid(-logits): the loss of a label that is wrong with probability e."""
    if label_smoothing == 0:  # 0 * inf, should a logit have overflowed
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def in_full_precision(mask: Tensor, **tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in float32 (float64 stays), whatever the model's dtype: sums over tokens need it.

    Raises ValueError for a mask that is not bool, and a tensor of another shape than the mask, which would broadcast.
    """
    require(mask.dtype == torch.bool, "mask.dtype", mask.dtype, "torch.bool, True = takes part")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected that of its mask, {tuple(mask.shape)}")
    return [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float() for tensor in tensors.values()
    ]
