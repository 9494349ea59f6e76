"""What `--data.preview` prints, and that it has no other effect."""

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main
from rlhf_core.config import DataConfig
from rlhf_core.data.loader import load_examples
from rlhf_core.data.preview import show
from rlhf_core.demo.language import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def shown(tmp_path: Path, tokenizer, rows: list[dict], *, need: str, colour: bool = False, **options) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=tmp_path / "rows.jsonl", chat_template="plain", **options)
    return show(load_examples(data, tokenizer, need=need)[:], tokenizer, need=need, colour=colour).split("\n")


def test_supervised_tokens_are_between_brackets(tmp_path, tokenizer):
    row = {"prompt": "solano peta", "completion": "dolo", "weight": 0.5}
    assert shown(tmp_path, tokenizer, [row], need="supervised") == [
        "Supervised tokens are between [[ and ]].",
        "",
        "1. rows.jsonl:1: 3 tokens of prompt, 2 of completion, 2 of them supervised, weight 0.5",
        "--- prompt",
        "<bos> solano peta",
        "--- completion",
        "[[dolo <eos>]]",
    ]


def test_supervised_tokens_are_green_on_a_terminal(tmp_path, tokenizer):
    lines = shown(tmp_path, tokenizer, [{"prompt": "peta", "completion": "dolo"}], need="supervised", colour=True)
    assert lines[0] == "Supervised tokens are green."
    assert lines[-3:] == ["\033[2m<bos> peta\033[0m", "\033[1m--- completion\033[0m", "\033[32mdolo <eos>\033[0m"]


def test_of_several_turns_each_is_marked(tmp_path, tokenizer):
    turns = [("user", "solano"), ("assistant", "dolo"), ("user", "peta"), ("assistant", "misu")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (last,) = shown(tmp_path, tokenizer, [row], need="supervised", turns="all")[-1:]
    assert last.count("[[") == last.count("]]") == 2
    first, second = (part.split("]]")[0] for part in last.split("[[")[1:])
    assert "dolo" in first and "misu" in second and "peta" not in first + second


@pytest.mark.parametrize(
    ("need", "row", "roles"),
    [
        ("preference", {"prompt": "peta", "chosen": "dolo", "rejected": "misu", "margin": 2}, ["chosen", "rejected"]),
        (
            "ranking",
            {"prompt": "peta", "completions": ["dolo", "misu", "kapi"]},
            ["completion 1 of 3, the best", "completion 2 of 3", "completion 3 of 3"],
        ),
        ("unpaired", {"prompt": "peta", "completion": "dolo", "label": False}, ["completion, not wanted"]),
        ("unpaired", {"prompt": "peta", "completion": "dolo", "label": True}, ["completion, wanted"]),
        (
            "process",
            {"prompt": "peta", "completions": ["dolo", "misu"], "labels": [True, False]},
            ["completion, a step that is right", "completion, a step that is wrong"],
        ),
        ("prompts", {"prompt": "peta"}, []),
    ],
)
def test_the_roles_are_those_of_the_job(tmp_path, tokenizer, need, row, roles):
    lines = shown(tmp_path, tokenizer, [row], need=need)
    assert [line.removeprefix("--- ") for line in lines if line.startswith("---")] == ["prompt", *roles]
    assert ("margin 2" in lines[2]) == ("margin" in row)


@pytest.mark.parametrize(
    ("job", "row"),
    [
        ("sft", {"prompt": "peta", "completion": "dolo"}),
        ("reward", {"prompt": "peta", "chosen": "dolo", "rejected": "misu"}),
        ("dpo", {"prompt": "peta", "chosen": "dolo", "rejected": "misu"}),
        ("ppo", {"prompt": "peta"}),
    ],
)
def test_a_job_stops_after_its_preview_and_touches_nothing(tmp_path, stories_of_nothing, capsys, monkeypatch, job, row):
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    kept = tmp_path / "run" / "run.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    command = [job, "--model", str(stories_of_nothing), "--data", str(tmp_path / "rows.jsonl"), "--data.preview", "1"]
    command += ["--output", str(kept.parent), "--overwrite", "--device", "cpu"]
    if job == "ppo":
        command += ["--reward-function", "builtins:len", "--sampling.max-new-tokens", "4"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "1. rows.jsonl:1: 2 tokens of prompt" in out and "2. rows" not in out and "<bos> peta" in out
    assert ("[[dolo <eos>]]" in out) == (job != "ppo")
    assert [path.name for path in kept.parent.iterdir()] == ["run.json"]


@pytest.fixture(scope="module")
def stories_of_nothing(tmp_path_factory, tokenizer) -> Path:
    """The smallest model that every job can load."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
