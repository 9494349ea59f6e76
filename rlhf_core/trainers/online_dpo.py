"""Online DPO (Guo et al. 2024, arXiv:2402.04792): a preference loss on pairs that the policy has just sampled itself.

Each step rolls out one batch of prompts and learns from it:

    1. act      num_generations completions for each prompt, two if not told otherwise
    2. compare  the best against the worst score of a prompt, or the two as a judge has them: one pair a prompt
    3. improve  a preference loss by name (docs/losses.md) on the pairs, over minibatches

XPO (Xie et al. 2024, arXiv:2405.21046, algorithm 1) holds a completion of the policy against one of the reference, and
adds a bonus for leaving what the reference would say:

    loss + xpo_alpha * log policy(the reference's completion)

The algorithm learns anew from all pairs so far; this loop, as for the other losses, from those of the step.

Log-probs, of the policy and of the reference, are those of the distribution that was sampled from: at its temperature.

A prompt without two scores, or whose best scores no more than its worst, makes no pair; nor do two completions between
which the judge does not decide. `ties` counts those that were compared in vain, `kept` is the share of prompts with a
pair. A step without any pair is skipped: it has no loss and changes no weight. `skipped` marks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.config import ConfigError, OnPolicyConfig, did_you_mean, require
from rlhf_core.data.loader import count_steps, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss
from rlhf_core.models.forward import device_of
from rlhf_core.models.load import save_model
from rlhf_core.plugins import import_module
from rlhf_core.rollout.judges import Judge, Verdicts, in_random_order, load_judge
from rlhf_core.rollout.rewards import Scores
from rlhf_core.rollout.sampling import Rollout
from rlhf_core.rollout.steps import (
    act,
    charge_unfinished,
    evaluate_held_out,
    load_actors,
    policy_forward,
    recall,
    rollout_gauges,
    say_how_it_samples,
    score,
    sequence_kl,
    shuffled_minibatches,
)
from rlhf_core.trainers.dpo import rehearse
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnPolicyConfig):
    """Improve a policy by a preference loss on pairs that it samples, ranked by a reward or by a judge."""

    judge: str | None = None
    """module:function, in place of a reward: called with lists of prompts, first completions, second completions and
    data rows, it returns for each pair 0 or 1, the better one, or None for a tie. Which is first is drawn by lot.
    Held-out prompts are then judged against the reference, and eval_win_rate is logged."""
    loss: str = "sigmoid"
    """Name of the preference loss: sigmoid, ipo, ... (docs/losses.md lists them)."""
    loss_module: str | None = None
    """A Python module of your own that registers a loss, imported first."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """Probability that a comparison is wrong."""
    xpo_alpha: float | None = None
    """XPO: hold each completion against one of the reference, and add this times the latter's log-prob to the loss;
    none samples both from the policy."""
    num_generations: int = 2
    """Completions to a prompt, of which the best and the worst make a pair."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that was cut off, before scores are compared."""
    batch_size: int = 32
    """Prompts to a rollout."""
    minibatch_size: int = 32
    """Pairs to an optimizer step."""
    micro_batch_size: int | None = None
    """Pairs that go through the model at once; memory grows with it, results do not change. None: minibatch_size."""
    rollout_epochs: int = 1
    """Passes over each rollout."""

    def __post_init__(self):
        super().__post_init__()
        if self.judge is not None and (super().reward_sources() or self.reward_weights is not None):
            raise ConfigError(f"judge={self.judge!r}: expected a judge or a reward, not both")
        if self.loss_module is not None:
            import_module(self.loss_module)
        known = f"one of {', '.join(sorted(PREFERENCE_LOSSES))}{did_you_mean(self.loss, PREFERENCE_LOSSES)}"
        require(self.loss in PREFERENCE_LOSSES, "loss", self.loss, known)
        rehearse(self)
        micro, pairs = self.micro_batch_size, self.minibatch_size
        whole = not PREFERENCE_LOSSES[self.loss].across_pairs or micro is None or micro >= pairs
        require(whole, "micro_batch_size", micro, f"none, because loss={self.loss!r} looks across a minibatch's pairs")
        require(self.num_generations > 1, "num_generations", self.num_generations, "2 or more, to be compared")
        for name in ("judge", "xpo_alpha"):
            two = f"2, because {name}={getattr(self, name)!r} compares two"
            alone = getattr(self, name) is None or self.num_generations == 2
            require(alone, "num_generations", self.num_generations, two)
        require(self.xpo_alpha is None or self.xpo_alpha >= 0, "xpo_alpha", self.xpo_alpha, "0 or more, or none")
        penalty, scored = self.missing_eos_penalty, self.judge is None
        require(penalty >= 0, "missing_eos_penalty", penalty, "0 or more")
        require(scored or penalty == 0, "missing_eos_penalty", penalty, "0, because a judge gives no scores")
        require(self.rollout_epochs > 0, "rollout_epochs", self.rollout_epochs, "more than 0")

    def reward_sources(self) -> tuple[str, ...]:
        """A judge stands in for all of them."""
        return super().reward_sources() if self.judge is None else (self.judge,)


