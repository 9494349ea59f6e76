"""Online DPO (Guo et al. 2024, arXiv:2402.04792): a preference loss on pairs that the policy has just sampled.

Each step rolls out one batch of prompts and learns from it:

    1. sample   num_generations completions for each prompt, two by default
    2. compare  the best and the worst score of a prompt, or two completions by a judge: one pair per prompt
    3. improve  a preference loss by name (docs/losses.md) on the pairs, over minibatches

XPO (Xie et al. 2024, arXiv:2405.21046, algorithm 1) pairs a completion of the policy with one of the reference, and
adds an exploration bonus for completions that are unlikely under the policy:

    loss + xpo_alpha * log policy(the reference's completion)

The paper's algorithm learns from all pairs so far; this loop, as for the other losses, from those of the step.

Log-probs of policy and reference are those of the distribution that was sampled from, at its temperature.

A prompt with fewer than two scores, or with equal ones, makes no pair; neither do two completions between which the
judge does not decide. `ties` counts those that were compared without a result, `kept` is the fraction of prompts with a
pair. A step without any pair is skipped: it has no loss and changes no weight; `skipped` marks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import (
    AtLeastTwo,
    ConfigError,
    LabelSmoothing,
    LossOptions,
    NonNegativeFloat,
    OnPolicyConfig,
    PositiveFloat,
    PositiveInt,
    ScoreShapingConfig,
    require,
)
from rlhf_core.losses.pairs import Pairs, PreferenceLoss
from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss
from rlhf_core.ops.kl import sequence_kl
from rlhf_core.rollout.experience import Experience, best_and_worst, interleave
from rlhf_core.rollout.judges import compare_by_judge, judged_pairs, load_judge
from rlhf_core.rollout.online import Minibatch, OnlineRun, RolloutStep, score_and_kl
from rlhf_core.training.loss_settings import find_losses, invalid_setting, read_loss_options
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.preference import JOB_SETTINGS

OnlineDPORun = OnlineRun["OnlineDPOConfig"]


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(LossOptions, OnPolicyConfig):
    """Improve a policy by a preference loss on pairs that it samples, ranked by a reward or compared by a judge."""

    job: ClassVar[str] = "online-dpo"
    common: ClassVar[tuple[str, ...]] = (*OnPolicyConfig.common, "judge", "loss", "beta")

    judge: str | None = None
    """module:function, instead of a reward: called with lists of prompts, first completions, second completions and
    data rows, it returns for each pair 0 or 1, the better one, or None for a tie. Their order is random. Evaluation
    prompts are then compared with the reference, and eval_win_rate is logged."""
    loss: str = "sigmoid"
    """Name of the preference loss: sigmoid, ipo, simpo, ... (docs/losses.md lists them)."""
    beta: PositiveFloat = 0.1
    """Strength of the KL regularisation towards the reference."""
    label_smoothing: LabelSmoothing = 0.0
    """Probability that a comparison is wrong."""
    xpo_alpha: NonNegativeFloat | None = None
    """XPO: pair each completion with one of the reference, and add this times the latter's log-prob to the loss; none
    samples both from the policy."""
    num_generations: AtLeastTwo = 2
    """Completions per prompt, of which the best and the worst make a pair."""
    batch_size: int = 32
    """Prompts per rollout."""
    minibatch_size: int = 32
    """Pairs per optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Pairs per forward pass; memory grows with it, results do not change. None: minibatch_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judge is not None and (super().reward_sources() or self.reward_weights is not None):
            raise ConfigError(f"judge={self.judge!r}: expected a judge or a reward, not both")
        micro, pairs = self.micro_batch_size, self.minibatch_size
        whole = not self.entry.across_pairs or micro is None or micro >= pairs
        require(whole, "micro_batch_size", micro, f"none, because loss={self.loss!r} looks across a minibatch's pairs")
        for name in ("judge", "xpo_alpha"):
            two = f"2, because {name}={getattr(self, name)!r} compares two"
            alone = getattr(self, name) is None or self.num_generations == 2
            require(alone, "num_generations", self.num_generations, two)
        unshaped = self.judge is None or self.score == ScoreShapingConfig()
        require(unshaped, "score", self.score, "the defaults, because a judge gives no scores")
        zeros = torch.zeros(2, 1)
        with invalid_setting():
            compute_loss(Pairs.interleaved(zeros, zeros == 0, ref_logprobs=zeros), self)

    @property
    def entry(self) -> PreferenceLoss:
        """The table's entry of the loss."""
        return find_losses(PREFERENCE_LOSSES, [self.loss])[self.loss]

    @property
    def options(self) -> dict[str, Any]:
        """`loss_options` as numbers."""
        return read_loss_options(self.loss_options, {self.loss: self.entry.function}, reserved=JOB_SETTINGS)

    @property
    def explores(self) -> bool:
        """Whether the loss is XPO's."""
        return self.xpo_alpha is not None

    @property
    def own_rows(self) -> slice:
        """The rows of an experience that the policy sampled."""
        return slice(None, None, 2 if self.explores else None)

    def reward_sources(self) -> tuple[str, ...]:
        """Return the sources of scores, or the judge that replaces them."""
        return super().reward_sources() if self.judge is None else (self.judge,)


