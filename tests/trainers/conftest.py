"""A model that trains in milliseconds, data for every job, and one way to run a job and look at what it left."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from rlhf_core.config import OnPolicyConfig, OptimConfig, RunConfig, SamplingConfig
from rlhf_core.demo.language import build_tokenizer
from rlhf_core.trainers import dpo, grpo, kto, online_dpo, ppo, raft, reinforce, reward, rloo, rrhf, sft
from rlhf_core.training.run import Interrupted, Run
from tests.trainers.plain import grouped

# Prompts and answers of different lengths, so that masks and padding matter. All words are Lumo's.
PROMPTS = ["solano peta", "tavelu lari kapi lumira", "galosh", "lakune musa sorune", "zarak goni", "borak tesu vesa",
           "kelano", "sadira wadi kovira reko", "tirosh sulo", "dilune peta hilo"]  # fmt: skip
ANSWERS = ["dolo mutano", "misu", "rena vilano peta", "kapi", "tumo binelu", "vesa", "hilo harelu lari musa", "sani",
           "nabosh goni", "wemosh"]  # fmt: skip

REWARDS = '''
def likes(prompts, completions, rows):
    """One for every dolo, so that the completions, not the tokens, are what is scored."""
    return [float(completion.split().count("dolo")) for completion in completions]


def always_one(prompts, completions, rows):
    return [1.0] * len(prompts)


def dislikes(prompts, completions, rows):
    return [-score for score in likes(prompts, completions, rows)]
'''

STEADY = OptimConfig(lr=3e-3, schedule="linear", eps=1e-3)
"""A large epsilon: Adam would else blow up the rounding of gradients that are all but 0."""


@dataclass
class Outcome:
    """What a run left in its folder, and what `train` returned."""

    config: RunConfig
    result: dict[str, float]

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Of everything that was saved: policy, value head, value model."""
        others = {"checkpoints", "reference_logprobs"}
        files = [path for path in self.folder.rglob("*.safetensors") if not others & {*path.parts}]
        return {
            f"{path.relative_to(self.folder)}:{name}": tensor
            for path in sorted(files)
            for name, tensor in load_file(path).items()
        }

    def same_weights(self, other: Outcome) -> bool:
        ours, theirs = self.weights, other.weights
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    def distance(self, other: Outcome) -> float:
        """The largest difference of any weight."""
        ours, theirs = self.weights, other.weights
        assert ours.keys() == theirs.keys()
        return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


JOBS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # name: (module, config, the settings that make it what it is)
    "sft": (sft, sft.SFTConfig, {}),
    "sft-noisy": (sft, sft.SFTConfig, {"neftune_alpha": 5.0, "loss": "dft"}),
    "sft-smooth": (sft, sft.SFTConfig, {"label_smoothing": 0.1}),
    "reward": (reward, reward.RewardConfig, {"center_coef": 0.01}),
    "reward-ensemble": (reward, reward.RewardConfig, {"ensemble": 3, "label_smoothing": 0.1}),
    "reward-rankings": (reward, reward.RewardConfig, {"learn_from": "rankings"}),
    "reward-steps": (reward, reward.RewardConfig, {"learn_from": "steps"}),
    "dpo": (dpo, dpo.DPOConfig, {}),
    "kto": (kto, kto.KTOConfig, {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.3}),
    "simpo": (dpo, dpo.SimPOConfig, {}),
    "ppo-head": (ppo, ppo.PPOConfig, {"value__model": "head"}),
    "ppo-policy": (ppo, ppo.PPOConfig, {"value__model": "policy"}),
    "ppo-reward": (ppo, ppo.PPOConfig, {"value__model": "reward"}),
    "grpo": (grpo, grpo.GRPOConfig, {}),
    "rloo": (rloo, rloo.RLOOConfig, {}),
    "reinforce": (reinforce, reinforce.ReinforceConfig, {"baseline": "remax"}),
    "online-dpo": (online_dpo, online_dpo.OnlineDPOConfig, {"minibatch_size": 12, "rollout_epochs": 1}),
    "raft": (raft, raft.RAFTConfig, {"kl__coef": 1.0}),
    "rrhf": (rrhf, rrhf.RRHFConfig, {}),
}
DATA = {"sft": "sft", "sft-noisy": "weighted", "sft-smooth": "weighted", "reward": "pairs",
        "reward-ensemble": "margins", "reward-rankings": "rankings", "reward-steps": "steps", "dpo": "pairs",
        "kto": "labelled", "simpo": "pairs"}  # fmt: skip
PPO = dict(minibatch_size=4, rollout_epochs=2, kl__coef=0.2, kl__horizon=20, kl__target=0.1,
           sampling=SamplingConfig(max_new_tokens=5))  # fmt: skip
