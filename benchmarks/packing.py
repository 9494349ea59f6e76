"""Time of packed and padded batches of uneven lengths, and of packing itself, as the batch grows."""

from __future__ import annotations

import torch
from prefix_sharing import model
from timing import interleaved

from rlhf_core.batch import PackedBatch
from rlhf_core.models.forward import prepare, token_logprobs


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, hidden 256, 4 layers")
    columns = f"{'sequences':>10}{'tokens':>8}{'real share':>12}{'padded s':>10}{'packed s':>10}{'ratio':>8}"
    print(columns + f"{'pack ms':>9}{'us/token':>10}")
    policies = {layout: prepare(model(256), layout) for layout in ("padded", "packed")}
    for count in (8, 16, 32, 64):
        generator = torch.Generator().manual_seed(count)

        def draw(low, high, generator=generator):
            length = torch.randint(low, high, (1,), generator=generator)
            return torch.randint(3, 8000, (int(length),), generator=generator).tolist()

        groups = [(draw(10, 150), [draw(10, 200)]) for _ in range(count)]
        batch = PackedBatch.pack(groups)
        real_share = batch.num_tokens / batch.padded().input_ids.numel()

        def step(layout, batch=batch):
            token_logprobs(policies[layout], batch).sum().backward()
            policies[layout].zero_grad()

        seconds = interleaved(
            {
                "padded": lambda: step("padded"),
                "packed": lambda: step("packed"),
                "pack": lambda groups=groups: PackedBatch.pack(groups),
            },
            repeats=5,
        )
        print(
            f"{count:>10}{batch.num_tokens:>8}{real_share:>12.2f}{seconds['padded']:>10.3f}{seconds['packed']:>10.3f}"
            f"{seconds['padded'] / seconds['packed']:>8.2f}{1e3 * seconds['pack']:>9.2f}"
            f"{1e6 * seconds['pack'] / batch.num_tokens:>10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
