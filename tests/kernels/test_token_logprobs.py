"""Log-probs from logits, both implementations, compared with the definition by `assert_accurate` of conftest.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels import common, token_logprobs
from rlhf_kernels.token_logprobs import _backward, _backward_inplace, _forward, torch_path
from rlhf_kernels.token_logprobs.reference import token_logprobs as reference

single_and_half = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Split small shapes into several tiles of the torch path and several blocks of the Triton path."""
    monkeypatch.setattr(common, "_CPU_TILE", 300 // torch.get_num_threads())
    if "impl" in request.fixturenames and request.getfixturevalue("impl") == "triton":
        from rlhf_kernels import triton_rows

        monkeypatch.setattr(triton_rows, "LARGEST_BLOCK", 32)


def draw(*shape: int, dtype=torch.float64, spread=3.0, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (..., V) and targets (...)."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(shape, dtype=torch.float64, generator=generator)
    return logits.to(dtype), torch.randint(shape[-1], shape[:-1], generator=generator)


def results(function, logits, targets, dtype=None, *, device="cpu", **options) -> dict[str, torch.Tensor]:
    """Log-probs, entropies, and the gradient of an uneven sum of both, in `dtype`."""
    leaf = logits.detach().to(device, dtype or logits.dtype).requires_grad_()
    if options.get("mask") is not None:
        options["mask"] = options["mask"].to(device)
    logprobs, entropies = function(leaf, targets.to(device), **options)
    weights = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype, device=device).view(logprobs.shape)
    ((logprobs * weights).sum() + (entropies * weights.cos()).sum()).backward()
    found = dict(logprobs=logprobs, entropies=entropies, gradient=leaf.grad)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


@pytest.fixture
def check(impl, device, assert_accurate):
    """Compare an implementation with the definition on these inputs."""

    def check(logits, targets, **options):
        found = results(token_logprobs, logits, targets, device=device, entropy=True, impl=impl, **options)
        plain = results(reference, logits, targets, **options)
        assert_accurate(found, plain, results(reference, logits, targets, torch.float64, **options), logits.dtype)
        return found

    return check


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_temperatures(check, dtype, temperature):
    check(*draw(4, 70, dtype=dtype), temperature=temperature)


@pytest.mark.parametrize(
    "shape", [(5,), (0, 5), (1, 1), (1, 7), (5, 1), (20, 2), (3, 127), (2, 300), (2, 3, 33), (2, 0, 3), (2, 1, 2, 9)]
)
def test_odd_shapes(check, shape):
    """One row without a batch, no rows, one token, whole and partial blocks, more than one leading dimension."""
    check(*draw(*shape, dtype=torch.float32))


def test_by_hand(impl, device):
    """Logits (ln 3, 0): log p = ln 3/4, entropy ln 4 - 3/4 ln 3.

    d log p_0 / d logits = (1/4, -1/4); d H / d logit_0 = -p_0 (log p_0 + H) = -3/4 (ln 3 - 3/4 ln 3) = -3/16 ln 3.
    """
    logits = torch.tensor([[math.log(3), 0.0]], device=device, requires_grad=True)
    targets = torch.tensor([0], device=device)
    logprobs, entropies = token_logprobs(logits, targets, entropy=True, impl=impl)
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert entropies.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-6)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    assert gradient.flatten().tolist() == pytest.approx([0.25, -0.25], abs=1e-6)
    (gradient,) = torch.autograd.grad(entropies.sum(), logits)
    slope = 3 / 16 * math.log(3)
    assert gradient.flatten().tolist() == pytest.approx([-slope, slope], abs=1e-6)


def test_a_vocabulary_of_one_symbol_is_certain(impl, device):
    """Log-prob, entropy and gradient are exactly 0."""
    found = results(token_logprobs, *draw(5, 1, dtype=torch.float32), device=device, entropy=True, impl=impl)
    assert all((value == 0).all() for value in found.values())


# --------------------------------------------------------------------------------------------------------------- masks


