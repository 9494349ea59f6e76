"""Tiny models of many families, and the plain padded forward of transformers that everything is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_core.batch import Group

VOCABULARY = 61

# Weights are drawn wide (transformers' own 0.02 makes attention all but uniform, and a wrong mask hard to see).
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SMALL_GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2,
    attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SMALL | GROUPED),
    "qwen2": ("qwen2", SMALL | dict(num_key_value_heads=2)),
    "gpt2": ("gpt2", SMALL_GPT2),
    "mistral": ("mistral", SMALL | GROUPED | dict(sliding_window=5)),
    "gemma3": (
        "gemma3_text",
        SMALL | GROUPED | dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    ),
    "cohere": ("cohere", SMALL | dict(num_key_value_heads=2, logit_scale=0.25)),
    "granite": ("granite", SMALL | dict(num_key_value_heads=2, logits_scaling=4.0, residual_multiplier=0.5)),
    "capped": (
        "gemma2",
        SMALL | GROUPED | dict(sliding_window=5, attn_logit_softcapping=None, final_logit_softcapping=3.0),
    ),
    # These must fall back to the padded layout.
    "bloom": ("bloom", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "mamba": ("mamba", SMALL | dict(state_size=4, time_step_rank=2, conv_kernel=4, expand=2)),
    "gpt_oss": ("gpt_oss", SMALL | GROUPED | EXPERTS | dict(sliding_window=5)),
    "gemma2": ("gemma2", SMALL | GROUPED | dict(sliding_window=5, attn_logit_softcapping=2.0)),
    "qwen2_moe": (  # its attention calls do not say that they have a window
        "qwen2_moe",
        SMALL
        | dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=70, max_window_layers=2)
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    ),
}


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """A new model of a family, in training mode as they come, with settings of its config as keywords."""

    def make(family: str, *, auto: type = AutoModelForCausalLM, seed: int = 0, **settings) -> PreTrainedModel:
        model_type, defaults = FAMILIES[family]
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(model_type, **(defaults | settings)))
        for name, parameter in model.named_parameters():  # biases and norms too must matter
            if parameter.ndim == 1 and not name.endswith(("A_log", "sinks")):
                nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
        return model.train()

    return make


@pytest.fixture
def make_scorer(make_model) -> Callable[..., PreTrainedModel]:
    """The same with a scalar score head on it."""
    return lambda family, **settings: make_model(
        family, auto=AutoModelForSequenceClassification, num_labels=1, **settings
    )


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer of words "w0" "w1" ... whose ids are these numbers, but for the named special tokens."""

    def make(*, size: int = VOCABULARY, padding_side: str = "right", **special: int | None) -> PreTrainedTokenizerFast:
        names = {name: f"<{number}>" for name, number in special.items() if number is not None}
        numbers = {number: f"<{number}>" for number in special.values() if number is not None}
        words = {numbers.get(number, f"w{number}"): number for number in range(size)}
        backend = Tokenizer(WordLevel(words, unk_token=names.get("unk_token")))
        backend.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side, **names)

    return make


@pytest.fixture
def make_folder(make_model, make_tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """A checkpoint as others save them: model, tokenizer, and what its generation config says of ends."""

    def make(
        family: str = "llama",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        ends: int | list[int] | None = None,
        **settings,
    ) -> Path:
        folder = tmp_path_factory.mktemp(family)
        model = make_model(family, **settings).to(dtype)
        model.save_pretrained(folder)
        if ends is not None:
            GenerationConfig(eos_token_id=ends).save_pretrained(folder)
        tokenizer = tokenizer or make_tokenizer(unk_token=0, bos_token=1, eos_token=2)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def groups() -> list[Group]:
    """Ragged prompts with one to three completions: short and long ones, shared and not, longer than any window.

    The longest run is a call of its own (64 tokens and more), the others are attended together.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    shapes = [(20, [9, 14, 13]), (1, [3]), (5, [1, 8]), (30, [40, 6]), (4, [7])]
    return [(draw(prompt), [draw(length) for length in completions]) for prompt, completions in shapes]


class Plain(NamedTuple):
    """Rows of prompt and completion as plain transformers takes them, padded on the right."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    predicts: Tensor  # (B, T) column of the token before each completion token, 0 where there is none
    targets: Tensor  # (B, T)
    mask: Tensor  # (B, T)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Plain:
        rows = [(list(prompt), list(completion)) for prompt, completions in groups for completion in completions]
        long, wide = max(len(p) + len(c) for p, c in rows), max(len(c) for _, c in rows)
        plain = cls(*(torch.zeros(len(rows), size, dtype=torch.long) for size in (long, long, wide, wide, wide)))
        for row, (prompt, completion) in enumerate(rows):
            plain.input_ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            plain.attention_mask[row, : len(prompt) + len(completion)] = 1
            for t, token in enumerate(completion):
                plain.predicts[row, t] = len(prompt) + t - 1
                plain.targets[row, t] = token
                plain.mask[row, t] = 1
        return plain._replace(mask=plain.mask.bool())

    def logits(self, model: nn.Module) -> Tensor:
        """(B, T, V) of the model's ordinary forward, where completion tokens are predicted."""
        logits = model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False).logits
        return logits.gather(1, self.predicts[:, :, None].expand(-1, -1, logits.shape[-1]))

    def logprobs(self, model: nn.Module, temperature: float = 1.0) -> Tensor:
        """(B, T), zero outside the mask."""
        logprobs = (self.logits(model) / temperature).log_softmax(-1).gather(-1, self.targets[:, :, None]).squeeze(-1)
        return logprobs * self.mask

    def states(self, trunk: nn.Module) -> Tensor:
        """(B, T, H) last hidden states of an ordinary forward, where completion tokens are predicted."""
        output = trunk(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False)
        states = output.last_hidden_state
        return states.gather(1, self.predicts[:, :, None].expand(-1, -1, states.shape[-1]))


@pytest.fixture
def plain(groups) -> Plain:
    return Plain.of(groups)


@pytest.fixture
def make_plain() -> Callable[[Sequence[Group]], Plain]:
    return Plain.of


@pytest.fixture
def agree() -> Callable[..., None]:
    """Assert that a function of tensors has the same value and the same gradients on a model and on its twin.

    `run` and `run_plain` give (B, T) or (B,) values; both losses weigh every entry with the same random number, and
    gradients may differ by 1e-5 of the largest of the parameter (or of a hundredth of the largest of all, where a
    parameter's own gradient is rounding, as a key's bias has it).
    """

    def check(model: nn.Module, run: Callable, twin: nn.Module, run_plain: Callable, tolerance: float = 1e-5) -> None:
        value, truth = run(model), run_plain(twin)
        assert value.dtype == torch.float32
        assert value.shape == truth.shape
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        for loss in ((value * weights).sum(), (truth * weights).sum()):
            loss.backward()
        truths = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == truths.keys()
        assert len(truths) > 4
        floor = 0.01 * max(gradient.abs().max().item() for gradient in truths.values())
        for name, parameter in model.named_parameters():
            if name in truths:
                scale = max(truths[name].abs().max().item(), floor)
                difference = (parameter.grad - truths[name]).abs().max().item()
                assert difference <= tolerance * scale, f"{name}: gradients differ by {difference / scale:.2g}"

    return check


@pytest.fixture
def twin() -> Callable[[nn.Module], nn.Module]:
    """A copy of a model for plain transformers to run; take it before the model is used."""
    return copy.deepcopy
