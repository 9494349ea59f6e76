"""Records to token ids: the prompt and each completion separately, and EOS supervised exactly once.

Prompt and completion are never tokenised as one text that is split afterwards: a token could span the border, and then
neither side would be what the model sees when it samples a completion token by token. The same holds for every
supervised turn of a conversation, and for every step of a completion in steps.

Plain text is data. The name of a special token that is typed in it ("<s>", "<|im_end|>") is tokenised as ordinary
characters (`split_special_tokens`, which changes nothing else in the fast and the Python tokenizers of transformers
5.23), so that it cannot end a prompt or open a turn. In a conversation the template writes real special tokens, from
which a typed one cannot be distinguished: such a conversation is dropped. Both are counted in a warning.
"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, islice, pairwise, takewhile
from typing import TYPE_CHECKING, Literal

from rlhf_core.data.account import Account
from rlhf_core.data.chat import check_tools, render, split_turns
from rlhf_core.data.errors import DataError
from rlhf_core.data.records import Example, Record
from rlhf_core.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # transformers is slow to import
    from transformers import GenerationConfig

logger = logging.getLogger("rlhf_core.data")

RECORDS_PER_CALL = 1000  # a fast tokenizer is fastest on lists, but keeps all offsets of a list in memory


def stop_ids(tokenizer: Tokenizer, generation_config: "GenerationConfig | None" = None) -> frozenset[int]:
    """Return every id that ends a completion: the tokenizer's EOS and those of the checkpoint's generation config.

    Raises DataError when there is none: completions need an end, in training and in sampling.
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
    tokenizer: Tokenizer,
    *,
    stop_ids: Collection[int],
    max_length: int | None = None,
    truncation: Literal["prompt", "drop", "error"] = "prompt",
    chat_template: str | None = None,
    account: Account | None = None,
) -> list[Example]:
    """Tokenise records, in order.

    Args:
        stop_ids: the ids that end a completion (see the function `stop_ids`).
        max_length: the most tokens that a prompt and its longest completion may have together.
        truncation: the treatment of longer records. "prompt": cut the prompt on the left, keep its BOS and the whole
            completion; in a conversation with several supervised turns the first become prompt and are cut with it; a
            record whose last turn leaves no room for a token before it is dropped; plain text is cut on the right.
            "drop": drop the record. "error": raise. All are counted in a warning.
        chat_template: Jinja text for records that are messages; None takes the tokenizer's own.
        account: where to count the records that are dropped or cut, instead of logging warnings; that no record is
            left is then no error.

    Raises:
        DataError: a completion without tokens, an empty prompt and no BOS to replace it, messages that cannot be
            rendered, a tokenizer without EOS, or no record left.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}, expected at least 2: a token of prompt and one of completion")
    marks = _read_marks(tokenizer, stop_ids)
    counts = Account() if account is None else account
    usable = _without_typed_special_tokens(records, marks, counts)
    examples = [
        example
        for is_chat, run in groupby(usable, key=_is_chat)
        for batch in _chunks(run, RECORDS_PER_CALL)
        for example in _encode_batch(batch, tokenizer, marks, is_chat=is_chat, chat_template=chat_template)
    ]
    fitting = examples if max_length is None else _fit(examples, max_length, truncation, marks, counts)
    if account is None:
        if not fitting:
            raise DataError(counts.nothing_left())
        for line in counts.warnings(len(records)):
            logger.warning(line)
    return fitting


def _chunks(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while chunk := list(islice(records, size)):
        yield chunk


# --------------------------------------------------------------------------------------- the tokenizer's special tokens


@dataclass(frozen=True, slots=True)
class _Marks:
    """The special tokens of a tokenizer, by their use here."""

    opening: list[int]  # the tokenizer adds these before every text: [BOS], often nothing
    start: list[int]  # replaces a prompt without tokens: the opening, else [BOS], else nothing
    bos: int | None
    eos: int  # appended to a completion that does not end with a stop id
    stop_ids: frozenset[int]
    stop_names: dict[str, int]  # text -> id of the stop ids that are special tokens
    special_tokens: re.Pattern[str]  # matches the text of any special token


def _read_marks(tokenizer: Tokenizer, stop_ids: Collection[int]) -> _Marks:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token to end completions with; set tokenizer.eos_token")
    added = tokenizer.added_tokens_decoder.items()  # a stop token may have been added without being called special
    special = {token.content for id, token in added if token.special or id in stop_ids}
    special |= set(tokenizer.all_special_tokens)
    names = sorted(filter(str.strip, special), key=len, reverse=True)  # longest first; white space is no name
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


def _opening(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a tokenizer adds before a text, not those that it adds after one (BERT's [SEP], T5's EOS)."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1] == 1, marked)]


# ------------------------------------------------------------------------------------------- special tokens in the data


_TYPED_IN_CHAT = "a special token is typed in a message, where it cannot be distinguished from the chat template's own"
_TYPED_IN_TEXT = (
    "a special token is typed in the text: it is read as text, not as the token; if it is meant as markup, give the "
    "data as messages"
)


def _is_chat(record: Record) -> bool:
    return isinstance(record.prompt, list)


def _without_typed_special_tokens(records: Sequence[Record], marks: _Marks, account: Account) -> list[Record]:
    """Drop conversations with a special token typed in a message; count these and texts with one."""
    kept: list[Record] = []
    for record in records:
        typed = marks.special_tokens.search(_typed_text(record, marks)) is not None
        if typed and _is_chat(record):
            account.drop(_TYPED_IN_CHAT, record.source)
            continue
        if typed:
            account.note(_TYPED_IN_TEXT, record.source)
        kept.append(record)
    return kept


def _typed_text(record: Record, marks: _Marks) -> str:
    """Return all text of a record. A stop token at the very end of a text is its end, and is left out."""
    if not _is_chat(record):
        return "\0".join([record.prompt or "", *(_split_ending(text, marks)[0] for text in record.completions)])
    messages = [*record.prompt, *(message for completion in record.completions for message in completion)]
    if all(len(message) == 2 for message in messages) and record.tools is None:
        return "\0".join(message["content"] for message in messages)
    return "\0".join(_strings([messages, record.tools]))


def _strings(value: object) -> Iterator[str]:
    """Yield every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _split_ending(text: str, marks: _Marks) -> tuple[str, int | None]:
    """Split the end off a completion: "Yes.<|im_end|>\\n" -> ("Yes.", its id), "Yes." -> ("Yes.", None).

    White space after a stop token is removed too. An end that is written twice is still one end.
    """
    trimmed = text.rstrip()
    for name, stop_id in marks.stop_names.items():
        if trimmed.endswith(name):
            return _split_ending(trimmed.removesuffix(name), marks)[0], stop_id
    return text, None


