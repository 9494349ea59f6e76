"""The Triton path without a GPU: its interpreter, in this folder's tests, and its compiler, in a process of its own.

Where there is a GPU both paths run on it instead, compiled.
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
    """Triton, from here on, runs its functions in numpy.

    Its own library of functions (tl.sum and the like) is decorated when triton is first imported, which another test
    file may have brought about already, through transformers. Those functions are wrapped again.
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
    """Where the kernels' tests run: the GPU if there is one."""
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def impl(request) -> str:
    """Both implementations. Without triton its half is skipped on a laptop and fails in CI."""
    if request.param == "triton" and not HAS_TRITON:
        if os.environ.get("CI"):
            pytest.fail("triton is not installed: CI may not skip its path")
        pytest.skip("triton is not installed")
    return request.param


# Of the largest true value. The half types round what they return once, so half a unit in the last place.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """Every floating dtype."""
    return request.param


@pytest.fixture
def judge(impl):
    """Judges tensors by name against the truth, the definition in float64 on the very same (rounded) inputs.

    They may be as wrong as the definition in the model's own dtype is, plus a little:

        max |kernel - truth| <= max |definition in that dtype - truth| + tolerance * max |truth|

    Triton's interpreter does not round to bfloat16, it cuts off: a whole unit in the last place there.
    """
    cut_off = {torch.bfloat16: 2.0**-7} if impl == "triton" and DEVICE == "cpu" else {}
    tolerance = TOLERANCE | cut_off

    def as_good_as_the_definition(
        found: dict[str, torch.Tensor],
        plain: dict[str, torch.Tensor],
        truth: dict[str, torch.Tensor],
        dtype: torch.dtype,
        scale: float = 1e-3,  # the least size that the tolerance is a share of
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


# Everything up to the launch is real; the driver only says that there is an H100.
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
    """Runs code whose Triton kernels are compiled for an H100 as they are launched, and not run; returns its output.

    The code imports the kernels it wants and then sets TRITON_INTERPRET, so that they may be asked for on the CPU.
    `compiled_kernels` lists (name, PTX).
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
