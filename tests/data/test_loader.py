"""Steps and micro-batches by tokens, mixtures, formatting functions, and the counts of rows and tokens."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ConfigError, DataConfig, RunConfig
from rlhf_core.data.account import Account
from rlhf_core.data.errors import DataError
from rlhf_core.data.examples import Examples
from rlhf_core.data.loader import (
    Steps,
    accounts,
    best_fit,
    load_examples,
    pack_rows,
    split_places,
    step_examples,
)
from rlhf_core.data.mixture import Mixture
from rlhf_core.data.records import Example, Record
from rlhf_core.demo.language import build_tokenizer
from rlhf_core.models.forward import prepare, token_logprobs


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def split_rows(rows, settings):
    return [[rows[i] for i in places] for places in split_places(rows, settings)]


def config(**settings) -> RunConfig:
    return RunConfig(**dict(model="m", data="d", output="o", batch_size=4) | settings)


def example(prompt: int, *completions: int, mark: int = 1) -> Example:
    """Return an example whose parts have these numbers of tokens."""
    record = Record(prompt="", completions=(), row={}, source=f"rows.jsonl:{mark}")
    return Example(prompt=[mark] * prompt, completions=tuple([7] * length for length in completions), record=record)


# ------------------------------------------------------------------------------------------------- groups of a step


@pytest.mark.parametrize(
    ("lengths", "capacity", "most", "expected"),
    [
        ([5, 9, 1, 4, 6, 20], 10, None, [[0], [1, 2], [3, 4], [5]]),  # 20 alone; 9; 6; 5 alone; 4 beside 6; 1 beside 9
        ([3, 7, 5, 5], 10, None, [[0, 1], [2, 3]]),  # next fit would need three
        ([6, 5, 4, 3], 10, None, [[0, 2], [1, 3]]),  # 4 fills 6 to the brim, rather than 5
        ([1] * 7, 10, 3, [[0, 1, 2], [3, 4, 5], [6]]),
        ([10, 10], 10, None, [[0], [1]]),
        ([], 3, None, []),
    ],
)
def test_best_fit_the_longest_first(lengths, capacity, most, expected):
    assert best_fit(lengths, capacity, most=most) == expected


lengths = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=4)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 90) | st.none(), st.integers(1, 6) | st.none())
def test_no_row_and_no_token_is_lost_whatever_the_limits(shapes, tokens, size):
    rows = [example(prompt, *completions, mark=i + 1) for i, (prompt, completions) in enumerate(shapes)]
    groups = split_rows(rows, config(micro_batch_tokens=tokens, micro_batch_size=size, batch_size=30))
    assert sorted(map(id, sum(groups, []))) == sorted(map(id, rows))
    for group in groups:
        batch = pack_rows(group)
        assert batch.num_completions == sum(len(row.completions) for row in group)
        parts = [(row.prompt, ids) for row in group for ids in row.completions]
        for span, (prompt, completion) in zip(batch.spans, parts, strict=True):
            assert batch.input_ids[span.prompt_start : span.prompt_end].tolist() == prompt
            assert batch.input_ids[span.start : span.end].tolist() == completion
        assert len(group) <= (size or 30)
        assert tokens is None or len(group) == 1 or batch.num_tokens <= tokens


def test_groups_by_size_alone_are_the_rows_in_order():
    rows = [example(1, 1, mark=i) for i in range(7)]
    assert split_rows(rows, config(micro_batch_size=3)) == [rows[:3], rows[3:6], rows[6:]]
    assert split_rows(rows, config()) == [rows[:4], rows[4:]]  # batch_size


def test_rows_of_one_group_do_not_see_each_other():
    """The log-probs of a row in a group that was filled by tokens equal those of the row alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    policy = prepare(LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.4)).double(), "packed")
    draw = np.random.default_rng(0)
    rows = [
        Example(
            prompt=draw.integers(3, 50, size).tolist(),
            completions=(draw.integers(3, 50, 5).tolist(), draw.integers(3, 50, 9).tolist()),
            record=Record(prompt="", completions=(), row={}, source=""),
        )
        for size in (3, 30, 17, 4, 22, 8)
    ]
    groups = split_rows(rows, config(micro_batch_tokens=80, batch_size=6))
    assert len(groups) < len(rows) and max(map(len, groups)) > 1
    with torch.no_grad():
        for group in groups:
            together = token_logprobs(policy, pack_rows(group))
            alone = [token_logprobs(policy, pack_rows([row])) for row in group]
            assert torch.allclose(together, torch.cat(alone), atol=1e-6)


