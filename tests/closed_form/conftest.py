"""Spaces small enough to enumerate, where every optimum is a formula; and a minimiser that gets there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of |p - q|: the largest difference of probability that any event has."""
    return (p - q).abs().sum().item() / 2


def minimise(function: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The (size,) float64 vector where a smooth `function` is least, from zeros: LBFGS, then Newton's steps.

    A line search compares losses, whose rounding errors limit it to 1e-8. Newton's steps use the gradient only; along a
    direction in which the function is constant (a shift of logits) they do not move.
    """
    point = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([point], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function(point)
        loss.backward()
        return loss

    optimizer.step(closure)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(function(point), point)
        curvature = torch.autograd.functional.hessian(function, point.detach())
        point.data -= torch.linalg.pinv(curvature, rtol=1e-9, hermitian=True) @ gradient
    assert torch.autograd.grad(function(point), point)[0].abs().max() < 1e-12, "no minimum found"
    return point.detach()


@dataclass(frozen=True)
class Space:
    """One prompt with K completions."""

    reference: Tensor  # (K,) probabilities
    sampler: Tensor  # (K,) probabilities mu with which completions appear in pairs
    rewards: Tensor  # (K,)

    def __len__(self) -> int:
        return len(self.rewards)

    def first(self, count: int) -> Space:
        """The first completions only."""
        reference, sampler = (p[:count] / p[:count].sum() for p in (self.reference, self.sampler))
        return Space(reference, sampler, self.rewards[:count])

    def tilted(self, exponents: Tensor) -> Tensor:
        """reference * exp(exponents) / Z."""
        return (self.reference.log() + exponents).softmax(-1)

    @property
    def preferences(self) -> Tensor:
        """(K, K): the probability sigmoid(r_i - r_j) that i is preferred to j (Bradley and Terry 1952)."""
        return torch.sigmoid(self.rewards[:, None] - self.rewards)


@pytest.fixture(scope="session")
def space() -> Space:
    """Eight completions. Nothing about them is uniform, symmetric or sorted."""
    reference = torch.tensor([0.05, 0.22, 0.08, 0.30, 0.03, 0.12, 0.02, 0.18], dtype=torch.float64)
    sampler = torch.tensor([0.20, 0.05, 0.10, 0.15, 0.05, 0.25, 0.08, 0.12], dtype=torch.float64)
    rewards = torch.tensor([0.5, -1.0, 1.2, 0.0, 0.3, -0.4, 0.9, -0.7], dtype=torch.float64)
    return Space(reference, sampler, rewards)


@pytest.fixture(scope="session", name="minimise")
def minimise_fixture() -> Callable[[Callable[[Tensor], Tensor], int], Tensor]:
    return minimise


@pytest.fixture(scope="session", name="total_variation")
def total_variation_fixture() -> Callable[[Tensor, Tensor], float]:
    return total_variation
