"""The fused LM head against the plain one: forward and backward, time, and memory added at the peak."""

from __future__ import annotations

import torch
from timing import interleaved
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels.linear_logprobs.chunked import linear_logprobs
from rlhf_kernels.linear_logprobs.reference import linear_logprobs as reference

SHAPES = [(512, 256, 32_000), (1024, 512, 32_000), (256, 512, 151_936)]  # rows, hidden, vocabulary


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def main() -> None:
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; times are the plain head's over ours"
    )
    columns = f"{'rows':>6}{'hidden':>8}{'vocabulary':>12}{'plain s':>9}{'keep':>7}{'recompute':>11}{'products':>10}"
    print(columns + "  largest tensor")
    for rows, hidden, vocabulary in SHAPES:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(rows, hidden, generator=generator, requires_grad=True)
        weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).requires_grad_()
        targets = torch.randint(vocabulary, (rows,), generator=generator)

        def step(function, states=states, weight=weight, targets=targets, **options):
            function(states, weight, targets, **options)[0].sum().backward()
            states.grad = weight.grad = None

        def products(states=states, weight=weight, rows=rows):
            """The floor: the three matrix products alone."""
            with torch.no_grad():
                for start in range(0, rows, 128):
                    part = states[start : start + 128]
                    logits = part @ weight.T
                    logits @ weight
                    logits.T @ part

        sides = {
            "plain": lambda: step(reference),
            "keep": lambda: step(linear_logprobs, keep_bytes=1 << 40),
            "recompute": lambda: step(linear_logprobs, keep_bytes=0),
            "products": products,
        }
        seconds = interleaved(sides, repeats=5)
        largest = {}
        for name in ("plain", "recompute"):
            with LargestTensor() as watch:
                sides[name]()
            largest[name] = watch.bytes / 2**20
        print(
            f"{rows:>6}{hidden:>8}{vocabulary:>12}{seconds['plain']:>9.3f}{seconds['plain'] / seconds['keep']:>6.2f}x"
            f"{seconds['plain'] / seconds['recompute']:>10.2f}x{seconds['products'] / seconds['keep']:>9.0%}"
            f"  plain {largest['plain']:.0f} MiB, recompute {largest['recompute']:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
