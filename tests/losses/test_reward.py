"""Bradley-Terry: numbers by hand, and that its optimum is the reward the preferences came from."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_core.losses.reward import bradley_terry_loss


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
def test_a_margin_must_be_earned(margin):
    """Equal scores with margin ln 3 are a difference of -ln 3: loss ln 4, gradient -+ 3/4. Earned, it is ln 2 again."""
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
    _, stats = bradley_terry_loss(chosen, rejected, margin=0.5)  # the margin is the loss's, not the accuracy's
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


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry_loss(c, r, margin=0.3, center_coef=0.2)[0], (chosen, rejected)
    )


@pytest.mark.parametrize("options", [{"margin": -0.1}, {"center_coef": -1.0}, {"center_coef": math.nan}])
def test_parameters_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}: expected 0 or more"):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), **options)
