"""TRL's DPO step: its trainer, its tokenisation and collation, its `_compute_loss`.

The trainer is constructed as a user would do it, from text; `DPOTrainer.train` is not called, because it would add the
optimizer, which is left out on both sides. Runs in an environment of `environment.trl_python`.
"""

from __future__ import annotations

import argparse
import json

import torch
from child import TimedStep, serve
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def build(args: argparse.Namespace) -> TimedStep:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(args.folder / name, dtype=torch.float32)
        for name in ("policy", "reference")
    )
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "policy")
    pairs = json.loads((args.folder / "pairs.json").read_text())
    rows = args.folder / "rows.jsonl"  # the texts of real pairs; random pairs have token ids only
    texts = (
        [json.loads(line) for line in rows.open()] if rows.exists() else [as_text(pair, tokenizer) for pair in pairs]
    )
    config = DPOConfig(
        output_dir=str(args.folder / "trl_output"),
        beta=args.beta,
        use_cpu=True,
        bf16=False,  # the default is True, also on the CPU; the other side is float32
        max_length=None,  # the other side truncates nothing
        gradient_checkpointing=args.checkpointing,
        precompute_ref_log_probs=args.cached_reference,
        per_device_train_batch_size=len(pairs),
        report_to="none",
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    rows = [trainer.train_dataset[i] for i in range(len(pairs))]
    for row, pair in zip(rows, pairs, strict=True):
        if [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] != list(pair.values()):
            raise RuntimeError(
                "the token ids of TRL differ from those in pairs.json: the two sides would train on different data"
            )
    batch = trainer.data_collator(rows)

    policy.train()
    if args.checkpointing:  # `train` does this, not the constructor
        policy.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    if policy.is_gradient_checkpointing != args.checkpointing:
        raise RuntimeError(
            f"gradient checkpointing is {policy.is_gradient_checkpointing}, expected {args.checkpointing}"
        )

    def loss() -> torch.Tensor:
        return trainer._compute_loss(trainer.model, dict(batch), False)

    return TimedStep(policy, loss, positions=batch["input_ids"].numel(), models=[policy, reference])


def as_text(pair: dict[str, list[int]], tokenizer) -> dict[str, str]:
    """Return the ids as words, without the EOS, which TRL adds to each completion."""
    prompt, chosen, rejected = (
        " ".join(tokenizer.convert_ids_to_tokens(ids))
        for ids in (pair["prompt"], pair["chosen"][:-1], pair["rejected"][:-1])
    )
    return {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}


if __name__ == "__main__":
    serve(build)
