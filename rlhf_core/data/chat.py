"""Messages to text: chat templates, applied once, and the borders of what the model is to answer for.

A template is a small Jinja program that comes with a tokenizer and writes a conversation down as the model was taught
to see it. Training needs one thing more than chatting: to know which parts of that text are the model's. They are found
by writing the conversation turn by turn: up to where an answer is wanted, then with the answer, and checking that each
text is the beginning of the next. Where the author of a template has marked the model's part with `{% generation %}`,
both must agree.
"""

import re
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.data.formats import DataError, Message
from rlhf_core.data.messages import is_learned

if TYPE_CHECKING:  # transformers is slow to import, and nothing here needs more of it than the tokenizer it is given
    from transformers import PreTrainedTokenizerBase

# "User: ...\n\nAssistant: ..." for models without a template of their own. The text of a prompt, generation prompt
# included, is always the beginning of the text of the whole. A tokenizer without a BOS token writes none.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
BUILT_IN_TEMPLATES = {"plain": PLAIN_TEMPLATE}

_CHOOSE_TEMPLATE = f"--data.chat-template FILE.jinja, or a built-in name in its place ({', '.join(BUILT_IN_TEMPLATES)})"


def load_chat_template(name_or_path: str | Path) -> str:
    """The Jinja text of a template, by its built-in name ("plain") or from a file. Raises DataError for neither."""
    if str(name_or_path) in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        built_in = ", ".join(BUILT_IN_TEMPLATES)
        raise DataError(f"chat template {name_or_path}: no such file, and no such built-in name (there is: {built_in})")
    template = path.read_text(encoding="utf-8")
    if not template.strip():
        raise DataError(f"chat template {name_or_path}: the file is empty, expected a Jinja template")
    return template


Tools = list[dict[str, Any]]


