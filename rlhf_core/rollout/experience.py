"""Completions sampled from a policy, and everything computed from them, row by row in one frozen object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.batch import PackedBatch
from rlhf_core.ops.advantages import group_advantages

NOT_COMPUTED: Any = None
"""Default of a tensor that a later stage of the loop fills in with `dataclasses.replace`."""


@dataclass(frozen=True)
class Experience:
    """B completions of at most T tokens.

    Every list and tensor has B rows, so that `select`, `cat` and `to` treat them all alike. Token lists hold no
    padding; a completion that stopped ends with its stop token. Excluded completions keep their row, but their tokens
    are not in `mask` and no minibatch contains them.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    groups: list[int]
    """Rows with the same number are completions of the same prompt."""
    finished: Tensor
    """(B,) bool: the completion ended with a stop token, instead of being truncated at max_new_tokens."""
    takes_part: Tensor
    """(B,) bool: the completion has a score and was not excluded."""
    mask: Tensor
    """(B, T) bool: tokens of the completions that take part."""
    logprobs: Tensor
    """(B, T) under the policy that sampled, 0 after the end: as recorded while sampling, until a forward replaces
    them."""
    values: Tensor | None = None
    """(B, T) of the critic, at the states that the tokens were sampled from."""
    engine_logprobs: Tensor = NOT_COMPUTED
    """(B, T) as recorded while sampling, once `logprobs` are those of a forward."""
    scores: Tensor = NOT_COMPUTED
    """(B,) float32, 0 for a completion without a score."""
    token_scores: Tensor | None = None
    """(B, T) the part of the score that belongs to single tokens; None if there is none."""
    ref_logprobs: Tensor = NOT_COMPUTED
    """(B, T) under the reference."""
    exact_kl: Tensor | None = None
    """(B, T) KL(policy || reference) over the whole vocabulary, where it was computed."""
    advantages: Tensor = NOT_COMPUTED
    """(B,) or (B, T)."""
    returns: Tensor = NOT_COMPUTED
    """(B, T) targets of the critic."""
    rows: Tensor = NOT_COMPUTED
    """(B,) the rows of the experience that these were selected from."""

    @classmethod
    def sampled(
        cls,
        prompts: list[list[int]],
        completions: list[list[int]],
        logprobs: Tensor,
        finished: Tensor,
        *,
        group_size: int = 1,
        values: Tensor | None = None,
    ) -> Experience:
        """Build an experience from an engine's output: `group_size` completions of each prompt, one after the other.

        Args:
            prompts, completions: B token lists; each completion's own prompt is repeated.
            logprobs, values: (B, T). finished: (B,) bool.
        """
        lengths = torch.tensor([len(completion) for completion in completions])
        return cls(
            prompts=prompts,
            completions=completions,
            groups=[row // group_size for row in range(len(prompts))],
            finished=finished,
            takes_part=torch.ones(len(prompts), dtype=torch.bool),
            mask=torch.arange(logprobs.shape[1]) < lengths[:, None],
            logprobs=logprobs,
            values=values,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """(B,) number of tokens of each completion."""
        return torch.tensor([len(completion) for completion in self.completions], device=self.mask.device)

    @property
    def completion_mask(self) -> Tensor:
        """(B, T) bool: tokens of all completions, including excluded ones."""
        return torch.arange(self.mask.shape[1], device=self.mask.device) < self.lengths[:, None]

    @property
    def group_size(self) -> int:
        """Completions per prompt. The groups must be whole and stand one after the other."""
        return len(self) // len({*self.groups})

    def to(self, device: torch.device) -> Experience:
        """Return the experience with all tensors on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device))

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Experience:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Experience(**values | mapped)

    def select(self, rows: Tensor | Sequence[int]) -> Experience:
        """Return some rows, given as numbers or as a bool tensor (B,), with the same number of columns."""
        rows = torch.as_tensor(rows)
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        numbers = rows.tolist()
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                chosen[field.name] = value[rows]
            elif isinstance(value, list):
                chosen[field.name] = [value[number] for number in numbers]
        return replace(self, **chosen | {"rows": rows})

    def exclude(self, rows: Tensor) -> Experience:
        """Return the experience in which the completions where `rows` (B,) is True do not take part."""
        takes_part = self.takes_part & ~rows
        return replace(self, takes_part=takes_part, mask=self.mask & takes_part[:, None])

    def trimmed(self) -> Experience:
        """Return the experience with as many columns as its longest completion has tokens."""
        columns = max(map(len, self.completions))
        return self._map_tensors(lambda tensor: tensor[:, :columns] if tensor.ndim == 2 else tensor)

    def cat(self, other: Experience) -> Experience:
        """Return these rows followed by those of `other`, whose groups get new numbers.

        A tensor that only one of the two has is dropped.
        """
        joined: dict[str, Any] = {}
        for field in fields(self):
            first, second = getattr(self, field.name), getattr(other, field.name)
            if field.name == "groups":
                joined[field.name] = first + [max(first, default=-1) + 1 + group for group in second]
            elif isinstance(first, list):
                joined[field.name] = first + second
            elif first is None or second is None:
                joined[field.name] = None
            else:
                joined[field.name] = _cat(first, second)
        return Experience(**joined).trimmed()

    def pack(self) -> PackedBatch:
        """Return all rows as one batch with T columns. Neighbouring rows of one group share their prompt."""
        groups: list[tuple[list[int], list[list[int]]]] = []
        before = None
        for prompt, completion, group in zip(self.prompts, self.completions, self.groups, strict=True):
            if group != before:
                groups.append((prompt, []))
            groups[-1][1].append(completion)
            before = group
        return PackedBatch.pack(groups, width=self.mask.shape[1])

    def packs(self, batch_size: int) -> Iterator[PackedBatch]:
        """Yield all rows in their order, `batch_size` at a time, each batch with T columns."""
        for rows in torch.arange(len(self)).split(batch_size):
            yield self.select(rows).pack()


def interleave(first: Experience, second: Experience) -> Experience:
    """Return two experiences of one completion per prompt as one of two: its rows alternate between them."""
    both = first.cat(second)
    order = torch.arange(len(both)).view(2, -1).T.flatten()
    return replace(both.select(order), groups=[row // 2 for row in range(len(both))])


def best_and_worst(experience: Experience) -> tuple[Tensor, int]:
    """Return (P, 2) rows, the best and the worst completion of each group (the first of several), except for groups of
    equal scores, and the number of those."""
    size = experience.group_size
    scores, valid = experience.scores.cpu().view(-1, size), experience.takes_part.cpu().view(-1, size)
    best = scores.masked_fill(~valid, -torch.inf).max(-1)
    worst = scores.masked_fill(~valid, torch.inf).min(-1)
    compared, differ = valid.sum(-1) > 1, best.values > worst.values
    pairs = torch.arange(len(scores))[:, None] * size + torch.stack([best.indices, worst.indices], 1)
    return pairs[compared & differ], int((compared & ~differ).sum())


def flat_groups(experience: Experience) -> Tensor:
    """Return (groups,) bool, True for a group with fewer than two scores or with equal ones, from which no group
    advantage can be computed."""
    size = experience.group_size
    distances = group_advantages(experience.scores, group_size=size, scale="none", valid=experience.takes_part)
    return (distances == 0).view(-1, size).all(-1)


def _cat(first: Tensor, second: Tensor) -> Tensor:
    if first.ndim == 2:
        width = max(first.shape[1], second.shape[1])
        first, second = (F.pad(tensor, (0, width - tensor.shape[1])) for tensor in (first, second))
    return torch.cat([first, second])
