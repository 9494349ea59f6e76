"""Bradley-Terry, Plackett-Luce, process rewards and ensembles: values by hand, identities, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.losses.reward import (
    bradley_terry_loss,
    ensemble_scores,
    plackett_luce_loss,
    plackett_luce_nll,
    process_reward_loss,
)

seeds = st.integers(0, 2**32 - 1)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(chosen, rejected, **options) -> list[float]:
    """The loss, then its gradient by every chosen score, then by every rejected one."""
    chosen = torch.tensor(chosen, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(rejected, dtype=torch.float64, requires_grad=True)
    loss, _ = bradley_terry_loss(chosen, rejected, **options)
    loss.backward()
    return [loss.item(), *chosen.grad.tolist(), *rejected.grad.tolist()]


def test_equal_scores_give_ln_two():
    """-log sigmoid(0) = ln 2; gradient -+ sigmoid(0) = -+ 1/2, shared by two pairs: -+ 1/4."""
    found = loss_and_gradients([3.0, -1.0], [3.0, -1.0])
    assert found == pytest.approx([math.log(2), -0.25, -0.25, 0.25, 0.25], abs=1e-12)


def test_by_hand():
    """Difference ln 3: sigmoid = 3/4, loss ln 4/3, gradient -+ 1/4. Difference -ln 3: loss ln 4, gradient -+ 3/4."""
    assert loss_and_gradients([math.log(3)], [0.0]) == pytest.approx([math.log(4 / 3), -0.25, 0.25])
    assert loss_and_gradients([0.0], [math.log(3)]) == pytest.approx([math.log(4), -0.75, 0.75])


@pytest.mark.parametrize("margin", [math.log(3), torch.tensor([math.log(3)], dtype=torch.float64)])
def test_a_margin_is_subtracted(margin):
    """Equal scores with margin ln 3: a difference of -ln 3, loss ln 4, gradient -+ 3/4. Scores ln 3 apart: ln 2."""
    assert loss_and_gradients([1.0], [1.0], margin=margin) == pytest.approx([math.log(4), -0.75, 0.75])
    assert loss_and_gradients([1.0 + math.log(3)], [1.0], margin=margin)[0] == pytest.approx(math.log(2))


def test_centering_by_hand():
    """0.1 * (1 + 1)^2 = 0.4 on top of ln 2; gradient 2 * 0.1 * 2 = 0.4 on both, so -0.1 and 0.9."""
    assert loss_and_gradients([1.0], [1.0], center_coef=0.1) == pytest.approx([math.log(2) + 0.4, -0.1, 0.9])


def test_without_centering_only_differences_matter():
    shifted = loss_and_gradients([101.0, 98.0], [100.0, 99.5])
    assert shifted == pytest.approx(loss_and_gradients([1.0, -2.0], [0.0, -0.5]))


@pytest.mark.parametrize(("chosen", "loss", "gradient"), [(-1e4, 1e4, -1.0), (1e4, 0.0, 0.0)])
def test_far_apart_scores_stay_finite(chosen, loss, gradient):
    """log(1 + exp(1e4)) would overflow; -log sigmoid(-1e4) is 1e4 with gradient 1."""
    assert loss_and_gradients([chosen], [0.0]) == pytest.approx([loss, gradient, -gradient])


def test_stats_by_hand():
    """A win, a loss and a tie: accuracy (1 + 0 + 1/2) / 3. Scores (2, 0, 1) and (1, 3, 1): margin 1 - 5/3 = -2/3."""
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0], requires_grad=True), torch.tensor([1.0, 3.0, 1.0])
    _, stats = bradley_terry_loss(chosen, rejected, margin=0.5)  # the margin does not affect the accuracy
    assert not any(value.requires_grad for value in stats.values())
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {"accuracy": 0.5, "margin": -2 / 3, "chosen_score": 1.0, "rejected_score": 5 / 3}
    )


def test_the_optimum_recovers_the_rewards_up_to_a_constant():
    """All ordered pairs of five items, each weighed by its Bradley-Terry probability; LBFGS in float64, to 1e-7."""
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.0, 0.9], dtype=torch.float64)
    scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    pairs = list(itertools.permutations(range(5), 2))
    probability = {(i, j): torch.sigmoid(rewards[i] - rewards[j]) for i, j in pairs}
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = sum(probability[i, j] * bradley_terry_loss(scores[i : i + 1], scores[j : j + 1])[0] for i, j in pairs)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(scores.detach() - scores.mean().item(), rewards - rewards.mean(), rtol=0, atol=1e-7)


def test_label_smoothing_by_hand():
    """Difference ln 3, e = 1/4: 3/4 ln 4/3 + 1/4 ln 4 = ln 4 - 3/4 ln 3. The slope sigmoid - (1 - e) is 3/4 - 3/4 = 0:
    the labels are right three times in four, as the scores imply. With a margin of ln 3 the difference is 0: ln 2.
    """
    expected = math.log(4) - 0.75 * math.log(3)
    found = loss_and_gradients([math.log(3)], [0.0], label_smoothing=0.25)
    assert found == pytest.approx([expected, 0, 0], abs=1e-12)
    found = loss_and_gradients([math.log(3)], [0.0], label_smoothing=0.25, margin=math.log(3))
    assert found == pytest.approx([math.log(2), -0.25, 0.25])  # 1/2 - 3/4


@pytest.mark.parametrize(("chosen", "loss", "gradient"), [(-1e4, 7.5e3, -0.75), (1e4, 2.5e3, 0.25)])
def test_far_apart_scores_stay_finite_when_smoothed(chosen, loss, gradient):
    """3/4 * 1e4 on the wrong side, 1/4 * 1e4 on the right one: no label is certain."""
    found = loss_and_gradients([chosen], [0.0], label_smoothing=0.25)
    assert found == pytest.approx([loss, gradient, -gradient])


@settings(max_examples=20, deadline=None)
@given(seed=seeds, micro=st.integers(1, 8))
def test_parts_of_a_batch_of_pairs_add_up(seed, micro):
    """Over the whole batch's pairs, in value and gradient; a part may be empty."""
    scores = randn(seed, 2, 8)
    options = dict(margin=0.2, center_coef=0.1, label_smoothing=0.1)
    whole, parts = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss, _ = bradley_terry_loss(*whole, **options)
    loss.backward()
    total = 0.0
    for rows in [*torch.arange(8).split(micro), torch.arange(0)]:
        part, stats = bradley_terry_loss(parts[0][rows], parts[1][rows], normalizer=8, **options)
        part.backward()
        total = total + part.detach()
    assert all(value == 0 for value in stats.values())
    torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


