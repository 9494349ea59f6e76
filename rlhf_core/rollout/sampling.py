"""Acting: completions sampled from a policy, token by token, from its whole distribution.

Top-k and top-p are not offered on purpose: PPO's log-probs are those of the full softmax, and a filter would make them
belong to another policy than the one that acted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from rlhf_core.batch import PackedBatch
from rlhf_core.models.forward import device_of, evaluating, find_route, trunk_of

logger = logging.getLogger("rlhf_core.rollout")

# Rows that have ended leave the running batch once they are more than this share of it: leaving copies the cache.
_ENDED_SHARE = 0.125
# Tokens that a cache makes room for at once.
_ROOM = 64
# Tokens of the vocabulary that are summed up together in the search for the one that was drawn.
_BLOCK = 128


@dataclass(frozen=True)
class Rollout:
    """B = prompts * n sampled completions; row i * n + j is sample j of prompt i, and each row names its prompt.

    Token lists hold no padding; a completion that stopped ends with its stop token.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: Tensor  # (B, T) float32 CPU, of each token when it was sampled, 0 after the end
    finished: Tensor  # (B,) bool, True = ended with a stop token, False = cut off by max_new_tokens
    values: Tensor | None = None  # (B, T) float32 CPU, of the states that the tokens were sampled from, 0 after the end
    group_size: int = 1  # n

    def pack(self, rows: Sequence[int] | None = None, *, width: int | None = None) -> PackedBatch:
        """The given rows (all) as a batch; `width` columns where (B, T) tensors of the whole rollout must line up.

        Rows of one group that stand side by side share their prompt, so keep groups together where order is free.
        """
        groups: list[tuple[list[int], list[list[int]]]] = []
        before = None
        for row in range(len(self.prompts)) if rows is None else rows:
            if row // self.group_size != before:
                groups.append((self.prompts[row], []))
            groups[-1][1].append(self.completions[row])
            before = row // self.group_size
        return PackedBatch.pack(groups, width=width)

    def packs(self, batch_size: int) -> Iterator[PackedBatch]:
        """All rows in order, `batch_size` at a time, every batch with the columns of the whole."""
        width = max(map(len, self.completions))
        for start in range(0, len(self.prompts), batch_size):
            yield self.pack(range(start, min(start + batch_size, len(self.prompts))), width=width)

    def keep(self, rows: Sequence[int]) -> Rollout:
        """The given rows as a rollout of their own, with as many columns as their longest completion.

        Its group_size is 1 unless the rows are whole groups, each in its order. Raises ValueError for no rows.
        """
        rows, size = list(rows), self.group_size
        if not rows:
            raise ValueError("keep: expected at least one row")
        firsts = rows[::size]
        whole = all(first % size == 0 for first in firsts)
        whole = whole and rows == [first + j for first in firsts for j in range(size)]
        completions = [self.completions[row] for row in rows]
        columns = slice(max(map(len, completions)))
        return Rollout(
            prompts=[self.prompts[row] for row in rows],
            completions=completions,
            logprobs=self.logprobs[rows, columns],
            finished=self.finished[rows],
            values=None if self.values is None else self.values[rows, columns],
            group_size=size if whole else 1,
        )


