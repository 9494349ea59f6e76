"""What both sides are given: a policy, a reference, a tokenizer and one batch of preference pairs, in one folder.

Nothing is downloaded: the weights and the token ids are random, drawn from a seed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

PAD, BOS, EOS = 1, 2, 3
SPECIAL_TOKENS = ["<unk>", "<pad>", "<s>", "</s>"]  # ids 0 to 3; every other id is the word "w<id>"
VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """Least and greatest length, in tokens; a completion's length counts its EOS."""

    prompt: tuple[int, int]
    completion: tuple[int, int]


SHAPES = {
    "short": Shape(prompt=(16, 48), completion=(50, 150)),  # short prompts: sharing them and skipping them gains least
    "mixed": Shape(prompt=(100, 300), completion=(20, 150)),
    "long": Shape(prompt=(512, 768), completion=(16, 64)),  # long prompts: it gains most
}


# Two ways to spend about 20M parameters. What the vocabulary costs is where the two sides differ most, and its share of
# the work falls from `shallow` to `deep`, and further in the larger models that people train.
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
    """`count` pairs of random token ids; a completion ends with EOS, and no other special token occurs anywhere."""
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
    """Tokens of all the sequences that the loss is about, without padding; a pair's prompt counts in both of them."""
    return sum(2 * len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs)


def make_material(folder: Path, model_name: str, pairs: list[dict[str, list[int]]], seed: int) -> int:
    """Write `folder`/reference, `folder`/policy and `folder`/pairs.json; returns the model's number of parameters.

    The policy is the reference with noise added, as it would be in the middle of a run: were they equal, the loss would
    be ln 2 and every pair's weight in the gradient 1/2, whatever the log-probabilities.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    (folder / "pairs.json").write_text(json.dumps(pairs))

    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **MODELS[model_name],
    )
    model = LlamaForCausalLM(config)
    for name in ("reference", "policy"):
        if name == "policy":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.005)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return sum(parameter.numel() for parameter in model.parameters())
