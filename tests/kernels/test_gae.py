"""GAE, both implementations, compared with the loop over tokens."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.ops.advantages import gae as advantages_and_returns
from rlhf_kernels.gae import gae
from rlhf_kernels.gae.reference import gae as reference
from rlhf_kernels.registry import has_triton, implementation, use_impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (1, 33), (3, 127), (5, 40), (2, 16)]
DISCOUNTS = [(0.99, 0.95), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Split short rows into several blocks; the interpreter, which scans one column at a time, is fast enough then."""
    if has_triton():
        monkeypatch.setattr(implementation("gae", "triton"), "_BLOCK", 16)


def draw(rows: int, columns: int, dtype=torch.float32, layout: str = "holes") -> dict[str, torch.Tensor]:
    """Return inputs on the device, NaN or infinite outside the mask."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    rewards, values = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "holes":
        mask = torch.rand(rows, columns, generator=generator) < 0.7
    else:
        lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
        mask = torch.arange(columns) < lengths
        mask = mask.flip(1) if layout == "left" else mask
    rewards[~mask], values[~mask] = float("nan"), float("inf")
    bootstrap = torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)
    inputs = dict(rewards=rewards, values=values, mask=mask, bootstrap=bootstrap)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def assert_equal(results, truth, tolerance=1e-5):
    for ours, true in zip(results, truth, strict=True):
        assert ours.dtype == true.dtype and ours.shape == true.shape
        torch.testing.assert_close(ours, true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["holes", "right", "left"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_it_is_the_loop(impl, rows, columns, layout):
    inputs = draw(rows, columns, layout=layout)
    options = dict(gamma=0.99, lam=0.95, whiten=True)
    assert_equal(gae(**inputs, **options, impl=impl), reference(**inputs, **options))


@pytest.mark.parametrize("bootstrap", [False, True], ids=["end", "bootstrap"])
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_discounts(impl, gamma, lam, bootstrap):
    inputs = draw(3, 40)
    if not bootstrap:
        inputs["bootstrap"] = None
    assert_equal(gae(**inputs, gamma=gamma, lam=lam, impl=impl), reference(**inputs, gamma=gamma, lam=lam))


def test_by_hand(impl):
    """gamma 1/2, lambda 1/2; the second token is masked.

    Last token: delta = 4 + 1/2 * 8 - 2 = 6. First: delta = 1 + 1/2 * 2 - 3 = -1, A = -1 + 1/4 * 6 = 1/2.
    """
    rewards, values = torch.tensor([[1.0, 99, 4]]), torch.tensor([[3.0, 99, 2]])
    mask = torch.tensor([[True, False, True]])
    inputs = [x.to(DEVICE) for x in (rewards, values, mask)]
    advantages, returns = gae(*inputs, gamma=0.5, lam=0.5, bootstrap=inputs[0].new_tensor([8.0]), impl=impl)
    assert advantages.tolist() == [[0.5, 0, 6]]
    assert returns.tolist() == [[3.5, 0, 8]]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)], ids=str
)
def test_dtypes(impl, dtype, tolerance):
    """The half types are computed and returned in float32, so as exact as the loop in float32 is."""
    inputs = draw(3, 40, dtype)
    options = dict(gamma=0.99, lam=0.95, whiten=True)
    assert_equal(gae(**inputs, **options, impl=impl), reference(**inputs, **options), tolerance)


def test_any_stride(impl):
    """Columns first, every second column, and one value for a whole row."""
    inputs = draw(6, 40)
    strided = dict(
        rewards=inputs["rewards"].t().contiguous().t(),
        values=torch.stack([inputs["values"], torch.full((6, 40), 7.0, device=DEVICE)], -1)[..., 0],
        mask=torch.ones(6, 1, dtype=torch.bool, device=DEVICE).expand(6, 40),
        bootstrap=inputs["bootstrap"].expand(4, 6).t()[:, 2],
    )
    inputs = {name: x.nan_to_num(posinf=0.5) if x.is_floating_point() else x for name, x in strided.items()}
    plain = {name: x.contiguous() for name, x in inputs.items()}
    assert_equal(gae(**inputs, gamma=0.9, lam=0.8, impl=impl), reference(**plain, gamma=0.9, lam=0.8))


@pytest.mark.parametrize("whiten", [False, True], ids=["raw", "whitened"])
def test_all_tokens_masked(impl, whiten):
    inputs = draw(3, 20)
    inputs["mask"] = torch.zeros(3, 20, dtype=torch.bool, device=DEVICE)
    for result in gae(**inputs, gamma=0.9, lam=0.8, whiten=whiten, impl=impl):
        assert torch.equal(result, torch.zeros_like(result)) and result.shape == (3, 20)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(impl, shape):
    nothing = torch.empty(shape, device=DEVICE)
    for result in gae(nothing, nothing, nothing.bool(), gamma=0.9, lam=0.8, whiten=True, impl=impl):
        assert result.shape == shape


def test_long_rows(impl):
    """A discount to the power of a thousand is 0 in float32, without NaN."""
    inputs = draw(1, 1100, layout="right")
    inputs["mask"] = torch.ones(1, 1100, dtype=torch.bool, device=DEVICE)
    inputs |= {name: inputs[name].nan_to_num(posinf=0.0) for name in ("rewards", "values")}
    assert_equal(gae(**inputs, gamma=0.5, lam=0.5, impl=impl), reference(**inputs, gamma=0.5, lam=0.5))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_whitening(impl, offset):
    """Mean 0 and variance 1, the same returns; also far from 0, where a sum of squares would lose all digits."""
    inputs = draw(5, 40)
    inputs["rewards"] = inputs["rewards"] + offset
    options = dict(gamma=1.0, lam=0.0, impl=impl)
    advantages, returns = gae(**inputs, whiten=True, **options)
    kept = advantages[inputs["mask"]].double()
    assert abs(kept.mean().item()) < 1e-4 and abs(kept.var(correction=0).item() - 1) < 1e-4
    assert torch.equal(returns, gae(**inputs, **options)[1])


def test_how_the_rows_are_divided_does_not_matter(monkeypatch):
    """One launch or two, one program or several, partial statistics combined in one step or in two."""
    triton_kernel, inputs = implementation("gae", "triton"), draw(7, 40)
    options = dict(gamma=0.99, lam=0.95, whiten=True)
    truth = reference(**inputs, **options)
    together = (1,) if DEVICE == "cpu" else (1, 2, 7)  # in the interpreter several programs cannot synchronize
    for programs, launches in [(number, 1) for number in together] + [(1, 2), (2, 2), (7, 2)]:
        monkeypatch.setattr(triton_kernel, "_resident_programs", lambda device, programs=programs: programs)
        assert_equal(triton_kernel.gae(**inputs, **options, launches=launches), truth)
    monkeypatch.setattr(triton_kernel, "_PARTS", 4)
    assert_equal(triton_kernel.gae(**inputs, **options, launches=2), truth)


def test_the_same_twice(impl):
    inputs = draw(7, 40)
    first, second = (gae(**inputs, gamma=0.99, lam=0.95, whiten=True, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_advantages_are_constants(impl):
    inputs = draw(2, 9)
    inputs["values"] = inputs["values"].requires_grad_()
    advantages, _ = gae(**inputs, gamma=0.9, lam=0.8, impl=impl)
    with pytest.raises(RuntimeError, match="gae has no derivative; use rlhf_kernels.gae.reference.gae"):
        advantages.sum().backward()


def test_it_compiles_whole(impl):
    inputs = draw(3, 20)
    compiled = torch.compile(lambda **x: gae(**x, gamma=0.9, lam=0.8, whiten=True), backend="aot_eager", fullgraph=True)
    with use_impl(impl):
        assert_equal(compiled(**inputs), reference(**inputs, gamma=0.9, lam=0.8, whiten=True))
    torch._dynamo.reset()


def test_it_compiles_for_cuda(compile_for_cuda):
    """The synchronization inside one launch, which the interpreter cannot run, is a release and an acquire."""
    output = compile_for_cuda(
        "from rlhf_kernels.gae import triton_kernel\n"
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "for dtype in (torch.float32, torch.float64):\n"
        "    rewards = torch.zeros(3, 2048, dtype=dtype)\n"
        "    options = dict(gamma=0.99, lam=0.95, bootstrap=rewards[:, 0])\n"
        "    triton_kernel.gae(rewards, rewards, rewards == 0, **options)\n"
        "    for launches in (1, 2):\n"
        "        triton_kernel.gae(rewards, rewards, rewards == 0, **options, whiten=True, launches=launches)\n"
        "for name, ptx in compiled_kernels:\n"
        "    waits = 'atom.global.gpu.acq_rel.add' in ptx and 'ld.global.gpu.acquire' in ptx\n"
        "    print(name, waits, 'red.global' in ptx or 'atom.global.add.f' in ptx)\n"
    )
    once = ["_gae_kernel False False", "_gae_kernel True False", "_gae_kernel False False", "_gae_kernel False False"]
    assert output.splitlines() == 2 * once


def test_ops_gae_uses_the_kernel(impl):
    """But not where a gradient is wanted, which the kernel does not have."""
    inputs = draw(5, 40)
    options = dict(gamma=0.99, lam=0.95)
    with use_impl(impl):
        assert_equal(advantages_and_returns(**inputs, **options), reference(**inputs, **options))
        rewards = inputs.pop("rewards").requires_grad_()
        advantages, _ = advantages_and_returns(rewards, **inputs, **options)
    advantages.sum().backward()
    assert (rewards.grad[inputs["mask"]] >= 1).all()


def test_what_it_refuses():
    inputs = draw(2, 9)
    options = dict(gamma=0.9, lam=0.8)
    with pytest.raises(ValueError, match="gamma=1.5: expected 0 to 1"):
        gae(**inputs, gamma=1.5, lam=0.8)
    with pytest.raises(ValueError, match="lam=-1: expected 0 to 1"):
        gae(**inputs, gamma=0.9, lam=-1)
    with pytest.raises(ValueError, match=r"values of shape \(2, 8\): expected that of rewards, \(2, 9\)"):
        gae(**inputs | {"values": torch.zeros(2, 8)}, **options)
    with pytest.raises(ValueError, match=r"bootstrap of shape \(3,\): expected one value a row, \(2,\)"):
        gae(**inputs | {"bootstrap": torch.zeros(3)}, **options)
    with pytest.raises(ValueError, match=r"rewards of shape \(9,\): expected \(B, T\)"):
        gae(torch.zeros(9), torch.zeros(9), torch.ones(9, dtype=torch.bool), **options)
    with pytest.raises(ValueError, match="mask of dtype torch.float32: expected bool"):
        gae(**inputs | {"mask": torch.ones(2, 9)}, **options)
    with pytest.raises(ValueError, match="impl='cuda'"):
        gae(**inputs, **options, impl="cuda")
