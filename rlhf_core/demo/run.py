"""`rlhf demo`: the whole road on a small invented language.

    pretrain -> SFT -> preference pairs -> reward model -> PPO and DPO, both from the SFT policy -> who wins?

Everything is done by the same functions that `rlhf sft`, `rlhf reward`, `rlhf ppo` and `rlhf dpo` call.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.config import ConfigError, DataConfig, ModelConfig, OptimConfig, SamplingConfig, Settings
from rlhf_core.data.loader import load_examples
from rlhf_core.data.tokenize import stop_ids
from rlhf_core.demo.language import STOP, build_model, true_reward, write_couplet
from rlhf_core.evaluation.compare import compare
from rlhf_core.evaluation.win_rate import win_rate
from rlhf_core.models.load import load_reference, load_tokenizer
from rlhf_core.report.curves import plot_curves
from rlhf_core.rollout.rewards import function_reward, load_model_reward
from rlhf_core.rollout.sampling import Rollout, sample
from rlhf_core.seeding import generator
from rlhf_core.trainers import dpo, ppo, reward, sft

MARKER = "demo.json"


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Pretrain, fine-tune, learn a reward, then PPO and DPO, on couplets of an invented language. Takes minutes."""

    output: str = "runs/demo"
    """Folder for everything; what an earlier demo left in it is deleted."""
    seed: int = 0
    """Everything random follows from it."""
    quick: bool = False
    """A shorter run, for continuous integration; the wins are smaller."""
    progress: bool = True
    """Show progress bars."""


def demo(config: DemoConfig) -> dict[str, dict[str, float]]:
    """Run it all; prints and returns the table {model: {column: value}}."""
    if importlib.util.find_spec("matplotlib") is None:  # said now, not after minutes of training
        raise ImportError("the demo draws its curves with matplotlib: pip install 'rlhf-core[plots]'")
    started = time.monotonic()
    folder = Path(config.output)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError(f"output={config.output!r}: the folder is not empty and holds no earlier demo")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("{}\n")
    scale = 0.5 if config.quick else 1.0
    data = write_corpus(folder / "data", config.seed)
    common = dict(seed=config.seed, progress=config.progress)

    def model(name: str) -> str:
        return str(folder / name)

    say(f"1/6  pretraining a tiny Llama on {data['text'].name}: single lines of Lumo")
    build_model(folder / "untrained", config.seed)
    sft.train(
        sft.SFTConfig(
            model=model("untrained"), data=str(data["text"]), output=model("base"), batch_size=64, epochs=2 * scale,
            optim=OptimConfig(lr=4e-3, warmup_ratio=0.05), **common,
        )
    )  # fmt: skip
    say("2/6  supervised fine-tuning on couplets, of which one in three rhymes")
    sft.train(
        sft.SFTConfig(
            model=model("base"), data=str(data["couplets"]), eval_data=str(data["held_out"]), output=model("sft"),
            batch_size=64, epochs=3, optim=OptimConfig(lr=4e-3, warmup_ratio=0.05), **common,
        )
    )  # fmt: skip
    say("3/6  the SFT policy writes two lines for each prompt, and a critic prefers one")
    pairs, held_out_pairs = write_pairs(model("sft"), data, config.seed)
    say("4/6  a Bradley-Terry reward model learns the critic's taste from the pairs")
    reward.train(
        reward.RewardConfig(
            model=model("sft"), data=str(pairs), eval_data=str(held_out_pairs), output=model("reward"),
            batch_size=64, epochs=3, eval_every=50, optim=OptimConfig(lr=2e-3, warmup_ratio=0.05), **common,
        )
    )  # fmt: skip
    say("5/6  PPO against the reward model")
    ppo.train(
        ppo.PPOConfig(
            model=model("sft"), reward_model=model("reward"), data=str(data["prompts"]), output=model("ppo"),
            batch_size=128, minibatch_size=64, max_steps=int(100 * scale), epochs=100, kl_coef=0.1, kl_target=4.0,
            kl_horizon=1000, sampling=SAMPLING, optim=OptimConfig(lr=2e-3, schedule="linear", eps=1e-5), **common,
        )
    )  # fmt: skip
    say("6/6  DPO on the same pairs")
    dpo.train(
        dpo.DPOConfig(
            model=model("sft"), data=str(pairs), eval_data=str(held_out_pairs), output=model("dpo"),
            batch_size=64, epochs=4 * scale, eval_every=50, beta=0.3,
            optim=OptimConfig(lr=1e-3, warmup_ratio=0.1), **common,
        )
    )  # fmt: skip

    table, samples = judge(folder, data["held_out"], config.seed)
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
    print(f"Everything lies in {folder}: models, metrics.jsonl of each run, report.txt and curves.png.")
    print(f"The whole road took {time.monotonic() - started:.0f} s.")
    return table


