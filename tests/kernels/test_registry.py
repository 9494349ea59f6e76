"""The choice of implementation, and the errors where one cannot run."""

from __future__ import annotations

import threading

import pytest
import torch

from rlhf_kernels import registry
from rlhf_kernels.registry import choose, has_triton, implementation, use_impl


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No RLHF_KERNELS, no interpreter, triton installed."""
    monkeypatch.delenv("RLHF_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "has_triton", lambda: True)


def without_triton(monkeypatch):
    monkeypatch.setattr(registry, "has_triton", lambda: False)


@pytest.mark.parametrize(
    ("device", "installed", "interpreted", "chosen"),
    [
        ("cuda", True, False, "triton"),
        ("cuda:1", True, False, "triton"),
        ("cuda", False, False, "torch"),
        ("cpu", True, False, "torch"),
        ("cpu", True, True, "torch"),  # the interpreter is used only for an explicit "triton"
        ("cpu", False, False, "torch"),
        ("mps", True, False, "torch"),
    ],
)
def test_auto(monkeypatch, device, installed, interpreted, chosen):
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not installed:
        without_triton(monkeypatch)
    assert choose("op", device) == choose("op", torch.device(device), "auto") == chosen


def test_precedence(monkeypatch):
    """The call, then use_impl, then the environment, then auto."""
    monkeypatch.setenv("RLHF_KERNELS", "torch")
    assert choose("op", "cuda") == "torch"
    with use_impl("triton"):
        assert choose("op", "cuda") == "triton"
        assert choose("op", "cuda", "torch") == "torch"
        with use_impl("torch"):
            assert choose("op", "cuda") == "torch"
            assert choose("op", "cuda", "auto") == "triton"
        assert choose("op", "cuda") == "triton"
    assert choose("op", "cuda") == "torch"
    monkeypatch.setenv("RLHF_KERNELS", "")
    assert choose("op", "cuda") == "triton"


def test_use_impl_ends_with_an_error_too():
    with pytest.raises(KeyError), use_impl("torch"):
        raise KeyError
    assert choose("op", "cuda") == "triton"


def test_use_impl_applies_to_its_own_thread():
    chosen = []
    with use_impl("torch"):
        thread = threading.Thread(target=lambda: chosen.append(choose("op", "cuda")))
        thread.start()
        thread.join()
    assert chosen == ["triton"]


def test_triton_by_name_runs_or_raises(monkeypatch):
    assert choose("op", "cuda", "triton") == "triton"
    with pytest.raises(
        RuntimeError,
        match=r"op: impl='triton': expected CUDA .* on 'cpu' and triton is installed",
    ):
        choose("op", "cpu", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("op", "cpu", "triton") == "triton"
    with pytest.raises(RuntimeError, match="on 'mps'"):
        choose("op", "mps", "triton")
    without_triton(monkeypatch)
    for device in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match="triton is not installed"):
            choose("op", device, "triton")


@pytest.mark.parametrize("where", ["call", "block", "environment"])
def test_an_unknown_name_is_named(monkeypatch, where):
    name = "RLHF_KERNELS" if where == "environment" else "impl"
    with pytest.raises(ValueError, match=f"{name}='cuda': expected one of auto, torch, triton"):
        if where == "call":
            choose("op", "cpu", "cuda")
        elif where == "block":
            with use_impl("cuda"):
                pass
        else:
            monkeypatch.setenv("RLHF_KERNELS", "cuda")
            choose("op", "cpu")


@pytest.mark.parametrize("impl", [None, "auto", "torch"])
def test_the_choice_does_not_break_a_graph(impl):
    @torch.compile(fullgraph=True, backend="eager")
    def add(x):
        return x + (1 if choose("op", x.device, impl) == "torch" else 2)

    assert add(torch.zeros(1)).item() == 1


def test_has_triton_looks_and_does_not_import(monkeypatch):
    has_triton.cache_clear()
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert has_triton() is False
    has_triton.cache_clear()


def test_modules_by_name():
    assert implementation("token_logprobs", "torch").__name__ == "rlhf_kernels.token_logprobs.torch_path"
