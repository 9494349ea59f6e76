"""The fused LM head compared with its definition.

The truth is the definition in float64 on the same (rounded) inputs. The error may be that of the definition in the
dtype of the model, plus a tolerance:

    max |kernel - truth| <= max |definition in that dtype - truth| + tolerance * max |truth|

Every test runs the torch path and the Triton path, the latter under Triton's interpreter (see conftest.py).
"""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels.linear_logprobs import _backward, _forward, linear_logprobs, linear_token_loss
from rlhf_kernels.linear_logprobs.reference import linear_logprobs as reference
from rlhf_kernels.registry import implementation, use_impl

# Relative to the largest true value. The half types round results once: half a unit in the last place.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
KEEP, RECOMPUTE = 1 << 29, 0
OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "scale": dict(scale=0.25),
    "softcap": dict(softcap=3.0),
    "everything": dict(temperature=1.3, scale=0.5, softcap=4.0),
}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_modes = pytest.mark.parametrize("keep_bytes", [KEEP, RECOMPUTE], ids=["keep", "recompute"])

BLOCK_ROWS = 4


@pytest.fixture(autouse=True)
def small(impl, device, monkeypatch):
    """Set small blocks, tiles and steps, so that small inputs take several of each; on a GPU if there is one."""
    cut(monkeypatch, impl, BLOCK_ROWS)
    monkeypatch.setattr("rlhf_kernels.common._CPU_TILE", 128)
    if impl == "triton":
        monkeypatch.setattr("rlhf_kernels.triton_rows.LARGEST_BLOCK", 64)
    with use_impl(impl), torch.device(device):
        yield


def cut(monkeypatch, impl: str, rows: int) -> None:
    monkeypatch.setattr(implementation("linear_logprobs", impl), "block_rows", lambda weight: rows)


def draw(rows: int, vocabulary: int, width: int, dtype=torch.float64, *, bias=False, seed=0) -> dict[str, torch.Tensor]:
    """Return inputs that require gradients, for logits of spread 2 or so."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()

    def normal(*shape, spread=1.0):
        values = spread * torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")
        return values.to(device, dtype).requires_grad_()

    inputs = dict(hidden=normal(rows, width), weight=normal(vocabulary, width, spread=2 / math.sqrt(width)))
    if bias:
        inputs["bias"] = normal(vocabulary)
    targets = torch.randint(vocabulary, (rows,), generator=generator, device="cpu")
    return inputs | {"targets": targets.to(device)}


def normal_numbers(seed: int, *shape: int) -> torch.Tensor:
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device())


def results(function, inputs: dict[str, torch.Tensor], dtype=None, **options) -> dict[str, torch.Tensor]:
    """Return log-probs, entropies and the gradients of an unevenly weighted sum of the log-probs, in `dtype`."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items() if name != "targets"}
    logprobs, entropy = function(targets=inputs["targets"], **leaves, **options)
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    (logprobs * weights).sum().backward()
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return dict(logprobs=logprobs.detach(), entropy=entropy.detach(), **gradients)


def tolerance_of(dtype: torch.dtype, impl: str) -> float:
    """Return the tolerance, for bfloat16 in Triton's interpreter, which truncates, a whole unit in the last place."""
    cut_off = impl == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    return TOLERANCE[dtype] * (2 if cut_off else 1)


def assert_as_good_as_the_definition(inputs: dict[str, torch.Tensor], impl: str, *, keep_bytes=KEEP, **options) -> None:
    dtype = inputs["hidden"].dtype
    truth = results(reference, inputs, torch.float64, **options)
    plain = results(reference, inputs, dtype, **options)
    fused = results(linear_logprobs, inputs, dtype, entropy=True, keep_bytes=keep_bytes, **options)
    tolerance = tolerance_of(dtype, impl)
    for name, value in truth.items():
        assert fused[name].dtype == plain[name].dtype and fused[name].shape == value.shape
        if value.numel():
            allowed = (plain[name] - value).abs().max() + tolerance * value.abs().max().clamp(min=1e-3)
            error = (fused[name] - value).abs().max()
            assert error <= allowed, f"{name}: off by {error:.3g}, {allowed:.3g} allowed"


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(impl, dtype, keep_bytes, options):
    """Three blocks of rows, the last of a single row."""
    inputs = draw(9, 67, 16, dtype, bias=bool(options))
    assert_as_good_as_the_definition(inputs, impl, keep_bytes=keep_bytes, **options)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(impl, dtype, keep_bytes):
    inputs = draw(9, 67, 16, dtype, bias=True)
    assert_as_good_as_the_definition(inputs, impl, keep_bytes=keep_bytes, **OPTIONS["everything"])