def test_gradcheck():
    chosen, rejected = randn(0, 2, 4)
    options = dict(margin=0.3, center_coef=0.2, label_smoothing=0.1)
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry_loss(c, r, **options)[0], (chosen.requires_grad_(), rejected.requires_grad_())
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"margin": -0.1}, "margin=-0.1: expected 0 or more"),
        ({"margin": math.nan}, "margin=nan: expected 0 or more"),
        ({"center_coef": -1.0}, "center_coef=-1.0: expected 0 or more"),
        ({"center_coef": math.nan}, "center_coef=nan: expected 0 or more"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1: expected 0 <= label_smoothing < 0.5"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: expected 0 <="),
        ({"label_smoothing": math.nan}, "label_smoothing=nan: expected 0 <="),
        (
            {"margin": torch.zeros(2, 2)},
            r"chosen_scores \(2,\), rejected_scores \(2,\), less margin \(2, 2\): expected",
        ),
    ],
)
def test_parameters_out_of_range_are_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), **options)


def test_shapes_that_would_broadcast_and_no_pairs_at_all_are_refused():
    with pytest.raises(ValueError, match=r"chosen_scores \(3,\), rejected_scores \(3, 1\), less margin \(3, 3\)"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"chosen_scores of shape \(0,\): expected at least one pair"):
        bradley_terry_loss(torch.zeros(0), torch.zeros(0))


# -------------------------------------------------------------------------------------------------------- Plackett-Luce


def ranking_probability(scores: list[float]) -> float:
    """The product over places of exp(s_k) / sum_{j >= k} exp(s_j), as it is written in books."""
    return math.prod(math.exp(scores[k]) / sum(math.exp(s) for s in scores[k:]) for k in range(len(scores)))


