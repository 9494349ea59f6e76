"""Our losses compared with Liger's, from hidden states to their gradient: log-probs are taken from hidden @ weight.

Liger computes its log-softmax in float32, ours run in float64: they differ by up to 6e-7 (sppo_hard), hence the
tolerance of 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from rlhf_core.losses.policy import POLICY_LOSSES, kl_loss, policy_loss
from rlhf_core.losses.preference import Completions, Pairs, preference_loss, unpaired_preference_loss
from rlhf_core.ops.logprobs import logits_logprobs
from tests.parity.golden import hold, leaf, read

LIGER = read("liger")
MAX_LENGTH = 9


def given(name: str) -> Tensor:
    tensor = LIGER.inputs[name]
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", LIGER.cases)
def test_liger(name):
    case = LIGER.cases[name]
    settings = dict(case.settings)
    hidden = leaf(given("hidden"))
    loss = LOSSES[settings.pop("loss")](token_logprobs(hidden, given("weight")), settings)
    loss.backward()
    hold(case, loss=loss, gradient=hidden.grad)


def token_logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    ids = given("ids")
    return logits_logprobs((hidden @ weight.T).flatten(0, 1), ids.flatten())[0].reshape(ids.shape)


def paired(name: str | list[str], logprobs: Tensor, reference: Tensor | None = None, **options: Any) -> Tensor:
    """The first half of the rows is chosen, the second rejected."""
    references = (None, None) if reference is None else reference.chunk(2)
    chosen, rejected = map(Completions, logprobs.chunk(2), given("mask").chunk(2), references)
    return preference_loss(name, Pairs(chosen, rejected), **options)[0]


def dpo(logprobs: Tensor, settings: dict[str, Any]) -> Tensor:
    if "discopop_tau" in settings:
        settings["tau"] = settings.pop("discopop_tau")
    reference = token_logprobs(given("ref_hidden"), given("ref_weight"))
    return paired(settings.pop("loss_type"), logprobs, reference, **settings)


def cpo(logprobs: Tensor, settings: dict[str, Any]) -> Tensor:
    return paired("cpo", logprobs, nll_coef=settings.pop("alpha"), **settings)


def simpo(logprobs: Tensor, settings: dict[str, Any]) -> Tensor:
    return paired(["simpo", "sft"], logprobs, loss_weights=[1.0, settings.pop("alpha")], **settings)


def orpo(logprobs: Tensor, settings: dict[str, Any]) -> Tensor:
    return paired("orpo", logprobs, **settings)


def kto(logprobs: Tensor, settings: dict[str, Any]) -> Tensor:
    reference = token_logprobs(given("ref_hidden"), given("ref_weight"))
    rows = dict(logprobs=logprobs, ref_logprobs=reference, mask=given("mask"), labels=given("labels"))
    return unpaired_preference_loss("kto", **rows, **settings)[0]


def grpo(logprobs: Tensor, settings: dict[str, Any]) -> Tensor:
    name, entry = settings["loss_type"], POLICY_LOSSES[settings["loss_type"]]
    options: dict[str, Any] = dict(clip=settings["epsilon_low"], clip_high=settings["epsilon_high"])
    if name == "cispo":
        options = dict(ratio_max=settings["epsilon_high"])
    elif name in ("sapo", "vespo"):
        options = {}
    level = settings.get("importance_sampling_level", "token")
    shared = dict(ratio_level=level, max_length=MAX_LENGTH if entry.aggregation == "max_length" else None)
    sampled, mask = given("logprobs"), given("mask")
    rows = dict(new_logprobs=logprobs, logprobs=sampled, advantages=given("advantages"), mask=mask)
    loss, _ = policy_loss(name, **rows, **options, **shared)
    if settings["beta"]:
        corrected = dict(logprobs=sampled) if settings.get("use_bias_correction_kl") else {}
        shared |= dict(estimator="k3", aggregation=entry.aggregation)
        loss = loss + settings["beta"] * kl_loss(logprobs, given("ref_logprobs"), mask, **corrected, **shared)[0]
    return loss


LOSSES = {"dpo": dpo, "cpo": cpo, "simpo": simpo, "orpo": orpo, "kto": kto, "grpo": grpo}

# Liger's default KL, whose gradient is that of the other direction.
pytestmark = pytest.mark.filterwarnings("ignore:KL estimator 'k3' as a loss")
