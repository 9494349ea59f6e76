"""What both sides of the whole-path tests are given: rows in a file, a tokenizer and models, all rebuilt from here.

No number is drawn: weights are hashes of their places, so that neither torch's generator nor the order in which
transformers makes its layers has a say. `fingerprint` is what is kept of a gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

# ---------------------------------------------------------------------------------------------------------------- rows

TEXT = [  # prompt, better, worse; what is said starts with a space, so that no token reaches over the border
    ("Question: How do I keep basil fresh?\nAnswer:", " Stand it in water, like cut flowers.", " Freeze it."),
    ("Question: What is 17 + 25?\nAnswer:", " 42", " It is about forty, I would say, or a little more than that."),
    ("The train to Zürich leaves at", " ten past nine from platform 4.", " some time – ask somebody else."),
    ("Write one line about rain.", " It taps the tin roof like a patient guest.", " rain rain rain rain rain"),
    ("Question: Is the tea still warm?\nAnswer:", " Yes, but only just; I would make it again.", " No."),
    ("In the morning the baker", " sets out the loaves that were made in the night.", " the the 🍞 the"),
]
LABELS = [True, False, True, True, False, False]  # for KTO: the better completion where True, else the worse one
MARGINS = [0.5, 2.0, 0.0, 1.25, 0.25, 3.0]
CHATS = [  # everything up to the last answer, better, worse
    (
        [("system", "Be brief."), ("user", "Name a river in Egypt.")],
        "The Nile.",
        "There are many rivers in this world, and the Nile is one of them.",
    ),
    (
        [("user", "Hello!"), ("assistant", "Hello, what can I do?"), ("user", "Spell the word 'cat'.")],
        "C, A, T.",
        "kat",
    ),
    (
        [("user", "2 + 2?"), ("assistant", "4"), ("user", "And 4 + 4?"), ("assistant", "8"), ("user", "And twice it?")],
        "16, which is two to the fourth.",
        "Do you mean 12?",
    ),
    ([("user", "Say something kind.")], "You asked, and that is kind already.", "No."),
]


def message_rows() -> list[list[dict[str, str]]]:
    """The conversations with their better answers, as lists of messages."""
    return [messages([*before, ("assistant", better)]) for before, better, _ in CHATS]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def rows() -> dict[str, list[dict[str, Any]]]:
    """Each file by its name: what TRL and this library both call the columns."""
    pairs = [{"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in TEXT]
    spoken = [
        {
            "prompt": messages(before),
            "chosen": messages([("assistant", better)]),
            "rejected": messages([("assistant", worse)]),
        }
        for before, better, worse in CHATS
    ]
    both = zip(TEXT, LABELS, strict=True)
    return {
        "completions": [{"prompt": prompt, "completion": better} for prompt, better, _ in TEXT],
        "texts": [{"text": prompt + better} for prompt, better, _ in TEXT],
        "answers": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in spoken],
        "conversations": [{"messages": each} for each in message_rows()],
        "pairs": pairs,
        "margins": [row | {"margin": margin} for row, margin in zip(pairs, MARGINS, strict=True)],
        "spoken": spoken,
        "unprompted": [row | {"prompt": ""} for row in pairs],
        "labelled": [
            {"prompt": prompt, "completion": better if label else worse, "label": label}
            for (prompt, better, worse), label in both
        ],
        "bridged": [{"prompt": prompt + " ", "completion": better.strip()} for prompt, better, _ in TEXT],
    }


def write_rows(folder: Path, name: str) -> Path:
    """One of these files as JSON lines."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()[name]), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------- tokenizer

MARKS = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, EOS = 0, 1, 2
MERGES = (
    "Ġ t|h e|Ġt he|Ġ a|i n|r e|Ġ s|o u|e r|Ġ w|n d|Ġa nd|a t|Ġ i|Ġi t|i s|Ġ b|l l|Ġ o|Ġo f|Ġ h|in g|o n|Ġ m|e n|Ġ c"
)
MERGES += "|a n|Ġ f|i t|Ġ d|e s|Ġ l|Ġt o|Q u|es t|Qu est|i on|Quest ion|A n|s w|sw er|An swer|Ġ p|Ġ n|Ġ I|Ġ W|h at|o r"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Bytes, and a few dozen merges of them; BOS before every text. `special` changes which token is what."""
    merges = [tuple(merge.split()) for merge in MERGES.split("|")]
    tokens = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    model = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = dict(bos_token="<s>", eos_token="<|end|>", pad_token="<pad>") | special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, additional_special_tokens=MARKS[3:], chat_template=TEMPLATE, **special
    )
    return fast


# -------------------------------------------------------------------------------------------------------------- models


def policy() -> LlamaForCausalLM:
    return _filled(LlamaForCausalLM(_config()), seed=1)


def reference(step: float = 0.1) -> LlamaForCausalLM:
    """The policy, a little moved: log-ratios of some nats a completion."""
    model, other = policy(), _filled(LlamaForCausalLM(_config()), seed=2)
    with torch.no_grad():
        for parameter, there in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(there, step)
    return model


def lower_reference() -> LlamaForCausalLM:
    """The policy, moved the other way: it finds these texts less likely, and KTO's estimate of the KL is above 0."""
    return reference(-0.1)


def reward_model() -> LlamaForSequenceClassification:
    return _filled(LlamaForSequenceClassification(_config(num_labels=1)), seed=3)


def move_far(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Sharpen it until no float can hold the ratio of its probabilities to those of what it was."""
    with torch.no_grad():
        model.lm_head.weight.mul_(64)
    return model


def save(model: nn.Module, folder: Path, **special: str) -> Path:
    """As a checkpoint that either side can load."""
    model.save_pretrained(folder)
    tokenizer(**special).save_pretrained(folder)
    return folder


def _config(**settings: Any) -> LlamaConfig:
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    marks = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return LlamaConfig(vocab_size=len(tokenizer()), max_position_embeddings=512, **size, **marks, **settings)


def _filled(model: nn.Module, seed: int) -> Any:
    """In float64: norms around 1, everything else within +-0.6."""
    model.double()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            noise = hashed(parameter.numel(), 1000 * seed + number).view_as(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.6 * noise)
    return model


def hashed(count: int, seed: int) -> Tensor:
    """(count,) float64 in -1 to 1, from integers alone: multiples of 2^-15 that float32 holds as well."""
    x = torch.arange(count, dtype=torch.int64) + seed * 0x9E3779B1
    for factor in (0x7FEB352D, 0x846CA68B):
        x = (x ^ (x >> 16)) & 0xFFFFFFFF
        x = (x * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFF).double() / 2**15 - 1


# ----------------------------------------------------------------------------------------------------------- gradients

DIRECTIONS = 8


def fingerprint(model: nn.Module) -> Tensor:
    """(parameters, 1 + DIRECTIONS) float64: of each gradient, by the parameter's name, its norm and then its products
    with fixed noisy directions. What differs from it by a vector d differs in each product by about |d|.
    """
    lines = []
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = gradient.detach().double().flatten()
        directions = [3**0.5 * hashed(len(gradient), 10_000 + 100 * number + i) for i in range(DIRECTIONS)]
        lines.append(torch.stack([gradient.norm(), *(gradient @ direction for direction in directions)]))
    return torch.stack(lines)
