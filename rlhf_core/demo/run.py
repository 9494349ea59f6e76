"""`rlhf demo`: the whole RLHF pipeline on a small invented language.

    pretrain -> SFT -> preference pairs -> reward model -> PPO and DPO, both from the SFT policy -> comparison

Every stage calls the same functions as `rlhf sft`, `rlhf reward`, `rlhf ppo` and `rlhf dpo`.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_core.config import ConfigError, DataConfig, KLConfig, ModelConfig, OptimConfig, SamplingConfig, Settings
from rlhf_core.data.loader import load_examples
from rlhf_core.data.records import Example
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.demo.language import STOP, build_model, true_reward, write_couplet
from rlhf_core.evaluation.compare import compare
from rlhf_core.evaluation.win_rate import win_rate
from rlhf_core.models.load import load_reference, load_tokenizer
from rlhf_core.report.curves import plot_curves
from rlhf_core.rollout.engines import sample_completions
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.rewards import function_reward, load_model_reward
from rlhf_core.seeding import generator
from rlhf_core.trainers import dpo, ppo, reward, sft

MARKER = "demo.json"  # marks the output folder as that of a demo, whose content may be deleted
SAMPLING = SamplingConfig(max_new_tokens=12, batch_size=512)
NAMES = ("base", "sft", "ppo", "dpo")

Table = dict[str, dict[str, float]]
Texts = list[tuple[str, str]]  # (prompt, completion)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Pretrain, fine-tune, train a reward model, then PPO and DPO, on couplets of an invented language."""

    job: ClassVar[str] = "demo"

    output: str = "runs/demo"
    """Folder for all models and results; an earlier demo in it is deleted."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """Train for half as many steps; the improvements are smaller."""
    progress: bool = True
    """Show progress bars."""


def demo(config: DemoConfig) -> Table:
    """Run all stages. Print and return the table {model: {column: value}}."""
    if importlib.util.find_spec("matplotlib") is None:  # checked before minutes of training
        raise ImportError("the demo draws its curves with matplotlib: pip install 'rlhf-core[plots]'")
    started = time.monotonic()
    folder = Path(config.output)
    make_empty(folder)
    data = write_corpus(folder / "data", config.seed)
    train_models(folder, data, config)
    examples = load_examples(DataConfig(path=str(data["held_out"])), load_tokenizer(folder / "sft"), need="prompts")
    table, samples = compare_models(folder, examples, config.seed)
    report = format_table(table) + "\n\n" + format_samples(samples)
    (folder / "report.txt").write_text(report + "\n")
    (folder / MARKER).write_text(json.dumps(table, indent=2) + "\n")
    plot_curves(
        {
            "SFT: loss": (folder / "sft", ["nll"]),
            "reward model: accuracy": (folder / "reward", ["accuracy", "eval_accuracy"]),
            "PPO: score": (folder / "ppo", ["score"]),
            "PPO: KL to the reference": (folder / "ppo", ["kl"]),
            "PPO: entropy": (folder / "ppo", ["entropy"]),
            "DPO: accuracy": (folder / "dpo", ["accuracy", "eval_accuracy"]),
        },
        folder / "curves.png",
    )
    print(f"\n{report}\n")
    print(f"Output in {folder}: models, metrics.jsonl of each run, report.txt and curves.png.")
    print(f"The demo took {time.monotonic() - started:.0f} s.")
    return table


def make_empty(folder: Path) -> None:
    """Create the output folder; delete an earlier demo in it. Raises ConfigError if it has anything else."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError(f"output={str(folder)!r}: expected an empty folder, or one of an earlier demo")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("{}\n")


# ------------------------------------------------------------------------------------------------------------- training


def train_models(folder: Path, data: dict[str, Path], config: DemoConfig) -> None:
    """Train the base model, SFT policy, reward model, and PPO and DPO policies, each in a subfolder of its name."""
    scale = 0.5 if config.quick else 1.0
    common: dict[str, Any] = dict(seed=config.seed, progress=config.progress)
    untrained, base, fine_tuned, scorer = (str(folder / name) for name in ("untrained", "base", "sft", "reward"))
    announce(f"1/6  pretraining a tiny Llama on {data['text'].name}: single lines of Lumo")
    build_model(folder / "untrained", config.seed)
    sft.train(
        sft.SFTConfig(
            model=untrained, data=str(data["text"]), output=base, batch_size=64, epochs=2 * scale,
            optim=OptimConfig(lr=4e-3, warmup_ratio=0.05), **common,
        )
    )  # fmt: skip
    announce("2/6  supervised fine-tuning on couplets, of which one in three rhymes")
    sft.train(
        sft.SFTConfig(
            model=base, data=str(data["couplets"]), eval_data=str(data["held_out"]), output=fine_tuned,
            batch_size=64, epochs=3, optim=OptimConfig(lr=4e-3, warmup_ratio=0.05), **common,
        )
    )  # fmt: skip
    announce("3/6  sampling two lines of the SFT policy for each prompt; the true reward prefers one")
    pairs, eval_pairs = write_pairs(fine_tuned, data["prompts"], config.seed)
    announce("4/6  training a Bradley-Terry reward model on the pairs")
    reward.train(
        reward.RewardConfig(
            model=fine_tuned, data=str(pairs), eval_data=str(eval_pairs), output=scorer,
            batch_size=64, epochs=3, eval_every=50, optim=OptimConfig(lr=2e-3, warmup_ratio=0.05), **common,
        )
    )  # fmt: skip
    announce("5/6  PPO against the reward model")
    ppo.train(
        ppo.PPOConfig(
            model=fine_tuned, reward_model=scorer, data=str(data["prompts"]), output=str(folder / "ppo"),
            batch_size=128, minibatch_size=64, max_steps=int(100 * scale), epochs=100, sampling=SAMPLING,
            kl=KLConfig(coef=0.1, control="adaptive", target=4.0, horizon=1000),
            optim=OptimConfig(lr=2e-3, schedule="linear", eps=1e-5), **common,
        )
    )  # fmt: skip
    announce("6/6  DPO on the same pairs")
    dpo.train(
        dpo.DPOConfig(
            model=fine_tuned, data=str(pairs), eval_data=str(eval_pairs), output=str(folder / "dpo"),
            batch_size=64, epochs=4 * scale, eval_every=50, beta=0.3,
            optim=OptimConfig(lr=1e-3, warmup_ratio=0.1), **common,
        )
    )  # fmt: skip


