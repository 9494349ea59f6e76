"""Sampling completions from a policy, token by token, from its whole distribution.

Top-k and top-p are deliberately not offered: policy-gradient losses use log-probs of the full softmax, and a filter
would make them belong to another distribution than the one that was sampled from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from rlhf_core.models.forward import device_of, evaluating, route_of, trunk_of
from rlhf_core.rollout.experience import Experience

# Finished rows are removed from the running batch once they are more than this share of it: removing copies the cache.
_FINISHED_SHARE = 0.125
# Tokens by which a preallocated cache layer grows at a time.
_GROWTH = 64
# Tokens of the vocabulary that are summed as one block in the search for the sampled token.
_BLOCK = 128


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
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
) -> Experience:
    """Sample `n` completions of each prompt until a stop token, with the log-prob of each token.

    Row i * n + j is completion j of prompt i. Every row has its own stream of random numbers, so samples depend neither
    on `batch_size` nor on `n`: a larger `n` leaves the first completions unchanged. A prompt is computed once for all
    of its rows in a batch. The policy runs in evaluation mode, without gradient.

    Args:
        max_new_tokens: longest completion, in tokens.
        stop_ids: tokens that end a completion; the stop token is its last token.
        generator: on the CPU; the source of all random numbers.
        temperature: logits are divided by it; 0 takes the most likely token (argmax).
        batch_size: rows that are decoded together.
        value_head: maps (B, H) states of the policy's trunk to (B,) values, such as a `ValueHead`. The value of the
            state that each token was sampled from is recorded.
        cache: of keys and values. "dynamic" grows, and finished rows are removed from it. "static" is allocated in its
            full length and keeps all rows, so that no shape changes, as compilers and CUDA graphs need. The two differ
            by rounding only, because attention then also sums over empty places, of weight 0. A model that does not
            support the packed layout uses no cache: it recomputes the whole sequence for each token.

    Returns:
        An experience on the CPU with float32 `logprobs` (B, T) of the distribution sampled from, and with `values`
        (B, T) where `value_head` is given.

    Raises:
        ValueError: for an empty prompt, no prompts at all, n < 1, and logits that are not finite.
    """
    check_prompts(prompts, n)
    shape = (len(prompts) * n, max_new_tokens)
    # Drawn completion by completion, so that the numbers of the first completions are the same for every n.
    uniforms = torch.rand(n, len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    uniforms = uniforms.transpose(0, 1).reshape(shape)
    tokens = torch.zeros(shape, dtype=torch.long)
    logprobs, values = torch.zeros(shape), torch.zeros(shape)
    # Batch prompts of similar length, for less padding; the longest first, so that a lack of memory shows at once.
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
            "whose weights are finite (a learning rate too high, or half precision, may have broken them)"
        )
    ends = torch.isin(tokens, torch.tensor(sorted(stop_ids)))
    finished = ends.any(1)
    lengths = torch.where(finished, ends.int().argmax(1) + 1, max_new_tokens)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    columns = mask.shape[1]
    return Experience.sampled(
        prompts=[list(prompt) for prompt in prompts for _ in range(n)],
        completions=[line[:length] for line, length in zip(tokens.tolist(), lengths.tolist(), strict=True)],
        logprobs=logprobs[:, :columns] * mask,
        finished=finished,
        group_size=n,
        values=None if value_head is None else values[:, :columns] * mask,
    )


def check_prompts(prompts: Sequence[Sequence[int]], n: int) -> None:
    """Raise ValueError where there is nothing to sample: no prompts, an empty prompt, n < 1."""
    if not prompts or not all(prompts):
        empty = next((row for row, prompt in enumerate(prompts) if not prompt), None)
        raise ValueError("no prompts" if empty is None else f"prompt {empty} is empty; give at least the BOS token")
    if n < 1:
        raise ValueError(f"n={n}: expected 1 or more samples of each prompt")


def sampling_disagreement(generation_config: object) -> str | None:
    """Return the generation settings of a checkpoint that differ from plain sampling, as text; None without any."""
    neutral = {"top_k": (None, 0), "top_p": (None, 1.0), "repetition_penalty": (None, 1.0), "min_p": (None, 0.0)}
    wanted = [
        f"{name}={value}"
        for name, plain in neutral.items()
        if (value := getattr(generation_config, name, None)) not in plain
    ]
    return ", ".join(wanted) or None


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    owners: Tensor,
    uniforms: Tensor,
    stop_ids: frozenset[int],
    temperature: float,
    value_head: Callable[[Tensor], Tensor] | None,
    cache: Literal["dynamic", "static"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, log-probs and values, each (B, T) on the CPU; entries after a row's stop token are undefined.

    Args:
        owners: (B,) index of the prompt that each row continues.
        uniforms: (B, T) float64 in [0, 1), the random number of each token.
    """
    device = device_of(policy)
    uniforms, stops = uniforms.to(device), torch.tensor(sorted(stop_ids), device=device)
    tokens = torch.zeros_like(uniforms, dtype=torch.long)
    logprobs, values = torch.zeros_like(uniforms, dtype=torch.float32), torch.zeros_like(uniforms, dtype=torch.float32)
    rows = torch.arange(len(uniforms), device=device)  # still in the running batch
    running = torch.ones_like(rows, dtype=torch.bool)
    if route_of(policy).packed_fault is None:
        longest = max(map(len, prompts)) + uniforms.shape[1]
        decoder = _decode_with_cache(policy, prompts, owners.to(device), longest if cache == "static" else None)
    else:
        decoder = _decode_without_cache(policy, prompts, owners.to(device))
    logits, states = next(decoder)
    for t in range(uniforms.shape[1]):
        token, logprob = choose(logits, uniforms[rows, t], temperature)
        tokens[rows, t], logprobs[rows, t] = token, logprob
        if value_head is not None:
            values[rows, t] = value_head(states).float()
        running &= ~torch.isin(token, stops)
        finished = len(rows) - int(running.sum())
        if finished == len(rows) or t + 1 == uniforms.shape[1]:
            break
        kept = None
        if finished > _FINISHED_SHARE * len(rows) and cache == "dynamic":
            kept = running.nonzero().squeeze(1)
            rows, running, token = rows[kept], running[kept], token[kept]
        logits, states = decoder.send((token, kept))
    return tokens.cpu(), logprobs.cpu(), values.cpu()


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample from softmax(logits / temperature) by inverse transform: first find the block, then the token inside it.

    Args:
        logits: (B, V). uniform: (B,) float64 in [0, 1).

    Returns:
        (B,) token ids and (B,) float32 log-probs of the distribution sampled from. At temperature 0, the argmax and its
        log-prob at temperature 1. Where logits are not finite, log-probs are not either.
    """
    vocabulary = logits.shape[-1]
    scaled = logits.float() / (temperature or 1.0)
    highest = scaled.amax(-1, keepdim=True)
    weights = scaled.new_zeros(len(logits), -(-vocabulary // _BLOCK) * _BLOCK)
    torch.sub(scaled, highest, out=weights[:, :vocabulary]).exp_()
    blocks = weights.unflatten(1, (-1, _BLOCK))
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # up to the end of each block
    total = cumulative[:, -1:]
    if temperature == 0:
        token = scaled.argmax(-1, keepdim=True)
    else:
        # The first place where the sum exceeds u * total. Tokens of probability 0 add nothing, so none is ever chosen.
        goal = uniform[:, None] * total
        block = torch.searchsorted(cumulative, goal, right=True).clamp(max=cumulative.shape[1] - 1)
        before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0)
        inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
        # Rounding may put the goal at the very end of the block; keep it inside.
        goal = torch.minimum(goal - before, torch.nextafter(inside[:, -1:], torch.zeros_like(goal)))
        token = block * _BLOCK + torch.searchsorted(inside, goal, right=True)
        token = token.clamp(max=vocabulary - 1)  # no sum exceeds NaN
    logprob = scaled.gather(1, token) - highest - total.log()
    return token.squeeze(1), logprob.squeeze(1).float()


Decoder = Generator[tuple[Tensor, Tensor], tuple[Tensor, Tensor | None], None]
"""Yields (B, V) logits of the next token and the last hidden states (B, H) that they are computed from. Receives the
sampled (B,) tokens, and the indices of the rows that they belong to where rows were removed (else None)."""


def _decode_with_cache(
    policy: PreTrainedModel, prompts: Sequence[Sequence[int]], owners: Tensor, longest: int | None = None
) -> Decoder:
    """Run every prompt through the model once, then copy its keys and values to all rows that continue it.

    Prompts are padded on the left, so that all end at the same place. `longest` is the length of a static cache, in
    tokens; None for a dynamic one.
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
        cache.layers = [_PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    else:
        cache = StaticCache(config=policy.config, max_cache_len=longest)
    repeated = owners if len(owners) > len(prompts) else None  # None after the forward of the prompts themselves
    while True:
        with _record_states(policy) as states:
            logits = policy(
                input_ids=input_ids,
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        state = states[-1][:, -1]
        token, kept = yield (logits, state) if repeated is None else (logits[repeated], state[repeated])
        if repeated is not None:
            kept, repeated = repeated if kept is None else repeated[kept], None
        if kept is not None:
            _select_rows(cache, kept)
            mask, positions = mask[kept], positions[kept]
        input_ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1


def _select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep the given rows of every layer's keys and values, in their order; a row may be repeated."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):  # its base class has no such method
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
            layer.batch_size = len(rows)
        else:
            layer.batch_select_indices(rows)


def _decode_without_cache(policy: PreTrainedModel, prompts: Sequence[Sequence[int]], owners: Tensor) -> Decoder:
    """Recompute all sequences, padded on the right, at every token: for models without the packed layout."""
    device = owners.device
    sequences = [list(prompts[owner]) for owner in owners.tolist()]
    while True:
        width = max(len(sequence) for sequence in sequences)
        input_ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences], device=device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        with _record_states(policy) as states:
            logits = policy(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        last = torch.arange(len(sequences), device=device), lengths - 1
        token, kept = yield logits[last], states[-1][last]
        if kept is not None:
            sequences = [sequences[row] for row in kept.tolist()]
        for sequence, new in zip(sequences, token.tolist(), strict=True):
            sequence.append(new)


@contextlib.contextmanager
def _record_states(policy: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Append the last hidden states (B, L, H) of each forward of the policy's trunk to the yielded list."""
    states: list[Tensor] = []
    trunk = trunk_of(policy)
    # Some policies, such as OPT's, call the decoder inside their trunk and never the trunk.
    hooked = {trunk, trunk.get_decoder()} if hasattr(trunk, "get_decoder") else {trunk}
    hooks = [
        module.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
        for module in hooked
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values at the front of larger tensors, so that appending a token does not copy the previous ones."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, L, D) keys and values; return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.allocated_keys, self.allocated_values = key_states[:, :, :0], value_states[:, :, :0]
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if after > self.allocated_keys.shape[-2]:
            self.allocated_keys = _preallocate(self.allocated_keys[:, :, :before], after + _GROWTH)
            self.allocated_values = _preallocate(self.allocated_values[:, :, :before], after + _GROWTH)
        self.allocated_keys[:, :, before:after] = key_states
        self.allocated_values[:, :, before:after] = value_states
        self.keys, self.values = self.allocated_keys[:, :, :after], self.allocated_values[:, :, :after]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in their order."""
        if length := self.get_seq_length():
            self.allocated_keys = self.allocated_keys.index_select(0, indices)
            self.allocated_values = self.allocated_values.index_select(0, indices)
            self.keys, self.values = self.allocated_keys[:, :, :length], self.allocated_values[:, :, :length]


def _preallocate(states: Tensor, length: int) -> Tensor:
    """Return a new (B, heads, length, D) tensor that begins with the (B, heads, L, D) states."""
    allocated = states.new_empty(*states.shape[:2], length, states.shape[3])
    allocated[:, :, : states.shape[2]] = states
    return allocated
