"""A reward-model step: rlhf_core against TRL on the CPU, same weights, same pairs of HH, in one run.

    python benchmarks/vs_trl/reward.py [--steps 3] [--rows 8] [--quick]

Both sides run the loop of their own trainer; a step includes the optimizer and logging. The pairs are real. The model
is a random Llama of 30M parameters, most of which belong to GPT-2's vocabulary. The losses of every step are compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from material import hh_pairs, make_real_model, make_reward_model, write_rows
from processes import Entry, benchmark_parser, report, run_in_turns, same_losses


def main() -> None:
    parser = benchmark_parser(__doc__, steps=5)
    parser.add_argument("--rows", type=int, default=8, help="pairs per step")
    args = parser.parse_args()
    longest = 1024
    if args.quick:
        args.steps, args.rows, longest = 1, 4, 96
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name:
        folder = Path(name)
        make_real_model(folder)
        make_reward_model(folder)
        write_rows(folder, hh_pairs(args.rows * (args.steps + 1), longest=longest), args.rows)
        ours = dict(
            model=str(folder / "reward_model"),
            data=str(folder / "rows.jsonl"),
            batch_size=args.rows,
            optim=dict(lr=1e-6, schedule="constant"),
        )
        shared = dict(per_device_train_batch_size=args.rows, learning_rate=1e-6)

        def trl(**config: bool) -> dict:
            return dict(job="reward", data=str(folder / "in_order.jsonl"), config=shared | config)

        entries = [
            Entry("ours", "ours_train.py", dict(job="reward", config=ours)),
            Entry("TRL, defaults (checkpointing)", "trl_train.py", trl(gradient_checkpointing=True)),
            Entry("TRL, no checkpointing", "trl_train.py", trl(gradient_checkpointing=False)),
        ]
        turns = run_in_turns(entries, folder, args, check=same_losses(1e-5, 1e-3))
    report(f"reward-model step, {args.rows} pairs of HH", turns, args, ours=["ours"])


if __name__ == "__main__":
    main()
