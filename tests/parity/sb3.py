"""Stable-Baselines3's `RolloutBuffer.compute_returns_and_advantage`, laid out one episode a row."""

from __future__ import annotations

import numpy as np
import tiny
import torch
from golden import Golden, installed
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

SEED = 0
STEPS = 8  # of the buffer, in each of its environments
# Each environment's episodes, by length, and whether its last one ended where the buffer does or was cut there.
EPISODES = [([8], True), ([8], False), ([3, 5], True), ([1, 5, 2], False)]


def cases() -> list[dict]:
    return [
        dict(gamma=gamma, gae_lambda=lam)
        for gamma, lam in [(1.0, 0.95), (0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 1.0), (1.0, 0.0), (0.9, 0.0)]
    ]


def make() -> Golden:
    """`bootstrap`: the value of the state after a row's last token; 0 where the episode ended there."""
    generator = torch.Generator().manual_seed(SEED)
    rewards, values = tiny.draw(generator, 2, STEPS, len(EPISODES), low=-1.0, high=2.0).double()
    last_values = tiny.draw(generator, len(EPISODES), low=0.5, high=2.0).double()
    bootstrap = torch.zeros(len(_rows()), dtype=torch.float64)
    for row, (environment, _, stop) in enumerate(_rows()):
        if stop == STEPS and not EPISODES[environment][1]:
            bootstrap[row] = last_values[environment]
    inputs = dict(
        mask=tiny.ragged_mask([stop - start for _, start, stop in _rows()]),
        rewards=_by_episode(rewards),
        values=_by_episode(values),
        bootstrap=bootstrap,
    )
    golden = Golden(installed("torch", "stable-baselines3", "numpy"), SEED, inputs)
    for settings in cases():
        buffer = _filled(rewards, values, settings)
        buffer.compute_returns_and_advantage(last_values, np.array([ended for _, ended in EPISODES]))
        results = dict(advantages=buffer.advantages, returns=buffer.returns)
        golden.add(settings, **{name: _by_episode(torch.from_numpy(array)) for name, array in results.items()})
    return golden


def _filled(rewards: Tensor, values: Tensor, settings: dict) -> RolloutBuffer:
    box = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(STEPS, box, box, device="cpu", n_envs=len(EPISODES), **settings)
    # Its own arrays are float32. In float64 the recursion's rounding does not hide a difference.
    buffer.rewards, buffer.values = rewards.numpy(), values.numpy()
    buffer.advantages = np.zeros_like(buffer.values)
    buffer.episode_starts = np.zeros_like(buffer.values)
    for environment, start, _ in _rows():
        buffer.episode_starts[start, environment] = 1
    return buffer


def _rows() -> list[tuple[int, int, int]]:
    """(environment, first step, step after the last) of every episode."""
    rows = []
    for environment, (lengths, _) in enumerate(EPISODES):
        stops = np.cumsum(lengths).tolist()
        rows += [(environment, stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]
    return rows


def _by_episode(steps: Tensor) -> Tensor:
    """(STEPS, environments) to (episodes, STEPS), each row from its episode's first step, then 0."""
    rows = torch.zeros(len(_rows()), STEPS, dtype=steps.dtype)
    for row, (environment, start, stop) in enumerate(_rows()):
        rows[row, : stop - start] = steps[start:stop, environment]
    return rows