def train(config: OnlineDPOConfig) -> Metrics:
    """Train and save the policy in `config.output`. Return the metrics of the last evaluation."""
    with OnlineRun(config, evaluate=evaluate, show=("score", "win_rate", "kl", "accuracy")) as run:
        judge = None if config.judge is None else load_judge(config.judge, run.tokenizer, timeout=config.reward_timeout)
        for step in run.steps():
            # 1. sample
            experience = sample_completions(run, step)

            # 2. compare
            if judge is None:
                experience, pairs, ties = compare_scores(run, step, experience)
            else:
                verdicts = compare_by_judge(judge, experience, step.rows, config.seed, "judge", step.number)
                pairs, ties = judged_pairs(verdicts)
            log_comparison(run, step, experience, pairs, ties)

            # 3. improve
            for minibatch in step.minibatches(experience, step.plan_units(pairs)):
                for batch in minibatch.micro_batches():
                    minibatch.backward(online_dpo_loss(run, minibatch, batch))
    return run.evaluation


def evaluate(run: OnlineDPORun) -> Metrics:
    """Return the mean score and the KL of the policy or, with a judge, how often its completion is judged better than
    one of the reference, a tie being half, and the KL."""
    config = run.config
    if config.judge is None:
        return score_and_kl(run)
    judge = load_judge(config.judge, run.tokenizer, timeout=config.reward_timeout)
    ours = run.sample(run.policy, run.eval_examples, "evaluation")
    theirs = run.sample(reference_of(run), run.eval_examples, "evaluation of the reference")
    both = interleave(ours, theirs)
    verdicts = compare_by_judge(judge, both, run.eval_examples, config.seed, "judge of the evaluation")
    wins = torch.where(verdicts.valid, (~verdicts.second).float(), 0.5)
    ours = run.with_ref_logprobs(ours)
    kl = sequence_kl(ours.logprobs - ours.ref_logprobs, ours.completion_mask)
    return {"eval_win_rate": wins.mean().item(), "eval_kl": kl}


# -------------------------------------------------------------------------------------------------- sample and compare


def reference_of(run: OnlineDPORun) -> PreTrainedModel:
    """Return the reference, which samples until the same tokens as the policy."""
    assert run.reference is not None
    run.reference.generation_config = run.policy.generation_config
    return run.reference


def sample_completions(run: OnlineDPORun, step: RolloutStep) -> Experience:
    """Return the completions of a step with the reference's log-probs, and log the policy's KL.

    With XPO the even rows are the policy's and the odd ones the reference's.
    """
    config, n = run.config, 1 if run.config.explores else run.config.num_generations
    experience = run.sample(run.policy, step.rows, "rollout", step.number, n=n)
    if config.explores:
        experience = interleave(experience, run.sample(reference_of(run), step.rows, "reference", step.number))
    experience = run.with_ref_logprobs(experience)
    kl = experience.logprobs - experience.ref_logprobs
    step.log_kl(kl[config.own_rows], experience.completion_mask[config.own_rows])
    return experience


def compare_scores(run: OnlineDPORun, step: RolloutStep, experience: Experience) -> tuple[Experience, Tensor, int]:
    """Score the completions and return their pairs, see `best_and_worst`. Log the scores of the policy's own
    completions as the reward gave them."""
    experience, metrics = run.score(experience, step.rows, own=run.config.own_rows)
    step.metrics.set(metrics)
    experience = run.scores.exclude_truncated(run.shape_scores(experience))
    return experience, *best_and_worst(experience)


def log_comparison(
    run: OnlineDPORun,
    step: RolloutStep,
    experience: Experience,
    pairs: Tensor,
    ties: int,
) -> None:
    """Log the numbers of pairs and ties; with a judge the policy's lengths, with XPO how often the policy won."""
    step.metrics.set({"kept": len(pairs) / len(step.rows), "ties": ties, "skipped": int(len(pairs) == 0)})
    if run.config.judge is not None:
        lengths, finished = experience.lengths[run.config.own_rows], experience.finished[run.config.own_rows]
        mean_length = int(lengths.sum()) / len(lengths)
        step.metrics.set({"length": mean_length, "eos_rate": finished.float().mean().item()})
    if run.config.explores and len(pairs):
        step.metrics.set({"win_rate": (pairs[:, 0] % 2 == 0).float().mean().item()})


# ------------------------------------------------------------------------------------------------------------ the loss


def online_dpo_loss(run: OnlineDPORun, minibatch: Minibatch, batch: Experience) -> Tensor:
    """Return a micro-batch's part of the minibatch's loss, the mean over pairs, and log its metrics.

    The rows are chosen, rejected, chosen, rejected, ...
    """
    config, num_pairs, total = run.config, len(batch) // 2, minibatch.completions // 2
    logprobs = run.forward(run.policy, batch).logprobs
    pairs = Pairs.interleaved(logprobs, batch.mask, ref_logprobs=batch.ref_logprobs)
    chosen_tokens = minibatch.experience.mask[minibatch.rows[0::2]].sum()
    loss, stats = compute_loss(pairs, config, total, chosen_tokens)
    if config.xpo_alpha is not None:
        explored = logprobs[(batch.rows % 2 == 1).to(run.device)].sum()
        loss = loss + config.xpo_alpha * explored / total
        stats["explored_logprob"] = explored / num_pairs
    minibatch.log({"loss": loss * total / num_pairs, **stats}, num_pairs)
    return loss


def compute_loss(
    pairs: Pairs, config: OnlineDPOConfig, normalizer: float | None = None, token_normalizer: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `preference_loss` with the settings of the job."""
    return preference_loss(
        config.loss,
        pairs,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        normalizer=normalizer,
        token_normalizer=token_normalizer,
        **config.options,
    )
