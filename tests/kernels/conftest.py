"""Fixtures that run the Triton path without a GPU: in its interpreter, and through its compiler in a subprocess.

With a GPU both paths run on it, compiled.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpret_triton() -> None:
    """Make Triton run its functions in numpy from here on.

    Its own library of functions (tl.sum and the like) is decorated when triton is first imported, which another test
    file may have done already, through transformers. Those functions are wrapped again.
    """
    late = "triton" in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    if not late:
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in [module for name, module in sys.modules.items() if name.startswith("triton.language")]:
        for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
            for name, value in list(vars(owner).items()):
                if isinstance(value, JITFunction):
                    setattr(owner, name, InterpretedFunction(value.fn))


if HAS_TRITON and DEVICE == "cpu":
    interpret_triton()


@pytest.fixture
def device() -> str:
    """The device of the tests: the GPU if there is one."""
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def impl(request) -> str:
    """Both implementations. Without triton its tests are skipped, or fail in CI."""
    if request.param == "triton" and not HAS_TRITON:
        if os.environ.get("CI"):
            pytest.fail("triton is not installed: expected in CI")
        pytest.skip("triton is not installed")
    return request.param


# Relative to the largest true value. The half types round results once: half a unit in the last place.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """Every floating dtype."""
    return request.param


@pytest.fixture
def assert_accurate(impl):
    """Return a function that compares tensors by name with the definition in float64 on the same (rounded) inputs.

    The error may be that of the definition in the dtype of the model, plus a tolerance:

        max |kernel - truth| <= max |definition in that dtype - truth| + tolerance * max |truth|

    Triton's interpreter truncates to bfloat16 instead of rounding: a whole unit in the last place there.
    """
    truncated = {torch.bfloat16: 2.0**-7} if impl == "triton" and DEVICE == "cpu" else {}
    tolerance = TOLERANCE | truncated

    def as_good_as_the_definition(
        found: dict[str, torch.Tensor],
        plain: dict[str, torch.Tensor],
        truth: dict[str, torch.Tensor],
        dtype: torch.dtype,
        scale: float = 1e-3,  # lower bound of max |truth| in the tolerance
    ) -> None:
        assert found.keys() == plain.keys() == truth.keys()
        for name, true in truth.items():
            assert found[name].dtype == plain[name].dtype, name
            assert found[name].shape == true.shape, name
            if true.numel():
                allowed = (plain[name] - true).abs().max() + tolerance[dtype] * true.abs().max().clamp(min=scale)
                error = (found[name] - true).abs().max()
                assert error <= allowed, f"{name}: off by {error:.3g}, {allowed:.3g} allowed"

    return as_good_as_the_definition


# Everything up to the launch is real; the driver only reports an H100.
_PREAMBLE = """
import os, sys
sys.path.insert(0, "kernels")
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class H100:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)

def compile_only(self, *args, grid, warmup, **kwargs):
    compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
    compiled_kernels.append((self.__name__, compiled.asm["ptx"]))

driver.set_active(H100())
launch, JITFunction.run, compiled_kernels = JITFunction.run, compile_only, []
"""


@pytest.fixture
def compile_for_cuda(tmp_path):
    """Return a function that runs code in a subprocess and returns its output.

    Triton kernels that the code launches are compiled for an H100 and not run; `compiled_kernels` lists (name, PTX).
    The code imports the kernels and then sets TRITON_INTERPRET, so that impl="triton" is accepted on the CPU.
    """

    def run(code: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= dict(TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1", OMP_NUM_THREADS="1")
        done = subprocess.run(
            [sys.executable, "-c", _PREAMBLE + code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
