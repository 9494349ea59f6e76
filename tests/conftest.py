"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_folder() -> Path:
    """Real weights and data, beside the checkout or where RLHF_SHARED says."""
    return (Path(os.environ.get("RLHF_SHARED", ROOT.parent / "shared")) / "real").resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data. Without it a test is skipped on a laptop and fails in CI."""
    folder = shared_folder()
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"no real material at {folder}: CI may not skip the tests that need it")
        pytest.skip(f"no real material at {folder}; set RLHF_SHARED")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A trained Llama of 260,032 parameters that tells stories."""
    return shared / "models" / "stories260K"
