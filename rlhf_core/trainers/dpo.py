"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): a policy from pairs, no reward model.

    pairs -> tokens -> PackedBatch (prompt once) -> token log-probs of policy and reference (B, T) -> loss -> AdamW

The policy starts as the reference, so the first step's sigmoid loss is ln 2; anything else means that the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_core.config import ConfigError, DataConfig, ModelConfig, RunConfig, did_you_mean, require
from rlhf_core.data.loader import count_steps, load_examples, micro_batches, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss
from rlhf_core.models.forward import device_of, pair_logprobs
from rlhf_core.models.load import load_policy, load_reference, save_model
from rlhf_core.ops.logprobs import use_kernels
from rlhf_core.plugins import import_module
from rlhf_core.rollout.sampling import evaluating
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.reference_cache import cached_logprobs, caching_pays
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class DPOConfig(RunConfig):
    """Train a policy directly on preference pairs."""

    eval_data: DataConfig | None = None
    """Held-out pairs; their implicit-reward accuracy is logged as eval_accuracy."""
    reference: ModelConfig | None = None
    """The model that the policy is held to; the model to start from, if not given."""
    loss: str = "sigmoid"
    """Name of the preference loss (docs/losses.md lists them)."""
    loss_module: str | None = None
    """A Python module of your own that registers a loss, imported first."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""
    cache_reference: Literal["auto", "on", "off"] = "auto"
    """Compute the reference's log-probs once, before the first step; auto does where examples are seen twice."""
    reference_cache: str | None = None
    """Folder for the cached log-probs, to be shared between runs; the output folder, if not given."""

    def __post_init__(self):
        super().__post_init__()
        if self.loss_module is not None:
            import_module(self.loss_module)
        known = f"one of {', '.join(sorted(PREFERENCE_LOSSES))}{did_you_mean(self.loss, PREFERENCE_LOSSES)}"
        require(self.loss in PREFERENCE_LOSSES, "loss", self.loss, known)
        rehearse(self)


def rehearse(config: DPOConfig) -> None:
    """The loss on two numbers, so that a setting it would refuse is refused before anything is loaded."""
    one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    pair = dict(chosen_logprobs=one, rejected_logprobs=one, chosen_mask=mask, rejected_mask=mask)
    pair |= dict(ref_chosen_logprobs=one, ref_rejected_logprobs=one)
    try:
        preference_loss(config.loss, **pair, beta=config.beta, label_smoothing=config.label_smoothing)
    except ValueError as error:
        raise ConfigError(str(error)) from None


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
    size = config.micro_batch_size or config.batch_size
    caching = {"on": True, "off": False, "auto": caching_pays(len(examples), config.batch_size, total_steps)}
    cache = None
    if reference is not None and caching[config.cache_reference]:
        folder = Path(config.reference_cache or Path(config.output, "reference_logprobs"))
        options = dict(folder=folder, batch_size=size, layout=config.model.layout)
        with use_kernels(config.kernels):
            cache, reference = cached_logprobs(reference, [*examples, *held_out], **options), None

    def losses(rows: list[Example]) -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
        """Each micro-batch's part of the loss over all rows, its stats, and its share of them."""
        chosen_tokens = sum(len(row.completions[0]) for row in rows)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            (batch,) = micro_batches(part, None)
            pairs = pair_logprobs(policy, reference, batch, layout=config.model.layout)
            if cache is not None:
                ref_logprobs = batch.to(device_of(policy)).scatter(cache.of(part))
                pairs |= dict(ref_chosen_logprobs=ref_logprobs[0::2], ref_rejected_logprobs=ref_logprobs[1::2])
            loss, stats = preference_loss(
                config.loss,
                **pairs,
                beta=config.beta,
                label_smoothing=config.label_smoothing,
                normalizer=len(rows),
                token_normalizer=chosen_tokens,
            )
            yield loss, stats, len(part) / len(rows)

    with Run("dpo", config, total_steps, modules={"policy": policy}, optimizer=optimizer) as run:
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)
            averages = Averages()
            for loss, stats, share in losses(rows):
                loss.backward()
                averages.add({"loss": loss / share, **stats}, weight=share)
            metrics = averages.means() | optimizer_step(optimizer, config.optim, step, total_steps)
            if held_out and run.evaluate_now(step):
                evaluation = evaluate(policy, held_out, losses)
                metrics |= evaluation
            run.log(step, metrics, show=("loss", "accuracy", "eval_accuracy"))
        run.save(lambda folder: save_model(folder, policy, tokenizer), summary=evaluation)
    return evaluation


@torch.no_grad()
def evaluate(policy: Any, examples: list[Example], losses: Callable) -> dict[str, float]:
    """The training gauges over held-out pairs."""
    averages = Averages()
    with evaluating(policy):
        for loss, stats, share in losses(examples):
            averages.add({"loss": loss / share, **stats}, weight=share)
    return {f"eval_{name}": value for name, value in averages.means().items()}
