"""A KTO step: rlhf_core against TRL on the CPU, same weights, same rows of HH, in one run.

    python benchmarks/vs_trl/kto.py [--steps 3] [--rows 8] [--quick]

Both sides run the loop of their own trainer; a step includes the optimizer and logging. The rows are real: each pair of
HH is a good and a bad row. The model is a random Llama of 30M parameters with GPT-2's vocabulary. The losses of every
step are compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from material import hh_pairs, make_real_model, write_rows
from processes import Entry, benchmark_parser, report, run_in_turns, same_losses


def main() -> None:
    parser = benchmark_parser(__doc__, steps=3)
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
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
        turns = run_in_turns(entries(folder, args.rows), folder, args, check=same_losses(5e-5, 1e-3))
    report(f"KTO step, {args.rows} rows of HH", turns, args, ours=["ours", "ours, cached reference"])


def entries(folder: Path, rows: int) -> list[Entry]:
    ours = dict(
        model=str(folder / "policy"),
        data=str(folder / "rows.jsonl"),
        batch_size=rows,
        optim=dict(lr=1e-6, schedule="constant"),
    )
    # A row's prompt with another's completion may be longer than TRL's default; ours truncates nothing.
    trl = dict(per_device_train_batch_size=rows, learning_rate=1e-6, max_length=None)

    def ours_with(cache: str) -> dict:
        reference = dict(path=str(folder / "reference"), cache=cache)
        return dict(job="kto", config=ours | dict(reference=reference))

    def trl_with(**config: bool) -> dict:
        reference, data = str(folder / "reference"), str(folder / "in_order.jsonl")
        return dict(job="kto", reference=reference, data=data, config=trl | config)

    return [
        Entry("ours", "ours_train.py", ours_with("off")),
        Entry("TRL, defaults (checkpointing)", "trl_train.py", trl_with(gradient_checkpointing=True)),
        Entry("TRL, no checkpointing", "trl_train.py", trl_with(gradient_checkpointing=False)),
        Entry("ours, cached reference", "ours_train.py", ours_with("on")),
        Entry(
            "TRL's best: that, cached reference",
            "trl_train.py",
            trl_with(gradient_checkpointing=False, precompute_ref_log_probs=True),
        ),
    ]


if __name__ == "__main__":
    main()
