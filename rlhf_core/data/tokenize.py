"""Records to token ids: the prompt and each completion on their own, and EOS supervised exactly once.

Prompt and completion are never tokenised as one text and cut apart afterwards: a token may bridge the border, and then
neither side is what the model sees when it writes a completion to a prompt, token by token. The same holds for every
turn of a conversation that is learned, and for every step of an answer in steps.

Plain text is data. The name of a special token that somebody typed in it ("<s>", "<|im_end|>") is read as the
characters it is made of (`split_special_tokens`, which changes nothing else in the fast and the Python tokenizers of
transformers 5.23), so that it cannot end a prompt or open a turn. In a conversation the template writes real special
tokens, and a typed one cannot be told from them: such a conversation is left out. Both are counted in a warning.
"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, groupby, islice, pairwise, takewhile
from typing import TYPE_CHECKING, Literal

from rlhf_core.data.account import Account
from rlhf_core.data.chat import check_tools, render, split_turns
from rlhf_core.data.formats import DataError, Record

if TYPE_CHECKING:  # transformers is slow to import, and nothing here needs more of it than the tokenizer it is given
    from transformers import GenerationConfig, PreTrainedTokenizerBase

logger = logging.getLogger("rlhf_core.data")

RECORDS_PER_CALL = 1000  # a fast tokenizer is fastest on lists, but holds every detail of each list it works on


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its completions as token ids."""

    prompt: list[int]  # never empty; starts with BOS where the tokenizer or the template has one
    completions: tuple[list[int], ...]  # each ends with a stop id, which is a token to learn like any other
    record: Record  # what it was made from
    weight: float = 1.0  # how much the row counts
    margin: float | None = None  # how much better the first completion is than the second, where the row says so
    supervised: tuple[list[bool], ...] | None = None  # for each completion, which tokens are learned; None: all
    step_ends: tuple[int, ...] | None = None  # place in completion 0 of the last token of each step
    step_labels: tuple[bool, ...] | None = None  # whether each step is right


def stop_ids(
    tokenizer: "PreTrainedTokenizerBase", generation_config: "GenerationConfig | None" = None
) -> frozenset[int]:
    """Every id that ends a completion: the tokenizer's EOS and those of the checkpoint's generation config.

    Raises DataError when neither names one: a completion without an end cannot be learned or sampled.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    found = {*configured, tokenizer.eos_token_id} - {None}
    if not found:
        raise DataError("neither the tokenizer nor the generation config has an EOS token; set tokenizer.eos_token")
    return frozenset(found)


def encode_records(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stop_ids: Collection[int],
    max_length: int | None = None,
    truncation: Literal["prompt", "drop", "error"] = "prompt",
    chat_template: str | None = None,
    account: Account | None = None,
) -> list[Example]:
    """Tokenise records, in order.

    stop_ids: the ids that end a completion (see the function `stop_ids`).
    max_length: tokens that prompt and longest completion may have together.
    truncation: what becomes of a longer record. "prompt": the prompt is cut on the left, its BOS kept, and the
        completion stays whole; of a conversation with several turns to learn, the first become prompt and are cut with
        it; a record whose last turn leaves no room for a token before it is dropped; plain text is cut on the right.
        "drop": the record is dropped. "error": it is an error. All is counted in a warning.
    chat_template: Jinja text for records that are messages; None takes the tokenizer's own.
    account: told of every record that is dropped or cut, in place of warnings; nothing left is then no error.

    Raises DataError for a completion without tokens, an empty prompt where there is no BOS to stand for it, messages
    that cannot be rendered, a tokenizer without EOS, and when nothing is left.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}, expected at least 2: a token of prompt and one of completion")
    marks = _read_marks(tokenizer, stop_ids)
    losses = Account() if account is None else account
    usable = _without_typed_special_tokens(records, marks, losses)
    examples = [
        example
        for is_chat, run in groupby(usable, key=_is_chat)
        for batch in iter(lambda run=run: list(islice(run, RECORDS_PER_CALL)), [])
        for example in _encode_batch(batch, tokenizer, marks, is_chat=is_chat, chat_template=chat_template)
    ]
    fitting = examples if max_length is None else _fit(examples, max_length, truncation, marks, losses)
    if account is None:
        if not fitting:
            raise DataError(losses.nothing_left())
        for line in losses.losses(len(records)):
            logger.warning(line)
    return fitting


# -------------------------------------------------------------------------------------------- the tokenizer's own marks