def draw_lists(seed: int, lists: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with NaN where a list has ended; lists 0 to 2 have none, one and two entries."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, width + 1, (lists, 1), generator=generator)
    lengths[:3, 0] = torch.arange(3)
    mask = torch.arange(width) < lengths
    return torch.where(mask, randn(seed, lists, width), math.nan), mask


def test_a_ranking_by_hand():
    """Scores ln 3, ln 2, 0 in that order: 3/6 for the first place, 2/3 for the second, 1: probability 1/3, loss ln 3.

    Gradients: each entry's chance at every place it was still there for, minus 1 at its own:
    1/2 - 1; 2/6 + 2/3 - 1; 1/6 + 1/3 + 1 - 1.
    """
    scores = torch.tensor([[math.log(3), math.log(2), 0.0]], dtype=torch.float64, requires_grad=True)
    loss, stats = plackett_luce_loss(scores)
    assert loss.item() == pytest.approx(math.log(3)) and stats["accuracy"] == 1
    loss.backward()
    assert scores.grad[0].tolist() == pytest.approx([-1 / 2, 0, 1 / 2])


def test_equal_scores_give_the_logarithm_of_the_factorial():
    """4! equally likely rankings: ln 24. Every pair is a tie: accuracy 1/2."""
    loss, stats = plackett_luce_loss(torch.full((2, 4), 7.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.log(24)) and stats["accuracy"] == 0.5


def test_accuracy_of_rankings_by_hand():
    """(3, 1, 2): right, right, wrong. (0, 0): a tie. (5) alone has no pair. (2 + 1/2) / 4."""
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, math.nan], [5.0, math.nan, math.nan]])
    _, stats = plackett_luce_loss(scores.requires_grad_(), ~scores.isnan())
    assert stats["accuracy"] == 2.5 / 4 and not stats["accuracy"].requires_grad


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_two_entries_are_bradley_terry(seed):
    """In loss, accuracy and gradient."""
    ours, theirs = randn(seed, 5, 2).requires_grad_(), randn(seed, 5, 2).requires_grad_()
    loss, stats = plackett_luce_loss(ours)
    expected, expected_stats = bradley_terry_loss(theirs[:, 0], theirs[:, 1])
    torch.testing.assert_close((loss, stats["accuracy"]), (expected, expected_stats["accuracy"]))
    (loss + expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_rankings_equal_a_loop_and_their_probabilities_sum_to_one(seed):
    scores, mask = draw_lists(seed)
    lists = [row[kept].tolist() for row, kept in zip(scores, mask, strict=True)]
    each = [-math.log(ranking_probability(entries)) for entries in lists]
    assert plackett_luce_nll(scores, mask).tolist() == pytest.approx(each, abs=1e-10)
    ranked = [entries for entries in lists if len(entries) > 1]
    expected = sum(-math.log(ranking_probability(entries)) for entries in ranked) / len(ranked)
    loss, stats = plackett_luce_loss(scores, mask)
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    pairs = [a > b for entries in ranked for a, b in itertools.combinations(entries, 2)]
    assert stats["accuracy"].item() == pytest.approx(sum(pairs) / len(pairs))

    orders = torch.tensor(list(itertools.permutations(range(4))))
    total = sum(torch.exp(-plackett_luce_loss(row[None])[0]) for row in randn(seed, 4)[orders])
    assert total.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_padding_of_lists_changes_nothing(garbage, seed):
    """In the loss, the accuracy and the gradient, which is 0 beyond a list's end and for lists that rank nothing."""
    scores, mask = draw_lists(seed)
    results = []
    for filling, extra in ((0.0, 0), (garbage, 3)):
        wide = torch.nn.functional.pad(mask, (0, extra))
        padded = torch.where(wide, torch.nn.functional.pad(scores, (0, extra)), filling).requires_grad_()
        loss, stats = plackett_luce_loss(padded, wide)
        loss.backward()
        assert (padded.grad[~wide] == 0).all() and (padded.grad[:2] == 0).all()
        results.append((loss.detach(), stats, padded.grad[:, :5]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, shift=st.floats(-50, 50))
def test_only_differences_within_a_list_matter(seed, shift):
    """A shift of each list, another order of the lists."""
    scores, mask = draw_lists(seed)
    loss, _ = plackett_luce_loss(scores, mask)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved, _ = plackett_luce_loss((scores + shift * torch.arange(6.0)[:, None])[order], mask[order])
    torch.testing.assert_close(moved, loss, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, micro=st.sampled_from([1, 2, 4]))
def test_parts_of_a_batch_of_lists_add_up(seed, micro):
    """Over the four lists that rank something, in value and gradient."""
    scores, mask = draw_lists(seed)
    whole, parts = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss, _ = plackett_luce_loss(whole, mask)
    loss.backward()
    total = 0.0
    for rows in torch.arange(6).split(micro):
        part, _ = plackett_luce_loss(parts[rows], mask[rows], normalizer=4)
        part.backward()
        total = total + part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hopeless_rankings_stay_finite(dtype):
    """Scores 0, 1e4, 2e4 in the wrong order: 2e4 + 1e4 + 0. The last has probability 1 at every place,
    the others none, so the gradients are 0 - 1, 0 - 1 and 3 - 1.
    """
    scores = torch.tensor([[0.0, 1e4, 2e4]], dtype=dtype, requires_grad=True)
    loss, stats = plackett_luce_loss(scores)
    loss.backward()
    assert loss == 3e4 and stats["accuracy"] == 0
    assert scores.grad[0].tolist() == pytest.approx([-1, -1, 2])


def test_gradcheck_of_rankings():
    scores, mask = draw_lists(1)
    scores = scores.nan_to_num(0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: plackett_luce_loss(s, mask)[0], scores)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_no_gradient_is_nan_on_the_way():
    """Anomaly detection reports a NaN even if a later step masks it."""
    scores, mask = draw_lists(1)
    with torch.autograd.detect_anomaly(check_nan=True):
        plackett_luce_loss(scores.requires_grad_(), mask)[0].backward()


def test_lists_that_rank_nothing():
    """With a normalizer: 0. Otherwise a batch without a single pair, or without entries, is an error."""
    scores, alone = torch.zeros(2, 3, requires_grad=True), torch.tensor([[True, False, False]]).expand(2, 3)
    loss, stats = plackett_luce_loss(scores, alone, normalizer=2)
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all() and stats["accuracy"] == 0
    for mask in (alone, torch.zeros(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask.sum\(-1\) > 1 of shape \(2,\) is False everywhere"):
            plackett_luce_loss(scores, mask)


# ------------------------------------------------------------------------------------------------------ process rewards

STEPS = torch.tensor([[True, False, True, True], [False, True, False, False]])
nan = math.nan


def test_steps_by_hand():
    """sigmoid(ln 3) = 3/4, right: ln 4/3. sigmoid(-ln 3) = 1/4, wrong: ln 4/3. sigmoid(ln 3), wrong: ln 4.
    Second solution: sigmoid(0), right: ln 2, a tie. Steps: (2 ln 4/3 + ln 4 + ln 2) / 4, accuracy (2 + 1/2) / 4.
    Solutions: ((2 ln 4/3 + ln 4) / 3 + ln 2) / 2. Slopes sigmoid - y: -1/4, 1/4, 3/4, -1/2, each over 4.
    """
    three = math.log(3)
    scores = torch.tensor([[three, nan, -three, three], [math.inf, 0, nan, nan]], dtype=torch.float64)
    scores.requires_grad_()
    labels = torch.tensor([[True, True, False, False], [False, True, True, False]])
    first, last = 2 * math.log(4 / 3) + math.log(4), math.log(2)
    loss, stats = process_reward_loss(scores, labels, STEPS)
    assert loss.item() == pytest.approx((first + last) / 4) and stats["accuracy"] == 2.5 / 4
    assert not stats["accuracy"].requires_grad
    loss.backward()
    assert scores.grad[STEPS].tolist() == pytest.approx([-1 / 16, 1 / 16, 3 / 16, -1 / 8])
    assert (scores.grad[~STEPS] == 0).all()
    loss, _ = process_reward_loss(scores, labels, STEPS, reduction="sequence")
    assert loss.item() == pytest.approx((first / 3 + last) / 2)
    assert process_reward_loss(scores, labels, STEPS, normalizer=10)[0].item() == pytest.approx((first + last) / 10)


def test_a_probability_for_a_label():
    """y = 3/4 at sigmoid 3/4: its entropy ln 4 - 3/4 ln 3, slope 0, and the right side of 1/2. y = 1/2 counts half."""
    scores, one = torch.full((1, 2), math.log(3), dtype=torch.float64, requires_grad=True), torch.ones(1, 2).bool()
    labels = torch.tensor([[0.75, 0.75]], dtype=torch.float64)
    loss, stats = process_reward_loss(scores, labels, one)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4) - 0.75 * math.log(3)) and stats["accuracy"] == 1
    assert scores.grad[0].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert process_reward_loss(scores, torch.tensor([[0.75, 0.5]]), one)[1]["accuracy"] == 0.75


@pytest.mark.parametrize(("score", "label", "loss", "slope"), [(-1e4, 1.0, 1e4, -1.0), (1e4, 1.0, 0.0, 0.0)])
def test_certain_steps_stay_finite(score, label, loss, slope):
    scores = torch.tensor([[score]], requires_grad=True)
    found, _ = process_reward_loss(scores, torch.tensor([[label]]), torch.ones(1, 1).bool())
    found.backward()
    assert (found.item(), scores.grad.item()) == (loss, slope)


def draw_steps(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(6, 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 4, generator=generator) < 0.5
    mask[0, 0], mask[1] = True, False
    return randn(seed, 6, 4), labels, mask


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@settings(max_examples=20, deadline=None)
@given(seed=seeds, micro=st.sampled_from([1, 2, 4]))
def test_steps_equal_a_loop_and_parts_add_up(reduction, seed, micro):
    scores, labels, mask = draw_steps(seed)
    rows = []
    for i in range(6):
        chances = [
            (1 / (1 + math.exp(-s)), y)
            for s, y, m in zip(*(t[i].tolist() for t in (scores, labels, mask)), strict=True)
            if m
        ]
        rows.append([-y * math.log(p) - (1 - y) * math.log(1 - p) for p, y in chances])
    rows = [losses for losses in rows if losses]
    means = [sum(losses) / len(losses) for losses in rows]
    expected = sum(map(sum, rows)) / sum(map(len, rows)) if reduction == "token" else sum(means) / len(means)
    whole, parts = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss, _ = process_reward_loss(whole, labels, mask, reduction=reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    count = sum(map(len, rows)) if reduction == "token" else len(rows)
    for part in torch.arange(6).split(micro):
        process_reward_loss(parts[part], labels[part], mask[part], reduction=reduction, normalizer=count)[0].backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1.0, 1e30])
def test_what_is_no_step_changes_nothing(reduction, garbage):
    """Scores and labels; a label outside [0, 1] is allowed there."""
    scores, labels, mask = draw_steps(3)
    results = []
    for filling in (0.0, garbage):
        dirty = torch.where(mask, scores, filling).requires_grad_()
        loss, stats = process_reward_loss(dirty, torch.where(mask, labels, filling), mask, reduction=reduction)
        loss.backward()
        results.append((loss.detach(), stats["accuracy"], dirty.grad))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))
    assert (results[0][2][~mask] == 0).all()


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_gradcheck_of_steps(reduction):
    scores, labels, mask = draw_steps(0)
    assert torch.autograd.gradcheck(
        lambda s: process_reward_loss(s, labels, mask, reduction=reduction)[0], scores.requires_grad_()
    )


