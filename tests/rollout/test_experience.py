"""An experience: rows that are selected, excluded, joined and packed, all their tensors together."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from rlhf_core.models.forward import token_logprobs
from rlhf_core.rollout.experience import Experience, flat_groups
from tests.rollout.test_sampling import draw


@pytest.fixture
def groups() -> Experience:
    """Two prompts with three completions each."""
    completions = [[5], [6, 7, 8], [9, 10], [11, 12], [13], [14, 15]]
    return Experience.sampled(
        prompts=[[1, 2, 3] * 8] * 3 + [[4] * 24] * 3,
        completions=completions,
        logprobs=torch.tensor([[float(token) for token in line] + [0.0] * (3 - len(line)) for line in completions]),
        finished=torch.tensor([True, False, True, True, False, False]),
        values=torch.arange(18.0).view(6, 3),
        group_size=3,
    )


def test_what_was_sampled(groups):
    assert len(groups) == 6
    assert groups.groups == [0, 0, 0, 1, 1, 1]
    assert groups.group_size == 3
    assert groups.lengths.tolist() == [1, 3, 2, 2, 1, 2]
    assert groups.mask.tolist() == groups.completion_mask.tolist() == (groups.logprobs > 0).tolist()
    assert groups.takes_part.all()


# ------------------------------------------------------------------------------------------------------------- packing


def test_a_group_shares_its_prompt(groups):
    batch = groups.pack()
    assert batch.num_tokens == 24 + 6 + 24 + 5
    assert batch.completion_ids()[1].tolist() == [6, 7, 8]
    assert batch.completion_mask.sum(-1).tolist() == [1, 3, 2, 2, 1, 2]


def test_only_neighbours_of_a_group_share(groups):
    """Rows 0 and 2 stand together, 3 alone, 1 comes too late; the columns are those of the whole."""
    wide = replace(groups, mask=torch.nn.functional.pad(groups.mask, (0, 2)))
    batch = wide.select([2, 0, 3, 1]).pack()
    assert batch.num_tokens == 24 + 2 + 1 + 24 + 2 + 24 + 3
    assert batch.completion_ids().tolist() == [[9, 10, 0, 0, 0], [5, 0, 0, 0, 0], [11, 12, 0, 0, 0], [6, 7, 8, 0, 0]]


def test_rows_of_different_groups_with_one_prompt_are_apart(groups):
    assert replace(groups, groups=[*range(6)]).pack().num_tokens == 6 * 24 + 11


def test_batches_cut_groups_where_they_must(groups):
    parts = list(groups.packs(4))
    assert [part.num_completions for part in parts] == [4, 2]
    assert [part.num_tokens for part in parts] == [24 + 6 + 24 + 2, 24 + 3]
    assert all(part.completion_mask.shape[1] == 3 for part in parts)


def test_a_shared_prompt_changes_no_logprob(make_policy, prompts):
    policy = make_policy().eval()
    rollout = draw(policy, [prompt * 5 for prompt in prompts], n=3, stop_ids=frozenset(range(8)))
    shared, apart = rollout.pack(), replace(rollout, groups=[*range(len(rollout))]).pack()
    assert shared.num_tokens < apart.num_tokens
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(policy, shared), token_logprobs(policy, apart), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- rows and columns


@pytest.mark.parametrize(
    "rows", [[0, 2, 4], torch.tensor([0, 2, 4]), torch.tensor([True, False] * 3)], ids=["list", "numbers", "bool"]
)
def test_selecting_rows(groups, rows):
    """In the given form; every tensor with them, and as many columns as before until they are trimmed."""
    selected = replace(groups, scores=torch.arange(6.0)).select(rows)
    assert selected.completions == [[5], [9, 10], [13]]
    assert selected.prompts == [[1, 2, 3] * 8] * 2 + [[4] * 24]
    assert selected.groups == [0, 0, 1]
    assert selected.finished.tolist() == [True, True, False]
    assert selected.scores.tolist() == [0, 2, 4]
    assert selected.rows.tolist() == [0, 2, 4]
    assert selected.logprobs.tolist() == [[5, 0, 0], [9, 10, 0], [13, 0, 0]]
    assert selected.ref_logprobs is None
    trimmed = selected.trimmed()
    assert trimmed.logprobs.tolist() == [[5, 0], [9, 10], [13, 0]]
    assert trimmed.values.tolist() == [[0, 1], [6, 7], [12, 13]]
    assert trimmed.scores.tolist() == [0, 2, 4]
    assert trimmed.pack().completion_mask.shape == trimmed.mask.shape == (3, 2)


def test_selecting_in_another_order(groups):
    selected = groups.select([4, 0, 4])
    assert selected.completions == [[13], [5], [13]]
    assert selected.values.tolist() == [[12, 13, 14], [0, 1, 2], [12, 13, 14]]


def test_excluded_rows_keep_their_tokens_but_not_their_mask(groups):
    excluded = groups.exclude(~groups.finished).exclude(torch.tensor([True] + [False] * 5))
    assert excluded.takes_part.tolist() == [False, False, True, True, False, False]
    assert excluded.mask.sum(-1).tolist() == [0, 0, 2, 2, 0, 0]
    assert torch.equal(excluded.completion_mask, groups.completion_mask)
    assert excluded.completions == groups.completions


def test_joining(groups):
    """Columns are those of the longest, groups of the second are new ones, and what one of the two lacks is dropped."""
    short = replace(groups.select([3, 4, 5]).trimmed(), values=None, scores=torch.ones(3))
    joined = short.cat(replace(groups, scores=torch.zeros(6)))
    assert joined.completions == short.completions + groups.completions
    assert joined.groups == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert joined.group_size == 3
    assert joined.logprobs.shape == joined.mask.shape == (9, 3)
    assert joined.logprobs[:3, 2].tolist() == [0, 0, 0]
    assert torch.equal(joined.logprobs[3:], groups.logprobs)
    assert torch.equal(joined.mask, joined.completion_mask)
    assert joined.scores.tolist() == [1] * 3 + [0] * 6
    assert joined.values is None and joined.rows is None


def test_all_tensors_move_together(groups):
    moved = groups.to(torch.device("meta"))
    devices = {getattr(moved, field.name).device.type for field in fields(moved) if field.name in ("mask", "values")}
    assert devices == {"meta"}
    assert moved.completions == groups.completions


@pytest.mark.parametrize(
    ("scores", "excluded", "flat"),
    [
        ([1, 2, 3, 4, 4, 4], [], [False, True]),
        ([1, 1, 3, 4, 4, 5], [2], [True, False]),
        ([1, 2, 3, 4, 5, 6], [0, 1], [True, False]),
    ],
)
def test_groups_without_a_difference(groups, scores, excluded, flat):
    left_out = torch.zeros(6, dtype=torch.bool)
    left_out[excluded] = True
    experience = replace(groups, scores=torch.tensor(scores, dtype=torch.float32)).exclude(left_out)
    assert flat_groups(experience).tolist() == flat
