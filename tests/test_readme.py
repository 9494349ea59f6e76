"""The README's own code, run as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from rlhf_core.cli import JOBS
from rlhf_core.demo.language import build_model, write_couplet
from rlhf_core.losses.preference import PREFERENCE_LOSSES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def write_pairs(folder: Path) -> Path:
    import random

    rng = random.Random(0)
    lines = [write_couplet(rng, rhyming=1.0) for _ in range(20)]
    rows = [{"prompt": first, "chosen": second, "rejected": "peta ."} for first, second in lines]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_loop_in_the_readme_runs_and_learns(tmp_path: Path):
    """The block as it stands, but for the two names of files that a reader must fill in."""
    build_model(tmp_path / "model", seed=0)
    block = python_blocks()[0]
    assert block.count('"path/or/name"') == 2 and block.count('"pairs.jsonl"') == 1
    block = block.replace("path/or/name", str(tmp_path / "model")).replace("pairs.jsonl", str(write_pairs(tmp_path)))
    names: dict = {}
    exec(block, names)
    assert isinstance(names["loss"], torch.Tensor) and torch.isfinite(names["loss"])
    assert names["loss"].item() < 0.693  # three steps from ln 2, on pairs that are easily told apart


def test_the_readme_registers_a_loss():
    try:
        exec(python_blocks()[1], {})
        assert "tempered" in PREFERENCE_LOSSES
    finally:
        PREFERENCE_LOSSES.pop("tempered", None)


def test_the_mathematics_of_the_readme_runs():
    """The block as it stands, on pairs and samples made here."""
    logprobs, mask = -torch.rand(8, 5), torch.ones(8, 5, dtype=torch.bool)
    pairs = dict(chosen_logprobs=logprobs, rejected_logprobs=logprobs, chosen_mask=mask, rejected_mask=mask)
    pairs |= dict(ref_chosen_logprobs=logprobs, ref_rejected_logprobs=logprobs)
    names = dict(pairs=pairs, scores=torch.rand(8), new=logprobs, old=logprobs, reference=-torch.rand(8, 5), mask=mask)
    exec(python_blocks()[2], names)
    assert torch.isfinite(names["loss"]) and names["advantages"].shape == (8,)


def test_the_readme_counts_the_losses():
    listed = re.findall(r"^\| `", (ROOT / "docs" / "losses.md").read_text(), flags=re.MULTILINE)
    assert f"all {len(listed)} losses by name" in README


def test_every_command_in_the_readme_is_a_job_with_those_options():
    commands = re.findall(r"^rlhf (\w+) +(--.*)$", README, flags=re.MULTILINE)
    assert {name for name, _ in commands} >= {"sft", "reward", "ppo", "dpo"}
    assert {name for name, _ in commands} <= set(JOBS)


def test_every_file_the_readme_points_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