@both_modes
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [(0, 5, 4), (1, 1, 1), (1, 7, 3), (5, 1, 4), (4, 7, 1), (5, 257, 8), (9, 1000, 33)],
)
def test_odd_shapes(impl, keep_bytes, rows, vocabulary, width):
    """No rows, one row, a vocabulary of one token, whole and partial blocks."""
    inputs = draw(rows, vocabulary, width, torch.float32, bias=True)
    assert_as_good_as_the_definition(inputs, impl, keep_bytes=keep_bytes)


def test_by_hand():
    """Logits (ln 3, 0): log p = ln 3/4, entropy ln 4 - 3/4 ln 3; d log p_0 / d logits = (1/4, -1/4).

    The hidden state is (1, 2) and the weights (ln 3, 0), (0, 0): d hidden = (1/4 ln 3, 0), d weight = +-(1/4, 1/2).
    """
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0]), entropy=True)
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-6)
    logprobs.sum().backward()
    assert hidden.grad.tolist() == [pytest.approx([math.log(3) / 4, 0], abs=1e-6)]
    assert weight.grad.flatten().tolist() == pytest.approx([0.25, 0.5, -0.25, -0.5], abs=1e-6)


@both_modes
def test_a_vocabulary_of_one_symbol_is_certain(keep_bytes):
    """Log-prob, entropy and gradients are exactly 0."""
    found = results(linear_logprobs, draw(5, 1, 4, torch.float32), torch.float32, entropy=True, keep_bytes=keep_bytes)
    assert all((value == 0).all() for value in found.values())


