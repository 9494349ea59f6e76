"""RLOO, REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): no critic, and no credit token by token.

A completion is one action. Its reward is its score less the price of leaving the reference, and what the others of its
prompt were paid on average is its baseline:

    1. act      a group of completions for each prompt
    2. score    R = score - kl_coef * log(policy / reference), summed over the completion's tokens
    3. credit   A = R - mean of the other R of its group
    4. improve  -A log policy(completion), its ratio clipped as in PPO where a rollout serves for more than one update

With kl_estimator="full" the KL is not estimated from the sampled tokens but summed exactly over the vocabulary, at each
token's state s: R = score - kl_coef * sum over t of KL(s_t). That R depends on the weights even where the completion
does not, so the gradient of its mean has two parts, both without bias, the second to be added to the loss:

    grad E[R] = E[(R - baseline) grad log policy(completion)] - kl_coef * E[sum over t of grad KL(s_t)]

The ratio is that of the whole completion, the product of its tokens' ratios, so `ratio_max`, `clip_fraction` and
`approx_kl` are gauges of completions.

The KL is in the reward, so a group whose scores are all equal still moves, by its price alone; `flat_groups` counts
them. A completion that the reward gave no score (None) is in nobody's baseline and in no loss; `excluded` counts those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from rlhf_core.batch import PackedBatch
from rlhf_core.config import PolicyGradientConfig, require
from rlhf_core.data.loader import count_steps, step_examples
from rlhf_core.losses.policy import policy_loss
from rlhf_core.models.forward import PolicyOutputs, device_of
from rlhf_core.models.load import save_model
from rlhf_core.ops.advantages import rloo_advantages
from rlhf_core.ops.kl import kl_penalty
from rlhf_core.ops.masked import masked_aggregate, masked_mean
from rlhf_core.rollout.recorded import Recorded, behaviour, engine_weights
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
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.run import Run, claim_folder


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(PolicyGradientConfig):
    """Improve a policy against a reward without a critic: the other completions of a prompt are the baseline."""

    num_generations: int = 4
    """Completions to a prompt, each other's baseline."""
    batch_size: int = 16
    """Prompts to a rollout."""
    minibatch_size: int = 64
    """Completions to an optimizer step, in whole groups."""
    rollout_epochs: int = 1
    """Passes over each rollout."""
    kl_coef: float = 0.05
    """Price of one nat of KL to the reference, taken from the reward."""
    kl_estimator: Literal["k1", "full"] = "k1"
    """How KL is measured: from the sampled tokens, or in full, exactly, over the vocabulary at each token. The full KL
    is a loss as well, because a reward cannot tell a token what its own distribution costs."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that was cut off."""
    clip: float = 0.2
    """The clipping range of a completion's ratio, for updates after a rollout's first."""

    def __post_init__(self):
        super().__post_init__()
        require(self.num_generations > 1, "num_generations", self.num_generations, "2 or more, to have a baseline")
        require(
            self.minibatch_size % self.num_generations == 0,
            "minibatch_size",
            self.minibatch_size,
            f"a multiple of num_generations={self.num_generations}, because a group stays together",
        )
        whole = self.importance != "token"
        require(whole, "importance", "token", "none or sequence, because a completion is one action")
        for field in ("rollout_epochs", "clip"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        for field in ("kl_coef", "missing_eos_penalty"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")


def train(config: RLOOConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    policy, tokenizer, reference, reward, examples, held_out = load_actors(config)
    optimizer = build_optimizer([policy], config.optim)
    total_steps = count_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    size, device = config.num_generations, device_of(policy)
    whole_groups = dict(group_size=size, size=config.minibatch_size, seed=config.seed)
    micro_size = config.micro_batch_size or config.minibatch_size
    exact = config.kl_estimator == "full"
    recorded = Recorded("off" if exact else config.recorded)  # the exact KL asks a forward, which tells the rest
    evaluation: dict[str, float] = {}

    def ask(batch: PackedBatch) -> PolicyOutputs:
        """What there is to know before the updates."""
        return policy_forward(policy, batch, config, reference=reference if exact else None)

    held = dict(modules={"policy": policy}, optimizer=optimizer, controllers={"recorded": recorded})
    write = partial(save_model, model=policy, tokenizer=tokenizer)
    with Run("rloo", config, total_steps, **held, write=write) as run:
        say_how_it_samples(run, policy)
        for step in run.steps():
            rows = step_examples(examples, config.batch_size, seed=config.seed, step=step)

            # 1. act and 2. score.
            rollout = act(policy, tokenizer, rows, config, "rollout", step, n=size)
            scores = score(reward, rollout, rows)
            metrics = rollout_gauges(rollout, scores)
            scores = charge_unfinished(scores, rollout, config.missing_eos_penalty)
            mask, valid = rollout.pack().completion_mask.to(device), scores.valid.to(device)
            order = group_minibatches(scores.valid, epochs=config.rollout_epochs, step=step, **whole_groups)
            batches = first_epoch(order, micro_size)
            old = behaviour(rollout, config, ask, batches, recorded, run, whole=True)
            logprobs = ref_logprobs = old.logprobs.to(device)  # where the exact KL is paid nobody looks at the latter
            if not exact:
                about_reference = partial(policy_forward, reference, config=config)
                ref_logprobs = recall(rollout, config, about_reference, batches).logprobs
            price = dict(kl_coef=config.kl_coef, estimator=config.kl_estimator, kl=old.kl, with_loss=exact)
            rewards, kl = kl_penalty(scores.total.to(device), logprobs, ref_logprobs, mask, **price)

            # 3. credit
            advantages = rloo_advantages(rewards.sum(-1), group_size=size, valid=valid)

            # 4. improve
            averages, ratios = Averages(), []
            for minibatch in order:
                tokens = mask[minibatch].sum()
                for part in minibatch.split(micro_size):
                    batch = rollout.pack(part.tolist(), width=mask.shape[1])
                    new = policy_forward(policy, batch, config, entropy=True, reference=reference if exact else None)
                    weights = engine_weights(logprobs[part], rollout, part, mask[part], config)
                    policy_term, stats = policy_loss(
                        new_logprobs=new.logprobs.sum(-1, keepdim=True),
                        logprobs=logprobs[part].sum(-1, keepdim=True),
                        advantages=advantages[part],
                        mask=valid[part, None],
                        weights=None if weights is None else weights[:, :1],
                        clip=config.clip,
                        normalizer=len(minibatch),
                    )
                    share, losses = len(part) / len(minibatch), {"policy_loss": policy_term}
                    if exact:  # what the completion's states cost by themselves, whatever its tokens are paid
                        kl_term = masked_aggregate(new.kl, mask[part], "sequence_sum", normalizer=len(minibatch))
                        losses["kl_loss"] = config.kl_coef * kl_term
                    sum(losses.values()).backward()
                    ratios.append(stats.pop("ratio_max"))
                    if weights is not None:
                        stats["engine_weight"] = weights[:, 0].mean()
                    averages.add(stats | {name: loss / share for name, loss in losses.items()}, share)
                    averages.add({"entropy": masked_mean(new.entropy, mask[part])}, mask[part].sum() / tokens)
                averages.add(optimizer_step(optimizer, config.optim, step, total_steps))

            metrics |= {
                "flat_groups": int(flat_groups(scores, size).sum()),
                "kl": sequence_kl(kl, mask & valid[:, None]),
            }
            if ratios:
                metrics |= averages.means() | {"ratio_max": torch.stack(ratios).max().item()}
            if held_out and run.evaluate_now(step):
                evaluation = evaluate_held_out(policy, reference, tokenizer, reward, held_out, config)
                metrics |= evaluation
            run.log(step, metrics, show=("score", "kl", "entropy"))
        run.save(summary=evaluation)
    return evaluation
