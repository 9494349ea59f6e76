"""What TRL's trainers do where they are at fault, on the same files as in `trl_paths`; ours is held to what is right.

Each case is one number of TRL's, a loss. It is there to be told from the right one: should TRL come to be right, the
tests say so. What is no number at all, an infinite loss or a crash, is among the absent, with what TRL says.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import material
import tiny
import torch
import trl.trainer.utils
import trl_paths
from datasets import load_dataset
from golden import Golden, case_name, installed
from torch import Tensor
from trl import DPOConfig, DPOTrainer

SMOOTHING = 0.3
FAR = (dict(loss_type=["sigmoid"], f_divergence_type="forward_kl"), dict(loss_type=["discopop"]))


def make() -> Golden:
    torch.set_num_threads(1)  # so that sums are added up in one order
    golden = Golden(installed("torch", "transformers", "trl"), 0, {})
    trl.trainer.utils._ChunkedLogProbFunction = trl_paths.ExactHead
    for resumed, loss in zip((False, True), synced_reference(), strict=True):
        golden.add(dict(fault="synced reference", resumed=resumed), loss=loss)
    for cached, loss in zip((False, True), cached_reference(), strict=True):
        golden.add(dict(fault="cached reference", cached=cached), loss=loss)
    for smoothing in (0.0, SMOOTHING):
        settings = dict(loss_type=["sigmoid"], beta=0.3, label_smoothing=smoothing)
        golden.add(dict(fault="label smoothing", label_smoothing=smoothing), loss=loss_of("dpo", "pairs", settings))
    same = material.tokenizer(pad_token="<|end|>")
    golden.add(dict(fault="pad is end"), loss=loss_of("reward", "pairs", {}, tokenizer=same))
    golden.add(dict(fault="prompt is learned"), loss=loss_of("orpo", "pairs", dict(beta=0.3)))
    tokens, results = trl_paths.run(dict(trainer="sft", rows="bridged"))
    golden.inputs |= {f"bridged.{name}": ids for name, ids in tokens.items()}
    golden.add(dict(fault="bridged border"), loss=results["loss"])
    for settings in FAR:
        loss = loss_of("dpo", "pairs", settings | dict(beta=0.3), far=True)
        assert not math.isfinite(loss), f"{settings} is finite now: take it out of FAR"
        golden.absent[case_name(settings)] = f"the loss is {loss.item()}"
    return golden


def loss_of(name: str, rows: str, settings: dict[str, Any], *, far: bool = False, tokenizer: Any = None) -> Tensor:
    """Of all rows, as `trl_paths` has it; `far` from the reference, hundreds of nats a completion."""
    trainer = trl_paths.build(name, rows, settings, exact=True, tokenizer=tokenizer)
    if far:
        material.move_far(trainer.model)
    return batch_loss(trainer)


def batch_loss(trainer: Any) -> Tensor:
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    return trainer.compute_loss(trainer.model, dict(batch)).detach().double()


def synced_reference() -> tuple[Tensor, Tensor]:
    """TR-DPO's loss in step 4, of a run that went through and of one resumed after step 3: 0.5 (a).

    The reference is made equal to the policy after step 2; the resumed run begins with the one from the start.
    """
    with material_on_disk() as folder:
        steps = dict(max_steps=5, save_strategy="steps", save_steps=3, logging_steps=1, lr_scheduler_type="constant")
        sync = dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
        quiet = tiny.quiet() | dict(output_dir=f"{folder}/out")
        args = DPOConfig(**quiet, **steps, **sync, beta=0.3, learning_rate=0.01, per_device_train_batch_size=6)
        losses = []
        for checkpoint in (None, f"{folder}/out/checkpoint-3"):
            trainer = dpo_trainer(folder, args)
            trainer.train(resume_from_checkpoint=checkpoint)
            losses.append(torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line][3]))
    return tuple(losses)


def cached_reference() -> tuple[Tensor, Tensor]:
    """The loss with ld_alpha=0.5 of a policy that is its own reference: without a cache, and with one that an earlier
    run without ld_alpha has left: 0.5 (b)."""
    losses = []
    for earlier in ((), (None,)):
        with material_on_disk() as folder:
            for ld_alpha in (*earlier, 0.5):
                options = dict(precompute_ref_log_probs=True, max_length=None, ld_alpha=ld_alpha, beta=0.3)
                args = DPOConfig(**tiny.quiet(), **options, per_device_train_batch_size=6)
                trainer = dpo_trainer(folder, args)
                trainer.get_train_dataloader()  # fills the cache
            losses.append(batch_loss(trainer))
    return tuple(losses)


@contextlib.contextmanager
def material_on_disk() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        material.save(material.policy(), Path(folder) / "policy")
        material.write_rows(Path(folder), "pairs")
        yield folder


def dpo_trainer(folder: str, args: DPOConfig) -> DPOTrainer:
    """From files, so that what `datasets` keeps on disk is found again."""
    data = load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train", cache_dir=f"{folder}/cache")
    models = dict(model=material.policy(), ref_model=material.policy())
    return DPOTrainer(**models, args=args, train_dataset=data, processing_class=material.tokenizer())
