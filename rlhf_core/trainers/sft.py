"""Supervised fine-tuning: make the completions likely.

    rows -> tokens -> PackedBatch -> log-probs -> negative log-likelihood a token -> AdamW

The loss is on completions only (for plain text, on everything), averaged over all tokens of the optimizer step, so
micro-batches of any size give the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlhf_core.config import DataConfig, RunConfig
from rlhf_core.data.loader import count_steps, load_examples, micro_batches, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import summed_loss, token_logprobs
from rlhf_core.models.load import load_policy, save_model
from rlhf_core.rollout.sampling import evaluating
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Fine-tune a causal language model on prompts with completions, conversations or plain text."""

    eval_data: DataConfig | None = None
    """Held-out rows; their loss is logged as eval_nll."""


def train(config: SFTConfig) -> dict[str, float]:
    """Run to the end; the model is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config.model.path, device=config.device, **config.model.options())
    examples = load_examples(config.data, tokenizer, need="supervised", model=policy)
    held_out = load_examples(config.eval_data, tokenizer, need="supervised", model=policy) if config.eval_data else []
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    evaluation: dict[str, float] = {}

    with Run("sft", config, total_steps, modules={"policy": policy}, optimizer=optimizer) as run:
        for step in run.steps():
            batches = micro_batches(
                step_examples(examples, config.batch_size, seed=config.seed, step=step), config.micro_batch_size
            )
            tokens = sum(batch.num_completion_tokens for batch in batches)
            averages = Averages()
            for batch in batches:
                loss_of = partial(sft_loss, normalizer=tokens)
                loss, logprobs = summed_loss(policy, batch, loss_of, layout=config.model.layout)
                loss.backward()
                _, stats = sft_loss(logprobs, batch.completion_mask.to(logprobs.device))
                averages.add(stats, weight=batch.num_completion_tokens)
            metrics = averages.means() | optimizer_step(optimizer, config.optim, step, total_steps)
            metrics["tokens"] = tokens
            if held_out and run.evaluate_now(step):
                evaluation = evaluate(policy, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("nll", "eval_nll", "lr"))
        run.save(lambda folder: save_model(folder, policy, tokenizer), summary=evaluation)
    return evaluation


@torch.no_grad()
def evaluate(policy: Any, examples: list[Example], config: SFTConfig) -> dict[str, float]:
    """Mean negative log-likelihood of completion tokens, in nats."""
    averages = Averages()
    with evaluating(policy):
        for batch in micro_batches(examples, config.micro_batch_size or config.batch_size):
            logprobs = token_logprobs(policy, batch, layout=config.model.layout)
            _, stats = sft_loss(logprobs, batch.completion_mask.to(logprobs.device))
            averages.add(stats, weight=batch.num_completion_tokens)
    return {f"eval_{name}": value for name, value in averages.means().items()}
