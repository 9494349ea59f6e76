"""What the preference jobs learn from real pairs: stories260K on pref_rasbt (polite against plain answers).

    python benchmarks/preference_road.py [job ...]

Every job trains on the same 984 pairs and is evaluated on the same 110 others: how often the polite answer gets the
larger reward, as the job itself defines it (accuracy), and by two measures that are the same for all jobs: the log-prob
minus that of the starting model (log-ratio), and the mean log-prob of a token (likelihood). The table is in
docs/preference.md.

The shared data is found through RLHF_SHARED (default: `shared` beside the checkout). Writes to runs/preference_road.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from real_road import ROOT, SHARED, STORIES
from torch import Tensor

from rlhf_core import load_policy, load_reference, pair_logprobs, preference_batches
from rlhf_core.config import LoraConfig, OptimConfig
from rlhf_core.losses.pairs import Completions, Pairs
from rlhf_core.trainers import dpo, kto, reward

OUT = ROOT / "runs" / "preference_road"
DATA = str(SHARED / "data" / "pref_rasbt_{}.jsonl.gz")

JOBS: dict[str, tuple[Callable, type, dict]] = {
    "reward": (reward.train, reward.RewardConfig, dict(epochs=2)),
    "dpo": (dpo.train, dpo.DPOConfig, {}),
    "ipo": (dpo.train, dpo.IPOConfig, {}),
    "kto": (kto.train, kto.KTOConfig, dict(pairs=True, batch_size=32)),
    "orpo": (dpo.train, dpo.ORPOConfig, dict(optim=OptimConfig(lr=2e-3, warmup_ratio=0.05))),
    "simpo": (dpo.train, dpo.SimPOConfig, {}),
    "cpo": (dpo.train, dpo.CPOConfig, {}),
    "dpo-lora": (dpo.train, dpo.DPOConfig, dict(optim=OptimConfig(lr=5e-3, warmup_ratio=0.05), lora=LoraConfig(r=8))),
}


def main() -> None:
    print("| job | steps | seconds | accuracy | log-ratio | likelihood |\n|---|---|---|---|---|---|")
    print(f"| before | 0 | | | | {by_likelihood(STORIES):.2f} |", flush=True)
    for name in sys.argv[1:] or JOBS:
        train, kind, changes = JOBS[name]
        settings = dict(
            model=STORIES, data=DATA.format("train"), eval_data=DATA.format("test"), output=str(OUT / name),
            batch_size=16, optim=OptimConfig(lr=1e-3, warmup_ratio=0.05), overwrite=(OUT / name).exists(),
            progress=False,
        )  # fmt: skip
        config = kind(**settings | changes)
        start = time.monotonic()
        accuracy = train(config)["eval_accuracy"]
        seconds, steps = time.monotonic() - start, len((OUT / name / "metrics.jsonl").read_text().splitlines())
        others = "| " if name == "reward" else f"{by_log_ratio(OUT / name):.2f} | {by_likelihood(OUT / name):.2f}"
        print(f"| {name} | {steps} | {seconds:.0f} | {accuracy:.2f} | {others} |", flush=True)


@torch.no_grad()
def evaluation_pairs(path: str | Path, reference_path: str | None) -> Iterator[Pairs]:
    """Yield the evaluation pairs with the log-probs of a policy and, where its path is given, of a reference."""
    policy, tokenizer = load_policy(path)
    reference = None if reference_path is None else load_reference(reference_path, policy_tokenizer=tokenizer)
    for batch in preference_batches(DATA.format("test"), tokenizer, batch_size=32, seed=None):
        yield pair_logprobs(policy, reference, batch)


def by_log_ratio(path: Path) -> float:
    """Return how often the chosen answer has the larger log-ratio to the starting model."""
    gaps = [log_ratio(pairs.chosen) - log_ratio(pairs.rejected) for pairs in evaluation_pairs(path, STORIES)]
    return (torch.cat(gaps) > 0).float().mean().item()


def by_likelihood(path: str | Path) -> float:
    """Return how often the chosen answer has the larger mean log-prob per token."""
    gaps = [mean_logprob(pairs.chosen) - mean_logprob(pairs.rejected) for pairs in evaluation_pairs(path, None)]
    return (torch.cat(gaps) > 0).float().mean().item()


def log_ratio(side: Completions) -> Tensor:
    return (side.logprobs - side.ref_logprobs).sum(-1)


def mean_logprob(side: Completions) -> Tensor:
    return side.logprobs.sum(-1) / side.mask.sum(-1)


if __name__ == "__main__":
    main()
