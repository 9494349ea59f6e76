"""Runs that sample from the policy and learn from what was sampled.

    with OnlineRun(config) as run:
        for step in run.steps():
            experience = run.shape_scores(step.rollout(n=config.num_generations))
            plan = step.plan(experience)
            experience = run.with_ref_logprobs(experience, plan)
            for minibatch in step.minibatches(experience, plan):
                for batch in minibatch.micro_batches():
                    minibatch.backward(loss_of(run.forward(run.policy, batch), batch))

A step is one rollout. A minibatch is one optimizer step, taken when the loop asks for the next minibatch, unless the
loop called `minibatch.discard()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.batch import PackedBatch
from rlhf_core.config import DataConfig, OnPolicyConfig, PolicyGradientConfig
from rlhf_core.control import FixedKL, kl_controller
from rlhf_core.data.loader import count_steps, load_examples, step_examples
from rlhf_core.data.records import Example
from rlhf_core.losses.policy import importance_weights
from rlhf_core.models.forward import PolicyOutputs, device_of, policy_outputs
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import save_model, without_dropout
from rlhf_core.ops.kl import sequence_kl
from rlhf_core.rollout.engines import sample_completions
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.plan import Plan, micro_size, plan_groups, plan_units
from rlhf_core.rollout.recorded import RecordedLogprobs
from rlhf_core.rollout.rewards import configured_reward, rollout_metrics, score_completions
from rlhf_core.rollout.sampling import sampling_disagreement
from rlhf_core.rollout.shaping import ScoreShaping
from rlhf_core.seeding import generator
from rlhf_core.training.metrics import Metrics, StepMetrics
from rlhf_core.training.offline import load_run_policy
from rlhf_core.training.reference import load_run_reference
from rlhf_core.training.run import Convert, Run, Step

C = TypeVar("C", bound=OnPolicyConfig)
Forward = Callable[[PackedBatch], PolicyOutputs]


def score_and_kl(run: OnlineRun[Any]) -> Metrics:
    """Evaluate: the mean score of one completion per evaluation prompt and, with a reference, the KL to it.

    Every evaluation uses the same random numbers. Both metrics are of the policy's own samples; KL in nats per
    completion.
    """
    experience, metrics = run.rollout(run.eval_examples, "evaluation")
    if run.reference is not None:
        logprobs = run.compute(experience, lambda batch: run.forward(run.policy, batch)).logprobs
        ref_logprobs = run.with_ref_logprobs(experience).ref_logprobs
        metrics["kl"] = sequence_kl(logprobs - ref_logprobs, experience.completion_mask)
    return {f"eval_{name}": metrics[name] for name in ("score", "kl") if name in metrics}


class OnlineRun(Run[C]):
    """A `Run` that samples from the policy: also the reward, the reference, and the shaping of scores.

    Args:
        evaluate, show: see `Run`.
        uses_reference: load a reference.
        needs_forward: every rollout needs a forward of the policy anyway, so recorded log-probs save nothing.

    Attributes:
        policy, tokenizer, reference, reward, examples, eval_examples, device.
        kl: the controller of the KL coefficient; a constant 0 for jobs without the settings `kl.*`.
        scores: see `ScoreShaping`. recorded: see `RecordedLogprobs`.
    """

    def __init__(
        self,
        config: C,
        *,
        evaluate: Callable[[Any], Metrics] = score_and_kl,
        show: Sequence[str] = ("score", "kl", "entropy"),
        uses_reference: bool = True,
        needs_forward: bool = False,
    ):
        super().__init__(config, evaluate=evaluate, show=show)
        self._uses_reference, self._needs_forward = uses_reference, needs_forward

    def load(self) -> None:
        """Load policy, reference, reward and prompts."""
        config = self.config
        self.policy, self.tokenizer = load_run_policy(config)
        without_dropout(self.policy)  # of an adapter's folder: log-probs of two forwards are compared
        self.device = device_of(self.policy)
        self.add_model("policy", self.policy, write=lambda folder: save_model(folder, self.policy, self.tokenizer))
        if self._uses_reference:
            reference = load_run_reference(config, config.reference, self.policy, self.tokenizer)
            self.add_reference(reference, config.reference)
        self.reward = configured_reward(config, self.tokenizer, device=config.device)
        self.examples = self._load_prompts(config.data)
        self.eval_examples = self._load_prompts(config.eval_data) if config.eval_data else []
        self.total_steps = count_steps(len(self.examples), config.batch_size, config.epochs, config.max_steps)
        self.scores = self.add_state("scores", ScoreShaping(config.score, config.sampling.max_new_tokens))
        self.kl, choice = FixedKL(0.0), "off"
        if isinstance(config, PolicyGradientConfig):
            self.kl = self.add_state("kl", kl_controller(config.kl, self.total_steps))
            choice = "off" if self._needs_forward else config.recorded
        self.recorded = self.add_state("recorded", RecordedLogprobs(choice))

    def _load_prompts(self, data: DataConfig) -> Sequence[Example]:
        reserve = self.config.sampling.max_new_tokens
        return load_examples(data, self.tokenizer, need="prompts", model=self.policy, reserve=reserve)

    @property
    def has_evaluation_data(self) -> bool:
        return len(self.eval_examples) > 0

    @property
    def micro_batch_size(self) -> int:
        """Rows that go through the model at once."""
        return micro_size(self.config)

    def before_steps(self) -> None:
        """Warn about sampling filters that are not used, and measure the starting policy's scores where asked for."""
        if filters := sampling_disagreement(self.policy.generation_config):
            self.message(
                f"{self.job}: samples from the full distribution and ignores the generation config's {filters}"
            )
        if self.config.score.center and self.scores.initial.count == 0:  # else a checkpoint restored them
            order = torch.randperm(len(self.examples), generator=generator(self.config.seed, "score_center")).tolist()
            rows = [self.examples[order[i % len(order)]] for i in range(self.config.score.center)]
            experience, _ = self.rollout(rows, "score_center")
            self.scores.initial.update(require_scores(experience).scores, all_ranks=True)

    def steps(self) -> Iterator[RolloutStep]:
        """Yield one step per rollout."""
        return self.iterate(lambda number: RolloutStep(self, number))

    # ---------------------------------------------------------------------------------------------- sample and score

    def sample(
        self,
        model: PreTrainedModel,
        rows: Sequence[Example],
        *purpose: str | int,
        n: int = 1,
        temperature: float | None = None,
        value_head: ValueHead | None = None,
    ) -> Experience:
        """Sample `n` completions for each row's prompt.

        Args:
            purpose: what the random numbers are for, such as "rollout", step. temperature: that of the settings if
            None. value_head: records its values while sampling.
        """
        sampling = self.config.sampling
        experience = sample_completions(
            model,
            self.tokenizer,
            [row.prompt for row in rows],
            sampling if temperature is None else replace(sampling, temperature=temperature),
            generator(self.config.seed, *purpose),
            n=n,
            value_head=value_head,
        )
        return experience.to(self.device)

    def score(
        self, experience: Experience, rows: Sequence[Example], *, own: slice = slice(None)
    ) -> tuple[Experience, Metrics]:
        """Return the experience with the reward's scores, and the metrics of the `own` completions. Completions without
        a score do not take part."""
        scores = score_completions(self.reward, experience, rows)
        measured = experience if own == slice(None) else experience.select(torch.arange(len(experience))[own])
        metrics = rollout_metrics(measured, scores.select(own))
        valid = scores.valid.to(self.device)
        scored = replace(
            experience,
            scores=scores.total.to(self.device),
            takes_part=valid,
            mask=experience.mask & valid[:, None],
            token_scores=None if scores.tokens is None else scores.tokens.to(self.device),
        )
        return scored, metrics

    def rollout(
        self, rows: Sequence[Example], *purpose: str | int, n: int = 1, value_head: ValueHead | None = None
    ) -> tuple[Experience, Metrics]:
        """Sample from the policy and score."""
        return self.score(self.sample(self.policy, rows, *purpose, n=n, value_head=value_head), rows)

    def shape_scores(self, experience: Experience) -> Experience:
        """Apply the settings `score.*`, see `ScoreShaping.shape`."""
        return self.scores.shape(experience)

    # ------------------------------------------------------------------------------------------------------- forwards

    def forward(
        self,
        model: PreTrainedModel,
        batch: Experience | PackedBatch,
        *,
        entropy: bool = False,
        reference: PreTrainedModel | None = None,
    ) -> PolicyOutputs:
        """Return log-probs under the distribution that is sampled from, at its temperature.

        `entropy` adds entropies without gradient, `reference` the exact KL to it.
        """
        packed = batch.pack() if isinstance(batch, Experience) else batch
        temperature = self.config.sampling.temperature
        return policy_outputs(model, packed, temperature=temperature, entropy=entropy, reference=reference)

    @torch.no_grad()
    def compute(self, experience: Experience, forward: Forward, plan: Plan | None = None) -> PolicyOutputs:
        """Return what `forward` computes for the whole experience, each (B, T), one micro-batch at a time.

        With a plan, in the micro-batches of its first pass; rows that are in none of them get 0.
        """
        parts = None if plan is None else plan.first_pass
        parts = [*torch.arange(len(experience)).split(self.micro_batch_size)] if parts is None else parts
        outputs = [forward(experience.select(rows).pack()) for rows in parts]
        rows = torch.cat(parts).to(self.device)
        whole: dict[str, Tensor] = {}
        for field in fields(PolicyOutputs):
            tensors = [getattr(output, field.name) for output in outputs]
            if tensors[0] is not None:
                zeros = tensors[0].new_zeros(experience.mask.shape)
                whole[field.name] = zeros.index_copy(0, rows, torch.cat(tensors))
        return PolicyOutputs(**whole)

    def with_logprobs(
        self,
        experience: Experience,
        plan: Plan,
        forward: Forward | None = None,
        *,
        whole_completions: bool = False,
    ) -> Experience:
        """Return the experience with log-probs under the policy that sampled, and with values and the exact KL where
        `forward` computes them: by a forward, or as recorded while sampling where the two were found to agree.

        `whole_completions`: the ratio is that of whole completions, so their summed log-probs are compared.
        """
        if self.recorded.usable:
            return replace(experience, engine_logprobs=experience.logprobs)
        outputs = self.compute(experience, forward or self._policy_forward, plan)
        if self.recorded.usable is None:
            rows = slice(None) if plan.first_pass is None else torch.cat(plan.first_pass)
            reason = self.recorded.check(experience, outputs, rows, whole_completions=whole_completions)
            if reason is not None:
                self.message(f"{self.job}: {reason}; log-probs come from forwards")
        return replace(
            experience,
            logprobs=outputs.logprobs,
            engine_logprobs=experience.logprobs,
            values=outputs.values,
            exact_kl=outputs.kl,
        )

    def with_ref_logprobs(self, experience: Experience, plan: Plan | None = None) -> Experience:
        """Return the experience with the reference's log-probs; unchanged without a reference."""
        if self.reference is None:
            return experience
        return replace(experience, ref_logprobs=self.compute(experience, self._reference_forward, plan).logprobs)

    def _policy_forward(self, batch: PackedBatch) -> PolicyOutputs:
        return self.forward(self.policy, batch)

    def _reference_forward(self, batch: PackedBatch) -> PolicyOutputs:
        assert self.reference is not None
        return self.forward(self.reference, batch)


