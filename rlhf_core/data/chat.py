"""Messages to text: apply chat templates once, and find the parts of the text that the model generates.

A template is a Jinja program that comes with a tokenizer and renders a conversation in the format the model was trained
on. Training also needs to know which parts of that text are the model's. They are found by rendering the conversation
turn by turn, up to an answer and with the answer, and checking that each text is a prefix of the next. Where the author
of a template has marked the model's part with `{% generation %}`, both results must agree.
"""

import re
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path

from rlhf_core.data.errors import DataError
from rlhf_core.data.messages import is_supervised
from rlhf_core.data.records import Message, Tools
from rlhf_core.data.tokenizer import Tokenizer

# "User: ...\n\nAssistant: ..." for models without a template of their own. The rendered prompt, generation prompt
# included, is always a prefix of the rendered whole. A tokenizer without a BOS token writes none.
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
    """Return the Jinja text of a template, by its built-in name ("plain") or from a file; DataError for neither."""
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


def render(
    messages: list[Message],
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool,
    tools: Tools | None = None,
) -> str:
    """Render a conversation as text.

    chat_template: Jinja text (see `load_chat_template`); None takes the tokenizer's own.
    add_generation_prompt: whether to add the header of an assistant's answer.
    tools: JSON schemas for the template.
    Raises DataError when there is no template, or when the template fails on the conversation, with its reason.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise DataError(f"the data are messages, but the tokenizer has no chat template; give one: {_CHOOSE_TEMPLATE}")
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text
    except Exception as error:  # a template is a program and may fail in any way
        raise DataError(
            f"the chat template refuses a conversation of {len(messages)} messages ({type(error).__name__}: {error}); "
            f"fix the conversation, or choose another template: {_CHOOSE_TEMPLATE}"
        ) from error


@dataclass(frozen=True, slots=True)
class _Template:
    """The arguments of `render` that are the same for a whole conversation."""

    tokenizer: Tokenizer
    chat_template: str | None
    tools: Tools | None

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        return render(
            messages,
            self.tokenizer,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=self.tools,
        )


def split_turns(
    prompt: list[Message],
    completion: list[Message],
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    tools: Tools | None = None,
    special_tokens: re.Pattern[str] = re.compile("(?!)"),
) -> list[str]:
    """Render a conversation and split the text where the model's turns begin and end.

    Returns [prompt, turn] for a completion of one assistant message, and [prompt, turn, between, turn, ..., turn] for
    one of several, which begins and ends with an assistant's: turns at odd indices are the model's. The prompt's text
    ends with the generation prompt, as does every text between, so that training sees the same text as sampling.
    special_tokens: matches the text of the tokenizer's special tokens.

    Raises DataError when the rendered conversation up to an answer is not a prefix of that with the answer. Such a
    template (one that drops earlier reasoning from the history, say) would train the model on a prompt that it never
    gets when sampling. Also raises it when the template leaves out an answer, tool calls, or their results, and when
    its own `{% generation %}` marks something else.
    """
    messages = [*prompt, *completion]
    template = _Template(tokenizer, chat_template, tools)
    whole = template.render(messages)
    borders: list[int] = []  # start and end of each turn of the model in `whole`
    for i in range(len(prompt), len(messages)):
        if is_supervised(messages[i]):
            before = template.render(messages[:i], add_generation_prompt=True)
            last = i == len(messages) - 1
            after = whole if last else template.render(messages[: i + 1])
            _check_prefix(before, after, "the text up to an answer, with its generation prompt,", last=True)
            _check_prefix(after, whole, "the text up to the end of an answer", last=last)
            if len(after) == len(before):
                raise DataError(
                    f"the chat template writes nothing for the assistant; choose another: {_CHOOSE_TEMPLATE}"
                )
            borders += [len(before), len(after)]
    check_tools(messages, tokenizer=tokenizer, chat_template=chat_template, tools=tools)
    most = sum(message["role"] == "assistant" for message in completion)
    _check_marks(template, messages, whole, borders, special_tokens=special_tokens, most=most)
    return [whole[start:end] for start, end in zip([0, *borders], borders, strict=False)]


def _check_prefix(beginning: str, whole: str, what: str, *, last: bool) -> None:
    if not whole.startswith(beginning):
        shared = len(commonprefix([beginning, whole]))
        way_out = (
            "or give prompt and completion as text" if last else "or train on the last turn alone: --data.turns last"
        )
        raise DataError(
            f"the chat template is not prefix-preserving: {what} ({len(beginning)} characters) and that of the whole "
            f"conversation differ from character {shared + 1} on. "
            f"Choose a template that is: {_CHOOSE_TEMPLATE}; {way_out}"
        )


def check_tools(
    messages: list[Message], *, tokenizer: Tokenizer, chat_template: str | None, tools: Tools | None
) -> None:
    """Raise DataError where a template leaves out tools, calls or results: the text is the same without them."""
    template = _Template(tokenizer, chat_template, tools)
    trials: list[tuple[str, list[Message], _Template]] = []
    if tools:
        trials.append(("the tools of the conversation", messages, replace(template, tools=None)))
    for what, role, key in (("a call of tools", "assistant", "tool_calls"), ("a tool's result", "tool", "content")):
        i = next((i for i, message in enumerate(messages) if message["role"] == role and message.get(key)), None)
        if i is not None:  # testing the first is enough
            trials.append((what, [*messages[:i], messages[i] | {key: ""}], template))
    for what, without, changed in trials:
        complete = template.render(messages[: len(without)])
        try:
            reduced = changed.render(without)
        except DataError:  # a template that fails without it does read it
            continue
        if reduced == complete:
            raise DataError(
                f"the chat template leaves out {what}: the model would never see it. Choose a template that supports "
                f"tools: {_CHOOSE_TEMPLATE}"
            )


_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _check_marks(
    template: _Template,
    messages: list[Message],
    whole: str,
    borders: list[int],
    *,
    special_tokens: re.Pattern[str],
    most: int,
) -> None:
    """Check the template's own marks, if it has any: each turn found must be marked, and nothing else.

    most: how many turns of the model there are from the first supervised one on, supervised or not.

    White space and special tokens at the edges may be on either side of a mark: authors differ in whether the end of a
    turn, or the line break after it, belongs to it.
    """
    tokenizer, tools = template.tokenizer, template.tools
    text_of_template = tokenizer.get_chat_template(template.chat_template, tools)
    if not _MARK.search(text_of_template):
        return
    from transformers.utils.chat_template_utils import render_jinja_template  # loaded already by the tokenizer

    [text], [marks] = render_jinja_template(
        [messages],
        return_assistant_tokens_mask=True,
        tools=tools,
        chat_template=text_of_template,
        **tokenizer.special_tokens_map,
    )
    turns = list(zip(borders[::2], borders[1::2], strict=True))
    marks = [mark for mark in marks if mark[1] > turns[0][0]]  # those before are not supervised
    missing = [turn for turn in turns if not any(_same_text(whole, turn, mark, special_tokens) for mark in marks)]
    if text != whole or missing or len(marks) > most:
        raise DataError(
            f"the chat template marks as the model's ({{% generation %}}) the characters {_ranges(marks)}; written "
            f"turn by turn, the conversation has the model's turns at {_ranges(turns)}. Fix the marks, or remove them; "
            f"or choose another template: {_CHOOSE_TEMPLATE}"
        )


def _same_text(text: str, turn: tuple[int, int], mark: tuple[int, int], special_tokens: re.Pattern[str]) -> bool:
    """Whether two ranges differ at most in white space and special tokens at their edges."""
    differences = (text[min(edges) : max(edges)] for edges in zip(turn, mark, strict=True))
    return not any(special_tokens.sub("", difference).strip() for difference in differences)


def _ranges(spans: list[tuple[int, int]]) -> str:
    return ", ".join(f"{start + 1} to {end}" for start, end in spans) or "none"
