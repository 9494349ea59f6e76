"""The README's own code, run as it is written, and its counts, commands, settings and links."""

from __future__ import annotations

import ast
import importlib
import json
import random
import re
from pathlib import Path

import pytest
import torch

from rlhf_core import Pairs, cli
from rlhf_core.cli import JOBS
from rlhf_core.demo.language import build_model, write_couplet
from rlhf_core.losses.policy import POLICY_LOSSES
from rlhf_core.losses.preference import PREFERENCE_LOSSES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DPO, PPO, NEW_LOSS, MATHEMATICS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def write_rows(path: Path, count: int) -> Path:
    """Write couplets as preference pairs, whose prompts also serve a job that samples."""
    rng = random.Random(0)
    lines = [write_couplet(rng, rhyming=1.0) for _ in range(count)]
    rows = [{"prompt": first, "chosen": second, "rejected": "peta ."} for first, second in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def filled_in(block: str, model: Path, data_name: str, data: Path) -> str:
    """Return the block with the two names of files that a reader must fill in."""
    assert block.count('"path/or/name"') == 2 and block.count(f'"{data_name}"') == 1
    return block.replace("path/or/name", str(model)).replace(data_name, str(data))


def test_the_dpo_loop_runs_and_learns(tmp_path: Path):
    build_model(tmp_path / "model", seed=0)
    names: dict = {}
    exec(filled_in(DPO, tmp_path / "model", "pairs.jsonl", write_rows(tmp_path / "rows.jsonl", 20)), names)
    assert isinstance(names["loss"], torch.Tensor) and torch.isfinite(names["loss"])
    assert names["loss"].item() < 0.693  # three steps from ln 2, on pairs that are easily told apart


def test_the_ppo_loop_runs_and_learns(tmp_path: Path):
    """Six of its twenty steps raise the score, which is the mean number of a letter in a completion."""
    build_model(tmp_path / "model", seed=0)
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    rows.write_text("".join(json.dumps({"prompt": json.loads(row)["prompt"]}) + "\n" for row in rows.open()))
    block = filled_in(PPO, tmp_path / "model", "prompts.jsonl", rows)
    assert block.count("range(20)") == 1 and block.count("return torch.tensor(") == 1
    block = block.replace("range(20)", "range(6)").replace("return torch.tensor(", "return record(")
    scores: list[torch.Tensor] = []

    def record(values: list[float]) -> torch.Tensor:
        scores.append(torch.tensor(values))
        return scores[-1]

    torch.manual_seed(0)
    names: dict = {"record": record}
    exec(block, names)
    assert len(scores) == 6 and scores[-1].mean() > 1.5 * scores[0].mean()
    assert names["kl"][names["mask"]].mean() > 0 and names["ref_logprobs"].grad_fn is None
    assert names["critic"].linear.weight.abs().max() > 0


def test_the_ppo_loop_is_short():
    """About 25 statements, without the imports and the reward."""
    tree = [node for node in ast.parse(PPO).body if not isinstance(node, ast.ImportFrom | ast.Import | ast.FunctionDef)]
    assert sum(isinstance(node, ast.stmt) for top in tree for node in ast.walk(top)) <= 26


def test_the_readme_registers_a_loss():
    try:
        exec(NEW_LOSS, {})
        assert "tempered" in PREFERENCE_LOSSES
    finally:
        PREFERENCE_LOSSES.pop("tempered", None)


def test_the_mathematics_of_the_readme_runs():
    """The block as it stands, on pairs and samples made here."""
    logprobs, mask = -torch.rand(8, 5), torch.ones(8, 5, dtype=torch.bool)
    pairs = Pairs.interleaved(logprobs, mask, ref_logprobs=logprobs)
    names = dict(pairs=pairs, scores=torch.rand(8), new=logprobs, old=logprobs, reference=-torch.rand(8, 5), mask=mask)
    exec(MATHEMATICS, names)
    assert torch.isfinite(names["loss"]) and names["advantages"].shape == (8,)


def test_the_readme_counts_the_losses():
    table = (ROOT / "docs" / "losses.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|.*\| (.*?) \| [^|]* \|$", table, re.MULTILINE)
    of_trl = {kind: sum(cell == kind for _, cell in listed) for kind in ("DPO", "GRPO")}
    text = " ".join(README.split())
    assert f"all {len(listed)} losses by name" in text
    assert f"takes any of {len(PREFERENCE_LOSSES)} losses" in text
    assert f"All {of_trl['DPO']} of TRL's DPO losses and all {of_trl['GRPO']} of its GRPO losses" in text


def test_every_command_in_the_readme_is_a_job_with_those_options():
    commands = re.findall(r"^rlhf ([\w-]+) +(--.*)$", README, flags=re.MULTILINE)
    assert {name for name, _ in commands} >= {"sft", "reward", "ppo", "dpo"}
    for name, words in commands:
        module, kind, _, summary = JOBS[name]
        assert cli.parse(name, getattr(importlib.import_module(module), kind), words.split(), summary)


@pytest.mark.parametrize("option", sorted({*re.findall(r"--([a-z][a-z.-]+[a-z*])", README)} - {"help", "help-all"}))
def test_every_option_in_the_readme_is_one(option):
    """Of a job, or of the scripts whose commands the README gives."""
    known = {name for job in JOBS for name in options_of(job)} | {"config"}
    scripts = [ROOT / "benchmarks" / "vs_trl" / name for name in ("dpo.py", "grpo.py")]
    if option.endswith(".*"):
        assert any(name.startswith(option.removesuffix("*")) for name in known)
    else:
        assert option in known or any(f'"--{option}"' in script.read_text() for script in scripts)


def options_of(job: str) -> set[str]:
    module, kind, _, summary = JOBS[job]
    parser = cli.build_parser(job, getattr(importlib.import_module(module), kind), summary)
    return {name.removeprefix("--") for action in parser._actions for name in action.option_strings}


def test_every_loss_and_baseline_in_the_readme_exists():
    [policy_losses] = re.findall(r"--loss (grpo\|[\w|]+)\|\.\.\.", README)
    assert {*policy_losses.split("|")} <= POLICY_LOSSES.keys()


def test_every_file_the_readme_points_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        file, _, heading = target.partition("#")
        assert (ROOT / file).exists(), target
        if heading:
            text = (ROOT / file).read_text()
            headings = {each.lower().replace(" ", "-") for each in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
            assert heading in headings, target