CRITIC_FREE = dict(
    num_generations=2, minibatch_size=4, rollout_epochs=2, kl__coef=0.2, sampling=SamplingConfig(max_new_tokens=5)
)
BY_CHOICE = dict(num_generations=3, minibatch_size=4, rollout_epochs=2, sampling=SamplingConfig(max_new_tokens=5))


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Iterator[Path]:
    """A folder with a policy, a reward model, data for every job and reward functions."""
    folder = tmp_path_factory.mktemp("trainers")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers_logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    pairs = [
        {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": ANSWERS[(i + 3) % 10]}
        for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
    for name, columns in {
        "sft": ("prompt", "completion"),
        "pairs": ("prompt", "chosen", "rejected"),
        "prompts": ("prompt",),
    }.items():
        rows = [json.dumps({column: pair[column] for column in columns}) + "\n" for pair in pairs]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    write_reward_data(folder, pairs)
    (folder / "lumo_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    settings = dict(batch_size=5, epochs=6, optim=OptimConfig(lr=1e-2), progress=False)
    reward.train(
        reward.RewardConfig(
            model=folder / "policy", data=folder / "pairs.jsonl", output=folder / "reward_model", **settings
        )
    )
    yield folder
    sys.path.remove(str(folder))


def write_reward_data(folder: Path, pairs: list[dict[str, str]]) -> None:
    """Weighted rows, pairs with margins, ranked lists of two to four, and solutions in one to three steps."""
    for i, pair in enumerate(pairs):
        prompt, answers = {"prompt": pair["prompt"]}, [ANSWERS[(i + j) % 10] for j in (0, 3, 5, 8)]
        rows = {
            "labelled": prompt | {"completion": answers[i % 2], "label": i % 2 == 0, "weight": 1 + i % 2},
            "weighted": prompt | {"completion": answers[0], "weight": (0.5, 1.0, 2.0)[i % 3]},
            "margins": prompt | {"chosen": answers[0], "rejected": answers[1], "margin": i / 4, "weight": 1 + i % 2},
            "rankings": prompt | {"completions": answers[: 2 + i % 3], "weight": 1 + i % 2},
            "steps": prompt | {"completions": answers[: 1 + i % 3], "labels": [True, i % 2 == 0, False][: 1 + i % 3]},
        }
        for name, row in rows.items():
            with (folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def configure(material, tmp_path_factory) -> Callable[..., RunConfig]:
    """configure(job, **changes): settings of a short run of the job, each in a folder of its own.

    `kl__coef=0.1` is the setting `kl.coef`.
    """
    number, runs = itertools.count(), tmp_path_factory.mktemp("runs")

    def build(job: str, **changes: Any) -> RunConfig:
        _, kind, settings = JOBS[job]
        data = DATA.get(job, "prompts")
        settings = dict(
            model=material / "policy",
            data=material / f"{data}.jsonl",
            output=runs / f"{job}-{next(number)}",
            batch_size=6,
            max_steps=4,  # 10 rows are 2 steps an epoch, one of 6 rows and one of 4
            epochs=9,
            optim=STEADY,
            progress=False,
            **settings,
        )
        if issubclass(kind, OnPolicyConfig) and not {"reward_function", "judge"} & {*changes}:
            settings |= {"reward_model": material / "reward_model"}
        if kind is ppo.PPOConfig:
            settings |= PPO
        if kind in (grpo.GRPOConfig, rloo.RLOOConfig, reinforce.ReinforceConfig):
            settings |= CRITIC_FREE
        if job in ("online-dpo", "raft", "rrhf"):
            settings = BY_CHOICE | settings
        return kind(**grouped(settings | changes))

    return build


@pytest.fixture(scope="session")
def train(configure) -> Callable[..., Outcome]:
    """train(job, **changes) or train(config): run it and see what it left."""

    def run(job: str | RunConfig, **changes: Any) -> Outcome:
        config = configure(job, **changes) if isinstance(job, str) else job
        module = next(module for module, kind, _ in JOBS.values() if kind is type(config))
        return Outcome(config, module.train(config))

    return run


@pytest.fixture(scope="session")
def plain_run(train) -> Callable[[str], Outcome]:
    """The short run of a job with nothing changed, done once."""
    return functools.cache(train)


@pytest.fixture(scope="session")
def talker(train) -> Path:
    """A policy that has learned the answers so far that it ends many of its completions by itself."""
    return train("sft", max_steps=12, optim=OptimConfig(lr=1e-2, schedule="constant")).folder


@pytest.fixture(scope="session")
def train_with_stops(train) -> Callable[[RunConfig, list[int]], Outcome]:
    """Run a job with Ctrl-C in each of the given steps, resumed after each."""

    def run(config: RunConfig, stops: list[int]) -> Outcome:
        original = Run.log
        for step in stops:

            def log(self, number, *args, stop=step, **options):
                original(self, number, *args, **options)
                if number == stop:
                    os.kill(os.getpid(), signal.SIGINT)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Run, "log", log)
                with pytest.raises(Interrupted, match=f"stopped after step {step} of "):
                    train(config)
            config = replace(config, resume=True)
        return train(config)

    return run
