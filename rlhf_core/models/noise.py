"""NEFTune: noise on the embeddings of training batches, which does not depend on what a row is packed with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.batch import PackedBatch


def embedding_noise(batch: PackedBatch, size: int, alpha: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Return uniform noise for every token of the stream, (N, size) float32.

        alpha / sqrt(L size) * U(-1, 1),   L = tokens of the sequence, its prompt and its completion

    L is each sequence's own length, not that of the stream or of a padded row. A prompt that several completions share
    gets one draw for all of them, scaled for the first. Source: Jain et al. 2023, arXiv:2310.05914, algorithm 1.

    Args:
        size: of an embedding. generators: one for each completion; its prompt is drawn first, then the completion.
    """
    noise = torch.zeros(batch.num_tokens, size)
    drawn = -1  # start of the last prompt that has its noise
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
    model: PreTrainedModel, batch: PackedBatch, alpha: float, generators: Sequence[torch.Generator]
) -> Iterator[None]:
    """Add `embedding_noise` to the embeddings of one forward of `batch` inside, in either layout. None for alpha 0."""
    if alpha == 0:
        yield
        return
    hook = model.get_input_embeddings().register_forward_hook(partial(_add_noise, batch, alpha, generators))
    try:
        yield
    finally:
        hook.remove()


def _add_noise(
    batch: PackedBatch,
    alpha: float,
    generators: Sequence[torch.Generator],
    embeddings: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """Return the output (rows, length, size) of the embeddings with noise: a forward hook once the rest is bound."""
    noise = embedding_noise(batch, output.shape[-1], alpha, generators)
    # One row is the stream, or the one sequence that is the whole stream; several rows are the padded layout.
    placed = noise[None] if output.shape[0] == 1 else _padded(noise, batch, output.shape[1])
    return output + placed.to(output)


def _padded(noise: Tensor, batch: PackedBatch, width: int) -> Tensor:
    """Return the noise (N, size) of the stream as padded rows (B, width, size), 0 on padding."""
    rows = noise.new_zeros(batch.num_completions, width, noise.shape[1])
    for row, span in zip(rows, batch.spans, strict=True):
        sequence = torch.cat([noise[span.prompt_start : span.prompt_end], noise[span.start : span.end]])
        row[: len(sequence)] = sequence
    return rows
