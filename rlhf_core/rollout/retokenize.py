"""Preparing completions of a policy for a reward model: in another vocabulary, within a limited number of positions."""

from __future__ import annotations

import logging

from rlhf_core.data.tokenizer import Tokenizer

logger = logging.getLogger("rlhf_core.rollout")


def retokenize(
    prompts: list[list[int]], completions: list[list[int]], source: Tokenizer, target: Tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """Convert token ids of one tokenizer to those of another, by their texts.

    Prompt and completion are tokenized separately. A completion that ends with a special token gets the EOS of the
    target at its end; a prompt without text becomes its BOS (else EOS).
    """
    start = target.eos_token_id if target.bos_token_id is None else target.bos_token_id
    special = {token for token, added in source.added_tokens_decoder.items() if added.special}
    special |= {*source.all_special_ids}
    new_prompts, new_completions = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        # Decoded together, then cut: many tokenizers drop the space in front of a text that is decoded alone.
        before, whole = source.batch_decode([prompt, prompt + completion], skip_special_tokens=True)
        text = whole[len(before) :] if whole.startswith(before) else source.decode(completion, skip_special_tokens=True)
        ids = target(text, add_special_tokens=False)["input_ids"]
        ended = not ids or completion[-1] in special
        new_prompts.append(target(before)["input_ids"] or [start])
        new_completions.append(ids + [target.eos_token_id] if ended else ids)
    return new_prompts, new_completions


def truncate_prompts(
    prompts: list[list[int]], completions: list[list[int]], positions: int, bos: int | None
) -> list[list[int]]:
    """Remove tokens from the left of prompts, after a BOS, where prompt and completion exceed `positions` tokens.

    A warning counts these prompts. Raises ValueError for a completion that leaves no position for its prompt.
    """
    limits = [positions - len(completion) for completion in completions]
    for i, limit in enumerate(limits):
        if limit < 1:
            raise ValueError(
                f"reward model: sample {i} has a completion of {len(completions[i])} tokens, "
                f"expected at most {positions - 1}, because the model's max_position_embeddings={positions}"
            )
    cut = sum(len(prompt) > limit for prompt, limit in zip(prompts, limits, strict=True))
    if cut:
        logger.warning("reward model: %d of %d prompts lose their left; %d positions", cut, len(prompts), positions)
    truncated = []
    for prompt, limit in zip(prompts, limits, strict=True):
        head = prompt[:1] if prompt[:1] == [bos] and 1 < limit < len(prompt) else []
        truncated.append(head + prompt[max(len(prompt) - limit + len(head), 0) :])
    return truncated
