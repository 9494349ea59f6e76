"""GRPO (Shao et al. 2024, arXiv:2402.03300) and its kin: the completions of one prompt are each other's baseline.

Each step rolls out one batch of prompts and learns from it:

    1. act      a group of completions for each prompt
    2. score    one score a completion; with dynamic sampling, groups that all score alike make room for others
    3. credit   a score less its group's mean, over its spread: one advantage for all tokens of a completion
    4. improve  a policy loss by name plus kl_coef times the KL to the reference, over minibatches of whole groups

`loss` names a row of docs/losses.md, which says what is clipped and how tokens are averaged. Some papers change more
than the loss; unless set otherwise, their names bring that along:

    dr_grpo     scores are not divided by their spread; max_new_tokens is the length that sums are divided by
    dapo        clip_high 0.28; its dynamic sampling and overlong shaping are settings of their own
    gspo        clip 3e-4 and clip_high 4e-4, of the whole completion's ratio
    bnpo        each micro-batch is averaged on its own, so that here, and only here, their size changes the result

A group whose scores are all equal has advantages of exactly 0, and only the KL moves it; `flat_groups` counts them. A
completion that the reward gave no score (None) is in nobody's mean and in no loss; `excluded` counts those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.config import ConfigError, PolicyGradientConfig, did_you_mean, require
from rlhf_core.data.loader import count_steps, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.policy import POLICY_LOSSES, kl_loss, policy_loss
from rlhf_core.models.forward import device_of
from rlhf_core.models.load import save_model
from rlhf_core.ops.advantages import group_advantages
from rlhf_core.ops.masked import masked_mean
from rlhf_core.ops.shaping import overlong_penalty
from rlhf_core.plugins import import_module
from rlhf_core.rollout.recorded import Recorded, behaviour, engine_weights
from rlhf_core.rollout.rewards import Scores
from rlhf_core.rollout.sampling import Rollout
from rlhf_core.rollout.steps import (
    act,
    charge_unfinished,
    evaluate_held_out,
    first_epoch,
    flat_groups,
    group_minibatches,
    load_actors,
    policy_forward,
    recall,
    rollout_gauges,
    say_how_it_samples,
    score,
    sequence_kl,
)
from rlhf_core.seeding import generator
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder

BY_PAPER: dict[str, dict[str, Any]] = {  # what a name means besides the loss
    "dr_grpo": {"scale": "none"},
    "dapo": {"clip_high": 0.28},
    "gspo": {"clip": 3e-4, "clip_high": 4e-4},
}
LOSS_OPTIONS = ("clip", "clip_high", "dual_clip", "ratio_max", "temperature_pos", "temperature_neg")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PolicyGradientConfig):
    """Improve a policy against a reward without a critic: each completion is held to the others of its prompt."""

    loss: str = "grpo"
    """Name of the policy loss: grpo, dr_grpo, dapo, gspo, cispo, sapo, luspo, bnpo, ... (docs/losses.md lists them)."""
    loss_module: str | None = None
    """A Python module of your own that registers a loss, imported first."""
    num_generations: int = 8
    """Completions to a prompt, its group."""
    batch_size: int = 8
    """Prompts to a rollout."""
    minibatch_size: int = 64
    """Completions to an optimizer step, in whole groups."""
    rollout_epochs: int = 1
    """Passes over each rollout."""
    scale: Literal["auto", "group", "batch", "none"] = "auto"
    """What a score's distance from its group's mean is divided by: the spread of the group, of the batch, or nothing;
    auto is nothing for dr_grpo and the group's for the rest."""
    kl_coef: float = 0.04
    """Price of one nat of KL to the reference, as a term of the loss; 0 leaves it out."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k2"
    """How the KL is estimated from sampled tokens; GRPO's paper has k3, whose gradient is another KL's."""
    kl_ratio: bool = False
    """Multiply each estimate by the token's ratio, with its gradient, which puts k1 and k3 right."""
    clip: float | None = None
    """How far below 1 a ratio counts; if not given, as the loss has it (0.2 in most)."""
    clip_high: float | None = None
    """How far above 1 a ratio counts (DAPO's clip-higher); if not given, as the loss has it."""
    dual_clip: float | None = None
    """Where the advantage is below 0, bound the loss by this multiple of it; none for no bound."""
    ratio_max: float | None = None
    """Largest ratio, of cispo alone; if not given, as the loss has it."""
    temperature_pos: float | None = None
    """Sharpness of sapo's gate where the advantage is above 0; if not given, as the loss has it."""
    temperature_neg: float | None = None
    """Sharpness of sapo's gate where the advantage is below 0; if not given, as the loss has it."""
    dynamic_sampling: int | None = None
    """DAPO's dynamic sampling: groups whose scores are all equal make room for groups of other prompts, tried this many
    times, and take no part if they are still equal; 0 only leaves them out, none keeps them."""
    overlong_buffer: int = 0
    """DAPO's overlong shaping: over the last so many tokens before max_new_tokens the score falls by 1; 0 is none."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that was cut off."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss; their scores stay in their group's mean."""

    def __post_init__(self):
        super().__post_init__()
        if self.loss_module is not None:
            import_module(self.loss_module)
        known = f"one of {', '.join(sorted(POLICY_LOSSES))}{did_you_mean(self.loss, POLICY_LOSSES)}"
        require(self.loss in POLICY_LOSSES, "loss", self.loss, known)
        require(self.num_generations > 1, "num_generations", self.num_generations, "2 or more, to be compared")
        require(
            self.minibatch_size % self.num_generations == 0,
            "minibatch_size",
            self.minibatch_size,
            f"a multiple of num_generations={self.num_generations}, because a group stays together",
        )
        require(self.rollout_epochs > 0, "rollout_epochs", self.rollout_epochs, "more than 0")
        for field in ("kl_coef", "missing_eos_penalty"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        tries, buffer, longest = self.dynamic_sampling, self.overlong_buffer, self.sampling.max_new_tokens
        require(tries is None or tries >= 0, "dynamic_sampling", tries, "0 or more, or none")
        require(0 <= buffer <= longest, "overlong_buffer", buffer, f"0 to sampling.max_new_tokens={longest}")
        for field in LOSS_OPTIONS:
            least, value = 1 if field == "dual_clip" else 0, getattr(self, field)
            require(value is None or value > least, field, value, f"more than {least}")
        rehearse(self)

    def loss_options(self) -> dict[str, float]:
        """What was set of the loss's options, over what its paper has."""
        given = {name: value for name in LOSS_OPTIONS if (value := getattr(self, name)) is not None}
        paper = {name: value for name, value in BY_PAPER.get(self.loss, {}).items() if name in LOSS_OPTIONS}
        return paper | given


def rehearse(config: GRPOConfig) -> None:
    """The loss on one number, so that an option it would refuse is refused before anything is loaded."""
    one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    try:
        policy_loss(
            config.loss,
            new_logprobs=one,
            logprobs=one,
            advantages=one,
            mask=mask,
            weights=None if config.importance == "none" else one,
            max_length=config.sampling.max_new_tokens,
            **config.loss_options(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def train(config: GRPOConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer, reference, reward, examples, held_out = load_actors(config)
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    size, device = config.num_generations, device_of(policy)
    scale = BY_PAPER.get(config.loss, {}).get("scale", "group") if config.scale == "auto" else config.scale
    entry, options = POLICY_LOSSES[config.loss], config.loss_options()
    whole_groups = dict(group_size=size, size=config.minibatch_size, seed=config.seed)
    micro_size, recorded = config.micro_batch_size or config.minibatch_size, Recorded(config.recorded)
    evaluation: dict[str, float] = {}

    def play(rows: list[Example], *purpose: str | int) -> tuple[Rollout, Scores]:
        """A group of completions for each prompt, and their scores."""
        rollout = act(policy, tokenizer, rows, config, *purpose, n=size)
        return rollout, score(reward, rollout, rows)

    held = dict(modules={"policy": policy}, optimizer=optimizer, controllers={"recorded": recorded})
    write = partial(save_model, model=policy, tokenizer=tokenizer)
    with Run("grpo", config, total_steps, **held, write=write) as run:
        say_how_it_samples(run, policy)
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act and 2. score. The gauges are of the prompts as they came, before any group makes room.
            rollout, scores = play(rows, "rollout", step)
            metrics = rollout_gauges(rollout, scores)
            scores = shaped(rollout, scores, config)
            flat = flat_groups(scores, size)
            metrics |= {"flat_groups": int(flat.sum())}
            for attempt in range(config.dynamic_sampling or 0):
                if not flat.any():
                    break
                draw = generator(config.seed, "other prompts", step, attempt)
                others = torch.randint(len(examples), (int(flat.sum()),), generator=draw)
                other = play([examples[i] for i in others.tolist()], "rollout", step, "other prompts", attempt)
                rollout, scores = join((rollout, scores), (other[0], shaped(*other, config)), ~flat)
                flat = flat_groups(scores, size)
            valid = scores.valid
            if config.dynamic_sampling is not None:
                valid = valid & ~flat.repeat_interleave(size)
                metrics |= {"left_out_groups": int(flat.sum())}
            takes_part = valid & rollout.finished if config.mask_truncated else valid

            mask = (rollout.pack().completion_mask & takes_part[:, None]).to(device)
            order = group_minibatches(takes_part, epochs=config.rollout_epochs, step=step, **whole_groups)
            batches = first_epoch(order, micro_size)
            ref_logprobs = recall(rollout, config, partial(policy_forward, reference, config=config), batches).logprobs
            if len(order) > 1:
                ask = partial(policy_forward, policy, config=config)
                logprobs = behaviour(rollout, config, ask, batches, recorded, run).logprobs.to(device)
            else:  # the only update is made by the policy that sampled, and its own forward will tell
                logprobs = torch.zeros_like(ref_logprobs)

            # 3. credit
            advantages = group_advantages(scores.total, group_size=size, scale=scale, valid=valid).to(device)

            # 4. improve
            averages, ratios = Averages(), []
            for minibatch in order:
                tokens = mask[minibatch].sum()
                parts = minibatch.split(micro_size)
                losses = {"policy_loss": torch.zeros((), device=device)}
                for part in parts:
                    count = tokens if entry.aggregation == "token" else len(minibatch)
                    if config.loss == "bnpo":
                        count = mask[part].sum() * len(parts)
                    counts = dict(normalizer=count, max_length=config.sampling.max_new_tokens)
                    batch = rollout.pack(part.tolist(), width=mask.shape[1])
                    new = policy_forward(policy, batch, config, entropy=True)
                    if len(order) == 1:
                        logprobs[part] = new.logprobs.detach()
                    weights = engine_weights(logprobs[part], rollout, part, mask[part], config)
                    policy_term, stats = policy_loss(
                        config.loss,
                        new_logprobs=new.logprobs,
                        logprobs=logprobs[part],
                        advantages=advantages[part],
                        mask=mask[part],
                        weights=weights,
                        **counts,
                        **options,
                    )
                    losses["policy_loss"] += policy_term.detach()
                    kl_term = 0.0
                    if config.kl_coef:
                        kl_term, _ = kl_loss(
                            new.logprobs,
                            ref_logprobs[part],
                            mask[part],
                            estimator=config.kl_estimator,
                            logprobs=logprobs[part] if config.kl_ratio else None,
                            ratio_level=entry.ratio_level,
                            aggregation=entry.aggregation,
                            **counts,
                        )
                        losses["kl_loss"] = losses.get("kl_loss", 0.0) + kl_term.detach()
                    (policy_term + config.kl_coef * kl_term).backward()
                    ratios.append(stats.pop("ratio_max"))
                    stats["entropy"] = masked_mean(new.entropy, mask[part])
                    if weights is not None:
                        stats["engine_weight"] = masked_mean(weights, mask[part])
                    averages.add(stats, mask[part].sum() / tokens)
                averages.add(losses | optimizer_step(optimizer, config.optim, step, total_steps))
            metrics |= {"kl": sequence_kl(logprobs - ref_logprobs, mask)}
            if ratios:
                metrics |= averages.means() | {"ratio_max": torch.stack(ratios).max().item()}

            if held_out and run.evaluate_now(step):
                evaluation = evaluate_held_out(policy, reference, tokenizer, reward, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("score", "kl", "entropy"))
        run.save(summary=evaluation)
    return evaluation


def shaped(rollout: Rollout, scores: Scores, config: GRPOConfig) -> Scores:
    """Scores with the price of not ending, and with DAPO's price of coming near the limit of length."""
    scores = charge_unfinished(scores, rollout, config.missing_eos_penalty)
    if not config.overlong_buffer:
        return scores
    lengths = torch.tensor([len(completion) for completion in rollout.completions])
    limits = dict(max_length=config.sampling.max_new_tokens, buffer=config.overlong_buffer)
    return scores._replace(total=scores.total + overlong_penalty(lengths, **limits))


def join(first: tuple[Rollout, Scores], second: tuple[Rollout, Scores], kept: Tensor) -> tuple[Rollout, Scores]:
    """The `kept` (groups,) of the first rollout, and then all of the second, with their scores."""
    (rollout, scores), (other, other_scores) = first, second
    rows = kept.repeat_interleave(rollout.group_size).nonzero().squeeze(1)
    width = max(rollout.logprobs.shape[1], other.logprobs.shape[1])
    logprobs = [F.pad(each, (0, width - each.shape[1])) for each in (rollout.logprobs[rows], other.logprobs)]
    completions = [rollout.completions[row] for row in rows.tolist()] + other.completions
    joined = Rollout(
        prompts=[rollout.prompts[row] for row in rows.tolist()] + other.prompts,
        completions=completions,
        logprobs=torch.cat(logprobs)[:, : max(map(len, completions))],
        finished=torch.cat([rollout.finished[rows], other.finished]),
        group_size=rollout.group_size,
    )
    total, valid = (
        torch.cat([getattr(scores, name)[rows], getattr(other_scores, name)]) for name in ("total", "valid")
    )
    return joined, scores._replace(total=total, valid=valid, components={}, tokens=None)
