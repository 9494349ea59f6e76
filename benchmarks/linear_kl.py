"""Time of the exact KL between two heads, compared with plain torch, forward and backward.

    python benchmarks/linear_kl.py [--repeats 5] [--threads 1]

Medians of interleaved runs, or on one thread its processor time. The floor is the four matrix products alone.
"""

from __future__ import annotations

import argparse
import functools

import torch
from timing import interleaved
from token_logprobs import processor_time

from rlhf_kernels.linear_kl import linear_kl
from rlhf_kernels.linear_kl.reference import linear_kl as reference

SHAPES = [(512, 256, 32_000), (512, 896, 32_000)]  # rows, hidden, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = processor_time if args.threads == 1 else interleaved
    print(f"torch {torch.__version__}, {args.threads} thread(s), float32; times are the definition's over ours")
    print(
        f"{'rows':>6}{'hidden':>8}{'vocabulary':>12}{'kind':>9}{'plain s':>9}"
        f"{'keep':>8}{'of floor':>10}{'recompute':>11}"
    )
    for rows, width, vocabulary in SHAPES:
        generator = torch.Generator().manual_seed(0)
        hiddens = [torch.randn(rows, width, generator=generator) for _ in range(2)]
        weights = [torch.randn(vocabulary, width, generator=generator) * width**-0.5 for _ in range(2)]
        leaves = hiddens[0].requires_grad_(), weights[0].requires_grad_()
        heads = hiddens[0], weights[0], hiddens[1], weights[1]

        def step(function, heads=heads, leaves=leaves, **options):
            found = function(*heads, **options)
            divergence = found[0] if isinstance(found, tuple) else found
            return torch.autograd.grad(divergence.sum(), leaves)

        @torch.no_grad()
        def products(heads=heads):
            logits, _ = heads[0] @ heads[1].T, heads[2] @ heads[3].T
            logits @ heads[1]
            logits.T @ heads[0]

        for kind in ("reverse", "forward", "js"):
            sides = {
                "plain": functools.partial(step, reference, kind=kind),
                "keep": functools.partial(step, linear_kl, kind=kind, keep_bytes=1 << 40),
                "recompute": functools.partial(step, linear_kl, kind=kind, keep_bytes=0),
            }
            truth, *found = (run() for run in sides.values())
            for gradients in found:
                torch.testing.assert_close(gradients, truth, rtol=1e-3, atol=1e-5)
            seconds = clock(sides | {"products": products}, repeats=args.repeats)
            print(
                f"{rows:>6}{width:>8}{vocabulary:>12}{kind:>9}{seconds['plain']:>9.3f}"
                f"{seconds['plain'] / seconds['keep']:>7.2f}x{seconds['products'] / seconds['keep']:>10.0%}"
                f"{seconds['plain'] / seconds['recompute']:>10.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
