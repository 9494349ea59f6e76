"""DPO in depth: numbers by hand, its invariances, and the table that it and every other loss is an entry of."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.preference import PREFERENCE_LOSSES, PairTerms, preference_loss, register_preference_loss

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, pairs: int = 4, width: int = 5) -> dict[str, torch.Tensor]:
    """Random token log-probs, float64, ragged, with rubbish where the masks are False."""
    generator = torch.Generator().manual_seed(seed)
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    tensors = {name: -3 * torch.rand(pairs, width, dtype=torch.float64, generator=generator) for name in names}
    for side in ("chosen", "rejected"):
        mask = torch.arange(width) < torch.randint(1, width + 1, (pairs, 1), generator=generator)
        tensors[f"{side}_mask"] = mask
        for name in (f"{side}_logprobs", f"ref_{side}_logprobs"):
            tensors[name] = torch.where(mask, tensors[name], math.nan)
    return tensors


def one_pair(chosen: float, rejected: float, ref_chosen: float = 0.0, ref_rejected: float = 0.0) -> dict:
    """A pair of one-token completions with these log-probs."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    values = dict(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    tensors = {f"{name}_logprobs": torch.tensor([[value]], dtype=torch.float64) for name, value in values.items()}
    return tensors | {"chosen_mask": mask, "rejected_mask": mask}


def by_hand_pair() -> dict[str, torch.Tensor]:
    """Chosen (-1, -1) against the reference's (-1.5, -1): log-ratio 1/2. Rejected (-3), reference (-2): -1."""
    nan = math.nan
    return dict(
        chosen_logprobs=torch.tensor([[-1.0, -1.0]], requires_grad=True),
        ref_chosen_logprobs=torch.tensor([[-1.5, -1.0]]),
        chosen_mask=torch.tensor([[True, True]]),
        rejected_logprobs=torch.tensor([[-3.0, nan]], requires_grad=True),
        ref_rejected_logprobs=torch.tensor([[-2.0, nan]]),
        rejected_mask=torch.tensor([[True, False]]),
    )


def test_by_hand():
    """beta 2: rewards 1 and -2, logits 3, loss ln(1 + e^-3) = 0.0485874.

    Each chosen token's gradient is -beta sigmoid(-3) = -0.0948517, the rejected one's the opposite.
    """
    pair = by_hand_pair()
    loss, stats = preference_loss("sigmoid", **pair, beta=2.0)
    assert loss.item() == pytest.approx(0.0485874, abs=1e-7)
    loss.backward()
    assert pair["chosen_logprobs"].grad.tolist() == [pytest.approx([-0.0948517] * 2, abs=1e-7)]
    assert pair["rejected_logprobs"].grad.tolist() == [pytest.approx([0.0948517, 0.0], abs=1e-7)]
    assert not any(value.requires_grad for value in stats.values())
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        dict(
            accuracy=1.0,
            margin=3.0,
            chosen_reward=1.0,
            rejected_reward=-2.0,
            chosen_logprob=-2.0,
            rejected_logprob=-3.0,
        )
    )


