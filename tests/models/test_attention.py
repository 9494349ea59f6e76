"""Attention over a stream, against one softmax under an explicit N x N mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_core.batch import PackedBatch
from rlhf_core.models.attention import PACKED, packed_attention, packed_forward, packed_mask

HEADS, KEY_VALUE_HEADS, SIZE = 4, 2, 8
lengths = st.integers(1, 8) | st.sampled_from([17, 64, 70])
shapes = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=3)), min_size=1, max_size=4)


def visible(batch: PackedBatch, window: int | None) -> torch.Tensor:
    """(N, N) bool, by the rule: own segment causally and all of its prompt, of these the last `window` positions."""
    mask = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for span in batch.spans:
        mask[span.prompt_start : span.prompt_end, span.prompt_start : span.prompt_end] = True
        mask[span.start : span.end, span.prompt_start : span.prompt_end] = True
        mask[span.start : span.end, span.start : span.end] = True
    distance = batch.position_ids[:, None] - batch.position_ids
    return mask & (distance >= 0) & (distance < (window or batch.num_tokens))


def draw(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def tensor(heads):
        return torch.randn(1, heads, num_tokens, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)

    return tensor(HEADS), tensor(KEY_VALUE_HEADS), tensor(KEY_VALUE_HEADS)


def by_definition(query, key, value, mask, scaling):
    key, value = (x.repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@given(shapes, st.sampled_from([True, False]), st.sampled_from([None, 1, 2, 5, 16, 1000]), st.sampled_from([0.3, None]))
@settings(deadline=None, max_examples=60)
def test_a_stream_attends_as_one_softmax_under_its_mask(shapes, share, window, scaling):
    groups = [([0] * prompt, [[0] * length for length in completions]) for prompt, completions in shapes]
    batch = PackedBatch.pack(groups, share=share)
    inputs = draw(batch.num_tokens)
    output, weights = packed_attention(
        nn.Module(), *inputs, scaling=scaling, sliding_window=window, layout=batch.layout
    )
    truth = by_definition(*inputs, visible(batch, window), SIZE**-0.5 if scaling is None else scaling)
    assert weights is None
    torch.testing.assert_close(output, truth, rtol=1e-9, atol=1e-9)
    direction = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for gradient, true_gradient in zip(
        torch.autograd.grad(output, inputs, direction), torch.autograd.grad(truth, inputs, direction), strict=True
    ):
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias", "cache"])
def test_unsupported_keywords_are_refused(keyword):
    batch = PackedBatch.pack([([1, 2], [[3]])])
    with pytest.raises(NotImplementedError, match=f"packed attention does not support {keyword}"):
        packed_attention(nn.Module(), *draw(3), layout=batch.layout, **{keyword: 1.0})
    packed_attention(nn.Module(), *draw(3), layout=batch.layout, **{keyword: None})


def test_it_does_not_look_ahead():
    batch = PackedBatch.pack([([1, 2], [[3]])])
    with pytest.raises(NotImplementedError, match="is_causal=False"):
        packed_attention(nn.Module(), *draw(3), layout=batch.layout, is_causal=False)


def test_without_a_layout_it_is_transformers_own():
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, HEADS // KEY_VALUE_HEADS
    inputs = draw(5)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., 1] = False
    output, _ = packed_attention(module, *inputs, mask, scaling=0.3, sliding_window=2)
    assert torch.equal(output, sdpa_attention_forward(module, *inputs, mask, scaling=0.3)[0])


def test_no_mask_is_built_for_a_stream_and_an_ordinary_one_otherwise():
    options = dict(batch_size=1, q_length=3, kv_length=3, allow_is_causal_skip=False, device="cpu")
    with packed_forward():
        assert packed_mask(**options) is None
    assert packed_mask(**options).tolist() == [[torch.ones(3, 3, dtype=torch.bool).tril().tolist()]]


def test_a_model_builds_no_square_mask_for_a_stream(make_model, groups, monkeypatch):
    """Neither here nor in transformers: 232 tokens and no tensor of 232 x 232 entries, in forward and backward."""
    model = make_model("gemma3")
    batch = PackedBatch.pack(groups, share=True)
    model.set_attn_implementation(PACKED)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(tuple(result.shape))
            return result

    with Watch(), packed_forward():
        model.base_model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], layout=batch.layout, use_cache=False
        ).last_hidden_state.sum().backward()
    assert len(seen) > 100
    assert not [shape for shape in seen if shape.count(batch.num_tokens) > 1]
