"""Our preference and reward losses compared with TRL's, in value and in every token's gradient.

Ours run in float64, and so does TRL where its code allows it: then both agree to 1e-14. TRL computes the
alpha-divergence and ORPO in float32 (differences of up to 5e-7 and 4e-8), hence the tolerance of 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.losses.preference import (
    Completions,
    Pairs,
    kto_kl,
    preference_loss,
    unpaired_preference_loss,
    wpo_weights,
)
from rlhf_core.losses.reward import bradley_terry_loss
from rlhf_core.ops.logprobs import logits_logprobs
from tests.parity.golden import hold, leaf, read

DPO, KTO = read("trl_dpo"), read("trl_kto")
REFERENCE_FREE, REWARD = read("trl_reference_free"), read("trl_reward")

DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}


@pytest.mark.parametrize("name", DPO.cases)
def test_dpo(name):
    case, inputs = DPO.cases[name], DPO.inputs
    chosen, rejected = (leaf(inputs[f"{side}_logprobs"]) for side in ("chosen", "rejected"))
    pairs = Pairs(
        Completions(chosen, inputs["chosen_mask"], inputs["ref_chosen_logprobs"].double()),
        Completions(rejected, inputs["rejected_mask"], inputs["ref_rejected_logprobs"].double()),
        weights=pair_weights() if case.settings.get("use_weighting") else None,
    )
    loss, _ = preference_loss(case.settings["loss_type"], pairs, **dpo_options(case.settings))
    loss.backward()
    # The losses without a term on the rejected side leave no gradient there at all.
    rejected_gradient = torch.zeros_like(rejected) if rejected.grad is None else rejected.grad
    hold(case, loss=loss, chosen_gradient=chosen.grad, rejected_gradient=rejected_gradient)


def dpo_options(settings: dict[str, Any]) -> dict[str, Any]:
    """From `DPOConfig`'s names to ours."""
    names = ("beta", "label_smoothing", "loss_weights", "ld_alpha")
    options = {key: value for key, value in settings.items() if key in names}
    if "discopop_tau" in settings:
        options["tau"] = settings["discopop_tau"]
    # TRL accepts a divergence for sft alone, where it changes nothing; for ours it is an error.
    if "f_divergence_type" in settings and settings["loss_type"] != ["sft"]:
        options["f_divergence"] = DIVERGENCES[settings["f_divergence_type"]]
        options["f_alpha"] = settings.get("f_alpha_divergence_coef", 0.5)
    return options


def pair_weights() -> Tensor:
    """WPO's: the product of the weights of both sides."""
    return torch.stack([weights_of("chosen"), weights_of("rejected")]).prod(0)


def weights_of(side: str) -> Tensor:
    names = (f"{side}_logprobs", f"{side}_log_sum_sq_probs")
    return wpo_weights(*(DPO.inputs[name].double() for name in names), DPO.inputs[f"{side}_mask"])


@pytest.mark.parametrize("name", KTO.cases)
def test_kto(name):
    case, inputs = KTO.cases[name], KTO.inputs
    settings = dict(case.settings)
    labels = inputs[f"labels_{settings.pop('labels')}"]
    kl_reference = inputs[f"kl_ref_logprobs_{settings.pop('kl')}"].double()
    logprobs = leaf(inputs["logprobs"])
    loss_type = settings.pop("loss_type")
    kl = torch.zeros(())  # apo_zero_unpaired has none
    if loss_type == "kto":
        kl = kto_kl(inputs["kl_logprobs"].double(), kl_reference, inputs["kl_mask"])
    loss, _ = unpaired_preference_loss(
        loss_type,
        logprobs=logprobs,
        mask=inputs["mask"],
        labels=labels,
        ref_logprobs=inputs["ref_logprobs"].double(),
        kl=kl,
        **settings,
    )
    loss.backward()
    hold(case, loss=loss, kl=kl, gradient=logprobs.grad)


@pytest.mark.parametrize("name", REFERENCE_FREE.cases)
def test_cpo_simpo_alphapo_orpo(name):
    case, inputs = REFERENCE_FREE.cases[name], REFERENCE_FREE.inputs
    logits = {side: leaf(inputs[f"{side}_logits"]) for side in ("chosen", "rejected")}
    logprobs = {}
    for side, values in logits.items():
        ids = inputs[f"{side}_ids"]
        logprobs[side] = logits_logprobs(values.flatten(0, 1), ids.flatten())[0].reshape(ids.shape)
    names, options = reference_free_options(case.settings)
    chosen, rejected = (Completions(logprobs[side], inputs[f"{side}_mask"]) for side in ("chosen", "rejected"))
    loss, _ = preference_loss(names, Pairs(chosen, rejected), **options)
    loss.backward()
    hold(case, loss=loss, chosen_gradient=logits["chosen"].grad, rejected_gradient=logits["rejected"].grad)


def reference_free_options(settings: dict[str, Any]) -> tuple[str | list[str], dict[str, Any]]:
    """From `CPOConfig`'s and `ORPOConfig`'s names to ours."""
    names = {"beta": "beta", "label_smoothing": "label_smoothing", "simpo_gamma": "gamma", "alpha": "reward_alpha"}
    options = {names[key]: value for key, value in settings.items() if key in names}
    loss, nll_coef = settings["loss_type"], settings.get("cpo_alpha")
    if loss == "sigmoid":
        return "cpo", options | dict(nll_coef=nll_coef)
    if loss in ("hinge", "ipo"):
        return loss, options | dict(reference_free=True)
    if nll_coef:
        return [loss, "sft"], options | dict(loss_weights=[1.0, nll_coef])
    return loss, options


@pytest.mark.parametrize("name", REWARD.cases)
def test_reward(name):
    case, inputs = REWARD.cases[name], REWARD.inputs
    chosen, rejected = (leaf(inputs[f"{side}_scores"]) for side in ("chosen", "rejected"))
    loss, _ = bradley_terry_loss(
        chosen,
        rejected,
        margin=inputs["margin"].double() if case.settings["margin"] else 0.0,
        center_coef=case.settings["center_rewards_coefficient"] or 0.0,
    )
    loss.backward()
    hold(case, loss=loss, chosen_gradient=chosen.grad, rejected_gradient=rejected.grad)
