"""Time of attention over a packed stream, group by group, compared with a dense N x N mask and with a padded batch.

Forward and backward of one layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import interleaved

from rlhf_core.batch import PackedBatch
from rlhf_kernels.packed_attention import packed_attention
from rlhf_kernels.packed_attention.layout import visible_ranges

HEADS, KEY_HEADS, SIZE = 8, 4, 64
# Prompts, and for each the lengths of prompt and completions.
SHAPES = {"pairs": (8, 100, (60, 45)), "long prompts": (4, 500, (50, 40)), "groups of 8": (2, 200, (100,) * 8)}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; ratios: their time over ours")
    print(f"{'':<14}{'window':>8}{'tokens':>8}{'ours ms':>9}{'dense':>8}{'padded':>8}")
    for name, (prompts, prompt, completions) in SHAPES.items():
        batch = PackedBatch.pack([([0] * prompt, [[0] * length for length in completions])] * prompts, share=True)
        rows, columns = batch.num_completions, prompt + max(completions)
        stream = [draw(1, heads, batch.num_tokens, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        padded = [draw(rows, heads, columns, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        token = torch.arange(batch.num_tokens)
        for window in (None, 64):
            ranges = visible_ranges(batch.layout, batch.num_tokens, torch.device("cpu"), window)
            dense_mask = ranges.visible(token[:, None], token)
            causal = torch.ones(columns, columns, dtype=torch.bool).tril()
            padded_mask = None if window is None else causal.triu(1 - window)

            def grouped(stream=stream, layout=batch.layout, window=window):
                packed_attention(*stream, layout, sliding_window=window).sum().backward()

            def dense(stream=stream, mask=dense_mask):
                F.scaled_dot_product_attention(*stream, mask, enable_gqa=True).sum().backward()

            def padded_rows(padded=padded, mask=padded_mask):
                F.scaled_dot_product_attention(*padded, mask, is_causal=mask is None, enable_gqa=True).sum().backward()

            with torch.no_grad():
                ours = packed_attention(*stream, batch.layout, sliding_window=window)
                torch.testing.assert_close(
                    ours, F.scaled_dot_product_attention(*stream, dense_mask, enable_gqa=True), rtol=1e-4, atol=1e-4
                )
            seconds = interleaved({"ours": grouped, "dense": dense, "padded": padded_rows}, repeats=9)
            print(
                f"{name:<14}{window or 'none':>8}{batch.num_tokens:>8}{1e3 * seconds['ours']:>9.1f}"
                f"{seconds['dense'] / seconds['ours']:>7.2f}x{seconds['padded'] / seconds['ours']:>7.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
