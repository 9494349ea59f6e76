"""The reference's log-probs, kept: the same numbers, asked for once, never another reference's or another data's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.data.loader import micro_batches
from rlhf_core.data.tokenize import Example
from rlhf_core.models.forward import prepare, token_logprobs
from rlhf_core.training import reference_cache
from rlhf_core.training.reference_cache import cache_key, cached_logprobs


def make_model(seed: int = 0, layout: str = "auto", **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return prepare(LlamaForCausalLM(LlamaConfig(**settings | changes)).eval().requires_grad_(False), layout)


def make_examples(count: int = 7) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(19, (length,), generator=generator).tolist()

    return [Example(draw(2, 8), (draw(1, 6), draw(1, 6)), None) for _ in range(count)]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of completions in each forward of a reference."""
    seen = []
    original = reference_cache.token_logprobs

    def watch(model, batch, **options):
        seen.append(batch.num_completions)
        return original(model, batch, **options)

    monkeypatch.setattr(reference_cache, "token_logprobs", watch)
    return seen


def test_they_are_what_the_reference_says(tmp_path: Path):
    """Whatever rows are asked for together, in whatever order."""
    model, examples = make_model(), make_examples()
    cache = cached_logprobs(model, examples, folder=tmp_path, batch_size=3)
    for rows in ([0, 1, 2], [6, 2], [5], list(range(7))):
        part = [examples[i] for i in rows]
        (batch,) = micro_batches(part, None)
        torch.testing.assert_close(batch.scatter(cache.of(part)), token_logprobs(model, batch), rtol=1e-5, atol=1e-6)


def test_the_file_is_found_again(tmp_path: Path, calls):
    model, examples = make_model(), make_examples()
    first = cached_logprobs(model, examples, folder=tmp_path, batch_size=3)
    assert calls == [6, 6, 2]  # two completions an example, each seen once
    again = cached_logprobs(make_model(), make_examples(), folder=tmp_path, batch_size=2)
    assert calls == [6, 6, 2]
    assert torch.equal(first.of(examples), again.of(make_examples()))
    assert len([*tmp_path.iterdir()]) == 1


class Lazy:
    """A sequence that makes its examples anew each time, as one on disk does."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return make_examples()[index]


def test_examples_are_told_by_their_ids_not_by_who_they_are(tmp_path: Path, calls):
    """Made anew at every look; and with a held-out set beside them it is one cache of both."""
    model, examples = make_model(), make_examples()
    expected = cached_logprobs(model, examples, folder=tmp_path, batch_size=3)
    lazy = cached_logprobs(model, Lazy(), folder=tmp_path, batch_size=3)
    assert calls == [6, 6, 2]  # the same file
    assert torch.equal(lazy.of(make_examples()[2:5]), expected.of(examples[2:5]))
    both = cached_logprobs(model, examples[:4], examples[4:], folder=tmp_path, batch_size=3)
    assert calls == [6, 6, 2]
    assert torch.equal(both.of(examples[3:]), expected.of(examples[3:]))
    with pytest.raises(KeyError):
        expected.of([Example([1, 2], ([3], [4]), None)])


def test_what_is_computed_again_is_bit_for_bit_the_same(tmp_path: Path):
    model, examples = make_model(), make_examples()
    one, other = (cached_logprobs(model, examples, folder=tmp_path / name, batch_size=3) for name in "ab")
    assert torch.equal(one.of(examples), other.of(examples))


def test_the_key_is_everything_they_follow_from(tmp_path: Path):
    """Weights, the model's settings, one token anywhere, an example more, the layout; and nothing else."""
    model, examples = make_model(), make_examples()
    key = cache_key(model, examples)
    assert key == cache_key(make_model(), make_examples())
    one_weight = make_model()
    one_weight.lm_head.weight.data[0, 0] += 1e-6
    first, *rest = examples
    chosen, rejected = first.completions
    other_prompt = [Example([*first.prompt, 3], (chosen, rejected), None), *rest]
    other_end = [Example(first.prompt, (chosen, [*rejected, 3]), None), *rest]
    moved = [Example([*first.prompt, *chosen[:1]], (chosen[1:], rejected), None), *rest]  # the same ids, cut elsewhere
    others = [
        cache_key(one_weight, examples),
        cache_key(make_model(rms_norm_eps=1e-5), examples),
        cache_key(model, other_prompt),
        cache_key(model, other_end),
        cache_key(model, moved),
        cache_key(model, examples[:-1]),
        cache_key(make_model(layout="padded"), examples),
    ]
    assert len({key, *others}) == 1 + len(others)


@pytest.mark.parametrize("damage", ["cut", "flipped", "another", "empty"])
def test_a_file_that_is_not_what_was_written_is_computed_again(tmp_path: Path, calls, caplog, damage):
    model, examples = make_model(), make_examples()
    first = cached_logprobs(model, examples, folder=tmp_path, batch_size=7)
    (path,) = tmp_path.iterdir()
    contents = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(contents[:-5])
    elif damage == "flipped":
        contents[-3] ^= 1
        path.write_bytes(contents)
    elif damage == "empty":
        path.write_bytes(b"")
    else:  # whole, but of another reference
        cached_logprobs(make_model(seed=1), examples, folder=tmp_path / "other", batch_size=7)
        (other,) = (tmp_path / "other").iterdir()
        other.replace(path)
    calls.clear()
    with caplog.at_level(logging.WARNING):
        again = cached_logprobs(model, examples, folder=tmp_path, batch_size=7)
    assert calls == [14] and "computed again" in caplog.text
    assert torch.equal(first.of(examples), again.of(examples))
    calls.clear()
    cached_logprobs(model, examples, folder=tmp_path, batch_size=7)
    assert calls == []
