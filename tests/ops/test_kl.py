"""KL estimators, summed exactly over three symbols and over a tree of two steps: which use of each is right.

Also the exact KL over a vocabulary, and the per-token KL penalty.
"""

from __future__ import annotations

import contextlib
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.ops.advantages import discounted_returns
from rlhf_core.ops.kl import ESTIMATORS, USES, kl_estimate, kl_full, kl_penalty, warn_about_kl

LN2, LN3 = math.log(2), math.log(3)
# KL(A || B) = 1/2 ln 4 + 1/4 ln 2 + 1/4 ln(1/3) = 5/4 ln 2 - 1/4 ln 3       = 0.5918
# KL(B || A) = 1/8 ln(1/4) + 1/8 ln(1/2) + 3/4 ln 3 = 3/4 ln 3 - 3/8 ln 2    = 0.5640
A, B = [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]
KL_AB, KL_BA = 1.25 * LN2 - 0.25 * LN3, 0.75 * LN3 - 0.375 * LN2

both_ways = pytest.mark.parametrize(("policy", "reference", "kl"), [(A, B, KL_AB), (B, A, KL_BA)], ids=["AB", "BA"])
distributions = st.lists(st.floats(-3, 3), min_size=3, max_size=3).map(
    lambda logits: torch.tensor(logits, dtype=torch.float64).softmax(-1)
)


def expected(policy, reference, estimator: str) -> float:
    """E over the policy of the estimate, all three symbols weighed by their probability."""
    policy, reference = torch.as_tensor(policy).double(), torch.as_tensor(reference).double()
    return (policy * kl_estimate(policy.log(), reference.log(), estimator=estimator)).sum().item()


def loss_gradient(policy, reference, estimator: str) -> torch.Tensor:
    """Gradient of E_sampled[estimate] by the policy's logits: what a loss over sampled tokens learns from."""
    policy, reference = torch.as_tensor(policy).double(), torch.as_tensor(reference).double()
    logits = policy.log().requires_grad_()
    (policy * kl_estimate(logits.log_softmax(-1), reference.log(), estimator=estimator)).sum().backward()
    return logits.grad


# The cells of the module's table that are right.
RIGHT = {("k1", "reward"), ("k2", "loss"), ("full", "loss")}
RIGHT |= {(estimator, "weighted loss") for estimator in ("k1", "k3", "full")}
every_use = pytest.mark.parametrize(("estimator", "use"), [(e, use) for e in ESTIMATORS for use in USES])


def surrogate(use: str, probs, kl, logprobs, old_logprobs):
    """Expectation, over what `probs` (a constant) weighs, of what a use of the estimate `kl` hands to autograd."""
    if use == "reward":
        return (probs * kl.detach() * logprobs).sum()
    return (probs * kl * ((logprobs - old_logprobs).exp() if use == "weighted loss" else 1.0)).sum()


def gradient_of_use(estimator: str, use: str, policy, reference, old=None) -> torch.Tensor:
    """By the policy's logits, over three symbols of one state, sampled from `old` (the policy itself by default)."""
    logits = policy.log().requires_grad_()
    logprobs, old = logits.log_softmax(-1), policy if old is None else old
    if estimator == "full":
        kl = kl_full(logits, reference.log()).expand(3)
    else:
        kl = kl_estimate(logprobs, reference.log(), estimator=estimator)
    return torch.autograd.grad(surrogate(use, old, kl, logprobs, old.log()), logits)[0]


def exact_gradient(policy, reference) -> torch.Tensor:
    """d KL / d logit_j = p_j (d_j - KL)."""
    log_ratio = (policy / reference).log()
    return policy * (log_ratio - (policy * log_ratio).sum())


@every_use
def test_which_use_is_right(estimator, use):
    """The expected gradient is that of the KL where the table says so; elsewhere it differs, and there is a warning."""
    a, b = (torch.tensor(p, dtype=torch.float64) for p in (A, B))
    for policy, reference in ((a, b), (b, a)):
        gradient, exact = gradient_of_use(estimator, use, policy, reference), exact_gradient(policy, reference)
        if (estimator, use) in RIGHT:
            torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)
        else:
            assert (gradient - exact).abs().max() > 0.03
    if (estimator, use) in RIGHT:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_about_kl(estimator, use)
    else:
        with pytest.warns(UserWarning, match=f"^KL estimator '{estimator}' as a {use}: .*use ") as record:
            warn_about_kl(estimator, use)
        assert len(record) == 1


