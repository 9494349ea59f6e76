"""The long versions of the tests in tests/real: stories260K on real data, all results on evaluation rows.

The shared data is found through RLHF_SHARED (default: `shared` beside the checkout). Writes to runs/real_road.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_core.config import DataConfig, OptimConfig, SamplingConfig
from rlhf_core.evaluation.compare import EvaluateConfig, evaluate
from rlhf_core.trainers import dpo, ppo, reward, sft

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("RLHF_SHARED", ROOT.parent / "shared")) / "real"
STORIES, OUT = str(SHARED / "models" / "stories260K"), ROOT / "runs" / "real_road"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    sentiment = write_sentiment_pairs()
    report("SFT on sft_rasbt, 3 epochs", lambda: sft.train(sft.SFTConfig(**common("sft_rasbt", "sft", 3, 2e-3))))
    report(
        "SFT on sft_alpaca_short, 1 epoch",
        lambda: sft.train(sft.SFTConfig(**common("sft_alpaca_short", "alpaca", 1, 2e-3))),
    )
    report(
        "reward model on pref_rasbt, 4 epochs",
        lambda: reward.train(reward.RewardConfig(**common("pref_rasbt", "rm", 4, 1e-3))),
    )
    report(
        "reward model on sentiment, 3 epochs",
        lambda: reward.train(reward.RewardConfig(**common(sentiment, "sentiment", 3, 1e-3, 32))),
    )
    report("DPO on pref_rasbt, 3 epochs", lambda: dpo.train(dpo.DPOConfig(**common("pref_rasbt", "dpo", 3, 5e-4))))
    report("PPO for more positive stories, 60 steps", run_ppo)


def report(title: str, run: Callable[[], dict[str, float]]) -> None:
    """Run a job and print its time and results."""
    start = time.monotonic()
    numbers = run()
    shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    print(f"{title} ({time.monotonic() - start:.0f} s): {shown}", flush=True)


def common(data: str, name: str, epochs: float, lr: float, batch_size: int = 16) -> dict[str, Any]:
    """Return the settings that all jobs share. `data`: a data set of the shared data, or a path."""
    path = data if "/" in data else str(SHARED / "data" / f"{data}_{{}}.jsonl.gz")
    return dict(
        model=STORIES, data=path.format("train"), eval_data=path.format("test"), output=str(OUT / name), epochs=epochs,
        batch_size=batch_size, optim=OptimConfig(lr=lr, warmup_ratio=0.05), overwrite=(OUT / name).exists(),
        progress=False,
    )  # fmt: skip


def write_sentiment_pairs(folder: Path = OUT) -> str:
    """Write pairs of a positive and a negative sentence, combined at random, as two files.

    Returns their path, with {} in the place of the split, train or test.
    """
    rng = random.Random(0)
    for split in ("train", "test"):
        with gzip.open(SHARED / "data" / f"sentiment_sentences_{split}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        positive, negative = ([row["text"] for row in rows if row["label"] == label] for label in (1, 0))
        rng.shuffle(positive)
        rng.shuffle(negative)
        pairs = [{"prompt": "", "chosen": a, "rejected": b} for a, b in zip(positive, negative, strict=False)]
        (folder / f"sentiment_{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(folder / "sentiment_{}.jsonl")


def run_ppo() -> dict[str, float]:
    """Train with the sentiment reward model, and compare the result with the model that training started from."""
    prompts = str(SHARED / "data" / "prompts_tinystories_{}.jsonl.gz")
    sampling = SamplingConfig(max_new_tokens=48, batch_size=200)
    ppo.train(
        ppo.PPOConfig(
            model=STORIES, reward_model=str(OUT / "sentiment"), data=prompts.format("train"), output=str(OUT / "ppo"),
            overwrite=(OUT / "ppo").exists(), batch_size=128, minibatch_size=64, rollout_epochs=3, max_steps=60,
            epochs=10, kl=dict(coef=0.1, target=20.0, horizon=300), end_unfinished=True, sampling=sampling,
            optim=OptimConfig(lr=4e-4, schedule="linear", eps=1e-5), progress=False,
        )
    )  # fmt: skip
    return evaluate(
        EvaluateConfig(
            model=str(OUT / "ppo"),
            baseline=STORIES,
            reward_model=str(OUT / "sentiment"),
            data=DataConfig(path=prompts.format("test")),
            sampling=sampling,
            end_unfinished=True,
        )
    )


if __name__ == "__main__":
    main()