# -------------------------------------------------------------------------------------------------- steps by tokens


def marks(rows: list[Example]) -> list[int]:
    return [row.prompt[0] for row in rows]


@pytest.mark.parametrize("epochs", [1, 2.5])
def test_a_step_ends_before_it_has_too_many_tokens(epochs):
    """Against a naive implementation: rows one by one in the order of the epoch."""
    draw = np.random.default_rng(1)
    rows = [example(int(size), 2, mark=i) for i, size in enumerate(draw.integers(1, 30, 40))]
    rows[11] = example(200, 2, mark=11)
    settings = config(max_tokens_per_batch=50, batch_size=4, seed=3, epochs=epochs)
    steps = Steps(rows, settings)
    expected = []
    for epoch in range(3):
        batches: list[list[Example]] = [[]]
        for row in step_examples(rows, 40, seed=3, step=epoch + 1):  # the whole epoch's order
            full = sum(len(each.prompt) + 2 for each in batches[-1]) + len(row.prompt) + 2 > 50
            if batches[-1] and (full or len(batches[-1]) == 4):
                batches.append([])
            batches[-1].append(row)
        whole = -(-len(batches) // 2) if epoch + 1 > epochs else len(batches)
        expected += batches[: whole if epoch < epochs else 0]
    assert [marks(steps.rows(step)) for step in range(1, steps.total + 1)] == [*map(marks, expected)]
    assert any(len(batch) == 4 for batch in expected) and [11] in [*map(marks, expected)]
    backwards = [marks(steps.rows(step)) for step in range(steps.total, 0, -1)]
    assert backwards[::-1] == [*map(marks, expected)]


def test_steps_by_rows_alone_are_those_of_step_examples():
    rows = [example(1, 1, mark=i) for i in range(13)]
    steps = Steps(rows, config(epochs=2, seed=5))
    assert steps.total == 8
    for step in range(1, 9):
        assert steps.rows(step) == step_examples(rows, 4, seed=5, step=step)
    assert Steps(rows, config(epochs=2, max_steps=3)).total == 3
    assert Steps(rows, config(epochs=2, max_steps=3, max_tokens_per_batch=5)).total == 3
    assert Steps(rows, config(epochs=0.01, max_tokens_per_batch=5)).total == 1


def test_on_policy_jobs_have_no_batches_by_tokens():
    from rlhf_core.trainers.ppo import PPOConfig

    settings = dict(model="m", data="d", output="o", reward_model="r")
    for field in ("micro_batch_tokens", "max_tokens_per_batch"):
        with pytest.raises(ConfigError, match=f"^{field}=9: expected none"):
            PPOConfig(**settings, **{field: 9})


# --------------------------------------------------------------------------------------------------------- mixtures


def part(count: int, mark: int) -> list[Example]:
    return [example(mark, i + 1) for i in range(count)]


def drawn(mixture: Mixture, seed: int, epochs: int) -> list[list[tuple[int, int]]]:
    """Return (data set, row in it) of every example of each epoch."""
    size = len(mixture)
    rows = [step_examples(mixture, size, seed=seed, step=epoch + 1) for epoch in range(epochs)]
    return [[(len(row.prompt), len(row.completions[0]) - 1) for row in epoch] for epoch in rows]


def test_without_weights_an_epoch_is_every_row_of_each():
    mixture = Mixture([part(3, 1), part(5, 2)])
    assert len(mixture) == 8
    for epoch in drawn(mixture, seed=0, epochs=2):
        assert sorted(epoch) == [(1, i) for i in range(3)] + [(2, i) for i in range(5)]


def test_weights_are_shares_of_an_epoch_and_leave_no_row_out():
    """3 to 1 of 4 and 10 rows: 10 is larger for its weight (10/1 > 4/3), so 30 rows of the first beside its 10."""
    mixture = Mixture([part(4, 1), part(10, 2)], (3, 1))
    assert len(mixture) == 40
    epochs = drawn(mixture, seed=7, epochs=4)
    for epoch in epochs:
        assert sum(data_set == 1 for data_set, _ in epoch) == 30
        assert sorted(row for data_set, row in epoch if data_set == 2) == list(range(10))
        counts = [epoch.count((1, row)) for row in range(4)]
        assert sorted(counts) == [7, 7, 8, 8]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert [sum(epoch.count((1, row)) for epoch in epochs) for row in range(4)] == [30] * 4  # equal over the epochs
    assert drawn(mixture, seed=7, epochs=4) == epochs


def test_a_mixture_is_a_sequence():
    first, second = part(2, 1), part(3, 2)
    mixture = Mixture([first, second])
    assert [*mixture] == first + second == mixture[:]
    assert mixture[-1] == second[2] and mixture[1:4:2] == [first[1], second[1]]
    with pytest.raises(IndexError):
        mixture[5]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [{"prompt": "solano", "completion": "dolo"}, {"prompt": "peta", "completion": "misu vesa"}]
TEXTS = [{"text": "rena vilano peta"}, {"text": "kapi"}, {"text": "tumo"}]


def test_data_sets_of_different_formats_are_read_as_one(tmp_path, tokenizer):
    one, other = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b,c.jsonl", TEXTS)
    examples = load_examples(DataConfig(path=f"{one},{other}".replace("b,", "b\\,")), tokenizer, need="supervised")
    assert [row.record.source for row in examples] == ["a.jsonl:1", "a.jsonl:2", *(f"b,c.jsonl:{i}" for i in (1, 2, 3))]
    assert DataConfig(path=other).paths() == (other,)  # a path that exists is not split
    assert [each["rows"] for each in accounts(examples)] == [2, 3]
    weighted = load_examples(DataConfig(path=one, weights=(2,)), tokenizer, need="supervised")
    assert len(weighted) == 2
    with pytest.raises(ConfigError, match=r"^weights=\(3.0,\): expected a number for each data set"):
        DataConfig(path="a.jsonl,b.jsonl", weights=3)
    with pytest.raises(DataError, match="the data look like plain text"):
        load_examples(DataConfig(path=f"{one},{other}".replace("b,", "b\\,")), tokenizer, need="prompts")


def test_tokens_of_a_mixture_are_counted_for_steps_by_tokens(tmp_path, tokenizer):
    one, other = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", TEXTS)
    mixture = load_examples(DataConfig(path=f"{one},{other}", weights=(1, 3)), tokenizer, need="supervised")
    for epoch in (0, 1):
        expected = [pack_rows([mixture.at(slot, epoch)]).num_tokens for slot in range(len(mixture))]
        assert mixture.stream_lengths(epoch).tolist() == expected
    assert Steps(mixture, config(max_tokens_per_batch=9, epochs=2)).total > 2


# ------------------------------------------------------------------------------------------------- the flat arrays


def test_examples_from_flat_arrays_are_those_that_went_in(tmp_path, tokenizer):
    rows = [
        {"prompt": "solano peta", "completions": ["dolo", "misu", "vesa kapi"], "weight": 2.5},
        {"prompt": "kapi", "completions": ["rena", "tumo"]},
    ]
    path = write(tmp_path / "ranked.jsonl", rows)
    examples = load_examples(DataConfig(path=path), tokenizer, need="ranking")
    assert isinstance(examples, Examples) and len(examples) == 2
    first, second = examples
    texts = [[tokenizer.decode(ids) for ids in (row.prompt, *row.completions)] for row in examples]
    assert texts[0] == ["<bos> solano peta", "dolo <eos>", "misu <eos>", "vesa kapi <eos>"]
    assert (first.weight, second.weight, first.record.row) == (2.5, 1.0, rows[0])
    assert examples[-1] == second == examples[1:][0] and examples[0] == first
    assert examples.stream_lengths.tolist() == [pack_rows([row]).num_tokens for row in examples]
    with pytest.raises(IndexError):
        examples[2]


def test_what_is_learned_of_several_turns_survives_the_flat_arrays(tmp_path, tokenizer):
    turns = [("user", "solano"), ("assistant", "dolo"), ("user", "peta kapi"), ("assistant", "misu vesa")]
    path = write(tmp_path / "chat.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    data = DataConfig(path=path, turns="all", chat_template="plain")
    (row,) = load_examples(data, tokenizer, need="supervised")
    (flags,), (ids,) = row.supervised, row.completions
    assert len(flags) == len(ids) and 0 < sum(flags) < len(flags)
    assert pack_rows([row]).num_supervised_tokens == sum(flags)
    assert {type(flag) for flag in flags} == {bool}


# --------------------------------------------------------------------------------------------------- the account


def test_every_row_and_token_is_accounted_for(tmp_path, tokenizer, caplog):
    rows = [
        {"prompt": "solano", "completion": "dolo"},  # 2 + 2 tokens, with BOS and EOS
        {"prompt": "solano", "completion": ""},  # a bad row
        {"prompt": " ".join(["peta"] * 9), "completion": "dolo"},  # 10 + 2: four too many
        {"prompt": "peta", "completion": " ".join(["dolo"] * 9)},  # 2 + 10: no room for its prompt
        {"prompt": "peta", "completion": "dolo <eos> dolo"},  # a special token typed in
    ]
    data = DataConfig(path=write(tmp_path / "rows.jsonl", rows), skip_bad_rows=1, max_length=8)
    with caplog.at_level(logging.INFO, "rlhf_core.data"):
        examples = load_examples(data, tokenizer, need="supervised")
    account = examples.account
    assert (account.rows, account.rows_read, account.rows_dropped) == (3, 5, 2)
    assert account.prompt_tokens == sum(len(row.prompt) for row in examples)
    assert account.completion_tokens == account.supervised_tokens == sum(len(row.completions[0]) for row in examples)
    (empty, room), (cut,) = account.dropped.items(), account.cut.items()
    assert empty[0].startswith("field 'completion' is empty") and (empty[1].rows, empty[1].tokens) == (1, 0)
    assert room[0] == "the completion leaves no room for a prompt in max_length=8"
    assert (room[1].rows, room[1].tokens, room[1].first) == (1, 12, "rows.jsonl:4")
    assert (cut[1].rows, cut[1].tokens, cut[1].first) == (1, 4, "rows.jsonl:3")
    kept, *losses = [record.message for record in caplog.records]
    assert "3 of 5 rows, " in kept and "tokens a second" in kept
    assert [line.split("rows.jsonl: ")[1].split(": ")[0] for line in losses] == [
        "dropped 2 of 5 rows with 12 tokens", "cut 1 of 5 rows, 4 tokens off", "1 of 5 rows",
    ]  # fmt: skip
    assert Account.from_dict(json.loads(json.dumps(account.to_dict()))) == account


@pytest.mark.parametrize(("truncation", "rows"), [("prompt", 2), ("drop", 1)])
def test_rows_that_are_too_long_are_cut_or_dropped_and_counted(tmp_path, tokenizer, truncation, rows):
    path = write(tmp_path / "rows.jsonl", [PAIRS[0], {"prompt": "peta " * 9, "completion": "dolo"}])
    data = DataConfig(path=path, max_length=5, truncation=truncation)
    examples = load_examples(data, tokenizer, need="supervised")
    assert len(examples) == rows
    lost = [loss.tokens for loss in (*examples.account.cut.values(), *examples.account.dropped.values())]
    assert lost == [7 if truncation == "prompt" else 12]


def test_rows_that_are_too_long_may_be_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [PAIRS[0], {"prompt": "peta " * 9, "completion": "dolo"}])
    data = DataConfig(path=path, max_length=5, truncation="error")
    with pytest.raises(DataError, match=r"^rows.jsonl:2: .* 12 tokens, expected at most max_length=5"):
        load_examples(data, tokenizer, need="supervised")


def test_nothing_left_is_an_error_with_the_reasons(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", PAIRS[:1])
    with pytest.raises(DataError, match=r"rows.jsonl: 0 of 1 rows left: 1 x longer than max_length=3 \(first: rows"):
        load_examples(DataConfig(path=path, max_length=3, truncation="drop"), tokenizer, need="supervised")


# ----------------------------------------------------------------------------------------------- formatting by hand


HOOKS = '''
def question(row):
    """Return a row of another format as a prompt with its completion."""
    if row["q"] == "skip":
        return None
    return {"prompt": row["q"], "completion": row["a"]}


def wrong(row):
    return [row]
'''


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_hooks", None)


@pytest.mark.usefixtures("hooks")
def test_rows_go_through_the_users_own_function(tmp_path, tokenizer):
    rows = [{"q": "solano", "a": "dolo"}, {"q": "skip", "a": "x"}, {"q": "peta", "a": "misu"}]
    data = DataConfig(path=write(tmp_path / "own.jsonl", rows), formatting="my_hooks:question")
    examples = load_examples(data, tokenizer, need="supervised")
    assert [tokenizer.decode(row.completions[0]) for row in examples] == ["dolo <eos>", "misu <eos>"]
    assert [row.record.source for row in examples] == ["own.jsonl:1", "own.jsonl:3"]
    ((reason, loss),) = examples.account.dropped.items()
    assert reason == "the formatting function leaves it out" and (loss.rows, loss.first) == (1, "own.jsonl:2")


@pytest.mark.usefixtures("hooks")
def test_a_function_that_fails_is_told_with_its_name_the_place_and_no_content(tmp_path, tokenizer):
    secret = "a very private sentence"
    path = write(tmp_path / "own.jsonl", [{"q": "solano", "a": "dolo"}, {"question": secret}])
    line = 1 + HOOKS.splitlines().index('    if row["q"] == "skip":')
    reason = f"^own.jsonl:2: the formatting function my_hooks:question fails: KeyError at my_hooks.py:{line}\n"
    with pytest.raises(DataError, match=reason) as caught:
        load_examples(DataConfig(path=path, formatting="my_hooks:question"), tokenizer, need="supervised")
    assert secret not in str(caught.value)
    data = DataConfig(path=path, formatting="my_hooks:question", skip_bad_rows=1)
    assert len(load_examples(data, tokenizer, need="supervised")) == 1
    with pytest.raises(DataError, match="my_hooks:wrong returned a list, expected a row or None"):
        load_examples(DataConfig(path=path, formatting="my_hooks:wrong"), tokenizer, need="supervised")
    with pytest.raises(ValueError, match="my_hooks has no function nothing"):
        load_examples(DataConfig(path=path, formatting="my_hooks:nothing"), tokenizer, need="supervised")


def test_packing_as_before_takes_flags_only_where_there_are_some():
    row = example(2, 3)
    batch = pack_rows([row])
    assert torch.equal(batch.loss_mask, batch.completion_mask)
    assert torch.equal(batch.input_ids, PackedBatch.pack([(row.prompt, row.completions)]).input_ids)
