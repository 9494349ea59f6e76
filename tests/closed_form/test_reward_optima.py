"""In expectation, preferences determine the rewards that generated them, up to a constant."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rlhf_core.losses.reward import bradley_terry_loss, plackett_luce_loss, process_reward_loss


def assert_same_up_to_a_constant(scores: Tensor, rewards: Tensor) -> None:
    torch.testing.assert_close(scores - scores.mean(), rewards - rewards.mean(), rtol=0, atol=1e-7)


@pytest.fixture
def bradley_terry_scores(minimise):
    """The scores that minimise the expected loss over all ordered pairs, with probabilities mu_i mu_j."""

    def solve(space, labels: Tensor, *, margins: Tensor | None = None, **options) -> Tensor:
        pairs = list(itertools.permutations(range(len(space)), 2))
        weights = [space.sampler[i] * space.sampler[j] * labels[i, j] for i, j in pairs]

        def loss(scores: Tensor) -> Tensor:
            return sum(
                weight * bradley_terry_loss(scores[i : i + 1], scores[j : j + 1], **options, **margin(i, j))[0]
                for weight, (i, j) in zip(weights, pairs, strict=True)
            )

        def margin(i: int, j: int) -> dict:
            return {} if margins is None else {"margin": margins[i, j]}

        return minimise(loss, len(space))

    return solve


def test_bradley_terry(space, bradley_terry_scores):
    assert_same_up_to_a_constant(bradley_terry_scores(space, space.preferences), space.rewards)


def test_centering_settles_the_constant(space, bradley_terry_scores):
    """A shift of all scores moves the centering alone, whose derivative by it is 0 where, over the pairs,

    0 = sum_{i != j} mu_i mu_j (s_i + s_j) = 2 sum_i mu_i (1 - mu_i) s_i
    """
    four = space.first(4)
    scores = bradley_terry_scores(four, four.preferences, center_coef=0.01)
    weights = four.sampler * (1 - four.sampler)
    assert (weights @ scores).item() == pytest.approx(0, abs=1e-7)
    assert abs(weights @ four.rewards) > 0.01
    scores = bradley_terry_scores(four, four.preferences, center_coef=1e-9)
    assert_same_up_to_a_constant(scores, four.rewards)


def test_bradley_terry_with_margins(space, bradley_terry_scores):
    """A margin g_i - g_j is added to the difference of scores: s = r + g."""
    small = space.first(4)
    bonus = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64)
    scores = bradley_terry_scores(small, small.preferences, margins=bonus[:, None] - bonus)
    assert_same_up_to_a_constant(scores, small.rewards + bonus)


def test_label_smoothing_shrinks_the_scores(space, bradley_terry_scores):
    """Two completions: sigmoid(s_0 - s_1) = (1 - e) p + e (1 - p), the chance of a label that was flipped with e."""
    pair = space.first(2)
    scores = bradley_terry_scores(pair, pair.preferences, label_smoothing=0.1)
    wanted = 0.9 * pair.preferences[0, 1] + 0.1 * pair.preferences[1, 0]
    assert (scores[0] - scores[1]).item() == pytest.approx(wanted.logit().item(), abs=1e-7)
    assert abs(scores[0] - scores[1]) < abs(pair.rewards[0] - pair.rewards[1]) - 0.1


@pytest.mark.parametrize("count", [3, 4])
def test_plackett_luce(space, minimise, count):
    """All rankings of three and of four, each with its chance under the rewards, in the books' product form."""
    worth = space.rewards[:count].exp().tolist()

    def chance(order: tuple[int, ...]) -> float:
        return math.prod(worth[order[k]] / sum(worth[j] for j in order[k:]) for k in range(count))

    chances = {order: chance(order) for order in itertools.permutations(range(count))}
    assert sum(chances.values()) == pytest.approx(1)

    def loss(scores: Tensor) -> Tensor:
        return sum(p * plackett_luce_loss(scores[list(order)][None])[0] for order, p in chances.items())

    assert_same_up_to_a_constant(minimise(loss, count), space.rewards[:count])


def test_plackett_luce_needs_the_whole_ranking(space, minimise):
    """If only the winner of three is known, the loss of a full ranking with the rest in random order is biased."""
    rewards = space.rewards[:3]
    rest = [[j for j in range(3) if j != i] for i in range(3)]

    def loss(scores: Tensor) -> Tensor:
        """The order of the two losers is random."""
        total = 0.0
        for winner, chance in enumerate(rewards.softmax(-1)):
            for losers in (rest[winner], rest[winner][::-1]):
                total = total + chance / 2 * plackett_luce_loss(scores[[winner, *losers]][None])[0]
        return total

    scores = minimise(loss, 3)
    assert (scores - scores.mean() - rewards + rewards.mean()).abs().max() > 0.1


def test_process_rewards(space, minimise):
    """The chance that a step is right, as a soft label, is recovered as its logit: no constant is free here."""
    chances = space.reference
    mask = torch.ones(1, len(space), dtype=torch.bool)
    scores = minimise(lambda scores: process_reward_loss(scores[None], chances[None], mask)[0], len(space))
    torch.testing.assert_close(scores, chances.logit(), rtol=0, atol=1e-7)
