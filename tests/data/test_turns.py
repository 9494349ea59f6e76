"""Conversations as tokens: which are supervised, BOS once, EOS once and supervised, for any template and tokenizer.

The character tokenizer makes every expectation a text: what is supervised, and what is not, is written out by hand.
"""

from dataclasses import dataclass

import pytest
from transformers import AddedToken, AutoTokenizer

from rlhf_core.batch import PackedBatch
from rlhf_core.data.chat import PLAIN_TEMPLATE, render, split_turns
from rlhf_core.data.errors import DataError
from rlhf_core.data.records import Record
from rlhf_core.data.tokenize import encode_records, stop_ids

SYSTEM = {"role": "system", "content": "S"}
USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MORE, LATER = {"role": "user", "content": "More"}, {"role": "assistant", "content": "Later"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "[7]"}


@dataclass(frozen=True)
class Family:
    """The template of a family of models, its tokens, and the result for Hi, Hello, More, Later."""

    template: str
    prompt: str
    supervised: tuple[str, str]
    between: str
    tokenizer: dict
    stops: tuple[str, ...] = ()


FAMILIES = {
    "plain": Family(
        template=PLAIN_TEMPLATE,
        prompt="<s>User: Hi\n\nAssistant:",
        supervised=(" Hello", " Later</s>"),  # the template writes no end: only the last turn has one
        between="\n\nUser: More\n\nAssistant:",
        tokenizer={},
    ),
    "chatml": Family(
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        prompt="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        supervised=("Hello<|im_end|>", "Later<|im_end|>"),
        between="\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n",
        tokenizer={"eos": "<|im_end|>", "more_special": ["<|im_start|>"]},
    ),
    "chatml, whose end is in the generation config": Family(
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        prompt="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        supervised=("Hello<|im_end|>", "Later<|im_end|>"),
        between="\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n",
        tokenizer={"more_special": ["<|im_start|>", "<|im_end|>"]},
        stops=("<|im_end|>",),
    ),
    "llama 2": Family(  # BOS and EOS around every pair of turns, system prompt inside the first
        template=(
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
        ),
        prompt="<s>[INST] Hi [/INST]",
        supervised=(" Hello </s>", " Later </s>"),
        between="<s>[INST] More [/INST]",
        tokenizer={},
    ),
    "llama 3": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
            "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
        ),
        prompt="<s><|header|>user<|/header|>\n\nHi<|eot|><|header|>assistant<|/header|>\n\n",
        supervised=("Hello<|eot|>", "Later<|eot|>"),
        between="<|header|>user<|/header|>\n\nMore<|eot|><|header|>assistant<|/header|>\n\n",
        tokenizer={"more_special": ["<|header|>", "<|/header|>", "<|eot|>"]},
        stops=("<|eot|>",),
    ),
    "gemma": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
        ),
        prompt="<s><turn>user\nHi</turn>\n<turn>model\n",
        supervised=("Hello</turn>", "Later</turn>"),
        between="\n<turn>user\nMore</turn>\n<turn>model\n",
        tokenizer={"more_special": ["<turn>", "</turn>"]},
        stops=("</turn>",),
    ),
    "mistral": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        ),
        prompt="<s>[INST] Hi[/INST]",
        supervised=(" Hello</s>", " Later</s>"),
        between="[INST] More[/INST]",
        tokenizer={},
    ),
    "an end that only the next turn writes": Family(
        template=(
            "{% for m in messages %}{% if m.role == 'user' and not loop.first %}</s>{% endif %}<{{ m.role }}>"
            "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
        prompt="<user>Hi<assistant>",
        supervised=("Hello</s>", "Later</s>"),
        between="<user>More<assistant>",
        tokenizer={"bos": None, "adds": "$A"},
    ),
    "marked": Family(
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        prompt="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        supervised=("Hello<|im_end|>", "Later<|im_end|>"),
        between="\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n",
        tokenizer={"eos": "<|im_end|>", "more_special": ["<|im_start|>"]},
    ),
}
HABITS = {  # of tokenizers; the tokens that they add must not be there twice
    "adds BOS": {"adds": "<s> $A"},
    "adds nothing": {"adds": "$A"},
    "adds BOS and EOS": {"adds": "<s> $A </s>"},
    "pad == eos": {"pad": "eos"},
    "no pad": {"pad": None},
}


