"""Time and added peak memory of the fused LM head, compared with plain torch, forward and backward.

    python benchmarks/linear_logprobs.py [--repeats 7] [--threads 2]

Times are medians of interleaved runs; the floor is the three matrix products alone, each in one piece. Memory is the
peak resident size of a process that does one step, less what was resident before it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved

from rlhf_kernels.linear_logprobs import linear_logprobs, linear_token_loss
from rlhf_kernels.linear_logprobs.reference import linear_logprobs as reference

SHAPES = [(512, 256, 32_000), (512, 896, 32_000), (1024, 512, 32_000), (256, 512, 151_936)]  # rows, hidden, vocabulary
MEMORY_SHAPE = (1024, 512, 32_000)


def sides(rows: int, hidden: int, vocabulary: int) -> dict[str, Callable[[], object]]:
    """Return one step of each, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).requires_grad_()
    frozen = weight.detach()
    targets = torch.randint(vocabulary, (rows,), generator=generator)

    def step(function, head=weight, **options):
        function(states, head, targets, **options)[0].sum().backward()
        states.grad = weight.grad = None

    @torch.no_grad()
    def products():
        logits = states @ weight.T
        logits @ weight
        logits.T @ states

    return {
        "plain": lambda: step(reference),
        "keep": lambda: step(linear_logprobs, keep_bytes=1 << 40),
        "one pass": lambda: step(linear_token_loss, loss=lambda logprobs, _: -logprobs),
        "recompute": lambda: step(linear_logprobs, keep_bytes=0),
        "frozen": lambda: step(linear_logprobs, head=frozen, keep_bytes=1 << 40),
        "products": products,
    }


def added_mib(side: str) -> float:
    """Return the MiB that one step of a side adds to the peak of a new process."""
    code = (
        "import torch; import linear_logprobs as b; from vs_trl.child import PeakMemory\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "b.sides(64, 32, 500)[{0!r}]()\n"  # loads what is imported on first use
        "step = b.sides(*b.MEMORY_SHAPE)[{0!r}]; memory = PeakMemory(); memory.reset(); step()\n"
        "print(memory.added_mib())"
    ).replace("{0!r}", repr(side))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    print("times: the plain head's over ours; of floor: time of the three products over ours\n")
    print(
        f"{'rows':>6}{'hidden':>8}{'vocabulary':>12}{'plain s':>9}"
        f"{'keep':>8}{'of floor':>10}{'one pass':>10}{'of floor':>10}{'recompute':>11}{'frozen':>8}"
    )
    for shape in SHAPES:
        seconds = interleaved(sides(*shape), repeats=args.repeats)
        plain, floor = seconds["plain"], seconds["products"]
        print(
            f"{shape[0]:>6}{shape[1]:>8}{shape[2]:>12}{plain:>9.3f}"
            f"{plain / seconds['keep']:>7.2f}x{floor / seconds['keep']:>10.0%}"
            f"{plain / seconds['one pass']:>9.2f}x{floor / seconds['one pass']:>10.0%}"
            f"{plain / seconds['recompute']:>10.2f}x{plain / seconds['frozen']:>7.2f}x",
            flush=True,
        )
    print(f"\nadded peak memory at rows, hidden, vocabulary = {MEMORY_SHAPE}")
    plain = added_mib("plain")
    for side in ("plain", "keep", "one pass", "recompute"):
        added = plain if side == "plain" else added_mib(side)
        print(f"  {side:<10} {added:>6.0f} MiB  {added / plain:.2f}x", flush=True)


if __name__ == "__main__":
    main()