@settings(max_examples=30, deadline=None)
@given(policy=distributions, reference=distributions, old=distributions)
def test_the_right_uses_on_any_distributions(policy, reference, old):
    """And the ratio makes old samples as good as new ones."""
    exact = exact_gradient(policy, reference)
    for estimator, use in RIGHT:
        gradient = gradient_of_use(estimator, use, policy, reference)
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-10)
    for estimator in ("k1", "k3", "full"):
        gradient = gradient_of_use(estimator, "weighted loss", policy, reference, old)
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-10)


@both_ways
def test_what_the_wrong_uses_do_instead(policy, reference, kl):
    """k1 as a loss and full as a reward: nothing. k3 as a loss: p - q, of KL(reference || policy).

    abs as a loss: the gradient of sum |p - q|. Every weighted loss: the gradient of the estimator's expectation.
    """
    policy, reference = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    close = dict(rtol=0, atol=1e-12)
    for estimator, use in (("k1", "loss"), ("full", "reward")):
        torch.testing.assert_close(gradient_of_use(estimator, use, policy, reference), torch.zeros(3).double(), **close)
    torch.testing.assert_close(gradient_of_use("k3", "loss", policy, reference), policy - reference, **close)
    logits = policy.log().requires_grad_()
    (total_variation,) = torch.autograd.grad((logits.softmax(-1) - reference).abs().sum(), logits)
    torch.testing.assert_close(gradient_of_use("abs", "loss", policy, reference), total_variation, **close)
    for estimator in ("k1", "k2", "k3", "abs"):
        estimates = kl_estimate(logits.log_softmax(-1), reference.log(), estimator=estimator)
        (gradient,) = torch.autograd.grad((logits.softmax(-1) * estimates).sum(), logits)
        torch.testing.assert_close(gradient_of_use(estimator, "weighted loss", policy, reference), gradient, **close)


def test_k2_and_k3_as_rewards_vanish_near_the_reference():
    """A hundredth as far away, the KL's gradient is a hundredth, theirs a ten-thousandth."""

    def norms(distance):
        policy = (torch.tensor(B).double().log() + distance * torch.tensor([1, -1, 0.3]).double()).softmax(-1)
        reference = torch.tensor(B).double()
        yield exact_gradient(policy, reference).norm().item()
        for estimator in ("k2", "k3"):
            yield gradient_of_use(estimator, "reward", policy, reference).norm().item()

    exact, *theirs = (near / far for near, far in zip(norms(1e-4), norms(1e-2), strict=True))
    assert exact == pytest.approx(1e-2, rel=0.02)
    assert theirs == pytest.approx([1e-4, 1e-4], rel=0.02)


class Tree:
    """Two steps of three symbols, all nine sequences: a policy with logits for each state, and a reference."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.logits, self.reference = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)  # root, 3 children
        self.logits.requires_grad_()
        first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
        self.states, self.tokens = torch.stack((torch.zeros(9).long(), first + 1), 1), torch.stack((first, second), 1)
        self.logprobs = self.chosen(self.logits)  # (9, 2), as is all below
        self.ref_logprobs = self.chosen(self.reference)
        self.kl = kl_full(self.logits, self.reference)[self.states]
        self.probs = self.logprobs.detach().sum(-1, keepdim=True).exp()  # (9, 1)

    def chosen(self, logits):
        return logits.log_softmax(-1)[self.states, self.tokens]

    def gradient(self, scalar):
        return torch.autograd.grad(scalar, self.logits, retain_graph=True)[0]

    @property
    def of_the_sequences(self):
        """Gradient of the KL between the two distributions of whole sequences."""
        probs = self.logprobs.sum(-1, keepdim=True).exp()
        return self.gradient((probs * (self.logprobs - self.ref_logprobs)).sum())

    @property
    def of_the_states(self):
        """Gradient of the visited states' KL, the visits held fixed."""
        return self.gradient((self.probs * self.kl).sum())

    def as_reward(self, estimator):
        """Policy gradient of the rewards-to-go with KL penalty, as in a trainer."""
        mask, exact = torch.ones(9, 2, dtype=torch.bool), self.kl.detach() if estimator == "full" else None
        arguments = torch.zeros(9), self.logprobs.detach(), self.ref_logprobs, mask
        quiet = contextlib.nullcontext() if estimator == "k1" else pytest.warns(UserWarning, match="as a reward")
        with quiet:
            rewards, _ = kl_penalty(*arguments, kl_coef=1, estimator=estimator, kl=exact)
        return self.gradient(surrogate("reward", self.probs, -discounted_returns(rewards, mask), self.logprobs, None))

    def as_loss(self, estimator, use):
        kl = self.kl if estimator == "full" else kl_estimate(self.logprobs, self.ref_logprobs, estimator=estimator)
        return self.gradient(surrogate(use, self.probs, kl, self.logprobs, self.logprobs.detach()))