def build(make_tokenizer, family: Family, **habits):
    options = {**family.tokenizer}
    for key, value in habits.items():
        options.setdefault(key, value)
    eos = options.get("eos", "</s>")
    if options.get("pad") == "eos":
        options["pad"] = eos
    if options.get("adds"):
        options["adds"] = options["adds"].replace("</s>", eos)
    return make_tokenizer(chat_template=family.template, **options)


def encode(tokenizer, *records: Record, stops=(), **options):
    ids = {*stop_ids(tokenizer), *map(tokenizer.convert_tokens_to_ids, stops)}
    return encode_records(list(records), tokenizer, stop_ids=ids, **options)


def conversation(prompt: list[dict], completion: list[dict], **more) -> Record:
    return Record(prompt=prompt, completions=(completion,), row={}, source="rows.jsonl:1", **more)


def stretches(tokenizer, example) -> list[tuple[bool, str]]:
    """Return (supervised, text) of each run of tokens with the same flag."""
    (tokens,) = example.completions
    (flags,) = example.supervised or ([True] * len(tokens),)
    found: list[tuple[bool, list[int]]] = []
    for token, flag in zip(tokens, flags, strict=True):
        if not found or found[-1][0] != flag:
            found.append((flag, []))
        found[-1][1].append(token)
    return [(flag, tokenizer.decode(ids)) for flag, ids in found]


# -------------------------------------------------------------------------------------------------- every turn, by hand


@pytest.mark.parametrize("habits", HABITS.values(), ids=HABITS.keys())
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_turn_of_the_model_is_supervised_with_its_end_and_nothing_else(make_tokenizer, family, habits):
    tokenizer = build(make_tokenizer, family, **habits)
    (example,) = encode(tokenizer, conversation([USER], [HELLO, MORE, LATER]), stops=family.stops)
    first, last = family.supervised
    assert tokenizer.decode(example.prompt) == family.prompt
    assert stretches(tokenizer, example) == [(True, first), (False, family.between), (True, last)]


@pytest.mark.parametrize("habits", HABITS.values(), ids=HABITS.keys())
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_last_turn_alone(make_tokenizer, family, habits):
    """All before is prompt, and the tokens are the same; BOS is the first token, once, and EOS the last."""
    tokenizer = build(make_tokenizer, family, **habits)
    (whole,) = encode(tokenizer, conversation([USER], [HELLO, MORE, LATER]), stops=family.stops)
    (example,) = encode(tokenizer, conversation([USER, HELLO, MORE], [LATER]), stops=family.stops)
    assert example.supervised is None
    assert example.prompt + example.completions[0] == whole.prompt + whole.completions[0]
    ids = {*stop_ids(tokenizer), *map(tokenizer.convert_tokens_to_ids, family.stops)}
    assert example.completions[0][-1] in ids and not ids.intersection(example.completions[0][:-1])
    bos = tokenizer.bos_token_id
    assert (example.prompt[0] == bos) == family.prompt.startswith("<s>") and example.prompt[1] != bos


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_nothing_of_the_conversation_is_lost(make_tokenizer, family):
    """All tokens together are the text of the template, except for what follows the last end."""
    tokenizer = build(make_tokenizer, family)
    turns = [USER, HELLO, MORE, LATER, MORE, HELLO]
    (example,) = encode(tokenizer, conversation(turns[:1], turns[1:]), stops=family.stops)
    text = tokenizer.decode(example.prompt + example.completions[0])
    whole = render(turns, tokenizer, add_generation_prompt=False)
    assert text.removesuffix("</s>") == whole.rstrip().removesuffix("</s>")
    assert [flag for flag, _ in stretches(tokenizer, example)] == [True, False] * 2 + [True]


