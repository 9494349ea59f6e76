"""The packed layout, against a naive builder of every index and of the set of tokens that each token attends to."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.batch import AttentionLayout, PackedBatch

# All tokens of a generated batch are different numbers, so that a token identifies its position.
Shape = tuple[int, tuple[int, ...]]  # tokens of the prompt, and of each completion


def groups_of(shapes: list[Shape]) -> list[tuple[list[int], list[list[int]]]]:
    tokens = iter(range(100, 1_000_000))

    def take(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    return [(take(prompt), [take(length) for length in completions]) for prompt, completions in shapes]


# Mostly short, sometimes just below and above the lengths at which the layout changes (16, 64 tokens).
lengths = st.integers(1, 9) | st.sampled_from([15, 16, 17, 40, 63, 64, 65, 80])
shapes = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4).map(tuple)), min_size=1, max_size=5)
shares = st.sampled_from([True, False, "auto"])


def shares_by_rule(prompt: int, completions: tuple[int, ...], share: bool | str) -> bool:
    if share == "auto":
        return prompt >= 16 and 4 * prompt >= max(completions)
    return share


@dataclasses.dataclass
class Naive:
    """The expected batch, built token by token; `sees[n]` is the set of stream positions that n attends to."""

    stream: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    sees: list[set[int]] = dataclasses.field(default_factory=list)
    prompts: list[list[int]] = dataclasses.field(
        default_factory=list
    )  # for each completion, the positions of its prompt
    completions: list[list[int]] = dataclasses.field(default_factory=list)  # for each completion, its positions

    @classmethod
    def build(cls, groups, share) -> Naive:
        naive = cls()
        for prompt, completions in groups:
            shared = shares_by_rule(len(prompt), tuple(map(len, completions)), share)
            prompt_places = None
            for completion in completions:
                if prompt_places is None or not shared:
                    prompt_places = naive.add(prompt, parent=[])
                naive.prompts.append(prompt_places)
                naive.completions.append(naive.add(completion, parent=prompt_places))
        return naive

    def add(self, segment: list[int], parent: list[int]) -> list[int]:
        places = list(range(len(self.stream), len(self.stream) + len(segment)))
        for i, token in enumerate(segment):
            self.stream.append(token)
            self.positions.append(len(parent) + i)
            self.sees.append({*parent, *places[: i + 1]})
        return places


def attended(layout: AttentionLayout, num_tokens: int) -> list[tuple[int, list[int]]]:
    """Return (query, keys that it attends to) of each output row of a layout, in stream order after `restore`."""
    rows: list[tuple[int, list[int]]] = []
    for group in layout.groups:
        if group.span is not None:
            assert group.prefix == 0
            queries = keys = [list(range(*group.span))]
        else:
            queries, keys = group.queries.tolist(), group.keys.tolist()
        for row_queries, row_keys in zip(queries, keys, strict=True):
            assert {*row_queries, *row_keys} <= {*range(num_tokens)}
            assert len(row_keys) == group.prefix + len(row_queries)
            rows += [(query, row_keys[: group.prefix + i + 1]) for i, query in enumerate(row_queries)]
    order = range(num_tokens) if layout.restore is None else layout.restore.tolist()
    if layout.restore is None:
        assert len(rows) == num_tokens
    return [rows[n] for n in order]


# ------------------------------------------------------------------------------------------------------------ the shape


def test_the_layout_of_the_docstring():
    """PPPP AAA BBBB | PP CCC: 4 + 3 + 4 + 2 + 3 tokens, T = 4.

    B's first token (place 7) is predicted by the last token of the prompt (place 3), its others by the token before;
    C's by place 12. The slots of a flattened (3, 4) leave the fourth column of A and C empty.
    """
    batch = PackedBatch.pack([([1, 2, 3, 4], [[5, 6, 7], [8, 9, 10, 11]]), ([12, 13], [[14, 15, 16]])], share=True)
    assert batch.input_ids.tolist() == list(range(1, 17))
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 0, 1, 2, 3, 4]
    assert batch.completion_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.targets.tolist() == [5, 6, 7, 8, 9, 10, 11, 14, 15, 16]
    assert batch.predict_rows.tolist() == [3, 4, 5, 3, 7, 8, 9, 12, 13, 14]
    assert batch.last_rows.tolist() == [6, 10, 15]
    assert batch.slots.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert batch.spans == ((0, 4, 4, 7), (0, 4, 7, 11), (11, 13, 13, 16))
    assert (batch.num_tokens, batch.num_completions, batch.num_completion_tokens) == (16, 3, 10)
    assert batch.completion_ids().tolist() == [[5, 6, 7, 0], [8, 9, 10, 11], [14, 15, 16, 0]]


def test_not_shared_the_prompt_stands_before_each_completion():
    batch = PackedBatch.pack([([1, 2], [[3, 4], [5]])], share=False)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 1, 2, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.predict_rows.tolist() == [1, 2, 5]
    assert batch.last_rows.tolist() == [3, 6]


@given(shapes, shares)
@settings(deadline=None)
def test_every_index_is_what_a_naive_builder_writes_down(shapes: list[Shape], share: bool | str):
    groups = groups_of(shapes)
    batch, naive = PackedBatch.pack(groups, share=share), Naive.build(groups, share)
    assert batch.input_ids.tolist() == naive.stream
    assert batch.position_ids.tolist() == naive.positions
    assert batch.last_rows.tolist() == [places[-1] for places in naive.completions]
    assert batch.targets.tolist() == [token for _, completions in groups for line in completions for token in line]
    predicted_by = [
        row
        for prompt, places in zip(naive.prompts, naive.completions, strict=True)
        for row in [prompt[-1], *places[:-1]]
    ]
    assert batch.predict_rows.tolist() == predicted_by
    width = max(map(len, naive.completions))
    grid = [[column < len(places) for column in range(width)] for places in naive.completions]
    assert batch.completion_mask.tolist() == grid
    assert batch.slots.tolist() == [i for i, real in enumerate(sum(grid, [])) if real]
    for span, prompt, places in zip(batch.spans, naive.prompts, naive.completions, strict=True):
        assert range(span.prompt_start, span.prompt_end) == range(prompt[0], prompt[-1] + 1)
        assert range(span.start, span.end) == range(places[0], places[-1] + 1)


@given(shapes, shares)
@settings(deadline=None)
def test_the_same_batch_padded(shapes: list[Shape], share: bool | str):
    groups = groups_of(shapes)
    batch = PackedBatch.pack(groups, share=share)
    padded = batch.padded()
    sequences = [[*prompt, *completion] for prompt, completions in groups for completion in completions]
    width = max(map(len, sequences))
    assert padded.input_ids.shape == padded.attention_mask.shape == (len(sequences), width)
    for row, mask, sequence in zip(padded.input_ids, padded.attention_mask, sequences, strict=True):
        assert mask.tolist() == [1] * len(sequence) + [0] * (width - len(sequence))
        assert row[: len(sequence)].tolist() == sequence
    flat = padded.input_ids.flatten()
    assert torch.equal(flat[padded.predict_rows], batch.input_ids[batch.predict_rows])
    assert torch.equal(flat[padded.last_rows], batch.input_ids[batch.last_rows])
    # Each row predicts the token that follows it in its own sequence.
    assert torch.equal(flat[padded.predict_rows + 1], batch.targets)


@given(shapes, shares, st.integers(0, 5))
@settings(deadline=None)
def test_scatter_puts_values_where_the_mask_is(shapes: list[Shape], share: bool | str, extra: int):
    groups = groups_of(shapes)
    width = max(max(completions) for _, completions in shapes) + extra
    batch = PackedBatch.pack(groups, share=share, width=width)
    values = torch.arange(1.0, 1 + batch.num_completion_tokens, requires_grad=True)
    grid = batch.scatter(values)
    assert grid.shape == batch.completion_mask.shape == (batch.num_completions, width)
    expected = iter(values.tolist())
    for row, line in zip(grid, (line for _, completions in groups for line in completions), strict=True):
        assert row.tolist() == [next(expected) for _ in line] + [0] * (width - len(line))
    (grid * 3).sum().backward()
    assert values.grad.tolist() == [3.0] * batch.num_completion_tokens


# ------------------------------------------------------------------------------------------------------ what is learned


@st.composite
def flagged(draw) -> tuple[list[Shape], list[list[list[bool]] | None]]:
    """Shapes, and for each group None or flags with a supervised token in every completion."""
    chosen = draw(shapes)

    def some(length: int) -> st.SearchStrategy[list[bool]]:
        return st.lists(st.booleans(), min_size=length, max_size=length).filter(any)

    return chosen, [draw(st.none() | st.tuples(*map(some, completions)).map(list)) for _, completions in chosen]


@given(flagged(), shares, st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_the_loss_mask_holds_each_flag_where_its_token_is(case, share: bool | str, extra: int):
    """For the stream and its padded rows: the flags of their tokens, compared one by one."""
    shapes, flags = case
    groups = groups_of(shapes)
    width = max(max(completions) for _, completions in shapes) + extra
    triples = [(prompt, completions, marks) for (prompt, completions), marks in zip(groups, flags, strict=True)]
    batch = PackedBatch.pack(triples, share=share, width=width)
    learned = {
        token
        for (_, completions), marks in zip(groups, flags, strict=True)
        for k, completion in enumerate(completions)
        for place, token in enumerate(completion)
        if marks is None or marks[k][place]
    }
    assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.shape == batch.completion_mask.shape
    assert batch.num_supervised_tokens == len(learned)
    padded = batch.padded()
    for targets in (batch.targets, padded.input_ids.flatten()[padded.predict_rows + 1]):
        assert {*batch.scatter(targets)[batch.loss_mask].tolist()} == learned
    # Everything except the loss mask is as without flags.
    plain = PackedBatch.pack(groups, share=share, width=width)
    assert torch.equal(plain.loss_mask, plain.completion_mask) and torch.equal(batch.completion_mask, plain.loss_mask)
    for ours, theirs in zip(
        tensors_of(batch), tensors_of(dataclasses.replace(plain, loss_mask=batch.loss_mask)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_flags_of_a_shared_prompt_by_hand():
    """Of A A A the last two, of B B all: five places, of which one is not supervised."""
    prompt = list(range(20))
    batch = PackedBatch.pack([(prompt, [[30, 31, 32], [40, 41]], [[False, True, True], [True, True]])], share=True)
    assert batch.loss_mask.int().tolist() == [[0, 1, 1], [1, 1, 0]]
    assert batch.completion_mask.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch.num_completion_tokens, batch.num_supervised_tokens) == (5, 4)
    assert batch.to("meta").loss_mask.device.type == "meta"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([[True]], r"group 1: completions of \[2, 1\] tokens and flags for \[1\], expected as many"),
        ([[True], [True]], r"group 1: completions of \[2, 1\] tokens and flags for \[1, 1\], expected as many"),
        ([[True, True], [False]], "group 1: a completion has no supervised token"),
    ],
)
def test_flags_that_do_not_fit_are_an_error(flags, message: str):
    with pytest.raises(ValueError, match=message):
        PackedBatch.pack([([1], [[2]]), ([3], [[4, 5], [6]], flags)])


# -------------------------------------------------------------------------------------------------------------- sharing


@pytest.mark.parametrize(
    ("prompt", "completions", "shared"),
    [
        (16, (64, 10), True),  # exactly a quarter of the longest completion
        (16, (65, 10), False),  # a little less than a quarter
        (16, (10, 65), False),  # the longest counts, in any order
        (15, (1, 1), False),  # a short prompt saves nothing
        (17, (3, 3), True),
        (100, (400, 1), True),
        (100, (401, 1), False),
    ],
)
def test_auto_shares_where_it_pays(prompt: int, completions: tuple[int, ...], shared: bool):
    batch = PackedBatch.pack(groups_of([(prompt, completions)]))
    assert batch.num_tokens == prompt * (1 if shared else len(completions)) + sum(completions)


def test_auto_decides_for_each_prompt():
    batch = PackedBatch.pack(groups_of([(20, (5, 5)), (4, (5, 5))]))
    assert batch.num_tokens == 20 + 10 + 2 * 4 + 10


# ---------------------------------------------------------------------------------------------------- errors and moving


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "empty batch"),
        ([([1], [[2]]), ([], [[3, 4]])], r"group 1: 0 prompt tokens and completions of \[2\] tokens"),
        ([([1], [[2]]), ([5], [])], r"group 1: 1 prompt tokens and completions of \[\] tokens"),
        ([([1], [[2], []])], r"group 0: 1 prompt tokens and completions of \[1, 0\] tokens"),
    ],
)
def test_nothing_to_learn_from_is_an_error(groups, message: str):
    with pytest.raises(ValueError, match=message):
        PackedBatch.pack(groups)


def test_too_narrow_a_width_is_an_error():
    groups = groups_of([(3, (5, 2))])
    assert PackedBatch.pack(groups, width=5).completion_mask.shape == (2, 5)
    with pytest.raises(ValueError, match="width=4 is less than the longest completion, 5 tokens"):
        PackedBatch.pack(groups, width=4)


def test_an_unknown_way_to_share_is_an_error():
    with pytest.raises(ValueError, match="share='never'"):
        PackedBatch.pack(groups_of([(3, (5, 2))]), share="never")


def tensors_of(value) -> list[torch.Tensor]:
    """Yield every tensor of a nested value."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, tuple) else []


