"""What the loops that act and learn have in common, each a plain function that a loop calls where it needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.batch import PackedBatch
from rlhf_core.config import OnPolicyConfig, SamplingConfig, ScoringConfig
from rlhf_core.data.loader import load_examples
from rlhf_core.data.tokenize import Example, stop_ids
from rlhf_core.models.forward import PolicyOutputs, policy_outputs
from rlhf_core.models.load import load_policy, load_reference, without_dropout
from rlhf_core.ops.advantages import group_advantages
from rlhf_core.ops.masked import masked_sum
from rlhf_core.ops.shaping import missing_eos_penalty
from rlhf_core.rollout.engines import sample_continuously, sample_from_server
from rlhf_core.rollout.rewards import Reward, Scores, configured_reward
from rlhf_core.rollout.sampling import Rollout, sample, sampling_disagreement
from rlhf_core.seeding import generator
from rlhf_core.training.run import Run


def load_reward(config: ScoringConfig, tokenizer: Any) -> Reward:
    """What scores the completions, by the settings of the run."""
    return configured_reward(config, tokenizer, device=config.device)


def act(
    policy: nn.Module,
    tokenizer: Any,
    rows: list[Example],
    config: OnPolicyConfig,
    *purpose: str | int,
    n: int = 1,
    temperature: float | None = None,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """`n` completions of each row's prompt. `purpose` names what the random numbers are for, as in "rollout", step.

    Without a `temperature` it is that of the settings. With a `value_head`, its values are recorded while sampling.
    """
    return roll_out(
        policy,
        tokenizer,
        [row.prompt for row in rows],
        config.sampling if temperature is None else replace(config.sampling, temperature=temperature),
        generator(config.seed, *purpose),
        n=n,
        value_head=value_head,
    )


def roll_out(
    policy: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    numbers: torch.Generator,
    *,
    n: int = 1,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """`n` completions of each prompt by the engine that the settings name, each up to a stop token of the policy's."""
    options = dict(stop_ids=stop_ids(tokenizer, policy.generation_config), generator=numbers, value_head=value_head)
    if sampling.engine == "continuous":
        return sample_continuously(policy, prompts, n, sampling, **options)
    if sampling.engine == "server":
        return sample_from_server(policy, tokenizer, prompts, n, sampling, **options)
    limits = dict(max_new_tokens=sampling.max_new_tokens, batch_size=sampling.batch_size, cache=sampling.kv_cache)
    return sample(policy, prompts, n=n, temperature=sampling.temperature, **limits, **options)


def say_how_it_samples(run: Run, policy: nn.Module) -> None:
    """A line where the checkpoint's generation settings are not what `act` does."""
    if disagreement := sampling_disagreement(policy.generation_config):
        run.say(f"{run.job}: samples from the whole distribution, though the generation config says {disagreement}")


def score(reward: Reward, rollout: Rollout, examples: list[Example]) -> Scores:
    """The reward of every completion; each example's row goes with all completions of its prompt."""
    rows = [example.record.row for example in examples for _ in range(rollout.group_size)]
    return reward(rollout.prompts, rollout.completions, rows)


def score_gauges(scores: Scores) -> dict[str, float]:
    """What is logged of scores: mean and spread where there is one, and `excluded`, how many samples have none.

    With several sources of reward, `reward/NAME` is the mean of each, before its weight, over the samples that it gave
    a number. `reward_seconds` is the time that all of them took. A mean of nothing is NaN.
    """
    total = scores.total[scores.valid]
    sources = scores.components if len(scores.components) > 1 else {}
    return {
        "score": total.mean().item(),
        "score_std": total.std(correction=0).item() if len(total) else math.nan,
        **{f"reward/{name}": values.nanmean().item() for name, values in sources.items()},
        "excluded": int((~scores.valid).sum()),
        "reward_seconds": round(sum(scores.seconds.values()), 3),
    }


def recall(
    rollout: Rollout,
    config: OnPolicyConfig,
    function: Callable[[PackedBatch], PolicyOutputs],
    batches: list[Tensor] | None = None,
) -> PolicyOutputs:
    """What `function` says of the whole rollout, each (B, T), a micro-batch at a time and without gradient.

    `batches` says which rows go together, each row once; rows in none of them are 0. If not given, all in their order.
    """
    if batches is None:
        batches = torch.arange(len(rollout.prompts)).split(config.micro_batch_size or config.minibatch_size)
    width = max(map(len, rollout.completions))
    with torch.no_grad():
        outputs = [function(rollout.pack(rows.tolist(), width=width)) for rows in batches]
    rows = torch.cat([*batches]).to(outputs[0].logprobs.device)

    def in_order(parts: list[Tensor | None]) -> Tensor | None:
        if parts[0] is None:
            return None
        return parts[0].new_zeros(len(rollout.prompts), width).index_copy(0, rows, torch.cat(parts))

    names = [field.name for field in fields(PolicyOutputs)]
    return PolicyOutputs(**{name: in_order([getattr(output, name) for output in outputs]) for name in names})


def shuffled_minibatches(num_rows: int, size: int, epochs: int, *, seed: int, step: int) -> Iterator[Tensor]:
    """Row numbers of each minibatch, every epoch in a new order."""
    for epoch in range(epochs):
        order = torch.randperm(num_rows, generator=generator(seed, "minibatches", step, epoch))
        yield from order.split(size)


