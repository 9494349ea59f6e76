"""The golden files: what a peer's own code made of small inputs. `regenerate.py` writes them, the tests read them.

One safetensors file a peer's trainer. `input.*` are the inputs, shared by every case; `result.*` are what came out, one
row a case, in the order of the cases. Settings, versions and reasons are one JSON text in the header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """Settings by the peer's own names, and the tensors that its code gave for them."""

    settings: dict[str, Any]
    results: dict[str, Tensor]


@dataclass
class Golden:
    """A file's contents. `absent`: cases that the peer refuses or crashes on, and what it said."""

    versions: dict[str, str]
    seed: int
    inputs: dict[str, Tensor]
    cases: dict[str, Case] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, settings: dict[str, Any], **results: Tensor) -> None:
        name = case_name(settings)
        if name in self.cases:
            raise ValueError(f"case {name!r} is there already")
        self.cases[name] = Case(settings, {key: tensor.detach().clone() for key, tensor in results.items()})


def case_name(settings: dict[str, Any]) -> str:
    """The settings on one line, for example "sigmoid+sft loss_weights=1.0+0.5": a failing test's name."""

    def text(value: Any) -> str:
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    return " ".join(text(value) if key == "loss_type" else f"{key}={text(value)}" for key, value in settings.items())


def installed(*packages: str) -> dict[str, str]:
    """Their versions, without the local part that tells a CPU build of torch from another."""
    return {package: version(package).split("+")[0] for package in packages}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def write(name: str, golden: Golden) -> Path:
    tensors = {f"input.{key}": tensor for key, tensor in golden.inputs.items()}
    for key in next(iter(golden.cases.values())).results:
        tensors[f"result.{key}"] = torch.stack([case.results[key] for case in golden.cases.values()])
    header = {
        "versions": golden.versions,
        "seed": golden.seed,
        "cases": {case: golden.cases[case].settings for case in golden.cases},
        "absent": golden.absent,
    }
    # One entry only: safetensors writes several in an order that changes from run to run, and equal versions are to
    # give equal bytes.
    contents = save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"golden": json.dumps(header)})
    FOLDER.mkdir(exist_ok=True)
    path_of(name).write_bytes(contents)
    return path_of(name)


def read(name: str) -> Golden:
    with safe_open(path_of(name), "pt") as file:
        header = json.loads(file.metadata()["golden"])
    tensors = load_file(path_of(name))

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    results = part("result.")
    cases = {
        name: Case(settings, {key: rows[i] for key, rows in results.items()})
        for i, (name, settings) in enumerate(header["cases"].items())
    }
    return Golden(header["versions"], header["seed"], part("input."), cases, header["absent"])


def leaf(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A copy that collects a gradient: of the inputs themselves, one case's would be added to the next one's."""
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def hold(case: Case, tolerance: float = 1e-6, **ours: Tensor) -> None:
    """Ours against every result of the case, relative to each number and, for zeros, to the largest of its tensor."""
    assert ours.keys() == case.results.keys()
    for key, theirs in case.results.items():
        theirs = theirs.double()
        atol = tolerance * theirs.abs().max().item()
        torch.testing.assert_close(
            ours[key].detach().double(), theirs, rtol=tolerance, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )
