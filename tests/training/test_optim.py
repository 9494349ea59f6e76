"""The schedule against hand-written numbers, and a step that clips, decays and refuses what is not finite."""

import math

import pytest
import torch
from torch import nn

from rlhf_core.config import OptimConfig
from rlhf_core.training.optim import build_optimizer, learning_rate, optimizer_step


def rates(total: int, **options) -> list[float]:
    config = OptimConfig(lr=1.0, **options)
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # no warm-up: the first step has the whole rate, the step after the last would have none
        (dict(schedule="linear"), [1, 3 / 4, 2 / 4, 1 / 4]),
        (dict(schedule="cosine"), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        (dict(schedule="constant"), [1, 1, 1, 1]),
        # half of the steps warm up: 1/2, 1, then two steps from the top down
        (dict(schedule="linear", warmup_ratio=0.5), [0.5, 1, 1, 0.5]),
        (dict(schedule="cosine", warmup_ratio=0.5), [0.5, 1, 1, 0.5]),
        (dict(schedule="constant", warmup_ratio=0.5), [0.5, 1, 1, 1]),
        # a share of less than half a step is no warm-up, one of all but half a step is nothing else
        (dict(schedule="linear", warmup_ratio=0.12), [1, 3 / 4, 2 / 4, 1 / 4]),
        (dict(schedule="linear", warmup_ratio=0.9), [0.25, 0.5, 0.75, 1]),
    ],
)
def test_schedule_in_closed_form(options, expected):
    assert rates(4, **options) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_schedule_rises_to_the_peak_and_never_again(schedule, warmup_ratio, total):
    found = rates(total, schedule=schedule, warmup_ratio=warmup_ratio)
    warmup = round(warmup_ratio * total)
    assert max(found) == 1.0
    assert min(found) > 0
    assert found[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def plain(weight: list[float], gradient: list[float]) -> tuple[nn.Parameter, torch.optim.SGD]:
    """SGD moves a weight by exactly lr times what is left of its gradient."""
    parameter = nn.Parameter(torch.tensor(weight))
    parameter.grad = torch.tensor(gradient)
    return parameter, torch.optim.SGD([parameter], lr=123.0)


def test_gradients_are_clipped_to_the_norm_and_the_rate_is_the_schedules():
    parameter, optimizer = plain([0.0, 0.0], [3.0, 4.0])
    config = OptimConfig(lr=0.5, schedule="linear", max_grad_norm=0.1)
    told = optimizer_step(optimizer, config, step=2, total_steps=4)
    assert told == {"grad_norm": 5.0, "lr": 0.375}  # before clipping
    assert parameter.detach() == pytest.approx([-0.375 * 0.1 * 3 / 5, -0.375 * 0.1 * 4 / 5], rel=1e-4)
    assert parameter.grad is None


@pytest.mark.parametrize("max_grad_norm", [None, 5.001, 1e9])
def test_gradients_under_the_norm_stay(max_grad_norm):
    parameter, optimizer = plain([0.0, 0.0], [3.0, 4.0])
    optimizer_step(optimizer, OptimConfig(lr=1, schedule="constant", max_grad_norm=max_grad_norm), 1, 1)
    assert parameter.tolist() == [-3.0, -4.0]


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, max_grad_norm):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    config = OptimConfig(lr=0.1, weight_decay=0.5, max_grad_norm=max_grad_norm, schedule="constant")
    optimizer = build_optimizer([model], config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer_step(optimizer, config, 1, 9)
    before = [value.clone() for value in model.state_dict().values()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]

    model.weight.grad = torch.ones_like(model.weight)
    model.bias.grad = torch.tensor([1.0, bad])  # one bad number in one parameter
    told = optimizer_step(optimizer, config, 2, 9)
    assert not math.isfinite(told["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert model.weight.grad is None

    model.weight.grad = torch.ones_like(model.weight)  # and the next good one is taken
    assert math.isfinite(optimizer_step(optimizer, config, 3, 9)["grad_norm"])
    assert not torch.equal(before[0], model.weight)


def test_matrices_decay_and_nothing_else():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    config = OptimConfig(lr=0.1, weight_decay=0.5, schedule="constant")
    optimizer = build_optimizer([model], config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # decay alone moves: w - lr * decay * w
    optimizer_step(optimizer, config, 1, 1)
    for name, parameter in model.named_parameters():
        expected = 0.95 if name in ("0.weight", "1.weight") else 1.0
        assert parameter.unique().tolist() == pytest.approx([expected]), name


def test_settings_of_adam_arrive_and_frozen_weights_stay_out():
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    optimizer = build_optimizer([frozen, trained], OptimConfig(lr=0.3, betas=(0.7, 0.8), eps=1e-3))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.7, 0.8), 1e-3)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trained.parameters()}
