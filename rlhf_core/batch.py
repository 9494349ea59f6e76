"""`PackedBatch`: every prompt once, its completions after it, no padding.

All of RLHF works on *a prompt with K completions*: one for SFT and PPO, two for a preference pair, K for a ranking. A
`PackedBatch` concatenates the tokens of a micro-batch in a single row, so that no padding token is embedded and a
prompt that several completions share is computed once, forward and backward:

    stream      P P P P A A A B B B B | P P C C C
    position    0 1 2 3 4 5 6 4 5 6 7 | 0 1 2 3 4        a completion's positions continue its prompt's

A token attends causally to its own completion and to its whole prompt, and to nothing else. `P P P P A A A` is
therefore a plain causal sequence (a *run*), and only the second and later completions of a prompt (`B B B B`, a
*branch*) need keys from elsewhere in the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Prompt ids, the ids of each completion, and optionally which tokens of each completion a loss counts (None: all).
Group = (
    tuple[Sequence[int], Sequence[Sequence[int]]]
    | tuple[Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[bool]] | None]
)

# Shorter runs share an attention call with others of similar length: the overhead of a call would exceed its work.
_SHORT_RUN = 64
# Lengths in a shared call differ by at most this fraction of the longest, which bounds the wasted work.
_LENGTH_SLACK = 0.15
# A prompt is shared where that saves more than the masked attention of a branch costs (benchmarks/prefix_sharing.py).
_SHARE_MIN_PROMPT = 16
_SHARE_MIN_RATIO = 0.25


class Span(NamedTuple):
    """The half-open ranges of a completion and its prompt in the stream."""

    prompt_start: int
    prompt_end: int
    start: int
    end: int


@dataclass(frozen=True)
class AttentionGroup:
    """Ranges of the stream that share an attention call: query i of a row attends to keys 0 .. prefix + i.

    A single run is stored as `span`, which slices the stream without a copy. Otherwise `queries` (G, L) and `keys`
    (G, prefix + L) are stream positions; rows shorter than L repeat their last token, which no other query attends to.
    """

    prefix: int
    span: tuple[int, int] | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class AttentionLayout:
    """The attention calls of a batch; passed to the model as the keyword argument `layout`.

    `restore` (N,) indexes the concatenated outputs of all groups in stream order; None where they are in that order.
    """

    groups: tuple[AttentionGroup, ...]
    restore: Tensor | None


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. N stream tokens, B completions, M completion tokens, T tokens in the longest completion.

    Completions are in the order given to `pack`, and the M tokens in that of the completions.
    """

    input_ids: Tensor  # (N,) the stream
    position_ids: Tensor  # (N,)
    layout: AttentionLayout
    completion_mask: Tensor  # (B, T) bool, True = a token of the completion, its EOS included
    loss_mask: Tensor  # (B, T) bool, True = a completion token that a loss counts; by default all
    targets: Tensor  # (M,) completion tokens
    predict_rows: Tensor  # (M,) stream row whose hidden state predicts each target: the token before it
    last_rows: Tensor  # (B,) stream row of each completion's last token
    slots: Tensor  # (M,) index of each target in the flattened (B, T)
    spans: tuple[Span, ...]  # B of them

    @classmethod
    def pack(cls, groups: Iterable[Group], *, share: bool | str = "auto", width: int | None = None) -> PackedBatch:
        """Pack prompts with their completions, in time and memory linear in their tokens.

        Args:
            groups: of prompt ids, the ids of each completion, and optionally which tokens of each a loss counts.
            share: True computes the prompt of several completions once, False repeats it before each of them, "auto"
                shares it unless it is so short that sharing costs more than it saves.
            width: number of columns T; None: the longest completion.

        Raises:
            ValueError: an empty batch, prompt or completion (the first token of a completion is predicted from the last
                token of its prompt: give at least the BOS token), flags that do not match their completion, or a
                completion without a supervised token.
        """
        if share not in (True, False, "auto"):
            raise ValueError(f"share={share!r}: expected True, False or 'auto'")
        stream: list[int] = []
        positions: list[Tensor] = []
        spans: list[Span] = []
        runs: list[tuple[int, int]] = []
        branches: list[tuple[int, int, int, int]] = []
        partly: dict[int, Sequence[bool]] = {}  # flags of the completions that are supervised in part
        for number, (prompt, completions, *rest) in enumerate(groups):
            if len(prompt) == 0 or len(completions) == 0 or any(len(completion) == 0 for completion in completions):
                raise ValueError(
                    f"group {number}: {len(prompt)} prompt tokens and completions of "
                    f"{[len(completion) for completion in completions]} tokens; each needs at least one "
                    "(an empty prompt is written as its BOS token)"
                )
            for k, flags in enumerate(_supervised(number, completions, *rest)):
                if flags is not None:
                    partly[len(spans) + k] = flags
            shared = _worth_sharing(prompt, completions) if share == "auto" else bool(share)
            for k, completion in enumerate(completions):
                if k == 0 or not shared:
                    run_start = len(stream)
                    prompt_end = run_start + len(prompt)
                    stream.extend(prompt)
                    stream.extend(completion)
                    positions.append(torch.arange(len(prompt) + len(completion)))
                    runs.append((run_start, len(stream)))
                    spans.append(Span(run_start, prompt_end, prompt_end, len(stream)))
                else:
                    start = len(stream)
                    stream.extend(completion)
                    positions.append(torch.arange(len(prompt), len(prompt) + len(completion)))
                    branches.append((run_start, prompt_end, start, len(stream)))
                    spans.append(Span(run_start, prompt_end, start, len(stream)))
        if not spans:
            raise ValueError("an empty batch: no prompts were given")

        input_ids = torch.tensor(stream)
        longest = max(span.end - span.start for span in spans)
        width = longest if width is None else width
        if width < longest:
            raise ValueError(f"width={width} is less than the longest completion, {longest} tokens")
        lengths = torch.tensor([span.end - span.start for span in spans])
        completion_mask = torch.arange(width) < lengths[:, None]
        loss_mask = completion_mask.clone() if partly else completion_mask
        for row, flags in partly.items():
            loss_mask[row, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
        rows = torch.cat([torch.arange(span.start, span.end) for span in spans])
        predict_rows = rows - 1
        firsts = lengths.cumsum(0) - lengths  # the prompt's last token predicts a completion's first
        predict_rows[firsts] = torch.tensor([span.prompt_end - 1 for span in spans])
        return cls(
            input_ids=input_ids,
            position_ids=torch.cat(positions),
            layout=_attention_layout(runs, branches, len(stream)),
            completion_mask=completion_mask,
            loss_mask=loss_mask,
            targets=input_ids[rows],
            predict_rows=predict_rows,
            last_rows=torch.tensor([span.end - 1 for span in spans]),
            slots=completion_mask.flatten().nonzero().squeeze(1),
            spans=tuple(spans),
        )

    @property
    def num_completions(self) -> int:
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        """N, the tokens that the model computes."""
        return self.input_ids.numel()

    @property
    def num_completion_tokens(self) -> int:
        """M, the completion tokens."""
        return self.targets.numel()

    @property
    def num_supervised_tokens(self) -> int:
        """The completion tokens that a loss counts."""
        return int(self.loss_mask.sum())

    def scatter(self, values: Tensor) -> Tensor:
        """Scatter (M,) values of completion tokens to (B, T), with 0 where there is no token."""
        flat = values.new_zeros(self.completion_mask.numel())
        return flat.index_copy(0, self.slots, values).view(self.completion_mask.shape)

    def completion_ids(self) -> Tensor:
        """Return (B, T) completion tokens, 0 where there is none."""
        return self.scatter(self.targets)

    def padded(self) -> PaddedBatch:
        """Return the same sequences one to a row, padded on the right, for models that cannot read the stream."""
        lengths = [span.prompt_end - span.prompt_start + span.end - span.start for span in self.spans]
        width = max(lengths)
        input_ids = self.input_ids.new_zeros(len(lengths), width)
        predict_rows, last_rows = [], []
        for row, (span, length) in enumerate(zip(self.spans, lengths, strict=True)):
            prompt_length = span.prompt_end - span.prompt_start
            input_ids[row, :prompt_length] = self.input_ids[span.prompt_start : span.prompt_end]
            input_ids[row, prompt_length:length] = self.input_ids[span.start : span.end]
            predict_rows.append(torch.arange(prompt_length - 1, length - 1) + row * width)
            last_rows.append(row * width + length - 1)
        device = self.input_ids.device
        real = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
        return PaddedBatch(
            input_ids, real.long(), torch.cat(predict_rows).to(device), torch.tensor(last_rows, device=device)
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with all tensors on `device`."""
        if self.input_ids.device == torch.device(device):
            return self
        moved: PackedBatch = _move(self, device)
        return moved


class PaddedBatch(NamedTuple):
    """`PackedBatch.padded()`: B rows of L columns. Only the mask distinguishes padding; its token id has no meaning."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L) long, 1 = real
    predict_rows: Tensor  # (M,) as in PackedBatch, into the flattened (B * L) rows
    last_rows: Tensor  # (B,)


def _supervised(
    number: int, completions: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]] | None = None
) -> Sequence[Sequence[bool] | None]:
    """Return the checked flags of each completion of group `number`; None for one that is supervised throughout."""
    if supervised is None:
        return [None] * len(completions)
    lengths, flag_lengths = [len(completion) for completion in completions], [len(flags) for flags in supervised]
    if flag_lengths != lengths:
        raise ValueError(
            f"group {number}: completions of {lengths} tokens and flags for {flag_lengths}, expected as many"
        )
    if not all(any(flags) for flags in supervised):
        raise ValueError(f"group {number}: a completion has no supervised token, expected at least one")
    return [None if all(flags) else flags for flags in supervised]


