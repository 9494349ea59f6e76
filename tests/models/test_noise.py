"""NEFTune's noise: its size, what it is added to, and that it depends neither on layout nor on other rows."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.batch import PackedBatch
from rlhf_core.models.forward import prepare, token_logprobs
from rlhf_core.models.noise import embedding_noise, noisy_embeddings
from rlhf_core.seeding import generator

ALPHA = 5.0


def generators(count: int, *, first: int = 0) -> list[torch.Generator]:
    return [generator(0, "noise", number) for number in range(first, first + count)]


def test_the_noise_of_each_token_by_hand():
    """Sequences of 3 + 5 and 2 + 2 tokens: each drawn by itself, scaled by its own length, not the stream's 12."""
    batch = PackedBatch.pack([([1, 2, 3], [[4, 5, 6, 7, 8]]), ([9, 10], [[11, 12]])])
    noise = embedding_noise(batch, 16, ALPHA, generators(2))
    expected = []
    for number, (prompt, completion) in enumerate([(3, 5), (2, 2)]):
        own = generator(0, "noise", number)
        size = ALPHA / ((prompt + completion) * 16) ** 0.5
        expected += [size * (2 * torch.rand(length, 16, generator=own) - 1) for length in (prompt, completion)]
    torch.testing.assert_close(noise, torch.cat(expected))
    assert 0.9 < noise[:8].abs().max() / (ALPHA / (8 * 16) ** 0.5) <= 1
    assert 0.8 < noise[8:].abs().max() / (ALPHA / (4 * 16) ** 0.5) <= 1


def test_the_expected_norm_of_a_sequence_is_that_of_the_paper():
    """E |noise|^2 = L d * alpha^2 / (3 L d): alpha / sqrt 3 whatever the length."""
    for length in (50, 400):
        batch = PackedBatch.pack([([1] * 20, [[2] * (length - 20)])])
        assert embedding_noise(batch, 64, ALPHA, generators(1)).norm() == pytest.approx(ALPHA / 3**0.5, rel=0.03)


def test_a_shared_prompt_is_drawn_once():
    batch = PackedBatch.pack([([1] * 20, [[2] * 6, [3] * 9]), ([4], [[5]])], share=True)
    noise = embedding_noise(batch, 8, ALPHA, generators(3))
    assert batch.num_tokens == 37 and (noise != 0).all()
    torch.testing.assert_close(noise[:26], embedding_noise(PackedBatch.pack([([1] * 20, [[2] * 6])]), 8, ALPHA,
                                                           generators(1)))  # fmt: skip
    assert noise[26:35].abs().max() <= ALPHA / (29 * 8) ** 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_layouts_and_other_rows_make_no_difference(make_model, groups, family):
    """Packed, padded, and one row at a time: the same log-probs; and others than without noise."""
    model = make_model(family).eval()
    groups = [(prompt, [completion]) for prompt, completions in groups for completion in completions]
    batch = PackedBatch.pack(groups)

    def run(batch: PackedBatch, layout: str, first: int = 0) -> torch.Tensor:
        numbers = generators(batch.num_completions, first=first)
        prepare(model, layout)
        with noisy_embeddings(model, batch, ALPHA, numbers):
            return token_logprobs(model, batch).detach()

    packed = run(batch, "packed")
    torch.testing.assert_close(run(batch, "padded"), packed, rtol=1e-4, atol=1e-4)
    for number, group in enumerate(groups):
        alone = run(PackedBatch.pack([group]), "packed", first=number)[0]
        torch.testing.assert_close(alone, packed[number, : len(alone)], rtol=1e-4, atol=1e-4)
    assert (token_logprobs(model, batch) - packed).abs().max() > 1e-2


def test_no_hook_is_left(make_model, groups):
    model = prepare(make_model("llama"))
    batch = PackedBatch.pack(groups)
    with noisy_embeddings(model, batch, ALPHA, generators(batch.num_completions)):
        noisy = token_logprobs(model, batch)
    assert not model.get_input_embeddings()._forward_hooks
    plain = token_logprobs(model, batch)
    assert not torch.allclose(noisy, plain, atol=1e-3)
    with noisy_embeddings(model, batch, 0.0, []):
        assert torch.equal(token_logprobs(model, batch), plain)


def test_it_reaches_the_gradient_of_the_embeddings(make_model):
    """Noise is added, not multiplied: each embedding has a gradient, taken at the noisy embedding."""
    model = prepare(make_model("llama"))
    batch = PackedBatch.pack([([1, 2, 3], [[4, 5]])])
    gradients = []
    for alpha in (0.0, ALPHA):
        with noisy_embeddings(model, batch, alpha, generators(1)):
            token_logprobs(model, batch).sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad()
    assert (gradients[1][[1, 2, 3, 4]].abs().sum(-1) > 0).all()
    assert not torch.allclose(*gradients, atol=1e-4)