@dataclass(frozen=True, slots=True)
class _Marks:
    """The special tokens of a tokenizer, by their use here."""

    opening: list[int]  # what the tokenizer puts before every text: [BOS], often nothing
    start: list[int]  # what stands where a prompt has no token of its own: the opening, else [BOS], else nothing
    bos: int | None
    eos: int  # what is written after a completion that does not end with a stop id
    stop_ids: frozenset[int]
    stop_names: dict[str, int]  # those stop ids which are special tokens, by how they are written
    special_tokens: re.Pattern[str]  # finds the written form of any special token


def _read_marks(tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int]) -> _Marks:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token to end completions with; set tokenizer.eos_token")
    names = {*tokenizer.all_special_tokens}
    added = tokenizer.added_tokens_decoder.items()  # a stop token may have been added without being called special
    names |= {token.content for id, token in added if token.special or id in stop_ids}
    names = sorted(filter(str.strip, names), key=len, reverse=True)  # longest first; never mere whitespace
    stop_names = {tokenizer.convert_ids_to_tokens(stop_id): stop_id for stop_id in sorted(stop_ids)}
    opening = _opening(tokenizer)
    return _Marks(
        opening=opening,
        start=opening or [token for token in [tokenizer.bos_token_id] if token is not None],
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        stop_ids=frozenset(stop_ids),
        stop_names={name: stop_names[name] for name in names if name in stop_names},
        special_tokens=re.compile("|".join(map(re.escape, names)) or "(?!)"),  # (?!) never matches
    )


def _opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that a tokenizer adds before a text. What it adds after one (BERT's [SEP], T5's EOS) is not wanted."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1] == 1, marked)]


# ------------------------------------------------------------------------------------------- special tokens in the data


_TYPED_IN_CHAT = "a special token is typed in a message, where it cannot be told from the chat template's own"
_TYPED_IN_TEXT = (
    "a special token is typed in the text: it is read as text, not as the token; if it is meant as markup, give the "
    "data as messages"
)


def _is_chat(record: Record) -> bool:
    return isinstance(record.prompt, list)


def _without_typed_special_tokens(records: Sequence[Record], marks: _Marks, account: Account) -> list[Record]:
    """Leave out conversations with a special token typed in a message; tell of these and of texts with one."""
    kept: list[Record] = []
    for record in records:
        typed = marks.special_tokens.search(_text_of_people(record, marks)) is not None
        if typed and _is_chat(record):
            account.drop(_TYPED_IN_CHAT, record.source)
            continue
        if typed:
            account.note(_TYPED_IN_TEXT, record.source)
        kept.append(record)
    return kept


def _text_of_people(record: Record, marks: _Marks) -> str:
    """All that people wrote in a record. A stop token at the very end of a text is its end, and is left aside."""
    if not _is_chat(record):
        return "\0".join([record.prompt or "", *(_split_ending(text, marks)[0] for text in record.completions)])
    messages = [*record.prompt, *(message for completion in record.completions for message in completion)]
    if all(len(message) == 2 for message in messages) and record.tools is None:
        return "\0".join(message["content"] for message in messages)
    return "\0".join(_strings([messages, record.tools]))