# ------------------------------------------------------------------------------------------------------------- encoding


@dataclass(slots=True)
class _Piece:
    """A part of a completion that is tokenised separately."""

    text: str
    end: int | None = None  # the stop id that follows it
    supervised: bool = True
    after: str = ""  # the text of the special token before it, with which the preceding piece ends


def _encode_batch(
    records: list[Record],
    tokenizer: Tokenizer,
    marks: _Marks,
    *,
    is_chat: bool,
    chat_template: str | None,
) -> Iterator[Example]:
    """Encode records that are all messages or all text, in one call of the tokenizer."""
    written = [
        _write_chat(record, marks, tokenizer, chat_template) if is_chat else _write_text(record, marks)
        for record in records
    ]
    pieces = [piece for _, completions in written for completion in completions for piece in completion]
    texts = [*(prompt for prompt, _ in written), *(piece.after + piece.text for piece in pieces)]
    # Special tokens in a rendered conversation are the template's; in text they are ordinary characters.
    encoded = iter(_token_ids(texts, tokenizer, split_special_tokens=not is_chat))
    prompt_ids = list(islice(encoded, len(records)))
    for record, prompt, (_, completions) in zip(records, prompt_ids, written, strict=True):
        parts = [_piece_ids(pieces, list(islice(encoded, len(pieces))), record, marks) for pieces in completions]
        prompt, tokens = _with_start(prompt, tuple(list(chain.from_iterable(ids)) for ids in parts), record, marks)
        supervised = None
        if not all(piece.supervised for pieces in completions for piece in pieces):
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
    """Return the index of each step's last token in a completion of `length` tokens.

    In text without a BOS the first token has become the prompt, so that the parts have one token more.
    """
    moved = sum(map(len, parts)) - length
    return tuple(max(end - moved, 1) - 1 for end in accumulate(map(len, parts)))


def _flags(pieces: list[_Piece], ids: list[list[int]]) -> list[bool]:
    return [piece.supervised for piece, part in zip(pieces, ids, strict=True) for _ in part]


def _piece_ids(pieces: list[_Piece], encoded: list[list[int]], record: Record, marks: _Marks) -> list[list[int]]:
    """Return the tokens of each piece of a completion, its end included; the last piece ends with one stop id."""
    found = []
    for piece, ids in zip(pieces, encoded, strict=True):
        ids = ids[1:] if piece.after else ids
        if piece.supervised and not ids:
            raise DataError(f"{record.source}: a completion has no token before its end, expected text to learn from")
        found.append(ids if piece.end is None else [*ids, piece.end])
    if found[-1][-1] not in marks.stop_ids:
        found[-1].append(marks.eos)
    return found


def _token_ids(texts: list[str], tokenizer: Tokenizer, *, split_special_tokens: bool) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the same as below, without Python objects for the offsets of every token
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    ids: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts longer than the model's context: max_length handles them
    )["input_ids"]
    return ids