class RolloutStep(Step):
    """One rollout and the optimizer steps that learn from it. `updates` counts them."""

    run: OnlineRun[Any]

    def __init__(self, run: OnlineRun[Any], number: int):
        super().__init__(run, number)
        self.updates = 0
        self.rows = step_examples(run.examples, run.config.batch_size, seed=run.config.seed, step=number)
        self._current: Minibatch | None = None
        self._kl: tuple[float, int] | None = None
        self.own_logprobs: list[tuple[Tensor, Tensor]] = []  # rows and log-probs of the only update's forwards

    def rollout(self, *, n: int = 1, value_head: ValueHead | None = None) -> Experience:
        """Sample `n` completions for each of the step's prompts and score them. Log their metrics."""
        experience, metrics = self.run.rollout(self.rows, "rollout", self.number, n=n, value_head=value_head)
        self.metrics.set(metrics)
        return experience

    def plan(self, experience: Experience) -> Plan:
        """Shuffle the completions that take part into minibatches, see `plan_groups`."""
        return plan_groups(experience, self.run.config, self.number)

    def plan_units(self, units: Tensor, *, sort: bool = False) -> Plan:
        """Shuffle units of rows, (U, K), into minibatches, see `plan_units`."""
        return plan_units(units, self.run.config, self.number, sort=sort)

    def minibatches(self, experience: Experience, plan: Plan) -> Iterator[Minibatch]:
        """Yield the minibatches of a plan, each one optimizer step."""
        for number, parts in enumerate(plan.minibatches):
            self._current = Minibatch(self, number, experience, parts, single_update=plan.single_update)
            yield self._current
            self._current.finish()
            self._current = None

    def logprobs(self, experience: Experience) -> Tensor:
        """Return (B, T) log-probs under the policy that sampled, also where the only update's forward computed them."""
        if not self.own_logprobs:
            return experience.logprobs
        rows, logprobs = (torch.cat(parts).to(self.run.device) for parts in zip(*self.own_logprobs, strict=True))
        return torch.zeros_like(experience.logprobs).index_copy(0, rows, logprobs)

    def log_kl(self, kl: Tensor, mask: Tensor) -> None:
        """Log `kl`, the mean over completions of (B, T) KL in nats; the KL coefficient moves by it after the step."""
        self._kl = sequence_kl(kl, mask), len(mask)
        self.metrics.set({"kl": self._kl[0]})

    def finish(self, convert: Convert | None = None) -> Metrics:
        """End the step, once; return its metrics, after `convert` was applied to them."""
        if self._result is None:
            if self._current is not None and not self._current.discarded:
                raise RuntimeError(
                    f"{self.run.job}: the loop left step.minibatches() before its optimizer step; expected "
                    "minibatch.discard() before break"
                )
            if self._kl is not None:
                self.run.kl.update(*self._kl)
        return super().finish(convert)

    def update(self) -> Metrics:
        """Do nothing: the minibatches make the optimizer steps."""
        return {}


