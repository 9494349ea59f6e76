"""Code of the user's own that a config names: a module that registers losses, a function that gives rewards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def import_module(name: str) -> ModuleType:
    """`package.module`, also from the folder the command is typed in. ValueError where there is none."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: {error}") from error
    finally:
        sys.path.remove(here)


def import_function(name: str) -> Callable[..., Any]:
    """`package.module:function`, likewise."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{name!r}: expected module:function")
    function = getattr(import_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"{name!r}: {module_name} has no function {function_name}")
    return function
