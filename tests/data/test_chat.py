"""Templates: rendered once, and the border between prompt and completion found by rendering."""

import re

import pytest

from rlhf_core.data.chat import PLAIN_TEMPLATE, load_chat_template, render, split_turns
from rlhf_core.data.errors import DataError

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi "}
ASSISTANT = {"role": "assistant", "content": "Hello"}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in templates of reasoning models: thoughts are left out of the history, and the generation prompt opens them.
FORGETS_THOUGHTS = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
FORGETS_OLD_THOUGHTS = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
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
    assert split_turns([SYSTEM, USER], [ASSISTANT], tokenizer, template) == [prompt, completion]


def test_the_tokenizers_own_template_is_the_default(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    assert split_turns([USER], [ASSISTANT], tokenizer)[1] == "Hello<|im_end|>\n"
    assert split_turns([USER], [ASSISTANT], tokenizer, PLAIN_TEMPLATE)[1] == " Hello"


@pytest.mark.parametrize("turns", range(1, 5))
def test_plain_is_prefix_preserving_however_long_the_conversation(make_tokenizer, turns):
    prompt = [SYSTEM, *[USER, ASSISTANT] * (turns - 1), USER]
    text, completion = split_turns(prompt, [ASSISTANT], make_tokenizer(), PLAIN_TEMPLATE)
    assert completion == " Hello"
    assert text.count("Assistant:") == turns


def test_a_template_that_is_not_prefix_preserving_is_refused(make_tokenizer):
    answer = {"role": "assistant", "content": "<think>hm</think>Hello"}
    with pytest.raises(
        DataError, match="not prefix-preserving: .* differ from character 21 on.*--data.chat-template FILE"
    ):
        split_turns([USER], [answer], make_tokenizer(), FORGETS_THOUGHTS)


def test_a_template_that_writes_no_answer_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="the chat template writes nothing for the assistant"):
        split_turns([USER], [ASSISTANT], make_tokenizer(), "{{ messages[0]['content'] }}")


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


# ------------------------------------------------------------------------------------------- several supervised turns

MORE, LATER = {"role": "user", "content": "More"}, {"role": "assistant", "content": "Later"}
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONLY_LAST_END = (  # an end of text after the whole conversation only
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% else %}</s>{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
def test_a_conversation_is_cut_at_every_turn_of_the_model(make_tokenizer, template):
    parts = split_turns([SYSTEM, USER], [ASSISTANT, MORE, LATER], make_tokenizer(), template)
    assert parts == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>\n",
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n",
        "Later<|im_end|>\n",
    ]


@pytest.mark.parametrize("turns", range(1, 5))
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, MARKED], ids=["plain", "chatml", "marked"])
def test_the_parts_of_a_conversation_are_the_whole(make_tokenizer, template, turns):
    tokenizer = make_tokenizer()
    completion = [ASSISTANT, *[MORE, LATER] * (turns - 1)]
    parts = split_turns([SYSTEM, USER], completion, tokenizer, template)
    whole = render([SYSTEM, USER, *completion], tokenizer, chat_template=template, add_generation_prompt=False)
    assert len(parts) == 2 * turns and "".join(parts) == whole


@pytest.mark.parametrize(
    ("template", "first", "reason"),
    [
        # The thought of the first turn is in the text that ends with it, and no longer in the whole.
        (
            FORGETS_OLD_THOUGHTS,
            "<think>hm</think>Hello",
            "up to the end of an answer .42 characters. .* character 21 on",
        ),
        (ONLY_LAST_END, "Hello", "the text up to the end of an answer"),
    ],
)
def test_all_turns_of_a_template_that_rewrites_the_history(make_tokenizer, template, first, reason):
    """The error names the way out: train on the last turn alone."""
    tokenizer, first = make_tokenizer(), {"role": "assistant", "content": first}
    with pytest.raises(DataError, match=f"not prefix-preserving: .*{reason}.*--data.turns last"):
        split_turns([USER], [first, MORE, LATER], tokenizer, template)
    assert split_turns([USER, first, MORE], [LATER], tokenizer, template)[1].startswith("Later")


# ------------------------------------------------------------------------------------------------- the template's marks


def marks(before: str = "", after: str = "", start: str = "{% generation %}", end: str = "{% endgeneration %}") -> str:
    """Return the marked template with moved marks: `before` and `after` are outside of them."""
    answer = f"{before}{start}{{{{ message['content'] }}}}{end}{after}"
    return MARKED.replace("{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}", answer)