@every_dtype
def test_keeping_and_recomputing_are_the_same(dtype):
    """Both compute the gradient from the same exponentials, so they agree up to the variation of a matrix product."""
    inputs = draw(9, 67, 16, dtype, bias=True)
    kept, recomputed = (
        results(linear_logprobs, inputs, dtype, entropy=True, keep_bytes=keep_bytes, **OPTIONS["everything"])
        for keep_bytes in (KEEP, RECOMPUTE)
    )
    torch.testing.assert_close(recomputed, kept, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ memory layouts


def spread_out(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers, not contiguous."""
    tensor = tensor.detach()
    if how == "transposed":
        return tensor.T.contiguous().T
    if how == "every other column":
        return tensor.repeat_interleave(2, -1)[:, ::2]
    if how == "every other row":
        return tensor.repeat_interleave(2, 0)[::2]
    return tensor[:1].expand_as(tensor)  # one row, a stride of 0


@both_modes
@pytest.mark.parametrize("how", ["transposed", "every other column", "every other row", "expanded"])
def test_strides_do_not_matter(keep_bytes, how):
    inputs = draw(9, 33, 8)
    for name in ("hidden", "weight"):
        inputs[name] = spread_out(inputs[name], how)
        assert not inputs[name].is_contiguous()
    strided = {name: x.detach().requires_grad_(name != "targets") for name, x in inputs.items()}
    logprobs, _ = linear_logprobs(**strided, keep_bytes=keep_bytes)
    (logprobs * torch.linspace(-1, 2, 9, dtype=torch.float64)).sum().backward()
    truth = results(reference, {name: x.contiguous() for name, x in inputs.items()}, torch.float64)
    torch.testing.assert_close(logprobs.detach(), truth["logprobs"], rtol=0, atol=1e-12)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(strided[name].grad, truth[f"grad_{name}"], rtol=0, atol=1e-12)


def test_the_inputs_are_left_alone():
    inputs = draw(9, 33, 8, bias=True)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    linear_logprobs(**inputs, scale=0.5, softcap=2.0, temperature=0.7, keep_bytes=0)[0].sum().backward()
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


# ---------------------------------------------------------------------------------------------------- extreme numbers


def logits_as_hidden(logits, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Inputs whose logits are exactly these: the weight is the identity."""
    logits = torch.tensor(logits, dtype=torch.float64)
    return dict(hidden=logits.to(dtype), weight=torch.eye(logits.shape[1]).to(dtype))


@both_modes
@every_dtype
def test_a_confident_row_still_learns(dtype, keep_bytes):
    """p_y = 1 / (1 + 3 e^-9): the gradient 1 - p_y = 3.70089e-4, where bfloat16 would round p_y to 1 and give 0."""
    inputs = logits_as_hidden([[9.0, 0.0, 0.0, 0.0]], dtype) | {"targets": torch.tensor([0])}
    found = results(linear_logprobs, inputs, dtype, entropy=True, keep_bytes=keep_bytes)
    # The single weight of `results` is -1.
    assert -found["grad_hidden"][0, 0].item() == pytest.approx(3.70089e-4, rel=1e-2)
    assert -found["grad_hidden"][0, 1].item() == pytest.approx(-3.70089e-4 / 3, rel=1e-2)
    assert -found["grad_weight"][0, 0].item() == pytest.approx(9 * 3.70089e-4, rel=1e-2)
    assert found["logprobs"].item() == pytest.approx(-3.70158e-4, rel=1e-3)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_hopeless_target_and_huge_logits(dtype, keep_bytes):
    """Logits of -+1e4, exact in these dtypes: no overflow, log p = -2e4 exactly.

    Row 0: target far below, log p = -20000, gradient (-1, 1). Row 1: the same, but likely: 0 and gradient 0.
    Row 2: a tie at 1e4: -ln 2 and (1/2, -1/2).
    """
    big = torch.tensor(1e4, dtype=dtype).item()
    inputs = logits_as_hidden([[big, -big], [big, -big], [big, big]], dtype) | {"targets": torch.tensor([1, 0, 0])}
    found = results(linear_logprobs, inputs, dtype, entropy=True, keep_bytes=keep_bytes)
    assert found["logprobs"].tolist() == [-2 * big, 0, pytest.approx(-math.log(2))]
    assert found["entropy"].tolist() == [0, 0, pytest.approx(math.log(2))]
    # The weights of `results` on three rows are -1, 1/2 and 2.
    assert found["grad_hidden"].tolist() == [[1, -1], [0, 0], [1, -1]]


@every_dtype
def test_a_large_common_offset_costs_nothing(dtype):
    """Logits 512 + (0, 4, 8) are exact in every dtype, so both modes must give exactly what (0, 4, 8) gives."""
    targets = torch.tensor([0, 2])
    low = logits_as_hidden([[0.0, 4.0, 8.0], [8.0, 4.0, 8.0]], dtype) | {"targets": targets}
    high = low | {"hidden": low["hidden"] + 512}
    truth = results(linear_logprobs, low, dtype, entropy=True)
    for keep_bytes in (KEEP, RECOMPUTE):
        found = results(linear_logprobs, high, dtype, entropy=True, keep_bytes=keep_bytes)
        for name in ("logprobs", "entropy", "grad_hidden"):
            torch.testing.assert_close(found[name], truth[name], rtol=0, atol=0)


@both_modes
def test_a_saturated_softcap(keep_bytes):
    """Logits of +-1e4 under softcap 2 are +-2, with a flat tanh: log p = -ln(1 + e^-4), and no gradient, not NaN."""
    inputs = logits_as_hidden([[1e4, -1e4]]) | {"targets": torch.tensor([0])}
    found = results(linear_logprobs, inputs, torch.float32, entropy=True, softcap=2.0, keep_bytes=keep_bytes)
    assert found["logprobs"].item() == pytest.approx(-math.log1p(math.exp(-4)), abs=1e-7)
    assert (found["grad_hidden"] == 0).all() and (found["grad_weight"] == 0).all()


@pytest.mark.parametrize(("dtype", "keep_bytes"), [(torch.bfloat16, RECOMPUTE), (torch.float16, KEEP)])
def test_a_sum_over_many_rows_does_not_stall(impl, dtype, keep_bytes, monkeypatch):
    """300 blocks of one row, all equal, p = 1/4: the mean's gradient is 3/4 for the target's weight, -1/4 for the rest.

    The bias has the same. Times 64, so that no row's share is a subnormal of float16.

    A sum in bfloat16 stops growing when the part of a block is less than 2^-9 of it.
    """
    cut(monkeypatch, impl, 1)
    rows = 300
    inputs = dict(hidden=torch.ones(rows, 1), weight=torch.zeros(4, 1), bias=torch.zeros(4))
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    targets = torch.zeros(rows, dtype=torch.int64)
    (64 * linear_logprobs(targets=targets, **leaves, keep_bytes=keep_bytes)[0].mean()).backward()
    rounding = 4e-3 if impl == "torch" else 8e-3  # Triton's interpreter truncates to bfloat16
    for name in ("weight", "bias"):
        assert leaves[name].grad.flatten().tolist() == pytest.approx([48, -16, -16, -16], rel=rounding)


# ------------------------------------------------------------------------------------------------------------ autograd


@both_modes
@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["plain", "everything"])
def test_gradcheck(keep_bytes, options):
    inputs = draw(2, 4, 3, bias=True)
    targets = inputs.pop("targets")
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_logprobs(
            hidden, weight, targets, bias=bias, keep_bytes=keep_bytes, **options
        )[0],
        tuple(inputs.values()),
    )


