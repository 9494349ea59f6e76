"""Our policy losses and advantages compared with TRL's, in value and in every token's gradient.

Both in float64, where they agree to 2e-15, far within the tolerance of 1e-6.

TRL adds the KL and the entropy bonus inside its loss; ours are separate terms, aggregated in the same way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.losses.policy import POLICY_LOSSES, entropy_bonus, kl_loss, off_policy_mask, policy_loss
from rlhf_core.ops.advantages import group_advantages, rloo_advantages
from rlhf_core.ops.masked import masked_sum
from tests.parity.golden import hold, leaf, read

GRPO, ADVANTAGES = read("trl_grpo"), read("trl_advantages")
MAX_LENGTH = 9
OPTIONS = {  # from `GRPOConfig`'s names to ours
    "epsilon": "clip",
    "epsilon_high": "clip_high",
    "delta": "dual_clip",
    "sapo_temperature_pos": "temperature_pos",
    "sapo_temperature_neg": "temperature_neg",
    "vespo_k_pos": "k_pos",
    "vespo_lambda_pos": "lambda_pos",
    "vespo_k_neg": "k_neg",
    "vespo_lambda_neg": "lambda_neg",
}


def given(name: str) -> Tensor:
    tensor = GRPO.inputs[name]
    return tensor if tensor.dtype == torch.bool else tensor.double()


@pytest.mark.filterwarnings("ignore:KL estimator 'k3' as a loss")  # TRL's default until 1.0, and still on offer
@pytest.mark.parametrize("name", GRPO.cases)
def test_grpo(name):
    case = GRPO.cases[name]
    settings = case.settings
    new_logprobs = leaf(given("new_logprobs"))
    mask, counts = mask_and_counts(settings)
    # TRL's default ratio is the token's, for luspo too.
    level = dict(ratio_level=settings.get("importance_sampling_level", "token"))
    policy = dict(logprobs=given("logprobs"), mask=mask, **counts)
    loss, _ = policy_loss(
        settings["loss_type"],
        new_logprobs=new_logprobs,
        advantages=given("advantages"),
        **policy | corrections(settings, new_logprobs.detach(), mask),
        **level,
        **surrogate_options(settings),
    )
    if settings.get("beta"):
        corrected = settings.get("use_bias_correction_kl", True)
        aggregation = POLICY_LOSSES[settings["loss_type"]].aggregation
        kl, _ = kl_loss(
            new_logprobs,
            given("ref_logprobs"),
            mask,
            estimator="k3",
            logprobs=given("logprobs") if corrected else None,
            aggregation=aggregation,
            **level,
            **counts,
        )
        loss = loss + settings["beta"] * kl
    if "entropy_coef" in settings:
        loss = loss + entropy_bonus(given("entropy"), mask, entropy_coef=settings["entropy_coef"])[0]
    loss.backward()
    hold(case, loss=loss, gradient=new_logprobs.grad)


def mask_and_counts(settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The mask, and what the sum over it is divided by."""
    mask, counts = given("mask"), {}
    aggregation = POLICY_LOSSES[settings["loss_type"]].aggregation
    if "truncated" in settings:
        mask = given("truncated_mask")
        if aggregation != "token":  # TRL counts the completion that is masked; ours does with this normalizer
            counts["normalizer"] = len(mask)
    if "num_items_in_batch" in settings:
        counts["normalizer"] = settings["num_items_in_batch"]
    if aggregation == "max_length":
        counts["max_length"] = MAX_LENGTH
    return mask, counts


def corrections(settings: dict[str, Any], new_logprobs: Tensor, mask: Tensor) -> dict[str, Any]:
    """TRL multiplies losses by the mask of off-policy completions and by the sampler's importance ratio: `weights`.

    Our vespo takes no weights: a dropped completion is removed from the mask, while the count stays that of all tokens,
    and the sampler's ratio is part of vespo's own ratio.
    """
    sampled, weights = given("logprobs"), torch.ones(mask.shape, dtype=torch.float64)
    if "off_policy_mask_threshold" in settings:
        threshold = settings["off_policy_mask_threshold"]
        kept = off_policy_mask(new_logprobs, sampled, given("advantages"), mask, threshold=threshold)
        assert kept.any() and not kept.equal(mask)
        if settings["loss_type"] == "vespo":
            return dict(mask=kept, normalizer=mask.sum())
        weights = weights * kept
    if "importance_sampling_ratio" in settings:
        ratio = given(f"{settings['importance_sampling_ratio']}_ratio")
        if settings["loss_type"] == "vespo":
            return dict(logprobs=sampled - ratio.log())
        weights = weights * ratio
    return {} if settings["loss_type"] == "vespo" else dict(weights=weights)


def surrogate_options(settings: dict[str, Any]) -> dict[str, Any]:
    options = {OPTIONS[key]: value for key, value in settings.items() if key in OPTIONS}
    if settings["loss_type"] == "cispo":
        return {"ratio_max": options["clip_high"]}
    if settings["loss_type"] in ("sapo", "vespo"):  # which do not clip: TRL ignores the two epsilons
        return {key: value for key, value in options.items() if not key.startswith("clip")}
    return options


@pytest.mark.parametrize("name", ADVANTAGES.cases)
def test_advantages(name):
    """In ours a completion without score (NaN) needs a mask."""
    case, inputs = ADVANTAGES.cases[name], ADVANTAGES.inputs
    scores = inputs[case.settings["rewards"]].double()
    valid = ~scores.isnan()
    if case.settings["loss_type"] == "grpo":
        advantages = group_advantages(scores, scale=case.settings["scale_rewards"], valid=valid)
    else:
        kl = masked_sum(inputs["logprobs"].double() - inputs["ref_logprobs"].double(), inputs["mask"], -1)
        advantages = rloo_advantages(scores - case.settings["beta"] * kl.reshape(scores.shape), valid=valid)
    hold(case, advantages=advantages)