def test_label_smoothing_by_hand():
    """cDPO, e = 0.1: 0.9 ln(1 + e^-3) + 0.1 ln(1 + e^3) = ln(1 + e^-3) + 0.1 * 3 = 0.3485874."""
    loss, _ = preference_loss("sigmoid", **by_hand_pair(), beta=2.0, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.3485874, abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_stops_at_the_labels_confidence(smoothing):
    """With certain labels cDPO is minimal where sigmoid(beta d) = 1 - e: the gradient is 0 there, and turns sign."""
    best = math.log((1 - smoothing) / smoothing) / 0.5

    def slope(d: float) -> float:
        pair = one_pair(d, 0.0)
        pair["chosen_logprobs"].requires_grad_()
        preference_loss("sigmoid", **pair, beta=0.5, label_smoothing=smoothing)[0].backward()
        return pair["chosen_logprobs"].grad.item()

    assert slope(best) == pytest.approx(0, abs=1e-12)
    assert slope(best - 0.1) < 0 < slope(best + 0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@settings(max_examples=20, deadline=None)
@given(seed=seeds, beta=st.floats(0.01, 5))
def test_the_first_step_is_ln_two(smoothing, seed, beta):
    """Policy == reference: every logit is 0, so ln 2 whatever beta, accuracy 1/2, gradient -+ beta (1/2 - e) / B."""
    pairs = draw(seed)
    for side in ("chosen", "rejected"):
        pairs[f"{side}_logprobs"] = pairs[f"ref_{side}_logprobs"].clone().requires_grad_()
    loss, stats = preference_loss("sigmoid", **pairs, beta=beta, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert stats["accuracy"] == 0.5 and stats["margin"] == 0
    loss.backward()
    gradient = -beta * (0.5 - smoothing) / 4 * pairs["chosen_mask"].double()
    torch.testing.assert_close(pairs["chosen_logprobs"].grad, gradient, rtol=0, atol=1e-12)
    gradient = beta * (0.5 - smoothing) / 4 * pairs["rejected_mask"].double()
    torch.testing.assert_close(pairs["rejected_logprobs"].grad, gradient, rtol=0, atol=1e-12)


def test_accuracy_counts_a_tie_half():
    """Log-ratio differences 1, -1 and 0: (1 + 0 + 1/2) / 3."""
    pairs = [one_pair(1.0, 0.0), one_pair(0.0, 1.0), one_pair(2.0, 3.0, 1.0, 2.0)]
    batch = {name: torch.cat([pair[name] for pair in pairs]) for name in pairs[0]}
    assert preference_loss("sigmoid", **batch)[1]["accuracy"] == 0.5


@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
def test_hopeless_and_perfect_pairs_stay_finite(label_smoothing):
    """Logits -+ 1e4: loss 1e4 (1 - e) and 1e4 e, gradient of the chosen log-prob -(1 - e) and e (beta = 1)."""
    for d, loss, slope in [
        (-1e4, 1e4 * (1 - label_smoothing), label_smoothing - 1),
        (1e4, 1e4 * label_smoothing, label_smoothing),
    ]:
        pair = one_pair(d, 0.0)
        pair["chosen_logprobs"].requires_grad_()
        value, _ = preference_loss("sigmoid", **pair, beta=1.0, label_smoothing=label_smoothing)
        value.backward()
        assert value.item() == pytest.approx(loss) and pair["chosen_logprobs"].grad.item() == pytest.approx(slope)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, beta=st.floats(0.05, 2), smoothing=st.floats(0, 0.49))
def test_pairs_in_another_order_or_wider_padding_change_nothing(seed, beta, smoothing):
    pairs = draw(seed)
    options = dict(beta=beta, label_smoothing=smoothing)
    loss, stats = preference_loss("sigmoid", **pairs, **options)
    assert loss.isfinite()
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = {
        name: F.pad(tensor[order], (0, 3), value=0 if "mask" in name else math.inf) for name, tensor in pairs.items()
    }
    moved_loss, moved_stats = preference_loss("sigmoid", **moved, **options)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-12, atol=0)
    for name in stats:
        torch.testing.assert_close(moved_stats[name], stats[name], rtol=1e-6, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, shift=st.floats(-5, 5))
def test_what_both_sides_share_does_not_matter(seed, shift):
    """A shift of policy and reference alike, and a shift of chosen and rejected alike, cancel; one alone does not."""
    pairs = draw(seed)
    loss = preference_loss("sigmoid", **pairs)[0]

    def shifted(*names):
        first = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64) * shift  # every completion has a first token
        return preference_loss("sigmoid", **pairs | {f"{n}_logprobs": pairs[f"{n}_logprobs"] + first for n in names})[0]

    torch.testing.assert_close(shifted("chosen", "ref_chosen"), loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(shifted("chosen", "rejected"), loss, rtol=1e-10, atol=0)
    if abs(shift) > 1e-3:
        assert (shifted("chosen") < loss) == (shift > 0)


def test_gradcheck():
    """By the tokens of both sides, ragged, smoothed; the second derivative too."""
    pairs = {name: t if "mask" in name else t.nan_to_num(0.0) for name, t in draw(0, pairs=2, width=3).items()}
    inputs = tuple(pairs.pop(name).requires_grad_() for name in ("chosen_logprobs", "rejected_logprobs"))

    def loss(chosen, rejected):
        return preference_loss(
            "sigmoid", chosen_logprobs=chosen, rejected_logprobs=rejected, **pairs, beta=0.7, label_smoothing=0.2
        )[0]

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.fixture
def table():
    """The table, given back as it was."""
    before = dict(PREFERENCE_LOSSES)
    yield PREFERENCE_LOSSES
    PREFERENCE_LOSSES.clear()
    PREFERENCE_LOSSES.update(before)


def test_a_loss_of_ones_own(table):
    """A decorator, and its name works: a hinge of 5 on beta times the log-ratios' difference, 2 * 1.5: 5 - 3 = 2."""

    @register_preference_loss("my_hinge")
    def my_hinge(pairs: PairTerms, *, beta, label_smoothing):
        return (5 - beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)).clamp(min=0)

    assert preference_loss("my_hinge", **by_hand_pair(), beta=2.0)[0] == 2
    with pytest.raises(ValueError, match="'my_hinge' is registered already"):
        register_preference_loss("my_hinge")(my_hinge)
    assert table["my_hinge"].function is my_hinge


def test_a_loss_without_reference_over_mean_logprobs(table):
    """Means: chosen (-1 - 1) / 2 = -1, rejected -3. Without a reference the log-ratio is the log-prob: -1 - -3 = 2."""

    @register_preference_loss("plain", needs_reference=False, length_normalized=True)
    def plain(pairs: PairTerms, *, beta, label_smoothing):
        assert torch.equal(pairs.chosen_log_ratio, pairs.chosen_logprob)
        return pairs.chosen_log_ratio - pairs.rejected_log_ratio

    pair = by_hand_pair()
    assert preference_loss("plain", **pair)[0] == 2
    without = {name: tensor for name, tensor in pair.items() if not name.startswith("ref")}
    assert preference_loss("plain", **without)[0] == 2


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"no preference loss named 'sigmod'.*did you mean 'sigmoid'\?"):
        preference_loss("sigmod", **by_hand_pair())
    with pytest.raises(ValueError, match="there are .*'sigmoid'.*]$"):
        preference_loss("xyzzy", **by_hand_pair())


def test_a_missing_reference_is_named():
    pair = by_hand_pair() | {"ref_rejected_logprobs": None}
    with pytest.raises(ValueError, match="loss 'sigmoid' needs ref_chosen_logprobs and ref_rejected_logprobs"):
        preference_loss("sigmoid", **pair)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": -1.0},
        {"beta": math.nan},
        {"label_smoothing": -0.1},
        {"label_smoothing": 0.5},
        {"label_smoothing": math.nan},
    ],
)
def test_parameters_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}: expected"):
        preference_loss("sigmoid", **by_hand_pair(), **options)