@both_modes
@pytest.mark.parametrize(
    "wanted",
    [["hidden"], ["weight"], ["bias"], ["hidden", "bias"], []],
    ids=lambda names: "-".join(sorted(names)) or "nothing",
)
def test_what_is_frozen_gets_no_gradient(keep_bytes, wanted):
    """The other inputs get the same gradients as without frozen ones."""
    inputs = draw(9, 33, 8, bias=True)
    targets = inputs.pop("targets")
    everything = torch.autograd.grad(reference(targets=targets, **inputs)[0].sum(), list(inputs.values()))
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    logprobs, _ = linear_logprobs(targets=targets, **leaves, keep_bytes=keep_bytes)
    assert logprobs.requires_grad == bool(wanted)
    if wanted:
        logprobs.sum().backward()
    for (name, leaf), truth in zip(leaves.items(), everything, strict=True):
        if name in wanted:
            torch.testing.assert_close(leaf.grad, truth, rtol=0, atol=1e-12)
        else:
            assert leaf.grad is None


@both_modes
def test_tied_weights_add_up(keep_bytes):
    """The same matrix embeds and predicts: its gradient is the sum of both uses, over two calls."""
    tokens = draw(9, 33, 8)["targets"]
    gradients = []
    for function, options in ((reference, {}), (linear_logprobs, dict(keep_bytes=keep_bytes))):
        weight = draw(1, 33, 8)["weight"].detach().requires_grad_()
        for temperature in (1.0, 0.5):
            hidden = torch.tanh(weight[tokens])
            logprobs, _ = function(hidden, weight, tokens.roll(-1), temperature=temperature, **options)
            logprobs.mean().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


@both_modes
def test_two_backward_passes_are_equal(keep_bytes):
    inputs = draw(9, 33, 8, torch.float32, bias=True)
    targets = inputs.pop("targets")
    logprobs, _ = linear_logprobs(targets=targets, **inputs, keep_bytes=keep_bytes)
    first = torch.autograd.grad(logprobs.square().sum(), list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(logprobs.square().sum(), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_modes
def test_a_second_derivative_is_refused(keep_bytes):
    inputs = draw(3, 5, 4)
    logprobs, _ = linear_logprobs(**inputs, keep_bytes=keep_bytes)
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs has no second derivative; use linear_logprobs.reference"):
        gradient.sum().backward()


def test_the_entropy_has_no_gradient():
    """It does not change the log-probs, and is None without entropy=True."""
    inputs = draw(3, 5, 4)
    logprobs, entropy = linear_logprobs(**inputs, entropy=True)
    assert logprobs.requires_grad and not entropy.requires_grad
    alone, nothing = linear_logprobs(**inputs)
    assert nothing is None and torch.equal(alone, logprobs)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.nan}, {"softcap": 0.0}]
)
def test_parameters_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}: expected more than 0"):
        linear_logprobs(**draw(1, 2, 2), **options)


