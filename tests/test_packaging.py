"""Tests of the package list, the pinned versions and the wheel."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rlhf_core

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"rlhf_core": ROOT / "rlhf_core", "rlhf_kernels": ROOT / "kernels" / "rlhf_kernels"}


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg")
    return parser


def run(*command: str | Path, cwd: Path, path: str = "") -> str:
    """Run a command with PYTHONPATH set to `path`; return its output, or fail with stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_kernels_is_not_a_package():
    """transformers imports any package named `kernels`, which must not be ours."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels.py").exists()


def test_listed_packages_are_the_folders_on_disk(setup_cfg: configparser.ConfigParser):
    listed = setup_cfg["options"]["packages"].split()
    on_disk = {
        ".".join([name, *file.parent.relative_to(folder).parts])
        for name, folder in SOURCES.items()
        for file in folder.rglob("*.py")
    }
    assert listed == sorted(listed)
    assert set(listed) == on_disk
    for package in listed:
        name, *rest = package.split(".")
        assert SOURCES[name].joinpath(*rest, "__init__.py").is_file(), package


def test_transformers_works_with_the_checkout_on_the_path(tmp_path: Path):
    code = "from transformers import LlamaForCausalLM, AttentionInterface; import rlhf_core, rlhf_kernels"
    run(sys.executable, "-c", code, cwd=tmp_path, path=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")


def test_a_real_kernels_distribution_wins(tmp_path: Path):
    """A stub of the package of that name on PyPI, last on the path, is imported and not our folder."""
    stub = tmp_path / "site" / "kernels"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(stub.parent)])
    found = run(sys.executable, "-c", "import kernels; print(kernels.__file__)", cwd=tmp_path, path=path)
    assert Path(found.strip()) == stub / "__init__.py"


def test_every_direct_dependency_is_pinned(setup_cfg: configparser.ConfigParser):
    """Every dependency in setup.cfg has a version in constraints.txt."""
    extras = setup_cfg["options.extras_require"]
    named = [setup_cfg["options"]["install_requires"], *extras.values()]
    names = {line.partition(">")[0].strip() for text in named for line in text.splitlines() if line.strip()}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line and not line.startswith("#")}
    assert names <= pinned, names - pinned


def test_version_of_the_package_and_of_setup_cfg_are_equal(setup_cfg: configparser.ConfigParser):
    assert rlhf_core.__version__ == setup_cfg["metadata"]["version"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_in_a_clean_environment(tmp_path: Path, setup_cfg: configparser.ConfigParser):
    """Build from a copy of the tracked files, install with dependencies, and run outside the checkout."""
    source, outside, environment = tmp_path / "source", tmp_path / "outside", tmp_path / "environment"
    source.mkdir()
    outside.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rlhf_core", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    version = setup_cfg["metadata"]["version"]
    assert wheel.name == f"rlhf_core-{version}-py3-none-any.whl"

    # every file of the packages, and nothing else but the metadata
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    expected = {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in SOURCES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == expected
    assert licenses

    try:
        run(sys.executable, "-m", "venv", environment, cwd=outside)
        scripts = environment / ("Scripts" if os.name == "nt" else "bin")
        python = scripts / "python"
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=outside)
        run(python, "-m", "pip", "check", cwd=outside)
        help_text = run(scripts / "rlhf", "--help", cwd=outside)
        for verb in ("sft", "reward", "dpo", "ppo", "generate", "evaluate", "demo"):
            assert verb in help_text
        code = (
            "import rlhf_core, rlhf_kernels, importlib.metadata as metadata\n"
            "print(rlhf_core.__file__, rlhf_kernels.__file__, metadata.version('rlhf-core'), rlhf_core.__version__)"
        )
        core, kernels, *versions = run(python, "-c", code, cwd=outside).split()
        assert all("site-packages" in path and Path(path).is_relative_to(environment) for path in (core, kernels))
        assert versions == [version, version]
    finally:
        shutil.rmtree(environment, ignore_errors=True)  # more than a gigabyte, and pytest keeps three runs
