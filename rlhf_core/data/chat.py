"""Messages to text: chat templates, applied once, and the border between a prompt and its completion.

A template is a small Jinja program that comes with a tokenizer and writes a conversation down as the model was taught
to see it. Training needs one thing more than chatting: to know which part of that text the model is to answer for. It
is found by writing the prompt alone, then the whole, and checking that the first is the beginning of the second.
"""

from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.data.formats import DataError, Message

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


def render(
    messages: list[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool,
) -> str:
    """Write a conversation down as text.

    chat_template: Jinja text (see `load_chat_template`); None takes the tokenizer's own.
    add_generation_prompt: whether to add what comes before an assistant's answer.
    Raises DataError when there is no template, or when the template refuses the conversation, with its reason.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise DataError(f"the data are messages, but the tokenizer has no chat template; give one: {_CHOOSE_TEMPLATE}")
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of its author's and may fail in any way
        raise DataError(
            f"the chat template refuses a conversation of {len(messages)} messages ({type(error).__name__}: {error}); "
            f"mend the conversation, or choose another template: {_CHOOSE_TEMPLATE}"
        ) from error


def split_conversation(
    prompt_messages: list[Message],
    completion_messages: list[Message],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None = None,
) -> tuple[str, str]:
    """(prompt text, completion text) of a conversation; together they are the whole as the template writes it.

    The prompt's text ends with the generation prompt, so that training sees what sampling will see. Raises DataError
    when the whole does not begin with it: such a template (one that drops earlier reasoning from the history, say)
    writes a prompt in training that the model never meets in use.
    """
    prompt = render(prompt_messages, tokenizer, chat_template=chat_template, add_generation_prompt=True)
    whole = render(
        [*prompt_messages, *completion_messages], tokenizer, chat_template=chat_template, add_generation_prompt=False
    )
    if not whole.startswith(prompt):
        shared = len(commonprefix([prompt, whole]))
        raise DataError(
            "the chat template is not prefix-preserving: the text of the prompt with its generation prompt "
            f"({len(prompt)} characters) and that of the whole conversation differ from character {shared + 1} on. "
            f"Choose a template that is: {_CHOOSE_TEMPLATE}; or give prompt and completion as text"
        )
    if len(whole) == len(prompt):
        raise DataError(f"the chat template writes nothing for the assistant; choose another: {_CHOOSE_TEMPLATE}")
    return prompt, whole[len(prompt) :]
