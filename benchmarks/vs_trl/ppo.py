"""One PPO iteration: rlhf_core against TRL 1.12.0, the last that had PPO, on the CPU, in one run.

    python benchmarks/vs_trl/ppo.py [--model stories|wide] [--steps 3] [--quick]

An iteration consists of rollout, scores, log-probs of policy and reference, values, and the updates of all epochs. Both
sides run their own trainer with the same weights, prompts, completion length, epochs and minibatches, in float32, each
in its own process, in turns; the first iteration of each is a warm-up. Ours is run with a value head on the policy's
trunk and with a critic that has its own trunk, as TRL's has. Each side samples its own completions, so their tokens
differ; the number of updates is checked, and scores and KL are shown.

Run it from the project's environment; TRL has its own (environment.py). `stories` needs the shared data (RLHF_SHARED,
or `shared` beside the checkout); `wide` is a random Llama of 20M parameters, vocabulary 32,000.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path

from material import SPECIAL_TOKENS, VOCABULARY, copy_stories, make_material, make_reward_model, real_rows
from processes import Entry, benchmark_parser, report, run_in_turns


def main() -> None:
    parser = benchmark_parser(__doc__, steps=3, trl="1.12.0")
    parser.add_argument("--model", choices=["stories", "wide"], default="stories")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per rollout")
    parser.add_argument("--tokens", type=int, default=64, help="largest number of tokens of a completion")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.prompts, args.tokens, args.epochs, args.minibatches = 1, 8, 16, 2, 2
    if args.steps < 1 or args.prompts % args.minibatches:
        parser.error("--steps must be 1 or more, and --prompts a multiple of --minibatches")

    updates = args.epochs * args.minibatches

    def check(title: str, step: int, turn: dict) -> None:
        made = updates - turn["skipped"] if "skipped" in turn else turn["updates"]
        if made != updates:
            raise SystemExit(f"{title}: {made} updates in iteration {step}, not {updates}")

    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name:
        folder = Path(name)
        make_folder(folder, args)
        turns = run_in_turns(entries(folder, args), folder, args, check=check)
    columns = {
        key: lambda taken, key=key: f"{statistics.mean(turn[key] for turn in taken):.3f}" for key in ("score", "kl")
    }
    report("PPO iteration", turns, args, ours=["ours, shared trunk", "ours, own trunk"], more=columns)


def entries(folder: Path, args: argparse.Namespace) -> list[Entry]:
    config = dict(
        model=str(folder / "policy"),
        reward_model=str(folder / "reward_model"),
        data=str(folder / "prompts.jsonl"),
        batch_size=args.prompts,
        minibatch_size=args.prompts // args.minibatches,
        rollout_epochs=args.epochs,
        kl=dict(target=None),
        sampling=dict(max_new_tokens=args.tokens),
        optim=dict(lr=1e-6, schedule="constant"),
    )
    numbers = {name: getattr(args, name) for name in ("prompts", "tokens", "epochs", "minibatches")}
    return [
        Entry("ours, shared trunk", "ours_train.py", dict(job="ppo", config=config | dict(value=dict(model="head")))),
        Entry("ours, own trunk", "ours_train.py", dict(job="ppo", config=config | dict(value=dict(model="policy")))),
        Entry("TRL", "trl_ppo.py", numbers),
    ]


def make_folder(folder: Path, args: argparse.Namespace) -> None:
    """Write policy, reward model, and the prompts as texts (for ours) and as token ids (for TRL)."""
    from rlhf_core.config import DataConfig
    from rlhf_core.data.loader import load_examples
    from rlhf_core.models.load import load_policy

    rng = random.Random(0)
    if args.model == "stories":
        copy_stories(folder)
        texts = [row["prompt"][:120] for row in real_rows("prompts_tinystories_train")[: args.prompts]]
    else:
        make_material(folder, "deep", [], 0)
        shutil.rmtree(folder / "policy")
        (folder / "reference").rename(folder / "policy")
        words = [f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY)]
        texts = [" ".join(rng.choices(words, k=rng.randint(16, 48))) for _ in range(args.prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    make_reward_model(folder)
    policy, tokenizer = load_policy(folder / "policy", device="cpu")
    examples = load_examples(DataConfig(path=folder / "prompts.jsonl"), tokenizer, need="prompts", model=policy)
    (folder / "prompts.json").write_text(json.dumps([example.prompt for example in examples]))


if __name__ == "__main__":
    main()
