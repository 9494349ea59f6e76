"""The inputs of both sides, in one folder: a policy, a reference, a tokenizer, and rows of data.

Nothing is downloaded. Random weights and token ids are drawn from a seed; trained weights and real rows are found
through RLHF_SHARED (default: `shared` beside the checkout).
"""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import SHARED

PAD, BOS, EOS = 1, 2, 3
SPECIAL_TOKENS = ["<unk>", "<pad>", "<s>", "</s>"]  # ids 0 to 3; every other id is the word "w<id>"
VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """Smallest and largest length, in tokens; that of a completion includes its EOS."""

    prompt: tuple[int, int]
    completion: tuple[int, int]


SHAPES = {
    "short": Shape(prompt=(16, 48), completion=(50, 150)),  # sharing prompts saves least
    "mixed": Shape(prompt=(100, 300), completion=(20, 150)),
    "long": Shape(prompt=(512, 768), completion=(16, 64)),  # sharing prompts saves most
}


# Two models of about 20M parameters. The two sides differ most in the work on the vocabulary. Its share is larger in
# `shallow` than in `deep`, and smaller still in larger models.
MODELS = {
    "deep": dict(  # 20.1M, half of them the embedding, which is the head too
        hidden_size=320,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "shallow": dict(  # 19.5M, 42 % of them the embedding and 42 % the head
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
}


def make_pairs(shape: Shape, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Return `count` pairs of random token ids; a completion ends with EOS, and there are no other special tokens."""
    rng = random.Random(seed)

    def words(length: int) -> list[int]:
        return [rng.randrange(len(SPECIAL_TOKENS), VOCABULARY) for _ in range(length)]

    def completion() -> list[int]:
        return [*words(rng.randint(*shape.completion) - 1), EOS]

    return [
        {"prompt": words(rng.randint(*shape.prompt)), "chosen": completion(), "rejected": completion()}
        for _ in range(count)
    ]


def real_tokens(pairs: list[dict[str, list[int]]]) -> int:
    """Return the number of tokens of all sequences, without padding; the prompt of a pair counts twice."""
    return sum(2 * len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs)


def make_material(folder: Path, model_name: str, pairs: list[dict[str, list[int]]], seed: int) -> int:
    """Write `folder`/reference, `folder`/policy and `folder`/pairs.json; return the model's number of parameters."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    (folder / "pairs.json").write_text(json.dumps(pairs))
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    special = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return save_pair(folder, tokenizer, seed, vocab_size=VOCABULARY, **special, **MODELS[model_name])


def save_pair(folder: Path, tokenizer: Any, seed: int, **config: Any) -> int:
    """Write a random Llama as `folder`/reference and `folder`/policy; return its number of parameters.

    The policy is the reference with noise added, as in the middle of a run: if they were equal, the loss would be ln 2
    and the weight of every pair in the gradient 1/2, whatever the log-probs are.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **config))
    for name in ("reference", "policy"):
        if name == "policy":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.005)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return sum(parameter.numel() for parameter in model.parameters())


# --------------------------------------------------------------------- real rows, and a model for GPT-2's vocabulary

REAL_MODEL = dict(  # 30.4M parameters, 85 % of them embedding and head: GPT-2's vocabulary on a small trunk
    vocab_size=50_264,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LONGEST = 1024  # tokens of prompt and completion, so that no default truncates a row


def make_real_model(folder: Path, seed: int = 0) -> int:
    """Write `folder`/reference and `folder`/policy as `save_pair` does, with GPT-2's tokenizer.

    The tokenizer gets a padding token: GPT-2 has none, and where the end token is used for padding, TRL reads the score
    of a reward model before the end.
    """
    tokenizer = gpt2_tokenizer()
    special = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id)
    return save_pair(folder, tokenizer, seed, eos_token_id=tokenizer.eos_token_id, **special, **REAL_MODEL)


def gpt2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "gpt2_tokenizer")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def copy_stories(folder: Path) -> None:
    """Copy stories260K to `folder`/policy and `folder`/reference."""
    for name in ("policy", "reference"):
        shutil.copytree(SHARED / "models" / "stories260K", folder / name)


def make_reward_model(folder: Path) -> None:
    """Write `folder`/reward_model: the trunk of the policy with a new score head."""
    from rlhf_core.models.load import load_reward_model, save_model

    save_model(folder / "reward_model", *load_reward_model(folder / "policy", device="cpu"))


def real_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of the shared data."""
    with gzip.open(SHARED / "data" / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def hh_pairs(count: int, seed: int = 0, *, longest: int = LONGEST) -> list[dict[str, str]]:
    """Return `count` preference pairs of Anthropic's HH, drawn from those with fewer than `longest` tokens."""
    rows, tokenizer = real_rows("pref_hh_harmless_base_train"), gpt2_tokenizer()
    for side in ("chosen", "rejected"):
        rows = [row for row, length in zip(rows, whole_lengths(rows, side, tokenizer), strict=True) if length < longest]
    return random.Random(seed).sample(rows, count)


def alpaca_rows(limit: int | None = None, *, longest: int | None = LONGEST) -> list[dict[str, str]]:
    """Return rows of Stanford Alpaca in their order, with the original prompt template.

    Of the first `limit` rows, those with an output and, unless `longest` is None, with fewer tokens than that.
    """
    from rlhf_core.data.formats import read_records

    with gzip.open(SHARED / "data" / "alpaca_data.json.gz", "rt") as file:
        published = json.load(file)[:limit]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(published, file)
        file.flush()
        records = read_records(file.name, need="supervised", skip_bad_rows=len(published))
    rows = [dict(prompt=record.prompt, completion=record.completions[0]) for record in records]
    if longest is None:
        return rows
    lengths = whole_lengths(rows, "completion", gpt2_tokenizer())
    return [row for row, length in zip(rows, lengths, strict=True) if length < longest]


def whole_lengths(rows: list[dict[str, str]], side: str, tokenizer: Any) -> list[float]:
    """Return the tokens of each row's prompt and completion; infinity where a token would span the two.

    TRL tokenises both as one text and splits the tokens, ours tokenises them separately. Rows on which they differ are
    excluded, so that both sides train on the same tokens.
    """
    prompts, completions = ([row[name] for row in rows] for name in ("prompt", side))
    apart = zip(*(tokenizer(texts)["input_ids"] for texts in (prompts, completions)), strict=True)
    whole = tokenizer([row["prompt"] + row[side] for row in rows])["input_ids"]
    return [
        len(ids) if prompt + completion == ids else math.inf
        for (prompt, completion), ids in zip(apart, whole, strict=True)
    ]


def write_rows(folder: Path, rows: list[dict[str, Any]], batch_size: int) -> None:
    """Write `folder`/rows.jsonl, and `folder`/in_order.jsonl in the order of our first epoch, for trainers that keep
    the order of the file."""
    from rlhf_core.data.loader import step_examples

    steps = range(1, -(-len(rows) // batch_size) + 1)
    in_order = [row for step in steps for row in step_examples(rows, batch_size, seed=0, step=step)]
    for name, some in (("rows", rows), ("in_order", in_order)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