def _worth_sharing(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> bool:
    longest = max(len(completion) for completion in completions)
    return len(prompt) >= _SHARE_MIN_PROMPT and len(prompt) >= _SHARE_MIN_RATIO * longest


def stream_length(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> int:
    """Return the number of stream tokens of one prompt and its completions."""
    shared = len(completions) < 2 or _worth_sharing(prompt, completions)
    return len(prompt) * (1 if shared else len(completions)) + sum(map(len, completions))


def _attention_layout(
    runs: list[tuple[int, int]], branches: list[tuple[int, int, int, int]], num_tokens: int
) -> AttentionLayout:
    """Divide the stream into attention calls: long runs alone, short ones and the branches of one prompt together."""
    no_prefix = torch.empty(0, dtype=torch.long)
    buckets = [(no_prefix, [run]) for run in runs if run[1] - run[0] >= _SHORT_RUN]
    buckets += [(no_prefix, bucket) for bucket in _by_length([run for run in runs if run[1] - run[0] < _SHORT_RUN])]
    by_prompt: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for prompt_start, prompt_end, start, end in branches:
        by_prompt.setdefault((prompt_start, prompt_end), []).append((start, end))
    for prompt, completions in by_prompt.items():
        buckets += [(torch.arange(*prompt), bucket) for bucket in _by_length(completions)]
    calls = [_attention_call(prefix, bucket) for prefix, bucket in buckets]

    calls.sort(key=lambda item: int(item[1][0, 0]))
    positions = torch.cat([queries.flatten() for _, queries, _ in calls])
    real = torch.cat([real.flatten() for _, _, real in calls])
    restore = torch.empty(num_tokens, dtype=torch.long)
    restore[positions[real]] = real.nonzero().squeeze(1)
    in_order = len(positions) == num_tokens and bool((restore == torch.arange(num_tokens)).all())
    return AttentionLayout(tuple(group for group, _, _ in calls), None if in_order else restore)


def _attention_call(prefix: Tensor, bucket: list[tuple[int, int]]) -> tuple[AttentionGroup, Tensor, Tensor]:
    """Return one attention call, its (G, L) query positions, and which of them are not repetitions."""
    queries, real = _positions(bucket)
    if len(bucket) == 1 and len(prefix) == 0:
        return AttentionGroup(prefix=0, span=bucket[0]), queries, real
    keys = torch.cat([prefix.expand(len(bucket), -1), queries], dim=1)
    return AttentionGroup(prefix=len(prefix), queries=queries, keys=keys), queries, real


def _by_length(ranges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return buckets of ranges whose lengths differ by at most `_LENGTH_SLACK` of the longest."""
    buckets: list[list[tuple[int, int]]] = []
    longest = 0
    for start, end in sorted(ranges, key=lambda bounds: bounds[0] - bounds[1]):
        if buckets and end - start >= (1 - _LENGTH_SLACK) * longest:
            buckets[-1].append((start, end))
        else:
            longest = end - start
            buckets.append([(start, end)])
    return buckets


def _positions(ranges: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return (G, L) stream positions, with the last repeated in shorter rows, and (G, L) bool, False = a repetition."""
    starts = torch.tensor([start for start, _ in ranges])[:, None]
    ends = torch.tensor([end for _, end in ranges])[:, None]
    positions = starts + torch.arange(max(end - start for start, end in ranges))
    return torch.minimum(positions, ends - 1), positions < ends


def _move(value: Any, device: torch.device | str) -> Any:
    """Move the tensors of nested dataclasses and tuples."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, PackedBatch | AttentionLayout | AttentionGroup):
        return replace(value, **{field.name: _move(getattr(value, field.name), device) for field in fields(value)})
    if isinstance(value, tuple) and value and isinstance(value[0], AttentionGroup):
        return tuple(_move(item, device) for item in value)
    return value
