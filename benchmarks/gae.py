"""Time of GAE as a cumulative sum, compared with the loop over tokens. Both give the same numbers."""

from __future__ import annotations

import torch
from timing import interleaved
from torch import Tensor

from rlhf_core.ops.advantages import gae

SHAPES = [(8, 128), (256, 1024)]  # completions, tokens


def gae_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Compute GAE in a loop from the last token to the first."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_advantage, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def layouts(rows: int, columns: int) -> dict[str, Tensor]:
    """Return masks of the same shape: padded on the right, on the left, and with a hole in the middle of every row."""
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=torch.Generator().manual_seed(0))
    right = torch.arange(columns) < lengths
    hole = (torch.arange(columns) >= columns // 3) & (torch.arange(columns) < columns // 2)
    return {"right": right, "left": right.flip(1), "holes": ~hole.expand(rows, columns)}


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; medians, ms a call")
    print(f"{'completions':>12}{'tokens':>8}{'padding':>9}{'loop':>10}{'gae':>10}{'ratio':>8}")
    for rows, columns in SHAPES:
        rewards, values = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(1))
        for layout, mask in layouts(rows, columns).items():
            calls = 20 if rows * columns < 10_000 else 2  # per measurement

            def fast(rewards=rewards, values=values, mask=mask, calls=calls):
                for _ in range(calls):
                    gae(rewards, values, mask)

            # The loop does not support holes; its time does not depend on the mask.
            def loop(rewards=rewards, values=values, mask=mask):
                gae_loop(rewards, values, mask)

            if layout != "holes":
                for ours, plain in zip(gae(rewards, values, mask), gae_loop(rewards, values, mask), strict=True):
                    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
            seconds = interleaved({"loop": loop, "gae": fast}, repeats=25)
            ours = seconds["gae"] / calls
            print(
                f"{rows:>12}{columns:>8}{layout:>9}{1e3 * seconds['loop']:>10.3f}{1e3 * ours:>10.3f}"
                f"{seconds['loop'] / ours:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
