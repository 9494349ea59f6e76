"""What a nat of KL buys: PPO, RLOO, GRPO, online DPO and offline DPO on one reward, each at several strengths.

    python benchmarks/frontier.py [--quick] [--only NAME ...] [--seeds N ...] [--draw]

A trained Llama of 260,032 parameters continues stories; a reward model that was taught to prefer kind sentences to
unkind ones says how kind. Each run is one of the trainers as `rlhf ppo`, `rlhf dpo`, ... run it: an algorithm at one
price of KL with one seed, and 1,280 sampled completions in all. The last policy of each is then judged in the same way
(`rlhf_core.evaluation.compare`): fresh completions of held-out prompts, their mean score, and the KL of whole
completions to the model that it started from. Nothing is chosen after the fact: no best step, no best seed.

The learning rate was set once an algorithm, by hand, after a try or two (OPTIM). Offline DPO gets 640 pairs of
completions of the starting policy, ranked by the same reward model, and goes through them twice. They come from a file,
as all of its pairs do, and so end with an end token, though most were cut off; the online loops see them as sampled.

Runs that stand in the JSON file already, with the same settings, are not run again: stopped, it goes on. The material
is found through RLHF_SHARED (default: `shared` beside the checkout). Models go to runs/frontier, what came out to
benchmarks/results and the figure to docs/figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from real_road import ROOT, SHARED, STORIES, write_sentiment_pairs

from rlhf_core.config import DataConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_core.data.loader import load_examples
from rlhf_core.evaluation.compare import compare
from rlhf_core.models.load import load_policy, load_reference
from rlhf_core.rollout.rewards import load_model_reward
from rlhf_core.rollout.steps import roll_out, score
from rlhf_core.seeding import generator
from rlhf_core.trainers import dpo, grpo, online_dpo, ppo, reward, rloo

PROMPTS = str(SHARED / "data" / "prompts_tinystories_{}.jsonl.gz")
RESULTS, FIGURE = ROOT / "benchmarks" / "results" / "2026-11-25-frontier", ROOT / "docs" / "figures" / "frontier.png"
SAMPLING = SamplingConfig(max_new_tokens=24, batch_size=256)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int = 20  # rollouts
    completions: int = 64  # to a rollout
    seeds: int = 3
    reward_epochs: float = 3.0
    held_out: int = 4  # completions of each held-out prompt


STRENGTHS = {  # the price of a nat, or DPO's beta, from the tightest to the loosest; GRPO's is of standardised scores
    "ppo": (1.0, 0.3, 0.1, 0.03),
    "rloo": (1.0, 0.3, 0.1, 0.03),
    "grpo": (0.3, 0.1, 0.03, 0.01),
    "online-dpo": (1.0, 0.3, 0.1, 0.03),
    "dpo": (1.0, 0.3, 0.1, 0.03),
}
NAMES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "online-dpo": "online DPO", "dpo": "offline DPO"}
KNOBS = {name: "beta" if name.endswith("dpo") else "kl_coef" for name in NAMES}
OPTIM = {  # Adam's first steps are of full size whatever the gradient: without warm-up they are nats spent on nothing
    "ppo": OptimConfig(lr=3e-4, schedule="linear", warmup_ratio=0.1, eps=1e-5),
    "rloo": OptimConfig(lr=5e-4, schedule="linear", warmup_ratio=0.1),
    "grpo": OptimConfig(lr=5e-4, schedule="linear", warmup_ratio=0.1),
    "online-dpo": OptimConfig(lr=5e-4, schedule="linear", warmup_ratio=0.1),
    "dpo": OptimConfig(lr=3e-4, schedule="linear", warmup_ratio=0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see that it works, in a minute; in runs/frontier alone")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, default=list(NAMES), help="algorithms")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds; 0, 1 and 2 if not given")
    parser.add_argument("--draw", action="store_true", help="figure and table again, of the runs that there are")
    options = parser.parse_args()
    size, work, results, figure = Size(), ROOT / "runs" / "frontier", RESULTS, FIGURE
    if options.quick:
        size = Size(steps=2, completions=16, seeds=1, reward_epochs=0.1, held_out=1)
        work = work / "quick"
        results, figure = work / "frontier", work / "frontier.png"
    for folder in (results.parent, figure.parent) if options.draw else (work, results.parent, figure.parent):
        folder.mkdir(parents=True, exist_ok=True)
    store = results.with_suffix(".json")
    points = json.loads(store.read_text())["points"] if store.exists() else []
    if not options.draw:
        judge = Judge(train_reward(work, size), size)
        for seed in options.seeds or range(size.seeds):
            for name in options.only:
                for strength in STRENGTHS[name][:1] if options.quick else STRENGTHS[name]:
                    point = one_run(name, strength, seed, size, work, judge, points)
                    points = [old for old in points if not same(old, point)] + [point]
                    write_json(store, points)
    draw(points, figure)
    table = write_table(points)
    results.with_suffix(".md").write_text(table)
    print(table)


# --------------------------------------------------------------------------------------------------------- who is asked


def train_reward(work: Path, size: Size) -> str:
    """The reward model of real_road.py: positive sentences against negative ones, paired at random."""
    folder = work / "reward"
    if (folder / "model.safetensors").exists():
        return str(folder)
    pairs = write_sentiment_pairs(work)
    numbers = reward.train(
        reward.RewardConfig(
            model=STORIES, data=pairs.format("train"), eval_data=pairs.format("test"), output=str(folder),
            overwrite=folder.exists(), progress=False, epochs=size.reward_epochs, batch_size=32,
            optim=OptimConfig(lr=1e-3, warmup_ratio=0.05),
        )
    )  # fmt: skip
    print(f"reward model: held-out accuracy {numbers['eval_accuracy']:.3f}", flush=True)
    return str(folder)


class Judge:
    """The same prompts, the same draws and the same reward for every policy."""

    def __init__(self, reward_model: str, size: Size):
        self.start, self.tokenizer = load_policy(STORIES)
        self.reward_model = ModelConfig(path=reward_model)
        self.reward = load_model_reward(self.reward_model, self.tokenizer, end_unfinished=True)
        options = dict(need="prompts", model=self.start, reserve=SAMPLING.max_new_tokens)
        self.examples = load_examples(DataConfig(path=PROMPTS.format("train")), self.tokenizer, **options)
        self.held_out = load_examples(DataConfig(path=PROMPTS.format("test")), self.tokenizer, **options)
        self.held_out = list(self.held_out) * size.held_out

    def __call__(self, folder: Path) -> dict[str, float]:
        models = load_reference(folder), self.start
        return compare(*models, self.held_out, self.tokenizer, self.reward, SAMPLING, seed=0)[0]

    def write_pairs(self, file: Path, prompts: int, seed: int) -> None:
        """Two completions of the starting policy for each of so many prompts, the better one chosen."""
        examples = self.examples[:prompts]
        draws = generator(seed, "pairs of the frontier")
        rollout = roll_out(self.start, self.tokenizer, [one.prompt for one in examples], SAMPLING, draws, n=2)
        scores = score(self.reward, rollout, examples).total.view(-1, 2)
        texts = self.tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
        rows = []
        for i, example in enumerate(examples):
            better = int(scores[i, 1] > scores[i, 0])
            rows.append(
                {
                    "prompt": example.record.prompt,
                    "chosen": texts[2 * i + better],
                    "rejected": texts[2 * i + 1 - better],
                }
            )
        rows = [row for row in rows if row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------------- the runs


def one_run(
    name: str, strength: float, seed: int, size: Size, work: Path, judge: Judge, points: list[dict[str, Any]]
) -> dict[str, Any]:
    """Train and judge, unless that very run is among `points`."""
    folder = work / f"{name}-{strength:g}-{seed}"
    common = dict(
        model=STORIES, output=str(folder), overwrite=(folder / "run.json").exists(), progress=False, seed=seed,
        optim=OPTIM[name], epochs=100,
    )  # fmt: skip
    online = common | dict(
        data=PROMPTS.format("train"), reward_model=judge.reward_model, sampling=SAMPLING, end_unfinished=True,
        max_steps=size.steps,
    )  # fmt: skip
    each, pairs = size.completions, work / f"pairs-{seed}.jsonl"
    if name == "ppo":
        config = ppo.PPOConfig(
            **online, batch_size=each, minibatch_size=each // 2, ppo_epochs=2, kl_coef=strength, kl_control="fixed"
        )
    elif name == "rloo":
        config = rloo.RLOOConfig(
            **online, batch_size=each // 4, num_generations=4, minibatch_size=each // 2, kl_coef=strength
        )
    elif name == "grpo":
        config = grpo.GRPOConfig(
            **online, batch_size=each // 4, num_generations=4, minibatch_size=each // 2, kl_coef=strength
        )
    elif name == "online-dpo":
        config = online_dpo.OnlineDPOConfig(**online, batch_size=each // 2, minibatch_size=each // 4, beta=strength)
    else:
        steps = size.steps * 4  # two passes over the pairs
        config = dpo.DPOConfig(**common, data=str(pairs), batch_size=each // 4, beta=strength, max_steps=steps)
    point = {
        "algorithm": name,
        "strength": strength,
        "seed": seed,
        "settings": given(config) | {"reward_epochs": size.reward_epochs, "held_out": size.held_out},
    }
    known = [old for old in points if same(old, point) and old["settings"] == point["settings"]]
    if known:
        return known[0]
    if name == "dpo" and not pairs.exists():
        judge.write_pairs(pairs, size.steps * each // 2, seed)
    start = time.monotonic()
    {"ppo": ppo, "rloo": rloo, "grpo": grpo, "online-dpo": online_dpo, "dpo": dpo}[name].train(config)
    seconds = time.monotonic() - start
    numbers = judge(folder)
    shutil.rmtree(folder)
    print(
        f"{NAMES[name]:<11} {KNOBS[name]} {strength:<4g} seed {seed}: score {numbers['score']:.3f} "
        f"(start {numbers['baseline_score']:.3f}), KL {numbers['kl']:.2f}, {seconds:.0f} s",
        flush=True,
    )
    return point | numbers | {"seconds": round(seconds, 1)}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("algorithm", "strength", "seed"))


def given(config: Any) -> dict[str, Any]:
    """What was set that is not the default, without where things lie on this machine."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        here = field.name in ("model", "data", "output", "reward_model", "overwrite", "progress", "seed")
        if not here and value != field.default:
            values[field.name] = given(value) if dataclasses.is_dataclass(value) else value
    return values


