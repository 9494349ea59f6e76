"""Shared by the tables of losses: lookup of names, options read from signatures, checks of parameters.

A loss in a table is a function whose first parameter holds the terms of the loss and whose keyword-only parameters are
its options:

    def simpo(pairs, *, beta, label_smoothing, gamma=0.5): ...

so `preference_loss("simpo", ..., gamma=0.8)` needs no second list of options, and an option that no loss declares is an
error.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Entry = TypeVar("Entry")
Function = TypeVar("Function", bound=Callable[..., Any])
OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def add_entry(table: dict[str, Entry], name: str, entry: Entry, kind: str) -> None:
    """Add an entry to a table of losses; ValueError for a name that is already registered."""
    if name in table:
        raise ValueError(f"a {kind} named {name!r} is registered already")
    table[name] = entry


def look_up(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """Return the entry of that name; ValueError with the nearest name if there is none."""
    if name not in table:
        raise ValueError(f"no {kind} named {name!r}; there are {sorted(table)}{_did_you_mean(name, table)}")
    return table[name]


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword-only parameters with their defaults (`inspect.Parameter.empty` where there is none)."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def parse_options(
    texts: Iterable[str] | Mapping[str, float] | None,
    functions: Mapping[str, Callable[..., Any]],
    *,
    reserved: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Return the options of losses as numbers, from texts such as "gamma:0.5".

    Args:
        texts: "name:number" texts, or a mapping of names to numbers, or None.
        functions: the losses by name; an option must be a keyword-only parameter of at least one of them.
        reserved: parameters that are no options, because the caller has settings for them, such as beta.

    Raises ValueError for an unknown option (with the nearest name), one that is given twice, and a value that is not a
    finite number.
    """
    if isinstance(texts, Mapping):
        texts = [f"{name}:{value}" for name, value in texts.items()]
    known = {option for function in functions.values() for option in options_of(function)} - reserved
    numbers: dict[str, float] = {}
    for text in texts or ():
        name, _, value = text.partition(":")
        if name not in known:
            expected = f"an option of {', '.join(functions)}: {', '.join(sorted(known)) or 'there is none'}"
            raise ValueError(f"loss_options={text!r}: expected {expected}{_did_you_mean(name, known)}")
        require(name not in numbers, "loss_options", repr(text), f"{name} once")
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        require(math.isfinite(numbers[name]), "loss_options", repr(text), "name:number")
    return numbers


def share_options(functions: Mapping[str, Callable[..., Any]], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each function's part of `options`, by its name; ValueError for an option that none of them has."""
    declared = {name: options_of(function) for name, function in functions.items()}
    for option in options:
        if not any(option in own for own in declared.values()):
            hint = _did_you_mean(option, sorted({each for own in declared.values() for each in own}))
            raise ValueError(f"{option}={options[option]!r}: {', '.join(functions)} has no such option{hint}")
    return {name: {key: value for key, value in options.items() if key in own} for name, own in declared.items()}


def call_declared(function: Callable[..., Tensor], terms: object, **offered: Any) -> Tensor:
    """Return `function(terms, ...)`, called with those of `offered` that it declares."""
    return function(terms, **{name: offered[name] for name in options_of(function) if name in offered})


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError naming the parameter and its value unless the condition holds.

    Write conditions such that NaN does not satisfy them.
    """
    if not condition:
        raise ValueError(f"{name}={value}: expected {expected}")


def require_beta(beta: float) -> None:
    """Raise ValueError unless beta is finite and more than 0."""
    require(0 < beta < math.inf, "beta", beta, "more than 0")


def require_label_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless 0 <= label_smoothing < 0.5: from 0.5 on, labels carry no information or are inverted."""
    require(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "0 <= label_smoothing < 0.5")


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """Compute -(1 - e) log sigmoid(logits) - e log sigmoid(-logits): the loss of a label that is wrong with
    probability e."""
    if label_smoothing == 0:  # avoids 0 * inf where a logit has overflowed
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def require_mask(mask: Tensor) -> None:
    """Raise ValueError unless the mask is bool."""
    require(mask.dtype == torch.bool, "mask.dtype", mask.dtype, "torch.bool, True = counted")


def in_full_precision(name: str, tensor: OptionalTensor, mask: Tensor) -> OptionalTensor:
    """Return the tensor in float32 (float64 stays), whatever the model's dtype: sums over tokens need it.

    Raises ValueError for a tensor whose shape differs from the mask's and would broadcast.
    """
    if tensor is None:
        return tensor
    if tensor.shape != mask.shape:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected that of its mask, {tuple(mask.shape)}")
    return tensor if tensor.dtype == torch.float64 else tensor.float()
