"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306) and its kin: a policy from single completions, labelled good or bad.

    rows -> tokens -> PackedBatch -> token log-probs of policy and reference (B, T) -> loss -> AdamW

KTO's reference point, how far the policy is from the reference on the whole, is estimated in each step on mismatched
rows: every prompt with the completion of the row before it. It is one number for the whole step, whatever the
micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rlhf_core.config import ConfigError, DataConfig, OptimConfig, require
from rlhf_core.control import RunningMean
from rlhf_core.data.formats import DataError
from rlhf_core.data.loader import Steps, accounts, load_examples, pack_rows, split_rows
from rlhf_core.data.mixture import Mixture
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.preference import unpaired_preference_loss
from rlhf_core.losses.unpaired import UNPAIRED_LOSSES
from rlhf_core.models.forward import device_of, token_logprobs
from rlhf_core.models.load import load_policy, save_model
from rlhf_core.models.routers import router_loss
from rlhf_core.ops.masked import masked_sum
from rlhf_core.trainers.dpo import PreferenceConfig, Rows, cache_if_it_pays, evaluate, load_held_to
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.reference import update_reference
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class KTOConfig(PreferenceConfig):
    """Train a policy on completions that are labelled good or bad, one by one."""

    job: ClassVar[str] = "kto"

    loss: str = "kto"
    """Name of the loss: kto, bco or apo_zero_unpaired (docs/losses.md), or one of your own."""
    desirable_weight: float = 1.0
    """Factor of the loss of a good completion."""
    undesirable_weight: float = 1.0
    """Factor of the loss of a bad one. KTO's authors want the sum of factors of the good rows at 1 to 3/2 times that of
    the bad ones."""
    pairs: bool = False
    """The data are preference pairs: each is two rows, its chosen completion a good one and its rejected a bad one."""
    optim: OptimConfig = OptimConfig(lr=5e-6)

    def __post_init__(self):
        super().__post_init__()
        [entry] = self.named_losses(UNPAIRED_LOSSES, [self.loss]).values()
        needs_kl = "kl" in entry.needs
        require(self.batch_size > 1 or not needs_kl, "batch_size", self.batch_size, "2 or more, to mismatch rows")
        if not entry.needs_reference:
            self.needs_no_reference(f"{self.loss} needs none")
        one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        try:
            row = dict(logprobs=one, ref_logprobs=one, mask=mask, labels=mask[0], kl=0.0 if needs_kl else None)
            unpaired_preference_loss(self.loss, **row, **self.settings())
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def settings(self) -> dict[str, float]:
        """Keywords of `unpaired_preference_loss` that stay the same."""
        return dict(
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            **self.options({self.loss: UNPAIRED_LOSSES[self.loss]}),
        )


