"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): a policy from pairs, no reward model.

    pairs -> tokens -> PackedBatch (prompt once) -> token log-probs of policy and reference (B, T) -> loss -> AdamW

The policy starts as the reference, so the first step's sigmoid loss is ln 2; anything else means that the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf_core.config import DataConfig, ModelConfig, RunConfig, require
from rlhf_core.data.loader import count_steps, load_examples, micro_batches, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss
from rlhf_core.models.forward import pair_logprobs
from rlhf_core.models.load import load_policy, load_reference, save_model
from rlhf_core.rollout.sampling import evaluating
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class DPOConfig(RunConfig):
    """Train a policy directly on preference pairs."""

    eval_data: DataConfig | None = None
    """Held-out pairs; their implicit-reward accuracy is logged as eval_accuracy."""
    reference: ModelConfig | None = None
    """The model that the policy is held to; the model to start from, if not given."""
    loss: str = "sigmoid"
    """Name of the preference loss."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""

    def __post_init__(self):
        super().__post_init__()
        require(self.loss in PREFERENCE_LOSSES, "loss", self.loss, f"one of {', '.join(PREFERENCE_LOSSES)}")
        require(self.beta > 0, "beta", self.beta, "more than 0")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "0 <= label_smoothing < 0.5")


def train(config: DPOConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    reference = None
    if PREFERENCE_LOSSES[config.loss].needs_reference:
        source = config.reference or config.model
        reference = load_reference(source.path, policy_tokenizer=tokenizer, device=config.device, **source.options())
    examples = load_examples(config.data, tokenizer, need="preference", model=policy)
    held_out = load_examples(config.eval_data, tokenizer, need="preference", model=policy) if config.eval_data else []
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    evaluation: dict[str, float] = {}

    def loss_of(batch):
        pairs = pair_logprobs(policy, reference, batch, layout=config.model.layout)
        return preference_loss(config.loss, **pairs, beta=config.beta, label_smoothing=config.label_smoothing)

    with Run("dpo", config, total_steps, modules={"policy": policy}, optimizer=optimizer) as run:
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)
            averages = Averages()
            for batch in micro_batches(rows, config.micro_batch_size):
                loss, stats = loss_of(batch)
                share = batch.num_completions / 2 / len(rows)
                (loss * share).backward()
                averages.add({"loss": loss, **stats}, weight=share)
            metrics = averages.means() | optimizer_step(optimizer, config.optim, step, total_steps)
            if held_out and run.evaluate_now(step):
                evaluation = evaluate(policy, held_out, config, loss_of)
                metrics |= evaluation
            run.log(step, metrics, show=("loss", "accuracy", "eval_accuracy"))
        run.save(lambda folder: save_model(folder, policy, tokenizer), summary=evaluation)
    return evaluation


@torch.no_grad()
def evaluate(policy: Any, examples: list[Example], config: DPOConfig, loss_of: Any) -> dict[str, float]:
    """The training gauges over held-out pairs."""
    averages = Averages()
    with evaluating(policy):
        for batch in micro_batches(examples, config.micro_batch_size or config.batch_size):
            loss, stats = loss_of(batch)
            averages.add({"loss": loss, **stats}, weight=batch.num_completions / 2)
    return {f"eval_{name}": value for name, value in averages.means().items()}
