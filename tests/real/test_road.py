"""The whole road on real weights and real data: stories260K, 260,032 parameters, trained by somebody else.

Short versions, a minute or so each on one core; benchmarks/real_road.py runs the long ones.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path

import pytest
import torch

from rlhf_core.config import DataConfig, KLConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_core.data.loader import load_examples
from rlhf_core.evaluation.compare import compare
from rlhf_core.models.forward import token_logprobs
from rlhf_core.models.load import load_policy, load_reference
from rlhf_core.rollout.rewards import load_model_reward
from rlhf_core.trainers import dpo, ppo, reward, sft
from rlhf_core.training.offline import OfflineRun

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sentiment_reward(shared: Path, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A reward model that prefers kind sentences, and its evaluation numbers."""
    data, folder = shared / "data", tmp_path_factory.mktemp("sentiment")
    rng = random.Random(0)
    for split in ("train", "test"):
        with gzip.open(data / f"sentiment_sentences_{split}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        kind = [row["text"] for row in rows if row["label"] == 1]
        unkind = [row["text"] for row in rows if row["label"] == 0]
        rng.shuffle(kind)
        rng.shuffle(unkind)
        pairs = [{"prompt": "", "chosen": a, "rejected": b} for a, b in zip(kind, unkind, strict=False)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    numbers = reward.train(
        reward.RewardConfig(
            model=str(data.parent / "models" / "stories260K"),
            data=str(folder / "train.jsonl"),
            eval_data=str(folder / "test.jsonl"),
            output=str(folder / "reward"),
            batch_size=32,
            epochs=1.0,
            optim=OptimConfig(lr=1e-3, warmup_ratio=0.05),
            progress=False,
        )
    )
    return folder / "reward", numbers


def test_sft_lowers_the_evaluation_loss(shared: Path, stories: Path, tmp_path: Path):
    """Held-out NLL of the completion falls by at least 20 %."""
    evaluation = DataConfig(path=str(shared / "data" / "sft_rasbt_test.jsonl.gz"))
    config = sft.SFTConfig(
        model=str(stories),
        data=str(shared / "data" / "sft_rasbt_train.jsonl.gz"),
        eval_data=evaluation,
        output=str(tmp_path / "sft"),
        epochs=1,
        optim=OptimConfig(lr=2e-3, warmup_ratio=0.05),
        progress=False,
    )
    with OfflineRun(config, need="supervised", evaluate=sft.evaluate) as run:
        before = sft.evaluate(run)
    after = sft.train(config)
    print(f"\nSFT on sft_rasbt: evaluation NLL {before['eval_nll']:.2f} -> {after['eval_nll']:.2f}")
    assert after["eval_nll"] <= 0.8 * before["eval_nll"], (before, after)


def test_reward_model_learns_politeness(shared: Path, stories: Path, tmp_path: Path):
    numbers = reward.train(
        reward.RewardConfig(
            model=str(stories),
            data=str(shared / "data" / "pref_rasbt_train.jsonl.gz"),
            eval_data=str(shared / "data" / "pref_rasbt_test.jsonl.gz"),
            output=str(tmp_path / "reward"),
            epochs=2,
            optim=OptimConfig(lr=1e-3, warmup_ratio=0.05),
            progress=False,
        )
    )
    print(f"\nreward model on pref_rasbt: evaluation accuracy {numbers['eval_accuracy']:.3f}")
    assert numbers["eval_accuracy"] >= 0.82, numbers


@pytest.mark.slow
def test_reward_model_learns_sentiment(sentiment_reward):
    print(f"\nreward model on sentiment_sentences: evaluation accuracy {sentiment_reward[1]['eval_accuracy']:.3f}")
    assert sentiment_reward[1]["eval_accuracy"] >= 0.70, sentiment_reward[1]


def test_dpo_learns_politeness(shared: Path, stories: Path, tmp_path: Path):
    numbers = dpo.train(
        dpo.DPOConfig(
            model=str(stories),
            data=str(shared / "data" / "pref_rasbt_train.jsonl.gz"),
            eval_data=str(shared / "data" / "pref_rasbt_test.jsonl.gz"),
            output=str(tmp_path / "dpo"),
            epochs=1,
            optim=OptimConfig(lr=5e-4, warmup_ratio=0.05),
            progress=False,
        )
    )
    print(f"\nDPO on pref_rasbt: evaluation accuracy {numbers['eval_accuracy']:.3f}")
    assert numbers["eval_accuracy"] >= 0.80, numbers
    assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_ppo_makes_stories_kinder(shared: Path, stories: Path, sentiment_reward, tmp_path: Path):
    """Score up by a reference standard deviation, KL near its target, and the text still a story."""
    target, prompts = 15.0, shared / "data" / "prompts_tinystories_{}.jsonl.gz"
    sampling = SamplingConfig(max_new_tokens=32, batch_size=200)
    ppo.train(
        ppo.PPOConfig(
            model=str(stories),
            reward_model=str(sentiment_reward[0]),
            data=str(prompts).format("train"),
            output=str(tmp_path / "ppo"),
            batch_size=64,
            minibatch_size=32,
            rollout_epochs=3,
            max_steps=32,
            epochs=10,
            sampling=sampling,
            end_unfinished=True,
            kl=KLConfig(coef=0.1, control="adaptive", target=target, horizon=400),
            optim=OptimConfig(lr=4e-4, schedule="linear", eps=1e-5),
            progress=False,
        )
    )
    reference, policy = load_reference(stories), load_reference(tmp_path / "ppo")
    tokenizer = load_policy(stories)[1]
    examples = load_examples(DataConfig(path=str(prompts).format("test")), tokenizer, need="prompts", model=policy)
    score = load_model_reward(ModelConfig(path=str(sentiment_reward[0])), tokenizer, end_unfinished=True)
    numbers, (after, before) = compare(policy, reference, examples, tokenizer, score, sampling, seed=0)
    spread = score(before.prompts, before.completions, [{}] * len(examples)).total.std().item()

    def reference_logprob(rollout) -> float:
        """Mean log-prob a token under the reference: how much of a story it still is."""
        with torch.no_grad():
            total = sum(token_logprobs(reference, batch).sum().item() for batch in rollout.packs(50))
        return total / sum(map(len, rollout.completions))

    rise, fall = numbers["score"] - numbers["baseline_score"], reference_logprob(before) - reference_logprob(after)
    rows = metrics(tmp_path / "ppo")
    print(f"\nscore {numbers['baseline_score']:.2f} -> {numbers['score']:.2f}, {spread=:.2f}, {fall=:.2f} nats a token")
    print(f"KL {numbers['kl']:.1f} of {target}; by step {[round(row['kl'], 1) for row in rows]}")
    for prompt, text in zip(after.prompts[:4], after.completions[:4], strict=True):
        print(f"- {tokenizer.decode(prompt, skip_special_tokens=True)} ->{tokenizer.decode(text)}")
    assert rise >= 1.0 * spread
    assert sum(row["kl"] for row in rows[-5:]) / 5 == pytest.approx(target, rel=0.35)
    assert fall < 1.0
    assert numbers["win_rate"] > 0.6
