"""TRL's `DPOTrainer._compute_loss`: its fifteen losses and what can be combined with them, on chosen log-probs."""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset
from golden import Golden, case_name, installed, leaf
from torch import Tensor
from trl import DPOConfig, DPOTrainer

SEED = 5
CHOSEN, REJECTED = [1, 3, 5, 7, 2], [1, 6, 5, 2, 4]  # completion tokens; equal and unequal within a pair
PROMPTS = [1, 2, 3, 1, 2]

LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"]
LOSSES += ["aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
DIVERGENCES = [
    dict(f_divergence_type="forward_kl"),
    dict(f_divergence_type="js_divergence"),
    *(dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coef) for coef in (0.5, 1.0, 1.5)),
]
WITH_DIVERGENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


def cases() -> list[dict]:
    """The grid, each case by the names of `DPOConfig`."""
    grid = []
    for loss in LOSSES:
        plain = dict(loss_type=[loss], beta=0.1)
        if loss == "exo_pair":  # TRL refuses 0 there
            plain["label_smoothing"] = 0.1
        grid += [plain, plain | dict(beta=0.7)]
        if loss in ("robust", "aot", "aot_unpaired"):
            plain = plain | dict(label_smoothing=0.1)
            grid.append(plain)
        if "label_smoothing" in plain:
            grid.append(plain | dict(label_smoothing=0.3))
        if loss in WITH_DIVERGENCE:
            grid += [plain | dict(beta=0.7) | divergence for divergence in DIVERGENCES]
        if loss != "sft":  # which TRL takes from all tokens, whatever ld_alpha is
            grid.append(plain | dict(beta=0.7, ld_alpha=0.3))
        grid.append(plain | dict(beta=0.7, use_weighting=True))
    grid.append(dict(loss_type=["discopop"], beta=0.7, discopop_tau=0.5))
    mix = dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.1)
    grid += [mix, dict(loss_type=["sigmoid", "sft"], beta=0.1), mix | dict(beta=0.7, ld_alpha=0.3)]
    grid.append(dict(loss_type=["exo_pair", "sft"], beta=0.1, label_smoothing=0.1))
    grid.append(dict(loss_type=["hinge", "sft"], loss_weights=[1.0, 0.5], beta=0.7, **DIVERGENCES[0]))
    grid.append(dict(loss_type=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], beta=0.7, use_weighting=True))
    return grid


# TRL's constructor refuses the aot losses, which sort, so that a pair's weight would go to another. The other two
# crash, because the weight is multiplied in place.
WITHOUT_WEIGHTING = ["aot", "aot_unpaired", "hinge", "sft"]


def make() -> Golden:
    golden = Golden(installed("torch", "transformers", "trl"), SEED, _inputs())
    for settings in cases():
        if settings.get("use_weighting") and settings["loss_type"][0] in WITHOUT_WEIGHTING:
            golden.absent[case_name(settings)] = _refusal(golden.inputs, settings)
        else:
            golden.add(settings, **_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    """Log-ratios of up to 1 a token either way, so that hinge and the divergences see both their sides."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = {}
    for side, lengths in (("chosen", CHOSEN), ("rejected", REJECTED)):
        mask = tiny.ragged_mask(lengths, max(CHOSEN + REJECTED))
        logprobs = tiny.draw(generator, *mask.shape, low=-4.0, high=-1.25)
        log_ratios = tiny.draw(generator, *mask.shape, low=-1.0, high=1.0)
        inputs |= {
            f"{side}_mask": mask,
            f"{side}_logprobs": torch.where(mask, logprobs, 0.0),
            f"ref_{side}_logprobs": torch.where(mask, logprobs - log_ratios, 0.0),
            f"{side}_log_sum_sq_probs": torch.where(mask, tiny.draw(generator, *mask.shape, low=-3.0, high=-0.5), 0.0),
        }
    return inputs


def _run(inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    # Its table of clamps for the alpha-divergence has no row for float64.
    dtype = torch.float32 if settings.get("f_divergence_type") == "alpha_divergence" else torch.float64
    layout = tiny.Layout(PROMPTS * 2, torch.cat([inputs["chosen_mask"], inputs["rejected_mask"]]))

    def stacked(name: str) -> Tensor:
        return torch.cat([inputs[name.format("chosen")], inputs[name.format("rejected")]]).to(dtype)

    logprobs = leaf(stacked("{}_logprobs"), dtype)
    policy = dict(
        log_probs=layout.place(logprobs),
        log_sum_sq_probs=layout.place(stacked("{}_log_sum_sq_probs")),
        entropy=layout.place(torch.ones(logprobs.shape)),
        mean_logits=layout.place(torch.ones(logprobs.shape)),
        is_top1=layout.place(torch.ones(logprobs.shape)).bool(),
    )
    reference = dict(log_probs=layout.place(stacked("ref_{}_logprobs")))
    trainer = _trainer(settings)
    trainer.model.train()
    trainer.ref_model = tiny.StandIn((layout.input_ids, reference))
    batch = {name: getattr(layout, name) for name in ("input_ids", "attention_mask", "completion_mask")}
    loss = trainer._compute_loss(tiny.StandIn((layout.input_ids, policy)), batch, False)
    loss.backward()
    chosen_gradient, rejected_gradient = logprobs.grad.double().chunk(2)
    return dict(loss=loss.double(), chosen_gradient=chosen_gradient, rejected_gradient=rejected_gradient)


def _refusal(inputs: dict[str, Tensor], settings: dict) -> str:
    """What TRL says; an error here if it has come to work."""
    try:
        _run(inputs, settings)
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise AssertionError(f"{case_name(settings)} works now: take it out of WITHOUT_WEIGHTING")


def _trainer(settings: dict) -> DPOTrainer:
    return DPOTrainer(
        model=tiny.causal_model(),
        ref_model=tiny.causal_model(),
        args=DPOConfig(**tiny.quiet(), **settings),
        train_dataset=Dataset.from_list([dict(prompt="a", chosen=" b", rejected=" c")]),
        processing_class=tiny.tokenizer(),
    )