SAMPLING = SamplingConfig(max_new_tokens=12, batch_size=512)
NAMES = ("base", "sft", "ppo", "dpo")


def write_corpus(folder: Path, seed: int) -> dict[str, Path]:
    """Lines, couplets, and prompts of Lumo as JSONL."""
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


def write_pairs(policy_path: str, data: dict[str, Path], seed: int) -> tuple[Path, Path]:
    """Two samples of the policy for each prompt, the better one chosen; where both are as good, there is no pair."""
    tokenizer, policy = load_tokenizer(policy_path), load_reference(policy_path)
    examples = load_examples(DataConfig(path=str(data["prompts"])), tokenizer, need="prompts")
    first, second = (
        decode(sample_all(policy, [example.prompt for example in examples], tokenizer, seed, f"pairs {i}"), tokenizer)
        for i in (1, 2)
    )
    rows = []
    for (prompt, one), (_, other) in zip(first, second, strict=True):
        gap = true_reward(prompt, one) - true_reward(prompt, other)
        if gap:
            chosen, rejected = (one, other) if gap > 0 else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    paths = data["prompts"].with_name("pairs.jsonl"), data["prompts"].with_name("held_out_pairs.jsonl")
    for path, part in zip(paths, (rows[200:], rows[:200]), strict=True):
        write_rows(path, part)
    return paths


def judge(folder: Path, prompts: Path, seed: int):
    """The table over held-out prompts, and a few completions of every model side by side."""
    tokenizer = load_tokenizer(folder / "sft")
    examples = load_examples(DataConfig(path=str(prompts)), tokenizer, need="prompts")
    reference = load_reference(folder / "sft")
    learned = load_model_reward(ModelConfig(path=str(folder / "reward")), tokenizer)
    true = function_reward(lambda firsts, seconds, _: list(map(true_reward, firsts, seconds)), tokenizer)
    rows = [example.record.row for example in examples]
    table, samples = {}, {}
    for name in NAMES:
        policy = load_reference(folder / name)
        numbers, (mine, baseline) = compare(policy, reference, examples, tokenizer, learned, SAMPLING, seed=seed)
        scores = true(mine.prompts, mine.completions, rows).total
        table[name] = {
            "true reward": scores.mean().item(),
            "reward model": numbers["score"],
            "KL to SFT": numbers["kl"],
            "wins vs SFT": win_rate(scores, true(baseline.prompts, baseline.completions, rows).total),
        }
        samples[name] = decode(mine, tokenizer)[:6]
    return table, samples


def sample_all(policy, prompts: list[list[int]], tokenizer, seed: int, purpose: str) -> Rollout:
    return sample(
        policy,
        prompts,
        max_new_tokens=SAMPLING.max_new_tokens,
        batch_size=SAMPLING.batch_size,
        stop_ids=stop_ids(tokenizer, policy.generation_config),
        generator=generator(seed, purpose),
    )


def decode(rollout: Rollout, tokenizer) -> list[tuple[str, str]]:
    prompts = tokenizer.batch_decode(rollout.prompts, skip_special_tokens=True)
    completions = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
    return list(zip(prompts, completions, strict=True))


def format_table(table: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(table.values())))
    lines = ["held-out prompts" + "".join(f"{column:>14}" for column in columns)]
    for name, row in table.items():
        cells = [f"{row[c]:>14.0%}" if c == "wins vs SFT" else f"{row[c]:>14.2f}" for c in columns]
        lines.append(f"{name:<16}" + "".join(cells))
    return "\n".join(lines)


def format_samples(samples: dict[str, list[tuple[str, str]]]) -> str:
    lines = ["the same prompts, completed by each (the critic loves nouns that rhyme):"]
    for i, (prompt, _) in enumerate(samples["sft"]):
        lines.append(f"\n  {prompt}")
        for name in NAMES:
            completion = samples[name][i][1]
            lines.append(f"    {name:<5} {completion:<44} {true_reward(prompt, completion):.1f}")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
