"""RRHF (Yuan et al. 2023, arXiv:2304.05302): make the better of a prompt's completions the likelier, by their rank.

Each step rolls out one batch of prompts and learns from it:

    1. act      num_generations completions for each prompt
    2. score    one score a completion; what counts is their order
    3. improve  a ranking loss by name (docs/losses.md) on each prompt's list of completions, over minibatches

`rrhf` holds mean log-probs to the scores' order and adds the negative log-likelihood of the best; `plackett_luce`, DPO
over rankings, holds log-ratios to the reference to it. Log-probs are those of the distribution that was sampled from,
at its temperature.

Of two completions that score alike neither is better. `flat_groups` counts the prompts without any two that differ: in
them rrhf still learns the first as the best. A completion that the reward gave no score (None) is in no list;
`excluded` counts them. `kept` is the share of prompts with two scores or more, which are learned from. A step without
any is skipped: it has no loss and changes no weight. `skipped` marks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_core.config import ConfigError, OnPolicyConfig, did_you_mean, require
from rlhf_core.data.loader import count_steps, step_examples
from rlhf_core.losses.ranking import RANKED_LOSSES, ranked_preference_loss
from rlhf_core.models.forward import device_of
from rlhf_core.models.load import save_model
from rlhf_core.plugins import import_module
from rlhf_core.rollout.steps import (
    act,
    charge_unfinished,
    evaluate_held_out,
    flat_groups,
    load_actors,
    policy_forward,
    recall,
    rollout_gauges,
    say_how_it_samples,
    score,
    sequence_kl,
    shuffled_minibatches,
)
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class RRHFConfig(OnPolicyConfig):
    """Improve a policy by a ranking loss on its own completions, in the order of their scores."""

    loss: str = "rrhf"
    """Name of the ranking loss: rrhf, plackett_luce (docs/losses.md lists them)."""
    loss_module: str | None = None
    """A Python module of your own that registers a loss, imported first."""
    beta: float = 0.1
    """Strength of the pull to the reference, in losses that have one; rrhf has none."""
    nll_coef: float | None = None
    """Weight of the best completion's negative log-likelihood, of rrhf alone; if not given, as the loss has it (1)."""
    num_generations: int = 4
    """Completions to a prompt, a list to be ranked."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that was cut off, before completions are ranked."""
    batch_size: int = 16
    """Prompts to a rollout."""
    minibatch_size: int = 16
    """Prompts to an optimizer step, each with all of its completions."""
    micro_batch_size: int | None = None
    """Prompts, each with all of its completions, that go through the model at once; memory grows with it, results do
    not change. None: minibatch_size."""
    rollout_epochs: int = 1
    """Passes over each rollout."""

    def __post_init__(self):
        super().__post_init__()
        if self.loss_module is not None:
            import_module(self.loss_module)
        known = f"one of {', '.join(sorted(RANKED_LOSSES))}{did_you_mean(self.loss, RANKED_LOSSES)}"
        require(self.loss in RANKED_LOSSES, "loss", self.loss, known)
        require(self.num_generations > 1, "num_generations", self.num_generations, "2 or more, to be ranked")
        penalty = self.missing_eos_penalty
        require(penalty >= 0, "missing_eos_penalty", penalty, "0 or more")
        require(self.rollout_epochs > 0, "rollout_epochs", self.rollout_epochs, "more than 0")
        rehearse(self)

    def loss_options(self) -> dict[str, Any]:
        return dict(beta=self.beta) | ({} if self.nll_coef is None else {"nll_coef": self.nll_coef})


def rehearse(config: RRHFConfig) -> None:
    """The loss on two numbers, so that a setting it would refuse is refused before anything is loaded."""
    two, mask = torch.zeros(1, 2, 1), torch.ones(1, 2, 1, dtype=torch.bool)
    try:
        ranked_preference_loss(config.loss, logprobs=two, ref_logprobs=two, mask=mask, **config.loss_options())
    except ValueError as error:
        raise ConfigError(str(error)) from None


def train(config: RRHFConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer, reference, reward, examples, held_out = load_actors(config)
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    size, device = config.num_generations, device_of(policy)
    evaluation: dict[str, float] = {}

    write = partial(save_model, model=policy, tokenizer=tokenizer)
    with Run("rrhf", config, total_steps, modules={"policy": policy}, optimizer=optimizer, write=write) as run:
        say_how_it_samples(run, policy)
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act and 2. score. The gauges are of scores as they were given.
            rollout = act(policy, tokenizer, rows, config, "rollout", step, n=size)
            scores = score(reward, rollout, rows)
            mask = rollout.pack().completion_mask.to(device)
            ref_logprobs = recall(rollout, config, lambda batch: policy_forward(reference, batch, config)).logprobs
            kl = sequence_kl(rollout.logprobs.to(device) - ref_logprobs, mask)
            metrics = rollout_gauges(rollout, scores) | {"kl": kl}
            scores = charge_unfinished(scores, rollout, config.missing_eos_penalty)
            total, valid = scores.total.view(-1, size), scores.valid.view(-1, size)
            lists = (valid.sum(-1) > 1).nonzero().flatten()
            metrics |= {
                "flat_groups": int(flat_groups(scores, size).sum()),
                "kept": len(lists) / len(rows),
                "skipped": int(len(lists) == 0),
            }

            # 3. improve. A completion without a token is none, so those without a score lose theirs.
            ranked = (len(rows), size, mask.shape[1])
            mask, ref_logprobs = (mask & scores.valid[:, None].to(device)).view(ranked), ref_logprobs.view(ranked)
            averages = Averages()
            order = shuffled_minibatches(
                len(lists), config.minibatch_size, config.rollout_epochs, seed=config.seed, step=step
            )
            for minibatch in order if len(lists) else ():
                minibatch = lists[minibatch]
                for part in minibatch.split(config.micro_batch_size or len(minibatch)):
                    places = (part[:, None] * size + torch.arange(size)).flatten()
                    batch = rollout.pack(places.tolist(), width=mask.shape[-1])
                    loss, stats = ranked_preference_loss(
                        config.loss,
                        logprobs=policy_forward(policy, batch, config).logprobs.view(-1, *ranked[1:]),
                        mask=mask[part],
                        ref_logprobs=ref_logprobs[part],
                        scores=total[part].to(device),
                        normalizer=len(minibatch),
                        **config.loss_options(),
                    )
                    loss.backward()
                    averages.add({"loss": loss * len(minibatch) / len(part)}, weight=len(part))
                    if pairs := unequal_pairs(total[part], valid[part]):
                        averages.add(stats, weight=pairs)
                averages.add(optimizer_step(optimizer, config.optim, step, total_steps))
            metrics |= averages.means()

            if held_out and run.evaluate_now(step):
                evaluation = evaluate_held_out(policy, reference, tokenizer, reward, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("score", "kl", "accuracy"))
        run.save(summary=evaluation)
    return evaluation


def unequal_pairs(scores: Tensor, valid: Tensor) -> int:
    """How many pairs of completions of one prompt, (P, K) of them, have scores that differ."""
    both = valid[:, :, None] & valid[:, None, :]
    return int((both & (scores[:, :, None] > scores[:, None, :])).sum())
