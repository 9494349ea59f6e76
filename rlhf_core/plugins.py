"""User code that a config names: a module that registers losses, a function that returns rewards."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def import_module(name: str) -> ModuleType:
    """Import `package.module`, also from the current folder. Raise ValueError if there is none."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: {error}") from error
    finally:
        sys.path.remove(here)


def import_function(name: str) -> Callable[..., Any]:
    """Import `package.module:function`, also from the current folder. Raise ValueError if there is none."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{name!r}: expected module:function")
    function: object = getattr(import_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"{name!r}: {module_name} has no function {function_name}")
    return function


_FINGERPRINTS: dict[int, tuple[Any, str]] = {}  # by id, with the function itself, so that its id is not reused


def fingerprint_function(name: str) -> str:
    """Return the name of such a function and the sha256 of the files that it is written in.

    These are the file of the named module and, for a function that was made or wrapped elsewhere, those of its parts.
    They are read once per function, since a later change of a file does not change the imported function. ValueError if
    no file is found.
    """
    function = import_function(name)
    if id(function) not in _FINGERPRINTS:
        files: set[str | None] = {getattr(sys.modules[name.partition(":")[0]], "__file__", None)}
        for part in (function, inspect.unwrap(function), getattr(function, "func", type(function))):  # func: a partial
            with contextlib.suppress(TypeError):  # built in, or a callable object
                files.add(inspect.getsourcefile(part))
        found = sorted(file for file in files if file is not None and Path(file).is_file())
        if not found:
            raise ValueError(f"{name!r}: its source file was not found, so that a change of it would go unnoticed")
        sums = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in found]
        _FINGERPRINTS[id(function)] = function, " ".join(sums)
    return f"{name} {_FINGERPRINTS[id(function)][1]}"
