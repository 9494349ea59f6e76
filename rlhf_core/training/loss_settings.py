"""Losses named in settings: looking them up, and reading their options from their signatures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from rlhf_core.config import ConfigError, did_you_mean
from rlhf_core.losses.registry import parse_options

Entry = TypeVar("Entry")


def find_losses(table: Mapping[str, Entry], names: Iterable[str]) -> dict[str, Entry]:
    """Return the entries of a table of losses by their names; ConfigError for an unknown name."""
    for name in names:
        if name not in table:
            expected = f"one of {', '.join(sorted(table))}{did_you_mean(name, table)}"
            raise ConfigError(f"loss={name!r}: expected {expected}")
    return {name: table[name] for name in names}


def read_loss_options(
    given: Iterable[str] | None,
    functions: Mapping[str, Callable[..., Any]],
    *,
    reserved: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return the setting `loss_options` as numbers by name, see `parse_options`; ConfigError where it raises.

    `reserved`: parameters of the losses that are settings of the job, such as beta.
    """
    with invalid_setting():
        return parse_options(given, functions, reserved=reserved)


@contextlib.contextmanager
def invalid_setting() -> Iterator[None]:
    """Raise a ValueError from a loss as a ConfigError: around a call that checks settings before anything is loaded."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