def render(
    messages: list[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool,
    tools: Tools | None = None,
) -> str:
    """Write a conversation down as text.

    chat_template: Jinja text (see `load_chat_template`); None takes the tokenizer's own.
    add_generation_prompt: whether to add what comes before an assistant's answer.
    tools: JSON schemas that the template is to tell the model of.
    Raises DataError when there is no template, or when the template refuses the conversation, with its reason.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise DataError(f"the data are messages, but the tokenizer has no chat template; give one: {_CHOOSE_TEMPLATE}")
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program of its author's and may fail in any way
        raise DataError(
            f"the chat template refuses a conversation of {len(messages)} messages ({type(error).__name__}: {error}); "
            f"mend the conversation, or choose another template: {_CHOOSE_TEMPLATE}"
        ) from error


def split_turns(
    prompt: list[Message],
    completion: list[Message],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None = None,
    tools: Tools | None = None,
    special_tokens: re.Pattern[str] = re.compile("(?!)"),
) -> list[str]:
    """A conversation as its template writes it, cut where the model's parts begin and end.

    Returns [prompt, turn] for a completion of one assistant message, and [prompt, turn, between, turn, ..., turn] for
    one of several, which begins and ends with an assistant's: turns at the odd places are the model's. The prompt's
    text ends with the generation prompt, as does every text between, so that training sees what sampling will see.
    special_tokens: finds the written form of the tokenizer's.

    Raises DataError when the conversation up to an answer is not the beginning of the conversation with it. Such a
    template (one that drops earlier reasoning from the history, say) writes a prompt in training that the model never
    meets in use. Raises it too when the template leaves out an answer, calls of tools, or what they returned, and when
    its own `{% generation %}` marks something else.
    """
    messages = [*prompt, *completion]
    write = dict(tokenizer=tokenizer, chat_template=chat_template, tools=tools)
    whole = render(messages, add_generation_prompt=False, **write)
    borders: list[int] = []  # where each turn of the model begins and ends in `whole`
    for place in range(len(prompt), len(messages)):
        if is_learned(messages[place]):
            before = render(messages[:place], add_generation_prompt=True, **write)
            last = place == len(messages) - 1
            after = whole if last else render(messages[: place + 1], add_generation_prompt=False, **write)
            _check_prefix(before, after, "the text up to an answer, with its generation prompt,", last=True)
            _check_prefix(after, whole, "the text up to the end of an answer", last=last)
            if len(after) == len(before):
                raise DataError(
                    f"the chat template writes nothing for the assistant; choose another: {_CHOOSE_TEMPLATE}"
                )
            borders += [len(before), len(after)]
    check_tools(messages, **write)
    most = sum(message["role"] == "assistant" for message in completion)
    _check_marks(messages, whole, borders, special_tokens=special_tokens, most=most, **write)
    return [whole[start:end] for start, end in zip([0, *borders], borders, strict=False)]


def _check_prefix(beginning: str, whole: str, what: str, *, last: bool) -> None:
    if not whole.startswith(beginning):
        shared = len(commonprefix([beginning, whole]))
        way_out = "or give prompt and completion as text" if last else "or learn the last turn alone: --data.turns last"
        raise DataError(
            f"the chat template is not prefix-preserving: {what} ({len(beginning)} characters) and that of the whole "
            f"conversation differ from character {shared + 1} on. "
            f"Choose a template that is: {_CHOOSE_TEMPLATE}; {way_out}"
        )


def check_tools(
    messages: list[Message], *, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, tools: Tools | None
) -> None:
    """Tools, calls and results that a template knows nothing of vanish without a word: the text is as without them."""
    write = dict(tokenizer=tokenizer, chat_template=chat_template, tools=tools)
    trials: list[tuple[str, list[Message], dict[str, Any]]] = []
    if tools:
        trials.append(("the tools of the conversation", messages, {"tools": None}))
    for what, role, key in (("a call of tools", "assistant", "tool_calls"), ("a tool's result", "tool", "content")):
        place = next((i for i, message in enumerate(messages) if message["role"] == role and message.get(key)), None)
        if place is not None:  # the first shows it
            trials.append((what, [*messages[:place], messages[place] | {key: ""}], {}))
    for what, without, change in trials:
        told = render(messages[: len(without)], add_generation_prompt=False, **write)
        try:
            silent = render(without, add_generation_prompt=False, **write | change)
        except DataError:  # a template that misses something reads it
            continue
        if silent == told:
            raise DataError(
                f"the chat template leaves out {what}: the model would never see it. Choose a template that knows of "
                f"tools: {_CHOOSE_TEMPLATE}"
            )


_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _check_marks(
    messages: list[Message],
    whole: str,
    borders: list[int],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None,
    tools: Tools | None,
    special_tokens: re.Pattern[str],
    most: int,
) -> None:
    """Where the template marks the model's part itself, each turn found must be a marked one, and no more be marked.

    most: how many turns of the model there are from the first learned one on, learned or not.

    White space and special tokens at the edges may be on either side of a mark: authors differ in whether the end of a
    turn, or the line break after it, belongs to it.
    """
    template = tokenizer.get_chat_template(chat_template, tools)
    if not _MARK.search(template):
        return
    from transformers.utils.chat_template_utils import render_jinja_template  # with a tokenizer here, it is loaded

    options = dict(tools=tools, chat_template=template, **tokenizer.special_tokens_map)
    [text], [marks] = render_jinja_template([messages], return_assistant_tokens_mask=True, **options)
    turns = list(zip(borders[::2], borders[1::2], strict=True))
    marks = [mark for mark in marks if mark[1] > turns[0][0]]  # those before are not learned

    def same(turn: tuple[int, int], mark: tuple[int, int]) -> bool:
        differing = (whole[min(edges) : max(edges)] for edges in zip(turn, mark, strict=True))
        return not any(special_tokens.sub("", text).strip() for text in differing)

    missing = [turn for turn in turns if not any(same(turn, mark) for mark in marks)]
    if text != whole or missing or len(marks) > most:
        raise DataError(
            f"the chat template marks as the model's ({{% generation %}}) the characters {_ranges(marks)}; written "
            f"turn by turn, the conversation has the model's turns at {_ranges(turns)}. Mend the marks, or take them "
            f"out; or choose another template: {_CHOOSE_TEMPLATE}"
        )


def _ranges(spans: list[tuple[int, int]]) -> str:
    return ", ".join(f"{start + 1} to {end}" for start, end in spans) or "none"
