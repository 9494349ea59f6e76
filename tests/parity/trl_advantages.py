"""Advantages from rewards, as TRL's GRPO and RLOO trainers make them in `_generate_and_score_completions`.

They are computed in the middle of that method, so it runs whole: what it would generate and what it would score are
given to it. Left out, because we have no counterpart: several reward functions normalised apart (`normalize_then_sum`)
and RLOO's `normalize_advantages`.
"""

from __future__ import annotations

from collections.abc import Callable

import tiny
import torch
from datasets import Dataset
from golden import Golden, installed
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

SEED = 2
GROUP = 4
LENGTHS = [1, 3, 2, 4, 4, 1, 2, 3, 3, 2, 4, 1]


def cases() -> list[dict]:
    """`loss_type` is the trainer, `rewards` which of the inputs; the rest by the names of the trainers' configs."""
    grid = []
    for rewards in ("rewards", "unscorable_rewards"):
        grid += [dict(loss_type="grpo", rewards=rewards, scale_rewards=scale) for scale in ("group", "batch", "none")]
        grid += [dict(loss_type="rloo", rewards=rewards, beta=beta) for beta in (0.0, 0.05)]
    return grid


def make() -> Golden:
    golden = Golden(installed("torch", "transformers", "trl"), SEED, _inputs())
    for settings in cases():
        golden.add(settings, advantages=_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    """Three groups, one of equal rewards; then the same with completions that no reward function scored.

    One of the first group's and three of the last one's, where no sibling is left to be compared with.
    """
    generator = torch.Generator().manual_seed(SEED)
    rewards = tiny.draw(generator, 3, GROUP, low=-2.0, high=3.0)
    rewards[1] = 0.75
    unscorable = rewards.clone()
    unscorable[0, 2] = unscorable[2, :3] = torch.nan
    mask = tiny.ragged_mask(LENGTHS)
    logprobs, ref_logprobs = tiny.draw(generator, 2, *mask.shape, low=-4.0, high=-1.0)
    return {
        "mask": mask,
        "rewards": rewards,
        "unscorable_rewards": unscorable,
        "logprobs": torch.where(mask, logprobs, 0.0),
        "ref_logprobs": torch.where(mask, ref_logprobs, 0.0),
    }


def _run(inputs: dict[str, Tensor], settings: dict) -> Tensor:
    settings = dict(settings)
    rewards = inputs[settings.pop("rewards")].double().reshape(-1, 1)
    prompts, completions = [[tiny.WORD]] * len(LENGTHS), [[tiny.WORD] * length for length in LENGTHS]
    texts = [""] * len(LENGTHS)
    if settings.pop("loss_type") == "grpo":
        trainer = _trainer(GRPOTrainer, GRPOConfig, settings)
        trainer._generate = lambda _: (prompts, completions, None, texts, None, {}, None, [])
    else:
        trainer = _trainer(RLOOTrainer, RLOOConfig, settings)
        trainer._generate = lambda _: (prompts, completions, texts)
    trainer.model.train()
    trainer._calculate_rewards = lambda *_: rewards

    def logprobs(model: object, *_: object, **__: object) -> tuple[Tensor, None, None]:
        return inputs["ref_logprobs" if model is trainer.ref_model else "logprobs"].double(), None, None

    trainer._get_per_token_logps_and_entropies = logprobs
    scored = trainer._generate_and_score_completions([dict(prompt="a")] * len(LENGTHS))
    return scored["advantages"].reshape(-1, GROUP)


def _trainer(trainer: Callable, config: Callable, settings: dict) -> GRPOTrainer | RLOOTrainer:
    return trainer(
        model=tiny.causal_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(
            num_generations=GROUP,
            per_device_train_batch_size=len(LENGTHS),
            **tiny.quiet(),
            **settings,
        ),
        train_dataset=Dataset.from_list([dict(prompt="a")] * len(LENGTHS)),
        processing_class=tiny.tokenizer(),
    )