@pytest.mark.parametrize("label", [-0.1, 1.5, 2.0, math.nan, math.inf])
def test_a_label_that_is_no_probability_is_named(label):
    labels = torch.tensor([[0.0, label], [1.0, 0.5]])
    with pytest.raises(ValueError, match=f"labels={label}.*: expected 0 <= label <= 1 wherever the mask is True"):
        process_reward_loss(torch.zeros(2, 2), labels, torch.ones(2, 2).bool())
    process_reward_loss(torch.zeros(2, 2), labels, torch.tensor([[True, False], [True, True]]))


def test_steps_of_no_kind_are_refused():
    scores = torch.zeros(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 4\) is False everywhere"):
        process_reward_loss(scores, STEPS, torch.zeros_like(STEPS))
    loss, stats = process_reward_loss(scores, STEPS, torch.zeros_like(STEPS), normalizer=3)
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all() and stats["accuracy"] == 0
    with pytest.raises(ValueError, match="reduction='mean': expected token or sequence"):
        process_reward_loss(scores, STEPS, STEPS, reduction="mean")


# ------------------------------------------------------------------------------------------------------------ ensembles


def test_ensembles_by_hand():
    """Members 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14 over 3. Biased: std sqrt(14/3). The second column agrees.

    Slopes: 1/3 - lcb (s - 3) / (3 std); where all agree 1/3, the mean's alone.
    """
    members = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], dtype=torch.float64, requires_grad=True)
    std = math.sqrt(14 / 3)
    assert ensemble_scores(members).tolist() == [3, 5]
    found = ensemble_scores(members, lcb_coef=0.5)
    assert found.tolist() == pytest.approx([3 - std / 2, 5])
    found.sum().backward()
    slopes = [1 / 3 - 0.5 * (s - 3) / (3 * std) for s in (1, 2, 6)]
    assert members.grad[:, 0].tolist() == pytest.approx(slopes)
    assert members.grad[:, 1].tolist() == pytest.approx([1 / 3] * 3)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, coef=st.floats(0.01, 3), scale=st.floats(0.1, 10))
