"""TRL's `KTOTrainer._compute_loss`: its two losses on chosen log-probs, the KL estimate included."""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset
from golden import Golden, installed, leaf
from torch import Tensor
from trl import KTOConfig, KTOTrainer

SEED = 6
LENGTHS, PROMPTS = [1, 3, 5, 7, 2, 4], [1, 2, 3, 1, 2, 1]
KL_LENGTHS = [4, 1, 3, 5, 7, 2]  # the completions turned by one: each prompt with another's
LABELS = {
    "both": [True, False, False, True, True, False],
    "desirable": [True] * len(LENGTHS),
    "undesirable": [False] * len(LENGTHS),
}
WEIGHTS = dict(desirable_weight=1.3, undesirable_weight=0.7)


def cases() -> list[dict]:
    """By the names of `KTOConfig`, and two of the batch: `labels`, and `kl`, the estimate's sign before its clamp."""
    grid = []
    for loss in ("kto", "apo_zero_unpaired"):
        for labels in LABELS:
            for kl in ("positive", "negative") if loss == "kto" else ("positive",):
                grid.append(dict(loss_type=loss, beta=0.1, labels=labels, kl=kl, **WEIGHTS))
        grid.append(dict(loss_type=loss, beta=0.7, labels="both", kl="positive"))
    return grid


def make() -> Golden:
    golden = Golden(installed("torch", "transformers", "trl"), SEED, _inputs())
    for settings in cases():
        golden.add(settings, **_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    mask, kl_mask = tiny.ragged_mask(LENGTHS), tiny.ragged_mask(KL_LENGTHS)
    logprobs = tiny.draw(generator, *mask.shape, low=-4.0, high=-1.25)
    log_ratios = tiny.draw(generator, *mask.shape, low=-1.0, high=1.0)
    kl_logprobs = tiny.draw(generator, *mask.shape, low=-4.0, high=-1.25)
    kl_log_ratios = tiny.draw(generator, *mask.shape, low=-0.5, high=1.0)
    return {
        **{f"labels_{name}": torch.tensor(labels) for name, labels in LABELS.items()},
        "mask": mask,
        "logprobs": torch.where(mask, logprobs, 0.0),
        "ref_logprobs": torch.where(mask, logprobs - log_ratios, 0.0),
        "kl_mask": kl_mask,
        "kl_logprobs": torch.where(kl_mask, kl_logprobs, 0.0),
        "kl_ref_logprobs_positive": torch.where(kl_mask, kl_logprobs - kl_log_ratios, 0.0),
        "kl_ref_logprobs_negative": torch.where(kl_mask, kl_logprobs + kl_log_ratios, 0.0),
    }


def _run(inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    settings = dict(settings)
    labels, sign = inputs[f"labels_{settings.pop('labels')}"], settings.pop("kl")
    matched, mismatched = tiny.Layout(PROMPTS, inputs["mask"]), tiny.Layout(PROMPTS, inputs["kl_mask"])
    logprobs = leaf(inputs["logprobs"])
    unused = {name: matched.place(torch.ones(logprobs.shape)) for name in ("entropy", "mean_logits", "is_top1")}
    policy = dict(log_probs=matched.place(logprobs), **unused)
    reference = dict(log_probs=matched.place(inputs["ref_logprobs"].double()))
    kl_policy = dict(log_probs=mismatched.place(inputs["kl_logprobs"].double()))
    kl_reference = dict(log_probs=mismatched.place(inputs[f"kl_ref_logprobs_{sign}"].double()))

    trainer = KTOTrainer(
        model=tiny.causal_model(),
        ref_model=tiny.causal_model(),
        args=KTOConfig(per_device_train_batch_size=2, **tiny.quiet(), **settings),
        train_dataset=Dataset.from_list([dict(prompt="a", completion=" b", label=label) for label in (True, False)]),
        processing_class=tiny.tokenizer(),
    )
    trainer.model.train()
    trainer.ref_model = tiny.StandIn((matched.input_ids, reference), (mismatched.input_ids, kl_reference))
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = {name: getattr(matched, name) for name in names}
    batch |= {f"KL_{name}": getattr(mismatched, name) for name in names}
    model = tiny.StandIn((matched.input_ids, policy), (mismatched.input_ids, kl_policy))
    loss = trainer._compute_loss(model, batch | dict(label=labels), False)
    loss.backward()
    kl = torch.tensor(trainer._metrics["train"]["kl"][-1], dtype=torch.float64)
    return dict(loss=loss, kl=kl, gradient=logprobs.grad)
