"""TRL's `CPOTrainer` (CPO, SimPO, AlphaPO, and hinge and IPO without a reference) and `ORPOTrainer`, on chosen logits.

These two trainers take their log-probs from the logits themselves, so logits are what is chosen and differentiated.
"""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset
from golden import Golden, installed, leaf
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

SEED = 3
CHOSEN, REJECTED = [1, 3, 5, 2], [4, 3, 1, 5]
VOCABULARY = 6


def cases() -> list[dict]:
    """`orpo` is the second trainer, every other `loss_type` and the rest by the names of the configs."""
    without = dict(cpo_alpha=0.0)  # which would add that much of the chosen completions' negative log-likelihood
    return [
        *(dict(loss_type="sigmoid", beta=beta, **without) for beta in (0.1, 0.7)),
        dict(loss_type="sigmoid", beta=0.7, label_smoothing=0.1, **without),
        *(dict(loss_type="sigmoid", beta=0.7, cpo_alpha=alpha) for alpha in (0.5, 1.0)),
        *(dict(loss_type="hinge", beta=beta, **without) for beta in (0.1, 0.7)),
        *(dict(loss_type="ipo", beta=beta, **without) for beta in (0.1, 0.7)),
        *(dict(loss_type="simpo", beta=2.0, simpo_gamma=gamma, **without) for gamma in (0.0, 0.5)),
        dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.1, **without),
        dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.5),
        *(dict(loss_type="alphapo", beta=2.0, simpo_gamma=0.5, alpha=alpha, **without) for alpha in (0.25, -0.5)),
        *(dict(loss_type="orpo", beta=beta) for beta in (0.1, 0.7)),
    ]


def make() -> Golden:
    golden = Golden(installed("torch", "transformers", "trl"), SEED, _inputs())
    for settings in cases():
        golden.add(settings, **_run(golden.inputs, settings))
    return golden


def _inputs() -> dict[str, Tensor]:
    generator, width = torch.Generator().manual_seed(SEED), max(CHOSEN + REJECTED)
    shape = (len(CHOSEN), width)
    inputs = {}
    for side, lengths in (("chosen", CHOSEN), ("rejected", REJECTED)):
        inputs |= {
            f"{side}_mask": tiny.ragged_mask(lengths, width),
            f"{side}_ids": torch.randint(VOCABULARY, shape, generator=generator),
            f"{side}_logits": tiny.draw(generator, *shape, VOCABULARY, low=-2.0, high=2.0),
        }
    return inputs


def _run(inputs: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """Prompts are one token long: ORPO's likelihood term covers the prompt, whose first token nothing predicts."""
    batch, ids = {}, []
    for side in ("chosen", "rejected"):
        mask = torch.nn.functional.pad(inputs[f"{side}_mask"], (1, 0), value=True)
        side_ids = torch.nn.functional.pad(inputs[f"{side}_ids"], (1, 0), value=0) * mask
        labels = side_ids.masked_fill(~mask, -100)
        labels[:, 0] = -100
        batch |= {f"{side}_input_ids": side_ids, f"{side}_attention_mask": mask.long(), f"{side}_labels": labels}
        ids.append(side_ids)
    logits = leaf(torch.cat([inputs["chosen_logits"], inputs["rejected_logits"]]))
    shifted = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # the last position predicts nothing
    trainer = _trainer(settings)
    trainer.pad_token_id = trainer.padding_value = 0
    loss, _ = trainer.get_batch_loss_metrics(tiny.StandIn((torch.cat(ids), dict(logits=shifted))), batch)
    loss.backward()
    chosen_gradient, rejected_gradient = logits.grad.chunk(2)
    return dict(loss=loss.double(), chosen_gradient=chosen_gradient, rejected_gradient=rejected_gradient)


def _trainer(settings: dict) -> CPOTrainer | ORPOTrainer:
    settings = dict(settings)
    if settings["loss_type"] == "orpo":
        settings.pop("loss_type")
        trainer, config = ORPOTrainer, ORPOConfig
    else:
        trainer, config = CPOTrainer, CPOConfig
    return trainer(
        model=tiny.causal_model(),
        args=config(max_length=16, **tiny.quiet(), **settings),
        train_dataset=Dataset.from_list([dict(prompt="a", chosen=" b", rejected=" c")]),
        processing_class=tiny.tokenizer(),
    )
