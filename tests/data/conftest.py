"""Tokenizers small enough to read: one token a character, so that expected ids can be written as text."""

import string
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Return a function that builds a character tokenizer with the given special tokens."""

    def build(
        *,
        bos: str | None = "<s>",
        eos: str | None = "</s>",
        pad: str | None = "<pad>",
        adds: str = "<s> $A",
        more_special: Sequence[str] = (),
        chat_template: str | None = None,
    ) -> PreTrainedTokenizerFast:
        special = [name for name in dict.fromkeys(["<unk>", bos, eos, pad, *more_special]) if name]
        vocabulary = {name: number for number, name in enumerate([*special, *string.printable])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.normalizer = normalizers.Replace("\x07", "")  # a character without a token
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        used = [name for name in adds.split() if name in vocabulary]
        backend.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(name, vocabulary[name]) for name in used]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<unk>",
            bos_token=bos,
            eos_token=eos,
            pad_token=pad,
            additional_special_tokens=list(more_special),
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return build