def test_a_turn_of_weight_0_is_not_learned(make_tokenizer):
    tokenizer = build(make_tokenizer, FAMILIES["mistral"])
    (example,) = encode(tokenizer, conversation([USER], [HELLO, MORE, LATER | {"weight": 0}, MORE, HELLO]))
    between = "[INST] More[/INST] Later</s>[INST] More[/INST]"
    assert stretches(tokenizer, example) == [(True, " Hello</s>"), (False, between), (True, " Hello</s>")]


def test_the_mask_is_that_of_transformers(make_tokenizer):
    """Where a template marks the model's part, transformers returns a mask of the tokens of the whole text."""
    family = FAMILIES["marked"]
    tokenizer = build(make_tokenizer, family)
    turns = [USER, HELLO, MORE, LATER]
    (example,) = encode(tokenizer, conversation(turns[:1], turns[1:]))
    theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ours = example.prompt + example.completions[0]
    assert theirs["input_ids"] == [*ours, tokenizer.convert_tokens_to_ids("\n")]  # which follows the last end
    flags = [False] * len(example.prompt) + example.supervised[0]
    assert theirs["assistant_masks"] == [*map(int, flags), 0]


def test_the_loss_sees_the_learned_tokens_of_a_batch(make_tokenizer):
    tokenizer = build(make_tokenizer, FAMILIES["chatml"])
    rows = [conversation([USER], [HELLO, MORE, LATER]), conversation([USER], [LATER])]
    examples = encode(tokenizer, *rows)
    batch = PackedBatch.pack([(row.prompt, row.completions, row.supervised) for row in examples])
    supervised = [
        tokenizer.decode(ids[mask]) for ids, mask in zip(batch.completion_ids(), batch.loss_mask, strict=True)
    ]
    assert supervised == ["Hello<|im_end|>Later<|im_end|>", "Later<|im_end|>"]


# ---------------------------------------------------------------------------------------------------------------- tools

TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_calls_are_learned_and_results_are_not(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|im_end|>", more_special=["<|im_start|>"], chat_template=TOOLS_TEMPLATE)
    row = conversation([USER], [CALL, RESULT, HELLO], tools=[{"name": "f"}])
    (example,) = encode(tokenizer, row)
    assert tokenizer.decode(example.prompt).startswith('<|im_start|>tools\n[{"name": "f"}]<|im_end|>\n')
    assert stretches(tokenizer, example) == [
        (True, '<call>f {"x": 1}</call><|im_end|>'),
        (False, "\n<|im_start|>tool\n[7]<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hello<|im_end|>"),
    ]


def test_prompts_tell_of_tools_too(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|im_end|>", more_special=["<|im_start|>"], chat_template=TOOLS_TEMPLATE)
    row = Record(prompt=[USER], completions=(), row={}, source="rows.jsonl:1", tools=[{"name": "f"}])
    (example,) = encode(tokenizer, row)
    assert tokenizer.decode(example.prompt).startswith('<|im_start|>tools\n[{"name": "f"}]<|im_end|>\n')


def test_prompts_whose_tools_a_template_leaves_out_are_refused(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=PLAIN_TEMPLATE)
    for prompt, tools in (([USER, CALL, RESULT], None), ([USER], [{"name": "f"}])):
        row = Record(prompt=prompt, completions=(), row={}, source="rows.jsonl:1", tools=tools)
        with pytest.raises(DataError, match="^rows.jsonl:1: the chat template leaves out"):
            encode(tokenizer, row)


@pytest.mark.parametrize("turns", [1, 2])
def test_an_end_that_was_added_without_being_called_special_is_an_end(make_tokenizer, turns):
    tokenizer = make_tokenizer(more_special=["<|im_start|>"], chat_template=FAMILIES["chatml"].template)
    tokenizer.add_tokens(["<|im_end|>"])
    (example,) = encode(tokenizer, conversation([USER], [HELLO, MORE, LATER][: 2 * turns - 1]), stops=("<|im_end|>",))
    supervised = "".join(text for flag, text in stretches(tokenizer, example) if flag)
    assert supervised == "Hello<|im_end|>" + "Later<|im_end|>" * (turns - 1)


@pytest.mark.parametrize(
    "row",
    [
        conversation([USER], [CALL | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]}]),
        conversation([USER], [HELLO | {"reasoning_content": "<|im_start|>"}]),
        conversation([USER], [HELLO], tools=[{"<|im_end|>": "f"}]),
    ],
)
def test_special_tokens_typed_in_calls_tools_and_other_keys_are_found(make_tokenizer, row):
    tokenizer = make_tokenizer(eos="<|im_end|>", more_special=["<|im_start|>"], chat_template=TOOLS_TEMPLATE)
    with pytest.raises(DataError, match="a special token is typed in a message"):
        encode(tokenizer, row)


