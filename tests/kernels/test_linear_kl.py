"""The exact divergence between two heads, against its definition; both paths (see conftest.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels.linear_kl import _backward, _forward, linear_kl
from rlhf_kernels.linear_kl.reference import linear_kl as reference
from rlhf_kernels.registry import implementation, use_impl

KINDS = ("reverse", "forward", "js")
KEEP, RECOMPUTE = 1 << 29, 0
BLOCK_ROWS = 4
# Of the size of the true values. Half a unit in the last place of the half types, which are rounded once.
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
INPUTS = ("policy_hidden", "policy_weight", "ref_hidden", "ref_weight", "policy_bias", "ref_bias")
every_kind = pytest.mark.parametrize("kind", KINDS)
both_modes = pytest.mark.parametrize("keep_bytes", [KEEP, RECOMPUTE], ids=["keep", "recompute"])


@pytest.fixture(autouse=True)
def small(impl, device, monkeypatch):
    """Small blocks, tiles and steps, so that small inputs take several of each; on the GPU if there is one."""
    path = implementation("linear_kl", impl)
    monkeypatch.setattr(path, "block_rows", lambda weight: BLOCK_ROWS)
    monkeypatch.setattr("rlhf_kernels.common._CPU_TILE", 128)
    if impl == "triton":
        monkeypatch.setattr("rlhf_kernels.triton_rows.LARGEST_BLOCK", 64)
    with use_impl(impl), torch.device(device):
        yield


def draw(rows: int, vocabulary: int, dtype=torch.float64, *, bias=True, seed=0, widths=(8, 5), near=None) -> dict:
    """Two heads of different widths; or, with `near`, one and the same but for noise of that size on the weight."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()

    def normal(*shape, spread=1.0):
        return spread * torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")

    values = {}
    for head, width in zip(("policy", "ref"), widths, strict=True):
        values[f"{head}_hidden"] = normal(rows, width)
        values[f"{head}_weight"] = normal(vocabulary, width, spread=2 / math.sqrt(width))
        if bias:
            values[f"{head}_bias"] = normal(vocabulary)
    if near is not None:
        values["ref_hidden"] = values["policy_hidden"].clone()
        values["ref_weight"] = values["policy_weight"] + near * normal(*values["policy_weight"].shape)
    return {name: x.to(device, dtype).requires_grad_() for name, x in values.items()}


