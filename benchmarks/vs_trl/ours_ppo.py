"""rlhf_core's PPO: `train` as a user calls it, with a wait between its iterations."""

from __future__ import annotations

import json
from collections.abc import Iterator

from turns import Turns

from rlhf_core.config import OptimConfig, SamplingConfig
from rlhf_core.trainers import ppo


def main() -> None:
    turns = Turns()
    args = turns.args
    own_steps = ppo.Run.steps

    def steps(run: ppo.Run) -> Iterator[int]:
        for step in own_steps(run):
            turns.begin()
            yield step
            row = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
            turns.end(score=row["score"], kl=row["kl"], updates=args.epochs * args.minibatches - row["skipped"])

    ppo.Run.steps = steps
    ppo.train(
        ppo.PPOConfig(
            model=args.folder / "policy",
            reward_model=args.folder / "reward_model",
            data=args.folder / "prompts.jsonl",
            output=args.output,
            value=args.value,
            batch_size=args.prompts,
            minibatch_size=args.prompts // args.minibatches,
            ppo_epochs=args.epochs,
            max_steps=args.iterations,
            epochs=args.iterations,
            kl_target=None,
            sampling=SamplingConfig(max_new_tokens=args.tokens),
            optim=OptimConfig(lr=1e-6, schedule="constant"),
            device="cpu",
            progress=False,
        )
    )


if __name__ == "__main__":
    main()
