"""Time of log-probs of given logits on the CPU, compared with log_softmax and gather, and with F.cross_entropy.

Forward and backward, on the same logits; ratios of medians. By default one thread and its processor time, which depends
little on the load of the machine; with more `--threads` elapsed time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import interleaved

from rlhf_kernels import token_logprobs

SHAPES = [(1024, 32_000), (256, 151_936)]  # rows, vocabulary


def processor_time(sides: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Return the same as `interleaved`, in processor seconds of this thread."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def log_softmax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute log-probs in plain torch, in float32."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = processor_time if arguments.threads == 1 else interleaved
    print(f"torch {torch.__version__}, {arguments.threads} thread(s); times are the other's over ours")
    print(
        f"{'rows':>6}{'vocabulary':>12}{'dtype':>10}{'pass':>9}{'ours ms':>9}{'Gelem/s':>9}"
        f"{'log_softmax':>13}{'cross_entropy':>15}{'half masked':>13}"
    )
    for rows, vocabulary in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            logits = torch.randn(rows, vocabulary, generator=generator).to(dtype).requires_grad_()
            targets = torch.randint(vocabulary, (rows,), generator=generator)
            mask = torch.rand(rows, generator=generator) < 0.5
            sides = {
                "ours": lambda logits=logits, targets=targets: token_logprobs(logits, targets)[0],
                "plain": lambda logits=logits, targets=targets: log_softmax(logits, targets),
                "cross": lambda logits=logits, targets=targets: cross_entropy(logits, targets),
                "masked": lambda logits=logits, targets=targets, mask=mask: token_logprobs(logits, targets, mask=mask)[
                    0
                ],
            }
            error = (sides["ours"]() - log_softmax(logits.double(), targets)).abs().max()
            assert error < 1e-4, error

            def both_ways(run, logits=logits):
                run().sum().backward()
                logits.grad = None

            with torch.no_grad():
                forward = clock(sides, repeats=arguments.repeats)
            whole = clock(
                {name: lambda run=run: both_ways(run) for name, run in sides.items()}, repeats=arguments.repeats
            )
            for name, seconds in (("forward", forward), ("both", whole)):
                ours = seconds["ours"]
                print(
                    f"{rows:>6}{vocabulary:>12}{str(dtype).removeprefix('torch.'):>10}{name:>9}{1e3 * ours:>9.1f}"
                    f"{rows * vocabulary / ours / 1e9:>9.2f}{seconds['plain'] / ours:>12.2f}x"
                    f"{seconds['cross'] / ours:>14.2f}x{ours / seconds['masked']:>12.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
