"""Which completions are in which minibatch: a function of (seed, step), whatever is computed in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.config import OnPolicyConfig
from rlhf_core.rollout.experience import Experience
from rlhf_core.seeding import generator


@dataclass(frozen=True)
class Plan:
    """The optimizer steps of a rollout: for each minibatch, the rows of each of its micro-batches."""

    minibatches: list[list[Tensor]]

    @property
    def single_update(self) -> bool:
        """Whether there is one update at most: it is made by the policy that sampled, so its own forward gives the
        log-probs under the sampling policy."""
        return len(self.minibatches) <= 1

    @property
    def first_pass(self) -> list[Tensor] | None:
        """Micro-batches of the first pass over the rows, None if there are none.

        Log-probs computed in these very batches are computed again bit for bit by the first pass's updates, so the
        first ratio is exactly 1.
        """
        batches: list[Tensor] = []
        every_row = [rows for minibatch in self.minibatches for rows in minibatch]
        missing = len(torch.cat(every_row).unique()) if every_row else 0
        for minibatch in self.minibatches:
            if not missing:
                break
            batches += minibatch
            missing -= sum(map(len, minibatch))
        return batches or None


def plan_units(units: Tensor, config: OnPolicyConfig, step: int, *, sort: bool = False) -> Plan:
    """Shuffle units of rows that stay together, (U, K), such as pairs, into minibatches, anew for each epoch.

    `minibatch_size` and `micro_batch_size` count units. `sort` sorts the units of a minibatch, so that completions of
    one prompt are neighbours.
    """
    minibatches = []
    for order in shuffled_minibatches(len(units), config.minibatch_size, config, step) if len(units) else ():
        order = order.sort().values if sort else order
        minibatches.append([units[part].flatten() for part in order.split(micro_size(config))])
    return Plan(minibatches)


def plan_groups(experience: Experience, config: OnPolicyConfig, step: int) -> Plan:
    """Shuffle whole groups into minibatches of about `minibatch_size` rows, so that completions share their prompt.

    Rows that do not take part are left out, and so are minibatches without any other row.
    """
    group_size, takes_part = experience.group_size, experience.takes_part.cpu()
    num_groups, places = len(experience) // group_size, torch.arange(group_size)
    order = shuffled_minibatches(num_groups, max(config.minibatch_size // group_size, 1), config, step)
    minibatches = ((groups[:, None] * group_size + places).flatten() for groups in order)
    kept = [rows for minibatch in minibatches if len(rows := minibatch[takes_part[minibatch]])]
    return Plan([[*rows.split(micro_size(config))] for rows in kept])


def micro_size(config: OnPolicyConfig) -> int:
    """Return how many rows, or units of rows, go through the model at once."""
    return config.micro_batch_size or config.minibatch_size


def shuffled_minibatches(num_units: int, size: int, config: OnPolicyConfig, step: int) -> Iterator[Tensor]:
    """Yield the unit numbers of each minibatch, in a new order for each of `rollout_epochs`."""
    for epoch in range(config.rollout_epochs):
        order = torch.randperm(num_units, generator=generator(config.seed, "minibatches", step, epoch))
        yield from order.split(size)
