"""DPO in depth: values by hand, invariances, running metrics, and the table that holds it and every other loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.control import RunningMean
from rlhf_core.losses.preference import (
    PREFERENCE_LOSSES,
    Completions,
    Pairs,
    PairTerms,
    preference_loss,
    register_preference_loss,
    running_metrics,
)
from tests.losses.pairs_of import pairs_of

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, pairs: int = 4, width: int = 5) -> dict[str, torch.Tensor]:
    """Random token log-probs, float64, of different lengths, NaN where the masks are False."""
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
    loss, stats = preference_loss("sigmoid", pairs_of(**pair), beta=2.0)
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
    loss, _ = preference_loss("sigmoid", pairs_of(**by_hand_pair()), beta=2.0, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.3485874, abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_has_its_minimum_at_the_labels_confidence(smoothing):
    """cDPO is minimal where sigmoid(beta d) = 1 - e: the gradient is 0 there, and changes its sign."""
    best = math.log((1 - smoothing) / smoothing) / 0.5

    def slope(d: float) -> float:
        pair = one_pair(d, 0.0)
        pair["chosen_logprobs"].requires_grad_()
        preference_loss("sigmoid", pairs_of(**pair), beta=0.5, label_smoothing=smoothing)[0].backward()
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
    loss, stats = preference_loss("sigmoid", pairs_of(**pairs), beta=beta, label_smoothing=smoothing)
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
    assert preference_loss("sigmoid", pairs_of(**batch))[1]["accuracy"] == 0.5


@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
def test_hopeless_and_perfect_pairs_stay_finite(label_smoothing):
    """Logits -+ 1e4: loss 1e4 (1 - e) and 1e4 e, gradient of the chosen log-prob -(1 - e) and e (beta = 1)."""
    for d, loss, slope in [
        (-1e4, 1e4 * (1 - label_smoothing), label_smoothing - 1),
        (1e4, 1e4 * label_smoothing, label_smoothing),
    ]:
        pair = one_pair(d, 0.0)
        pair["chosen_logprobs"].requires_grad_()
        value, _ = preference_loss("sigmoid", pairs_of(**pair), beta=1.0, label_smoothing=label_smoothing)
        value.backward()
        assert value.item() == pytest.approx(loss) and pair["chosen_logprobs"].grad.item() == pytest.approx(slope)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, shift=st.floats(-5, 5))
def test_what_both_sides_share_does_not_matter(seed, shift):
    """A shift of policy and reference alike, and a shift of chosen and rejected alike, cancel; one alone does not."""
    pairs = draw(seed)
    loss = preference_loss("sigmoid", pairs_of(**pairs))[0]

    def shifted(*names):
        first = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64) * shift  # every completion has a first token
        moved = pairs | {f"{n}_logprobs": pairs[f"{n}_logprobs"] + first for n in names}
        return preference_loss("sigmoid", pairs_of(**moved))[0]

    torch.testing.assert_close(shifted("chosen", "ref_chosen"), loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(shifted("chosen", "rejected"), loss, rtol=1e-10, atol=0)
    if abs(shift) > 1e-3:
        assert (shifted("chosen") < loss) == (shift > 0)


def test_gradcheck():
    """With respect to the tokens of both sides, with label smoothing; the second derivative too."""
    pairs = {name: t if "mask" in name else t.nan_to_num(0.0) for name, t in draw(0, pairs=2, width=3).items()}
    inputs = tuple(pairs.pop(name).requires_grad_() for name in ("chosen_logprobs", "rejected_logprobs"))

    def loss(chosen, rejected):
        given = pairs_of(chosen_logprobs=chosen, rejected_logprobs=rejected, **pairs)
        return preference_loss("sigmoid", given, beta=0.7, label_smoothing=0.2)[0]

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.fixture
def table():
    """The table, restored afterwards."""
    before = dict(PREFERENCE_LOSSES)
    yield PREFERENCE_LOSSES
    PREFERENCE_LOSSES.clear()
    PREFERENCE_LOSSES.update(before)


def test_a_loss_of_ones_own(table):
    """Registered by a decorator: a hinge of 5 on beta times the log-ratios' difference, 2 * 1.5: 5 - 3 = 2."""

    @register_preference_loss("my_hinge")
    def my_hinge(pairs: PairTerms, *, beta, label_smoothing):
        return (5 - beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)).clamp(min=0)

    assert preference_loss("my_hinge", pairs_of(**by_hand_pair()), beta=2.0)[0] == 2
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
    assert preference_loss("plain", pairs_of(**pair))[0] == 2
    without = {name: tensor for name, tensor in pair.items() if not name.startswith("ref")}
    assert preference_loss("plain", pairs_of(**without))[0] == 2


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"no preference loss named 'sigmod'.*did you mean 'sigmoid'\?"):
        preference_loss("sigmod", pairs_of(**by_hand_pair()))
    with pytest.raises(ValueError, match="there are .*'sigmoid'.*]$"):
        preference_loss("xyzzy", pairs_of(**by_hand_pair()))


def test_a_missing_reference_is_named():
    pair = by_hand_pair() | {"ref_rejected_logprobs": None}
    with pytest.raises(ValueError, match="loss 'sigmoid' needs ref_logprobs"):
        preference_loss("sigmoid", pairs_of(**pair))


