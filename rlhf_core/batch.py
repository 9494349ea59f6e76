"""`PackedBatch`: every prompt once, its completions after it, no padding.

All of RLHF looks at *a prompt with K completions*: one for SFT and PPO, two for a preference pair, K for a ranking. A
`PackedBatch` lays the real tokens of a micro-batch end to end in a single row, so no padding token is ever embedded
and a prompt that several completions share is computed once, forward and backward:

    stream      P P P P A A A B B B B | P P C C C
    position    0 1 2 3 4 5 6 4 5 6 7 | 0 1 2 3 4        a completion's positions continue its prompt's

A token sees its own stretch causally and all of its prompt, nothing else. `P P P P A A A` is therefore one plain causal
sequence (a *run*), and only the second and later completions of a prompt (`B B B B`, a *branch*) need keys from
elsewhere in the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Prompt ids, and the ids of each completion; perhaps also which of each completion's tokens a loss counts (None: all).
Group = (
    tuple[Sequence[int], Sequence[Sequence[int]]]
    | tuple[Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[bool]] | None]
)

# A run shorter than this is attended together with others of like length: the call alone would cost more than its work.
_SHORT_RUN = 64
# Lengths inside one joint call differ by at most this share of the longest, which bounds the wasted work.
_LENGTH_SLACK = 0.15
# Sharing pays when the prompt saved outweighs the masked attention that a branch costs (benchmarks/prefix_sharing.py).
_SHARE_MIN_PROMPT = 16
_SHARE_MIN_RATIO = 0.25


class Span(NamedTuple):
    """Where one completion and its prompt lie in the stream (half-open ranges)."""

    prompt_start: int
    prompt_end: int
    start: int
    end: int


@dataclass(frozen=True)
class AttentionGroup:
    """Stretches of the stream that one attention call serves: query i of a row sees keys 0 .. prefix + i.

    A single run is kept as `span`, which slices the stream without a copy. Otherwise `queries` (G, L) and `keys`
    (G, prefix + L) hold stream positions; rows shorter than L repeat their last token, which no kept query can see.
    """

    prefix: int
    span: tuple[int, int] | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class AttentionLayout:
    """How attention walks through the stream; handed to the model as the keyword argument `layout`.

    `restore` (N,) puts the concatenated outputs of all groups back into stream order; None where they already are.
    """

    groups: tuple[AttentionGroup, ...]
    restore: Tensor | None


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. N stream tokens, B completions, M completion tokens, T tokens in the longest completion.

    Completions are numbered in the order given to `pack`; the M tokens go completion by completion.
    """

    input_ids: Tensor  # (N,) the stream
    position_ids: Tensor  # (N,)
    layout: AttentionLayout
    completion_mask: Tensor  # (B, T) bool, True = a token of the completion, its EOS included
    loss_mask: Tensor  # (B, T) bool, True = a completion token that is learned; all are, where nothing else is said
    targets: Tensor  # (M,) completion tokens
    predict_rows: Tensor  # (M,) stream row whose hidden state predicts each target: the token before it
    last_rows: Tensor  # (B,) stream row of each completion's last token
    slots: Tensor  # (M,) place of each target in a flattened (B, T)
    spans: tuple[Span, ...]  # B of them

    @classmethod
    def pack(cls, groups: Iterable[Group], *, share: bool | str = "auto", width: int | None = None) -> PackedBatch:
        """Pack prompts with their completions, in time and memory linear in their tokens.

        `share=True` computes the prompt of several completions once; `False` repeats it before each of them; `"auto"`
        shares unless the prompt is so short that sharing costs more than it saves. `width` asks for T columns where
        tensors of a larger batch must line up. A group may have a third part, which tokens of each completion the
        loss counts. Raises ValueError for an empty batch, prompt or completion (the first token of a completion is
        predicted from the last token of its prompt: give at least the BOS token), for flags that do not match their
        completion, and for a completion with no token to learn.
        """
        if share not in (True, False, "auto"):
            raise ValueError(f"share={share!r}: expected True, False or 'auto'")
        stream, positions, spans = [], [], []
        runs: list[tuple[int, int]] = []
        branches: list[tuple[int, int, int, int]] = []
        partly: dict[int, Sequence[bool]] = {}  # of those completions that are not learned whole, their flags
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
        """N: tokens that go through the model."""
        return self.input_ids.numel()

    @property
    def num_completion_tokens(self) -> int:
        """M: tokens that a loss can see."""
        return self.targets.numel()

    @property
    def num_supervised_tokens(self) -> int:
        """Those of them that it is to count."""
        return int(self.loss_mask.sum())

    def scatter(self, values: Tensor) -> Tensor:
        """(M,) values of completion tokens -> (B, T), zero where there is no token."""
        flat = values.new_zeros(self.completion_mask.numel())
        return flat.index_copy(0, self.slots, values).view(self.completion_mask.shape)

    def completion_ids(self) -> Tensor:
        """(B, T) completion tokens, 0 where there is none."""
        return self.scatter(self.targets)

    def padded(self) -> PaddedBatch:
        """The same sequences one to a row, padded on the right, for models that cannot read the stream."""
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
        return self if self.input_ids.device == torch.device(device) else _move(self, device)