def write_json(file: Path, points: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    about = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"about": about, "points": points}, indent=1) + "\n")
    temporary.replace(file)


# ------------------------------------------------------------------------------------------------------ what came of it


def groups(points: list[dict[str, Any]]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """By algorithm and strength, in the order of NAMES and STRENGTHS."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for name in NAMES:
        for strength in STRENGTHS[name]:
            some = [p for p in points if p["algorithm"] == name and p["strength"] == strength]
            if some:
                found.setdefault(name, {})[strength] = some
    return found


def mean_and_spread(points: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Over seeds: the mean, and the standard deviation of the sample, NaN for one seed."""
    values = [point[key] for point in points]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def shown(mean: float, spread: float) -> str:
    return f"{mean:.2f}" if math.isnan(spread) else f"{mean:.2f} ± {spread:.2f}"


def write_table(points: list[dict[str, Any]]) -> str:
    start = points[0]
    lines = [
        "python benchmarks/frontier.py: mean score and KL of the final policies, mean and standard deviation over "
        f"{len({p['seed'] for p in points})} seeds,",
        f"each of {start['prompts']} completions of held-out prompts. The starting policy: score "
        f"{start['baseline_score']:.3f}, KL 0.",
        "",
        "| algorithm | strength | score | KL, nats a completion | wins against the start |",
        "|---|---|---|---|---|",
    ]
    for name, by_strength in groups(points).items():
        for strength, some in by_strength.items():
            cells = [shown(*mean_and_spread(some, key)) for key in ("score", "kl", "win_rate")]
            lines.append(f"| {NAMES[name]} | {KNOBS[name]} {strength:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(points: list[dict[str, Any]], file: Path) -> None:
    """A line an algorithm through its means over seeds, and faint, the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 5))
    for number, (name, by_strength) in enumerate(groups(points).items()):
        color, marker = f"C{number}", "osD^v"[number]
        line = sorted(
            (mean_and_spread(some, "kl")[0], mean_and_spread(some, "score")[0]) for some in by_strength.values()
        )
        axis.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=7, linewidth=1.8, label=NAMES[name])
        seeds = [(point["kl"], point["score"]) for some in by_strength.values() for point in some]
        axis.scatter(*zip(*seeds, strict=True), color=color, marker=marker, s=24, alpha=0.45, linewidths=0)
    start = points[0]["baseline_score"]
    axis.scatter([0], [start], color="black", marker="*", s=140, zorder=5, label="the policy they start from")
    axis.set_xlabel("KL to the starting policy, nats a completion")
    axis.set_ylabel("mean score of the reward model")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