# -------------------------------------------------------------------------------------------- no token bridges a border


@pytest.mark.parametrize("model", ["gpt2_tokenizer", "stories260K"])
@pytest.mark.parametrize(("family", "end"), [("plain", ""), ("chatml", "<|im_end|>"), ("llama 2", "eos")])
def test_turns_are_tokenised_as_sampling_would_see_them(shared, model, family, end):
    """Turns that begin and end with text that tokens could span: each has the tokens of its own text.

    What stands between is tokenised behind the end of a turn, as it is in the prompt for the next one.
    """
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = FAMILIES[family].template
    end = tokenizer.eos_token if end == "eos" else end
    end_id = tokenizer.convert_tokens_to_ids(end) if end else tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    said = [{"role": "assistant", "content": text} for text in ("\nHello there", " you\n\n", "Later")]
    asked = [{"role": "user", "content": text} for text in ("Hi", "More.\n", "\nand more")]
    turns = [turn for pair in zip(asked, said, strict=True) for turn in pair]
    (example,) = encode(tokenizer, conversation(turns[:1], turns[1:]), stops=[tokenizer.convert_ids_to_tokens(end_id)])
    tokens, flags = example.completions[0], example.supervised[0]
    texts = split_turns(turns[:1], turns[1:], tokenizer)[1:]
    place = 0
    for number, text in enumerate(texts):
        if number % 2 == 0:
            expected = ids(text[: text.rindex(end)] if end else text)
            expected += [end_id] * (bool(end) or number == 4)
        elif end:  # the same tokens as at the end of the prompt for the turn after it
            prompt = ids(render(turns[: number + 2], tokenizer, add_generation_prompt=True))
            expected = prompt[len(prompt) - flags[place:].index(True) :]
        else:
            expected = ids(text)
        assert tokens[place : place + len(expected)] == expected
        assert flags[place : place + len(expected)] == [number % 2 == 0] * len(expected)
        place += len(expected)
    assert place == len(tokens) == len(flags)


def test_what_follows_an_end_is_tokenised_behind_it(make_tokenizer):
    """Some tokenizers drop white space after the end of a turn: it is in no prompt, so it is not trained on."""
    tokenizer = build(make_tokenizer, FAMILIES["chatml"])
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|im_end|>", rstrip=True, special=True)})
    (example,) = encode(tokenizer, conversation([USER], [HELLO, MORE, LATER]))
    (last,) = encode(tokenizer, conversation([USER, HELLO, MORE], [LATER]))
    between = "<|im_start|>user\nMore<|im_end|><|im_start|>assistant\n"  # without the line breaks after ends
    assert stretches(tokenizer, example)[1] == (False, between)
    assert example.prompt + example.completions[0] == last.prompt + last.completions[0]


