"""Scoring: one number for each completion, from a reward model or from a function of the texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ModelConfig
from rlhf_core.models.forward import Layout, sequence_scores
from rlhf_core.models.load import freeze, load_reward_model, same_vocabulary
from rlhf_core.rollout.sampling import evaluating

Reward = Callable[[list[list[int]], list[list[int]], list[dict[str, Any]]], Tensor]
"""(prompt ids, completion ids, data rows) -> (B,) float32 scores on the CPU."""


def model_reward(
    reward_model: nn.Module,
    reward_tokenizer: Any,
    policy_tokenizer: Any,
    *,
    batch_size: int = 64,
    layout: Layout = "auto",
    end_unfinished: bool = False,
) -> Reward:
    """Scores of a reward model. Token ids are passed as they are where both share a vocabulary, else the texts.

    With `end_unfinished` a completion that was cut off is scored as if its end token had followed.
    """
    translate = not same_vocabulary(reward_tokenizer, policy_tokenizer)

    @torch.no_grad()
    def score(prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Tensor:
        if translate:
            prompts, completions = _translate(prompts, completions, policy_tokenizer, reward_tokenizer)
        if end_unfinished:
            ends, end = {*reward_tokenizer.all_special_ids}, [reward_tokenizer.eos_token_id]
            completions = [ids if ids[-1] in ends else ids + end for ids in completions]
        scores = []
        with evaluating(reward_model):
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                batch = PackedBatch.pack([(p, [c]) for p, c in zip(prompts[part], completions[part], strict=True)])
                scores.append(sequence_scores(reward_model, batch, layout=layout).cpu())
        return torch.cat(scores)

    return score


def load_model_reward(
    source: ModelConfig, policy_tokenizer: Any, *, device: str | None = None, end_unfinished: bool = False
) -> Reward:
    """The frozen reward model of a config, as a reward for completions in the policy's tokens (see `model_reward`)."""
    reward_model, reward_tokenizer = load_reward_model(source.path, device=device, **source.options())
    return model_reward(
        freeze(reward_model), reward_tokenizer, policy_tokenizer, layout=source.layout, end_unfinished=end_unfinished
    )


def function_reward(function: Callable[..., Sequence[float]], policy_tokenizer: Any) -> Reward:
    """Scores of `function(prompts, completions, records)`: lists of texts (without special tokens) and of data rows."""
    name = getattr(function, "__name__", str(function))

    def score(prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Tensor:
        prompt_texts = policy_tokenizer.batch_decode(prompts, skip_special_tokens=True)
        completion_texts = policy_tokenizer.batch_decode(completions, skip_special_tokens=True)
        scores = function(prompt_texts, completion_texts, rows)
        if not isinstance(scores, Iterable) or len(scores := list(scores)) != len(prompts):
            got = f"{len(scores)} scores" if isinstance(scores, list) else repr(scores)
            raise ValueError(f"reward function {name}: {got} for {len(prompts)} completions")
        for i, value in enumerate(scores):
            single = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
            if not single or not math.isfinite(value):
                raise ValueError(
                    f"reward function {name}: sample {i} got {value!r}, expected a finite number; "
                    f"its completion begins {completion_texts[i][:60]!r}"
                )
        return torch.tensor([float(value) for value in scores])

    return score


def _translate(
    prompts: list[list[int]], completions: list[list[int]], source: Any, target: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Texts of one tokenizer as ids of another, prompt and completion apart, the end marked where it was reached."""
    start = target.eos_token_id if target.bos_token_id is None else target.bos_token_id
    special = {token for token, added in source.added_tokens_decoder.items() if added.special}
    special |= {*source.all_special_ids}
    new_prompts, new_completions = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        # Decoded together, then cut: many tokenizers drop the space in front of a text that is decoded alone.
        before, whole = source.batch_decode([prompt, prompt + completion], skip_special_tokens=True)
        text = whole[len(before) :] if whole.startswith(before) else source.decode(completion, skip_special_tokens=True)
        ids = target(text, add_special_tokens=False)["input_ids"]
        ended = completion[-1] in special or not ids
        new_prompts.append(target(before)["input_ids"] or [start])
        new_completions.append(ids + [target.eos_token_id] if ended else ids)
    return new_prompts, new_completions