def test_to_moves_every_tensor():
    batch = PackedBatch.pack(groups_of([(20, (5, 9, 7)), (2, (70,)), (4, (3, 4))]), share=True)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")  # a device that exists on every machine
    assert len(tensors_of(batch)) > 10
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert [tensor.shape for tensor in tensors_of(moved)] == [tensor.shape for tensor in tensors_of(batch)]
    assert moved.spans == batch.spans


# ---------------------------------------------------------------------------------------------------------- sight lines


@given(shapes, shares)
@settings(deadline=None)
def test_a_token_sees_its_own_stretch_and_all_of_its_prompt_and_nothing_else(shapes: list[Shape], share: bool | str):
    groups = groups_of(shapes)
    batch, naive = PackedBatch.pack(groups, share=share), Naive.build(groups, share)
    for place, (query, keys) in enumerate(attended(batch.layout, batch.num_tokens)):
        assert query == place
        # As a list, since a repeated key would count twice; in order, since a sliding window counts from the end.
        assert keys == sorted(naive.sees[place])


def test_long_runs_are_slices_and_short_ones_go_together():
    """The three forms of an attention call."""
    long, short, branches = (2, (70,)), (2, (5,)), (20, (44, 30, 29))
    batch = PackedBatch.pack(groups_of([long, short, short, branches]), share=True)
    spans = [group.span for group in batch.layout.groups if group.span is not None]
    assert spans == [(0, 72), (86, 150)]  # the long run, and a prompt with its first completion, 64 tokens
    rows = [(group.prefix, tuple(group.queries.shape)) for group in batch.layout.groups if group.span is None]
    assert rows == [(0, (2, 7)), (20, (2, 30))]