# ----------------------------------------------------------------------------------------------------------- truncation


def cut(make_tokenizer, max_length: int, **options):
    """<s>[INST] Hi[/INST] and so on: 17 tokens of prompt, 7 a turn with its end, 18 between: 49 in all."""
    tokenizer = build(make_tokenizer, FAMILIES["mistral"])
    row = conversation([USER], [HELLO, MORE, LATER])
    return tokenizer, encode(tokenizer, row, max_length=max_length, **options)


@pytest.mark.parametrize(
    ("max_length", "prompt", "supervised"),
    [
        (49, "<s>[INST] Hi[/INST]", [(True, " Hello</s>"), (False, "[INST] More[/INST]"), (True, " Later</s>")]),
        (48, "<s>INST] Hi[/INST]", [(True, " Hello</s>"), (False, "[INST] More[/INST]"), (True, " Later</s>")]),
        (34, "<s>]", [(True, " Hello</s>"), (False, "[INST] More[/INST]"), (True, " Later</s>")]),
        # With one token less the first turn is not supervised, and is cut with the prompt.
        (33, "<s> Hello</s>[INST] More[/INST]", [(True, " Later</s>")]),
        (32, "<s>Hello</s>[INST] More[/INST]", [(True, " Later</s>")]),
        (9, "<s>]", [(True, " Later</s>")]),
    ],
)
def test_the_first_turns_are_cut_with_the_prompt(make_tokenizer, max_length, prompt, supervised):
    tokenizer, (example,) = cut(make_tokenizer, max_length)
    assert (tokenizer.decode(example.prompt), stretches(tokenizer, example)) == (prompt, supervised)
    assert len(example.prompt) + len(example.completions[0]) <= max_length
    if example.supervised is not None:
        assert len(example.supervised[0]) == len(example.completions[0])


def test_a_conversation_whose_last_turn_does_not_fit(make_tokenizer):
    with pytest.raises(DataError, match="0 of 1 rows left.*max_length=8"):
        cut(make_tokenizer, 8)


@pytest.mark.parametrize("completion", [[HELLO, MORE, LATER], [HELLO]])
def test_other_ways_with_what_is_too_long(make_tokenizer, completion):
    tokenizer = build(make_tokenizer, FAMILIES["mistral"])
    short, long = conversation([USER], [{"role": "assistant", "content": "a"}]), conversation([USER], completion)
    assert len(encode(tokenizer, short, long, max_length=20, truncation="drop")) == 1
    with pytest.raises(DataError, match="rows.jsonl:1: prompt and completion have (49|24) tokens, .*max_length=20"):
        encode(tokenizer, short, long, max_length=20, truncation="error")


def test_text_without_room_for_a_token_to_learn_is_dropped(make_tokenizer):
    """A row without a supervised token is never an example: here two tokens precede every text."""
    tokenizer = make_tokenizer(adds="<cls> <s> $A", more_special=["<cls>"])
    text = Record(prompt=None, completions=("abc",), row={}, source="rows.jsonl:1")
    (example,) = encode(tokenizer, text, max_length=3)
    assert tokenizer.decode(example.completions[0]) == "a"
    with pytest.raises(DataError, match="0 of 1 rows left"):
        encode(tokenizer, text, max_length=2)


def test_a_turn_that_has_no_tokens_is_an_error(make_tokenizer):
    tokenizer = build(make_tokenizer, FAMILIES["mistral"])
    silent = {"role": "assistant", "content": "\x07"}  # has no token in this tokenizer
    template = FAMILIES["mistral"].template.replace(" {{ m.content }}{{ eos", "{{ m.content }}{{ eos")
    with pytest.raises(DataError, match="rows.jsonl:1: a completion has no token before its end"):
        encode(tokenizer, conversation([USER], [silent, MORE, LATER]), chat_template=template)