def announce(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------- data


def write_corpus(folder: Path, seed: int) -> dict[str, Path]:
    """Write lines, couplets, and prompts of Lumo as JSONL files. Return their paths by name."""
    rng = random.Random(seed)
    folder.mkdir()
    couplets = [write_couplet(rng, rhyming=1 / 3) for _ in range(32_400)]
    rows = {
        "text": [{"text": f"{first} {STOP}"} for first, _ in couplets[:4000]],
        "couplets": [{"prompt": first, "completion": second} for first, second in couplets[:12_000]],
        "prompts": [{"prompt": first} for first, _ in couplets[12_000:32_000]],
        "held_out": [{"prompt": first, "completion": second} for first, second in couplets[32_000:]],
    }
    for name, part in rows.items():
        write_rows(folder / f"{name}.jsonl", part)
    return {name: folder / f"{name}.jsonl" for name in rows}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(policy_path: str, prompts: Path, seed: int) -> tuple[Path, Path]:
    """Sample two completions of each prompt and write them as pairs, the better one chosen; ties are left out.

    Returns the paths of the pairs for training and for evaluation.
    """
    tokenizer, policy = load_tokenizer(policy_path), load_reference(policy_path)
    examples = load_examples(DataConfig(path=str(prompts)), tokenizer, need="prompts")
    ids = [example.prompt for example in examples]
    first, second = (
        decode(sample_completions(policy, tokenizer, ids, SAMPLING, generator(seed, f"pairs {i}")), tokenizer)
        for i in (1, 2)
    )
    rows = []
    for (prompt, one), (_, other) in zip(first, second, strict=True):
        gap = true_reward(prompt, one) - true_reward(prompt, other)
        if gap:
            chosen, rejected = (one, other) if gap > 0 else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    paths = prompts.with_name("pairs.jsonl"), prompts.with_name("held_out_pairs.jsonl")
    for path, part in zip(paths, (rows[200:], rows[:200]), strict=True):
        write_rows(path, part)
    return paths


# ----------------------------------------------------------------------------------------------------------- comparison


def compare_models(folder: Path, examples: Sequence[Example], seed: int) -> tuple[Table, dict[str, Texts]]:
    """Compare every model with the SFT policy. Return the table, and a few completions of each model."""
    tokenizer = load_tokenizer(folder / "sft")
    reference = load_reference(folder / "sft")
    learned = load_model_reward(ModelConfig(path=str(folder / "reward")), tokenizer)
    true = function_reward(lambda firsts, seconds, _: list(map(true_reward, firsts, seconds)), tokenizer)
    rows = [example.record.row for example in examples]
    table, samples = {}, {}
    for name in NAMES:
        policy = load_reference(folder / name)
        numbers, (own, baseline) = compare(policy, reference, examples, tokenizer, learned, SAMPLING, seed=seed)
        scores = true(own.prompts, own.completions, rows).total
        table[name] = {
            "true reward": scores.mean().item(),
            "reward model": numbers["score"],
            "KL to SFT": numbers["kl"],
            "wins vs SFT": win_rate(scores, true(baseline.prompts, baseline.completions, rows).total),
        }
        samples[name] = decode(own, tokenizer)[:6]
    return table, samples


def decode(experience: Experience, tokenizer: Tokenizer) -> Texts:
    prompts = tokenizer.batch_decode(experience.prompts, skip_special_tokens=True)
    completions = tokenizer.batch_decode(experience.completions, skip_special_tokens=True)
    return list(zip(prompts, completions, strict=True))


def format_table(table: Table) -> str:
    columns = list(next(iter(table.values())))
    lines = ["held-out prompts" + "".join(f"{column:>14}" for column in columns)]
    for name, row in table.items():
        cells = [f"{row[c]:>14.0%}" if c == "wins vs SFT" else f"{row[c]:>14.2f}" for c in columns]
        lines.append(f"{name:<16}" + "".join(cells))
    return "\n".join(lines)


def format_samples(samples: dict[str, Texts]) -> str:
    lines = ["completions of the same prompts by each model, with their true reward (for nouns that rhyme):"]
    for i, (prompt, _) in enumerate(samples["sft"]):
        lines.append(f"\n  {prompt}")
        for name in NAMES:
            completion = samples[name][i][1]
            lines.append(f"    {name:<5} {completion:<44} {true_reward(prompt, completion):.1f}")
    return "\n".join(lines)