def _write_text(record: Record, marks: _Marks) -> tuple[str, list[list[_Piece]]]:
    """Return the prompt, and each completion in pieces, of a record of text: one piece a completion, or one a step."""
    return record.prompt or "", [_pieces(record.steps or (text,), marks) for text in record.completions]


def _pieces(texts: Sequence[str], marks: _Marks) -> list[_Piece]:
    """Return supervised pieces; a stop token written after the last is its end."""
    last, end = _split_ending(texts[-1], marks)
    return [*map(_Piece, texts[:-1]), _Piece(last, end)]


def _write_chat(
    record: Record, marks: _Marks, tokenizer: Tokenizer, chat_template: str | None
) -> tuple[str, list[list[_Piece]]]:
    """Return the prompt, and each completion in pieces, of a record of messages, as the chat template renders them."""
    tools = record.tools
    try:
        if not record.completions:
            check_tools(record.prompt, tokenizer=tokenizer, chat_template=chat_template, tools=tools)
            prompt = render(
                record.prompt, tokenizer, chat_template=chat_template, add_generation_prompt=True, tools=tools
            )
            return prompt, []
        turns = [
            split_turns(record.prompt, completion, tokenizer, chat_template, tools, marks.special_tokens)
            for completion in record.completions
        ]
        if record.steps:
            return turns[0][0], [_pieces(_step_texts(turns[0][1], record.steps), marks)]
    except DataError as error:
        raise DataError(f"{record.source}: {error}") from error
    return turns[0][0], [_turn_pieces(texts[1:], marks) for texts in turns]


def _step_texts(written: str, steps: tuple[str, ...]) -> list[str]:
    """Split a rendered completion between its steps."""
    start = written.find("".join(steps).rstrip())
    if start < 0:
        raise DataError("the chat template changes the text of an answer, so that its steps are lost; choose another")
    lengths = [start + len(steps[0]), *map(len, steps[1:-1])]
    borders = [0, *accumulate(lengths[: len(steps) - 1]), len(written)]
    return [written[start:end] for start, end in pairwise(borders)]


def _turn_pieces(texts: list[str], marks: _Marks) -> list[_Piece]:
    """Return the pieces of [turn, between, turn, ...]: turns with their ends, and the unsupervised text between them.

    A turn ends with its stop token, wherever the template's turn ends; the last is given one if it has none. The text
    that follows is tokenised after that token, as it is when a conversation continues.
    """
    pieces: list[_Piece] = []
    for turn, between in zip(texts[:-1:2], texts[1::2], strict=True):
        text, _ = _split_ending(turn, marks)
        rest = (turn + between)[len(text) :]
        name = next((name for name in marks.stop_names if rest.startswith(name)), "")
        pieces += [
            _Piece(text, marks.stop_names.get(name)),
            _Piece(rest.removeprefix(name), supervised=False, after=name),
        ]
    return [*pieces, *_pieces(texts[-1:], marks)]


def _with_start(
    prompt: list[int], completions: tuple[list[int], ...], record: Record, marks: _Marks
) -> tuple[list[int], tuple[list[int], ...]]:
    """Give the prompt its first token once: that of the tokenizer for text, that of the template for a conversation."""
    if _is_chat(record):
        twice = prompt[:2] == [marks.bos, marks.bos]
        return prompt[1:] if twice else prompt, completions
    prompt = [*marks.opening, *prompt] or marks.start
    if record.prompt is None and not prompt:
        # Plain text without a BOS: nothing predicts its first token, which therefore becomes the prompt.
        prompt, completions = completions[0][:1], (completions[0][1:],)
    if not prompt:
        raise DataError(f"{record.source}: the prompt is empty, and the tokenizer has no BOS token to replace it")
    return prompt, completions


# ----------------------------------------------------------------------------------------------------------- truncation


def _fit(examples: list[Example], max_length: int, truncation: str, marks: _Marks, account: Account) -> list[Example]:
    """Cut or drop examples longer than max_length, or raise for them, and count them."""
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
    """Return the number of tokens of the prompt and the longest completion."""
    return len(example.prompt) + max(map(len, example.completions), default=0)


def _cut(example: Example, max_length: int, marks: _Marks) -> Example | None:
    """Return the example cut to max_length tokens; None where that is impossible."""
    if example.record.prompt is None:  # plain text has no completion to keep whole
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
    """Keep as many of the last turns as there is room for; those before become prompt."""
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
    """Cut a prompt on the left to `room` tokens, its BOS kept; None when no token after BOS fits."""
    if len(prompt) <= room:
        return prompt
    start = marks.start if prompt[: len(marks.start)] == marks.start else []
    kept = room - len(start)
    return start + prompt[-kept:] if kept > 0 else None
