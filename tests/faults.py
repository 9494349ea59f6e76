"""Count the faults that the tests catch: plant one at a time into a copy of the tree and run the tests that cover it.

    python tests/faults.py --root . --out faults.json
    python tests/faults.py --root . --only gae-lambda-gamma-swapped,kto-reference-point-unclamped --out faults.json

A fault is a mistake that runs without an error and changes a result: a wrong sign, a dropped mask, a missing detach.
It is caught if a test fails, and it survives if none does. Faults that survive the tests of their own area are run
again with all tests of the package and of the packages above it.

This is a script, not a test module: pytest does not collect it. A run of all faults takes about an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TEST_SECONDS = 120
"""Limit of one test. A fault that makes a test run longer is caught."""
LEFT_OUT = (".git", ".venv", ".envs", "build", "dist", "__pycache__", "*.egg-info", ".pytest_cache", ".ruff_cache",
            ".mypy_cache", ".hypothesis")  # fmt: skip


class Edit(NamedTuple):
    """Replace `old`, which occurs exactly once in `file` (relative to rlhf_core), with `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """One mistake. `area` is a key of `TESTS`; the part before "/" is the package that the mistake is in."""

    id: str
    area: str
    what: str
    edits: tuple[Edit, ...]


class Result(NamedTuple):
    """`status`: caught, survived, broken (the tests could not be collected) or unfinished (out of time)."""

    status: str
    seconds: float
    test: str | None
    output: str


# fmt: off
TESTS: dict[str, tuple[str, ...]] = {
    "losses/policy": ("tests/losses/test_policy.py", "tests/losses", "tests/closed_form/test_policy_gradients.py",
        "tests/closed_form/test_preference_optima.py"),
    "losses/value": ("tests/losses/test_value.py", "tests/losses", "tests/closed_form/test_policy_gradients.py",
        "tests/closed_form/test_preference_optima.py"),
    "losses/preference": ("tests/losses/test_preference.py", "tests/losses/test_preference_table.py", "tests/losses",
        "tests/closed_form/test_policy_gradients.py", "tests/closed_form/test_preference_optima.py"),
    "losses/unpaired": ("tests/losses/test_unpaired.py", "tests/losses", "tests/closed_form/test_policy_gradients.py",
        "tests/closed_form/test_preference_optima.py"),
    "ops/advantages": ("tests/ops/test_advantages.py", "tests/ops"),
    "ops/masked": ("tests/ops/test_masked.py", "tests/ops", "tests/losses"),
    "ops/kl": ("tests/ops/test_kl.py", "tests/ops"),
    "ops/shaping": ("tests/ops/test_shaping.py", "tests/ops"),
    "rollout/sampling": ("tests/rollout/test_sampling.py", "tests/rollout/test_sampling_groups.py", "tests/rollout"),
    "rollout/online": ("tests/rollout/test_rewards_sums.py", "tests/trainers/test_grpo.py",
        "tests/trainers/test_rloo.py", "tests/trainers/test_ppo.py"),
    "rollout/recorded": ("tests/trainers/test_recorded.py", "tests/trainers/test_grpo.py"),
    "rollout/critic": ("tests/trainers/test_ppo_details.py", "tests/trainers/test_ppo.py"),
    "rollout/judges": ("tests/rollout/test_judges.py", "tests/trainers/test_online_dpo.py"),
    "training/checkpoint": ("tests/training/test_checkpoint.py", "tests/training/test_run.py"),
    "training/run": ("tests/training/test_run.py", "tests/trainers/test_lora.py", "tests/trainers/test_dpo.py"),
    "training/optim": ("tests/training/test_optim.py",),
    "training/metrics": ("tests/training/test_metrics.py", "tests/trainers/test_kto.py"),
    "training/reference": ("tests/trainers/test_dpo.py", "tests/trainers/test_ppo_details.py"),
    "trainers/ppo": ("tests/trainers/test_ppo_details.py", "tests/trainers/test_ppo.py"),
    "trainers/rloo": ("tests/trainers/test_rloo.py", "tests/trainers/test_every_trainer.py"),
    "trainers/grpo": ("tests/trainers/test_grpo.py", "tests/trainers/test_recorded.py"),
    "trainers/reinforce": ("tests/trainers/test_reinforce.py", "tests/trainers/test_reward_sources.py"),
    "trainers/raft": ("tests/trainers/test_raft.py", "tests/trainers/test_reward_sources.py"),
    "trainers/rrhf": ("tests/trainers/test_rrhf.py", "tests/trainers/test_reward_sources.py"),
    "trainers/online_dpo": ("tests/trainers/test_online_dpo.py",),
    "trainers/dpo": ("tests/trainers/test_dpo.py", "tests/trainers/test_lora.py"),
    "trainers/kto": ("tests/trainers/test_kto.py",),
    "trainers/reward": ("tests/trainers/test_reward.py",),
    "trainers/sft": ("tests/trainers/test_sft.py", "tests/data/test_turns.py"),
}
# fmt: on
"""For each area, the test files and folders that are run, those that are likeliest to fail first."""

# fmt: off
WIDER: dict[str, tuple[str, ...]] = {
    "losses": ("tests/parity", "tests/trainers", "tests/closed_form", "tests/rollout", "tests/training"),
    "ops": ("tests/losses", "tests/parity", "tests/trainers", "tests/closed_form", "tests/rollout", "tests/training"),
    "rollout": ("tests/trainers", "tests/closed_form", "tests/rollout", "tests/training"),
    "training": ("tests/trainers", "tests/closed_form", "tests/rollout", "tests/training"),
    "trainers": ("tests/trainers", "tests/closed_form", "tests/rollout", "tests/training"),
}
# fmt: on
"""For each package, the tests that faults which survived those of their area are run against."""

# fmt: off
FAULTS = (
    Fault("policy-ratio-inverted", "losses/policy",
          "the ratio is old / new", (
        Edit("losses/policy.py",
             "log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)\n"
             "    advantages = (",
             "log_ratio = torch.where(mask, logprobs - new_logprobs, 0.0)\n"
             "    advantages = ("),)),
    Fault("policy-clip-high-ignored", "losses/policy",
          "the clipped surrogate uses clip above 1 too, in place of clip_high", (
        Edit("losses/policy.py",
             "ratio.clamp(1 - clip, 1 + high) * terms.advantages",
             "ratio.clamp(1 - clip, 1 + clip) * terms.advantages"),)),
    Fault("policy-sequence-ratio-summed", "losses/policy",
          "the sequence ratio is the product of the token ratios, not their geometric mean", (
        Edit("losses/policy.py",
             "return masked_mean(log_ratio, mask, -1)[:, None].expand_as(log_ratio)",
             "return masked_sum(log_ratio, mask, -1)[:, None].expand_as(log_ratio)"),)),
    Fault("policy-kl-loss-ratio-detached", "losses/policy",
          "the ratio that weights the KL loss carries no gradient", (
        Edit("losses/policy.py",
             "weighted = kl * _at_level(log_ratio, mask, ratio_level).exp()",
             "weighted = kl * _at_level(log_ratio, mask, ratio_level).exp().detach()"),)),
    Fault("policy-ptx-coefficient-dropped", "losses/policy",
          "ptx_coef does not multiply the loss of the pretraining texts", (
        Edit("losses/policy.py",
             "return ptx_coef * loss, {",
             "return loss, {"),)),
    Fault("value-clip-one-sided", "losses/value",
          "the value clip bounds only a rise", (
        Edit("losses/value.py",
             "new_values.clamp(values - value_clip, values + value_clip)",
             "new_values.clamp(max=values + value_clip)"),)),
    Fault("preference-smoothing-swapped", "losses/preference",
          "label smoothing weighs the two terms the other way round", (
        Edit("losses/registry.py",
             "return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)",
             "return -label_smoothing * F.logsigmoid(logits) - (1 - label_smoothing) * F.logsigmoid(-logits)"),)),
    Fault("preference-length-normalisation-omitted", "losses/preference",
          "SimPO, IPO and ORPO use summed log-probs instead of means", (
        Edit("losses/preference.py",
             "chosen_divisor = chosen_length.clamp(min=1) if length_normalized else 1",
             "chosen_divisor = 1"),
        Edit("losses/preference.py",
             "rejected_divisor = rejected_length.clamp(min=1) if length_normalized else 1",
             "rejected_divisor = 1"),)),
    Fault("preference-tdpo2-kl-attached", "losses/preference",
          "TDPO2's KL of the chosen side carries a gradient", (
        Edit("losses/paired.py",
             "pairs.rejected_kl - pairs.chosen_kl.detach()",
             "pairs.rejected_kl - pairs.chosen_kl"),)),
    Fault("unpaired-class-weights-swapped", "losses/unpaired",
          "desirable_weight multiplies the undesirable rows", (
        Edit("losses/unpaired.py",
             "pick(labels, desirable_weight, undesirable_weight, losses)",
             "pick(labels, undesirable_weight, desirable_weight, losses)"),)),
    Fault("ops-gae-lambda-gamma-swapped", "ops/advantages",
          "gae: lambda and gamma are swapped in the TD target", (
        Edit("ops/advantages.py",
             "torch.add(rewards, _next(values), alpha=gamma * (1 - lam))",
             "torch.add(rewards, _next(values), alpha=lam * (1 - gamma))"),)),
    Fault("ops-gae-bootstrap-not-discounted", "ops/advantages",
          "gae: the bootstrap value is not multiplied by gamma", (
        Edit("ops/advantages.py",
             "_add_at_last_token(rewards, mask, gamma * bootstrap)",
             "_add_at_last_token(rewards, mask, bootstrap)"),)),
    Fault("ops-rloo-baseline-includes-itself", "ops/advantages",
          "rloo: the baseline is the mean of the whole group", (
        Edit("ops/advantages.py",
             "others = (shifted.sum(-1, keepdim=True) - shifted) / (count - 1).clamp(min=1)",
             "others = shifted.sum(-1, keepdim=True) / count.clamp(min=1)"),)),
    Fault("ops-group-invalid-counted", "ops/advantages",
          "group_advantages: completions without a score count in the mean", (
        Edit("ops/advantages.py",
             "mean = shifted.sum(-1, keepdim=True) / count.clamp(min=1)",
             "mean = shifted.mean(-1, keepdim=True)"),)),
    Fault("ops-whiten-without-mask", "ops/masked",
          "masked_whiten: mean and variance over padding too", (
        Edit("ops/masked.py",
             "values, mean = torch.where(mask, values, 0.0), masked_mean(values, mask, all_ranks=all_ranks)\n"
             "    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask, all_ranks=all_ranks) + eps)",
             "values = torch.where(mask, values, 0.0)\n"
             "    everywhere = torch.ones_like(mask)\n"
             "    mean = masked_mean(values, everywhere, all_ranks=all_ranks)\n"
             "    whitened = (values - mean) * torch.rsqrt(masked_var(values, everywhere, "
             "all_ranks=all_ranks) + eps)"),)),
    Fault("ops-aggregate-counts-empty-rows", "ops/masked",
          "masked_aggregate: rows without tokens count as sequences", (
        Edit("ops/masked.py",
             "((lengths > 0).sum() if normalizer is None else normalizer)",
             "(len(lengths) if normalizer is None else normalizer)"),)),
    Fault("ops-k3-other-direction", "ops/kl",
          "k3 estimates KL with the log-ratio's sign turned", (
        Edit("ops/kl.py",
             "return torch.expm1(-log_ratio) + log_ratio",
             "return torch.expm1(log_ratio) - log_ratio"),)),
    Fault("ops-kl-penalty-sign", "ops/kl",
          "kl_penalty rewards KL", (
        Edit("ops/kl.py",
             "rewards, scores = -kl_coef * kl, scores.to(kl.dtype)",
             "rewards, scores = kl_coef * kl, scores.to(kl.dtype)"),)),
    Fault("ops-kl-penalty-score-place", "ops/kl",
          "kl_penalty puts the score at column length - 1, wrong where a mask has holes or starts later", (
        Edit("ops/kl.py",
             "last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(-1)",
             "last = mask.sum(-1) - 1"),)),
    Fault("ops-missing-eos-on-finished", "ops/shaping",
          "missing_eos_penalty is subtracted from the finished completions", (
        Edit("ops/shaping.py",
             "torch.where(finished, scores, scores - penalty)",
             "torch.where(finished, scores - penalty, scores)"),)),
    Fault("rollout-samples-in-train-mode", "rollout/sampling",
          "completions are sampled with the policy in training mode", (
        Edit("rollout/sampling.py",
             "with evaluating(policy, *[value_head] if isinstance(value_head, nn.Module) else []):",
             "with contextlib.nullcontext():"),)),
    Fault("rollout-group-order-broken", "rollout/online",
          "the data rows given to the reward are not in the order of the completions", (
        Edit("rollout/rewards.py",
             "rows = [example.record.row for example in examples for _ in range(experience.group_size)]",
             "rows = [example.record.row for _ in range(experience.group_size) for example in examples]"),)),
    Fault("rollout-recompute-order-broken", "rollout/online",
          "recomputed log-probs of shuffled micro-batches are put back in sorted order", (
        Edit("rollout/online.py",
             "zeros.index_copy(0, rows, torch.cat(tensors))",
             "zeros.index_copy(0, rows.sort().values, torch.cat(tensors))"),)),
    Fault("rollout-excluded-kept-in-minibatches", "rollout/online",
          "minibatches hold the completions that take no part", (
        Edit("rollout/plan.py",
             "if len(rows := minibatch[takes_part[minibatch]])]",
             "if len(rows := minibatch)]"),)),
    Fault("rollout-recorded-never-rejected", "rollout/recorded",
          "log-probs recorded while sampling are used however far they are from a forward", (
        Edit("rollout/recorded.py",
             "self.usable = gap <= RECORDED_TOLERANCE  # False for NaN",
             "self.usable = True"),)),
    Fault("rollout-bootstrap-of-finished", "rollout/critic",
          "the value after the end is taken for finished completions instead of truncated ones", (
        Edit("rollout/critic.py",
             "truncated = (~experience.finished).nonzero()",
             "truncated = experience.finished.nonzero()"),)),
    Fault("rollout-reference-without-temperature", "rollout/online",
          "the reference's log-probs are those at temperature 1", (
        Edit("rollout/online.py",
             "        temperature = self.config.sampling.temperature\n"
             "        return policy_outputs",
             "        temperature = self.config.sampling.temperature if model is self.policy else 1.0\n"
             "        return policy_outputs"),)),
    Fault("rollout-evaluation-kl-sign", "rollout/online",
          "eval_kl has the wrong sign", (
        Edit("rollout/online.py",
             "sequence_kl(logprobs - ref_logprobs, experience.completion_mask)",
             "sequence_kl(ref_logprobs - logprobs, experience.completion_mask)"),)),
    Fault("rollout-judge-order-not-undone", "rollout/judges",
          "the judge's verdict on a swapped pair is not swapped back", (
        Edit("rollout/judges.py",
             "second=(verdicts.second ^ swapped) & verdicts.valid",
             "second=verdicts.second & verdicts.valid"),)),
    Fault("training-optimizer-not-restored", "training/checkpoint",
          "a resumed run starts with a fresh optimizer", (
        Edit("training/checkpoint.py",
             '    _unflatten(optimizer, load_file(path / "optimizer.safetensors"))\n',
             ""),)),
    Fault("training-checkpoint-of-previous-step", "training/run",
          "a checkpoint is numbered as the step before", (
        Edit("training/run.py",
             "            self.last_step,\n"
             "            modules=",
             "            max(self.last_step - 1, 1),\n"
             "            modules="),)),
    Fault("training-controllers-not-restored", "training/run",
          "controllers and running means start anew in a resumed run", (
        Edit("training/run.py",
             '            item.load_state_dict(state["states"][name])',
             "            item.state_dict()"),)),
    Fault("training-keep-best-wrong-direction", "training/run",
          "keep_best keeps the largest loss and the lowest score", (
        Edit("training/folder.py",
             "-1 if any(part in self.metric for part in _LESS_IS_BETTER) else 1",
             "1 if any(part in self.metric for part in _LESS_IS_BETTER) else -1"),)),
    Fault("training-step-seed-dropped", "training/run",
          "torch's random numbers do not follow from the step", (
        Edit("training/run.py",
             '            torch.manual_seed(generator(self.config.seed, "step", number).initial_seed())\n',
             ""),)),
    Fault("training-gradient-not-clipped", "training/optim",
          "the gradient's norm is measured and not clipped", (
        Edit("training/optim.py",
             "nn.utils.clip_grad_norm_(parameters, max_norm)",
             "nn.utils.clip_grad_norm_(parameters, max_norm * math.inf)"),)),
    Fault("training-averages-unweighted", "training/metrics",
          "means over micro-batches ignore the weights in the divisor", (
        Edit("training/metrics.py",
             "self._weights[name] = self._weights.get(name, 0.0) + weight",
             "self._weights[name] = self._weights.get(name, 0.0) + 1.0"),)),
    Fault("training-ema-rate-reversed", "training/reference",
          "the moving average goes 1 - rate of the way", (
        Edit("training/reference.py",
             '1.0 if settings.update == "sync" else settings.rate)',
             '1.0 if settings.update == "sync" else 1 - settings.rate)'),)),
    Fault("ppo-kl-from-the-policy", "trainers/ppo",
          "PPO measures KL from the policy itself instead of the reference", (
        Edit("trainers/ppo.py",
             "    return run.with_ref_logprobs(experience)\n",
             "    return replace(experience, ref_logprobs=run.compute(experience, partial(run.forward, "
             "run.policy)).logprobs)\n"),)),
    Fault("ppo-gae-arguments-swapped", "trainers/ppo",
          "PPO gives gae gamma for lambda and lambda for gamma", (
        Edit("trainers/ppo.py",
             "gamma=config.gamma, lam=config.lam, bootstrap=bootstrap",
             "gamma=config.lam, lam=config.gamma, bootstrap=bootstrap"),)),
    Fault("ppo-kl-stop-steps-once-more", "trainers/ppo",
          "PPO leaves the gradient of the minibatch that stopped the updates, and the next step adds it", (
        Edit("trainers/ppo.py",
             "                    minibatch.discard()\n"
             "                    break\n",
             "                    minibatch.discarded = True\n"
             "                    break\n"),)),
    Fault("ppo-reference-moved-before-the-step", "trainers/ppo",
          "PPO's moving reference follows before the rollout instead of after the updates", (
        Edit("training/run.py",
             "        if self.reference is not None:\n"
             "            update_reference(",
             '        if self.reference is not None and self.job != "ppo":\n'
             "            update_reference("),
        Edit("trainers/ppo.py",
             "from rlhf_core.training.metrics import Metrics\n",
             "from rlhf_core.training.metrics import Metrics\n"
             "from rlhf_core.training.reference import update_reference\n"),
        Edit("trainers/ppo.py",
             "            # 1. sample and 2. score\n",
             "            if run.reference is not None:\n"
             "                update_reference(run.reference, run.policy, step.number, config.reference)\n"),)),
    Fault("ppo-warm-up-one-step-short", "trainers/ppo",
          "the critic's warm-up ends one step early", (
        Edit("trainers/ppo.py",
             "warmup = step.number <= config.value.warmup",
             "warmup = step.number < config.value.warmup"),)),
    Fault("ppo-missing-eos-before-the-clip", "trainers/ppo",
          "the missing-EOS penalty is applied before scores are clipped", (
        Edit("rollout/shaping.py",
             "        if config.clip is not None:\n"
             "            scores = clip_scores(scores, low=-config.clip, high=config.clip)\n"
             '        if config.missing_eos in ("subtract", "replace"):\n'
             "            scores = missing_eos_penalty(\n"
             "                scores, experience.finished, penalty=config.missing_eos_penalty, "
             "mode=config.missing_eos\n"
             "            )\n",
             '        if config.missing_eos in ("subtract", "replace"):\n'
             "            scores = missing_eos_penalty(\n"
             "                scores, experience.finished, penalty=config.missing_eos_penalty, "
             "mode=config.missing_eos\n"
             "            )\n"
             "        if config.clip is not None:\n"
             "            scores = clip_scores(scores, low=-config.clip, high=config.clip)\n"),)),
    Fault("ppo-adaptive-kl-not-updated", "trainers/ppo",
          "the adaptive KL coefficient counts one completion a step", (
        Edit("rollout/online.py",
             "self._kl = sequence_kl(kl, mask), len(mask)",
             "self._kl = sequence_kl(kl, mask), 1"),)),
    Fault("rloo-normalizer-of-the-micro-batch", "trainers/rloo",
          "RLOO divides each micro-batch's loss by its own rows", (
        Edit("trainers/rloo.py",
             "        clip=run.config.clip,\n"
             "        normalizer=minibatch.completions,",
             "        clip=run.config.clip,\n"
             "        normalizer=len(batch),"),)),
    Fault("grpo-ratio-of-the-reference", "trainers/grpo",
          "GRPO's ratio is new / reference", (
        Edit("trainers/grpo.py",
             "        logprobs=batch.logprobs,\n"
             "        advantages=batch.advantages,",
             "        logprobs=batch.logprobs if run.reference is None else batch.ref_logprobs,\n"
             "        advantages=batch.advantages,"),)),
    Fault("grpo-rollout-seed-without-step", "trainers/grpo",
          "GRPO draws its completions from the same random numbers at each step", (
        Edit("rollout/online.py",
             'self.run.rollout(self.rows, "rollout", self.number, n=n, value_head=value_head)',
             'self.run.rollout(self.rows, "rollout", self.number * (self.run.job != "grpo"), n=n, '
             "value_head=value_head)"),)),
    Fault("grpo-flat-groups-kept", "trainers/grpo",
          "groups that are still flat after dynamic sampling stay in the loss", (
        Edit("trainers/grpo.py",
             "return experience.exclude(flat.repeat_interleave(size))",
             "return experience"),)),
    Fault("grpo-mask-truncated-ignored", "trainers/grpo",
          "truncated completions stay in the loss though they are to be masked", (
        Edit("trainers/grpo.py",
             "            experience = run.scores.exclude_truncated(experience)\n",
             ""),)),
    Fault("grpo-overlong-sign", "trainers/grpo",
          "GRPO's overlong penalty raises the score", (
        Edit("rollout/shaping.py",
             "scores = scores + overlong_penalty(",
             "scores = scores - overlong_penalty("),)),
    Fault("reinforce-mean-counts-excluded", "trainers/reinforce",
          "REINFORCE's mean baseline counts completions without a score as 0", (
        Edit("trainers/reinforce.py",
             "masked_mean(experience.scores, experience.takes_part)",
             "experience.scores.mean()"),)),
    Fault("raft-excluded-may-be-the-best", "trainers/raft",
          "RAFT's best completion of a prompt may be one without a score", (
        Edit("trainers/raft.py",
             "experience.scores.masked_fill(~experience.takes_part, -torch.inf).view(",
             "experience.scores.view("),)),
    Fault("rrhf-excluded-kept", "trainers/rrhf",
          "RRHF ranks completions without a score, as if their score were 0", (
        Edit("trainers/rrhf.py",
             "mask=batch.mask.view(lists),",
             "mask=batch.completion_mask.view(lists),"),)),
    Fault("online-dpo-xpo-sign", "trainers/online_dpo",
          "XPO's bonus has the wrong sign", (
        Edit("trainers/online_dpo.py",
             "loss = loss + config.xpo_alpha * explored / total",
             "loss = loss - config.xpo_alpha * explored / total"),)),
    Fault("dpo-normalizer-ignores-weights", "trainers/dpo",
          "DPO divides by the number of pairs instead of the sum of their weights", (
        Edit("trainers/dpo.py",
             "BatchLoss(run.config, means, rows.total(row_weight), rows.total(chosen_tokens))",
             "BatchLoss(run.config, means, float(len(rows.rows)), rows.total(chosen_tokens))"),)),
    Fault("dpo-evaluates-in-train-mode", "trainers/dpo",
          "DPO and KTO (and every other run over rows) evaluate in training mode", (
        Edit("training/offline.py",
             "with torch.no_grad(), evaluating(self.model):",
             "with torch.no_grad():"),)),
    Fault("kto-reference-point-unclamped", "trainers/kto",
          "KTO's reference point may be below 0 in the trainer", (
        Edit("trainers/kto.py",
             "return (total / len(rows.rows)).clamp(min=0)",
             "return total / len(rows.rows)"),)),
    Fault("kto-reference-point-of-matched-rows", "trainers/kto",
          "KTO's reference point is estimated on the rows' own completions", (
        Edit("trainers/kto.py",
             "RowBatch(mismatched_rows(rows.rows, run.examples, max_length), run.config, cached=False)",
             "RowBatch(rows.rows, run.config, cached=False)"),)),
    Fault("reward-model-margins-ignored", "trainers/reward",
          "the rows' margins are not asked of the scores", (
        Edit("trainers/reward.py",
             "[row.margin or 0.0 if config.margins else 0.0 for row in rows]",
             "[0.0 for row in rows]"),)),
    Fault("sft-loss-mask-of-turns-ignored", "trainers/sft",
          "the smoothed loss and the evaluation of SFT count turns that are not to be learned", (
        Edit("trainers/sft.py",
             "            batch.packed.loss_mask.to(run.device),\n"
             "            weights=",
             "            batch.packed.completion_mask.to(run.device),\n"
             "            weights="),
        Edit("trainers/sft.py",
             "                mask,\n"
             "                weights=batch.row_weights(",
             "                batch.packed.completion_mask.to(run.device),\n"
             "                weights=batch.row_weights("),)),
)
# fmt: on


# ------------------------------------------------------------------------------------------------------- the machinery


def copy_tree(root: Path, target: Path) -> Path:
    """Copy the source, tests and documentation of `root`, without version control and build outputs."""
    shutil.copytree(root, target, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    return target


def environment(tree: Path) -> dict[str, str]:
    """Variables under which Python imports the packages of `tree` and writes no bytecode.

    Bytecode is recognised as stale by time and size, which two edits within one second can share.
    """
    paths = os.pathsep.join([str(tree), str(tree / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}


def require_own_package(tree: Path) -> None:
    """Raise SystemExit unless Python imports rlhf_core from `tree`."""
    command = [sys.executable, "-c", "import rlhf_core; print(rlhf_core.__file__)"]
    found = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=True)
    if Path(found.stdout.strip()).resolve() != (tree / "rlhf_core" / "__init__.py").resolve():
        raise SystemExit(f"rlhf_core is imported from {found.stdout.strip()}: expected {tree}")


def run_tests(tree: Path, paths: Sequence[str], *, seconds: float, first_failure: bool = True) -> Result:
    """Run the test paths in their order, up to the first failure unless told otherwise."""
    command = [sys.executable, "-m", "pytest", *paths, "-q", "-n0", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    command += [f"--timeout={TEST_SECONDS}", *(["-x"] if first_failure else [])]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=seconds, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Result("unfinished", time.monotonic() - began, None, "")
    elapsed, output = time.monotonic() - began, done.stdout + done.stderr
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    status = {0: "survived", 1: "caught"}.get(done.returncode, "broken")
    if failed is not None and "::" not in failed.group(1):  # a file that could not be imported, not a test
        status = "broken"
    if "Timeout (>" in output and failed is None:  # a test that could not be interrupted ends the process
        status = "caught"
    return Result(status, elapsed, failed.group(1) if failed else None, output)


def planted(tree: Path, fault: Fault) -> dict[Path, str]:
    """Make the fault's edits in `tree`. Returns the original text of each file that was changed.

    Raises ValueError, with nothing changed, where a text to replace does not occur exactly once, and SyntaxError for
    a result that is not Python.
    """
    before: dict[Path, str] = {}
    after: dict[Path, str] = {}
    for edit in fault.edits:
        path = tree / "rlhf_core" / edit.file
        text = after[path] if path in after else path.read_text()
        before.setdefault(path, text)
        count = text.count(edit.old)
        if count != 1 or edit.old == edit.new:
            raise ValueError(f"{fault.id}: {edit.file} has {count} times, expected once:\n{edit.old}")
        after[path] = text.replace(edit.old, edit.new)
    for path, text in after.items():
        compile(text, str(path), "exec")
    for path, text in after.items():
        path.write_text(text)
    return before


def try_fault(tree: Path, fault: Fault, paths: Sequence[str], *, seconds: float) -> Result:
    """Plant the fault, run the tests, and restore the tree."""
    before = planted(tree, fault)
    try:
        return run_tests(tree, paths, seconds=seconds)
    finally:
        for path, text in before.items():
            path.write_text(text)


def test_files(tree: Path, paths: Sequence[str]) -> list[str]:
    """The test files under the paths, in the order of the paths, each once. SystemExit for a path without any.

    pytest itself drops a file that is named before its folder, and with it the order.
    """
    found: dict[str, None] = {}
    for path in paths:
        files = sorted((tree / path).rglob("test_*.py")) if (tree / path).is_dir() else [tree / path]
        if not files or not all(file.is_file() for file in files):
            raise SystemExit(f"{path}: expected a test file or a folder of test files in {tree}")
        found.update((file.relative_to(tree).as_posix(), None) for file in files)
    return [*found]


def require_passing(tree: Path, paths: Sequence[str], *, seconds: float) -> None:
    """Raise SystemExit unless the tests pass in the tree as it is."""
    result = run_tests(tree, paths, seconds=seconds)
    if result.status != "survived":
        raise SystemExit(f"without any fault the tests do not pass ({result.status}): {result.output[-4000:]}")


def main(
    arguments: Sequence[str] | None = None,
    *,
    faults: Sequence[Fault] | None = None,
    tests: Mapping[str, Sequence[str]] | None = None,
    wider: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Run the command line. `faults`, `tests` and `wider` replace the lists of this module."""
    faults, tests, wider = faults or FAULTS, tests or TESTS, wider or WIDER
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the tree to copy")
    parser.add_argument("--only", help="ids or areas, separated by commas; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of its own")
    parser.add_argument("--seconds", type=float, default=900, help="limit of one run of pytest")
    parser.add_argument("--no-wider", action="store_true", help="do not run survivors against the wider set of tests")
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass in this very tree")
    parser.add_argument("--check", action="store_true", help="only make every edit, to see that each still applies")
    parser.add_argument("--out", type=Path, help="JSON file of results; those of other ids in it are kept")
    options = parser.parse_args(arguments)

    wanted = set(options.only.split(",")) if options.only else None
    chosen = [fault for fault in faults if wanted is None or {fault.id, fault.area, package_of(fault)} & wanted]
    if unknown := (wanted or set()) - {name for each in chosen for name in (each.id, each.area, package_of(each))}:
        parser.error(f"--only: no fault or area named {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(options.jobs):
            trees.put(copy_tree(options.root.resolve(), Path(folder, str(number))))
        first = trees.queue[0]
        if options.check:
            return check(first, chosen)
        require_own_package(first)
        if not options.no_baseline:
            areas = dict.fromkeys(each.area for each in chosen)
            require_passing(first, test_files(first, [p for area in areas for p in tests[area]]), seconds=3600)
        results: dict[str, dict[str, object]] = {}
        if options.out and options.out.exists():
            results = json.loads(options.out.read_text())

        passing: set[str] = set()

        def one(fault: Fault) -> None:
            tree = trees.get()
            try:
                paths = test_files(tree, tests[fault.area])
                result, scope = try_fault(tree, fault, paths, seconds=options.seconds), "own"
                total = result.seconds
                if result.status == "survived" and not options.no_wider:
                    more = [path for path in test_files(tree, wider[package_of(fault)]) if path not in paths]
                    if not options.no_baseline and not passing.issuperset(more):
                        require_passing(tree, [path for path in more if path not in passing], seconds=3600)
                        passing.update(more)
                    result, scope = try_fault(tree, fault, more, seconds=3600), "wider"
                    total += result.seconds
            finally:
                trees.put(tree)
            found = {"status": result.status, "seconds": round(total, 1), "test": result.test, "tests": scope}
            results[fault.id] = {"area": fault.area, "what": fault.what, **found}
            if result.status not in ("caught", "survived"):
                results[fault.id]["output"] = result.output[-2000:]
            print(f"{fault.id:45} {result.status:10} {total:6.1f} s  {scope:5}  {result.test or ''}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, chosen))
    states = [results[fault.id]["status"] for fault in chosen]
    print(f"{states.count('caught')} of {len(states)} caught, {states.count('survived')} survived")
    return 0


def package_of(fault: Fault) -> str:
    return fault.area.partition("/")[0]


def check(tree: Path, faults: Sequence[Fault]) -> int:
    """Make the edits of each fault, one fault at a time, without running a test. Returns how many do not apply."""
    wrong = 0
    for fault in faults:
        try:
            for path, text in planted(tree, fault).items():
                path.write_text(text)
        except (ValueError, SyntaxError, OSError) as error:
            wrong += 1
            print(error)
    print(f"{len(faults) - wrong} of {len(faults)} faults apply")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
