"""RAFT (Dong et al. 2023, arXiv:2304.06767): fine-tune on the best of what the policy samples. Best-of-n, learned.

Each step rolls out one batch of prompts and learns from it:

    1. act      num_generations completions for each prompt
    2. score    one score a completion, less kl_coef * log(policy / reference) if that is asked for
    3. choose   the best completion of each prompt, or all that score at least min_score, which is rejection sampling
    4. improve  the negative log-likelihood a token of what was chosen, over minibatches

The likelihood is that of the distribution that was sampled from, at its temperature, so that what moves the policy is
the choice: at another temperature, learning one's own samples would already sharpen or flatten it.

Where all completions of a prompt score alike, the first is the best, and tells nothing; `flat_groups` counts such
prompts. A completion that the reward gave no score (None) is never chosen; `excluded` counts them. `kept` is the share
of completions that were chosen, `kept_score` their mean score, all prices paid. A step without any is skipped: it has
no loss and changes no weight; `skipped` marks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlhf_core.config import OnPolicyConfig, require
from rlhf_core.data.loader import count_steps, step_examples
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import device_of, summed_loss
from rlhf_core.models.load import save_model
from rlhf_core.ops.masked import masked_sum
from rlhf_core.rollout.rewards import Scores
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
class RAFTConfig(OnPolicyConfig):
    """Fine-tune a policy on the best of its own completions, as a reward has them."""

    num_generations: int = 4
    """Completions to a prompt."""
    keep: Literal["best", "all"] = "best"
    """What of a prompt's completions is learned: the best one, or all that reach min_score."""
    min_score: float | None = None
    """Never learn a completion that scores less, all prices paid; none sets no bound."""
    kl_coef: float = 0.0
    """Price of one nat of KL to the reference, taken from the score before completions are chosen."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that was cut off, before completions are chosen."""
    batch_size: int = 32
    """Prompts to a rollout."""
    minibatch_size: int = 32
    """Chosen completions to an optimizer step."""
    rollout_epochs: int = 1
    """Passes over what was chosen of each rollout."""

    def __post_init__(self):
        super().__post_init__()
        least = 2 if self.keep == "best" else 1
        require(self.num_generations >= least, "num_generations", self.num_generations, f"{least} or more")
        bounded = self.keep == "best" or self.min_score is not None
        require(bounded, "min_score", None, "a score with keep='all', else there is nothing to choose by")
        for field in ("kl_coef", "missing_eos_penalty"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(self.rollout_epochs > 0, "rollout_epochs", self.rollout_epochs, "more than 0")


def train(config: RAFTConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer, reference, reward, examples, held_out = load_actors(config)
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    device = device_of(policy)
    evaluation: dict[str, float] = {}

    write = partial(save_model, model=policy, tokenizer=tokenizer)
    with Run("raft", config, total_steps, modules={"policy": policy}, optimizer=optimizer, write=write) as run:
        say_how_it_samples(run, policy)
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act and 2. score. The gauges are of scores as they were given.
            rollout = act(policy, tokenizer, rows, config, "rollout", step, n=config.num_generations)
            scores = score(reward, rollout, rows)
            mask, logprobs = rollout.pack().completion_mask.to(device), rollout.logprobs.to(device)
            ref_logprobs = recall(rollout, config, lambda batch: policy_forward(reference, batch, config)).logprobs
            metrics = rollout_gauges(rollout, scores) | {"kl": sequence_kl(logprobs - ref_logprobs, mask)}

            # 3. choose
            scores = charge_unfinished(scores, rollout, config.missing_eos_penalty)
            price = config.kl_coef * masked_sum(logprobs - ref_logprobs, mask, -1).cpu()
            scores = scores._replace(total=torch.where(scores.valid, scores.total - price, 0.0))
            chosen = choose(scores, config)
            metrics |= {"kept": len(chosen) / len(mask), "skipped": int(len(chosen) == 0)}
            if config.num_generations > 1:
                metrics["flat_groups"] = int(flat_groups(scores, config.num_generations).sum())
            if len(chosen):
                metrics["kept_score"] = scores.total[chosen].mean().item()

            # 4. improve
            averages = Averages()
            order = shuffled_minibatches(
                len(chosen), config.minibatch_size, config.rollout_epochs, seed=config.seed, step=step
            )
            for minibatch in order if len(chosen) else ():
                minibatch = chosen[minibatch].sort().values  # so that completions of one prompt share it
                tokens = int(mask[minibatch].sum())
                for part in minibatch.split(config.micro_batch_size or len(minibatch)):
                    batch = rollout.pack(part.tolist())
                    loss_of = partial(sft_loss, normalizer=tokens)
                    options = dict(temperature=config.sampling.temperature, layout=config.model.layout)
                    loss, new_logprobs = summed_loss(policy, batch, loss_of, **options)
                    loss.backward()
                    _, stats = sft_loss(new_logprobs, batch.completion_mask.to(device))
                    averages.add(stats, weight=batch.num_completion_tokens)
                averages.add(optimizer_step(optimizer, config.optim, step, total_steps))
            metrics |= averages.means()

            if held_out and run.evaluate_now(step):
                evaluation = evaluate_held_out(policy, reference, tokenizer, reward, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("score", "kl", "nll"))
        run.save(summary=evaluation)
    return evaluation


def choose(scores: Scores, config: RAFTConfig) -> Tensor:
    """(R,) rows of the completions to learn, in order."""
    wanted = scores.valid
    if config.keep == "best":
        groups = scores.total.masked_fill(~scores.valid, -torch.inf).view(-1, config.num_generations)
        best = groups.argmax(-1, keepdim=True)
        wanted = wanted & torch.zeros_like(groups, dtype=torch.bool).scatter(1, best, True).flatten()
    if config.min_score is not None:
        wanted = wanted & (scores.total >= config.min_score)
    return wanted.nonzero().flatten()