def test_over_sequences():
    """k1 as a reward is the sequences' gradient; the right losses are the states', which is not the same.

    Full as a reward is just the difference, so with its loss it is whole. k2 and k3 as rewards are neither.
    """
    tree, close = Tree(), dict(rtol=0, atol=1e-12)
    of_the_sequences, of_the_states = tree.of_the_sequences, tree.of_the_states
    assert (of_the_sequences - of_the_states).abs().max() > 0.05
    torch.testing.assert_close(tree.as_reward("k1"), of_the_sequences, **close)
    torch.testing.assert_close(tree.as_reward("full"), of_the_sequences - of_the_states, **close)
    for estimator, use in RIGHT - {("k1", "reward")}:
        torch.testing.assert_close(tree.as_loss(estimator, use), of_the_states, **close)
    for estimator in ("k2", "k3", "abs"):
        for truth in (of_the_sequences, of_the_states, of_the_sequences - of_the_states):
            assert (tree.as_reward(estimator) - truth).abs().max() > 0.02


@settings(max_examples=30, deadline=None)
@given(policy=distributions, reference=distributions)
def test_full_is_exact_in_both_directions(policy, reference):
    """And its gradient by the policy: p (d - KL), and p - q forward."""
    close = dict(rtol=0, atol=1e-12)
    for direction, first, second, gradient in (
        ("reverse", policy, reference, exact_gradient(policy, reference)),
        ("forward", reference, policy, policy - reference),
    ):
        logits = (policy.log() + 3).requires_grad_()  # softmax is invariant to a shift
        kl = kl_full(logits, reference.log() - 1, direction=direction)
        torch.testing.assert_close(kl, (first * (first / second).log()).sum(), **close)
        torch.testing.assert_close(torch.autograd.grad(kl, logits)[0], gradient, **close)


