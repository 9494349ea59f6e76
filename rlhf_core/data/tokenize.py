"""Records to token ids: the prompt and each completion on their own, and EOS supervised exactly once.

Prompt and completion are never tokenised as one text and cut apart afterwards: a token may bridge the border, and then
neither side is what the model sees when it writes a completion to a prompt, token by token.

Plain text is data. The name of a special token that somebody typed in it ("<s>", "<|im_end|>") is read as the
characters it is made of (`split_special_tokens`, which changes nothing else in the fast and the Python tokenizers of
transformers 5.23), so that it cannot end a prompt or open a turn. In a conversation the template writes real special
tokens, and a typed one cannot be told from them: such a conversation is left out. Both are counted in a warning.
"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, takewhile
from typing import TYPE_CHECKING

from rlhf_core.data.chat import render, split_conversation
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
    chat_template: str | None = None,
) -> list[Example]:
    """Tokenise records, in order.

    stop_ids: the ids that end a completion (see the function `stop_ids`).
    max_length: tokens that prompt and longest completion may have together. Prompts are cut on the left, their BOS
        kept; completions stay whole; a record whose completion leaves no room for a token of its prompt is dropped.
        Plain text is cut on the right. All is counted in a warning.
    chat_template: Jinja text for records that are messages; None takes the tokenizer's own.

    Raises DataError for a completion without tokens, an empty prompt where there is no BOS to stand for it, messages
    that cannot be rendered, a tokenizer without EOS, and when nothing is left.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}, expected at least 2: a token of prompt and one of completion")
    marks = _read_marks(tokenizer, stop_ids)
    usable = _without_typed_special_tokens(records, marks)
    examples = [
        example
        for is_chat, run in groupby(usable, key=_is_chat)
        for batch in iter(lambda run=run: list(islice(run, RECORDS_PER_CALL)), [])
        for example in _encode_batch(batch, tokenizer, marks, is_chat=is_chat, chat_template=chat_template)
    ]
    fitting = examples if max_length is None else _fit(examples, max_length, marks)
    if not fitting:
        refused = len(records) - len(usable)
        reasons = [f"{refused} x a special token typed in a message"] * bool(refused)
        reasons += [f"{len(examples)} x no room for the prompt in max_length={max_length}"] * bool(examples)
        raise DataError(f"0 of {len(records)} rows left: {', '.join(reasons) or 'none were given'}")
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
    names |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
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


def _is_chat(record: Record) -> bool:
    return isinstance(record.prompt, list)


def _without_typed_special_tokens(records: Sequence[Record], marks: _Marks) -> list[Record]:
    """Leave out conversations with a special token typed in a message; warn of these and of texts with one."""
    kept: list[Record] = []
    refused: list[str] = []
    as_text: list[str] = []
    for record in records:
        typed = marks.special_tokens.search(_text_of_people(record, marks)) is not None
        if typed:
            (refused if _is_chat(record) else as_text).append(record.source)
        if not (typed and _is_chat(record)):
            kept.append(record)
    if refused:
        logger.warning(
            f"dropped {len(refused)} of {len(records)} records: a special token is typed in a message, where it cannot "
            f"be told from the chat template's own (first: {refused[0]})"
        )
    if as_text:
        logger.warning(
            f"{len(as_text)} of {len(records)} records have a special token typed in their text: it is read as text, "
            f"not as the token; if it is meant as markup, give the data as messages (first: {as_text[0]})"
        )
    return kept


def _text_of_people(record: Record, marks: _Marks) -> str:
    """All that people wrote in a record. A stop token at the very end of a text is its end, and is left aside."""
    if _is_chat(record):
        messages = [*record.prompt, *(message for completion in record.completions for message in completion)]
        return "\0".join(message["content"] for message in messages)
    return "\0".join([record.prompt or "", *(_split_ending(text, marks)[0] for text in record.completions)])


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


