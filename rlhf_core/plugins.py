"""Code of the user's own that a config names: a module that registers losses, a function that gives rewards."""

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


_FINGERPRINTS: dict[int, tuple[Any, str]] = {}  # by id; the function beside it stays, so that no other gets that id


def fingerprint_function(name: str) -> str:
    """sha256 of the files that such a function is written in, and its name. ValueError where there is no such file.

    They are the named module's and, of a function that was made or wrapped elsewhere, those of its parts. They are read
    once for a function, as it is imported once: what is written into the file later is not what runs.
    """
    function = import_function(name)
    if id(function) not in _FINGERPRINTS:
        files = {getattr(sys.modules[name.partition(":")[0]], "__file__", None)}
        for part in (function, inspect.unwrap(function), getattr(function, "func", type(function))):  # func: a partial
            with contextlib.suppress(TypeError):  # built in, or an object that can be called
                files.add(inspect.getsourcefile(part))
        found = sorted(file for file in files - {None} if Path(file).is_file())
        if not found:
            raise ValueError(f"{name!r}: its source is not to be found, so nobody can tell when it changes")
        sums = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in found]
        _FINGERPRINTS[id(function)] = function, " ".join(sums)
    return f"{name} {_FINGERPRINTS[id(function)][1]}"
