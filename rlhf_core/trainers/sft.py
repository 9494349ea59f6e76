"""Supervised fine-tuning: make the completions likely.

    rows -> tokens -> PackedBatch -> log-probs -> negative log-likelihood a token -> AdamW

The loss is on completions only (for plain text, on everything; of several turns, on those that are to be learned). It
is a mean over all tokens of the optimizer step, each weighing what its row weighs:

    sum over rows i, tokens t of   weight_i * loss_it   /   sum over rows i, tokens t of   weight_i

so micro-batches of any size give the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_core.batch import PackedBatch
from rlhf_core.config import DataConfig, RunConfig, require
from rlhf_core.data.loader import Steps, accounts, load_examples, pack_rows, split_rows
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import PolicyOutputs, find_route, policy_outputs, summed_loss
from rlhf_core.models.load import load_policy, save_model
from rlhf_core.models.noise import noisy_embeddings
from rlhf_core.models.routers import router_loss
from rlhf_core.rollout.sampling import evaluating
from rlhf_core.seeding import generator
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Fine-tune a causal language model on prompts with completions, conversations or plain text."""

    eval_data: DataConfig | None = None
    """Held-out rows; their loss and how often the likeliest token is the right one are logged as eval_nll, ..."""
    loss: Literal["nll", "dft"] = "nll"
    """Each token's negative log-likelihood, or dft: times the token's own probability, so that a token which the model
    finds unlikely does not pull harder than others (Wu et al. 2025)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    neftune_alpha: float = 0.0
    """Size of the noise that is added to token embeddings in training (Jain et al. 2023); 5 is usual, 0 is none."""
    router_aux_coef: float = 0.0
    """Weight of the loss that keeps the experts of a mixture busy alike; 0 is none."""

    def __post_init__(self):
        super().__post_init__()
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "label_smoothing", smoothing, "0 <= label_smoothing < 0.5")
        require(self.loss == "nll" or smoothing == 0, "label_smoothing", smoothing, "0 with loss='dft'")
        for field in ("neftune_alpha", "router_aux_coef"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")


def train(config: SFTConfig) -> dict[str, float]:
    """Run to the end; the model is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    options = dict(lora=config.lora, quantize=config.quantize, seed=config.seed, **config.model.options())
    policy, tokenizer = load_policy(config.model.path, device=config.device, **options)
    examples = load_examples(config.data, tokenizer, need="supervised", model=policy)
    held_out = load_examples(config.eval_data, tokenizer, need="supervised", model=policy) if config.eval_data else []
    optimizer = build_optimizer([policy], config.optim)
    steps = Steps(examples, config)
    evaluation: dict[str, float] = {}
    write = partial(save_model, model=policy, tokenizer=tokenizer)
    kept = dict(modules={"policy": policy}, optimizer=optimizer, write=write, about={"data": accounts(examples)})
    with Run("sft", config, steps.total, **kept) as run:
        find_route(policy, config.model.layout)  # its probe is neither to be noisy nor to be watched
        for step in run.steps():
            rows = steps.rows(step)
            place = {id(row): number for number, row in enumerate(rows)}
            whole, averages = weight_of(rows), Averages()
            for part in split_rows(rows, config):
                batch, share = pack_rows(part), len(part) / len(rows)
                noise = [generator(config.seed, "neftune", step, place[id(row)]) for row in part]
                noisy = noisy_embeddings(policy, batch, config.neftune_alpha, noise, layout=config.model.layout)
                with noisy, router_loss(policy, config.router_aux_coef) as router:
                    loss, logprobs = weighted_loss(policy, batch, part, config, normalizer=whole)
                (loss + router.term(share)).backward()
                _, stats = sft_loss(logprobs, batch.loss_mask.to(logprobs.device))
                averages.add({"loss": loss / share}, weight=share)
                averages.add(stats, weight=batch.num_supervised_tokens)
                if config.router_aux_coef:
                    averages.add({"router_loss": router.value}, weight=share)
            metrics = averages.means() | optimizer_step(optimizer, config.optim, step, steps.total)
            metrics["tokens"] = sum(map(supervised_tokens, rows))
            if held_out and run.evaluate_now(step):
                evaluation = evaluate(policy, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("nll", "eval_nll", "lr"))
        run.save(summary={name: evaluation[name] for name in ("eval_nll",) if name in evaluation})
    return evaluation


def weighted_loss(
    policy: Any, batch: PackedBatch, rows: Sequence[Example], config: SFTConfig, *, normalizer: float
) -> tuple[Tensor, Tensor]:
    """What these rows add to the step's loss, and their log-probs, (B, T) without gradient."""
    layout = config.model.layout
    if config.label_smoothing:
        outputs = policy_outputs(policy, batch, mean_logprob=True, layout=layout)
        return loss_of(outputs, batch, rows, config, normalizer=normalizer)[0], outputs.logprobs.detach()
    weights = torch.tensor([row.weight for row in rows])
    weighed = partial(sft_loss, normalizer=normalizer, dft=config.loss == "dft")
    return summed_loss(policy, batch, weighed, weights=weights, layout=layout)


def loss_of(
    outputs: PolicyOutputs, batch: PackedBatch, rows: Sequence[Example], config: SFTConfig, *, normalizer: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from a forward that is there, and the stats of `sft_loss`."""
    device = outputs.logprobs.device
    return sft_loss(
        outputs.logprobs,
        batch.loss_mask.to(device),
        normalizer=normalizer,
        weights=torch.tensor([row.weight for row in rows], device=device)[:, None],
        dft=config.loss == "dft",
        label_smoothing=config.label_smoothing,
        vocab_mean_logprobs=outputs.mean_logprob,
    )


def supervised_tokens(row: Example) -> int:
    """Tokens of a row that are to be learned."""
    return len(row.completions[0]) if row.supervised is None else sum(row.supervised[0])


def weight_of(rows: Iterable[Example]) -> float:
    """The weights of all tokens of these rows together."""
    return math.fsum(row.weight * supervised_tokens(row) for row in rows)


@torch.no_grad()
def evaluate(policy: Any, examples: Sequence[Example], config: SFTConfig) -> dict[str, float]:
    """Over held-out rows: `eval_loss` as in training, but for noise; `eval_nll`, in nats a token, weights aside;
    `eval_perplexity`, its exponential; `eval_accuracy`, how often the likeliest token is the right one."""
    averages, whole = Averages(), weight_of(examples)
    asked = dict(mean_logprob=config.label_smoothing > 0, likeliest=True, layout=config.model.layout)
    with evaluating(policy):
        for part in split_rows(examples, config):
            batch, share = pack_rows(part), len(part) / len(examples)
            outputs = policy_outputs(policy, batch, **asked)
            loss, stats = loss_of(outputs, batch, part, config, normalizer=whole)
            right = outputs.likeliest[batch.loss_mask.to(outputs.likeliest.device)]
            averages.add({"loss": loss / share}, weight=share)
            averages.add(stats | {"accuracy": right.float().mean()}, weight=batch.num_supervised_tokens)
    means = averages.means()
    means["perplexity"] = math.exp(min(means["nll"], 700.0))  # e^710 is more than a float holds
    return {f"eval_{name}": value for name, value in means.items()}