def test_an_ensembles_identities(seed, coef, scale):
    """Any shape and order of members, in the scores' own unit, below the mean, by torch's biased standard deviation."""
    members = randn(seed, 4, 2, 3)
    found = ensemble_scores(members, lcb_coef=coef)
    torch.testing.assert_close(found, members.mean(0) - coef * members.std(0, correction=0))
    torch.testing.assert_close(ensemble_scores(members.flip(0), lcb_coef=coef), found)
    torch.testing.assert_close(ensemble_scores(scale * members + 7, lcb_coef=coef), scale * found + 7)
    assert (found < ensemble_scores(members)).all()


def test_gradcheck_of_an_ensemble():
    assert torch.autograd.gradcheck(lambda s: ensemble_scores(s, lcb_coef=0.7), randn(0, 3, 4).requires_grad_())


def test_a_single_member_has_no_spread():
    assert ensemble_scores(torch.tensor([[2.0, 3.0]])).tolist() == [2, 3]
    with pytest.raises(ValueError, match="lcb_coef=0.5 with 1 member: expected 2 members or more, or 0"):
        ensemble_scores(torch.zeros(1, 3), lcb_coef=0.5)


@pytest.mark.parametrize("coef", [-0.1, math.nan])
def test_a_bound_above_the_mean_is_refused(coef):
    with pytest.raises(ValueError, match=f"lcb_coef={coef}: expected 0 or more"):
        ensemble_scores(torch.zeros(2, 3), lcb_coef=coef)


