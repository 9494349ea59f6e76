"""Virtual environments with TRL: one for each version of it, with this environment's torch and transformers."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ENVIRONMENTS = Path(__file__).parent / ".envs"


def trl_python(trl_version: str) -> Path:
    """Return the interpreter of an environment with `trl==trl_version`; the environment is made on first use."""
    folder = ENVIRONMENTS / f"trl-{trl_version}"
    python = folder / "bin" / "python"
    torch = f"torch=={version('torch').split('+')[0]}"
    others = [f"transformers=={version('transformers')}", f"trl=={trl_version}", "datasets", "accelerate"]
    stamp = folder / "stamp.json"
    contents = json.dumps({"python": platform.python_version(), "packages": [torch, *others]}, indent=2)
    if stamp.exists() and stamp.read_text() == contents:
        return python

    print(f"making {folder} (once): {torch} {' '.join(others)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, torch], check=True)  # first and alone, so that no other package selects the version of torch
    subprocess.run([*pip, torch, *others], check=True)
    stamp.write_text(contents)  # last: an interrupted installation has no stamp and is repeated
    return python