@single_and_half
def test_masked_rows_are_not_read(check, dtype):
    logits, targets = draw(4, 2, 40, dtype=dtype)
    mask = torch.rand(4, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    spoiled = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    logits[~mask], targets[~mask] = spoiled[torch.arange(int((~mask).sum())) % 3, None], -100
    found = check(logits, targets, mask=mask, temperature=0.7)
    assert all((value[~mask] == 0).all() for value in found.values())


@pytest.mark.parametrize("kept", [0, 1, 6])
def test_few_rows_all_rows_no_rows(check, kept):
    check(*draw(6, 70, dtype=torch.float32), mask=torch.arange(6) < kept)


def test_a_row_without_gradient_is_not_read_again(impl, device):
    """Its gradient is 0, not 0 times infinity."""
    logits, targets = draw(3, 70, dtype=torch.float32)
    logits[1, 4] = math.nan
    leaf = logits.to(device).requires_grad_()
    logprobs, _ = token_logprobs(leaf, targets.to(device), impl=impl)
    torch.where(torch.tensor([True, False, True], device=device), logprobs, 0.0).sum().backward()
    assert (leaf.grad[1] == 0).all() and (leaf.grad[0] != 0).any()


# ------------------------------------------------------------------------------------------------------ memory layouts


def spread_out(logits: torch.Tensor, how: str) -> torch.Tensor:
    """(4, 3, 34) logits in a layout of their own."""
    if how == "all but the last":
        return logits[:, :-1]
    if how == "every other symbol":
        return logits.repeat_interleave(2, -1)[..., ::2]
    if how == "every other row":
        return logits.repeat_interleave(2, 1)[:, ::2]
    if how == "vocabulary first":
        return logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if how == "time first":
        return logits.transpose(0, 1)
    if how == "no rows at all":  # three strides that no two can stand for
        return logits.view(2, 2, 3, 34).transpose(1, 2)[:, :, :, 1:].transpose(0, 1)
    return logits[:, :1].expand(4, 3, 34)


LAYOUTS = [
    "all but the last", "every other symbol", "every other row", "vocabulary first", "time first", "no rows at all",
    "one row, expanded",
]  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("how", LAYOUTS)
def test_strides_do_not_matter(impl, device, how, inplace):
    logits = draw(4, 3, 34)[0].to(device)
    targets = draw(*spread_out(logits, how).shape)[1].to(device)
    gradients = []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        strided = spread_out(leaf * 1, how)
        if ours and inplace and "expanded" in how:
            with pytest.raises(ValueError, match=r"inplace_backward=True, but logits of stride .* share their memory"):
                token_logprobs(strided, targets, inplace_backward=True, impl=impl)
            return
        assert not strided.is_contiguous()
        if ours:
            found, _ = token_logprobs(strided, targets, inplace_backward=inplace, impl=impl)
        else:
            found, _ = reference(strided, targets)
        (found * torch.linspace(-1, 2, found.numel(), device=device).view(found.shape)).sum().backward()
        gradients.append(torch.cat([leaf.grad.flatten(), found.detach().flatten()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_offsets_beyond_32_bits(impl, device, assert_accurate):
    """Two rows 2^31 elements apart, in memory of which only these rows are accessed."""
    logits, targets = draw(2, 40, dtype=torch.bfloat16)
    room = torch.empty(2**31 + 40, dtype=torch.bfloat16, device=device)
    far = room.as_strided((2, 40), (2**31, 1))
    far.copy_(logits)
    plain, truth = (results(reference, logits, targets, dtype) for dtype in (torch.bfloat16, torch.float64))
    found = results(token_logprobs, far, targets, device=device, entropy=True, impl=impl)
    assert_accurate(found, plain, truth, torch.bfloat16)
    # And written there.
    targets, temperature = targets.to(device), torch.ones((), dtype=torch.float64)
    _, entropies, stats = _forward(far, targets, None, temperature, True, True, impl)
    gradients = torch.tensor([-1.0, 2.0], device=device)
    _backward_inplace(far, gradients, gradients.cos(), targets, None, entropies, stats, temperature, impl)
    torch.testing.assert_close(far.cpu(), found["gradient"], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- extreme numbers


def test_a_confident_row_still_learns(impl, device, dtype):
    """p_y = 1 / (1 + 3 e^-9): the gradient 1 - p_y = 3.70089e-4, where bfloat16 would round p_y to 1 and give 0."""
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0]], dtype=dtype, device=device, requires_grad=True)
    logprobs, _ = token_logprobs(logits, torch.tensor([0], device=device), impl=impl)
    logprobs.sum().backward()
    assert logits.grad[0, 0].item() == pytest.approx(3.70089e-4, rel=1e-2)
    assert logits.grad[0, 1].item() == pytest.approx(-3.70089e-4 / 3, rel=1e-2)
    assert logprobs.item() == pytest.approx(-3.70158e-4, rel=1e-3)


def test_a_hopeless_target_and_huge_logits(impl, device, dtype):
    """Logits of +-1e4 (exact in every dtype but bfloat16, where they are 9984): no overflow, log p about -2e4.

    Row 0: target far below, log p = -20000, gradient (-1, 1). Row 1: the same, but likely: 0 and gradient 0.
    Row 2: a tie at 1e4: -ln 2 and (1/2, -1/2). Row 3: a tie at -1e4.
    """
    big = torch.tensor(1e4, dtype=dtype).item()
    logits = torch.tensor([[big, -big], [big, -big], [big, big], [-big, -big]], dtype=dtype)
    found = results(token_logprobs, logits, torch.tensor([1, 0, 0, 0]), device=device, entropy=True, impl=impl)
    assert found["logprobs"].tolist() == pytest.approx([-2 * big, 0, -math.log(2), -math.log(2)])
    assert found["entropies"].tolist() == pytest.approx([0, 0, math.log(2), math.log(2)])
    # The weights of `results` on four rows are -1, 0, 1 and 2; a uniform or certain entropy is flat.
    flat = [[1, -1], [0, 0], [0.5, -0.5], [1, -1]]
    assert found["gradient"].tolist() == [pytest.approx(row, abs=1e-6) for row in flat]


def test_a_large_common_offset_costs_nothing(impl, device, dtype):
    """Logits 512 + (0, 4, 8) are exact in every dtype, so they must give exactly what (0, 4, 8) gives."""
    logits, targets = torch.tensor([[0.0, 4.0, 8.0], [8.0, 4.0, 8.0]], dtype=dtype), torch.tensor([0, 2])
    low, high = (
        results(token_logprobs, logits + offset, targets, device=device, entropy=True, impl=impl) for offset in (0, 512)
    )
    for name in low:
        torch.testing.assert_close(high[name], low[name], rtol=0, atol=0)


def test_logits_of_minus_infinity(check, dtype):
    """Single tokens excluded, a whole block of 32, and all tokens but one."""
    options = dict(temperature=0.7)
    logits, targets = draw(4, 100, dtype=dtype)
    logits[0, ::3], logits[1, :40], logits[2, 32:], logits[3] = -math.inf, -math.inf, -math.inf, -math.inf
    targets[0], targets[1], targets[2], targets[3] = 1, 50, 5, 70
    logits[3, 70] = -2
    found = check(logits, targets, **options)
    assert found["logprobs"][3] == found["entropies"][3] == 0
    assert (found["gradient"][logits == -math.inf] == 0).all()
    targets[0] = 0  # excluded: log 0
    assert results(token_logprobs, logits, targets, entropy=True, **options)["logprobs"][0] == -math.inf


def test_what_is_not_a_number_stays_in_its_row(impl, device):
    logits, targets = draw(5, 70, dtype=torch.float32)
    logits[1, 50], logits[2], logits[3, 3] = math.nan, -math.inf, math.inf
    found = results(token_logprobs, logits, targets, device=device, entropy=True, impl=impl)
    for value in found.values():
        assert value[1:4].isnan().any(-1).all() if value.dim() > 1 else value[1:4].isnan().all()
        assert value[[0, 4]].isfinite().all()


def test_a_target_outside_the_vocabulary(impl, device):
    """An error on the CPU. On a GPU, where that would need a synchronization, NaN, and no read out of bounds."""
    logits, _ = draw(3, 70, dtype=torch.float32)
    targets = torch.tensor([-1, 70, 5], device=device)
    if impl == "torch":
        if device == "cpu":
            with pytest.raises(RuntimeError, match="out of bounds"):
                token_logprobs(logits, targets, impl=impl)
        return
    logprobs, _ = token_logprobs(logits.to(device), targets, impl=impl)
    assert logprobs.isnan().tolist() == [True, True, False]


# ------------------------------------------------------------------------------------------------------------ autograd


def test_gradcheck(impl, device):
    logits, targets = draw(3, 5, spread=1.0)
    mask = torch.tensor([True, False, True], device=device)
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, targets.to(device), mask=mask, temperature=0.7, entropy=True, impl=impl),
        logits.to(device).requires_grad_(),
    )