# -------------------------------------------------------------------------------------------------------------- weights


def test_weights_of_pairs_by_hand():
    """Losses ln 4/3 and ln 4 with weights 3 and 1: (3 ln 4/3 + ln 4) / 4; gradients -+ 1/4 * 3/4 and -+ 3/4 * 1/4."""
    options = dict(weights=torch.tensor([3.0, 1.0], dtype=torch.float64))
    found = loss_and_gradients([math.log(3), 0.0], [0.0, math.log(3)], **options)
    expected = (3 * math.log(4 / 3) + math.log(4)) / 4
    assert found == pytest.approx([expected, -3 / 16, -3 / 16, 3 / 16, 3 / 16])


def test_weights_of_lists_and_of_steps_by_hand():
    """Lists: ln 2 of a tied pair and ln 6 of three ties, weights 1 and 2: (ln 2 + 2 ln 6) / 3. A list of one has none.

    Steps: scores of 0 cost ln 2 and of ln 3 ln 4/3; the rows have two and one, of weights 1 and 2.
    """
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    loss, _ = plackett_luce_loss(torch.zeros(3, 3), mask, weights=torch.tensor([1.0, 2.0, 5.0]))
    assert loss.item() == pytest.approx((math.log(2) + 2 * math.log(6)) / 3)
    scores, steps = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([[True, True], [True, False]])
    options = dict(labels=torch.ones(2, 2, dtype=torch.bool), mask=steps, weights=torch.tensor([1.0, 2.0]))
    loss, _ = process_reward_loss(scores, **options)
    assert loss.item() == pytest.approx((2 * math.log(2) + 2 * math.log(4 / 3)) / 4)
    loss, _ = process_reward_loss(scores, **options, reduction="sequence")
    assert loss.item() == pytest.approx((math.log(2) + 2 * math.log(4 / 3)) / 3)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_a_weight_of_two_is_a_row_that_is_there_twice(seed):
    scores, weights, twice = randn(seed, 4, 3), torch.tensor([2.0, 1, 1, 2], dtype=torch.float64), [0, 0, 1, 2, 3, 3]
    labels, mask = randn(seed + 1, 4, 3) > 0, randn(seed + 2, 4, 3) > -1
    mask[:, :2] = True
    for weighed, repeated in (
        (
            bradley_terry_loss(scores[:, 0], scores[:, 1], margin=scores[:, 2], weights=weights),
            bradley_terry_loss(scores[twice, 0], scores[twice, 1], margin=scores[twice, 2]),
        ),
        (plackett_luce_loss(scores, mask, weights=weights), plackett_luce_loss(scores[twice], mask[twice])),
        (
            process_reward_loss(scores, labels, mask, weights=weights),
            process_reward_loss(scores[twice], labels[twice], mask[twice]),
        ),
    ):
        assert weighed[0].item() == pytest.approx(repeated[0].item(), abs=1e-12)
