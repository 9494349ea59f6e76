"""SFT, supervised tokens per second: rlhf_core against TRL on the CPU, same weights, rows of Alpaca, in one run.

    python benchmarks/vs_trl/sft.py [--steps 3] [--rows 8] [--quick]

Both sides run the loop of their own trainer; a step includes the optimizer and logging. The model is a random Llama of
30M parameters with GPT-2's vocabulary. TRL packs rows into sequences of 1024 tokens (`bfd`), eight per step; ours, and
TRL without packing, take as many rows as have that many tokens. Prompts are not supervised. The losses of ours and of
TRL without packing, which take the same rows, are compared.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from material import alpaca_rows, gpt2_tokenizer, make_real_model, whole_lengths, write_rows
from processes import Entry, benchmark_parser, report, run_in_turns, same_losses

LENGTH = 1024  # tokens of TRL's packed sequences, its default


def main() -> None:
    parser = benchmark_parser(__doc__, steps=3)
    parser.add_argument("--rows", type=int, default=8, help=f"packed sequences of {LENGTH} tokens per step")
    args = parser.parse_args()
    length = LENGTH
    if args.quick:
        args.steps, args.rows, length = 1, 2, 256
    rows = alpaca_rows(5000)
    micro = 8  # rows that TRL pads together
    mean_length = statistics.mean(whole_lengths(rows, "completion", gpt2_tokenizer()))
    per_step = max(round(args.rows * length / mean_length / micro), 1) * micro
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name:
        folder = Path(name)
        make_real_model(folder)
        write_rows(folder, rows[: 2 * per_step * (args.steps + 1)], per_step)
        ours = dict(
            model=str(folder / "policy"),
            data=str(folder / "rows.jsonl"),
            batch_size=per_step,
            optim=dict(lr=1e-6, schedule="constant"),
        )
        padded = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=per_step // micro)
        packed = dict(packing=True, packing_strategy="bfd", max_length=length, per_device_train_batch_size=args.rows)

        def trl(**config: object) -> dict:
            return dict(job="sft", data=str(folder / "in_order.jsonl"), config=dict(learning_rate=1e-6) | config)

        entries = [
            Entry("ours", "ours_train.py", dict(job="sft", config=ours)),
            Entry(
                "ours, 2048 tokens at once",
                "ours_train.py",
                dict(job="sft", config=ours | dict(micro_batch_tokens=2048)),
            ),
            Entry("TRL, packed", "trl_train.py", trl(gradient_checkpointing=False, **packed)),
            Entry("TRL, packed, checkpointing", "trl_train.py", trl(gradient_checkpointing=True, **packed)),
            Entry("TRL, 8 padded rows at a time", "trl_train.py", trl(gradient_checkpointing=False, **padded)),
        ]
        compare = same_losses(1e-5, 1e-3)

        def check(title: str, step: int, turn: dict) -> None:
            if "packed" not in title:  # a packed step has other rows
                compare(title, step, turn)

        turns = run_in_turns(entries, folder, args, check=check)

    def speed(taken: list[dict]) -> float:
        return sum(turn["tokens"] for turn in taken) / sum(turn["seconds"] for turn in taken)

    best = max(speed(turns[title]) for title in turns if title.startswith("ours"))
    more = {
        "tokens": lambda taken: f"{statistics.mean(turn['tokens'] for turn in taken):.0f}",
        "tokens/s": lambda taken: f"{speed(taken):.1f}",
        "our best": lambda taken: f"{best / speed(taken):.2f}x",
    }
    report(f"SFT, {per_step} rows of Alpaca per step, supervised tokens", turns, args, ours=["ours"], more=more)
    print("tokens: supervised tokens per step; our best: tokens/s of the faster of our rows over those of this row")


if __name__ == "__main__":
    main()
