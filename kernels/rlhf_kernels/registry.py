"""The choice of implementation: `impl=` of the call, else of `use_impl`, else of RLHF_KERNELS, else "auto"."""

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
    """Return the implementation of `op` on `device`, "torch" or "triton".

    "auto" is Triton on CUDA where triton is installed, and torch elsewhere. An explicit "torch" or "triton" is used or
    raises an error. On the CPU Triton runs only under its interpreter (TRITON_INTERPRET=1), for tests. A function under
    `torch.compile` keeps the choice of its first call.

    Args:
        op: the public name, for the error message.
        device: that of the inputs.
        impl: "auto", "torch", "triton", or None for that of `use_impl` or RLHF_KERNELS.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if "triton" is requested and cannot run.
    """
    return _choose(op, torch.device(device).type, impl)


def _choose(op: str, device_type: str, impl: str | None) -> str:
    requested = impl or _forced.get()
    wanted = requested or os.environ.get("RLHF_KERNELS") or "auto"
    _check(wanted, "impl" if requested else "RLHF_KERNELS")
    if wanted == "torch" or (wanted == "auto" and device_type != "cuda"):
        return "torch"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if has_triton() and (device_type == "cuda" or interpreted):
        return "triton"
    if wanted == "auto":
        return "torch"
    installed = "installed" if has_triton() else "not installed"
    raise RuntimeError(
        f"{op}: impl='triton': expected CUDA inputs and triton, but the inputs are on {device_type!r} and triton is "
        f"{installed}. Run `pip install triton` (for tests on the CPU set TRITON_INTERPRET=1), or use impl='auto'"
    )


# Dynamo cannot trace context variables or imports, so it takes the result for a constant. This is what
# torch.compiler.assume_constant_result does, which would import all of dynamo, and triton, with this module.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Run every operation inside the block with `impl`, unless the call sets its own `impl`.

    The block applies to its own thread or task. A backward pass uses the implementation of its forward.
    """
    _check(impl)
    token = _forced.set(impl)
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(op: str, impl: str) -> ModuleType:
    """Import and return the module of `op` for `impl`, "torch" or "triton" as returned by `choose`."""
    return importlib.import_module(f"rlhf_kernels.{op}.{'torch_path' if impl == 'torch' else 'triton_kernel'}")


@functools.cache
def has_triton() -> bool:
    """Return whether triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def _check(impl: str, name: str = "impl") -> None:
    if impl not in IMPLS:
        raise ValueError(f"{name}={impl!r}: expected one of {', '.join(IMPLS)}")
