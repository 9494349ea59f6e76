"""Checkpoints: one directory per step, written atomically.

    checkpoints/step-000120/{policy.safetensors, ..., optimizer.safetensors, config.json, state.json, manifest.json}

Everything is written to a temporary name, each file and the directory flushed to disk, the manifest (sizes, sha256,
versions) last, and then the directory is renamed. Reading verifies the manifest, skips damaged checkpoints with the
reason, and takes the newest valid one. Tensors are safetensors, the rest is JSON: nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from rlhf_core.models.adapters import adapter_of, adapter_tensors, load_adapter_tensors

logger = logging.getLogger("rlhf_core.training")
SCHEMA = 1


def save_checkpoint(
    root: Path,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-NNNNNN` and delete all but the last `keep` checkpoints up to it. Return the new directory.

    Args:
        config: the settings of the run. state: the state of controllers and other objects.

    Raises OSError if it could not be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"step-{step:06d}", root / f"step-{step:06d}.tmp-{os.getpid()}"
    for abandoned in root.glob("step-*.tmp-*"):  # left by a process that was killed while saving
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, module in modules.items():
            _save_module(module, temporary / f"{name}.safetensors")
        save_file(_flatten(optimizer), temporary / "optimizer.safetensors")
        (temporary / "config.json").write_text(json.dumps(config, indent=2))
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        manifest = {"schema": SCHEMA, "step": step, "versions": versions(), "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in temporary.iterdir():
            _fsync(path)
        _fsync(temporary)
        if final.exists():  # a damaged one of the same step: the run would have resumed from a valid one
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(root)
    except SafetensorError as error:  # a full disk, most often
        raise OSError(f"{final} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Checkpoints of later steps are damaged, or this run would have resumed from them; they must not displace this one.
    for old in [path for number, path in _numbered(root) if number <= step][:-keep]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(root: Path) -> Path | None:
    """Return the newest valid checkpoint, None if there is none. Log each one skipped with the reason."""
    for _, path in reversed(_numbered(root)):
        fault = find_fault(path)
        if fault is None:
            return path
        logger.warning("skipping checkpoint %s: %s", path, fault)
    return None


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is valid."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["schema"] != SCHEMA:
            return f"its schema is {manifest['schema']}, expected {SCHEMA}"
        for name, expected in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _describe(path / name) != expected:
                return f"{name} differs from what was written (size or checksum)"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    except (KeyError, TypeError, AttributeError):
        return "its manifest is not valid"
    return None


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of every checkpoint, valid or not, ordered by step."""
    return sorted((int(number), path) for path in root.glob("step-*") if (number := path.name[5:]).isdecimal())


def load_checkpoint(
    path: Path, *, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore modules and optimizer in place. Return the saved state."""
    for name, module in modules.items():
        _load_module(module, path / f"{name}.safetensors")
    _unflatten(optimizer, load_file(path / "optimizer.safetensors"))
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def versions() -> dict[str, str]:
    """Return the installed versions of the libraries that results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("rlhf-core", "torch", "transformers", "safetensors", "numpy", "peft", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _save_module(module: nn.Module, file: Path) -> None:
    """Write all weights, or only the adapter's: the rest of such a model does not change."""
    if adapter_of(module) is None:
        save_model(module, str(file))
    else:
        save_file(adapter_tensors(module), file)


def _load_module(module: nn.Module, file: Path) -> None:
    if adapter_of(module) is None:
        load_model(module, str(file))
    else:
        load_adapter_tensors(module, load_file(file))


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return {"parameter number.name": tensor}. Settings of the groups come from the config and are not saved."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