def _strings(value: object) -> Iterator[str]:
    """Every text in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _split_ending(text: str, marks: _Marks) -> tuple[str, int | None]:
    """Take the written end off a completion: "Yes.<|im_end|>\\n" -> ("Yes.", its id), "Yes." -> ("Yes.", None).

    Whitespace after a stop token comes after the end, so it goes too. An end written twice is still one end.
    """
    trimmed = text.rstrip()
    for name, stop_id in marks.stop_names.items():
        if trimmed.endswith(name):
            return _split_ending(trimmed.removesuffix(name), marks)[0], stop_id
    return text, None


# ------------------------------------------------------------------------------------------------------------- encoding


@dataclass(slots=True)
class _Piece:
    """A part of a completion that is tokenised on its own."""

    text: str
    end: int | None = None  # the stop id that follows it
    learned: bool = True
    after: str = ""  # the name of the special token that stands before it, which the piece before ends with


def _encode_batch(
    records: list[Record],
    tokenizer: "PreTrainedTokenizerBase",
    marks: _Marks,
    *,
    is_chat: bool,
    chat_template: str | None,
) -> Iterator[Example]:
    """Encode records which are all messages or all text, in one call of the tokenizer."""
    write = partial(_write_chat, tokenizer=tokenizer, chat_template=chat_template) if is_chat else _write_text
    written = [write(record, marks=marks) for record in records]
    pieces = [piece for _, completions in written for completion in completions for piece in completion]
    texts = [*(prompt for prompt, _ in written), *(piece.after + piece.text for piece in pieces)]
    # Control tokens in a rendered conversation are the template's; in text they are characters somebody typed.
    encoded = iter(_token_ids(texts, tokenizer, split_special_tokens=not is_chat))
    prompt_ids = list(islice(encoded, len(records)))
    for record, prompt, (_, completions) in zip(records, prompt_ids, written, strict=True):
        parts = [_piece_ids(pieces, list(islice(encoded, len(pieces))), record, marks) for pieces in completions]
        prompt, tokens = _with_start(prompt, tuple(list(chain.from_iterable(ids)) for ids in parts), record, marks)
        supervised = None
        if not all(piece.learned for pieces in completions for piece in pieces):
            supervised = tuple(map(_flags, completions, parts))
        yield Example(
            prompt=prompt,
            completions=tokens,
            record=record,
            weight=record.weight,
            margin=record.margin,
            supervised=supervised,
            step_ends=_step_ends(parts[0], len(tokens[0])) if record.steps else None,
            step_labels=record.step_labels,
        )


def _step_ends(parts: list[list[int]], length: int) -> tuple[int, ...]:
    """Where each step ends in a completion of so many tokens; text without a BOS has given its first one away."""
    given = sum(map(len, parts)) - length
    return tuple(max(end - given, 1) - 1 for end in accumulate(map(len, parts)))


def _flags(pieces: list[_Piece], ids: list[list[int]]) -> list[bool]:
    return [piece.learned for piece, part in zip(pieces, ids, strict=True) for _ in part]


def _piece_ids(pieces: list[_Piece], encoded: list[list[int]], record: Record, marks: _Marks) -> list[list[int]]:
    """The tokens of each piece of a completion, its end among them; the last has a stop id at its end, once."""
    found = []
    for piece, ids in zip(pieces, encoded, strict=True):
        ids = ids[1:] if piece.after else ids
        if piece.learned and not ids:
            raise DataError(f"{record.source}: a completion has no token before its end, expected text to learn from")
        found.append(ids if piece.end is None else [*ids, piece.end])
    if found[-1][-1] not in marks.stop_ids:
        found[-1].append(marks.eos)
    return found


def _token_ids(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, split_special_tokens: bool
) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the same as below, without a Python object for every detail of every token
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning of texts that are longer than the model's context; max_length sees to them
    )["input_ids"]


def _write_text(record: Record, *, marks: _Marks) -> tuple[str, list[list[_Piece]]]:
    """(prompt, completions in pieces) of a record of text: one piece a completion, or one a step."""
    return record.prompt or "", [_pieces(record.steps or (text,), marks) for text in record.completions]


def _pieces(texts: Sequence[str], marks: _Marks) -> list[_Piece]:
    """All of them learned; an end written behind the last is its end."""
    last, end = _split_ending(texts[-1], marks)
    return [*map(_Piece, texts[:-1]), _Piece(last, end)]


def _write_chat(
    record: Record, *, marks: _Marks, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None
) -> tuple[str, list[list[_Piece]]]:
    """(prompt, completions in pieces) of a record of messages, as the chat template writes them."""
    options = dict(chat_template=chat_template, tools=record.tools)
    try:
        if not record.completions:
            check_tools(record.prompt, tokenizer=tokenizer, **options)
            return render(record.prompt, tokenizer, add_generation_prompt=True, **options), []
        turns = [
            split_turns(record.prompt, answer, tokenizer, special_tokens=marks.special_tokens, **options)
            for answer in record.completions
        ]
        if record.steps:
            return turns[0][0], [_pieces(_step_texts(turns[0][1], record.steps), marks)]
    except DataError as error:
        raise DataError(f"{record.source}: {error}") from error
    return turns[0][0], [_turn_pieces(texts[1:], marks) for texts in turns]


def _step_texts(written: str, steps: tuple[str, ...]) -> list[str]:
    """An answer in steps as a template wrote it, cut between the steps."""
    start = written.find("".join(steps).rstrip())
    if start < 0:
        raise DataError("the chat template changes the text of an answer, so that its steps are lost; choose another")
    lengths = [start + len(steps[0]), *map(len, steps[1:-1])]
    borders = [0, *accumulate(lengths[: len(steps) - 1]), len(written)]
    return [written[start:end] for start, end in pairwise(borders)]


def _turn_pieces(texts: list[str], marks: _Marks) -> list[_Piece]:
    """[turn, between, turn, ...] -> the turns, each with its end, and what stands between them, which is not learned.

    A turn ends with its stop token, wherever the template's turn may end; the last is given one if it has none. What
    follows is tokenised behind that token, as it will be when the conversation goes on.
    """
    pieces: list[_Piece] = []
    for turn, between in zip(texts[:-1:2], texts[1::2], strict=True):
        text, _ = _split_ending(turn, marks)
        rest = (turn + between)[len(text) :]
        name = next((name for name in marks.stop_names if rest.startswith(name)), "")
        pieces += [
            _Piece(text, marks.stop_names.get(name)),
            _Piece(rest.removeprefix(name), learned=False, after=name),
        ]
    return [*pieces, *_pieces(texts[-1:], marks)]


def _with_start(
    prompt: list[int], completions: tuple[list[int], ...], record: Record, marks: _Marks
) -> tuple[list[int], tuple[list[int], ...]]:
    """Give the prompt its first token, once: the tokenizer's before text, the template's own in a conversation."""
    if _is_chat(record):
        twice = prompt[:2] == [marks.bos, marks.bos]
        return prompt[1:] if twice else prompt, completions
    prompt = [*marks.opening, *prompt] or marks.start
    if record.prompt is None and not prompt:
        # Plain text without a BOS: nothing can predict its first token, so that one is given and the rest is learned.
        prompt, completions = completions[0][:1], (completions[0][1:],)
    if not prompt:
        raise DataError(f"{record.source}: the prompt is empty, and the tokenizer has no BOS token to stand for it")
    return prompt, completions


# ----------------------------------------------------------------------------------------------------------- truncation


def _fit(examples: list[Example], max_length: int, truncation: str, marks: _Marks, account: Account) -> list[Example]:
    """Cut, drop or refuse what is longer than max_length, and count it."""
    fitting: list[Example] = []
    for example in examples:
        length, source = _length(example), example.record.source
        if length <= max_length:
            fitting.append(example)
            continue
        if truncation == "error":
            raise DataError(
                f"{source}: prompt and completion have {length} tokens, expected at most "
                f"max_length={max_length} (--data.truncation prompt cuts them, drop leaves them out)"
            )
        shorter = None if truncation == "drop" else _cut(example, max_length, marks)
        if shorter is None:
            reason = "longer than" if truncation == "drop" else "the completion leaves no room for a prompt in"
            tokens = len(example.prompt) + sum(map(len, example.completions))
            account.drop(f"{reason} max_length={max_length}", source, tokens)
            continue
        what = "plain text on the right" if example.record.prompt is None else "the prompt on the left"
        account.cut_off(f"{what}, to max_length={max_length}", source, length - _length(shorter))
        fitting.append(shorter)
    return fitting


def _length(example: Example) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(example.prompt) + max(map(len, example.completions), default=0)


def _cut(example: Example, max_length: int, marks: _Marks) -> Example | None:
    """The example in at most max_length tokens; None when it cannot be had."""
    if example.record.prompt is None:  # text has no completion to keep whole: its beginning is as good as any part
        room = max_length - len(example.prompt)
        if room <= 0:
            return None
        example = replace(example, completions=(example.completions[0][:room],))
        if example.step_ends is None:
            return example
        ends = tuple(end for end in example.step_ends if end < room) or (room - 1,)
        return replace(example, step_ends=ends, step_labels=example.step_labels[: len(ends)])
    if example.supervised is not None:
        example = _later_turns(example, max_length - len(marks.start) - 1)
    prompt = _cut_left(example.prompt, max_length - max(map(len, example.completions), default=0), marks)
    return None if prompt is None else replace(example, prompt=prompt)


def _later_turns(example: Example, room: int) -> Example:
    """As many of the last turns as there is room for; those before become prompt."""
    (tokens,), (flags,) = example.completions, example.supervised
    starts = [place for place in range(1, len(flags)) if flags[place] and not flags[place - 1]]
    first = next((place for place in [0, *starts] if len(flags) - place <= room), starts[-1])
    kept = flags[first:]
    return replace(
        example,
        prompt=example.prompt + tokens[:first],
        completions=(tokens[first:],),
        supervised=None if all(kept) else (kept,),
    )


def _cut_left(prompt: list[int], room: int, marks: _Marks) -> list[int] | None:
    """The end of a prompt, `room` tokens long with its BOS kept in front; None when no token after BOS fits."""
    if len(prompt) <= room:
        return prompt
    start = marks.start if prompt[: len(marks.start)] == marks.start else []
    kept = room - len(start)
    return start + prompt[-kept:] if kept > 0 else None
