"""Correctness checks of every kernel on this device. Each raises AssertionError with what it found.

Results are compared with the definition in float64 on the same inputs. The error may be that of the definition in the
dtype of the inputs, plus a tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rows import Setup
from torch import Tensor

from rlhf_core.batch import PackedBatch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_accurate(
    what: str, ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype
) -> None:
    """Raise AssertionError where `ours` is further from the truth than `plain`, the definition in `dtype`."""
    for name, true in truth.items():
        assert ours[name].shape == true.shape, f"{what}, {name}: shape {tuple(ours[name].shape)}"
        if not true.numel():
            continue
        error, usual = ((x[name].double() - true).abs().max().item() for x in (ours, plain))
        allowed = usual + TOLERANCE[dtype] * max(true.abs().max().item(), 1e-3)
        assert error <= allowed, f"{what}, {name}: off by {error:.3g}, {allowed:.3g} allowed"


def outcome(function: Callable, leaves: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Return the results of the function, and the gradients of an uneven sum of the first of them."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    first, second = function(**leaves, **options)
    weights = torch.linspace(-1, 2, first.numel(), device=first.device, dtype=first.dtype).view_as(first)
    gradients = torch.autograd.grad((first * weights).sum(), list(leaves.values()))
    results = {"first": first.detach()} | ({} if second is None else {"second": second.detach()})
    return results | {f"gradient to {name}": x for name, x in zip(leaves, gradients, strict=True)}


def compare(what: str, ours: Callable, reference: Callable, leaves: dict[str, Tensor], ours_only: dict, **options):
    dtype = next(iter(leaves.values())).dtype
    truth = outcome(reference, {name: x.double() for name, x in leaves.items()}, **options)
    plain = outcome(reference, leaves, **options)
    got = outcome(ours, leaves, **options, **ours_only)
    assert_accurate(
        f"{what} {dtype} {tuple(next(iter(leaves.values())).shape)} {options.keys()}", got, plain, truth, dtype
    )
    with no_waiting():
        again = outcome(ours, leaves, **options, **ours_only)
    for name, result in got.items():
        assert torch.equal(result, again[name]), f"{what}, {name}: another result in the second call"


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make a device synchronization inside an error."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def grid(setup: Setup, *, most: int = 300_000) -> list[tuple[torch.dtype, int, int]]:
    """Return dtypes, rows and vocabularies, few, because each is a kernel to compile."""
    if setup.dry:
        return [(torch.bfloat16, 3, 127), (torch.float16, 2, 30), (torch.float32, 1, 1)]
    shapes = {
        torch.bfloat16: [(1, 50_257), (3, 127), (64, 4096), (7, 128_256), (2, 300_000)],
        torch.float32: [(1, 1), (5, 1000), (3, 128_256)],
        torch.float16: [(3, 127), (5, 32_000)],
    }
    return [(dtype, *shape) for dtype, sizes in shapes.items() for shape in sizes if shape[1] <= most]


def hard_logits(setup: Setup, rows: int, vocabulary: int, dtype) -> tuple[Tensor, Tensor]:
    """Return logits of spread 2 and targets; one row is confident of its target, one is far below 0."""
    logits, targets = setup.normal(rows, vocabulary, spread=2.0, dtype=torch.float32), setup.integers(vocabulary, rows)
    logits[0, targets[0]] += 25
    logits[-1] -= 10_000 if rows > 2 else 0
    return logits.to(dtype), targets


def token_logprobs(setup: Setup, impl: str) -> None:
    from rlhf_kernels.token_logprobs import token_logprobs as op
    from rlhf_kernels.token_logprobs.reference import token_logprobs as reference

    for dtype, rows, vocabulary in grid(setup):
        logits, targets = hard_logits(setup, rows, vocabulary, dtype)
        for temperature in (1.0, 0.7):
            ours = dict(impl=impl, entropy=True)
            compare("token_logprobs", op, reference, {"logits": logits}, ours, targets=targets, temperature=temperature)
    logits, targets = hard_logits(setup, 6, 300, torch.bfloat16)
    mask = torch.arange(6, device=setup.device) % 2 == 0
    compare("masked", op, reference, {"logits": logits}, dict(impl=impl, entropy=True), targets=targets, mask=mask)
    logits[~mask] = float("nan")
    for result in outcome(op, {"logits": logits}, targets=targets, mask=mask, impl=impl, entropy=True).values():
        assert (result[~mask] == 0).all(), "token_logprobs: a masked row is not 0"


def kl_divergence(setup: Setup, impl: str) -> None:
    from rlhf_kernels.kl_divergence import kl_divergence as op
    from rlhf_kernels.kl_divergence.reference import kl_divergence as reference

    for dtype, rows, vocabulary in grid(setup):
        policy, _ = hard_logits(setup, rows, vocabulary, dtype)
        moved = policy + setup.normal(rows, vocabulary, dtype=dtype)
        for kind in ("reverse", "forward", "js"):
            ours = partial(_against, op, moved, kind=kind, temperature=0.7, entropy=True, impl=impl)
            truth = partial(_against, reference, moved, kind=kind, temperature=0.7)
            compare(f"kl_divergence {kind}", ours, truth, {"policy_logits": policy}, {})


def _against(function: Callable, ref_logits: Tensor, policy_logits: Tensor, **options) -> tuple[Tensor, Tensor]:
    return function(policy_logits, ref_logits.to(policy_logits.dtype), **options)


def linear_logprobs(setup: Setup, impl: str) -> None:
    from rlhf_kernels.linear_logprobs import linear_logprobs as op
    from rlhf_kernels.linear_logprobs.reference import linear_logprobs as reference

    for dtype, rows, vocabulary in grid(setup, most=60_000):
        leaves, targets = head(setup, rows, vocabulary, dtype)
        for options in ({}, dict(temperature=1.3, scale=0.5, softcap=20.0)):
            for keep_bytes in (0, 1 << 29):
                ours = dict(impl=impl, entropy=True, keep_bytes=keep_bytes)
                compare("linear_logprobs", op, reference, leaves, ours, targets=targets, **options)


def head(setup: Setup, rows: int, vocabulary: int, dtype, width: int = 48) -> tuple[dict[str, Tensor], Tensor]:
    leaves = dict(hidden=setup.normal(rows, width, dtype=dtype))
    leaves |= dict(weight=setup.normal(vocabulary, width, spread=0.3, dtype=dtype))
    return leaves, setup.integers(vocabulary, rows)


def linear_kl(setup: Setup, impl: str) -> None:
    from rlhf_kernels.linear_kl import linear_kl as op
    from rlhf_kernels.linear_kl.reference import linear_kl as reference

    for dtype, rows, vocabulary in grid(setup, most=60_000):
        leaves = {f"policy_{name}": x for name, x in head(setup, rows, vocabulary, dtype)[0].items()}
        moved = {name.replace("policy", "ref"): x * 0.9 for name, x in leaves.items()}
        for kind in ("reverse", "forward", "js"):
            ours = partial(_between_heads, op, moved, kind=kind, temperature=0.7, impl=impl)
            truth = partial(_between_heads, reference, moved, kind=kind, temperature=0.7)
            compare(f"linear_kl {kind}", ours, truth, leaves, {})


def _between_heads(
    function: Callable, ref_head: dict[str, Tensor], policy_hidden: Tensor, policy_weight: Tensor, **options
) -> tuple[Tensor, None]:
    ref_head = {name: x.to(policy_hidden.dtype) for name, x in ref_head.items()}
    found = function(policy_hidden, policy_weight, **ref_head, **options)
    return found[0] if isinstance(found, tuple) else found, None


def gae(setup: Setup, impl: str) -> None:
    from rlhf_kernels.gae import gae as op
    from rlhf_kernels.gae import triton_kernel
    from rlhf_kernels.gae.reference import gae as reference

    sizes = [(1, 1), (3, 40)] if setup.dry else [(1, 1), (3, 127), (5, 5000), (700, 300), (2000, 33), (1, 70_000)]
    for rows, columns in sizes:
        rewards, values = (setup.normal(rows, columns, spread=s, dtype=torch.float32) for s in (1.0, 0.5))
        mask = setup.normal(rows, columns, dtype=torch.float32) < 0.7
        rewards[~mask], values[~mask] = float("nan"), float("inf")
        for options in (dict(gamma=0.99, lam=0.95), dict(gamma=1.0, lam=0.0, bootstrap=rewards.new_ones(rows))):
            for whiten in (False, True):
                arguments = (rewards, values, mask)
                truth = reference(
                    *(x.double() if x.is_floating_point() else x for x in arguments), whiten=whiten, **options
                )
                ways = [op(*arguments, whiten=whiten, impl=impl, **options)]
                with no_waiting():
                    ways.append(op(*arguments, whiten=whiten, impl=impl, **options))
                if whiten and impl == "triton":
                    ways.append(triton_kernel.gae(*arguments, whiten=True, launches=2, **options))
                for results in ways:
                    for result, true in zip(results, truth, strict=True):
                        off = (result - true).abs().max().item() / max(true.abs().max().item(), 1.0)
                        assert off <= 1e-5, f"gae ({rows}, {columns}) whiten={whiten}: off by {off:.3g} of the largest"
                assert all(torch.equal(a, b) for a, b in zip(*ways[:2], strict=True)), "gae: another second result"


def packed_attention(setup: Setup, impl: str) -> None:
    from rlhf_kernels.packed_attention import packed_attention as op
    from rlhf_kernels.packed_attention import triton_kernel
    from rlhf_kernels.packed_attention.reference import packed_attention as reference

    shapes = [(70, [30, 45, 3]), (5, [5]), (20, [200, 190]), (1, [1])]
    forward_only = setup.dry and impl == "triton"  # flex_attention has no backward on the CPU

    def results(function, inputs, layout, **options) -> dict[str, Tensor]:
        if forward_only:
            return {"first": function(**inputs, layout=layout, **options)}
        return outcome(lambda **leaves: (function(**leaves, layout=layout, **options), None), inputs)

    for number in (1,) if setup.dry else (1, 3, 2):  # the second length compiles for all
        groups = [([0] * prompt, [[0] * length for length in lengths]) for prompt, lengths in shapes] * number
        batch = PackedBatch.pack(groups, share=True).to(setup.device)
        with no_waiting():
            triton_kernel.block_mask_of(batch.layout, batch.num_tokens, batch.input_ids.device, 7)
        for dtype in (torch.float32,) if setup.dry else TOLERANCE:
            inputs = {
                name: setup.normal(1, heads, batch.num_tokens, 64, dtype=dtype)
                for name, heads in (("query", 4), ("key", 2), ("value", 2))
            }
            exact = {name: x.double() for name, x in inputs.items()}
            for options in ({}, dict(sliding_window=16), dict(scale=0.2)):
                truth, plain = (results(reference, x, batch.layout, **options) for x in (exact, inputs))
                got = results(op, inputs, batch.layout, **options, impl=impl)
                for name, true in truth.items():
                    error, usual = ((x[name].double() - true).abs().max().item() for x in (got, plain))
                    # The half types round the attention weights as well.
                    allowed = usual + 4 * torch.finfo(dtype).eps * true.abs().max().item() + 1e-5
                    assert error <= allowed, f"packed_attention {dtype} {options}, {name}: off by {error:.3g}"


def large_offsets(setup: Setup, impl: str) -> None:
    """Check the last rows of tensors of more than 2^31 elements, whose offsets do not fit 32 bits."""
    from rlhf_kernels.gae import gae as gae_op
    from rlhf_kernels.gae.reference import gae as gae_reference
    from rlhf_kernels.kl_divergence import kl_divergence as kl_op
    from rlhf_kernels.kl_divergence.reference import kl_divergence as kl_reference
    from rlhf_kernels.token_logprobs import token_logprobs as token_op
    from rlhf_kernels.token_logprobs.reference import token_logprobs as token_reference

    vocabulary = setup.size(128_256, 130)
    rows = setup.size(2**31 // vocabulary + 9, 9)
    logits, targets = setup.normal(rows, vocabulary, spread=2.0), setup.integers(vocabulary, rows)
    last = slice(rows - 8, rows)
    for op, reference, name, others in (
        (token_op, token_reference, "logits", dict(targets=targets)),
        (kl_op, kl_reference, "policy_logits", dict(ref_logits=logits.flip(0))),
    ):
        leaf = logits.detach().requires_grad_()
        result = op(**{name: leaf}, **others, impl=impl)[0]
        (gradient,) = torch.autograd.grad(result[last].sum(), leaf)
        assert (gradient[: rows - 8 : 997] == 0).all(), f"{op.__name__}: a gradient in a row without one"
        part = {other: x[last].double() if x.is_floating_point() else x[last] for other, x in others.items()}
        exact = logits[last].double().requires_grad_()
        true = reference(**{name: exact}, **part)[0]
        (true_gradient,) = torch.autograd.grad(true.sum(), exact)
        off = (result[last] - true).abs().max().item()
        assert off < 1e-4, f"{op.__name__}: {off:.3g} off in the last rows"
        off = (gradient[last] - true_gradient).abs().max().item()
        assert off < 1e-2 * true_gradient.abs().max().item(), f"{op.__name__}: gradient {off:.3g} off in the last rows"
        del leaf, result, gradient
    del logits, others
    rows, columns = setup.size(2**31 // 65_536 + 9, 9), setup.size(65_536, 20)
    rewards = setup.normal(1, columns, dtype=torch.float32).expand(rows, columns)
    mask = torch.ones(1, 1, dtype=torch.bool, device=setup.device).expand(rows, columns)
    options = dict(gamma=0.99, lam=0.95)
    results = gae_op(rewards, rewards, mask, **options, impl=impl)
    truth = gae_reference(rewards[:1].double(), rewards[:1].double(), mask[:1], **options)
    for result, true in zip(results, truth, strict=True):
        assert (result[-1] - true[0]).abs().max() < 1e-4, "gae: the last row is off"


CHECKS: dict[str, Callable[[Setup, str], None]] = {
    "token_logprobs": token_logprobs,
    "kl_divergence": kl_divergence,
    "linear_logprobs": linear_logprobs,
    "linear_kl": linear_kl,
    "gae": gae,
    "packed_attention": packed_attention,
    "more than 2^31 elements": large_offsets,
}
