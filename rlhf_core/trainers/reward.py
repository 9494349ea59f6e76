"""The reward model: a score whose differences explain which completion was preferred (Bradley and Terry).

pairs -> tokens -> PackedBatch (prompt once) -> sequence_scores (2B,) -> -log sigmoid(chosen - rejected) -> AdamW
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf_core.config import DataConfig, RunConfig, require
from rlhf_core.data.loader import count_steps, load_examples, micro_batches, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.reward import bradley_terry_loss
from rlhf_core.models.forward import sequence_scores
from rlhf_core.models.load import load_reward_model, save_model
from rlhf_core.rollout.sampling import evaluating
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Train a Bradley-Terry reward model on preference pairs, from an SFT policy or an earlier reward model."""

    eval_data: DataConfig | None = None
    """Held-out pairs; their accuracy is logged as eval_accuracy."""
    center_coef: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps scores around 0."""

    def __post_init__(self):
        super().__post_init__()
        require(self.center_coef >= 0, "center_coef", self.center_coef, "0 or more")


def train(config: RewardConfig) -> dict[str, float]:
    """Run to the end; the reward model is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    model, tokenizer = load_reward_model(
        config.model.path, device=config.device, seed=config.seed, **config.model.options()
    )
    examples = load_examples(config.data, tokenizer, need="preference", model=model)
    held_out = load_examples(config.eval_data, tokenizer, need="preference", model=model) if config.eval_data else []
    optimizer = build_optimizer([model], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    evaluation: dict[str, float] = {}

    with Run("reward", config, total_steps, modules={"reward_model": model}, optimizer=optimizer) as run:
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)
            averages = Averages()
            for batch in micro_batches(rows, config.micro_batch_size):
                scores = sequence_scores(model, batch, layout=config.model.layout)
                loss, stats = bradley_terry_loss(scores[0::2], scores[1::2], center_coef=config.center_coef)
                share = batch.num_completions / 2 / len(rows)
                (loss * share).backward()
                averages.add({"loss": loss, **stats}, weight=share)
            metrics = averages.means() | optimizer_step(optimizer, config.optim, step, total_steps)
            if held_out and run.evaluate_now(step):
                evaluation = evaluate(model, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("loss", "accuracy", "eval_accuracy"))
        run.save(lambda folder: save_model(folder, model, tokenizer), summary=evaluation)
    return evaluation


@torch.no_grad()
def evaluate(model: Any, examples: list[Example], config: RewardConfig) -> dict[str, float]:
    """Loss, accuracy, margin and mean scores over held-out pairs."""
    averages = Averages()
    with evaluating(model):
        for batch in micro_batches(examples, config.micro_batch_size or config.batch_size):
            scores = sequence_scores(model, batch, layout=config.model.layout)
            loss, stats = bradley_terry_loss(scores[0::2], scores[1::2])
            averages.add({"loss": loss, **stats}, weight=batch.num_completions / 2)
    return {f"eval_{name}": value for name, value in averages.means().items()}