class Minibatch:
    """One optimizer step over some completions. `tokens` and `completions` are what losses are divided by."""

    def __init__(
        self,
        step: RolloutStep,
        number: int,
        experience: Experience,
        parts: Sequence[Tensor],
        *,
        single_update: bool,
    ):
        self.step, self.number, self.experience, self.discarded = step, number, experience, False
        self.rows = torch.cat([*parts])
        self.tokens, self.completions = experience.mask[self.rows].sum(), len(self.rows)
        self.metrics = StepMetrics()
        self._parts, self._single_update = parts, single_update
        self._losses: dict[str, Tensor] = {}

    @property
    def num_micro_batches(self) -> int:
        return len(self._parts)

    def micro_batches(self) -> Iterator[Experience]:
        """Yield the rows that go through the model at once."""
        for rows in self._parts:
            yield self.experience.select(rows)

    def with_own_logprobs(self, batch: Experience, new_logprobs: Tensor) -> Experience:
        """Return the micro-batch with `new_logprobs` as those of the policy that sampled, where this is the rollout's
        only update; unchanged otherwise."""
        if not self._single_update:
            return batch
        self.step.own_logprobs.append((batch.rows, new_logprobs.detach()))
        return replace(batch, logprobs=new_logprobs.detach(), engine_logprobs=batch.logprobs)

    def share(self, batch: Experience) -> Tensor:
        """Return the number of this micro-batch's tokens divided by that of the minibatch."""
        return batch.mask.sum() / self.tokens

    def importance(self, batch: Experience) -> Tensor | None:
        """Return (R, T) weights for an engine whose log-probs differ from those of a forward, as the settings
        `importance` and `importance_max` say; None without them."""
        config = self.step.run.config
        if not isinstance(config, PolicyGradientConfig) or config.importance == "none":
            return None
        return importance_weights(
            batch.logprobs,
            batch.engine_logprobs,
            batch.mask,
            level=config.importance,
            weight_max=config.importance_max,
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the loss."""
        loss.backward()

    def log(self, stats: Mapping[str, Tensor], weight: Tensor | float = 1.0) -> None:
        """Add values to the means over this minibatch and over the step. `ratio_max` is a maximum instead."""
        for metrics in (self.metrics, self.step.metrics):
            metrics.mean({name: value for name, value in stats.items() if name != "ratio_max"}, weight)
            if "ratio_max" in stats:
                metrics.maximum("ratio_max", stats["ratio_max"])

    def log_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add parts of losses that sum up to the minibatch's loss; the step's metric is their mean over minibatches."""
        for name, part in losses.items():
            self._losses[name] = self._losses[name] + part.detach() if name in self._losses else part.detach()

    def discard(self) -> None:
        """Drop the gradients: this minibatch makes no optimizer step."""
        self.discarded = True
        self.step.run.discard_gradients()

    def finish(self) -> None:
        """Make the optimizer step, unless the minibatch was discarded."""
        if not self.discarded:
            self.step.updates += 1
            self.step.metrics.mean({**self._losses, **self.step.run.update_weights(self.step.number)})


# ------------------------------------------------------------------------------------------------------------ functions


def require_scores(experience: Experience) -> Experience:
    """Return the completions that take part, with as many columns as the longest of them.

    Raises ValueError if there are none.
    """
    if not experience.takes_part.any():
        raise ValueError(f"the reward scored none of {len(experience)} completions: there is nothing to learn from")
    return experience.select(experience.takes_part).trimmed()