# -------------------------------------------------------------------------------------------------------------- memory


BODIES = {op._opoverload: op._init_fn for op in (_forward, _backward)}


class Memory(TorchDispatchMode):
    """Record the largest tensor that an operation makes, and the most elements alive at one time."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in BODIES:
            with self:  # what happens inside the op, too
                output = BODIES[function](*args, **kwargs or {})
        else:
            output = function(*args, **kwargs or {})
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.see(tensor)
        return output

    def see(self, tensor: torch.Tensor) -> None:
        place, size = tensor.data_ptr(), tensor.numel()
        self.largest = max(self.largest, size)
        if size and place not in self.storages:
            self.storages[place] = size
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(tensor, self.forget, place)

    def forget(self, place: int) -> None:
        self.alive -= self.storages.pop(place)


class Idle:
    """A kernel that does nothing, because the interpreter allocates copies of its own."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def idle_kernels(impl, monkeypatch):
    for name in ("_fold_kernel", "_gradient_kernel"):
        if impl == "triton":
            monkeypatch.setattr(implementation("linear_logprobs", "triton"), name, Idle())


needs_no_results = pytest.mark.usefixtures("idle_kernels")
ROWS, VOCABULARY, WIDTH = 64, 500, 4
WHOLE = ROWS * VOCABULARY  # must not be allocated
BLOCK = BLOCK_ROWS * VOCABULARY
SMALL = 10 * (ROWS + VOCABULARY * WIDTH)  # a number a row, a gradient of the weight, and so on


def watch(function, *, backward=True, **options) -> Memory:
    inputs = draw(ROWS, VOCABULARY, WIDTH, torch.float32)
    with Memory() as memory:
        logprobs, _ = function(**inputs, **options)
        if backward:
            logprobs.sum().backward()
    return memory


def test_the_instrument_sees_the_definition():
    """Which holds all logits at once, and more than one copy of them."""
    memory = watch(reference)
    assert memory.largest == WHOLE and memory.peak >= 2 * WHOLE


@needs_no_results
@pytest.mark.parametrize("options", [{}, dict(softcap=3.0), dict(entropy=True)], ids=str)
def test_recomputing_holds_a_few_blocks_at_most(options):
    """Forward and backward: no tensor larger than a block of rows, and no more than two of them alive."""
    memory = watch(linear_logprobs, keep_bytes=0, **options)
    assert memory.largest == BLOCK
    assert memory.peak < 2 * BLOCK + SMALL < WHOLE


@needs_no_results
def test_keeping_holds_the_exponentials_once():
    """And otherwise only a block; and at most keep_bytes."""
    memory = watch(linear_logprobs)
    assert memory.largest == WHOLE and memory.peak < WHOLE + 2 * BLOCK + SMALL
    assert watch(linear_logprobs, keep_bytes=4 * WHOLE).peak >= WHOLE
    assert watch(linear_logprobs, keep_bytes=4 * WHOLE - 1).peak < WHOLE


@needs_no_results
def test_nothing_is_kept_where_no_gradient_will_be_taken():
    """Under no_grad, with weights that could be trained; and with frozen ones."""
    with torch.no_grad():
        assert watch(linear_logprobs, backward=False).peak < 2 * BLOCK + SMALL
    inputs = {name: x.detach() for name, x in draw(ROWS, VOCABULARY, WIDTH, torch.float32).items()}
    with Memory() as memory:
        linear_logprobs(**inputs)
    assert 0 < memory.peak < 2 * BLOCK + SMALL


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_training_run_ends_in_the_same_place(keep_bytes, dtype, tolerance):
    """Thirty steps of Adam on an embedding, a layer and a biased head: every parameter, and the loss falls."""
    tokens = draw(30 * 12, 40, 1, seed=1)["targets"].view(30, 12)
    following = (3 * tokens + 1) % 40  # what there is to learn
    runs = []
    for function, options in ((reference, {}), (linear_logprobs, dict(keep_bytes=keep_bytes))):
        shapes = dict(embedding=(40, 16), layer=(16, 16), head=(40, 16), bias=(40,))
        model = {
            name: (0.3 * normal_numbers(seed, *shape)).to(dtype).requires_grad_()
            for seed, (name, shape) in enumerate(shapes.items())
        }
        optimizer = torch.optim.Adam(model.values(), lr=0.02, eps=1e-4)
        losses = []
        for step in range(30):
            hidden = torch.tanh(model["embedding"][tokens[step]] @ model["layer"])
            loss = -function(hidden, model["head"], following[step], bias=model["bias"], **options)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append({name: parameter.detach() for name, parameter in model.items()} | {"losses": torch.stack(losses)})
    expected, found = runs
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------ excluded tokens


