"""Time of the exact KL of two sets of logits with the entropy on the CPU, compared with its definition."""

from __future__ import annotations

import argparse

import torch
from timing import interleaved
from token_logprobs import processor_time

from rlhf_kernels import kl_divergence
from rlhf_kernels.kl_divergence.reference import kl_divergence as reference

SHAPES = [(512, 32_000), (128, 151_936)]  # rows, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = processor_time if arguments.threads == 1 else interleaved
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), float32; times are the definition's over ours")
    print(f"{'rows':>6}{'vocabulary':>12}{'kind':>9}{'forward ms':>12}{'':>8}{'both ms':>10}{'':>8}")
    for rows, vocabulary in SHAPES:
        generator = torch.Generator().manual_seed(0)
        policy, ref = torch.randn(2, rows, vocabulary, generator=generator)
        policy.requires_grad_()
        for kind in ("reverse", "forward", "js"):
            sides = {
                "ours": lambda policy=policy, ref=ref, kind=kind: kl_divergence(policy, ref, kind=kind, entropy=True),
                "plain": lambda policy=policy, ref=ref, kind=kind: reference(policy, ref, kind=kind),
            }
            found, truth = (run() for run in sides.values())
            for ours, true in zip(found, truth, strict=True):
                torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
            del found, truth

            def both_ways(run, policy=policy):
                run()[0].sum().backward()
                policy.grad = None

            with torch.no_grad():
                forward = clock(sides, repeats=arguments.repeats)
            whole = clock(
                {name: lambda run=run: both_ways(run) for name, run in sides.items()}, repeats=arguments.repeats
            )
            print(
                f"{rows:>6}{vocabulary:>12}{kind:>9}{1e3 * forward['ours']:>12.1f}"
                f"{forward['plain'] / forward['ours']:>7.2f}x{1e3 * whole['ours']:>10.1f}"
                f"{whole['plain'] / whole['ours']:>7.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
