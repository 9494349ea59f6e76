"""Liger's chunked losses, plain torch on the CPU: from hidden states and a head's weight to the loss, in chunks."""

from __future__ import annotations

from collections.abc import Callable

import tiny
import torch
from golden import Golden, installed, leaf
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from torch import Tensor

SEED = 7
LENGTHS = [1, 3, 5, 2, 4, 3, 1, 5]  # of pairs, the first half is chosen and the second rejected
LABELS = [True, False, False, True, True, False, True, False]
ADVANTAGES = [1.25, -0.75, 0.0, 0.5, -1.5, 0.375, -0.25, 2.0]
HIDDEN, VOCABULARY = 4, 7
MAX_LENGTH = 9

DPO = [
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
POLICY = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


def cases() -> list[dict]:
    """`loss` is the class, the rest by the names of its arguments; `kl` is KTO's, a number for the whole batch."""
    grid = []
    for name in DPO:
        smoothing = dict(label_smoothing=0.1) if name in ("exo_pair", "robust") else {}
        # At the default of 0.05 float32's rounding of a log-prob is worth twenty times as much.
        tau = dict(discopop_tau=0.5) if name == "discopop" else {}
        grid.append(dict(loss="dpo", loss_type=name, beta=0.7, **smoothing, **tau))
    grid += [
        dict(loss="cpo", beta=0.7, alpha=0.0),
        dict(loss="cpo", beta=0.7, alpha=0.5, label_smoothing=0.1),
        dict(loss="simpo", beta=2.0, gamma=0.5, alpha=0.0),
        dict(loss="simpo", beta=2.0, gamma=0.5, alpha=0.5, label_smoothing=0.1),
        dict(loss="orpo", beta=0.7),
        dict(loss="kto", beta=0.7, kl=0.0),
        dict(loss="kto", beta=0.7, kl=0.375),
    ]
    for name in POLICY:
        policy = dict(loss="grpo", loss_type=name, epsilon_low=0.2, epsilon_high=1.25 if name == "cispo" else 0.3)
        if name == "luspo":  # by token or with the KL, its mean is over padding too, against TRL and the paper
            grid.append(policy | dict(beta=0.0, importance_sampling_level="sequence"))
            continue
        grid += [policy | dict(beta=0.0), policy | dict(beta=0.1)]
        if name == "grpo":
            grid.append(policy | dict(beta=0.0, importance_sampling_level="sequence"))
            grid.append(policy | dict(beta=0.1, use_bias_correction_kl=True))
    return grid


def make() -> Golden:
    golden = Golden(installed("torch", "liger-kernel"), SEED, _inputs())
    for settings in cases():
        golden.add(settings, **_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    mask = tiny.ragged_mask(LENGTHS)
    hidden = tiny.draw(generator, *mask.shape, HIDDEN, low=-1.0, high=1.0)
    weight = tiny.draw(generator, VOCABULARY, HIDDEN, low=-1.0, high=1.0)
    return {
        "mask": mask,
        "ids": torch.randint(VOCABULARY, mask.shape, generator=generator),
        "hidden": hidden,
        "weight": weight,
        "ref_hidden": hidden + tiny.draw(generator, *mask.shape, HIDDEN, low=-0.5, high=0.5),
        "ref_weight": weight + tiny.draw(generator, VOCABULARY, HIDDEN, low=-0.25, high=0.25),
        "labels": torch.tensor(LABELS),
        "advantages": torch.tensor(ADVANTAGES).float(),
        # What the policies of the policy losses gave: near what hidden and weight give, so that ratios are near 1.
        "logprobs": -2.0 + tiny.draw(generator, *mask.shape, low=-0.5, high=0.5),
        "ref_logprobs": -2.0 + tiny.draw(generator, *mask.shape, low=-0.5, high=0.5),
    }


def _run(inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    hidden = leaf(inputs["hidden"], torch.float32)
    loss = RUN[settings["loss"]](inputs, hidden, {key: value for key, value in settings.items() if key != "loss"})
    loss.backward()
    return dict(loss=loss, gradient=hidden.grad)


def _targets(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["ids"].masked_fill(~inputs["mask"], -100)


def _reference(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(ref_input=inputs["ref_hidden"], ref_weight=inputs["ref_weight"])


def _dpo(inputs: dict[str, Tensor], hidden: Tensor, settings: dict) -> Tensor:
    criterion = LigerFusedLinearDPOLoss(compiled=False, **settings)
    return criterion(inputs["weight"], hidden, _targets(inputs), **_reference(inputs))[0]


def _reference_free(criterion: Callable) -> Callable:
    def run(inputs: dict[str, Tensor], hidden: Tensor, settings: dict) -> Tensor:
        return criterion(compiled=False, **settings)(inputs["weight"], hidden, _targets(inputs))[0]

    return run


def _kto(inputs: dict[str, Tensor], hidden: Tensor, settings: dict) -> Tensor:
    settings = dict(settings)
    kl = torch.tensor(settings.pop("kl"))
    criterion = LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True, **settings)
    weight, labels = inputs["weight"], inputs["labels"]
    return criterion(hidden, weight, _targets(inputs), preference_labels=labels, kl=kl, **_reference(inputs))[0]


def _grpo(inputs: dict[str, Tensor], hidden: Tensor, settings: dict) -> Tensor:
    criterion = LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=settings["beta"] != 0, max_completion_length=MAX_LENGTH, **settings
    )
    return criterion(
        hidden,
        inputs["weight"],
        inputs["ids"],
        inputs["mask"].long(),
        inputs["advantages"],
        old_per_token_logps=inputs["logprobs"],
        ref_per_token_logps=inputs["ref_logprobs"] if settings["beta"] else None,
    )[0]


RUN = {
    "dpo": _dpo,
    "cpo": _reference_free(LigerFusedLinearCPOLoss),
    "simpo": _reference_free(LigerFusedLinearSimPOLoss),
    "orpo": _reference_free(LigerFusedLinearORPOLoss),
    "kto": _kto,
    "grpo": _grpo,
}
