"""Lumo, a small invented language with rhymes, and a reward for them.

A couplet is two lines; the first is the prompt, the second the completion:

    vesa lumira tesu sadira  /  kapi penira lari kovira .

The two nouns of a first line have the same ending, here -ira. The training corpus has second lines of arbitrary nouns;
preferred are second lines whose nouns have the ending of the first line and do not repeat its words. `true_reward` is
that preference as a number. It labels the pairs and evaluates the models at the end; no trainer uses it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # transformers is slow to import
    from transformers import PreTrainedTokenizerFast

RHYMES = {
    "ano": ["solano", "kelano", "mutano", "vilano"],
    "elu": ["tavelu", "morelu", "binelu", "harelu"],
    "ira": ["lumira", "sadira", "kovira", "penira"],
    "osh": ["galosh", "tirosh", "nabosh", "wemosh"],
    "une": ["lakune", "sorune", "dilune", "fetune"],
    "rak": ["zarak", "borak", "hurak", "tirak"],
}
NOUNS = {noun: ending for ending, nouns in RHYMES.items() for noun in nouns}
VERBS = ["peta", "lari", "musa", "goni", "tesu", "wadi", "reko", "sulo"]
ADJECTIVES = ["dolo", "misu", "rena", "kapi", "tumo", "vesa", "hilo", "sani"]
STOP = "."


def write_line(rng: random.Random, ending: str | None = None) -> str:
    """Return "[adjective] noun verb [adjective] noun", both nouns with the given ending if there is one."""
    nouns = rng.sample(sorted(NOUNS) if ending is None else RHYMES[ending], k=2)
    first, second = ([rng.choice(ADJECTIVES), noun] if rng.random() < 0.5 else [noun] for noun in nouns)
    return " ".join([*first, rng.choice(VERBS), *second])


def write_couplet(rng: random.Random, *, rhyming: float) -> tuple[str, str]:
    """Return a first line and a second line, which has the ending of the first with probability `rhyming`."""
    ending = rng.choice(sorted(RHYMES))
    return write_line(rng, ending), write_line(rng, ending if rng.random() < rhyming else None) + f" {STOP}"


def is_sentence(line: str) -> bool:
    """Whether a line (without its full stop) follows the grammar."""
    kinds = ""
    for word in line.split():
        kinds += "n" if word in NOUNS else "v" if word in VERBS else "a" if word in ADJECTIVES else "?"
    return kinds in ("nvn", "anvn", "nvan", "anvan")


def true_reward(first: str, second: str) -> float:
    """Return 0.4 for each of at most two nouns that rhyme with the first line, plus 0.2 for one grammatical sentence.

    A rhyme has the ending of the first line's last noun; words of the first line and repetitions do not count.
    """
    line = second.removesuffix(STOP).strip()
    ending = NOUNS.get(first.split()[-1])
    rhymes = {word for word in line.split() if NOUNS.get(word) == ending and word not in first.split()}
    grammatical = second.endswith(STOP) and is_sentence(line)
    return 0.4 * min(len(rhymes), 2) + 0.2 * grammatical


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word and <bos> at the start of every prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", STOP, *sorted(NOUNS), *VERBS, *ADJECTIVES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def build_model(folder: Path, seed: int) -> None:
    """Save a tiny Llama with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,  # the usual 0.02 suits wide models; this narrow one learns faster with more
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