def test_a_second_derivative_is_refused(impl, device):
    logits, targets = (x.to(device) for x in draw(3, 5))
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        logprobs, _ = token_logprobs(leaf * 1, targets, inplace_backward=inplace, impl=impl)
        (gradient,) = torch.autograd.grad(logprobs.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; use token_logprobs.reference.token_logprobs"):
            gradient.sum().backward()


def test_the_entropy_is_there_when_asked_for(impl, device):
    """It does not change the log-probs, and can be differentiated alone."""
    logits, targets = (x.to(device) for x in draw(3, 5))
    logits.requires_grad_()
    logprobs, entropies = token_logprobs(logits, targets, entropy=True, impl=impl)
    alone, nothing = token_logprobs(logits, targets, impl=impl)
    assert nothing is None and torch.equal(alone, logprobs)
    (found,) = torch.autograd.grad(entropies.sum(), logits)
    (truth,) = torch.autograd.grad(reference(logits, targets)[1].sum(), logits)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_no_graph_where_no_gradient_is_wanted(impl, device):
    logits, targets = (x.to(device) for x in draw(3, 5))
    assert not token_logprobs(logits, targets, entropy=True, inplace_backward=True, impl=impl)[0].requires_grad
    with torch.no_grad():
        assert not token_logprobs(logits.requires_grad_(), targets, impl=impl)[0].requires_grad


# ------------------------------------------------------------------------------------------------- overwriting logits


def computed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    return leaf, leaf + 0


@single_and_half
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_in_place_is_the_same_gradient(impl, device, dtype, masked):
    """It is written over the logits."""
    logits, targets = (x.to(device) for x in draw(3, 40, dtype=dtype))
    mask = torch.tensor([True, False, True], device=device) if masked else None
    gradients = []
    for inplace in (False, True):
        leaf, result = computed(logits)
        places = []
        result.register_hook(lambda gradient, places=places: places.append(gradient.data_ptr()))
        logprobs, entropies = token_logprobs(
            result, targets, mask=mask, temperature=0.7, entropy=True, inplace_backward=inplace, impl=impl
        )
        (logprobs.sum() + 2 * entropies.sum()).backward()
        assert (places == [result.data_ptr()]) == inplace
        assert torch.equal(result.detach(), leaf.grad if inplace else logits)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_leaf_is_not_overwritten(impl, device):
    logits, targets = (x.to(device) for x in draw(3, 5))
    with pytest.raises(ValueError, match="inplace_backward=True, but the logits are a leaf"):
        token_logprobs(logits.requires_grad_(), targets, inplace_backward=True, impl=impl)


def test_another_backward_of_the_logits_is_an_error(impl, device):
    """Their values are overwritten when another operation's backward, or a second one of this, needs them."""
    logits, targets = (x.to(device) for x in draw(3, 5))
    _, result = computed(logits)
    other = result.square().sum()
    logprobs, _ = token_logprobs(result, targets, inplace_backward=True, impl=impl)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_opcheck(everything):
    logits, targets = draw(2, 3, 7, dtype=torch.float32)
    mask = torch.arange(6).view(2, 3) < 4 if everything else None
    temperature = torch.tensor(0.7, dtype=torch.float64)
    inputs = (targets, mask, temperature, everything, False, "torch")
    torch.library.opcheck(_forward, (logits.clone().requires_grad_(), *inputs))
    logprobs, entropies, stats = _forward(logits, *inputs)
    rowwise = (torch.ones_like(logprobs), torch.ones_like(logprobs) if everything else None, targets, mask, entropies)
    torch.library.opcheck(_backward, (logits, *rowwise, stats, temperature, "torch"))
    torch.library.opcheck(_backward_inplace, (logits.clone(), *rowwise, stats, temperature, "torch"))


def test_compiled_whole_and_for_every_temperature_at_once(impl, device):
    """The first temperature is compiled as a constant, the second as an input; after that nothing is compiled."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(logits, targets, mask, temperature):
        logprobs, entropies = token_logprobs(
            logits * 2, targets, mask=mask, temperature=temperature, entropy=True, inplace_backward=True, impl=impl
        )
        return logprobs.sum() + entropies.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    logits, targets = (x.to(device) for x in draw(2, 3, 40, dtype=torch.float32))
    mask = torch.arange(6, device=device).view(2, 3) < 4
    for temperature in (0.7, 0.9, 1.1, 1.3, 1.0):
        found, truth = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        torch.testing.assert_close(
            compiled(found, targets, mask, temperature), loss(truth, targets, mask, temperature), rtol=1e-5, atol=1e-5
        )
        compiled(found, targets, mask, temperature).backward()
        loss(truth, targets, mask, temperature).backward()
        torch.testing.assert_close(found.grad, truth.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_the_kernels_compile_for_cuda(compile_for_cuda):
    """With Triton's own compiler, which rejects more than its interpreter."""
    out = compile_for_cuda(
        """
from rlhf_kernels import token_logprobs
from rlhf_kernels.token_logprobs import triton_kernel
os.environ["TRITON_INTERPRET"] = "1"
for dtype, vocabulary, masked, entropy in (
    (torch.bfloat16, 32000, False, False),
    (torch.bfloat16, 32000, True, True),
    (torch.float64, 257, True, False),
):
    leaf = torch.zeros(2, 3, vocabulary, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool) if masked else None
    targets = torch.zeros(2, 3, dtype=torch.int64)
    logprobs, entropies = token_logprobs(
        leaf[:, :, ::2] if vocabulary == 257 else leaf, targets, mask=mask, entropy=entropy, impl="triton",
    )
    (logprobs.sum() + entropies.sum() if entropy else logprobs.sum()).backward()
    if dtype == torch.bfloat16 and vocabulary == 32000:  # 128 bits at a time
        (_, forward), (_, backward) = compiled_kernels[-2:]
        assert "ld.global.v4.b32" in forward and "ld.global.v4.b32" in backward and "st.global.v4.b32" in backward
print(len(compiled_kernels))
"""
    )
    assert int(out) == 6


# -------------------------------------------------------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, other than those given."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.elements, self.given = 0, [tensor.data_ptr() for tensor in given]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_no_tensor_larger_than_a_tile(entropy, masked):
    """The torch path allocates tiles of 300 tokens, six rows of 50, and otherwise at most two numbers per row."""
    logits, targets = draw(400, 50, dtype=torch.bfloat16)
    logits, targets = logits[None], targets[None]
    mask = (torch.arange(400) % 3 > 0)[None] if masked else None
    with LargestTensor(logits) as forward:
        _, entropies, stats = torch_path.forward(logits, targets, mask, 0.7, entropy)
    ones = torch.ones(1, 400)
    with LargestTensor(logits) as backward:
        torch_path.backward(logits, logits, ones, ones if entropy else None, targets, mask, entropies, stats, 0.7)
    assert max(forward.elements, backward.elements) <= 2 * 400


def test_the_instrument_sees_the_definition():
    logits, targets = draw(400, 50, dtype=torch.bfloat16)
    with LargestTensor() as memory:
        reference(logits, targets)
    assert memory.elements == 400 * 50


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=0.0), "temperature=0.0: expected more than 0"),
        (dict(temperature=math.nan), "temperature=nan: expected more than 0"),
        (dict(logits=torch.zeros(2, 0)), r"logits of shape \(2, 0\): expected \(..., V\) with V at least 1"),
        (dict(logits=torch.tensor(1.0)), r"logits of shape \(\): expected"),
        (dict(logits=torch.zeros(2, 3, dtype=torch.int64)), "logits.dtype=torch.int64: expected a floating dtype"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"targets of shape \(3,\): expected \(2,\)"),
        (dict(targets=torch.zeros(2)), "targets.dtype=torch.float32: expected torch.int64"),
        (dict(targets=torch.zeros(2, dtype=torch.int64, device="meta")), "targets is on meta, the logits on cpu"),
        (dict(mask=torch.ones(2, 1, dtype=torch.bool)), r"mask of shape \(2, 1\): expected \(2,\)"),
        (dict(mask=torch.ones(2)), "mask.dtype=torch.float32: expected torch.bool"),
        (dict(impl="numpy"), "impl='numpy': expected one of auto, torch, triton"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    arguments = dict(logits=torch.zeros(2, 3), targets=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


# ------------------------------------------------------------------------------------------------------------ in a loop


@pytest.mark.slow
def test_thirty_steps_of_training_are_the_same(impl, device):
    """A table of bigrams that is trained on a text in float64 ends as with the definition."""
    text = torch.randint(12, (9,), generator=torch.Generator().manual_seed(0)).to(device)
    tables = []
    for function in (reference, lambda *inputs, **options: token_logprobs(*inputs, impl=impl, **options)):
        table = torch.zeros(12, 12, dtype=torch.float64, device=device, requires_grad=True)
        optimizer = torch.optim.AdamW([table], lr=0.1)
        for _ in range(30):
            logprobs, _ = function(table[text[:-1]], text[1:], temperature=0.9)
            optimizer.zero_grad()
            (-logprobs.mean()).backward()
            optimizer.step()
        tables.append(table.detach())
    torch.testing.assert_close(*tables, rtol=0, atol=1e-9)
