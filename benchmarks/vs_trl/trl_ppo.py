"""TRL 1.12's PPO: its trainer and its loop, with a callback that waits between its iterations."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from turns import Turns


class Wait(TrainerCallback):
    """Make one iteration per request."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.updates = turns, 0

    def on_train_begin(self, args, state, control, **others) -> None:
        self.turns.begin()

    def on_step_end(self, args, state, control, **others) -> None:
        row = state.log_history[-1]
        self.turns.end(score=row["objective/scores"], kl=row["objective/kl"], updates=self.updates)
        self.updates = 0
        if state.global_step < self.turns.args.steps:
            self.turns.begin()


def main() -> None:
    turns = Turns()
    args = turns.args
    folder = Path(args.folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32) for _ in range(2))
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(folder / name, num_labels=1, dtype=torch.float32)
        for name in ("reward_model", "reward_model")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    prompts = json.loads((folder / "prompts.json").read_text())
    data = Dataset.from_dict({"input_ids": prompts})
    waiting = Wait(turns)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=args.output,
            use_cpu=True,
            bf16=False,  # the default is True, also on the CPU; the other side is float32
            gradient_checkpointing=False,
            per_device_train_batch_size=args.prompts,
            gradient_accumulation_steps=1,  # with more, accelerate combines minibatches into one update
            num_mini_batches=args.minibatches,
            num_ppo_epochs=args.epochs,
            total_episodes=args.prompts * args.steps,
            response_length=args.tokens,
            stop_token="eos",
            temperature=1.0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[waiting],
    )
    step = trainer.optimizer.optimizer.step  # inside accelerate's wrapper, to count the updates that are made

    def counted(*arguments, **options):
        waiting.updates += 1
        return step(*arguments, **options)

    trainer.optimizer.optimizer.step = counted
    trainer.train()


if __name__ == "__main__":
    main()
