"""`rlhf generate`: completions to a prompt or to a file of them, the same for the same seed."""

import json

import pytest

from rlhf_core.cli import main
from rlhf_core.config import SamplingConfig
from rlhf_core.demo.language import build_model
from rlhf_core.models.load import load_tokenizer
from rlhf_core.rollout.generate import GenerateConfig, generate

PROMPTS = ["solano peta", "tavelu lari kapi lumira", "galosh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    build_model(folder / "model", seed=0)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return folder


def settings(folder, **changes) -> GenerateConfig:
    values = dict(model=folder / "model", data=folder / "prompts.jsonl", sampling=SamplingConfig(max_new_tokens=6))
    return GenerateConfig(**values | changes)


def test_a_file_of_prompts(folder, tmp_path, capsys):
    output = tmp_path / "deep" / "completions.jsonl"
    rows = generate(settings(folder, output=output))
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == rows
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(1 <= len(row["completion"].split()) <= 6 for row in rows)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"generate: 3 completions in {output}\n"


def test_one_prompt_is_printed(folder, capsys):
    (row,) = generate(settings(folder, data=None, prompt="solano peta"))
    assert capsys.readouterr().out == f"solano peta\n  -> {row['completion']}\n\n"
    assert row["prompt"] == "solano peta"


def test_the_same_seed_writes_the_same_whatever_the_batch_size(folder):
    first = generate(settings(folder))
    assert generate(settings(folder)) == first
    assert generate(settings(folder, seed=1)) != first
    small = SamplingConfig(max_new_tokens=6, batch_size=1)
    assert generate(settings(folder, sampling=small)) == first


def test_at_temperature_0_the_seed_does_not_matter(folder):
    likeliest = SamplingConfig(max_new_tokens=6, temperature=0)
    first = generate(settings(folder, sampling=likeliest))
    assert generate(settings(folder, sampling=likeliest, seed=1)) == first


def test_what_is_not_ascii_is_written_as_it_is_whatever_the_locale(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    kind = type(load_tokenizer(folder / "model"))
    monkeypatch.setattr(kind, "batch_decode", lambda self, tokens, **options: ["naïve 日本"] * len(tokens))
    generate(settings(folder, output=tmp_path / "out.jsonl"))
    line = (tmp_path / "out.jsonl").read_bytes().decode("utf-8").splitlines()[0]
    assert line == '{"prompt": "naïve 日本", "completion": "naïve 日本"}'


def test_from_the_command_line(folder, capsys):
    command = [
        "generate",
        "--model",
        str(folder / "model"),
        "--prompt",
        "solano peta",
        "--sampling.max-new-tokens",
        "3",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("solano peta\n  -> ")
    assert main([*command, "--data", str(folder / "prompts.jsonl")]) == 2
    assert main([*command[:4], "solano", "--sampling.max-new-tokens", "-1"]) == 2
