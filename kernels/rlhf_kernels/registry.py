"""Which implementation runs: `impl=` of the call, else a `use_impl` block's, else RLHF_KERNELS', else "auto"."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch

IMPLS = ("auto", "torch", "triton")

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("rlhf_kernels_impl", default=None)


def choose(op: str, device: torch.device | str, impl: str | None = None) -> str:
    """The implementation that `op` is to run with on `device`.

    "auto" is Triton on CUDA where triton is installed, and torch anywhere else. A request by name is honoured or
    refused, never changed. Triton runs on the CPU under its interpreter alone (TRITON_INTERPRET=1), for tests.
    A function under `torch.compile` keeps the choice of its first call.

    Args:
        op: the public name, for the message. device: where the inputs are. impl: "auto", "torch", "triton" or None.

    Returns:
        "torch" or "triton".

    Raises ValueError for an unknown name, RuntimeError where Triton is asked for and cannot run.
    """
    return _choose(op, torch.device(device).type, impl)


def _choose(op: str, device_type: str, impl: str | None) -> str:
    asked, environment = impl or _forced.get(), os.environ.get("RLHF_KERNELS")
    wanted = asked or environment or "auto"
    _check(wanted, "impl" if asked else "RLHF_KERNELS")
    if wanted == "torch" or (wanted == "auto" and device_type != "cuda"):
        return "torch"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if has_triton() and (device_type == "cuda" or interpreted):
        return "triton"
    if wanted == "auto":
        return "torch"
    installed = "installed" if has_triton() else "not installed"
    raise RuntimeError(
        f"{op}: impl='triton' was asked for, but the inputs are on {device_type!r} and triton is {installed}. "
        "It needs CUDA and `pip install triton` (or, for tests on the CPU, TRITON_INTERPRET=1); impl='auto' falls back"
    )


# Dynamo can read neither context variables nor what is installed, so it takes the answer for a constant. This is what
# torch.compiler.assume_constant_result does, which would import all of dynamo, and triton, along with this module.
_choose._dynamo_marked_constant = True


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Every op inside the block runs with `impl`, unless the call itself names another.

    The block holds for its own thread or task, and for what is differentiated later: a backward follows its forward.
    """
    _check(impl)
    token = _forced.set(impl)
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(op: str, impl: str) -> ModuleType:
    """The module of `op` that `impl` ("torch" or "triton", as `choose` says) is written in, imported when asked for."""
    return importlib.import_module(f"rlhf_kernels.{op}.{'torch_path' if impl == 'torch' else 'triton_kernel'}")


@functools.cache
def has_triton() -> bool:
    """Is triton installed? Looked up on first use, and not imported."""
    return importlib.util.find_spec("triton") is not None


def _check(impl: str, name: str = "impl") -> None:
    if impl not in IMPLS:
        raise ValueError(f"{name}={impl!r}: expected one of {', '.join(IMPLS)}")
