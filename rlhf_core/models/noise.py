"""NEFTune: noise on the embeddings of a batch while it trains, the same whatever it is packed with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rlhf_core.batch import PackedBatch
from rlhf_core.models.forward import Layout, find_route


def embedding_noise(batch: PackedBatch, size: int, alpha: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform noise for every token of the stream, (N, size) float32 (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

        alpha / sqrt(L size) * U(-1, 1),   L = tokens of the sequence, its prompt and its completion

    L is each sequence's own length, not that of the stream or of a padded row. A prompt that several completions share
    is one piece of the stream, with one draw for all of them, as long as with the first.

    Args:
        size: of an embedding. generators: one for each completion; its prompt is drawn first, then it itself.
    """
    noise = torch.zeros(batch.num_tokens, size)
    drawn = -1  # where the last prompt started that has its noise
    for span, generator in zip(batch.spans, generators, strict=True):
        length = span.prompt_end - span.prompt_start + span.end - span.start
        own = [(span.start, span.end)]
        if span.prompt_start > drawn:
            own.insert(0, (span.prompt_start, span.prompt_end))
            drawn = span.prompt_start
        for start, end in own:
            noise[start:end].uniform_(-1, 1, generator=generator).mul_(alpha / (length * size) ** 0.5)
    return noise


@contextlib.contextmanager
def noisy_embeddings(
    model: nn.Module,
    batch: PackedBatch,
    alpha: float,
    generators: Sequence[torch.Generator],
    *,
    layout: Layout = "auto",
) -> Iterator[None]:
    """Inside, one forward of `batch` through `model` adds `embedding_noise` to its embeddings, in either layout.

    With alpha = 0 nothing is done at all.
    """
    if alpha == 0:
        yield
        return
    find_route(model, layout)  # its probe runs batches of its own, which want no noise

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        noise = embedding_noise(batch, output.shape[-1], alpha, generators)
        # One row is the stream, or the one sequence that is the whole stream; several are the padded layout.
        placed = noise[None] if output.shape[0] == 1 else _padded(noise, batch, output.shape[1])
        return output + placed.to(output)

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _padded(noise: Tensor, batch: PackedBatch, width: int) -> Tensor:
    """(N, size) noise of the stream -> (B, width, size), 0 on padding."""
    rows = noise.new_zeros(batch.num_completions, width, noise.shape[1])
    for row, span in zip(rows, batch.spans, strict=True):
        sequence = torch.cat([noise[span.prompt_start : span.prompt_end], noise[span.start : span.end]])
        row[: len(sequence)] = sequence
    return rows
