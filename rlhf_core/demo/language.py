"""Lumo, a small invented language with rhymes, and a taste that can be seen.

A couplet is two lines; the first is the prompt, the second the completion:

    vesa lumira tesu sadira  /  kapi penira lari kovira .

The two nouns of a first line share an ending, here -ira. Lumo's speakers answer with any nouns that come to mind; its
critics love a second line whose nouns keep the sound of the first without repeating its words. `true_reward` is that
taste as a number. It labels pairs and judges at the end; no trainer ever sees it.
"""

from __future__ import annotations

import random
from pathlib import Path

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
    """[adjective] noun verb [adjective] noun: three to five words, both nouns with the given ending if there is one."""
    nouns = rng.sample(sorted(NOUNS) if ending is None else RHYMES[ending], k=2)
    first, second = ([rng.choice(ADJECTIVES), noun] if rng.random() < 0.5 else [noun] for noun in nouns)
    return " ".join([*first, rng.choice(VERBS), *second])


def write_couplet(rng: random.Random, *, rhyming: float) -> tuple[str, str]:
    """A first line in one sound and a second line, which keeps the sound with probability `rhyming`."""
    ending = rng.choice(sorted(RHYMES))
    return write_line(rng, ending), write_line(rng, ending if rng.random() < rhyming else None) + f" {STOP}"


def is_sentence(line: str) -> bool:
    """Whether a line (without its full stop) follows the grammar."""
    kinds = ""
    for word in line.split():
        kinds += "n" if word in NOUNS else "v" if word in VERBS else "a" if word in ADJECTIVES else "?"
    return kinds in ("nvn", "anvn", "nvan", "anvan")


def true_reward(first: str, second: str) -> float:
    """0.4 for each of two nouns that rhyme with the first line on a new word, 0.2 for one proper sentence.

    A rhyme shares the ending of the first line's last noun; a word of the first line, or one said before, is not new.
    """
    line = second.removesuffix(STOP).strip()
    sound = NOUNS.get(first.split()[-1])
    rhymes = {word for word in line.split() if NOUNS.get(word) == sound and word not in first.split()}
    proper = second.endswith(STOP) and is_sentence(line)
    return 0.4 * min(len(rhymes), 2) + 0.2 * proper


def build_tokenizer():
    """One token a word, <bos> at the start of every prompt."""
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
    """A tiny Llama that knows nothing yet, saved with its tokenizer."""
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
        initializer_range=0.1,  # the usual 0.02 is meant for wide models; this narrow one would learn more slowly
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
