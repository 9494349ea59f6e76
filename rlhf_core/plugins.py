"""Code of the user's own that a config names: a module that registers losses, a function that gives rewards."""

from __future__ import annotations

import hashlib
import importlib
import inspect
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


def fingerprint_function(name: str) -> str:
    """sha256 of the file that such a function is written in, and its name. ValueError where there is no such file."""
    function = import_function(name)
    try:
        file = inspect.getsourcefile(function)
    except TypeError:  # built in, or an object that can be called
        file = inspect.getsourcefile(type(function)) if type(function).__module__ != "builtins" else None
    if file is None:
        raise ValueError(f"{name!r}: its source is not to be found, so nobody can tell when it changes")
    return f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
