"""REINFORCE (Williams 1992) with a choice of baselines, among them those of ReMax and of REINFORCE++.

Each step rolls out one batch of prompts and learns from it:

    1. act      one completion for each prompt, or more
    2. score    one score a completion, on its last token, but for parts of it that a reward gives to tokens of their
                own; and on every token minus kl_coef * log(policy / reference)
    3. credit   each token gets what is still earned from it on, less a baseline:

                none     nothing
                mean     the mean score of the batch
                remax    the score of the greedy completion of the same prompt (ReMax, Li et al. 2023, arXiv:2310.10505)
                global   nothing; returns are whitened over all tokens (REINFORCE++, Hu et al. 2025, arXiv:2501.03262)

    4. improve  -A log policy(token), its ratio clipped as in PPO where a rollout serves for more than one update;
                summed over a completion's tokens, or averaged over all tokens with `global`

A completion that the reward gave no score (None), or whose greedy completion got none, takes no part; `excluded` counts
those without a score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from rlhf_core.config import PolicyGradientConfig, require
from rlhf_core.data.loader import count_steps, step_examples
from rlhf_core.losses.policy import policy_loss
from rlhf_core.models.forward import device_of
from rlhf_core.models.load import save_model
from rlhf_core.ops.advantages import discounted_returns, reinforce_pp_advantages, remax_advantages
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_mean
from rlhf_core.rollout.recorded import Recorded, behaviour, engine_weights
from rlhf_core.rollout.steps import (
    act,
    charge_unfinished,
    evaluate_held_out,
    first_epoch,
    group_minibatches,
    load_actors,
    policy_forward,
    recall,
    rollout_gauges,
    say_how_it_samples,
    score,
    sequence_kl,
)
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(PolicyGradientConfig):
    """Improve a policy against a reward by the plain policy gradient, with a baseline or REINFORCE++'s whitening."""

    baseline: Literal["none", "mean", "remax", "global"] = "mean"
    """What scores are held to: nothing, the mean of the batch, the greedy completion of the same prompt (one more
    completion a prompt), or nothing but a whitening over all tokens of the batch, which is REINFORCE++."""
    num_generations: int = 1
    """Completions to a prompt."""
    minibatch_size: int = 64
    """Completions to an optimizer step, those of a prompt together."""
    rollout_epochs: int = 1
    """Passes over each rollout."""
    gamma: float = 1.0
    """Discount a token."""
    kl_coef: float = 0.05
    """Price of one nat of KL to the reference, taken from the reward of each token."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that was cut off."""
    clip: float | None = 0.2
    """The ratio's clipping range, for updates after a rollout's first; none leaves the ratio out, for any update."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("num_generations", "rollout_epochs"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        require(
            self.minibatch_size % self.num_generations == 0,
            "minibatch_size",
            self.minibatch_size,
            f"a multiple of num_generations={self.num_generations}, because a prompt's completions stay together",
        )
        alone = self.baseline == "mean" and self.batch_size * self.num_generations == 1
        require(not alone, "batch_size", self.batch_size, "2 or more: baseline='mean' of one score is that score")
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "between 0 and 1")
        for field in ("kl_coef", "missing_eos_penalty"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "more than 0, or none")


def train(config: ReinforceConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer, reference, reward, examples, held_out = load_actors(config)
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    size, device = config.num_generations, device_of(policy)
    surrogate = dict(name="reinforce") if config.clip is None else dict(name="ppo", clip=config.clip)
    aggregation = "token" if config.baseline == "global" else "sequence_sum"
    whole_groups = dict(group_size=size, size=config.minibatch_size, seed=config.seed)
    micro_size, recorded = config.micro_batch_size or config.minibatch_size, Recorded(config.recorded)
    evaluation: dict[str, float] = {}

    held = dict(modules={"policy": policy}, optimizer=optimizer, controllers={"recorded": recorded})
    write = partial(save_model, model=policy, tokenizer=tokenizer)
    with Run("reinforce", config, total_steps, **held, write=write) as run:
        say_how_it_samples(run, policy)
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act and 2. score.
            rollout = act(policy, tokenizer, rows, config, "rollout", step, n=size)
            scores = score(reward, rollout, rows)
            metrics = rollout_gauges(rollout, scores)
            scores = charge_unfinished(scores, rollout, config.missing_eos_penalty)
            heights, takes_part = scores.total, scores.valid
            if config.baseline == "mean":
                heights = heights - masked_mean(heights, takes_part)
            elif config.baseline == "remax":
                greedy = act(policy, tokenizer, rows, config, "greedy", step, temperature=0.0)
                greedy_scores = score(reward, greedy, rows)
                metrics |= {"greedy_score": rollout_gauges(greedy, greedy_scores)["score"]}
                greedy_scores = charge_unfinished(greedy_scores, greedy, config.missing_eos_penalty)
                takes_part = takes_part & greedy_scores.valid.repeat_interleave(size)
                heights = remax_advantages(heights, greedy_scores.total.repeat_interleave(size))
            full_mask = rollout.pack().completion_mask.to(device)
            mask = full_mask & takes_part[:, None].to(device)
            order = group_minibatches(takes_part, epochs=config.rollout_epochs, step=step, **whole_groups)
            batches = first_epoch(order, micro_size)
            ask = partial(policy_forward, policy, config=config)
            logprobs = behaviour(rollout, config, ask, batches, recorded, run).logprobs.to(device)
            ref_logprobs = recall(rollout, config, partial(policy_forward, reference, config=config), batches).logprobs
            metrics |= {"kl": sequence_kl(logprobs - ref_logprobs, mask)}

            # 3. credit
            price = dict(kl_coef=config.kl_coef)
            if scores.tokens is not None:
                price["token_scores"] = scores.tokens.to(device)
            rewards, _ = kl_penalty(heights.to(device), logprobs, ref_logprobs, full_mask, **price)
            if config.baseline == "global":
                advantages = reinforce_pp_advantages(rewards, mask, gamma=config.gamma, all_ranks=True)
            else:
                advantages = discounted_returns(rewards, mask, gamma=config.gamma)

            # 4. improve
            averages, ratios = Averages(), []
            for minibatch in order:
                tokens, loss = mask[minibatch].sum(), torch.zeros((), device=device)
                for part in minibatch.split(micro_size):
                    batch = rollout.pack(part.tolist(), width=mask.shape[1])
                    new = policy_forward(policy, batch, config, entropy=True)
                    weights = engine_weights(logprobs[part], rollout, part, mask[part], config)
                    term, stats = policy_loss(
                        **surrogate,
                        new_logprobs=new.logprobs,
                        logprobs=logprobs[part],
                        advantages=advantages[part],
                        mask=mask[part],
                        weights=weights,
                        aggregation=aggregation,
                        normalizer=tokens if aggregation == "token" else len(minibatch),
                    )
                    term.backward()
                    loss += term.detach()
                    ratios.append(stats.pop("ratio_max"))
                    stats["entropy"] = masked_mean(new.entropy, mask[part])
                    if weights is not None:
                        stats["engine_weight"] = masked_mean(weights, mask[part])
                    averages.add(stats, mask[part].sum() / tokens)
                averages.add({"policy_loss": loss} | optimizer_step(optimizer, config.optim, step, total_steps))

            if ratios:
                metrics |= averages.means() | {"ratio_max": torch.stack(ratios).max().item()}
            if held_out and run.evaluate_now(step):
                evaluation = evaluate_held_out(policy, reference, tokenizer, reward, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("score", "kl", "entropy"))
        run.save(summary=evaluation)
    return evaluation