@torch.no_grad()
def sample(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    temperature: float = 1.0,
    batch_size: int = 64,
    value_head: Callable[[Tensor], Tensor] | None = None,
    cache: Literal["dynamic", "static"] = "dynamic",
) -> Rollout:
    """`n` completions of each prompt, sampled at `temperature` (0: the likeliest token) until a stop token.

    Every row has its own stream of random numbers, so samples depend neither on `batch_size` nor on `n`: more of them
    leave the first ones as they were. A prompt is computed once for all of its rows in a batch of `batch_size` rows.
    Runs in evaluation mode.

    Args:
        value_head: (B, H) states of the policy's trunk to (B,) values, such as a `ValueHead`. The value of the state
            that each token was sampled from is recorded.
        cache: of keys and values. "dynamic" grows, and rows that have ended leave it. "static" has its full length from
            the beginning and rows stay, so that no shape ever changes, as compilers and CUDA graphs want it. The two
            differ by rounding alone, because attention then sums over empty places too, of weight 0. A model that
            cannot take the packed layout has neither: it reads everything anew at each token.

    Raises:
        ValueError: for an empty prompt, no prompts at all, n < 1, and logits that are not finite.
    """
    check_prompts(prompts, n)
    shape = (len(prompts) * n, max_new_tokens)
    # Drawn sample by sample, so that the numbers of the first samples are the same whatever n is.
    uniforms = torch.rand(n, len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    uniforms = uniforms.transpose(0, 1).reshape(shape)
    tokens = torch.zeros(shape, dtype=torch.long)
    logprobs, values = torch.zeros(shape), torch.zeros(shape)
    # Prompts of like length go together: less padding. Longest first: what does not fit in memory fails at once.
    order = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
    rows = torch.tensor(order)[:, None] * n + torch.arange(n)
    with evaluating(policy, *[value_head] if isinstance(value_head, nn.Module) else []):
        for batch in rows.flatten().split(batch_size - batch_size % n if n <= batch_size else batch_size):
            distinct, owners = torch.unique_consecutive(batch // n, return_inverse=True)
            tokens[batch], logprobs[batch], values[batch] = _decode(
                policy,
                [prompts[prompt] for prompt in distinct.tolist()],
                owners,
                uniforms[batch],
                stop_ids,
                temperature,
                value_head,
                cache,
            )
    if not logprobs.isfinite().all():
        row, t = (~logprobs.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"prompt {row // n}, sample {row % n}, token {t}: the policy's logits are not finite; expected a policy "
            "whose weights are (a learning rate too high, or half precision, may have broken them)"
        )
    ends = torch.isin(tokens, torch.tensor(sorted(stop_ids)))
    finished = ends.any(1)
    lengths = torch.where(finished, ends.int().argmax(1) + 1, max_new_tokens)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    columns = mask.shape[1]
    return Rollout(
        prompts=[list(prompt) for prompt in prompts for _ in range(n)],
        completions=[line[:length] for line, length in zip(tokens.tolist(), lengths.tolist(), strict=True)],
        logprobs=logprobs[:, :columns] * mask,
        finished=finished,
        values=None if value_head is None else values[:, :columns] * mask,
        group_size=n,
    )


def check_prompts(prompts: Sequence[Sequence[int]], n: int) -> None:
    """ValueError where there is nothing to sample: no prompts, an empty one, n < 1."""
    if not prompts or not all(prompts):
        empty = next((row for row, prompt in enumerate(prompts) if not prompt), None)
        raise ValueError("no prompts" if empty is None else f"prompt {empty} is empty; give at least the BOS token")
    if n < 1:
        raise ValueError(f"n={n}: expected 1 or more samples of each prompt")


def _decode(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    owners: Tensor,
    uniforms: Tensor,
    stop_ids: frozenset[int],
    temperature: float,
    value_head: Callable[[Tensor], Tensor] | None,
    cache: Literal["dynamic", "static"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probs and values, each (B, T) on the CPU; what comes after a row's stop token means nothing.

    `owners` (B,) says which prompt each row continues, `uniforms` (B, T) which numbers it draws with.
    """
    device = device_of(policy)
    uniforms, stops = uniforms.to(device), torch.tensor(sorted(stop_ids), device=device)
    tokens = torch.zeros_like(uniforms, dtype=torch.long)
    logprobs, values = torch.zeros_like(uniforms, dtype=torch.float32), torch.zeros_like(uniforms, dtype=torch.float32)
    rows = torch.arange(len(uniforms), device=device)  # those that are still decoded
    running = torch.ones_like(rows, dtype=torch.bool)
    if find_route(policy).layout == "packed":
        longest = max(map(len, prompts)) + uniforms.shape[1]
        decoder = _with_cache(policy, prompts, owners.to(device), longest if cache == "static" else None)
    else:
        decoder = _without_cache(policy, prompts, owners.to(device))
    logits, states = next(decoder)
    for t in range(uniforms.shape[1]):
        token, logprob = choose(logits, uniforms[rows, t], temperature)
        tokens[rows, t], logprobs[rows, t] = token, logprob
        if value_head is not None:
            values[rows, t] = value_head(states).float()
        running &= ~torch.isin(token, stops)
        ended = len(rows) - int(running.sum())
        if ended == len(rows) or t + 1 == uniforms.shape[1]:
            break
        kept = None
        if ended > _ENDED_SHARE * len(rows) and cache == "dynamic":
            kept = running.nonzero().squeeze(1)
            rows, running, token = rows[kept], running[kept], token[kept]
        logits, states = decoder.send((token, kept))
    return tokens.cpu(), logprobs.cpu(), values.cpu()


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature) by inverting its cumulative sum, first over blocks, then inside one.

    Args:
        logits: (B, V). uniform: (B,) float64 in [0, 1).

    Returns:
        (B,) token ids and (B,) float32 log-probs of the distribution drawn from. At temperature 0, the likeliest
        tokens and their log-probs at temperature 1. Where logits are not finite, log-probs are not either.
    """
    vocabulary = logits.shape[-1]
    scaled = logits.float() / (temperature or 1.0)
    highest = scaled.amax(-1, keepdim=True)
    weights = scaled.new_zeros(len(logits), -(-vocabulary // _BLOCK) * _BLOCK)
    torch.sub(scaled, highest, out=weights[:, :vocabulary]).exp_()
    blocks = weights.unflatten(1, (-1, _BLOCK))
    passed = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # after each block
    total = passed[:, -1:]
    if temperature == 0:
        token = scaled.argmax(-1, keepdim=True)
    else:
        # The first place where the sum passes u * total. Tokens of probability 0 add nothing, so none is ever chosen.
        goal = uniform[:, None] * total
        block = torch.searchsorted(passed, goal, right=True).clamp(max=passed.shape[1] - 1)
        before = torch.where(block > 0, passed.gather(1, (block - 1).clamp(min=0)), 0)
        inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
        # A goal that rounding has put at the block's very end is pulled back inside.
        goal = torch.minimum(goal - before, torch.nextafter(inside[:, -1:], torch.zeros_like(goal)))
        token = block * _BLOCK + torch.searchsorted(inside, goal, right=True)
        token = token.clamp(max=vocabulary - 1)  # a sum of NaN is never passed
    logprob = scaled.gather(1, token) - highest - total.log()
    return token.squeeze(1), logprob.squeeze(1).float()


# ---------------------------------------------------------------------------------------------- the next token's logits

Decoder = Generator[tuple[Tensor, Tensor], tuple[Tensor, Tensor | None], None]
"""Yields logits (B, V) of the next token and the last hidden states (B, H) that they are made of. Send in the chosen
(B,) tokens, and which of the rows these belong to where some leave the batch (else None)."""


def _with_cache(
    policy: nn.Module, prompts: Sequence[Sequence[int]], owners: Tensor, longest: int | None = None
) -> Decoder:
    """Every prompt goes through the model once, then its keys and values are handed to all rows that continue it.

    Prompts are padded on the left, so all end alike. `longest` tokens is what a static cache has room for.
    """
    device = owners.device
    width = max(len(prompt) for prompt in prompts)
    padded = min(len(prompt) for prompt in prompts) < width
    input_ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if longest is None:
        cache = DynamicCache(config=policy.config)
        cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    else:
        cache = StaticCache(config=policy.config, max_cache_len=longest)
    spread = owners if len(owners) > len(prompts) else None  # until the prompts' own turn is over
    while True:
        with _watching(policy) as states:
            logits = policy(
                input_ids=input_ids,
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        state = states[-1][:, -1]
        token, kept = yield (logits, state) if spread is None else (logits[spread], state[spread])
        if spread is not None:
            kept, spread = spread if kept is None else spread[kept], None
        if kept is not None:
            _select_rows(cache, kept)
            mask, positions = mask[kept], positions[kept]
        input_ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1


def _select_rows(cache: Cache, rows: Tensor) -> None:
    """The given rows of every layer's keys and values, in their order, any of them more than once."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):  # which has no such function of its own
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
            layer.batch_size = len(rows)
        else:
            layer.batch_select_indices(rows)


def _without_cache(policy: nn.Module, prompts: Sequence[Sequence[int]], owners: Tensor) -> Decoder:
    """The same for models of other kinds: padded on the right, everything anew at every token."""
    device = owners.device
    sequences = [list(prompts[owner]) for owner in owners.tolist()]
    while True:
        width = max(len(sequence) for sequence in sequences)
        input_ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences], device=device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        with _watching(policy) as states:
            logits = policy(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        last = torch.arange(len(sequences), device=device), lengths - 1
        token, kept = yield logits[last], states[-1][last]
        if kept is not None:
            sequences = [sequences[row] for row in kept.tolist()]
        for sequence, new in zip(sequences, token.tolist(), strict=True):
            sequence.append(new)


@contextlib.contextmanager
def _watching(policy: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the last hidden states (B, L, H) of each forward of the policy's trunk are appended to the list."""
    states: list[Tensor] = []
    trunk = trunk_of(policy)
    # Some policies, such as OPT's, call the decoder inside their trunk and never the trunk.
    watched = {trunk, trunk.get_decoder()} if hasattr(trunk, "get_decoder") else {trunk}
    hooks = [
        each.register_forward_hook(lambda trunk, args, output: states.append(output.last_hidden_state))
        for each in watched
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values at the front of tensors with room behind: a new token copies itself, not the past."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, heads, L, D) each; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.roomy_keys, self.roomy_values = key_states[:, :, :0], value_states[:, :, :0]
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if after > self.roomy_keys.shape[-2]:
            self.roomy_keys = _with_room(self.roomy_keys[:, :, :before], after + _ROOM)
            self.roomy_values = _with_room(self.roomy_values[:, :, :before], after + _ROOM)
        self.roomy_keys[:, :, before:after] = key_states
        self.roomy_values[:, :, before:after] = value_states
        self.keys, self.values = self.roomy_keys[:, :, :after], self.roomy_values[:, :, :after]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if length := self.get_seq_length():
            self.roomy_keys = self.roomy_keys.index_select(0, indices)
            self.roomy_values = self.roomy_values.index_select(0, indices)
            self.keys, self.values = self.roomy_keys[:, :, :length], self.roomy_values[:, :, :length]


def _with_room(states: Tensor, length: int) -> Tensor:
    """(B, heads, L, D) states at the front of a new (B, heads, length, D) tensor."""
    roomy = states.new_empty(*states.shape[:2], length, states.shape[3])
    roomy[:, :, : states.shape[2]] = states
    return roomy


def sampling_disagreement(generation_config: object) -> str | None:
    """How a checkpoint's generation settings differ from plain sampling, None if they do not."""
    neutral = {"top_k": (None, 0), "top_p": (None, 1.0), "repetition_penalty": (None, 1.0), "min_p": (None, 0.0)}
    wanted = [
        f"{name}={value}"
        for name, plain in neutral.items()
        if (value := getattr(generation_config, name, None)) not in plain
    ]
    return ", ".join(wanted) or None