def test_a_stream_of_long_runs_needs_no_restoring():
    assert PackedBatch.pack(groups_of([(10, (60,)), (10, (70,))])).layout.restore is None
    assert PackedBatch.pack(groups_of([(2, (3,)), (10, (70,))])).layout.restore is None  # and one short one


# ----------------------------------------------------------------------------------------------------------------- cost


def cost(batch: PackedBatch) -> Counter:
    """Return the number of index elements of the layout, and of attention scores."""
    total = Counter(indices=batch.num_tokens)  # restore
    for group in batch.layout.groups:
        rows, length = (1, group.span[1] - group.span[0]) if group.span is not None else group.queries.shape
        total += Counter(indices=rows * (group.prefix + 2 * length), scores=rows * length * (group.prefix + length))
    return total


@given(shapes, shares)
@settings(deadline=None)
def test_twice_the_groups_cost_twice_as_much(shapes: list[Shape], share: bool | str):
    once = PackedBatch.pack(groups_of(shapes), share=share)
    twice = PackedBatch.pack(groups_of(shapes * 2), share=share)
    assert cost(twice) == Counter({name: 2 * count for name, count in cost(once).items()})
    assert len(twice.layout.groups) <= 2 * len(once.layout.groups)


@given(shapes, shares)
@settings(deadline=None)
def test_joint_calls_waste_little(shapes: list[Shape], share: bool | str):
    """At most 15 % of a row are repetitions."""
    batch = PackedBatch.pack(groups_of(shapes), share=share)
    for group in batch.layout.groups:
        if group.span is None:
            for row in group.queries.tolist():
                assert len(set(row)) >= 0.85 * len(row)