def train(config: KTOConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    loading = dict(device=config.device, lora=config.lora, quantize=config.quantize, seed=config.seed)
    policy, tokenizer = load_policy(config.model.path, **loading, **config.model.options())
    need = "preference" if config.pairs else "unpaired"
    read = load_examples(config.data, tokenizer, need=need, model=policy)
    examples, held_out = labelled(read, config.data), []
    if config.eval_data is not None:
        held_out = labelled(load_examples(config.eval_data, tokenizer, need=need, model=policy), config.eval_data)
    optimizer = build_optimizer([policy], config.optim)
    steps = Steps(examples, config)
    total_steps = steps.total
    entry = UNPAIRED_LOSSES[config.loss]
    needs_kl = "kl" in entry.needs
    if needs_kl and len(examples) < 2:
        raise DataError(f"{config.data.path}: one row; expected two or more, to mismatch their completions")
    max_length = config.data.max_length or getattr(policy.config, "max_position_embeddings", None)
    reference, cache = None, None
    if entry.needs_reference:
        reference = load_held_to(config, policy, tokenizer)
        reference, cache = cache_if_it_pays(config, reference, examples, held_out, total_steps, keep=needs_kl)
    modules = {"policy": policy} | ({"reference": reference} if config.reference_update != "none" else {})
    # BCO's threshold: the mean reward of either class over the steps before.
    threshold = {"desirable": RunningMean(), "undesirable": RunningMean()}
    moving = config.loss == "bco" and "delta" not in config.settings()
    evaluation: dict[str, float] = {}

    def logprobs_of(rows: Rows, *, cached: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
        """(B, T) log-probs of policy and reference, and which of them count."""
        batch = pack_rows(rows).to(device_of(policy))
        logprobs = token_logprobs(policy, batch, layout=config.model.layout)
        if cache is not None and cached:
            return logprobs, batch.scatter(cache.of(rows)), batch.loss_mask
        with torch.no_grad():
            known = None if reference is None else token_logprobs(reference, batch, layout=config.model.layout)
        return logprobs, known, batch.loss_mask

    @torch.no_grad()
    def reference_point(rows: Rows) -> Tensor:
        """KTO's estimate over all rows of a step, in nats."""
        total = torch.zeros((), device=device_of(policy))
        for part in split_rows(mismatched(rows, examples, max_length), config):
            logprobs, known, mask = logprobs_of(part, cached=False)
            total += masked_sum(logprobs - known, mask, -1).sum()
        return (total / len(rows)).clamp(min=0)

    def losses(rows: Rows) -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
        """Each micro-batch's part of the loss over all rows, its stats, and its share of them."""
        terms: dict[str, Tensor | float] = {"kl": reference_point(rows)} if needs_kl else {}
        if moving:
            terms["delta"] = sum(mean.mean for mean in threshold.values()) / 2
        settings = config.settings() | terms
        weight = sum(row.weight for row in rows)
        for part in split_rows(rows, config):
            share = len(part) / len(rows)
            with router_loss(policy, config.router_aux_coef) as router:
                logprobs, known, mask = logprobs_of(part)
            labels = torch.tensor([row.record.label for row in part], device=logprobs.device)
            weights = torch.tensor([row.weight for row in part], device=logprobs.device)
            row_terms = dict(logprobs=logprobs, ref_logprobs=known, mask=mask, labels=labels, row_weights=weights)
            loss, _ = unpaired_preference_loss(config.loss, **row_terms, **settings, normalizer=weight)
            zero = config.beta * terms.get("kl", 0.0) + settings.get("delta", 0.0)
            stats = {"loss": loss.detach() / share, **gauges(logprobs, known, mask, labels, config.beta, zero), **terms}
            if config.router_aux_coef:
                stats["router_loss"] = router.value.detach()
            yield loss + router.term(share), stats, share

    def write(folder: Path) -> None:
        save_model(folder, policy, tokenizer)

    kept = dict(modules=modules, optimizer=optimizer, controllers=threshold)
    run = Run(config.job, config, total_steps, **kept, write=write, about={"data": accounts(read)})
    with run:
        for step in run.steps():
            rows = steps.rows(step)
            averages = Averages()
            for loss, stats, share in losses(rows):
                loss.backward()
                averages.add(stats, weight=share)
            metrics = by_class(averages.means()) | optimizer_step(optimizer, config.optim, step, total_steps)
            if held_out and run.evaluate_now(step):
                evaluation = by_class(evaluate(policy, held_out, losses), "eval_")
                metrics |= evaluation
            run.log(step, metrics, show=("loss", "accuracy", "eval_accuracy"))
            for side, part in (("desirable", metrics["desirable"]), ("undesirable", 1 - metrics["desirable"])):
                threshold[side].update(metrics[f"{side}_reward"], round(part * len(rows)))
            update_reference(reference, policy, step, config)
        run.save(summary=evaluation)
    return evaluation


# ----------------------------------------------------------------------------------------------------------------- rows


class Halves(Sequence):
    """Preference pairs as single completions with a label, twice as many: the chosen one good, the rejected one bad."""

    def __init__(self, pairs: Rows):
        self.pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, side = divmod(range(len(self))[index], 2)
        pair = self.pairs[number]
        supervised = None if pair.supervised is None else (pair.supervised[side],)
        record = replace(pair.record, label=side == 0)
        return replace(pair, completions=(pair.completions[side],), supervised=supervised, record=record)

    @property
    def stream_lengths(self) -> np.ndarray:
        """(2n,) tokens of each, as `PackedBatch` holds them."""
        return np.array([len(row.prompt) + len(row.completions[0]) for row in self])


def labelled(examples: Rows, data: DataConfig) -> Rows:
    """Rows as they are where they have a label, and pairs as two rows each."""
    if len(examples[0].completions) == 1:
        return examples
    return (
        Mixture(list(map(Halves, examples.parts)), data.weights) if isinstance(examples, Mixture) else Halves(examples)
    )


def mismatched(rows: Rows, examples: Rows, max_length: int | None) -> list[Example]:
    """Each prompt with the completion of the row before it that has another prompt, the first with that of the last.

    A row that is alone gets one from the data. Prompts lose their left where the two together are too long.
    """
    rows = [*rows]
    near = range(1, min(len(rows), 33))  # of more rows of one prompt than these, the row before it must do
    lenders = [
        next((rows[i - back] for back in near if rows[i - back].prompt != row.prompt), rows[i - 1])
        for i, row in enumerate(rows)
    ]
    if len(rows) == 1:
        lenders = [examples[0] if examples[0].completions != rows[0].completions else examples[1]]
    return [
        replace(
            row,
            prompt=row.prompt if max_length is None else row.prompt[-max(max_length - len(lender.completions[0]), 1) :],
            completions=lender.completions,
            supervised=lender.supervised,
        )
        for row, lender in zip(rows, lenders, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------------- gauges


@torch.no_grad()
def gauges(
    logprobs: Tensor, known: Tensor | None, mask: Tensor, labels: Tensor, beta: float, zero: Tensor | float
) -> dict[str, Tensor]:
    """Means over rows: `accuracy`, the share whose reward is on its label's side of `zero` (a tie counts half);
    `desirable`, the share of good rows; and each class's part of the mean reward, from which `by_class` has its own.
    """
    rewards = beta * masked_sum(logprobs if known is None else logprobs - known, mask, -1)
    signed = torch.where(labels, rewards - zero, zero - rewards)
    return {
        "accuracy": ((signed > 0).float() + 0.5 * (signed == 0).float()).mean(),
        "desirable": labels.float().mean(),
        "desirable_reward": (rewards * labels).mean(),
        "undesirable_reward": (rewards * ~labels).mean(),
    }


def by_class(means: dict[str, float], prefix: str = "") -> dict[str, float]:
    """The rewards as means over their own class, 0 for one that no row was of, and `margin`, their difference."""
    share = means[f"{prefix}desirable"]
    rewards = {}
    for side, part in (("desirable", share), ("undesirable", 1 - share)):
        rewards[side] = means[f"{prefix}{side}_reward"] / part if part > 1e-9 else 0.0
    named = {f"{prefix}{side}_reward": reward for side, reward in rewards.items()}
    return means | named | {f"{prefix}margin": rewards["desirable"] - rewards["undesirable"]}