class PaddedBatch(NamedTuple):
    """`PackedBatch.padded()`: B rows of L columns. Padding is told by the mask alone; its id means nothing."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L) long, 1 = real
    predict_rows: Tensor  # (M,) as in PackedBatch, into the flattened (B * L) rows
    last_rows: Tensor  # (B,)


def _supervised(
    number: int, completions: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]] | None = None
) -> Sequence[Sequence[bool] | None]:
    """The flags of each completion of group `number`, checked; None for a completion that is learned whole."""
    if supervised is None:
        return [None] * len(completions)
    lengths, flag_lengths = [len(completion) for completion in completions], [len(flags) for flags in supervised]
    if flag_lengths != lengths:
        raise ValueError(
            f"group {number}: completions of {lengths} tokens and flags for {flag_lengths}, expected as many"
        )
    if not all(any(flags) for flags in supervised):
        raise ValueError(f"group {number}: a completion has no token to learn, expected at least one")
    return [None if all(flags) else flags for flags in supervised]


def _worth_sharing(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> bool:
    longest = max(len(completion) for completion in completions)
    return len(prompt) >= _SHARE_MIN_PROMPT and len(prompt) >= _SHARE_MIN_RATIO * longest


def stream_length(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> int:
    """How many tokens `pack` makes of one prompt and its completions."""
    shared = len(completions) < 2 or _worth_sharing(prompt, completions)
    return len(prompt) * (1 if shared else len(completions)) + sum(map(len, completions))


def _attention_layout(
    runs: list[tuple[int, int]], branches: list[tuple[int, int, int, int]], num_tokens: int
) -> AttentionLayout:
    """Divide the stream into attention calls: long runs alone, short ones and the branches of one prompt together."""
    calls: list[tuple[AttentionGroup, Tensor, Tensor]] = []  # with its (G, L) query positions, and which are real

    def call(prefix: Tensor, bucket: list[tuple[int, int]]) -> None:
        queries, real = _positions(bucket)
        if len(bucket) == 1 and len(prefix) == 0:
            group = AttentionGroup(prefix=0, span=bucket[0])
        else:
            keys = torch.cat([prefix.expand(len(bucket), -1), queries], dim=1)
            group = AttentionGroup(prefix=len(prefix), queries=queries, keys=keys)
        calls.append((group, queries, real))

    nothing = torch.empty(0, dtype=torch.long)
    for run in runs:
        if run[1] - run[0] >= _SHORT_RUN:
            call(nothing, [run])
    for bucket in _by_length([run for run in runs if run[1] - run[0] < _SHORT_RUN]):
        call(nothing, bucket)
    by_prompt: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for prompt_start, prompt_end, start, end in branches:
        by_prompt.setdefault((prompt_start, prompt_end), []).append((start, end))
    for prompt, completions in by_prompt.items():
        for bucket in _by_length(completions):
            call(torch.arange(*prompt), bucket)

    calls.sort(key=lambda item: int(item[1][0, 0]))
    positions = torch.cat([queries.flatten() for _, queries, _ in calls])
    real = torch.cat([real.flatten() for _, _, real in calls])
    restore = torch.empty(num_tokens, dtype=torch.long)
    restore[positions[real]] = real.nonzero().squeeze(1)
    in_order = len(positions) == num_tokens and bool((restore == torch.arange(num_tokens)).all())
    return AttentionLayout(tuple(group for group, _, _ in calls), None if in_order else restore)


def _by_length(stretches: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Buckets of stretches whose lengths differ by at most `_LENGTH_SLACK` of the longest."""
    buckets: list[list[tuple[int, int]]] = []
    longest = 0
    for start, end in sorted(stretches, key=lambda stretch: stretch[0] - stretch[1]):
        if buckets and end - start >= (1 - _LENGTH_SLACK) * longest:
            buckets[-1].append((start, end))
        else:
            longest = end - start
            buckets.append([(start, end)])
    return buckets


def _positions(stretches: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(G, L) stream positions, shorter rows repeating their last one, and (G, L) bool, True = not such a repeat."""
    starts = torch.tensor([start for start, _ in stretches])[:, None]
    ends = torch.tensor([end for _, end in stretches])[:, None]
    positions = starts + torch.arange(max(end - start for start, end in stretches))
    return torch.minimum(positions, ends - 1), positions < ends


def _move(value, device):
    """Tensors of nested dataclasses and tuples, moved."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, PackedBatch | AttentionLayout | AttentionGroup):
        return replace(value, **{field.name: _move(getattr(value, field.name), device) for field in fields(value)})
    if isinstance(value, tuple) and value and isinstance(value[0], AttentionGroup):
        return tuple(_move(item, device) for item in value)
    return value