@pytest.mark.parametrize(
    "template",
    [
        marks(after="<|im_end|>"),  # the end outside
        marks(end="<|im_end|>\n{% endgeneration %}").replace(
            "{{ '\n' }}", "{% if message['role'] == 'user' %}\n\n{% endif %}"
        ),
    ],
    ids=["without the end", "with the line break"],
)
def test_marks_may_differ_in_the_end_of_a_turn(make_tokenizer, template):
    tokenizer = make_tokenizer(more_special=["<|im_start|>", "<|im_end|>"])
    special = re.compile(r"<\|im_start\|>|<\|im_end\|>")
    parts = split_turns([USER], [ASSISTANT, MORE, LATER], tokenizer, template, special_tokens=special)
    assert [part.strip() for part in parts[1::2]] == ["Hello<|im_end|>", "Later<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (marks(start="{% generation %}Sure: "), None),  # inside the turn either way
        (marks(before="Sure: "), "60 to 64, 126 to 130; .* 54 to 65, 120 to 131"),
        (marks(end="{% endgeneration %} Bye"), "54 to 58, 118 to 122; .* 54 to 63, 118 to 127"),
        (MARKED.replace("== 'assistant' %}", "== 'user' %}"), "87 to 100; .* 54 to 69, 124 to 139"),
        (MARKED.replace("== 'assistant' %}", "== 'assistant' and loop.last %}"), "124 to 138; .* 54 to 69, 124 to 139"),
        (MARKED.replace("== 'assistant' %}", "== 'tool' %}"), "the characters none; "),
    ],
)
def test_marks_on_other_parts_are_refused(make_tokenizer, template, found):
    """53 characters of prompt, 16 of a turn with its end and line break, 54 up to the second turn."""
    tokenizer = make_tokenizer(more_special=["<|im_start|>", "<|im_end|>"])
    special = re.compile(r"<\|im_start\|>|<\|im_end\|>")
    if found is None:
        assert split_turns([USER], [ASSISTANT], tokenizer, template, special_tokens=special)[1] == "Sure: Hello\n"
        return
    with pytest.raises(DataError, match=f"marks as the model's .*{found}.*Fix the marks"):
        split_turns([USER], [ASSISTANT, MORE, LATER], tokenizer, template, special_tokens=special)


def test_marks_on_turns_that_are_not_learned_are_no_fault(make_tokenizer):
    parts = split_turns([USER, ASSISTANT, MORE], [LATER], make_tokenizer(), MARKED)
    assert parts[1] == "Later<|im_end|>\n"
    silent = [LATER, MORE, ASSISTANT | {"weight": 0}, MORE, LATER]
    assert len(split_turns([USER], silent, make_tokenizer(), MARKED)) == 4
    more = MARKED.replace("{% else %}{{ message['content'] }}", "{% else %}{% generation %}!{% endgeneration %}")
    with pytest.raises(DataError, match="marks as the model's"):
        split_turns([USER], silent, make_tokenizer(), more)


# ---------------------------------------------------------------------------------------------------------------- tools

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
KNOWS_TOOLS = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}(call){{ call['function'] | tojson }}{% endfor %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_is_handed_the_tools_the_calls_and_the_results(make_tokenizer):
    parts = split_turns([USER], [CALL, RESULT, LATER], make_tokenizer(), KNOWS_TOOLS, TOOLS)
    assert parts == [
        '[tools][{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
        "[user]Hi [end][assistant]",
        '(call){"name": "add", "arguments": {"a": 1}}[end]',
        "[tool]2[end][assistant]",
        "Later[end]",
    ]


def test_keys_of_the_templates_own_are_handed_to_it(make_tokenizer):
    template = KNOWS_TOOLS.replace(
        "{{ message['content'] }}", "<{{ message.reasoning_content }}>{{ message['content'] }}"
    )
    answer = LATER | {"reasoning_content": "hm"}
    assert split_turns([USER], [answer], make_tokenizer(), template)[0] == "[user]<>Hi [end][assistant]"
    assert split_turns([USER], [answer], make_tokenizer(), template)[1] == "<hm>Later[end]"


@pytest.mark.parametrize(
    ("template", "tools", "what"),
    [
        (KNOWS_TOOLS.replace("tools %}", "nothing %}"), TOOLS, "the tools of the conversation"),
        (KNOWS_TOOLS.replace("message['tool_calls'] or", ""), None, "a call of tools"),
        (
            KNOWS_TOOLS.replace("{{ message['content'] }}", "{{ message['content'] if loop.index0 != 2 }}"),
            None,
            "a tool's res",
        ),
    ],
)
def test_a_template_that_knows_nothing_of_tools_is_refused(make_tokenizer, template, tools, what):
    with pytest.raises(DataError, match=f"the chat template leaves out {what}.*Choose a template that supports tools"):
        split_turns([USER, CALL, RESULT], [LATER], make_tokenizer(), template, tools)


def test_a_template_that_refuses_a_call_without_its_calls_knows_of_them(make_tokenizer):
    """That the template fails on the empty assistant message of the check is no fault of the data."""
    strict = "{% for message in messages %}{% if not message['content'] and not message['tool_calls'] %}"
    template = strict + "{{ raise_exception('an empty message') }}{% endif %}{% endfor %}" + KNOWS_TOOLS
    assert split_turns([USER, CALL, RESULT], [LATER], make_tokenizer(), template)[1] == "Later[end]"
