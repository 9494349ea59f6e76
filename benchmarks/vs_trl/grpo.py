"""A GRPO or RLOO step, rollout included: rlhf_core against TRL on the CPU, same weights and prompts, in one run.

    python benchmarks/vs_trl/grpo.py [--job grpo|rloo] [--model real|stories] [--steps 3] [--quick]

A step is a whole rollout: completions of every prompt, scores, log-probs of the reference, and one update. Both sides
run the loop of their own trainer. `real` has prompts of HH and a random Llama of 30M parameters with GPT-2's
vocabulary, which almost never ends a completion; `stories` has the trained stories260K with its own prompts. Each side
samples its own completions; their mean length is shown. The reward takes no time (rewards.py).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from material import copy_stories, hh_pairs, make_real_model, real_rows, write_rows
from processes import Entry, benchmark_parser, report, run_in_turns


def main() -> None:
    parser = benchmark_parser(__doc__, steps=3)
    parser.add_argument("--job", choices=["grpo", "rloo"], default="grpo")
    parser.add_argument("--model", choices=["real", "stories"], default="real")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--completions", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=64, help="largest number of tokens of a completion")
    args = parser.parse_args()
    longest = 512  # tokens of the pair that has the prompt
    if args.quick:
        args.steps, args.prompts, args.completions, args.tokens, longest = 1, 2, 4, 8, 96
    count = args.prompts * (args.steps + 1)
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name:
        folder = Path(name)
        if args.model == "stories":
            copy_stories(folder)
            prompts = [row["prompt"][:120] for row in real_rows("prompts_tinystories_train")[:count]]
        else:
            make_real_model(folder)
            prompts = [pair["prompt"] for pair in hh_pairs(count, longest=longest)]
        write_rows(folder, [dict(prompt=prompt) for prompt in prompts], args.prompts)
        turns = run_in_turns(entries(folder, args), folder, args)
    more = {"tokens": lambda taken: f"{statistics.mean(tokens(turn) for turn in taken):.1f}"}
    ours = [title for title in turns if title.startswith("ours")]
    report(f"{args.job.upper()} step, rollout included", turns, args, ours=ours, more=more)
    print("tokens: the mean length of a completion")


def tokens(turn: dict) -> float:
    """Return the mean length of a step's completions."""
    return turn["length"] if "length" in turn else turn["completions/mean_length"]


def entries(folder: Path, args) -> list[Entry]:
    samples, kl_coef = args.prompts * args.completions, 0.04
    ours = dict(
        model=str(folder / "policy"),
        data=str(folder / "rows.jsonl"),
        reward_function="rewards:share_of_spaces",
        num_generations=args.completions,
        batch_size=args.prompts,
        minibatch_size=samples,
        kl=dict(coef=kl_coef),
        sampling=dict(max_new_tokens=args.tokens),
        optim=dict(lr=1e-6, schedule="constant"),
    )

    def trl(at_once: int) -> dict:
        config = dict(
            num_generations=args.completions,
            max_completion_length=args.tokens,
            beta=kl_coef,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=samples // at_once,
        )
        if args.job == "grpo":
            config["loss_type"] = "grpo"
        return dict(job=args.job, data=str(folder / "in_order.jsonl"), config=config)

    # With one update per rollout, GRPO needs no forward before it, so recorded log-probs save nothing.
    variants = [dict(recorded="auto")] if args.job == "rloo" else []
    return [
        Entry("ours", "ours_train.py", dict(job=args.job, config=ours)),
        *(Entry("ours, recorded", "ours_train.py", dict(job=args.job, config=ours | more)) for more in variants),
        Entry(f"TRL, {samples} at once", "trl_train.py", trl(samples)),
        Entry(f"TRL, {args.completions} at a time", "trl_train.py", trl(args.completions)),
    ]


if __name__ == "__main__":
    main()
