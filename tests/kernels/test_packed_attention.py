"""Attention over a packed stream, both implementations, compared with one softmax under an explicit N x N mask.

flex_attention raises an error for a backward on the CPU, although it has one there: plain torch, with the same mask
function as its kernels. `unlocked` removes the error, so that the backward is tested too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.batch import PackedBatch
from rlhf_kernels.packed_attention import packed_attention, torch_path, triton_kernel
from rlhf_kernels.packed_attention.layout import visible_ranges
from rlhf_kernels.packed_attention.reference import packed_attention as reference
from rlhf_kernels.registry import use_impl

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
# The GPU kernel does not support float64, so the comparison is exact on the CPU only.
EXACT, CLOSE = (torch.float64, 1e-9) if DEVICE == CPU else (torch.float32, 1e-4)
LENGTHS = st.integers(1, 8) | st.sampled_from([64, 130, 256])
SHAPES = st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=3)), min_size=1, max_size=4)
WINDOWS = st.sampled_from([None, 1, 2, 5, 64, 128, 1000])
# Prompt and completion lengths: shared and single prompts, with whole blocks inside and partial ones at the end.
GROUPS = [(70, [30, 45, 3]), (5, [5]), (20, [200, 190]), (1, [1])]


@pytest.fixture
def unlocked(monkeypatch):
    if DEVICE == CPU:
        monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
        monkeypatch.setattr(triton_kernel, "_check", lambda *arguments: None)
    torch._dynamo.reset()


def pack(groups, share=True, device=DEVICE) -> PackedBatch:
    groups = [([0] * prompt, [[0] * length for length in lengths]) for prompt, lengths in groups]
    return PackedBatch.pack(groups, share=share).to(device)


def draw(num_tokens: int, heads=(4, 2), size=16, dtype=torch.float32, value_size=None, device=DEVICE):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(heads[0], size), (heads[1], size), (heads[1], value_size or size)]
    return [
        torch.randn(1, h, num_tokens, d, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for h, d in shapes
    ]


def outcome(function, inputs, layout, **options) -> list[torch.Tensor]:
    """Return the output and the gradients of an uneven sum of it."""
    output = function(*inputs, layout, **options)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, inputs, direction.to(output))]


def by_definition(batch: PackedBatch, window: int | None) -> torch.Tensor:
    """Return an (N, N) bool mask from the spans: own range and its prompt, causally, the last `window` positions."""
    mask = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for span in batch.spans:
        for queries in (slice(span.prompt_start, span.prompt_end), slice(span.start, span.end)):
            mask[queries, span.prompt_start : span.prompt_end] = True
        mask[span.start : span.end, span.start : span.end] = True
    distance = batch.position_ids[:, None] - batch.position_ids
    return mask & (distance >= 0) & (distance < (window or batch.num_tokens))


@given(SHAPES, st.booleans(), WINDOWS)
@settings(deadline=None, max_examples=60)
def test_two_ranges_are_the_mask(shapes, share, window):
    batch = pack(shapes, share, CPU)
    token = torch.arange(batch.num_tokens)
    ranges = visible_ranges(batch.layout, batch.num_tokens, CPU, window)
    assert torch.equal(ranges.visible(token[:, None], token), by_definition(batch, window))


@given(SHAPES, WINDOWS, st.sampled_from([1, 1 << 17, 1 << 24]))
@settings(deadline=None, max_examples=40)
def test_the_block_mask_is_that_of_torch(shapes, window, chunk):
    batch = pack(shapes, device=CPU)
    ranges = visible_ranges(batch.layout, batch.num_tokens, CPU, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernel, "_CHUNK", chunk)
        ours = triton_kernel.make_block_mask(ranges)
    theirs = flex.create_block_mask(
        lambda b, h, q, k: ranges.visible(q, k), None, None, batch.num_tokens, batch.num_tokens, device="cpu"
    )
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            a, b = getattr(ours, f"{name}_{part}"), getattr(theirs, f"{name}_{part}")
            assert torch.equal(a, b) and a.dtype == b.dtype, f"{name}_{part}"


@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_it_is_one_softmax_under_a_mask(impl, heads, window, unlocked):
    batch = pack(GROUPS)
    inputs = draw(batch.num_tokens, heads, dtype=EXACT)
    ours = outcome(packed_attention, inputs, batch.layout, impl=impl, sliding_window=window)
    for result, true in zip(ours, outcome(reference, inputs, batch.layout, sliding_window=window), strict=True):
        torch.testing.assert_close(result, true, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(impl, dtype, unlocked):
    """The error is at most that of the definition in this dtype, plus rounding."""
    batch = pack(GROUPS, share=False)
    inputs = draw(batch.num_tokens, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = outcome(reference, exact, batch.layout)
    plain = outcome(reference, inputs, batch.layout)
    ours = outcome(packed_attention, inputs, batch.layout, impl=impl)
    for name, result, usual, true in zip(("output", "query", "key", "value"), ours, plain, truth, strict=True):
        assert result.dtype == dtype
        error, allowed = (result - true).abs().max(), (usual - true).abs().max()
        # Several units in the last place of the largest entry: the half types round the attention weights too.
        slack = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert error <= allowed + slack, f"{name}: off by {error:.3g}, {allowed:.3g} allowed"


def test_scale_and_a_value_of_its_own_size(impl, unlocked):
    batch = pack(GROUPS)
    inputs = draw(batch.num_tokens, dtype=EXACT, value_size=32)
    ours = outcome(packed_attention, inputs, batch.layout, scale=0.3, impl=impl)
    for result, true in zip(ours, outcome(reference, inputs, batch.layout, scale=0.3), strict=True):
        torch.testing.assert_close(result, true, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("groups", [[(1, [1])], [(300, [1])], [(2, [128, 128])]], ids=str)
def test_small_and_even_streams(impl, groups):
    batch = pack(groups)
    with torch.no_grad():
        inputs = draw(batch.num_tokens)
        torch.testing.assert_close(packed_attention(*inputs, batch.layout, impl=impl), reference(*inputs, batch.layout))


def test_heads_that_are_views_of_one_projection(impl):
    batch = pack(GROUPS)
    projected = torch.randn(1, batch.num_tokens, 8, 16, generator=torch.Generator().manual_seed(0))
    inputs = projected.to(DEVICE).transpose(1, 2).split([4, 2, 2], dim=1)
    torch.testing.assert_close(packed_attention(*inputs, batch.layout, impl=impl), reference(*inputs, batch.layout))


def test_new_lengths_windows_and_batches_compile_nothing():
    """After the second length: the kernel is compiled once per model, not once per batch."""
    torch._dynamo.reset()
    triton_kernel._compiled.cache_clear()
    made = []

    def count(graph, example):
        made.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(triton_kernel, "_compiled", triton_kernel._compiled.__wrapped__)
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda function, **options: compile_(function, **options | {"backend": count}))
        attend = triton_kernel._compiled("cpu", 4, 2, 16, torch.float32, None)
        seen = []
        for number, window in ((1, None), (3, None), (2, 5), (5, 64), (4, None)):
            batch = pack(GROUPS * number, device=CPU)
            inputs = [x.detach() for x in draw(batch.num_tokens, device=CPU)]
            block_mask = triton_kernel.block_mask_of(batch.layout, batch.num_tokens, CPU, window)
            torch.testing.assert_close(
                attend(*inputs, block_mask), reference(*inputs, batch.layout, sliding_window=window)
            )
            seen.append(len(made))
    assert seen[0] == 1 and seen[1] == seen[-1] == 2


def test_a_block_mask_is_made_once_a_layout(monkeypatch):
    batch = pack(GROUPS)
    made = []
    make = triton_kernel.make_block_mask
    monkeypatch.setattr(triton_kernel, "make_block_mask", lambda ranges: made.append(1) or make(ranges))
    with torch.no_grad():
        inputs = draw(batch.num_tokens)
        for _ in range(2):
            packed_attention(*inputs, batch.layout, impl="triton")
            packed_attention(*inputs, batch.layout, sliding_window=16, impl="triton")
        assert len(made) == 2
        packed_attention(*inputs, replace(batch.layout), impl="triton")
    assert len(made) == 3


def test_no_square_is_ever_made():
    """Neither by the loop over groups nor for the block mask: no tensor of N x N / 8 elements for 1,700 tokens."""
    batch = pack(GROUPS * 3, device=CPU)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    inputs = draw(batch.num_tokens, heads=(1, 1), device=CPU)
    with Watch():
        packed_attention(*inputs, batch.layout, impl="torch").sum().backward()
        triton_kernel.block_mask_of(batch.layout, batch.num_tokens, CPU, None)
    assert len(seen) > 100
    assert max(seen) < batch.num_tokens**2 / 8


def test_dropout():
    """It changes every output, and the mean of many is near the output without dropout."""
    batch = pack([(4, [3, 5])])
    inputs = draw(batch.num_tokens)
    with torch.no_grad():
        kept = packed_attention(*inputs, batch.layout, impl="torch")
        torch.manual_seed(0)
        options = dict(dropout=0.5, impl="torch")
        samples = torch.stack([packed_attention(*inputs, batch.layout, **options) for _ in range(200)])
        assert (samples[0] - kept).abs().mean() > 0.3 * kept.abs().mean()
        assert (samples.mean(0) - kept).abs().mean() < 0.1 * kept.abs().mean()
        with pytest.raises(RuntimeError, match="dropout=0.5: impl='triton' of packed_attention expects 0"):
            packed_attention(*inputs, batch.layout, dropout=0.5, impl="triton")


def test_it_compiles_whole():
    batch = pack(GROUPS)
    inputs = draw(batch.num_tokens)
    compiled = torch.compile(
        lambda q, k, v: packed_attention(q, k, v, batch.layout, sliding_window=16), backend="aot_eager", fullgraph=True
    )
    with use_impl("torch"):
        torch.testing.assert_close(compiled(*inputs), torch_path_output(inputs, batch))
    torch._dynamo.reset()


def torch_path_output(inputs, batch):
    return torch_path.packed_attention(*inputs, batch.layout, scale=None, sliding_window=16, dropout=0.0)


def test_what_it_refuses():
    batch = pack([(2, [3])])
    query, key, value = draw(5)
    with pytest.raises(ValueError, match=r"query of shape \(4, 5, 16\): expected \(1, heads, N, D\)"):
        packed_attention(query[0], key, value, batch.layout)
    with pytest.raises(ValueError, match=r"key of shape \(1, 3, 5, 16\): expected \(1, a divisor of 4, 5, 16\)"):
        packed_attention(query, query[:, :3], value, batch.layout)
    with pytest.raises(ValueError, match=r"value of shape \(1, 2, 4, 16\): expected \(1, 2, 5\) and its own size"):
        packed_attention(query, key, value[:, :, :4], batch.layout)
    with pytest.raises(ValueError, match="sliding_window=0: expected 1 or more"):
        packed_attention(query, key, value, batch.layout, sliding_window=0)
    if DEVICE == CPU:
        with pytest.raises(RuntimeError, match="no backward on the CPU; use impl='torch'"):
            packed_attention(query, key, value, batch.layout, impl="triton")
