"""The rows of the table: contestants, the floor that a device allows, and the goals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import rivals
import torch
from clock import Ceilings, Side
from torch import Tensor

from rlhf_core.batch import PackedBatch


@dataclass(frozen=True)
class Setup:
    """The device and the sizes. `dry` means a CPU and tiny shapes, which test the script and measure nothing."""

    device: torch.device
    dry: bool

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.dry else real

    def normal(self, *shape: int, spread: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(len(shape) + shape[0])
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(std=spread, generator=generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randint(high, shape, generator=generator, device=self.device)


@dataclass
class Row:
    """Contestants by name, "ours" first. A contestant is a function that returns its `Side`, and may raise an error."""

    contestants: dict[str, Callable[[], Side]]
    floor: Callable[[Ceilings], float] | None = None  # seconds that the device needs at least
    floor_is: str = ""
    goal: float | None = None  # of the floor
    goals: dict[str, float] = field(default_factory=dict)  # times faster than these
    most_seconds: float | None = None
    one_launch: bool = False


def compiled(function: Callable, setup: Setup) -> Callable[[], Callable]:
    def make() -> Callable:
        if setup.dry:
            raise RuntimeError("dry run: nothing is compiled")
        return torch.compile(function, dynamic=False)

    return make


def forward_only(make: Callable[[], Callable], *inputs: Tensor) -> Callable[[], Side]:
    def side() -> Side:
        function = make()

        def run():
            with torch.no_grad():
                return function(*inputs)

        return Side(run)

    return side


def both_ways(make: Callable[[], Callable], *inputs: Tensor, leaves: tuple[int, ...]) -> Callable[[], Side]:
    """Time forward and backward of an unevenly weighted sum, with gradients of the inputs numbered `leaves`."""

    def side() -> Side:
        function = make()
        inside = [x.detach().requires_grad_() if number in leaves else x for number, x in enumerate(inputs)]

        def run():
            result = function(*inside)
            weights = torch.linspace(0.5, 1.5, result.numel(), device=result.device, dtype=result.dtype)
            return torch.autograd.grad((result * weights.view_as(result)).sum(), [inside[number] for number in leaves])

        return Side(run)

    return side


def backward_only(make: Callable[[], Callable], *inputs: Tensor) -> Callable[[], Side]:
    """Time the gradient of the first input, without its forward."""

    def side() -> Side:
        function = make()
        leaf = inputs[0].detach().requires_grad_()

        def prepare():
            result = function(leaf, *inputs[1:])
            return result, torch.linspace(0.5, 1.5, result.numel(), device=result.device).view_as(result)

        return Side(lambda result, weights: torch.autograd.grad(result, leaf, weights), prepare)

    return side


def token_inputs(setup: Setup) -> tuple[Tensor, Tensor]:
    rows, vocabulary = setup.size(16_384, 6), setup.size(128_256, 70)
    return setup.normal(rows, vocabulary, spread=2.0), setup.integers(vocabulary, rows)


def our_logprobs(impl: str, **options) -> Callable[[], Callable]:
    def make() -> Callable:
        from rlhf_kernels.token_logprobs import token_logprobs

        return lambda logits, targets: token_logprobs(logits, targets, impl=impl, **options)[0]

    return make


def token_logprobs_forward(setup: Setup) -> Row:
    logits, targets = token_inputs(setup)
    # Liger ignores the last row of its logits, so it gets one more.
    more = torch.cat([logits, logits[:1]]) if not setup.dry else logits

    def liger() -> Side:
        return forward_only(rivals.liger_logprobs, more, targets)()

    return Row(
        {
            "ours": forward_only(our_logprobs("triton"), logits, targets),
            "ours, entropy": forward_only(our_logprobs("triton", entropy=True), logits, targets),
            "ours, torch": forward_only(our_logprobs("torch"), logits, targets),
            "eager": forward_only(lambda: rivals.eager_logprobs, logits, targets),
            "compile": forward_only(compiled(rivals.eager_logprobs, setup), logits, targets),
            "Liger": liger,
            "TRL": forward_only(rivals.trl_logprobs, logits, targets),
        },
        floor=lambda ceilings: logits.nbytes / ceilings.copy_bytes,
        floor_is="one read",
        goal=0.85,
    )


def token_logprobs_backward(setup: Setup) -> Row:
    logits, targets = token_inputs(setup)

    def in_place() -> Side:
        function = our_logprobs("triton", inplace_backward=True)()
        leaf = logits.detach().requires_grad_()

        def prepare():
            computed = leaf.view_as(leaf).clone()  # the gradient of the copy is that of its input
            result = function(computed, targets)
            return result, computed, torch.linspace(0.5, 1.5, len(result), device=result.device)

        return Side(lambda result, computed, weights: torch.autograd.grad(result, computed, weights), prepare)

    return Row(
        {
            "ours": backward_only(our_logprobs("triton"), logits, targets),
            "ours, in place": in_place,
            "ours, torch": backward_only(our_logprobs("torch"), logits, targets),
            "eager": backward_only(lambda: rivals.eager_logprobs, logits, targets),
            "compile": backward_only(compiled(rivals.eager_logprobs, setup), logits, targets),
            "TRL": backward_only(rivals.trl_logprobs, logits, targets),
        },
        floor=lambda ceilings: 2 * logits.nbytes / ceilings.copy_bytes,
        floor_is="one read, one write",
        goal=0.85,
    )


def our_kl(impl: str, **options) -> Callable[[], Callable]:
    def make() -> Callable:
        from rlhf_kernels.kl_divergence import kl_divergence

        return lambda policy, reference: kl_divergence(policy, reference, impl=impl, **options)[0]

    return make


def kl_inputs(setup: Setup) -> tuple[Tensor, Tensor]:
    policy, _ = token_inputs(setup)
    return policy, policy + setup.normal(*policy.shape, spread=0.5)


def kl_divergence_forward(setup: Setup) -> Row:
    policy, reference = kl_inputs(setup)
    return Row(
        {
            "ours": forward_only(our_kl("triton"), policy, reference),
            "ours, entropy": forward_only(our_kl("triton", entropy=True), policy, reference),
            "ours, forward KL": forward_only(our_kl("triton", kind="forward"), policy, reference),
            "ours, JS": forward_only(our_kl("triton", kind="js"), policy, reference),
            "ours, torch": forward_only(our_kl("torch"), policy, reference),
            "eager": forward_only(lambda: rivals.eager_kl, policy, reference),
            "compile": forward_only(compiled(rivals.eager_kl, setup), policy, reference),
            "Liger": forward_only(rivals.liger_kl, policy, reference),
        },
        floor=lambda ceilings: 2 * policy.nbytes / ceilings.copy_bytes,
        floor_is="two reads",
        goal=0.85,
        goals={"compile": 4.0},
    )


def kl_divergence_both(setup: Setup) -> Row:
    policy, reference = kl_inputs(setup)
    return Row(
        {
            "ours": both_ways(our_kl("triton"), policy, reference, leaves=(0,)),
            "ours, torch": both_ways(our_kl("torch"), policy, reference, leaves=(0,)),
            "eager": both_ways(lambda: rivals.eager_kl, policy, reference, leaves=(0,)),
            "compile": both_ways(compiled(rivals.eager_kl, setup), policy, reference, leaves=(0,)),
        },
        floor=lambda ceilings: 5 * policy.nbytes / ceilings.copy_bytes,
        floor_is="four reads, one write",
    )


def head_inputs(setup: Setup, rows: int = 16_384) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary, width = setup.size(rows, 6), setup.size(128_256, 70), setup.size(4096, 16)
    return setup.normal(rows, width), setup.normal(vocabulary, width, spread=0.03), setup.integers(vocabulary, rows)


def products(count: int, hidden: Tensor, weight: Tensor) -> Callable[[Ceilings], float]:
    return lambda ceilings: count * 2 * hidden.numel() * len(weight) / ceilings.product_flops


def our_head(impl: str, **options) -> Callable[[], Callable]:
    def make() -> Callable:
        from rlhf_kernels.linear_logprobs import linear_logprobs

        return lambda hidden, weight, targets: linear_logprobs(hidden, weight, targets, impl=impl, **options)[0]

    return make


def our_token_loss(impl: str) -> Callable[[], Callable]:
    """The head of SFT, PPO and GRPO: the loss of a row depends on its log-prob only, so three products suffice."""

    def make() -> Callable:
        from rlhf_kernels.linear_logprobs import linear_token_loss

        def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            weights = torch.linspace(0.5, 1.5, len(hidden), device=hidden.device)
            loss = linear_token_loss(
                hidden, weight, targets, lambda logprobs, rows: logprobs * weights[rows], impl=impl
            )[0]
            return loss[None]

        return run

    return make


def linear_logprobs_both(setup: Setup) -> Row:
    inputs = head_inputs(setup)
    sides = {
        "ours": our_token_loss("triton"),
        "ours, any loss": our_head("triton"),
        "ours, torch": our_token_loss("torch"),
        "eager": lambda: rivals.eager_linear_logprobs,
        "compile": compiled(rivals.eager_linear_logprobs, setup),
        "Liger": rivals.liger_linear_logprobs,
        "TRL": rivals.trl_linear_logprobs,
        "torch fused": rivals.torch_linear_logprobs,
    }
    return Row(
        {name: both_ways(make, *inputs, leaves=(0, 1)) for name, make in sides.items()},
        floor=products(3, *inputs[:2]),
        floor_is="three products",
        goal=0.85,
        goals={"TRL": 1.25, "Liger": 2.5},
    )


def linear_logprobs_frozen(setup: Setup) -> Row:
    inputs = head_inputs(setup)
    sides = {
        "ours": our_token_loss("triton"),
        "ours, any loss": our_head("triton"),
        "eager": lambda: rivals.eager_linear_logprobs,
        "Liger": rivals.liger_linear_logprobs,
        "TRL": rivals.trl_linear_logprobs,
    }
    return Row(
        {name: both_ways(make, *inputs, leaves=(0,)) for name, make in sides.items()},
        floor=products(2, *inputs[:2]),
        floor_is="two products",
        goals={"TRL": 1.4},
    )


def our_linear_kl(impl: str) -> Callable[[], Callable]:
    def make() -> Callable:
        from rlhf_kernels.linear_kl import linear_kl

        return lambda *inputs: linear_kl(*inputs, kind="reverse", temperature=1.0, entropy=False, impl=impl)[0]

    return make


def linear_kl_both(setup: Setup) -> Row:
    hidden, weight, _ = head_inputs(setup, rows=8192)
    inputs = (hidden, weight, hidden + setup.normal(*hidden.shape, spread=0.3), weight.clone())
    sides = {
        "ours": our_linear_kl("triton"),
        "ours, torch": our_linear_kl("torch"),
        "eager": lambda: rivals.eager_linear_kl,
        "compile": compiled(rivals.eager_linear_kl, setup),
        "Liger": rivals.liger_linear_kl,
        "TRL": rivals.trl_linear_kl,
    }
    return Row(
        {name: both_ways(make, *inputs, leaves=(0, 1)) for name, make in sides.items()},
        floor=products(4, hidden, weight),
        floor_is="four products",
    )


def gae_whitened(setup: Setup) -> Row:
    shape = setup.size(512, 3), setup.size(2048, 20)
    rewards, values = (setup.normal(*shape, spread=spread, dtype=torch.float32) for spread in (1.0, 0.5))
    lengths = 1 + setup.integers(shape[1], shape[0], 1)
    mask = torch.arange(shape[1], device=setup.device) < lengths
    options = dict(gamma=1.0, lam=0.95, whiten=True)

    def ours(impl: str) -> Callable[[], Callable]:
        def make() -> Callable:
            from rlhf_kernels.gae import gae

            return lambda *inputs: gae(*inputs, **options, impl=impl)

        return make

    def two_launches() -> Callable:
        from rlhf_kernels.gae import triton_kernel

        return lambda *inputs: triton_kernel.gae(*inputs, **options, launches=2)

    def loop() -> Callable:
        from rlhf_kernels.gae.reference import gae

        return lambda *inputs: gae(*inputs, **options)

    sides = {"ours": ours("triton"), "ours, two launches": two_launches, "ours, torch": ours("torch"), "eager": loop}
    # Rewards, values and mask are read, advantages and returns written; then the advantages are read and written again.
    moved = 4 * rewards.nbytes + mask.nbytes + 2 * rewards.nbytes
    return Row(
        {name: forward_only(make, rewards, values, mask) for name, make in sides.items()},
        floor=lambda ceilings: moved / ceilings.copy_bytes,
        floor_is="memory alone",
        most_seconds=15e-6,
        one_launch=True,
    )


def packed_attention_both(setup: Setup) -> Row:
    """Eight prompts of two completions each in one stream, 32 query heads over 8 key-value heads of 128."""
    prompt, completion = setup.size(1024, 20), setup.size(512, 9)
    batch = PackedBatch.pack([([0] * prompt, [[0] * completion] * 2)] * setup.size(8, 2), share=True)
    layout, heads, size = batch.to(setup.device).layout, setup.size(32, 2), setup.size(128, 16)
    shapes = [(1, count, batch.num_tokens, size) for count in (heads, setup.size(8, 1), setup.size(8, 1))]
    inputs = [setup.normal(*shape) for shape in shapes]

    def ours(impl: str) -> Callable[[], Callable]:
        def make() -> Callable:
            from rlhf_kernels.packed_attention import packed_attention

            return lambda *inputs: packed_attention(*inputs, layout, impl=impl)

        return make

    def dense() -> Callable:
        from rlhf_kernels.packed_attention.layout import visible_ranges

        token = torch.arange(batch.num_tokens, device=setup.device)
        mask = visible_ranges(layout, batch.num_tokens, setup.device, None).visible(token[:, None], token)
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    sides = {"ours": ours("triton"), "ours, torch": ours("torch"), "eager": dense}

    # flex_attention has no backward on the CPU.
    def contest(make):
        return forward_only(make, *inputs) if setup.dry else both_ways(make, *inputs, leaves=(0, 1, 2))

    pairs = sum(
        (span.end - span.start) * (span.prompt_end - span.prompt_start) + (span.end - span.start) ** 2 / 2
        for span in batch.spans
    ) + sum({span.prompt_start: (span.prompt_end - span.prompt_start) ** 2 / 2 for span in batch.spans}.values())
    # Two products forward, five backward, over the pairs of tokens that see each other.
    return Row(
        {name: contest(make) for name, make in sides.items()},
        floor=lambda ceilings: 7 * 2 * pairs * heads * size / ceilings.product_flops,
        floor_is="seven products",
    )


ROWS: dict[str, Callable[[Setup], Row]] = {
    "token_logprobs forward": token_logprobs_forward,
    "token_logprobs backward": token_logprobs_backward,
    "kl_divergence forward": kl_divergence_forward,
    "kl_divergence fwd+bwd": kl_divergence_both,
    "linear_logprobs fwd+bwd": linear_logprobs_both,
    "linear_logprobs frozen head": linear_logprobs_frozen,
    "linear_kl fwd+bwd": linear_kl_both,
    "gae, whitened": gae_whitened,
    "packed_attention fwd+bwd": packed_attention_both,
}