def first_epoch(order: Sequence[Tensor], micro_size: int) -> list[Tensor] | None:
    """The micro-batches of the first pass over the rows in `order`, minibatches of all epochs; None if there are none.

    What `recall` is asked in these very batches, the updates of that pass compute again to the last bit, so the first
    ratio is 1.
    """
    batches: list[Tensor] = []
    missing = len(torch.cat([*order]).unique()) if order else 0
    for minibatch in order:
        if not missing:
            break
        batches += minibatch.split(micro_size)
        missing -= len(minibatch)
    return batches or None


# ------------------------------------------------------------------------------ for loops without a critic of their own


class Actors(NamedTuple):
    """Who takes part in a run: the policy, what it is held to, what judges it, and what it is asked."""

    policy: nn.Module
    tokenizer: Any
    reference: nn.Module
    reward: Reward
    examples: list[Example]
    held_out: list[Example]


def load_actors(config: OnPolicyConfig) -> Actors:
    """Everything that the settings of a run name."""
    held = dict(device=config.device, quantize=config.quantize)
    options = dict(lora=config.lora, seed=config.seed, **held, **config.model.options())
    policy, tokenizer = load_policy(config.model.path, **options)
    without_dropout(policy)  # of an adapter's folder, as lora.dropout must be 0: log-probs of two forwards are compared
    source = config.reference or config.model
    held |= dict(policy=policy, follows=getattr(config, "reference_update", "none") != "none")
    options = dict(need="prompts", model=policy, reserve=config.sampling.max_new_tokens)
    return Actors(
        policy=policy,
        tokenizer=tokenizer,
        reference=load_reference(source.path, policy_tokenizer=tokenizer, **held, **source.options()),
        reward=load_reward(config, tokenizer),
        examples=load_examples(config.data, tokenizer, **options),
        held_out=load_examples(config.eval_data, tokenizer, **options) if config.eval_data else [],
    )


def policy_forward(
    model: nn.Module,
    batch: PackedBatch,
    config: OnPolicyConfig,
    *,
    entropy: bool = False,
    reference: nn.Module | None = None,
) -> PolicyOutputs:
    """Log-probs of the distribution that was sampled from, at its temperature; on request entropies, and with a
    `reference` the exact KL to it.
    """
    options = dict(temperature=config.sampling.temperature, layout=config.model.layout)
    return policy_outputs(model, batch, entropy=entropy, reference=reference, **options)


def group_minibatches(
    takes_part: Tensor, group_size: int, size: int, epochs: int, *, seed: int, step: int
) -> list[Tensor]:
    """`shuffled_minibatches` of about `size` rows, in whole groups: side by side, they share their prompt.

    Args:
        takes_part: (B,) bool, on the CPU. The other rows are then left out, and minibatches in which nobody is left.
    """
    num_groups, places = len(takes_part) // group_size, torch.arange(group_size)
    order = shuffled_minibatches(num_groups, max(size // group_size, 1), epochs, seed=seed, step=step)
    rows = ((groups[:, None] * group_size + places).flatten() for groups in order)
    return [some for minibatch in rows if len(some := minibatch[takes_part[minibatch]])]


def flat_groups(scores: Scores, group_size: int) -> Tensor:
    """(groups,) bool, True where all scores are equal or fewer than two exist: nothing can be told from them."""
    distances = group_advantages(scores.total, group_size=group_size, scale="none", valid=scores.valid)
    return (distances == 0).view(-1, group_size).all(-1)


def rollout_gauges(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """What is logged of a rollout: its scores (see `score_gauges`), its length, and how many completions ended."""
    return score_gauges(scores) | {
        "length": sum(map(len, rollout.completions)) / len(rollout.completions),
        "eos_rate": rollout.finished.float().mean().item(),
    }


def sequence_kl(kl: Tensor, mask: Tensor) -> float:
    """KL in nats a completion: (B, T) of the tokens summed, the mean over completions with a token in the mask, NaN if
    there are none.
    """
    return masked_sum(kl, mask, -1)[mask.any(-1)].mean().item()


def evaluate_held_out(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    reward: Reward,
    examples: list[Example],
    config: OnPolicyConfig,
) -> dict[str, float]:
    """Mean score and KL to the reference of one completion for each held-out prompt, always with the same draws."""
    rollout = act(policy, tokenizer, examples, config, "evaluation")
    scores = score(reward, rollout, examples)
    logprobs, ref_logprobs = (
        recall(rollout, config, lambda batch, model=model: policy_forward(model, batch, config)).logprobs
        for model in (policy, reference)
    )
    mask = rollout.pack().completion_mask.to(logprobs.device)
    gauges = rollout_gauges(rollout, scores) | {"kl": sequence_kl(logprobs - ref_logprobs, mask)}
    return {f"eval_{name}": gauges[name] for name in ("score", "kl")}


def charge_unfinished(scores: Scores, rollout: Rollout, penalty: float) -> Scores:
    """Scores less `penalty` where the completion was cut off, for what is done with them; not for the gauges."""
    total = missing_eos_penalty(scores.total, rollout.finished, penalty=penalty)
    return scores._replace(total=torch.where(scores.valid, total, 0.0))
