"""What TRL's trainers are given: a tiny model and tokenizer on disk, and stand-ins that answer in the model's place."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = ["<unk>", "<pad>", "<s>", "</s>", *"abcdefgh"]
PAD, BOS, EOS, WORD = 1, 2, 3, 4  # WORD: any id that is no special token


@cache
def _scratch() -> TemporaryDirectory:
    """A Llama of one layer and its tokenizer of twelve words, on disk until the process ends."""
    scratch = TemporaryDirectory(prefix="parity-")
    tokenizer().save_pretrained(scratch.name)
    torch.manual_seed(0)
    LlamaForCausalLM(_config()).save_pretrained(scratch.name)
    return scratch


def quiet() -> dict[str, Any]:
    """Arguments of every TRL config. Its defaults are for a GPU: bf16 and checkpointing are on, on the CPU too."""
    where = dict(output_dir=f"{_scratch().name}/out", report_to="none", disable_tqdm=True)
    return where | dict(use_cpu=True, bf16=False, gradient_checkpointing=False)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = dict(unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def causal_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(_scratch().name)


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(_config(num_labels=1))


def ppo_models(seed: int) -> dict[str, PreTrainedModel]:
    """Whom PPO needs, in float64, with weights that float32 holds, far enough apart for ratios and KL that differ."""
    torch.manual_seed(seed)
    config = _config(initializer_range=0.5)
    models = {"policy": LlamaForCausalLM(config), "reference": LlamaForCausalLM(config)}
    with torch.no_grad():
        pairs = zip(models["policy"].parameters(), models["reference"].parameters(), strict=True)
        for parameter, reference in pairs:
            reference.copy_(parameter + 0.1 * torch.randn_like(parameter))
    scorer = _config(initializer_range=0.5, num_labels=1)
    models |= {role: LlamaForSequenceClassification(scorer) for role in ("value_model", "reward_model")}
    return {role: model.float().double() for role, model in models.items()}


def _config(**settings: Any) -> LlamaConfig:
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaConfig(vocab_size=len(WORDS), pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **size, **settings)


class StandIn(nn.Module):
    """Called like a model by a trainer, answers with outputs chosen beforehand: `replies` from input ids to outputs."""

    def __init__(self, *replies: tuple[Tensor, dict[str, Tensor]]):
        super().__init__()
        self.replies = replies

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        for known, outputs in self.replies:
            if torch.equal(input_ids, known):
                return SimpleNamespace(**outputs)
        raise ValueError(f"no reply for input ids of shape {tuple(input_ids.shape)}")


def ragged_mask(lengths: list[int], width: int | None = None) -> Tensor:
    """(B, T) bool, the first `lengths[i]` places of row i True."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


class Layout:
    """Completions behind prompts of different lengths, right-padded, as TRL's collators lay them out."""

    def __init__(self, prompt_lengths: list[int], mask: Tensor):
        """mask: (B, T) bool, the completions' own."""
        prompts = torch.tensor(prompt_lengths)[:, None]
        width = int((prompts + mask.sum(-1, keepdim=True)).max())
        self.mask, position = mask, torch.arange(width)
        self.attention_mask = (position < prompts + mask.sum(-1, keepdim=True)).long()
        self.completion_mask = self.attention_mask * (position >= prompts)
        self.input_ids = torch.where(self.attention_mask.bool(), WORD + position % 8, PAD)

    def place(self, values: Tensor) -> Tensor:
        """(B, T) per completion token to (B, width - 1), where the models' outputs stand: 0 outside the completion."""
        shifted = self.completion_mask[:, 1:].bool()
        return torch.zeros(shifted.shape, dtype=values.dtype).masked_scatter(shifted, values[self.mask])


def draw(generator: torch.Generator, *shape: int, low: float, high: float) -> Tensor:
    """Uniform multiples of 1/256, which float32 and float64 hold and add up without rounding."""
    return torch.randint(int(low * 256), int(high * 256) + 1, shape, generator=generator).to(torch.float32) / 256
