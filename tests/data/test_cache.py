"""Cached tokens: equal to those without a cache, rebuilt after any change, and bounded in memory."""

import gc
import json
import logging
import multiprocessing
import sys
import tracemalloc
from pathlib import Path

import pytest

from rlhf_core.config import DataConfig, RunConfig
from rlhf_core.data import cache, loader
from rlhf_core.data.cache import describe_tokenizer
from rlhf_core.data.errors import DataError
from rlhf_core.data.loader import Steps, load_examples
from rlhf_core.data.sources import fingerprint
from rlhf_core.demo.language import build_tokenizer

NOUNS = ["solano", "kelano", "mutano", "vilano", "tavelu", "morelu", "binelu", "harelu", "galosh", "tirosh"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict]:
    return [{"prompt": NOUNS[i % 10], "completion": " ".join(["dolo"] * (1 + i % 7)), "n": i} for i in range(count)]


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The number of records that each call tokenises."""
    calls: list[int] = []
    original = loader.encode_records

    def count(records, *args, **options):
        calls.append(len(records))
        return original(records, *args, **options)

    monkeypatch.setattr(loader, "encode_records", count)
    return calls


def as_needed(need: str) -> list[dict]:
    turns = [("user", "solano"), ("assistant", "dolo"), ("user", "peta"), ("assistant", "misu vesa")]
    chat = [{"role": role, "content": text} for role, text in turns]
    return {
        "supervised": [{"messages": chat, "weight": 0.5}, {"messages": chat[:2]}],
        "preference": [{"prompt": "peta", "chosen": "dolo", "rejected": "misu", "margin": 2}, {"prompt": "kapi",
                        "chosen": "a \u2028 \ud83d\ude00", "rejected": "b", "half": "\ud83d"}],
        "ranking": [{"prompt": "peta", "completions": ["dolo", "misu", "vesa kapi"]}],
        "unpaired": [{"prompt": "peta", "completion": "dolo", "label": False}],
        "process": [{"prompt": "peta", "completions": ["dolo", "misu vesa"], "labels": [True, False]}],
        "prompts": [{"prompt": "peta", "deep": {"list": [1, 2.5, None, "x"]}}],
    }[need]  # fmt: skip


@pytest.mark.parametrize("need", ["supervised", "preference", "ranking", "unpaired", "process", "prompts"])
def test_examples_are_the_same_with_and_without_a_cache(tmp_path, tokenizer, made, need):
    turns = "all" if need == "supervised" else "last"
    data = dict(path=write(tmp_path / "rows.jsonl", as_needed(need)), chat_template="plain", turns=turns)
    in_memory = load_examples(DataConfig(**data), tokenizer, need=need)
    for _ in range(2):
        kept = load_examples(DataConfig(**data, cache=str(tmp_path / "cache")), tokenizer, need=need)
        assert [*kept] == [*in_memory] and len(kept) == len(in_memory)
        assert kept.account == in_memory.account
        assert kept.stream_lengths.tolist() == in_memory.stream_lengths.tolist()
    assert len(made) == 2  # in memory, and once for the cache


def test_steps_have_the_same_rows_with_and_without_a_cache(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "EXAMPLES_PER_WRITE", 7)  # 3 of them in the last piece
    monkeypatch.setattr(loader, "_ROWS_PER_CHUNK", 4)
    path = write(tmp_path / "rows.jsonl", pairs(31))
    with_cache, without = (
        load_examples(DataConfig(path=path, cache=folder), tokenizer, need="supervised")
        for folder in (str(tmp_path / "cache"), None)
    )
    for limit in (None, 12):
        settings = RunConfig(model="m", data="d", output="o", batch_size=4, epochs=2, max_tokens_per_batch=limit)
        one, other = Steps(with_cache, settings), Steps(without, settings)
        assert one.total == other.total
        assert all(one.rows(step) == other.rows(step) for step in range(1, one.total + 1))


# ------------------------------------------------------------------------------------------------------------- the key


def test_any_change_that_affects_tokens_rebuilds(tmp_path, tokenizer, made, monkeypatch):
    (tmp_path / "my_cached_hooks.py").write_text("def same(row):\n    return row\n")
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl", pairs(5))
    kept = dict(path=path, cache=str(tmp_path / "cache"))

    def load(tokenizer=tokenizer, need="supervised", **changes):
        load_examples(DataConfig(**kept | changes), tokenizer, need=need)

    load()
    assert len(made) == 1
    load()
    load(preview=0, weights=(2,))
    assert len(made) == 1  # neither changes a token
    changes = [
        {"limit": 4}, {"max_length": 5}, {"max_length": 6, "truncation": "drop"}, {"need": "prompts"},
        {"format": "prompt_completion"}, {"skip_bad_rows": 1}, {"chat_template": "plain"}, {"turns": "all"},
        {"attributes": ("n",)}, {"formatting": "my_cached_hooks:same"},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=2):
        for _ in range(2):
            load(**change)
        assert len(made) == number, change
    other = build_tokenizer()
    other.add_tokens(["wholly-new"])
    load(other)
    other.chat_template = "{{ messages }}"
    load(other)
    assert len(made) == number + 2
    load(build_tokenizer())  # an equal tokenizer
    assert len(made) == number + 2
    (tmp_path / "my_cached_hooks.py").write_text("def same(row):\n    return dict(row)\n")
    load(formatting="my_cached_hooks:same")  # the old function is still loaded
    assert len(made) == number + 2
    monkeypatch.delitem(sys.modules, "my_cached_hooks")
    load(formatting="my_cached_hooks:same")
    write(tmp_path / "rows.jsonl", [*pairs(4), pairs(5)[3]])  # the same number of rows and the same name
    load()
    monkeypatch.setattr(loader, "describe_code", lambda: "other code")
    load()
    assert len(made) == number + 5


def test_a_tokenizer_is_identified_by_its_behaviour(tokenizer):
    before = describe_tokenizer(tokenizer)
    tokenizer(["solano", "peta kapi"], padding=True, truncation=True, max_length=1)  # changes the state of the backend
    assert describe_tokenizer(tokenizer) == before
    for change in ("eos_token", "chat_template"):
        other = build_tokenizer()
        setattr(other, change, "<pad>")
        assert describe_tokenizer(other) != before, change


# ------------------------------------------------------------------------------------------- damage, and two at once


def entry_of(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["tokens", "bounds", "firsts", "rows", "row_ends", "manifest.json"])
def test_damage_is_detected_logged_and_repaired(tmp_path, tokenizer, made, caplog, damage, name):
    data = DataConfig(path=write(tmp_path / "rows.jsonl", pairs(9)), cache=str(tmp_path / "cache"))
    before = [*load_examples(data, tokenizer, need="supervised")]
    if name == "manifest.json" and damage is flip_a_bit:
        manifest = json.loads((entry_of(tmp_path) / name).read_text())
        (entry_of(tmp_path) / name).write_text(json.dumps(manifest | {"key": "of another"}))
    else:
        damage(entry_of(tmp_path) / name)
    assert [*load_examples(data, tokenizer, need="supervised")] == before
    assert len(made) == 2 and "is rebuilt: it cannot be used (" in caplog.text
    caplog.clear()
    load_examples(data, tokenizer, need="supervised")
    assert len(made) == 2 and "rebuilt" not in caplog.text
    assert [path.name for path in entry_of(tmp_path).parent.iterdir()] == [entry_of(tmp_path).name]


def test_a_failed_build_leaves_no_files(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [*pairs(3), {"prompt": "a"}])
    data = DataConfig(path=path, cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="rows.jsonl:4: field 'completion' is missing"):
        load_examples(data, tokenizer, need="supervised")
    assert [*(tmp_path / "cache").iterdir()] == []


def test_a_column_that_json_cannot_represent_is_an_error(tmp_path, tokenizer):
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "peta", "completion": "dolo", "when": datetime.datetime(2024, 1, 1)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    load_examples(DataConfig(path=path), tokenizer, need="supervised")
    with pytest.raises(DataError, match=r"^rows.parquet row 1: a column holds a datetime, .* data.formatting"):
        load_examples(DataConfig(path=path, cache=str(tmp_path / "cache")), tokenizer, need="supervised")


def load_in_a_process(path: str, folder: str, barrier, results) -> None:
    data = DataConfig(path=path, cache=folder)
    barrier.wait()
    examples = load_examples(data, build_tokenizer(), need="supervised")
    results.put([(row.prompt, row.completions, row.record.row["n"]) for row in examples])


def test_two_runs_may_build_the_same_entry_at_once(tmp_path, tokenizer):
    path, folder = write(tmp_path / "rows.jsonl", pairs(2000)), str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")  # the imports are done
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=load_in_a_process, args=(path, folder, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert found[0] == found[1] == found[2] and [n for _, _, n in found[0]] == list(range(2000))
    assert len([*Path(folder).iterdir()]) == 1


# ------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(tmp_path: Path, tokenizer, rows: int, **options: str) -> int:
    """Return the peak while a data set is loaded and every row of an epoch is read once."""
    path = tmp_path / f"{rows}.jsonl"
    with open(path, "w") as file:
        for i in range(rows):
            row = {"prompt": "solano peta " * 4, "completion": "dolo " * 20, "story": "kapi " * 200, "n": i}
            file.write(json.dumps(row) + "\n")
    gc.collect()
    tracemalloc.start()
    try:
        examples = load_examples(DataConfig(path=str(path), **options), tokenizer, need="supervised")
        steps = Steps(examples, RunConfig(model="m", data="d", output="o", max_tokens_per_batch=500))
        assert sum(len(row.prompt) for step in range(1, steps.total + 1) for row in steps.rows(step)) == rows * 9
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer, monkeypatch):
    """Four times the rows: four times the memory without a cache, with one a few numbers a row for the order."""
    monkeypatch.setattr(cache, "EXAMPLES_PER_WRITE", 50)
    monkeypatch.setattr(loader, "_ROWS_PER_CHUNK", 100)
    few, many = 200, 800
    small, large = (peak_bytes(tmp_path, tokenizer, rows, cache=str(tmp_path / "cache")) for rows in (few, many))
    in_memory = peak_bytes(tmp_path, tokenizer, many)
    assert large < small + 150 * (many - few)  # a row in memory has more than 2,000 bytes
    assert in_memory > 2 * large and in_memory > 2000 * many


def test_the_log_is_the_same_from_the_cache(tmp_path, tokenizer, caplog):
    rows = [*pairs(3), {"prompt": "peta", "completion": ""}]
    data = DataConfig(path=write(tmp_path / "rows.jsonl", rows), cache=str(tmp_path / "cache"), skip_bad_rows=1)
    said = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "rlhf_core.data"):
            load_examples(data, tokenizer, need="supervised")
        said.append([record.message.split(";")[0] for record in caplog.records])
    assert said[0] == said[1] and "3 of 4 rows" in said[0][0] and "dropped 1 of 4 rows: " in said[0][1]


def test_folders_and_hub_names_are_identified_by_content(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "train-0.jsonl"
    write(path, pairs(3))
    write(tmp_path / "files" / "test-0.jsonl", pairs(3))
    before = fingerprint(tmp_path / "files"), fingerprint(tmp_path / "files", "test")
    assert before == (fingerprint(tmp_path / "files"), fingerprint(tmp_path / "files", "test"))
    write(path, pairs(4))
    assert fingerprint(tmp_path / "files") != before[0] and fingerprint(tmp_path / "files", "test") == before[1]
    saved = []
    for count in (3, 4):
        datasets.Dataset.from_list(pairs(count)).save_to_disk(tmp_path / str(count))
        saved.append(fingerprint(tmp_path / str(count)))
    assert saved[0] != saved[1] and saved[0] == fingerprint(tmp_path / "3")
    hub = datasets.Dataset.from_list(pairs(3))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: hub)
    one = fingerprint("owner/name")
    hub = hub.select([0])
    assert fingerprint("owner/name") != one
