"""Divergences from logits, both implementations, compared with the definition by `assert_accurate` of conftest.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rlhf_kernels import common, kl_divergence
from rlhf_kernels.kl_divergence import _backward, _forward
from rlhf_kernels.kl_divergence.reference import kl_divergence as reference

every_kind = pytest.mark.parametrize("kind", ["reverse", "forward", "js"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Split small shapes into several tiles of the torch path and several blocks of the Triton path."""
    monkeypatch.setattr(common, "_CPU_TILE", 300 // torch.get_num_threads())
    if "impl" in request.fixturenames and request.getfixturevalue("impl") == "triton":
        from rlhf_kernels import triton_rows

        monkeypatch.setattr(triton_rows, "LARGEST_BLOCK", 32)


def draw(*shape: int, dtype=torch.float64, spread=1.5, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return policy and reference logits that have half of their spread in common."""
    generator = torch.Generator().manual_seed(seed)
    common, policy, ref = spread * torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    return (common + policy).to(dtype), (common + ref).to(dtype)


def results(function, policy, ref, dtype=None, *, device="cpu", **options) -> dict[str, torch.Tensor]:
    """Return divergences, entropies, and the gradient of an uneven sum of the two, in `dtype`."""
    leaf, ref = (logits.detach().to(device, dtype or logits.dtype) for logits in (policy, ref))
    divergence, entropies = function(leaf.requires_grad_(), ref, **options)
    weights = torch.linspace(-1, 2, divergence.numel(), dtype=divergence.dtype, device=device).view(divergence.shape)
    ((divergence * weights).sum() + (entropies * weights.cos()).sum()).backward()
    found = dict(divergence=divergence, entropies=entropies, gradient=leaf.grad)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


@pytest.fixture
def check(impl, device, assert_accurate):
    """Compare an implementation with the definition on these inputs."""

    def check(policy, ref, *, scale=1e-3, **options):
        found = results(kl_divergence, policy, ref, device=device, entropy=True, impl=impl, **options)
        plain = results(reference, policy, ref, **options)
        assert_accurate(found, plain, results(reference, policy, ref, torch.float64, **options), policy.dtype, scale)
        return found

    return check


@every_kind
def test_kinds_and_a_temperature(check, dtype, kind):
    check(*draw(4, 70, dtype=dtype), kind=kind, temperature=0.7)


@every_kind
@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 1), (1, 7), (5, 1), (3, 127), (2, 200), (2, 3, 33)])
def test_odd_shapes(check, kind, shape):
    """One row without a batch, no rows, one token, whole and partial blocks, more than one leading dimension."""
    check(*draw(*shape, dtype=torch.float32), kind=kind)


def test_by_hand(impl, device):
    """p = (3/4, 1/4), q = (1/2, 1/2), m = (5/8, 3/8).

    reverse: 3/4 ln 3/2 + 1/4 ln 1/2; forward: 1/2 ln 2/3 + 1/2 ln 2;
    js: (3/4 ln 6/5 + 1/4 ln 2/3 + 1/2 ln 4/5 + 1/2 ln 4/3) / 2; entropy: ln 4 - 3/4 ln 3.
    d forward / d policy = p - q = (1/4, -1/4).
    """
    policy = torch.tensor([[math.log(3), 0.0]], device=device, requires_grad=True)
    ref = torch.zeros(1, 2, device=device)
    log = math.log
    truth = {
        "reverse": 0.75 * log(1.5) + 0.25 * log(0.5),
        "forward": 0.5 * log(2 / 3) + 0.5 * log(2),
        "js": (0.75 * log(1.2) + 0.25 * log(2 / 3) + 0.5 * log(0.8) + 0.5 * log(4 / 3)) / 2,
    }
    for kind, value in truth.items():
        divergence, entropies = kl_divergence(policy, ref, kind=kind, entropy=True, impl=impl)
        assert divergence.item() == pytest.approx(value, abs=1e-6)
        assert entropies.item() == pytest.approx(log(4) - 0.75 * log(3), abs=1e-6)
    (gradient,) = torch.autograd.grad(kl_divergence(policy, ref, kind="forward", impl=impl)[0].sum(), policy)
    assert gradient.flatten().tolist() == pytest.approx([0.25, -0.25], abs=1e-6)


@every_kind
def test_equal_distributions_have_no_divergence(impl, device, kind):
    """Also if their logits differ by a constant; and the gradient is 0."""
    policy, _ = draw(2, 40, dtype=torch.float32)
    policy = policy.mul(2).round() / 2  # so that the sum is exact
    for offset in (0, 64):
        leaf = policy.to(device).requires_grad_()
        divergence, _ = kl_divergence(leaf, leaf.detach() + offset, kind=kind, impl=impl)
        divergence.sum().backward()
        assert divergence.abs().max() < 1e-6
        assert leaf.grad.abs().max() < 1e-6


def test_a_row_without_gradient_is_not_read_again(impl, device):
    """Its gradient is 0, not 0 times NaN."""
    policy, ref = draw(3, 70, dtype=torch.float32)
    policy[1, 4] = math.nan
    leaf = policy.to(device).requires_grad_()
    divergence, _ = kl_divergence(leaf, ref.to(device), impl=impl)
    torch.where(torch.tensor([True, False, True], device=device), divergence, 0.0).sum().backward()
    assert (leaf.grad[1] == 0).all() and (leaf.grad[0] != 0).any() and (leaf.grad[2] != 0).any()


@pytest.mark.parametrize("kind", ["reverse", "js"])
@pytest.mark.parametrize("how", ["all but the last", "vocabulary first", "expanded", "no rows at all"])
def test_strides_do_not_matter(impl, device, kind, how):
    """The two sides may have different strides, and either may be the strided one."""

    def spread_out(logits):
        if how == "all but the last":
            return logits[:, :-1]
        if how == "vocabulary first":
            return logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)[:, :-1]
        if how == "no rows at all":
            return logits.view(2, 2, 3, 34).transpose(1, 2)[:, :, :, 1:].transpose(0, 1)
        return logits[:, :1].expand(4, 2, 34)

    policy, ref = draw(4, 3, 34)
    for swap in (False, True):
        gradients = []
        for ours in (True, False):
            leaves = [logits.clone().to(device).requires_grad_() for logits in (policy, ref)]
            first = spread_out(leaves[0])
            second = leaves[1].flatten()[: first.numel()].view(first.shape)
            sides = (second, first.detach()) if swap else (first, second.detach())
            found, _ = kl_divergence(*sides, kind=kind, impl=impl) if ours else reference(*sides, kind=kind)
            (found * torch.linspace(-1, 2, found.numel(), device=device).view(found.shape)).sum().backward()
            gradients.append(torch.cat([leaves[swap].grad.flatten(), found.detach().flatten()]))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_offsets_beyond_32_bits(impl, device, assert_accurate):
    """Two rows 2^31 elements apart, in memory of which only these rows are accessed."""
    policy, ref = draw(2, 40, dtype=torch.bfloat16)
    room = torch.empty(2**31 + 40, dtype=torch.bfloat16, device=device)
    far = room.as_strided((2, 40), (2**31, 1))
    far.copy_(policy)
    plain, truth = (results(reference, policy, ref, dtype) for dtype in (torch.bfloat16, torch.float64))
    found = results(kl_divergence, far, ref, device=device, entropy=True, impl=impl)
    assert_accurate(found, plain, truth, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------- extreme numbers


@every_kind
def test_the_two_sides_may_differ_in_dtype(impl, device, kind):
    """A policy in float32 and a reference in bfloat16, and the other way round; the gradient has the policy's dtype."""
    single, half = draw(3, 70, dtype=torch.float32)
    half = half.bfloat16()
    for policy, ref in ((single, half), (half, single)):
        found = results(kl_divergence, policy, ref, device=device, kind=kind, entropy=True, impl=impl)
        truth = results(reference, policy, ref, torch.float64, kind=kind)
        assert found["gradient"].dtype == policy.dtype
        for name, value in truth.items():
            rtol = 2**-7 if found[name].dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found[name].double(), value, rtol=rtol, atol=1e-5)


@every_kind
def test_what_both_sides_exclude_contributes_nothing(check, kind):
    """-inf at the same tokens of both: single ones, and the whole first block of 32."""
    policy, ref = draw(3, 100, dtype=torch.float32)
    for logits in (policy, ref):
        logits[0, ::3], logits[1, :40] = -math.inf, -math.inf
    check(policy, ref, kind=kind)


def test_what_one_side_excludes(impl, device):
    """KL(p || q) is infinite where only q excludes a token, and finite where only p does; JS is always finite.

    Row 0: the reference excludes the first token; row 1: the policy does. p and q are (1/2, 1/2) and (0, 1), or
    the other way round: KL((0, 1) || (1/2, 1/2)) = ln 2.
    """
    allowed, forbidden = torch.zeros(2), torch.tensor([-math.inf, 0.0])
    policy, ref = torch.stack([allowed, forbidden]).to(device), torch.stack([forbidden, allowed]).to(device)
    assert kl_divergence(policy, ref, impl=impl)[0].tolist() == [math.inf, pytest.approx(math.log(2))]
    assert kl_divergence(policy, ref, kind="forward", impl=impl)[0].tolist() == [pytest.approx(math.log(2)), math.inf]
    # m = (1/4, 3/4): (1/2 ln 2 + 1/2 ln 2/3 + ln 4/3) / 2 either way
    js = (0.5 * math.log(2) + 0.5 * math.log(2 / 3) + math.log(4 / 3)) / 2
    policy.requires_grad_()
    found, _ = kl_divergence(policy, ref, kind="js", impl=impl)
    assert found.tolist() == pytest.approx([js, js])
    found.sum().backward()
    assert policy.grad.isfinite().all()


def test_infinite_in_one_block_and_then_more_blocks(impl, device):
    """The infinity is kept while the sums are scaled to a higher peak, and dropped if its probability becomes 0."""
    policy, ref = torch.zeros(2, 100), torch.zeros(2, 100)
    ref[:, 3] = -math.inf
    policy[0, 70], policy[1, 70] = 5.0, 500.0
    found, _ = kl_divergence(policy.to(device), ref.to(device), impl=impl)
    assert found.tolist() == [math.inf, pytest.approx(math.log(99))]


@every_kind
def test_far_apart_and_confident(check, kind):
    """The policy is sure of one symbol, the reference of another: large and finite.

    The gradient p (log(p / q) - D) is a small difference of numbers of the size of D, about 40, and rounds as they do.
    """
    policy, ref = draw(2, 40, dtype=torch.float32)
    policy[:, 5] += 40
    ref[:, 35] += 40
    check(policy, ref, kind=kind, scale=40.0)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_common_offset_changes_nothing(impl, device, dtype, kind):
    """Logits 512 + (0, 4, 8) are exact in every dtype, so the result is exactly that of (0, 4, 8)."""
    policy, ref = torch.tensor([[0.0, 4.0, 8.0]], dtype=dtype), torch.tensor([[8.0, 4.0, 0.0]], dtype=dtype)
    options = dict(device=device, kind=kind, entropy=True, impl=impl)
    low = results(kl_divergence, policy, ref, **options)
    for offsets in ((512, 512), (512, 0)):
        high = results(kl_divergence, policy + offsets[0], ref + offsets[1], **options)
        for name in low:
            torch.testing.assert_close(high[name], low[name], rtol=0, atol=0)


@every_kind
def test_what_is_not_a_number_stays_in_its_row(impl, device, kind):
    policy, ref = draw(5, 70, dtype=torch.float32)
    policy[1, 50], policy[2], ref[3, 3] = math.nan, -math.inf, math.nan
    found, _ = kl_divergence(policy.to(device), ref.to(device), kind=kind, impl=impl)
    assert found.isnan().tolist() == [False, True, True, True, False]


# ------------------------------------------------------------------------------------------------------------ autograd


@every_kind
def test_gradcheck(impl, device, kind):
    policy, ref = (logits.to(device) for logits in draw(2, 4, spread=0.7))
    options = dict(kind=kind, temperature=0.8, entropy=True, impl=impl)
    assert torch.autograd.gradcheck(lambda p: kl_divergence(p, ref, **options), policy.requires_grad_())


def test_the_reference_is_a_constant(impl, device):
    policy, ref = (logits.to(device).requires_grad_() for logits in draw(3, 5))
    kl_divergence(policy, ref, impl=impl)[0].sum().backward()
    assert policy.grad is not None and ref.grad is None


def test_the_entropy_is_there_when_asked_for(impl, device):
    """It does not change the divergence, and can be differentiated alone."""
    policy, ref = (logits.to(device) for logits in draw(3, 5))
    policy.requires_grad_()
    for kind in ("reverse", "forward", "js"):
        divergence, entropies = kl_divergence(policy, ref, kind=kind, entropy=True, impl=impl)
        alone, nothing = kl_divergence(policy, ref, kind=kind, impl=impl)
        assert nothing is None and torch.equal(alone, divergence)
        (found,) = torch.autograd.grad(entropies.sum(), policy)
        (truth,) = torch.autograd.grad(reference(policy, ref)[1].sum(), policy)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused(impl, device):
    policy, ref = (logits.to(device).requires_grad_() for logits in draw(3, 5))
    divergence, _ = kl_divergence(policy, ref, impl=impl)
    (gradient,) = torch.autograd.grad(divergence.square().sum(), policy, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use kl_divergence.reference.kl_divergence for one"):
        gradient.sum().backward()


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize(("kind", "entropy"), [("reverse", True), ("js", False)])
def test_opcheck(kind, entropy):
    policy, ref = draw(2, 3, 7, dtype=torch.float32)
    temperature = torch.tensor(0.7, dtype=torch.float64)
    inputs = (temperature, kind, entropy, "torch")
    torch.library.opcheck(_forward, (policy.clone().requires_grad_(), ref, *inputs))
    divergence, entropies, stats = _forward(policy, ref, *inputs)
    ones = torch.ones_like(divergence)
    rowwise = (ones, ones if entropy else None, divergence, entropies)
    torch.library.opcheck(_backward, (policy, ref, *rowwise, stats, temperature, kind, "torch"))


@pytest.mark.parametrize("kind", ["reverse", "js"])
def test_compiled_whole_and_for_every_temperature_at_once(impl, device, kind):
    """The first temperature is compiled as a constant, the second as an input; after that nothing is compiled."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(policy, ref, temperature):
        divergence, entropies = kl_divergence(
            policy * 2, ref, kind=kind, temperature=temperature, entropy=True, impl=impl
        )
        return divergence.sum() + entropies.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    policy, ref = (logits.to(device) for logits in draw(2, 3, 40, dtype=torch.float32))
    for temperature in (0.7, 0.9, 1.1, 1.0):
        found, truth = (policy.clone().requires_grad_() for _ in range(2))
        value, expected = compiled(found, ref, temperature), loss(truth, ref, temperature)
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.grad, truth.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_the_kernels_compile_for_cuda(compile_for_cuda):
    """With Triton's own compiler, which rejects more than its interpreter."""
    out = compile_for_cuda(
        """
from rlhf_kernels import kl_divergence
from rlhf_kernels.kl_divergence import triton_kernel
os.environ["TRITON_INTERPRET"] = "1"
for kind, dtype, vocabulary, entropy in (
    ("reverse", torch.bfloat16, 32000, False),
    ("forward", torch.float64, 257, True),
    ("js", torch.bfloat16, 32000, True),
):
    policy, ref = (torch.zeros(2, 3, vocabulary, dtype=dtype, requires_grad=True) for _ in "pq")
    ref = ref[:, :, ::2].repeat(1, 1, 2)[..., :vocabulary]
    divergence, entropies = kl_divergence(policy, ref, kind=kind, entropy=entropy, impl="triton")
    (divergence.sum() + entropies.sum() if entropy else divergence.sum()).backward()
    if vocabulary == 32000:  # 128 bits at a time
        (_, forward), (_, backward) = compiled_kernels[-2:]
        assert "ld.global.v4.b32" in forward and "ld.global.v4.b32" in backward and "st.global.v4.b32" in backward
print(len(compiled_kernels))
"""
    )
    assert int(out) == 6


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="symmetric"), "kind='symmetric': expected one of reverse, forward, js"),
        (dict(temperature=0.0), "temperature=0.0: expected more than 0"),
        (dict(policy_logits=torch.zeros(2, 0)), r"policy_logits of shape \(2, 0\): expected \(..., V\)"),
        (dict(ref_logits=torch.zeros(2, 3).int()), "ref_logits.dtype=torch.int32: expected a floating dtype"),
        (dict(ref_logits=torch.zeros(1, 3)), r"policy_logits are \(2, 3\) on cpu, ref_logits \(1, 3\) on cpu"),
        (dict(ref_logits=torch.zeros(2, 3, device="meta")), r"ref_logits \(2, 3\) on meta: expected the same"),
        (dict(impl="numpy"), "impl='numpy': expected one of auto, torch, triton"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    arguments = dict(policy_logits=torch.zeros(2, 3), ref_logits=torch.zeros(2, 3)) | change
    with pytest.raises(ValueError, match=message):
        kl_divergence(**arguments)


def test_it_is_the_mean_of_k1(impl, device):
    """The mean of log p - log q over samples of the policy, by enumeration."""
    policy, ref = (logits.to(device) for logits in draw(4, 9))
    log_p, log_q = policy.log_softmax(-1), ref.log_softmax(-1)
    found, _ = kl_divergence(policy, ref, impl=impl)
    torch.testing.assert_close(found, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=0, atol=1e-12)
