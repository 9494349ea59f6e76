"""Which rows a step sees: a function of seed and step alone, every row once an epoch."""

import json

import pytest

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ConfigError, DataConfig
from rlhf_core.data.formats import DataError, Record
from rlhf_core.data.loader import count_steps, load_examples, micro_batches, preference_batches, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.demo.language import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def examples(count: int) -> list[Example]:
    record = Record(prompt="", completions=(), row={}, source="")
    return [Example(prompt=[number + 1], completions=([7], [8, 9]), record=record) for number in range(count)]


def numbers(rows: list[Example]) -> list[int]:
    return [row.prompt[0] - 1 for row in rows]


def epoch(count: int, batch_size: int, seed: int, number: int) -> list[list[int]]:
    steps = -(-count // batch_size)
    rows = examples(count)
    return [
        numbers(step_examples(rows, batch_size, seed=seed, step=number * steps + index + 1)) for index in range(steps)
    ]


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "max_steps", "expected"),
    [
        (12, 4, 1, None, 3),
        (13, 4, 1, None, 4),  # the last of one row
        (1, 64, 1, None, 1),
        (13, 4, 3, None, 12),
        (13, 4, 0.5, None, 2),
        (13, 4, 0.51, None, 3),
        (13, 4, 0.001, None, 1),  # never no step at all
        (13, 4, 3, 5, 5),
        (13, 4, 1, 500, 4),
    ],
)
def test_how_many_steps(rows, batch_size, epochs, max_steps, expected):
    assert count_steps(rows, batch_size, epochs, max_steps) == expected


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (13, 4), (3, 64), (1, 1), (5, 1)])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_every_row_once_an_epoch(count, batch_size, number):
    batches = epoch(count, batch_size, seed=0, number=number)
    assert sorted(sum(batches, [])) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size


def test_orders_are_those_of_seed_and_epoch():
    orders = {(seed, number): str(epoch(30, 4, seed, number)) for seed in (0, 1) for number in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert str(list(range(30))) not in orders.values()
    assert orders[1, 2] == str(epoch(30, 4, 1, 2))


def test_steps_may_be_asked_for_in_any_order():
    rows = examples(13)
    forwards = [numbers(step_examples(rows, 4, seed=3, step=step)) for step in range(1, 40)]
    backwards = [numbers(step_examples(rows, 4, seed=3, step=step)) for step in range(39, 0, -1)]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize(("size", "expected"), [(None, [7]), (7, [7]), (100, [7]), (3, [3, 3, 1]), (1, [1] * 7)])
def test_micro_batches_are_the_rows_of_the_step_in_order(size, expected):
    rows = examples(7)
    batches = micro_batches(rows, size)
    assert [batch.num_completions // 2 for batch in batches] == expected
    prompts = [batch.input_ids[span.prompt_start].item() - 1 for batch in batches for span in batch.spans[::2]]
    assert prompts == list(range(7))


# ------------------------------------------------------------------------------------------------- the door for loops


def write_pairs(folder, count: int):
    nouns = ["solano", "kelano", "mutano", "vilano", "tavelu", "morelu", "binelu", "harelu", "galosh", "tirosh"]
    rows = [{"prompt": nouns[i], "chosen": f"dolo {nouns[i]}", "rejected": "misu"} for i in range(count)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, nouns[:count]


def texts(batches: list[PackedBatch], tokenizer) -> list[tuple[str, ...]]:
    found = []
    for batch in batches:
        for chosen, rejected in zip(batch.spans[::2], batch.spans[1::2], strict=True):
            parts = [
                (chosen.prompt_start, chosen.prompt_end),
                (chosen.start, chosen.end),
                (rejected.start, rejected.end),
            ]
            found.append(tuple(tokenizer.decode(batch.input_ids[slice(*part)]) for part in parts))
    return found


def test_preference_batches_give_each_pair_once_chosen_first(tmp_path, tokenizer):
    path, nouns = write_pairs(tmp_path, 10)
    batches = list(preference_batches(path, tokenizer, batch_size=4))
    assert [batch.num_completions for batch in batches] == [8, 8, 4]
    expected = [(f"<bos> {noun}", f"dolo {noun} <eos>", "misu <eos>") for noun in nouns]
    assert sorted(texts(batches, tokenizer)) == sorted(expected)
    assert texts(batches, tokenizer) != expected  # shuffled
    in_order = preference_batches(str(path), tokenizer, batch_size=4, seed=None)
    assert texts(list(in_order), tokenizer) == expected


def test_preference_batches_of_another_seed_come_in_another_order(tmp_path, tokenizer):
    path, _ = write_pairs(tmp_path, 10)
    orders = [
        texts(list(preference_batches(path, tokenizer, batch_size=3, seed=seed)), tokenizer) for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_preference_batches_take_the_options_of_data(tmp_path, tokenizer):
    path, _ = write_pairs(tmp_path, 10)
    (batch,) = preference_batches(DataConfig(path=path, limit=3), tokenizer, batch_size=4)
    assert batch.num_completions == 6
    with pytest.raises(ConfigError, match="batch_size=0: expected 1 or more"):
        next(preference_batches(path, tokenizer, batch_size=0))


# ---------------------------------------------------------------------------------------------------- how long a row is


class Model:
    class config:  # noqa: N801
        max_position_embeddings = 8


def prompt_lengths(tmp_path, tokenizer, *, max_length=None, **options) -> list[int]:
    rows = [{"prompt": " ".join(["solano"] * count), "completion": "dolo dolo"} for count in (1, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=tmp_path / "rows.jsonl", max_length=max_length)
    return [len(example.prompt) for example in load_examples(data, tokenizer, **options)]


def test_prompts_are_cut_to_the_models_context_or_to_the_limit(tmp_path, tokenizer):
    supervised = dict(need="supervised")
    assert prompt_lengths(tmp_path, tokenizer, **supervised) == [2, 21]  # BOS and the words
    assert prompt_lengths(tmp_path, tokenizer, **supervised, model=Model) == [2, 8 - 3]  # two words and EOS
    assert prompt_lengths(tmp_path, tokenizer, **supervised, model=Model, max_length=6) == [2, 3]


def test_room_is_reserved_for_what_will_be_sampled(tmp_path, tokenizer):
    prompts = dict(need="prompts", model=Model)
    assert prompt_lengths(tmp_path, tokenizer, **prompts) == [2, 8]
    assert prompt_lengths(tmp_path, tokenizer, **prompts, reserve=3) == [2, 5]
    assert prompt_lengths(tmp_path, tokenizer, **prompts, reserve=3, max_length=7) == [2, 4]
    assert prompt_lengths(tmp_path, tokenizer, need="prompts", reserve=3) == [2, 21]
    with pytest.raises(ConfigError, match=r"sampling.max_new_tokens=7: expected at most 6, .* have 8 tokens"):
        prompt_lengths(tmp_path, tokenizer, **prompts, reserve=7)


def test_a_template_file_that_is_not_there_is_told(tmp_path, tokenizer):
    path, _ = write_pairs(tmp_path, 2)
    data = DataConfig(path=path, chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises((DataError, OSError), match=r"none\.jinja"):
        load_examples(data, tokenizer, need="preference")