def test_full_by_hand():
    """Each position of its own; a temperature t is a softmax of logits / t: here of A's squares, (4, 1, 1) / 6.

    KL((4,1,1)/6 || uniform) = 2/3 ln 2 + 1/3 ln(1/2) = 1/3 ln 2.
    """
    logits, ref_logits = torch.tensor([A, B]).log(), torch.tensor([B, A]).log()
    torch.testing.assert_close(kl_full(logits, ref_logits), torch.tensor([KL_AB, KL_BA]))
    torch.testing.assert_close(kl_full(logits, ref_logits, direction="forward"), torch.tensor([KL_BA, KL_AB]))
    warm = kl_full(torch.tensor(A).log(), torch.zeros(3), temperature=0.5)
    assert warm.item() == pytest.approx(LN2 / 3, abs=1e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_forbidden_tokens(direction):
    """-inf in both: as if the token were not in the vocabulary. Only in the second distribution: infinite.

    Only in the first: 0 log 0 = 0. The gradient is finite wherever the KL is.
    """
    inf = math.inf
    logits = torch.tensor([[1.0, -2, -inf, 0.5]], dtype=torch.float64, requires_grad=True)
    ref_logits = torch.tensor([[0.0, 1, -inf, 2]], dtype=torch.float64)
    kept = torch.tensor([0, 1, 3])
    kl = kl_full(logits, ref_logits, direction=direction)
    torch.testing.assert_close(kl, kl_full(logits[:, kept], ref_logits[:, kept], direction=direction))
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 2] == 0
    narrow, wide = torch.tensor([0.0, 0.0, -inf]), torch.zeros(3)
    first, second = (narrow, wide) if direction == "reverse" else (wide, narrow)
    half = first.clone().requires_grad_()
    kl = kl_full(half, second, direction=direction)
    assert kl.item() == pytest.approx(math.log(3 / 2))  # of (1/2, 1/2, 0) from (1/3, 1/3, 1/3)
    kl.backward()
    assert half.grad.isfinite().all()
    assert kl_full(second, first, direction=direction) == inf


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_full_gradcheck_and_dtypes(direction):
    policy_logits, ref_logits = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy_logits.requires_grad_(), ref_logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, q: kl_full(p, q, temperature=0.7, direction=direction), (policy_logits, ref_logits)
    )
    exact = kl_full(policy_logits, ref_logits, direction=direction)
    assert exact.dtype == torch.float64 and exact.shape == (2, 3)
    half = kl_full(policy_logits.bfloat16(), ref_logits.bfloat16(), direction=direction)
    assert half.dtype == torch.float32
    rounded = kl_full(policy_logits.bfloat16().double(), ref_logits.bfloat16().double(), direction=direction)
    torch.testing.assert_close(half.double(), rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", [100.0, 1000.0, 1e30])
def test_full_is_finite_far_away(distance):
    """All on one symbol against a uniform reference: ln 3; and the other way a third of the way down, twice."""
    logits = torch.tensor([distance, 0, 0], requires_grad=True)
    for direction, expected in (("reverse", LN3), ("forward", 2 / 3 * distance - LN3)):
        kl = kl_full(logits, torch.zeros(3), direction=direction)
        assert kl.item() == pytest.approx(expected, rel=1e-6)
        assert torch.autograd.grad(kl, logits)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=0.0), "temperature=0.0: expected more than 0"),
        (dict(temperature=math.nan), "temperature=nan: expected more than 0"),
        (dict(direction="backward"), "direction='backward': expected reverse or forward"),
    ],
)
def test_wrong_arguments_of_full_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        kl_full(torch.zeros(1, 3), torch.zeros(1, 3), **options)


@both_ways
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_and_of_the_right_direction(policy, reference, kl, estimator):
    """The two directions differ (0.5918, 0.5640), so an inverted ratio cannot pass."""
    assert expected(policy, reference, estimator) == pytest.approx(kl, abs=1e-12)


def test_k2_by_hand():
    """E[d^2] / 2. From A, d = (2 ln 2, ln 2, -ln 3): (4/2 + 1/4) ln2^2 / 2 + ln3^2 / 8 = 9/8 ln2^2 + 1/8 ln3^2.

    From B, d = (-2 ln 2, -ln 2, ln 3): (4/8 + 1/8) ln2^2 / 2 + 3/4 ln3^2 / 2 = 5/16 ln2^2 + 3/8 ln3^2.
    Neither is the KL.
    """
    assert expected(A, B, "k2") == pytest.approx(1.125 * LN2**2 + 0.125 * LN3**2, abs=1e-12)
    assert expected(B, A, "k2") == pytest.approx(0.3125 * LN2**2 + 0.375 * LN3**2, abs=1e-12)
    assert abs(expected(A, B, "k2") - KL_AB) > 0.09