def results(function, inputs: dict, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    """Divergences, entropies, and the gradients of an unevenly weighted sum of the divergences."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    divergence, entropy = function(**leaves, **options)
    weights = torch.linspace(-1, 2, len(divergence), dtype=divergence.dtype)
    (divergence * weights).sum().backward()
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return dict(divergence=divergence.detach(), entropy=entropy.detach(), **gradients)


@both_modes
@every_kind
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 7), (4, 67), (9, 67), (5, 257)])
def test_as_good_as_the_definition(impl, dtype, kind, keep_bytes, rows, vocabulary):
    """Error, the root of its mean square over many draws, at most the definition's own in that dtype, plus rounding.

    In a single draw, and of the largest error, the ratio of the two is a matter of luck: a factor of 2 either way. Over
    60 draws in float32 it is 0.67 to 1.04, by gradient and kind. The interpreter is too slow for as many.
    """
    both = dict(both_gradients=True, entropy=True, keep_bytes=keep_bytes)
    errors = {}
    for seed in range(12 if impl == "torch" else 3):
        inputs = draw(rows, vocabulary, dtype, seed=seed)
        truth = results(reference, inputs, torch.float64, kind=kind)
        plain = results(reference, inputs, dtype, kind=kind)
        found = results(linear_kl, inputs, dtype, kind=kind, **both)
        for name, value in truth.items():
            assert found[name].dtype == plain[name].dtype and found[name].shape == value.shape
            errors.setdefault(name, []).append([(x - value).flatten() for x in (found[name], plain[name], 0)])
    for name, draws in errors.items():
        ours, theirs, size = (torch.cat(parts).double() for parts in zip(*draws, strict=True))
        rounding = ROUNDING[dtype]
        rms = [x.square().mean().sqrt() for x in (ours, theirs, size)]
        assert rms[0] <= 1.2 * rms[1] + rounding * rms[2].clamp(min=1e-2), name
        assert ours.abs().max() <= 3 * theirs.abs().max() + 2 * rounding * size.abs().max().clamp(min=1e-2), name


@both_modes
@every_kind
@pytest.mark.parametrize("options", [dict(temperature=0.7), dict(scale=0.25, temperature=1.5)], ids=str)
def test_temperature_and_scale(kind, keep_bytes, options):
    inputs = draw(9, 67)
    truth = results(reference, inputs, torch.float64, kind=kind, **options)
    both = dict(both_gradients=True, entropy=True, keep_bytes=keep_bytes)
    found = results(linear_kl, inputs, torch.float64, kind=kind, **both, **options)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@both_modes
@every_kind
@pytest.mark.parametrize("options", [dict(softcap=3.0), dict(scale=-0.5), dict(softcap=3.0, scale=0.5)], ids=str)
def test_softcap_and_negative_scale(impl, kind, keep_bytes, options):
    """In torch alone: Triton asked for by name refuses, and "auto" does not ask it."""
    inputs = draw(9, 67)
    both = dict(both_gradients=True, entropy=True, keep_bytes=keep_bytes)
    if impl == "triton":
        with pytest.raises(RuntimeError, match="takes no softcap"):
            linear_kl(**inputs, impl="triton", **options)
    truth = results(reference, inputs, torch.float64, kind=kind, **options)
    found = results(linear_kl, inputs, torch.float64, kind=kind, impl="torch", **both, **options)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@every_kind
def test_by_hand(kind):
    """p = (1/2, 1/2), q = (1/4, 3/4), so m = (3/8, 5/8).

    reverse: ln(4/3) / 2              forward: 3/4 ln 3 - ln 2
    js: half of (ln(4/3) + ln(4/5)) / 2 + (ln(2/3) / 4 + 3/4 ln(6/5))
    """
    one = torch.ones(1, 1)
    policy, ref = torch.zeros(2, 1), torch.tensor([[0.0], [math.log(3)]])
    divergence, entropy = linear_kl(one, policy, one, ref, kind=kind, entropy=True)
    expected = {
        "reverse": math.log(4 / 3) / 2,
        "forward": 0.75 * math.log(3) - math.log(2),
        "js": ((math.log(4 / 3) + math.log(4 / 5)) / 2 + math.log(2 / 3) / 4 + 0.75 * math.log(6 / 5)) / 2,
    }[kind]
    assert divergence.item() == pytest.approx(expected, abs=1e-6)
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)


@every_kind
def test_equal_heads_do_not_differ(kind):
    """0, and no gradient: a head differs from itself by nothing, whatever the rounding."""
    inputs = draw(9, 67, torch.float32, widths=(8, 8), near=0.0)
    inputs["ref_bias"] = inputs["policy_bias"]
    found = results(linear_kl, inputs, torch.float32, kind=kind, entropy=True, both_gradients=True)
    assert found["divergence"].abs().max() < 2e-6
    assert all(found[f"grad_{name}"].abs().max() < 2e-5 for name in INPUTS)


@both_modes
@every_kind
def test_the_reference_is_a_constant_unless_asked(kind, keep_bytes):
    inputs = draw(9, 33)
    truth = results(reference, inputs, torch.float64, kind=kind)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    divergence, nothing = linear_kl(**leaves, kind=kind, keep_bytes=keep_bytes)
    assert nothing is None
    (divergence * torch.linspace(-1, 2, 9, dtype=torch.float64)).sum().backward()
    for name, leaf in leaves.items():
        if name.startswith("ref_"):
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, truth[f"grad_{name}"], rtol=0, atol=1e-12)


@both_modes
@pytest.mark.parametrize(
    "wanted",
    [["policy_hidden"], ["policy_weight", "ref_bias"], ["ref_hidden"], ["ref_weight", "policy_hidden"], []],
    ids=str,
)
def test_what_is_frozen_gets_no_gradient(keep_bytes, wanted):
    inputs = draw(9, 33)
    truth = results(reference, inputs, torch.float64)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    divergence, _ = linear_kl(**leaves, both_gradients=True, keep_bytes=keep_bytes)
    assert divergence.requires_grad == bool(wanted)
    if wanted:
        (divergence * torch.linspace(-1, 2, 9, dtype=torch.float64)).sum().backward()
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, truth[f"grad_{name}"], rtol=0, atol=1e-12)
        else:
            assert leaf.grad is None


@both_modes
@every_kind
@pytest.mark.parametrize("live", ["some", "none", "all"])
def test_masked_rows_take_no_part(kind, keep_bytes, live):
    inputs = draw(11, 33)
    mask = {"some": torch.arange(11) % 3 == 1, "none": torch.zeros(11).bool(), "all": torch.ones(11).bool()}[live]
    alone = inputs | {name: inputs[name][mask].detach() for name in ("policy_hidden", "ref_hidden")}
    options = dict(kind=kind, both_gradients=True, entropy=True, keep_bytes=keep_bytes)
    truth = results(linear_kl, alone, torch.float64, **options)
    leaves = {name: x.detach() for name, x in inputs.items()}
    for name in ("policy_hidden", "ref_hidden"):
        leaves[name] = torch.where(mask[:, None], leaves[name], math.nan)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    divergence, entropy = linear_kl(**leaves, mask=mask, **options)
    (divergence[mask] * torch.linspace(-1, 2, int(mask.sum()), dtype=torch.float64)).sum().backward()
    assert (divergence[~mask] == 0).all() and (entropy[~mask] == 0).all()
    found = dict(divergence=divergence[mask].detach(), entropy=entropy[mask])
    for name, leaf in leaves.items():
        found[f"grad_{name}"] = leaf.grad[mask] if name.endswith("hidden") else leaf.grad
        assert not name.endswith("hidden") or (leaf.grad[~mask] == 0).all()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-13)


@both_modes
@every_kind
def test_a_token_that_both_rule_out_costs_nothing(kind, keep_bytes):
    inputs = draw(5, 100)
    with torch.no_grad():
        for name in ("policy_bias", "ref_bias"):
            inputs[name][64:] = -math.inf  # a whole step of the kernel too
            inputs[name][::2] = -math.inf
    truth = results(reference, inputs, torch.float64, kind=kind)
    options = dict(kind=kind, both_gradients=True, entropy=True, keep_bytes=keep_bytes)
    found = results(linear_kl, inputs, torch.float64, **options)
    for name in ("divergence", "entropy", "grad_policy_hidden", "grad_ref_hidden"):
        assert found[name].isfinite().all()
    # The definition's own gradient is NaN where it subtracts infinities, which a token of probability 0 must not be.
    for name in ("divergence", "entropy"):
        torch.testing.assert_close(found[name], truth[name], rtol=0, atol=1e-12)


def test_what_only_one_rules_out():
    """Infinite where the first of a KL allows what the second does not; finite the other way, and for js."""
    inputs = {name: x.detach() for name, x in draw(5, 10).items()}
    inputs["ref_bias"][3] = -math.inf
    assert (linear_kl(**inputs, kind="reverse")[0] == math.inf).all()
    for kind in ("forward", "js"):
        torch.testing.assert_close(linear_kl(**inputs, kind=kind)[0], reference(**inputs, kind=kind)[0])


@both_modes
@every_kind
def test_gradcheck(kind, keep_bytes):
    inputs = draw(3, 5, widths=(3, 2))
    assert torch.autograd.gradcheck(
        lambda *values: linear_kl(
            **dict(zip(INPUTS, values, strict=True)), kind=kind, both_gradients=True, keep_bytes=keep_bytes
        )[0],
        tuple(inputs[name] for name in INPUTS),
    )


@both_modes
def test_two_backward_passes_are_equal(keep_bytes):
    inputs = draw(9, 33, torch.float32)
    divergence, _ = linear_kl(**inputs, both_gradients=True, keep_bytes=keep_bytes)
    leaves = list(inputs.values())
    first = torch.autograd.grad(divergence.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(divergence.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_modes
def test_a_second_derivative_is_refused(keep_bytes):
    inputs = draw(3, 5)
    divergence, _ = linear_kl(**inputs, keep_bytes=keep_bytes)
    (gradient,) = torch.autograd.grad(divergence.square().sum(), inputs["policy_hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kl has no second derivative"):
        gradient.sum().backward()


@both_modes
@every_kind
def test_it_compiles_into_one_graph(kind, keep_bytes):
    inputs = draw(9, 33)
    mask = torch.arange(9) % 4 != 2

    def loss(temperature, **heads):
        heads["policy_hidden"] = heads["policy_hidden"] * 2
        options = dict(temperature=temperature, kind=kind, mask=mask, both_gradients=True, keep_bytes=keep_bytes)
        return linear_kl(**heads, **options)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (0.7, 1.5):
        found, truth = (
            torch.autograd.grad(function(temperature, **inputs), list(inputs.values())) for function in (compiled, loss)
        )
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(impl, keep):
    inputs = draw(9, 33, torch.float32)
    names = ("policy_hidden", "policy_weight", "policy_bias", "ref_hidden", "ref_weight", "ref_bias")
    temperature = torch.tensor(0.7, dtype=torch.float64, device="cpu")
    arguments = (*(inputs[name] for name in names), None, "js", temperature, 0.5, None, True, [keep, keep], impl)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, arguments, test_utils=tests)


def test_the_kernels_compile_for_cuda(impl, compile_for_cuda):
    """On blocks of logits as they come here; more of them in test_kl_divergence.py."""
    if impl == "torch":
        return
    out = compile_for_cuda(
        """
from rlhf_kernels.linear_kl import linear_kl, triton_kernel
os.environ["TRITON_INTERPRET"] = "1"
for dtype, kind, both in ((torch.bfloat16, "reverse", False), (torch.float32, "js", True)):
    heads = [torch.zeros(n, 8, dtype=dtype, requires_grad=True) for n in (3, 5000, 3, 5000)]
    linear_kl(*heads, kind=kind, both_gradients=both, entropy=True, impl="triton")[0].sum().backward()
print(len(compiled_kernels))
"""
    )
    assert int(out) == 4


class Instrument(TorchDispatchMode):
    """Counts matrix products, and sees the largest tensor that is made."""

    bodies = {op._opoverload: op._init_fn for op in (_forward, _backward)}
    products = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.bodies:
            with self:
                return self.bodies[function](*args, **kwargs or {})
        output = function(*args, **kwargs or {})
        self.products += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        if isinstance(output, torch.Tensor) and output.dtype.is_floating_point:
            self.largest = max(self.largest, output.numel())
        return output


@both_modes
@every_kind
def test_how_many_products_a_block_costs(kind, keep_bytes):
    """Four where something is kept, six where all is made anew; and then nothing larger than a few tiles of a block."""
    rows, vocabulary = 2 * BLOCK_ROWS, 1000
    inputs = draw(rows, vocabulary, torch.float32, bias=False)
    with Instrument() as instrument:
        linear_kl(**inputs, kind=kind, keep_bytes=keep_bytes)[0].sum().backward()
    assert instrument.products == 2 * (4 if keep_bytes else 6)
    if not keep_bytes:
        assert instrument.largest <= max(vocabulary * 8, BLOCK_ROWS * vocabulary)  # d weight, or a block


def test_not_a_byte_over_keep_bytes(impl):
    inputs = draw(8, 100, torch.float32, bias=False)
    needed = 8 * 100 * 4 * (2 if impl == "triton" else 1)
    counts = []
    for keep_bytes in (needed, needed - 1):
        with Instrument() as instrument:
            linear_kl(**inputs, keep_bytes=keep_bytes)[0].sum().backward()
        counts.append(instrument.products)
    assert counts == [8, 12]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (dict(kind="sideways"), "kind='sideways': expected one of reverse, forward, js"),
        (dict(temperature=0.0), "temperature=0.0: expected more than 0"),
        (dict(softcap=-1.0), "softcap=-1.0: expected more than 0"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), "mask of shape"),
        (dict(ref_hidden=torch.ones(4, 5, dtype=torch.float64)), "reference of 4 rows and 5 tokens"),
        (dict(ref_weight=torch.ones(5, 4, dtype=torch.float64)), "ref_weight of shape"),
        (dict(policy_weight=torch.ones(5, 8)), "policy_weight is torch.float32"),
        (dict(policy_bias=torch.ones(4, dtype=torch.float64)), "policy_bias of shape"),
    ],
    ids=lambda names: "-".join(sorted(names)) or "nothing",
)
def test_what_does_not_fit_is_refused(wrong, complaint):
    wrong = {name: x.to(torch.get_default_device()) if isinstance(x, torch.Tensor) else x for name, x in wrong.items()}
    with pytest.raises(ValueError, match=complaint):
        linear_kl(**draw(3, 5) | wrong)