# ------------------------------------------------------------------------------------------- pairs and running metrics


def random_completions(rows: int, width: int, generator: torch.Generator) -> Completions:
    tensors = [torch.rand(rows, width, generator=generator) for _ in range(3)]
    return Completions(tensors[0], tensors[1] > 0.5, tensors[1], tensors[2])


def test_interleaved_pairs():
    """Rows 0 and 2 are chosen, 1 and 3 rejected, in every tensor."""
    rows = random_completions(4, 3, torch.Generator().manual_seed(0))
    weights, margin = torch.rand(2), torch.rand(2)
    pairs = Pairs.interleaved(
        rows.logprobs, rows.mask, ref_logprobs=rows.ref_logprobs, kl=rows.kl, weights=weights, margin=margin
    )
    assert len(pairs) == 2 and pairs.weights is weights and pairs.margin is margin
    for side, places in ((pairs.chosen, [0, 2]), (pairs.rejected, [1, 3])):
        for name in ("logprobs", "mask", "ref_logprobs", "kl"):
            assert torch.equal(getattr(side, name), getattr(rows, name)[places])
    bare = Pairs.interleaved(rows.logprobs, rows.mask)
    assert bare.chosen.ref_logprobs is bare.rejected.kl is bare.weights is bare.margin is None
    with pytest.raises(ValueError, match=r"len\(mask\)=3: expected an even number of rows"):
        Pairs.interleaved(rows.logprobs[:3], rows.mask[:3])


def test_concatenated_pairs_have_the_same_losses():
    """Parts of different widths, padded with False and zeros; each side to its own width."""
    generator = torch.Generator().manual_seed(1)
    parts = [
        Pairs(
            random_completions(rows, width, generator),
            random_completions(rows, width + 1, generator),
            weights=torch.rand(rows, generator=generator),
            margin=torch.rand(rows, generator=generator),
        )
        for rows, width in ((1, 2), (3, 5), (2, 3))
    ]
    whole = Pairs.cat(parts)
    assert whole.chosen.logprobs.shape == (6, 5) and whole.rejected.kl.shape == (6, 6) and len(whole) == 6
    assert whole.chosen.mask.dtype == torch.bool and not whole.chosen.mask[0, 2:].any()
    for name in ("odpo", "tdpo1"):
        losses = [preference_loss(name, part, normalizer=1)[0] for part in parts]
        torch.testing.assert_close(preference_loss(name, whole, normalizer=1)[0], sum(losses))
    bare = Pairs.cat([Pairs.interleaved(part.chosen.logprobs[:0], part.chosen.mask[:0]) for part in parts])
    assert bare.chosen.ref_logprobs is bare.chosen.kl is bare.weights is bare.margin is None
    with pytest.raises(ValueError, match="expected a tensor in every part or in none"):
        Pairs.cat([parts[0], Pairs(parts[0].chosen, parts[0].rejected)])


def test_running_metrics_by_hand():
    """a = 1/2, b = -1: gap 3/2, reward 2 (1/2 - 1) / 2. Without a reference -2 + 3, and 2 (-2 - 3) / 2.

    ld_alpha 1/4: the chosen one's second token, of log-prob -1, counts a quarter: -5/4 + 3. forward_kl: e^1 - e^-1/2.
    """
    pairs = pairs_of(**by_hand_pair())
    both = running_metrics(pairs, ("reward", "gap"), beta=2.0)
    assert {name: value.item() for name, value in both.items()} == pytest.approx({"gap": 1.5, "reward": -0.5})
    assert not both["gap"].requires_grad
    free = running_metrics(pairs, ("gap", "reward"), beta=2.0, reference_free=True)
    assert {name: value.item() for name, value in free.items()} == pytest.approx({"gap": 1.0, "reward": -5.0})
    assert running_metrics(pairs, ("gap",), beta=1.0, reference_free=True, ld_alpha=0.25)["gap"].item() == 1.75
    forward = running_metrics(pairs, ("gap",), beta=1.0, f_divergence="forward_kl")
    assert list(forward) == ["gap"] and forward["gap"].item() == pytest.approx(math.e - math.exp(-0.5))
    assert running_metrics(pairs, (), beta=1.0) == {}
    with pytest.raises(ValueError, match="names='gab': expected one of gap, reward"):
        running_metrics(pairs, ("gab",), beta=1.0)


@pytest.mark.parametrize(("name", "option", "expected"), [("beta_dpo", "gap_mean", 0.15), ("bco_pair", "delta", -0.5)])
def test_running_means_of_losses(name, option, expected):
    """The entry names option, metric and momentum: after one step 0.1 * 3/2 for the gap, -1/2 for the reward."""
    pairs, running = pairs_of(**by_hand_pair()), PREFERENCE_LOSSES[name].running_mean
    assert running.option == option
    (metric,) = running.metrics
    mean = RunningMean(running.momentum)
    mean.update(running_metrics(pairs, running.metrics, beta=2.0)[metric].item())
    assert mean.mean == pytest.approx(expected)
    with_mean = preference_loss(name, pairs, **{option: mean.mean})[0]
    assert with_mean != preference_loss(name, pairs)[0]
