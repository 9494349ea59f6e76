"""TRL's trainers and their loop, with a callback that waits between its steps.

Settings: `job` (sft, reward, kto, grpo or rloo); `data`, a JSONL file; `config`, fields of the trainer's config; and
for kto `reference`, the folder of the reference model. Runs in an environment of `environment.trl_python`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import trl
from datasets import load_dataset
from rewards import share_of_spaces
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from turns import Turns

NAMES = {"sft": "SFT", "reward": "Reward", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}
FIXED: dict[str, Any] = dict(
    use_cpu=True,
    bf16=False,  # the default is True, also on the CPU; the other side is float32
    lr_scheduler_type="constant",
    train_sampling_strategy="sequential",  # the file has the other side's order
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


class Wait(TrainerCallback):
    """Make one optimizer step per request, from its first forward to its log line."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(self, args, state, control, **others) -> None:
        self.turns.begin()

    def on_log(self, args, state, control, logs, **others) -> None:
        if self.turns.taken < state.global_step:
            self.turns.end(**{name: value for name, value in logs.items() if isinstance(value, int | float)})


def main() -> None:
    turns = Turns()
    args = turns.args
    folder = Path(args.folder)
    name = NAMES[args.job]
    options: dict[str, Any] = {}
    if args.job == "reward":
        source, kind = folder / "reward_model", AutoModelForSequenceClassification
    else:
        source, kind = folder / "policy", AutoModelForCausalLM
    if args.job == "kto":
        options["ref_model"] = AutoModelForCausalLM.from_pretrained(args.reference, dtype=torch.float32)
    if args.job in ("grpo", "rloo"):
        options["reward_funcs"] = share_of_spaces
        FIXED.pop("train_sampling_strategy")  # these have their own sampler
        FIXED["shuffle_dataset"] = False
    shared = FIXED | dict(output_dir=args.output, max_steps=args.steps)
    trainer = getattr(trl, f"{name}Trainer")(
        model=kind.from_pretrained(source, dtype=torch.float32),
        args=getattr(trl, f"{name}Config")(**shared | args.config),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[Wait(turns)],
        **options,
    )
    if args.job == "sft":
        count_supervised(trainer, turns)
    trainer.train()


def count_supervised(trainer: Any, turns: Turns) -> None:
    """Add the number of supervised tokens of each step to its results, counted in its micro-batches."""
    compute_loss = trainer.compute_loss

    def counted(model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        turns.facts["tokens"] = turns.facts.get("tokens", 0) + int((inputs["labels"][:, 1:] != -100).sum())
        return compute_loss(model, inputs, *more, **options)

    trainer.compute_loss = counted


if __name__ == "__main__":
    main()