def train(config: OnlineDPOConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer, reference, reward, examples, held_out = load_actors(config)
    judge = None if config.judge is None else load_judge(config.judge, tokenizer, timeout=config.reward_timeout)
    reference.generation_config = policy.generation_config  # where it samples, it stops at the same tokens
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    device, explore = device_of(policy), config.xpo_alpha is not None
    evaluation: dict[str, float] = {}

    write = partial(save_model, model=policy, tokenizer=tokenizer)
    with Run("online-dpo", config, total_steps, modules={"policy": policy}, optimizer=optimizer, write=write) as run:
        say_how_it_samples(run, policy)
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act. To explore, the even rows are the policy's and the odd ones the reference's.
            n = 1 if explore else config.num_generations
            own = rollout = act(policy, tokenizer, rows, config, "rollout", step, n=n)
            if explore:
                rollout = side_by_side(own, act(reference, tokenizer, rows, config, "reference", step))
            ours = slice(None, None, 2 if explore else None)
            mask = rollout.pack().completion_mask.to(device)
            ref_logprobs = recall(rollout, config, lambda batch: policy_forward(reference, batch, config)).logprobs
            kl = sequence_kl((rollout.logprobs.to(device) - ref_logprobs)[ours], mask[ours])

            # 2. compare. The gauges are of the policy's own completions, and of scores as they were given.
            if judge is None:
                scores = score(reward, rollout, rows)
                metrics = rollout_gauges(own, scores.keep(ours))
                scores = charge_unfinished(scores, rollout, config.missing_eos_penalty)
                pairs = best_and_worst(scores, rollout.group_size)
            else:
                metrics = {
                    "length": sum(map(len, own.completions)) / len(own.completions),
                    "eos_rate": own.finished.float().mean().item(),
                }
                pairs = judged_pairs(ask(judge, rollout, rows, config.seed, "judge", step))
            count = len(pairs.chosen)
            metrics |= {"kl": kl, "kept": count / len(rows), "ties": pairs.ties, "skipped": int(count == 0)}
            if explore and count:
                metrics["win_rate"] = (pairs.chosen % 2 == 0).float().mean().item()

            # 3. improve
            averages = Averages()
            order = shuffled_minibatches(
                count, config.minibatch_size, config.rollout_epochs, seed=config.seed, step=step
            )
            for minibatch in order if count else ():
                tokens = mask[pairs.chosen[minibatch]].sum()
                for part in minibatch.split(config.micro_batch_size or len(minibatch)):
                    both = torch.stack([pairs.chosen[part], pairs.rejected[part]], 1).flatten()
                    batch = rollout.pack(both.tolist(), width=mask.shape[1])
                    logprobs = policy_forward(policy, batch, config).logprobs
                    loss, stats = preference_loss(
                        config.loss,
                        **by_side(logprobs, ref_logprobs[both], mask[both]),
                        beta=config.beta,
                        label_smoothing=config.label_smoothing,
                        normalizer=len(minibatch),
                        token_normalizer=tokens,
                    )
                    if explore:
                        explored = logprobs[(both % 2 == 1).to(device)].sum()
                        loss = loss + config.xpo_alpha * explored / len(minibatch)
                        stats["explored_logprob"] = explored / len(part)
                    loss.backward()
                    averages.add({"loss": loss * len(minibatch) / len(part), **stats}, weight=len(part))
                averages.add(optimizer_step(optimizer, config.optim, step, total_steps))
            metrics |= averages.means()

            if held_out and run.evaluate_now(step):
                if judge is None:
                    evaluation = evaluate_held_out(policy, reference, tokenizer, reward, held_out, config)
                else:
                    evaluation = evaluate_judged(policy, reference, tokenizer, judge, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("score", "win_rate", "kl", "accuracy"))
        run.save(summary=evaluation)
    return evaluation


class Pairs(NamedTuple):
    """Rows of a rollout, P pairs of one prompt each."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    ties: int  # prompts whose completions were compared, and neither was better


def best_and_worst(scores: Scores, group_size: int) -> Pairs:
    """Of each group of completions the best and the worst, the first of several, unless all score alike."""
    total, valid = scores.total.view(-1, group_size), scores.valid.view(-1, group_size)
    best = total.masked_fill(~valid, -torch.inf).max(-1)
    worst = total.masked_fill(~valid, torch.inf).min(-1)
    compared, differ = valid.sum(-1) > 1, best.values > worst.values
    firsts, told = torch.arange(len(total)) * group_size, compared & differ
    return Pairs((firsts + best.indices)[told], (firsts + worst.indices)[told], ties=int((compared & ~differ).sum()))


def judged_pairs(verdicts: Verdicts) -> Pairs:
    """Of each two completions the better and the other one, unless there is no verdict."""
    firsts, second = torch.arange(len(verdicts.valid)) * 2, verdicts.second.long()
    chosen, rejected = firsts + second, firsts + 1 - second
    return Pairs(chosen[verdicts.valid], rejected[verdicts.valid], ties=int((~verdicts.valid).sum()))


def ask(judge: Judge, rollout: Rollout, examples: list[Example], *seed: str | int) -> Verdicts:
    """On the two completions of each prompt, in a rollout of two a prompt."""
    firsts, seconds = rollout.completions[::2], rollout.completions[1::2]
    return in_random_order(judge, *seed)(rollout.prompts[::2], firsts, seconds, [one.record.row for one in examples])


def side_by_side(first: Rollout, second: Rollout) -> Rollout:
    """Two completions of each prompt from two rollouts of one a prompt."""
    width = max(first.logprobs.shape[1], second.logprobs.shape[1])
    padded = [F.pad(each.logprobs, (0, width - each.logprobs.shape[1])) for each in (first, second)]
    return Rollout(
        prompts=[prompt for prompt in first.prompts for _ in (1, 2)],
        completions=[each for both in zip(first.completions, second.completions, strict=True) for each in both],
        logprobs=torch.stack(padded, 1).flatten(0, 1),
        finished=torch.stack([first.finished, second.finished], 1).flatten(),
        group_size=2,
    )


def by_side(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Rows of chosen, rejected, chosen, rejected, ... by the names that `preference_loss` has for them."""
    return dict(
        chosen_logprobs=logprobs[0::2],
        rejected_logprobs=logprobs[1::2],
        chosen_mask=mask[0::2],
        rejected_mask=mask[1::2],
        ref_chosen_logprobs=ref_logprobs[0::2],
        ref_rejected_logprobs=ref_logprobs[1::2],
    )


def evaluate_judged(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    judge: Judge,
    examples: list[Example],
    config: OnlineDPOConfig,
) -> dict[str, float]:
    """How often a completion of the policy is judged better than one of the reference, a tie being half, and the KL."""
    ours = act(policy, tokenizer, examples, config, "evaluation")
    theirs = act(reference, tokenizer, examples, config, "evaluation of the reference")
    verdicts = ask(judge, side_by_side(ours, theirs), examples, config.seed, "judge of the evaluation")
    wins = torch.where(verdicts.valid, (~verdicts.second).float(), 0.5)
    ref_logprobs = recall(ours, config, lambda batch: policy_forward(reference, batch, config)).logprobs
    mask = ours.pack().completion_mask.to(ref_logprobs.device)
    kl = sequence_kl(ours.logprobs.to(ref_logprobs.device) - ref_logprobs, mask)
    return {"eval_win_rate": wins.mean().item(), "eval_kl": kl}