@both_ways
def test_gradients_as_losses(policy, reference, kl):
    """d KL / d logit_j = p_j (d_j - KL). k2 gives exactly that; k1 gives 0; k3 gives p - q, of the *reverse* KL."""
    policy, reference = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    exact = policy * ((policy / reference).log() - kl)
    torch.testing.assert_close(loss_gradient(policy, reference, "k2"), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss_gradient(policy, reference, "k1"), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss_gradient(policy, reference, "k3"), policy - reference, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(policy=distributions, reference=distributions)
def test_estimators_on_any_pair_of_distributions(policy, reference):
    kl = (policy * (policy / reference).log()).sum().item()
    assert expected(policy, reference, "k1") == pytest.approx(kl, abs=1e-12)
    assert expected(policy, reference, "k3") == pytest.approx(kl, abs=1e-12)
    assert expected(policy, reference, "abs") >= kl - 1e-12
    for estimator in ("k2", "k3", "abs"):
        assert (kl_estimate(policy.log(), reference.log(), estimator=estimator) >= -1e-15).all()


def test_k3_keeps_its_digits_near_zero():
    """d = 1e-4 in float32: d^2 / 2 = 5e-9, below the 6e-8 that exp(-d) - 1 + d would be rounded to."""
    k3 = kl_estimate(torch.tensor(1e-4), torch.tensor(0.0), estimator="k3")
    assert k3.item() == pytest.approx(5e-9, rel=1e-2)


def test_abs_by_hand():
    """From A: (1/2 2 + 1/4) ln 2 + 1/4 ln 3. From B: (1/8 2 + 1/8) ln 2 + 3/4 ln 3. Both above the KL."""
    assert expected(A, B, "abs") == pytest.approx(1.25 * LN2 + 0.25 * LN3, abs=1e-12)
    assert expected(B, A, "abs") == pytest.approx(0.375 * LN2 + 0.75 * LN3, abs=1e-12)


def test_unknown_names_are_named():
    nothing = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="estimator='k4': expected k1, k2, k3 or abs$"):
        kl_estimate(nothing, nothing, estimator="k4")
    with pytest.raises(ValueError, match="'full': expected k1, k2, k3 or abs; full needs logits, see kl_full"):
        kl_estimate(nothing, nothing, estimator="full")
    with pytest.raises(ValueError, match="estimator='k4': expected one of k1, k2, k3, abs, full"):
        warn_about_kl("k4", "loss")
    with pytest.raises(ValueError, match="use='penalty': expected one of reward, loss, weighted loss"):
        warn_about_kl("k1", "penalty")
    with pytest.raises(ValueError, match="estimator='k4': expected one of"):
        kl_penalty(torch.zeros(1), nothing, nothing, nothing.bool(), kl_coef=0.1, estimator="k4")


MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])


