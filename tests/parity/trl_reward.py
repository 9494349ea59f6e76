"""TRL's `RewardTrainer.compute_loss`: Bradley-Terry with a margin and with centring, on chosen scores."""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset
from golden import Golden, installed, leaf
from torch import Tensor
from trl import RewardConfig, RewardTrainer

SEED = 4
PAIRS = 6


def cases() -> list[dict]:
    """`margin`: whether the batch has that column. The other by the name of `RewardConfig`."""
    return [
        dict(loss_type="bradley_terry", margin=margin, center_rewards_coefficient=coefficient)
        for margin in (False, True)
        for coefficient in (None, 0.05)
    ]


def make() -> Golden:
    golden = Golden(installed("torch", "transformers", "trl"), SEED, _inputs())
    for settings in cases():
        golden.add(settings, **_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    chosen, rejected = tiny.draw(generator, 2, PAIRS, low=-3.0, high=3.0)
    margin = tiny.draw(generator, PAIRS, low=0.0, high=1.0)
    return dict(chosen_scores=chosen, rejected_scores=rejected, margin=margin)


def _run(inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    scores = leaf(torch.cat([inputs["chosen_scores"], inputs["rejected_scores"]]))
    ids = torch.full((2 * PAIRS, 1), tiny.WORD)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if settings["margin"]:
        batch["margin"] = inputs["margin"].double()
    trainer = RewardTrainer(
        model=tiny.reward_model(),
        args=RewardConfig(
            center_rewards_coefficient=settings["center_rewards_coefficient"],
            **tiny.quiet(),
        ),
        train_dataset=Dataset.from_list([dict(chosen="a b", rejected="a c")]),
        processing_class=tiny.tokenizer(),
    )
    # The stand-in swallows `margin`, which TRL hands to the model too.
    loss = trainer.compute_loss(tiny.StandIn((ids, dict(logits=scores[:, None]))), batch)
    loss.backward()
    chosen_gradient, rejected_gradient = scores.grad.chunk(2)
    return dict(loss=loss, chosen_gradient=chosen_gradient, rejected_gradient=rejected_gradient)