def _encode_batch(
    records: list[Record],
    tokenizer: "PreTrainedTokenizerBase",
    marks: _Marks,
    *,
    is_chat: bool,
    chat_template: str | None,
) -> Iterator[Example]:
    """Encode records which are all messages or all text, in one call of the tokenizer."""
    prompts: list[str] = []
    answers: list[list[tuple[str, int | None]]] = []  # for each record, its completions as (text, written end)
    for record in records:
        prompt, completions = _write_chat(record, tokenizer, chat_template) if is_chat else _write_text(record)
        prompts.append(prompt)
        answers.append([_split_ending(completion, marks) for completion in completions])
    texts = [*prompts, *(text for endings in answers for text, _ in endings)]
    # Control tokens in a rendered conversation are the template's; in text they are characters somebody typed.
    encoded = iter(_token_ids(texts, tokenizer, split_special_tokens=not is_chat))
    prompt_ids = list(islice(encoded, len(records)))
    for record, prompt, endings in zip(records, prompt_ids, answers, strict=True):
        completions = tuple(_ended(next(encoded), end, record, marks) for _, end in endings)
        prompt, completions = _with_start(prompt, completions, record, marks)
        yield Example(prompt=prompt, completions=completions, record=record)


def _token_ids(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, split_special_tokens: bool
) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning of texts that are longer than the model's context; max_length sees to them
    )["input_ids"]


def _write_text(record: Record) -> tuple[str, tuple[str, ...]]:
    return record.prompt or "", record.completions


def _write_chat(
    record: Record, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None
) -> tuple[str, tuple[str, ...]]:
    """(prompt, completions) of a record of messages, as the chat template writes them."""
    try:
        if not record.completions:
            return render(record.prompt, tokenizer, chat_template=chat_template, add_generation_prompt=True), ()
        pairs = [split_conversation(record.prompt, answer, tokenizer, chat_template) for answer in record.completions]
    except DataError as error:
        raise DataError(f"{record.source}: {error}") from error
    return pairs[0][0], tuple(completion for _, completion in pairs)


def _ended(tokens: list[int], written_end: int | None, record: Record, marks: _Marks) -> list[int]:
    """A completion's tokens with one stop id at the end: the one that was written, the one it has, or EOS."""
    if not tokens:
        raise DataError(f"{record.source}: a completion has no token before its end, expected text to learn from")
    if written_end is not None:
        return [*tokens, written_end]
    return tokens if tokens[-1] in marks.stop_ids else [*tokens, marks.eos]


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


def _fit(examples: list[Example], max_length: int, marks: _Marks) -> list[Example]:
    """Cut prompts on the left, and plain text on the right, until they fit; drop, and count, what cannot be made to."""
    fitting: list[Example] = []
    cut: list[str] = []
    dropped: list[str] = []
    texts_cut = 0
    for example in examples:
        if example.record.prompt is None:  # text has no completion to keep whole: its beginning is as good as any part
            room = max_length - len(example.prompt)
            texts_cut += len(example.completions[0]) > room
            fitting.append(replace(example, completions=(example.completions[0][:room],)))
            continue
        room = max_length - max(map(len, example.completions), default=0)
        prompt = _cut_left(example.prompt, room, marks)
        if prompt is None:
            dropped.append(example.record.source)
            continue
        if len(prompt) < len(example.prompt):
            cut.append(example.record.source)
        fitting.append(replace(example, prompt=prompt))
    if texts_cut:
        logger.warning(f"max_length={max_length}: {texts_cut} of {len(examples)} texts were cut on the right")
    if cut or dropped:
        logger.warning(
            f"max_length={max_length}: of {len(examples)} records, {len(cut)} had their prompt cut on the left and "
            f"{len(dropped)} were dropped, because the completion leaves no room for a token of the prompt "
            f"(first: {(cut + dropped)[0]})"
        )
    return fitting


def _cut_left(prompt: list[int], room: int, marks: _Marks) -> list[int] | None:
    """The end of a prompt, `room` tokens long with its BOS kept in front; None when no token after BOS fits."""
    if len(prompt) <= room:
        return prompt
    start = marks.start if prompt[: len(marks.start)] == marks.start else []
    kept = room - len(start)
    return start + prompt[-kept:] if kept > 0 else None