def test_penalty_by_hand():
    """kl_coef 1/2. The score only on the last token of each row, the penalty on each of its tokens.

    row 0: d = (1, 2)       r = (-1/2, 10 - 1)          = (-1/2, 9)
    row 1: d = (-1, 0, 4)   r = (1/2, 0, 20 - 2)        = (1/2, 0, 18)
    row 2: d = (3)          r = (-3 - 3/2)              = (-9/2)
    """
    nan = math.nan
    logprobs = torch.tensor([[-1.0, -1.0, nan], [-3.0, -2.0, -1.0], [-1.0, math.inf, nan]])
    ref_logprobs = torch.tensor([[-2.0, -3.0, 0.0], [-2.0, -2.0, -5.0], [-4.0, nan, -math.inf]])
    rewards, kl = kl_penalty(torch.tensor([10.0, 20.0, -3.0]), logprobs, ref_logprobs, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 9, 0], [0.5, 0, 18], [-4.5, 0, 0]]
    assert kl.tolist() == [[1, 2, 0], [-1, 0, 4], [3, 0, 0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_penalty_takes_the_estimator_it_is_given(estimator):
    """And warns, in the name of whoever called it, where that is wrong as a reward."""
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = -torch.rand(2, 3, 3, generator=generator)
    scores = torch.tensor([1.0, 2.0, 3.0])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        rewards, kl = kl_penalty(scores, logprobs, ref_logprobs, MASK, kl_coef=0.3, estimator=estimator)
    warned = [(UserWarning, __file__)] if estimator != "k1" else []
    assert [(warning.category, warning.filename) for warning in record] == warned
    torch.testing.assert_close(kl[MASK], kl_estimate(logprobs, ref_logprobs, estimator=estimator)[MASK])
    torch.testing.assert_close(rewards.sum(-1), scores - 0.3 * kl.sum(-1))


def test_scores_of_another_dtype_are_taken():
    rewards, _ = kl_penalty(torch.tensor([2.0], dtype=torch.bfloat16), *torch.zeros(2, 1, 2), MASK[:1, :2], kl_coef=0.1)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [[0, 2]]


def test_an_empty_completion_is_refused():
    with pytest.raises(ValueError, match="mask: expected at least one token in every completion"):
        kl_penalty(torch.zeros(3), *torch.zeros(2, 3, 3), MASK & torch.tensor([[True], [False], [True]]), kl_coef=0.1)


def test_penalty_takes_an_exact_kl():
    """Row 1 of MASK, kl_coef 1/2, kl (1, 2, 4): r = (-1/2, -1, 20 - 2)."""
    nan = math.nan
    exact = torch.tensor([[1.0, 2, nan], [1, 2, 4], [3, nan, math.inf]])
    garbage = torch.full((3, 3), nan)
    scores = torch.tensor([10.0, 20, -3])
    with pytest.warns(UserWarning, match="'full' as a reward: its gradient covers only the KL of later tokens"):
        rewards, kl = kl_penalty(scores, garbage, garbage, MASK, kl_coef=0.5, estimator="full", kl=exact)
    assert rewards.tolist() == [[-0.5, 9, 0], [-0.5, -1, 18], [-4.5, 0, 0]]
    assert kl.tolist() == [[1, 2, 0], [1, 2, 4], [3, 0, 0]]


def test_the_full_kl_beside_its_loss_is_right_and_says_nothing():
    """The others are wrong as a reward with a loss beside them as without."""
    arguments, options = (torch.ones(3), *torch.zeros(2, 3, 3), MASK), dict(kl_coef=0.5, with_loss=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards, _ = kl_penalty(*arguments, estimator="full", kl=torch.ones(3, 3), **options)
    assert rewards.tolist() == [[-0.5, 0.5, 0], [-0.5, -0.5, 0.5], [0.5, 0, 0]]
    with pytest.warns(UserWarning, match="'k2' as a reward"):
        kl_penalty(*arguments, estimator="k2", **options)


def test_scores_of_single_tokens_and_the_remainder_at_the_end():
    """Row 0: 10 in all, 3 for its first token, so 7 at its last; row 1: -1 + 2 + 4 of 5, nothing left; row 2: 6 of -3.
    Each less 1/2 of d = 1. Values outside the mask are ignored.
    """
    nan = math.nan
    own = torch.tensor([[3.0, 0, nan], [-1, 2, 4], [6, math.inf, 1]], dtype=torch.float64)
    rewards, _ = kl_penalty(
        torch.tensor([10.0, 5, -3]), torch.zeros(3, 3), -torch.ones(3, 3), MASK, kl_coef=0.5, token_scores=own
    )
    assert rewards.tolist() == [[2.5, 6.5, 0], [-1.5, 1.5, 3.5], [-3.5, 0, 0]]
    assert rewards.dtype == torch.float32


def test_the_score_is_on_the_last_token_of_any_layout():
    """Padded on the left, on both sides, and with a hole."""
    mask = torch.tensor([[False, True, True, True], [False, True, True, False], [True, False, True, False]])
    rewards, _ = kl_penalty(torch.tensor([1.0, 2.0, 3.0]), *torch.zeros(2, 3, 4), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 0, 2, 0], [0, 0, 3, 0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.filterwarnings("ignore:KL estimator")
def test_masked_garbage_leaks_neither_value_nor_gradient(estimator):
    generator = torch.Generator().manual_seed(1)
    clean, ref_logprobs = -torch.rand(2, 3, 3, generator=generator)
    outputs = []
    for fill in (0.0, math.nan, 1e30):
        logprobs = torch.where(MASK, clean, fill).requires_grad_()
        rewards, kl = kl_penalty(
            torch.ones(3), logprobs, torch.where(MASK, ref_logprobs, -fill), MASK, kl_coef=0.5, estimator=estimator
        )
        outputs.append((rewards, kl, *torch.autograd.grad(rewards.sum(), logprobs)))
    for dirty in outputs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outputs[0], dirty, strict=True))
        assert (dirty[2][~MASK] == 0).all() and (dirty[2][MASK] != 0).all()


def test_wrong_arguments_of_the_penalty_are_named():
    arguments = torch.zeros(3), *torch.zeros(2, 3, 3), MASK
    for kl_coef in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"kl_coef={kl_coef}: expected 0 or more"):
            kl_penalty(*arguments, kl_coef=kl_coef)
    with pytest.raises(ValueError, match="estimator='k1': expected a kl with full, and none with any other"):
        kl_penalty(*arguments, kl_coef=0.1, kl=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="estimator='full': expected a kl with full"):
        kl_penalty(*arguments, kl_coef=0.1, estimator="full")
