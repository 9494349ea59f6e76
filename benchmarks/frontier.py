"""Score against KL: PPO, RLOO, GRPO, online DPO and offline DPO on one reward, each at several strengths.

    python benchmarks/frontier.py [--quick] [--only NAME ...] [--seeds N ...] [--draw]

A trained Llama of 260,032 parameters continues stories; a reward model that was trained to prefer positive sentences to
negative ones scores them. Each run is one of the trainers as `rlhf ppo`, `rlhf dpo`, ... run it: an algorithm with one
KL coefficient and one seed, and 1,280 sampled completions in all. The last policy of each is then evaluated in the same
way (`rlhf_core.evaluation.compare`): new completions of the evaluation prompts, their mean score, and the KL of whole
completions to the model that the run started from. Nothing is chosen afterwards: no best step, no best seed.

The learning rate was set once for each algorithm, by hand, after a try or two (OPTIM). Offline DPO gets 640 pairs of
completions of the starting policy, ranked by the same reward model, and sees them twice. They come from a file, as all
of its pairs do, and so end with an end token, though most were truncated; the online algorithms see them as sampled.

Runs that are in the JSON file already, with the same settings, are not repeated: after an interruption the script
continues. The shared data is found through RLHF_SHARED (default: `shared` beside the checkout). Models go to
runs/frontier, results to benchmarks/results and the figure to docs/figures.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from real_road import ROOT, SHARED, STORIES, write_sentiment_pairs

from rlhf_core.config import DataConfig, ModelConfig, OptimConfig, SamplingConfig, Settings
from rlhf_core.data.loader import load_examples
from rlhf_core.data.records import Example
from rlhf_core.evaluation.compare import compare
from rlhf_core.models.load import load_policy, load_reference
from rlhf_core.rollout.engines import sample_completions
from rlhf_core.rollout.rewards import load_model_reward, score_completions
from rlhf_core.seeding import generator
from rlhf_core.trainers import dpo, grpo, online_dpo, ppo, reward, rloo

PROMPTS = str(SHARED / "data" / "prompts_tinystories_{}.jsonl.gz")
RESULTS, FIGURE = ROOT / "benchmarks" / "results" / "2026-11-25-frontier", ROOT / "docs" / "figures" / "frontier.png"
SAMPLING = SamplingConfig(max_new_tokens=24, batch_size=256)


Point = dict[str, Any]  # a run: algorithm, strength, seed, settings, and what `compare` returned


@dataclass(frozen=True)
class Size:
    """How long the runs are."""

    steps: int = 20  # rollouts
    completions: int = 64  # per rollout
    seeds: int = 3
    reward_epochs: float = 3.0
    eval_completions: int = 4  # of each evaluation prompt


STRENGTHS = {  # the KL coefficient, or DPO's beta, in descending order; GRPO's is relative to standardised scores
    "ppo": (1.0, 0.3, 0.1, 0.03),
    "rloo": (1.0, 0.3, 0.1, 0.03),
    "grpo": (0.3, 0.1, 0.03, 0.01),
    "online-dpo": (1.0, 0.3, 0.1, 0.03),
    "dpo": (1.0, 0.3, 0.1, 0.03),
}
NAMES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "online-dpo": "online DPO", "dpo": "offline DPO"}
SETTING = {name: "beta" if name.endswith("dpo") else "kl.coef" for name in NAMES}
OPTIM = {  # Adam's first steps have full size whatever the gradient: without warm-up they only add KL
    "ppo": OptimConfig(lr=3e-4, schedule="linear", warmup_ratio=0.1, eps=1e-5),
    "rloo": OptimConfig(lr=5e-4, schedule="linear", warmup_ratio=0.1),
    "grpo": OptimConfig(lr=5e-4, schedule="linear", warmup_ratio=0.1),
    "online-dpo": OptimConfig(lr=5e-4, schedule="linear", warmup_ratio=0.1),
    "dpo": OptimConfig(lr=3e-4, schedule="linear", warmup_ratio=0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="only check that it works, in a minute; writes to runs/frontier only"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, default=list(NAMES), help="algorithms")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds; 0, 1 and 2 if not given")
    parser.add_argument("--draw", action="store_true", help="only make the figure and the table again")
    options = parser.parse_args()
    size, work, results, figure = Size(), ROOT / "runs" / "frontier", RESULTS, FIGURE
    if options.quick:
        size = Size(steps=2, completions=16, seeds=1, reward_epochs=0.1, eval_completions=1)
        work = work / "quick"
        results, figure = work / "frontier", work / "frontier.png"
    for folder in (results.parent, figure.parent) if options.draw else (work, results.parent, figure.parent):
        folder.mkdir(parents=True, exist_ok=True)
    store = results.with_suffix(".json")
    points = json.loads(store.read_text())["points"] if store.exists() else []
    if not options.draw:
        evaluator = Evaluator(train_reward(work, size), size)
        for seed in options.seeds or range(size.seeds):
            for name in options.only:
                for strength in STRENGTHS[name][:1] if options.quick else STRENGTHS[name]:
                    point = one_run(name, strength, seed, size, work, evaluator, points)
                    points = [old for old in points if not same(old, point)] + [point]
                    write_json(store, points)
    draw(points, figure)
    table = write_table(points)
    results.with_suffix(".md").write_text(table)
    print(table)


# -------------------------------------------------------------------------------------- the reward and the evaluation


def train_reward(work: Path, size: Size) -> str:
    """Train the reward model of real_road.py, on pairs of a positive and a negative sentence; return its folder."""
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
    print(f"reward model: evaluation accuracy {numbers['eval_accuracy']:.3f}", flush=True)
    return str(folder)


class Evaluator:
    """Evaluates every policy with the same prompts, random numbers and reward."""

    def __init__(self, reward_model: str, size: Size):
        self.start, self.tokenizer = load_policy(STORIES)
        self.reward_model = ModelConfig(path=reward_model)
        self.reward = load_model_reward(self.reward_model, self.tokenizer, end_unfinished=True)
        self.examples = self.prompts("train")
        self.eval_examples = list(self.prompts("test")) * size.eval_completions

    def prompts(self, split: str) -> Sequence[Example]:
        data = DataConfig(path=PROMPTS.format(split))
        reserve = SAMPLING.max_new_tokens
        return load_examples(data, self.tokenizer, need="prompts", model=self.start, reserve=reserve)

    def __call__(self, folder: Path) -> dict[str, float]:
        return compare(
            load_reference(folder), self.start, self.eval_examples, self.tokenizer, self.reward, SAMPLING, seed=0
        )[0]

    def write_pairs(self, file: Path, count: int, seed: int) -> None:
        """Write two completions of the starting policy for each of `count` prompts, the better one as chosen."""
        examples = self.examples[:count]
        draws = generator(seed, "pairs of the frontier")
        prompts = [example.prompt for example in examples]
        experience = sample_completions(self.start, self.tokenizer, prompts, SAMPLING, draws, n=2)
        scores = score_completions(self.reward, experience, examples).total.view(-1, 2)
        texts = self.tokenizer.batch_decode(experience.completions, skip_special_tokens=True)
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
    name: str, strength: float, seed: int, size: Size, work: Path, evaluator: Evaluator, points: list[Point]
) -> Point:
    """Train and evaluate, unless the same run is among `points`."""
    folder, pairs = work / f"{name}-{strength:g}-{seed}", work / f"pairs-{seed}.jsonl"
    module, config = config_of(name, strength, seed, size, folder, pairs, evaluator.reward_model)
    point = {
        "algorithm": name,
        "strength": strength,
        "seed": seed,
        "settings": given(config) | {"reward_epochs": size.reward_epochs, "eval_completions": size.eval_completions},
    }
    known = [old for old in points if same(old, point) and old["settings"] == point["settings"]]
    if known:
        return known[0]
    if name == "dpo" and not pairs.exists():
        evaluator.write_pairs(pairs, size.steps * size.completions // 2, seed)
    start = time.monotonic()
    module.train(config)
    seconds = time.monotonic() - start
    numbers = evaluator(folder)
    shutil.rmtree(folder)
    print(
        f"{NAMES[name]:<11} {SETTING[name]} {strength:<4g} seed {seed}: score {numbers['score']:.3f} "
        f"(start {numbers['baseline_score']:.3f}), KL {numbers['kl']:.2f}, {seconds:.0f} s",
        flush=True,
    )
    return point | numbers | {"seconds": round(seconds, 1)}


def config_of(
    name: str, strength: float, seed: int, size: Size, folder: Path, pairs: Path, reward_model: ModelConfig
) -> tuple[ModuleType, Any]:
    """Return the trainer of a run and its settings. `pairs`: the file of offline DPO's pairs."""
    common = dict(
        model=STORIES, output=str(folder), overwrite=(folder / "run.json").exists(), progress=False, seed=seed,
        optim=OPTIM[name], epochs=100,
    )  # fmt: skip
    online = common | dict(
        data=PROMPTS.format("train"), reward_model=reward_model, sampling=SAMPLING, end_unfinished=True,
        max_steps=size.steps,
    )  # fmt: skip
    rows = size.completions
    groups = dict(batch_size=rows // 4, num_generations=4, minibatch_size=rows // 2)
    if name == "ppo":
        kl = dict(coef=strength, control="fixed")
        return ppo, ppo.PPOConfig(**online, batch_size=rows, minibatch_size=rows // 2, rollout_epochs=2, kl=kl)
    if name == "rloo":
        return rloo, rloo.RLOOConfig(**online, **groups, kl=dict(coef=strength))
    if name == "grpo":
        return grpo, grpo.GRPOConfig(**online, **groups, kl=dict(coef=strength))
    if name == "online-dpo":
        sizes = dict(batch_size=rows // 2, minibatch_size=rows // 4)
        return online_dpo, online_dpo.OnlineDPOConfig(**online, **sizes, beta=strength)
    steps = size.steps * 4  # two passes over the pairs
    return dpo, dpo.DPOConfig(**common, data=str(pairs), batch_size=rows // 4, beta=strength, max_steps=steps)


def same(a: Point, b: Point) -> bool:
    """Return whether two points are of the same algorithm, strength and seed."""
    return all(a[key] == b[key] for key in ("algorithm", "strength", "seed"))


def given(config: Settings, job_default: Settings | None = None) -> dict[str, Any]:
    """Return the settings that differ from their defaults, without paths.

    A group of settings has two defaults, its own and `job_default`, that of the job; what differs from either is kept.
    """
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("model", "data", "output", "reward_model", "overwrite", "progress", "seed"):
            continue
        if value != field.default or value != getattr(job_default, field.name, value):
            group = field.default if isinstance(field.default, Settings) else None
            values[field.name] = given(value, group) if isinstance(value, Settings) else value
    return values


def write_json(file: Path, points: list[Point]) -> None:
    """Write the results; an interruption leaves the earlier file."""
    about = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"about": about, "points": points}, indent=1) + "\n")
    temporary.replace(file)


# ---------------------------------------------------------------------------------------------- table and figure


def groups(points: list[Point]) -> dict[str, dict[float, list[Point]]]:
    """Group the points by algorithm and strength, in the order of NAMES and STRENGTHS."""
    found: dict[str, dict[float, list[Point]]] = {}
    for name in NAMES:
        for strength in STRENGTHS[name]:
            some = [p for p in points if p["algorithm"] == name and p["strength"] == strength]
            if some:
                found.setdefault(name, {})[strength] = some
    return found


def mean_and_spread(points: list[Point], key: str) -> tuple[float, float]:
    """Return the mean over seeds and the standard deviation of the sample, NaN for one seed."""
    values = [point[key] for point in points]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def shown(mean: float, spread: float) -> str:
    return f"{mean:.2f}" if math.isnan(spread) else f"{mean:.2f} ± {spread:.2f}"


def write_table(points: list[Point]) -> str:
    start = points[0]
    lines = [
        "python benchmarks/frontier.py: mean score and KL of the final policies, mean and standard deviation over "
        f"{len({p['seed'] for p in points})} seeds,",
        f"each of {start['prompts']} completions of evaluation prompts. The starting policy: score "
        f"{start['baseline_score']:.3f}, KL 0.",
        "",
        "| algorithm | strength | score | KL, nats per completion | wins against the start |",
        "|---|---|---|---|---|",
    ]
    for name, by_strength in groups(points).items():
        for strength, some in by_strength.items():
            cells = [shown(*mean_and_spread(some, key)) for key in ("score", "kl", "win_rate")]
            lines.append(f"| {NAMES[name]} | {SETTING[name]} {strength:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(points: list[Point], file: Path) -> None:
    """Draw a line for each algorithm through its means over seeds, and its seeds as pale dots."""
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
    axis.scatter([0], [start], color="black", marker="*", s=140, zorder=5, label="starting policy")
    axis.set_xlabel("KL to the starting policy, nats per completion")
    axis.set_ylabel("mean score of the reward model")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
