"""TRL's own trainers on a small file: the tokens they make of it, the loss of one batch of all rows, and its gradient.

Each trainer is built as its users build it, from `datasets`' reading of the file, and asked with its own collator. One
thing is put in the place of TRL's: its fused LM head sums in float32 even of a float64 model, so `ExactHead`, which
computes the same by its definition, stands in for it, after the two have been compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import material
import tiny
import torch
import trl.trainer.utils
from datasets import load_dataset
from golden import Golden, installed
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_dpo import LOSSES

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
}


def cases() -> list[dict[str, Any]]:
    """`trainer` and `rows`, a file of `material.rows`; the rest by the names of that trainer's config."""
    grid: list[dict[str, Any]] = [
        *(dict(trainer="sft", rows=rows) for rows in ("completions", "texts", "answers")),
        dict(trainer="sft", rows="conversations", assistant_only_loss=True),
        dict(trainer="sft", rows="completions", loss_type="dft"),
        *(dict(trainer="reward", rows=rows) for rows in ("pairs", "spoken", "margins")),
        dict(trainer="reward", rows="pairs", center_rewards_coefficient=0.05),
    ]
    for loss in LOSSES:
        more = dict(label_smoothing=0.1) if loss in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
        grid.append(dict(trainer="dpo", rows="pairs", loss_type=[loss], beta=0.3, **more))
    mix = dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    grid += [
        dict(trainer="dpo", rows="spoken", loss_type=["sigmoid"], beta=0.3),
        dict(trainer="dpo", rows="pairs", beta=0.3, **mix),
        dict(trainer="dpo", rows="pairs", loss_type=["sigmoid"], beta=0.3, ld_alpha=0.5),
        dict(trainer="dpo", rows="pairs", loss_type=["sigmoid"], beta=0.3, use_weighting=True),
        dict(trainer="kto", rows="labelled", loss_type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7),
        dict(trainer="kto", rows="labelled", loss_type="apo_zero_unpaired", beta=0.3),
        dict(trainer="orpo", rows="unprompted", beta=0.3),
        dict(trainer="cpo", rows="pairs", loss_type="sigmoid", beta=0.3, cpo_alpha=1.0),
        *(dict(trainer="cpo", rows="pairs", loss_type=loss, beta=0.3, cpo_alpha=0.0) for loss in ("hinge", "ipo")),
        dict(trainer="cpo", rows="pairs", loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0),
        dict(trainer="cpo", rows="pairs", loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.5),
        dict(trainer="cpo", rows="pairs", loss_type="alphapo", beta=2.0, simpo_gamma=0.5, alpha=0.25, cpo_alpha=0.0),
        dict(trainer="cpo", rows="spoken", loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0),
    ]  # fmt: skip
    return grid


def make() -> Golden:
    torch.set_num_threads(1)  # so that sums are added up in one order
    golden = Golden(installed("torch", "transformers", "trl"), 0, {})
    for settings in cases():
        tokens, results = run(settings)
        _, fused = run(settings, exact=False)
        torch.testing.assert_close(fused["loss"], results["loss"], rtol=1e-5, atol=0, msg=f"{settings}: the fused head")
        golden.inputs |= {f"{settings['trainer']}.{settings['rows']}.{name}": ids for name, ids in tokens.items()}
        golden.add(settings, **results)
    return golden


def run(settings: dict[str, Any], *, exact: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tokens, and loss and gradient."""
    settings = dict(settings)
    name, rows = settings.pop("trainer"), settings.pop("rows")
    trainer = build(name, rows, settings, exact=exact)
    trainer.model.train()
    examples = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(examples)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert settings.get("loss_type") != "kto" or trainer._metrics["train"]["kl"][-1] > 0, "nothing is held to the KL"
    return tokens_of(name, examples), dict(loss=loss.double(), gradient=material.fingerprint(trainer.model))


def build(name: str, rows: str, settings: dict[str, Any], *, exact: bool, tokenizer: Any = None) -> Any:
    """The trainer over all rows of the file. Its fused head is made with the model, so it is exchanged before."""
    kind, config = TRAINERS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = material.write_rows(Path(folder), rows)
        data = load_dataset(
            "json", data_files=str(path), split="train", cache_dir=f"{folder}/cache", keep_in_memory=True
        )
        count = len(data)
        models = dict(model=material.reward_model() if name == "reward" else material.policy())
        if name in ("dpo", "kto"):
            models["ref_model"] = material.reference() if name == "dpo" else material.lower_reference()
        longest = dict(max_length=512) if name in ("cpo", "orpo") else dict(max_length=None)
        args = config(**tiny.quiet(), per_device_train_batch_size=count, **longest, **settings)
        trl.trainer.utils._ChunkedLogProbFunction = ExactHead if exact else FUSED
        return kind(**models, args=args, train_dataset=data, processing_class=tokenizer or material.tokenizer())


def tokens_of(name: str, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Token ids, and with them which are learned, a row each, -1 where there is none."""
    if name == "sft":
        return {
            "ids": padded([row["input_ids"] for row in examples]),
            "labels": padded([row["labels"] for row in examples]),
        }
    if name == "reward":
        return {side: padded([row[f"{side}_ids"] for row in examples]) for side in ("chosen", "rejected")}
    if name == "dpo":
        return {side: padded([row[f"{side}_ids"] for row in examples]) for side in ("prompt", "chosen", "rejected")}
    if name == "kto":
        sides = ("prompt", "completion", "KL_completion")
        return {
            side: padded([row[f"{side}_ids"] for row in examples]) for side in sides if f"{side}_ids" in examples[0]
        }
    return {
        f"{side}_{what}": padded([row[f"{side}_{what}"] for row in examples])
        for side in ("chosen", "rejected")
        for what in ("input_ids", "labels")
    }


def padded(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int16)


FUSED = trl.trainer.utils._ChunkedLogProbFunction


class ExactHead:
    """What TRL's fused head computes, in the model's own precision and with torch's own gradient."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        assert softcap is None
        logits = scale * torch.nn.functional.linear(hidden, weight, bias)
        logprobs = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            agreement, mean, top = (2 * logprobs).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == labels
        return logprobs.gather(-1, labels[:, None]).squeeze(-1), entropy, agreement, mean, top
