"""Templates: rendered once, and the border between prompt and completion found by rendering, never by guessing."""

import pytest

from rlhf_core.data.chat import PLAIN_TEMPLATE, load_chat_template, render, split_conversation
from rlhf_core.data.formats import DataError

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi "}
ASSISTANT = {"role": "assistant", "content": "Hello"}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As the templates of reasoning models do: thoughts are left out of the history, and the generation prompt opens them.
FORGETS_THOUGHTS = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"


def test_plain_renders_turns_with_their_roles(make_tokenizer):
    text = render([SYSTEM, USER], make_tokenizer(), chat_template=PLAIN_TEMPLATE, add_generation_prompt=True)
    assert text == "<s>System: Be kind.\n\nUser: Hi \n\nAssistant:"


def test_plain_leaves_bos_out_where_there_is_none(make_tokenizer):
    tokenizer = make_tokenizer(bos=None, adds="$A")
    text = render([USER, ASSISTANT], tokenizer, chat_template=PLAIN_TEMPLATE, add_generation_prompt=False)
    assert text == "User: Hi \n\nAssistant: Hello"


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        (PLAIN_TEMPLATE, "<s>System: Be kind.\n\nUser: Hi \n\nAssistant:", " Hello"),
        (
            CHATML,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
            "Hello<|im_end|>\n",
        ),
    ],
    ids=["plain", "chatml"],
)
def test_a_conversation_is_split_after_the_generation_prompt(make_tokenizer, template, prompt, completion):
    tokenizer = make_tokenizer()
    assert split_conversation([SYSTEM, USER], [ASSISTANT], tokenizer, template) == (prompt, completion)


def test_the_tokenizers_own_template_is_the_default(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    assert split_conversation([USER], [ASSISTANT], tokenizer)[1] == "Hello<|im_end|>\n"
    assert split_conversation([USER], [ASSISTANT], tokenizer, PLAIN_TEMPLATE)[1] == " Hello"


@pytest.mark.parametrize("turns", range(1, 5))
def test_plain_is_prefix_preserving_however_long_the_conversation(make_tokenizer, turns):
    prompt = [SYSTEM, *[USER, ASSISTANT] * (turns - 1), USER]
    text, completion = split_conversation(prompt, [ASSISTANT], make_tokenizer(), PLAIN_TEMPLATE)
    assert completion == " Hello"
    assert text.count("Assistant:") == turns


def test_a_template_that_is_not_prefix_preserving_is_refused(make_tokenizer):
    answer = {"role": "assistant", "content": "<think>hm</think>Hello"}
    with pytest.raises(
        DataError, match="not prefix-preserving: .* differ from character 21 on.*--data.chat-template FILE"
    ):
        split_conversation([USER], [answer], make_tokenizer(), FORGETS_THOUGHTS)


def test_a_template_that_writes_no_answer_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="the chat template writes nothing for the assistant"):
        split_conversation([USER], [ASSISTANT], make_tokenizer(), "{{ messages[0]['content'] }}")


def test_no_template_is_an_error_with_the_way_out(make_tokenizer):
    with pytest.raises(DataError, match=r"no chat template; give one: --data.chat-template FILE.jinja, .* \(plain\)"):
        render([USER], make_tokenizer(), add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(REFUSES_SYSTEM, "no system role here"), ("{% for %}", "TemplateSyntaxError"), ("{{ 1 + 'a' }}", "TypeError")],
)
def test_a_template_that_fails_is_an_error_with_its_reason(make_tokenizer, template, reason):
    with pytest.raises(DataError, match=f"refuses a conversation of 2 messages .*{reason}"):
        render([SYSTEM, USER], make_tokenizer(), chat_template=template, add_generation_prompt=True)


def test_a_template_is_loaded_by_name_or_from_a_file(tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert load_chat_template("plain") == PLAIN_TEMPLATE
    assert load_chat_template(tmp_path / "chatml.jinja") == CHATML


def test_a_template_that_is_not_there(tmp_path):
    with pytest.raises(
        DataError, match=r"chat template plane: no such file, and no such built-in name \(there is: plain\)"
    ):
        load_chat_template("plane")
    (tmp_path / "empty.jinja").write_text("\n")
    with pytest.raises(DataError, match="empty.jinja: the file is empty, expected a Jinja template"):
        load_chat_template(tmp_path / "empty.jinja")
