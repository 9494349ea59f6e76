"""Acting: completions sampled from a policy, token by token, from its whole distribution.

Top-k and top-p are not offered on purpose: PPO's log-probs are those of the full softmax, and a filter would make them
belong to another policy than the one that acted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf_core.batch import PackedBatch
from rlhf_core.models.forward import device_of, evaluating, find_route

logger = logging.getLogger("rlhf_core.rollout")


@dataclass(frozen=True)
class Rollout:
    """B sampled completions. Token lists hold no padding; a completion that stopped ends with its stop token."""

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: Tensor  # (B, T) float32 CPU, of each token when it was sampled, 0 after the end
    finished: Tensor  # (B,) bool, True = ended with a stop token, False = cut off by max_new_tokens

    def pack(self, rows: Sequence[int] | None = None, *, width: int | None = None) -> PackedBatch:
        """The given rows (all) as a batch; `width` columns where (B, T) tensors of the whole rollout must line up."""
        rows = range(len(self.prompts)) if rows is None else rows
        return PackedBatch.pack([(self.prompts[row], [self.completions[row]]) for row in rows], width=width)

    def packs(self, batch_size: int) -> Iterator[PackedBatch]:
        """All rows in order, `batch_size` at a time, every batch with the columns of the whole."""
        width = max(map(len, self.completions))
        for start in range(0, len(self.prompts), batch_size):
            yield self.pack(range(start, min(start + batch_size, len(self.prompts))), width=width)


@torch.no_grad()
def sample(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Rollout:
    """One completion for each prompt, sampled at `temperature` (0: the likeliest token) until a stop token.

    Every row has its own stream of random numbers, so samples do not depend on `batch_size`. Runs in evaluation mode.
    Raises ValueError for an empty prompt and where there are no prompts at all.
    """
    if not prompts or not all(prompts):
        empty = next((row for row, prompt in enumerate(prompts) if not prompt), None)
        raise ValueError("no prompts" if empty is None else f"prompt {empty} is empty; give at least the BOS token")
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    completions: list[list[int]] = []
    logprobs = torch.zeros(len(prompts), max_new_tokens)
    with evaluating(policy):
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, min(start + batch_size, len(prompts)))
            tokens, scores = _decode(policy, prompts[rows], uniforms[rows], stop_ids, temperature)
            for row, (line, line_scores) in enumerate(zip(tokens.tolist(), scores, strict=True), start=start):
                length = next((i + 1 for i, token in enumerate(line) if token in stop_ids), len(line))
                completions.append(line[:length])
                logprobs[row, :length] = line_scores[:length]
    longest = max(len(completion) for completion in completions)
    return Rollout(
        prompts=[list(prompt) for prompt in prompts],
        completions=completions,
        logprobs=logprobs[:, :longest],
        finished=torch.tensor([completion[-1] in stop_ids for completion in completions]),
    )


def _decode(
    policy: nn.Module, prompts: Sequence[Sequence[int]], uniforms: Tensor, stop_ids: frozenset[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and their log-probs on the CPU; what comes after a row's stop token means nothing."""
    device = device_of(policy)
    uniforms = uniforms.to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    next_logits = _cached_logits if find_route(policy).layout == "packed" else _recomputed_logits
    step_logits = next_logits(policy, prompts)
    logits = next(step_logits)
    tokens, scores = [], []
    for t in range(uniforms.shape[1]):
        token, logprob = choose(logits, uniforms[:, t], temperature)
        tokens.append(token)
        scores.append(logprob)
        running &= ~torch.isin(token, stops)
        if t + 1 == uniforms.shape[1] or not running.any():
            break
        logits = step_logits.send(token)
    return torch.stack(tokens, 1).cpu(), torch.stack(scores, 1).cpu()


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature) by inverting its cumulative sum.

    Args:
        logits: (B, V). uniform: (B,) float64 in [0, 1).

    Returns:
        (B,) token ids and (B,) float32 log-probs of the distribution drawn from. At temperature 0, the likeliest
        tokens and their log-probs at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)
        # The first place where the sum passes u * total. Tokens of probability 0 add nothing, so none is ever chosen.
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1)


def _cached_logits(policy: nn.Module, prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Logits (B, V) of the next token; send the chosen (B,) tokens in. Padded on the left, so all prompts end alike."""
    device = device_of(policy)
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.config)
    while True:
        output = policy(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = yield output.logits[:, -1]
        input_ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1


def _recomputed_logits(policy: nn.Module, prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The same without a cache, for models of other kinds: padded on the right, everything anew at every token."""
    device = device_of(policy)
    sequences = [list(prompt) for prompt in prompts]
    while True:
        width = max(len(sequence) for sequence in sequences)
        input_ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences], device=device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        logits = policy(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        token = yield logits[torch.arange(len(sequences), device=device), lengths - 1]
        for sequence, new in zip(sequences, token.tolist(), strict=True):
            sequence.append(new)


def sampling_disagreement(generation_config: object) -> str | None:
    """How a checkpoint's generation settings differ from plain sampling, None if they do not."""
    neutral = {"top_k": (None, 0), "top_p": (None, 1.0), "repetition_penalty": (None, 1.0), "min_p": (None, 0.0)}
    wanted = [
        f"{name}={value}"
        for name, plain in neutral.items()
        if (value := getattr(generation_config, name, None)) not in plain
    ]
    return ", ".join(wanted) or None
