"""A KTO step: rlhf_core against TRL on the CPU, same weights, same rows of HH, in one run.

    python benchmarks/vs_trl/kto.py [--steps 3] [--rows 8] [--quick]

Both sides run their own trainer's loop; a step is all of it, optimizer and log included. The rows are real ones, each
HH pair a good and a bad one, on a random Llama of 30M parameters with GPT-2's vocabulary. The losses of every step are
compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from material import hh_pairs, make_real_model, write_rows
from players import Entry, benchmark_parser, play, report, same_losses


def main() -> None:
    parser = benchmark_parser(__doc__, steps=3)
    parser.add_argument("--rows", type=int, default=8, help="to a step")
    args = parser.parse_args()
    longest = 1024
    if args.quick:
        args.steps, args.rows, longest = 1, 4, 96
    pairs = hh_pairs(-(-args.rows * (args.steps + 1) // 2), longest=longest)
    sides = (("chosen", True), ("rejected", False))
    rows = [dict(prompt=pair["prompt"], completion=pair[side], label=good) for pair in pairs for side, good in sides]
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name:
        folder = Path(name)
        make_real_model(folder)
        write_rows(folder, rows, args.rows)
        turns = play(entries(folder, args.rows), folder, args, check=same_losses(5e-5, 1e-3))
    report(f"KTO step, {args.rows} rows of HH", turns, args, ours=["ours", "ours, cached reference"])


def entries(folder: Path, rows: int) -> list[Entry]:
    ours = dict(
        model=str(folder / "policy"),
        reference=str(folder / "reference"),
        data=str(folder / "rows.jsonl"),
        batch_size=rows,
        optim=dict(lr=1e-6, schedule="constant"),
    )
    # A row's prompt with another's completion may be longer than TRL's default, and the other side cuts nothing.
    trl = dict(per_device_train_batch_size=rows, learning_rate=1e-6, max_length=None)

    def contestant(**config: bool) -> dict:
        reference, data = str(folder / "reference"), str(folder / "in_order.jsonl")
        return dict(job="kto", reference=reference, data=data, config=trl | config)

    return [
        Entry("ours", "ours_train.py", dict(job="kto", config=ours | dict(cache_reference="off"))),
        Entry("TRL, defaults (checkpointing)", "trl_train.py", contestant(gradient_checkpointing=True)),
        Entry("TRL, no checkpointing", "trl_train.py", contestant(gradient_checkpointing=False)),
        Entry("ours, cached reference", "ours_train.py", dict(job="kto", config=ours | dict(cache_reference="on"))),
        Entry(
            "TRL's best: that, cached reference",
            "trl_train.py",
            contestant(gradient_checkpointing=False, precompute_ref_log_probs=True),
        ),
    ]


if __name__ == "__main__":
    main()
