"""A tiny random policy, and its tokenizer of words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf_core.models.forward import prepare

SMALL = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SMALL | dict(num_key_value_heads=2)),
    "gpt2": (
        "gpt2",
        dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.15, eos_token_id=2),
    ),
    "gemma3": (
        "gemma3_text",
        SMALL
        | dict(num_key_value_heads=2, head_dim=8, sliding_window=4)
        | dict(layer_types=["sliding_attention", "full_attention"]),
    ),
    "bloom": ("bloom", dict(vocab_size=40, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.15)),
    "mamba": ("mamba", SMALL | dict(state_size=4, time_step_rank=2, conv_kernel=4, expand=2)),
}


@pytest.fixture
def make_policy() -> Callable[..., PreTrainedModel]:
    def make(
        family: str = "llama", *, auto: type = AutoModelForCausalLM, layout: str = "auto", **settings
    ) -> PreTrainedModel:
        model_type, defaults = FAMILIES[family]
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model(model_type, **(defaults | settings)))
        return prepare(model, layout).train()

    return make


@pytest.fixture
def make_scorer(make_policy) -> Callable[..., PreTrainedModel]:
    return lambda family="llama", **settings: make_policy(
        family, auto=AutoModelForSequenceClassification, num_labels=1, **settings
    )


@pytest.fixture
def prompts() -> list[list[int]]:
    """Of many lengths, in no order, one with stop tokens inside."""
    generator = torch.Generator().manual_seed(4)
    lengths = [3, 9, 1, 14, 5, 2]
    prompts = [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]
    prompts[4][:3] = [1, 2, 1]
    return prompts


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer of words by number, or of given words, with the special tokens that a test asks for."""

    def make(words: list[str] | None = None, **special: str) -> PreTrainedTokenizerFast:
        words = words or [f"w{number}" for number in range(40)]
        backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
        backend.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    return make