@both_modes
def test_a_bias_of_minus_infinity_excludes_a_token(keep_bytes):
    """As if it were not in the vocabulary. As a target: log 0, and the gradient of the definition."""
    inputs = draw(9, 100, 8, bias=True)
    with torch.no_grad():
        inputs["bias"][64:] = -math.inf  # a whole step of the kernel too
        inputs["bias"][::2] = -math.inf
    inputs["targets"] = inputs["targets"] % 32 * 2 + 1
    inputs["targets"][3] = 0
    truth = results(reference, inputs, torch.float64)
    found = results(linear_logprobs, inputs, torch.float64, entropy=True, keep_bytes=keep_bytes)
    assert found["logprobs"][3] == -math.inf and found["entropy"].isfinite().all()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_a_target_outside_the_vocabulary(impl):
    """An error on the CPU, and NaN in a kernel, which cannot raise one."""
    inputs = draw(3, 5, 4) | {"targets": torch.tensor([0, 5, -100])}
    if impl == "torch":  # on CUDA it would end the process
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            linear_logprobs(**inputs)
    else:
        assert linear_logprobs(**inputs)[0].isnan().tolist() == [False, True, True]


# ------------------------------------------------------------------------------------------------------ the op as an op


@both_modes
def test_it_compiles_into_one_graph(keep_bytes):
    inputs = draw(9, 33, 8, bias=True)
    options = dict(softcap=3.0, entropy=True, keep_bytes=keep_bytes)

    def loss(hidden, weight, bias, targets, temperature):
        logprobs, _ = linear_logprobs(hidden * 2, weight, targets, bias=bias, temperature=temperature, **options)
        return logprobs.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [inputs[name] for name in ("hidden", "weight", "bias")]
    for temperature in (0.7, 1.5):
        found, truth = (
            torch.autograd.grad(function(*leaves, inputs["targets"], temperature), leaves)
            for function in (compiled, loss)
        )
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_another_temperature_compiles_nothing_new():
    inputs = draw(9, 33, 8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(temperature):
        return linear_logprobs(**inputs, temperature=temperature)[0].sum()

    for temperature in (0.7, 0.8):  # after two values dynamo takes the number as an input
        loss(temperature)
    before = counter.frame_count
    for temperature in (0.9, 1.1, 1.7):
        loss(temperature)
    assert counter.frame_count == before


@both_modes
def test_opcheck(impl, keep_bytes):
    """Schema, fake and autograd registration of the op agree with its implementation."""
    inputs = draw(9, 33, 8, torch.float32, bias=True)
    temperature = torch.tensor(0.7, dtype=torch.float64)
    head = (inputs["hidden"], inputs["weight"], inputs["bias"], inputs["targets"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, (*head, temperature, 0.5, 3.0, True, keep_bytes > 0, impl), test_utils=tests)


def test_the_kernels_compile_for_cuda(impl, compile_for_cuda):
    """With Triton's own compiler, which rejects more than its interpreter."""
    if impl == "torch":
        return
    out = compile_for_cuda(
        """
from rlhf_kernels.linear_logprobs import linear_logprobs, triton_kernel
os.environ["TRITON_INTERPRET"] = "1"
for dtype, vocabulary, softcap, bias, entropy in (
    (torch.bfloat16, 32000, None, False, False),
    (torch.bfloat16, 32000, 30.0, True, True),
    (torch.float64, 5000, 30.0, True, True),
):
    hidden = torch.zeros(3, 8, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocabulary, 8, dtype=dtype, requires_grad=True)
    bias = torch.zeros(vocabulary, dtype=dtype) if bias else None
    targets = torch.zeros(3, dtype=torch.int64)
    options = dict(bias=bias, softcap=softcap, entropy=entropy, impl="triton")
    linear_logprobs(hidden, weight, targets, **options)[0].sum().backward()
    if vocabulary == 32000:  # 128 bits at a time
        (_, forward), (_, backward) = compiled_kernels[-2:]
        assert "ld.global.v4.b32" in forward and "ld.global.v4.b32" in backward and "st.global.v4.b32" in backward
print(len(compiled_kernels))
"""
    )
    assert int(out) == 6


def test_two_runs_are_equal_to_the_bit():
    inputs = draw(9, 257, 16, torch.float32, bias=True)
    first, second = (results(linear_logprobs, inputs, torch.float32, entropy=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrong", ["targets", "dtype", "width", "bias", "empty vocabulary"])
def test_what_does_not_fit_is_refused(wrong):
    inputs = draw(3, 5, 4, bias=True)
    inputs |= {
        "targets": {"targets": torch.zeros(2, dtype=torch.int64)},
        "dtype": {"weight": inputs["weight"].float()},
        "width": {"weight": inputs["weight"][:, :3]},
        "bias": {"bias": inputs["bias"][:4]},
        "empty vocabulary": {"weight": inputs["weight"][:0], "bias": None},
    }[wrong]
    with pytest.raises(ValueError, match="expected"):
        linear_logprobs(**inputs)


# ---------------------------------------------------------------------------------------- loss and gradient in one pass


def losses(rows: int) -> dict:
    """Return losses whose terms depend on one token each, among them a clipped surrogate with a mask."""
    coefficients, advantages, mask = (normal_numbers(seed, rows) for seed in (3, 4, 5))
    old, mask = -3 + 0.7 * normal_numbers(6, rows), mask > -0.5

    def surrogate(logprobs, part):
        ratio = (logprobs - old[part]).clamp(-2, 2).exp()
        clipped = ratio.clamp(0.8, 1.2)
        return -torch.minimum(ratio * advantages[part], clipped * advantages[part]) * mask[part]

    return {
        "supervised": lambda logprobs, part: -coefficients[part] * logprobs,
        "surrogate": surrogate,
        "constant": lambda logprobs, part: coefficients[part],
        "squared": lambda logprobs, part: logprobs.square(),
    }


@pytest.mark.parametrize(
    ("loss", "options"),
    [("surrogate", name) for name in OPTIONS]
    + [(loss, "everything") for loss in ("supervised", "constant", "squared")],
)
def test_a_token_loss_is_the_loss_of_the_log_probs(loss, options):
    """Value, log-probs and every gradient, to 1e-10; with three blocks and a further factor."""
    inputs, options = draw(11, 67, 16, bias=True), OPTIONS[options]
    loss, targets = losses(11)[loss], inputs.pop("targets")
    leaves = list(inputs.values())
    truth, _ = linear_logprobs(targets=targets, **inputs, **options)
    total = loss(truth, slice(0, 11)).sum()
    found, logprobs = linear_token_loss(targets=targets, loss=loss, **inputs, **options)
    torch.testing.assert_close(found.detach(), total.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(logprobs, truth.detach(), rtol=0, atol=1e-12)
    assert not logprobs.requires_grad
    gradients = torch.autograd.grad(found * 0.3, leaves)
    if total.requires_grad:
        expected = torch.autograd.grad(total * 0.3, leaves)
    else:
        expected = [torch.zeros_like(leaf) for leaf in leaves]
    torch.testing.assert_close(gradients, tuple(expected), rtol=0, atol=1e-10)


@every_dtype
def test_a_token_loss_is_as_exact_as_the_log_probs(impl, dtype):
    inputs = draw(11, 67, 16, dtype, bias=True)
    weights = torch.linspace(-1, 2, 11, dtype=torch.float64)

    def fused(targets, **leaves):
        total, logprobs = linear_token_loss(
            targets=targets, loss=lambda logprobs, rows: weights[rows].to(logprobs.dtype) * logprobs, **leaves
        )
        return total, logprobs

    truth, plain = (results(reference, inputs, kind) for kind in (torch.float64, dtype))
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if name != "targets"}
    total, logprobs = fused(inputs["targets"], **leaves)
    total.backward()
    found = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()} | {"logprobs": logprobs}
    for name, value in found.items():
        allowed = (plain[name] - truth[name]).abs().max() + tolerance_of(dtype, impl) * truth[name].abs().max()
        assert value.dtype == plain[name].dtype and (value - truth[name]).abs().max() <= allowed


@pytest.mark.parametrize(
    "wanted",
    [["hidden"], ["weight"], ["hidden", "bias"], []],
    ids=lambda names: "-".join(sorted(names)) or "nothing",
)
def test_a_token_loss_with_frozen_inputs(wanted):
    inputs = draw(9, 33, 8, bias=True)
    targets = inputs.pop("targets")
    truth = torch.autograd.grad(reference(targets=targets, **inputs)[0].square().sum(), list(inputs.values()))
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    total, _ = linear_token_loss(targets=targets, loss=lambda logprobs, _: logprobs.square(), **leaves)
    assert total.requires_grad == bool(wanted)
    if wanted:
        total.backward()
    for (name, leaf), gradient in zip(leaves.items(), truth, strict=True):
        if name in wanted:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-12)
        else:
            assert leaf.grad is None


def test_a_token_loss_differentiates_nothing_without_gradients():
    inputs = draw(9, 33, 8)
    with torch.no_grad():
        total, _ = linear_token_loss(**inputs, loss=lambda logprobs, rows: -logprobs)
    assert not total.requires_grad
    assert total.item() == pytest.approx(-reference(**inputs)[0].sum().item())


def test_a_token_loss_has_one_backward_pass():
    inputs = draw(3, 5, 4)
    total, _ = linear_token_loss(**inputs, loss=lambda logprobs, rows: -logprobs)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_loss has one backward pass"):
        total.backward()


def test_a_token_loss_may_give_its_sum_at_once(monkeypatch):
    cut(monkeypatch, "torch", 2)
    gradients = []
    for loss in (lambda logprobs, rows: logprobs.square(), lambda logprobs, rows: logprobs.square().sum()):
        inputs = draw(5, 7, 4)
        total, _ = linear_token_loss(**inputs, loss=loss)
        gradients.append([total, *torch.autograd.grad(total, [inputs["hidden"], inputs["weight"]])])
    torch.testing.assert_close(*gradients)


def test_a_token_loss_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"loss gave shape \(1,\) for 3 log-probs: expected \(3,\) or \(\)"):
        linear_token_loss(**draw(3, 5, 4), loss=lambda logprobs, rows: -logprobs.sum()[None])


@needs_no_results
def test_a_token_loss_keeps_one_block():
    """Forward and backward, without a tensor of [tokens, vocabulary]."""
    inputs = draw(ROWS, VOCABULARY, WIDTH, torch.float32)
    with Memory() as memory:
        linear_token_loss(**inputs, loss=lambda logprobs, rows: -logprobs)[0].backward()
    assert memory.largest == BLOCK and memory.peak < 2 * BLOCK + SMALL < WHOLE


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in BODIES:
            with self:
                return BODIES[function](*args, **kwargs or {})
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **kwargs or {})


@needs_no_results
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen head"])
def test_how_many_products_a_block_costs(frozen):
    """Kept: three, or two with a frozen head. Recomputed: one more. In one pass: as many as kept."""
    inputs = draw(2 * BLOCK_ROWS, 33, 8, torch.float32)
    inputs["weight"] = inputs["weight"].detach().requires_grad_(not frozen)
    for options, expected in ((dict(keep_bytes=KEEP), 3), (dict(keep_bytes=RECOMPUTE), 4)):
        with Products() as products:
            linear_logprobs(**inputs, **options)[0].sum().backward()
        assert products.count == 2 * (expected - frozen)
    with Products() as products:
        linear_token_loss(**inputs, loss=lambda logprobs, rows: -logprobs)[0].backward()
    assert products.count == 2 * (3 - frozen)
