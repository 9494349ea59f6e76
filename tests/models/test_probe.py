"""The probe: a model that would go wrong in silence is caught, and one that would not is left as it was."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf_core.batch import PackedBatch
from rlhf_core.models.attention import PACKED
from rlhf_core.models.forward import find_route, sequence_scores, token_logprobs

UNFIT = {  # and the word by which the warning names what is wrong
    "bloom": "reaches none of its layers",
    "mamba": "reaches none of its layers",
    "gpt_oss": "s_aux",
    "gemma2": "softcap",
    "qwen2_moe": "window is 70 tokens",
}


@pytest.fixture
def warnings(caplog):
    """What was said so far."""
    caplog.set_level(logging.WARNING, logger="rlhf_core")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("rlhf_core")]


@pytest.mark.parametrize("family", UNFIT)
def test_auto_falls_back_with_one_warning_that_names_the_difference(make_model, groups, warnings, family):
    model, batch = make_model(family), PackedBatch.pack(groups)
    for _ in range(3):
        token_logprobs(model, batch)
    (warning,) = warnings()
    assert warning.startswith(f"{type(model).__name__} runs in the padded layout: ")
    assert UNFIT[family] in warning


@pytest.mark.parametrize("family", UNFIT)
def test_an_explicit_request_is_honoured_or_refused(make_model, groups, warnings, family):
    model, batch = make_model(family), PackedBatch.pack(groups)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"layout='packed' .* {type(model).__name__} .*{UNFIT[family]}"):
            token_logprobs(model, batch, layout="packed")
    token_logprobs(model, batch, layout="padded")
    assert warnings() == []  # nobody fell back
    token_logprobs(model, batch)
    assert len(warnings()) == 1  # now somebody did


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_fit_model_is_switched_without_a_word(make_model, groups, warnings, family):
    model = make_model(family)
    for layout in ("auto", "packed"):
        assert find_route(model, layout).layout == "packed"
    assert find_route(model, "padded").layout == "padded"
    assert model.config._attn_implementation == PACKED
    assert warnings() == []


def test_an_unknown_layout(make_model):
    with pytest.raises(ValueError, match="layout='ragged': expected auto, packed or padded"):
        find_route(make_model("llama"), "ragged")


def test_it_runs_once_for_each_model(make_model, make_scorer, groups):
    batch = PackedBatch.pack(groups)
    for model, run in ((make_model("llama"), token_logprobs), (make_scorer("llama"), sequence_scores)):
        calls = []
        model.base_model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        run(model, batch)
        assert len(calls) > 1
        calls.clear()
        for layout in ("auto", "packed", "padded"):
            run(model, batch, layout=layout)
        assert len(calls) == 3
        again = copy.deepcopy(model)  # another model, whatever it was copied from
        calls.clear()
        run(again, batch)
        assert len(calls) > 1


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_oss"])
def test_it_leaves_no_trace(make_model, family):
    model = make_model(family, attn_implementation="eager")
    model.base_model.get_input_embeddings().eval()  # a part that somebody keeps from training
    flags = {name: module.training for name, module in model.named_modules()}
    assert set(flags.values()) == {True, False}
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert find_route(model).layout == ("packed" if family == "llama" else "padded")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    if family != "llama":
        assert model.config._attn_implementation == "eager"


def another_attention(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


class Deaf(LlamaForCausalLM):
    """A Llama that numbers positions as it likes, as OPT does; its attention is everybody's."""

    def __init__(self, config):
        super().__init__(config)
        self.model = DeafTrunk(config)


class DeafTrunk(LlamaModel):
    def forward(self, input_ids, position_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


def test_whatever_attention_a_model_had_it_gets_back(make_model):
    AttentionInterface.register("another_attention", another_attention)
    AttentionMaskInterface.register("another_attention", sdpa_mask)
    model = Deaf(make_model("llama").config)
    model.set_attn_implementation("another_attention")
    assert find_route(model).layout == "padded"
    assert model.config._attn_implementation == "another_attention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_numbers_decide_where_nothing_else_does(make_model, warnings, dtype, outlier):
    """Also in bfloat16, and where one column of the states is as much larger than the rest as in trained models."""
    config = make_model("llama").config
    torch.manual_seed(0)
    deaf, hears = Deaf(config), LlamaForCausalLM(config)
    hears.load_state_dict(deaf.state_dict())
    for model in (deaf, hears):
        with torch.no_grad():
            model.model.norm.weight[3] = outlier
        model.to(dtype).eval()
    assert find_route(hears).layout == "packed"
    assert find_route(deaf).layout == "padded"
    (warning,) = warnings()
    assert "hidden states differ from the padded forward by 0." in warning


def test_chunked_attention_is_unknown(make_model):
    with pytest.raises(ValueError, match="chunked"):
        find_route(make_model("llama", attention_chunk_size=8), "packed")


@pytest.mark.parametrize("family", ["qwen2_moe", "mistral", "gemma3"])
def test_a_wide_window_is_kept(make_model, make_plain, family):
    """Wider than the probe is long: what comes after it must see no further than it, in either layout."""
    model = make_model(family, sliding_window=70).eval()
    other = copy.deepcopy(model)
    tokens = torch.randint(61, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    groups = [(tokens[:80], [tokens[80:], tokens[:5]])]
    with torch.no_grad():
        logprobs = token_logprobs(model, PackedBatch.pack(groups, share=True))
        torch.testing.assert_close(logprobs, make_plain(groups).logprobs(other), rtol=1e-5, atol=1e-5)


def test_an_attention_that_somebody_changes_back_is_switched_again(make_model, groups):
    """Plain attention would let every token of the stream see all before it, without an error."""
    model, batch = make_model("llama").eval(), PackedBatch.pack(groups, share=True)
    before = token_logprobs(model, batch, layout="packed")
    model.set_attn_implementation("eager")
    assert torch.equal(token_logprobs(model, batch, layout="packed"), before)


# ------------------------------------------------------------------------------------------------ afterwards, elsewhere


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_switched_model_generates_as_before(make_model, groups, family):
    model = make_model(family).eval()
    width = 12
    prompts = [prompt[-width:] for prompt, _ in groups]
    inputs = dict(
        input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    before = model.generate(**inputs)
    assert find_route(model).layout == "packed"
    assert torch.equal(model.generate(**inputs), before)
    # And its ordinary forward gives what it gave.
    fresh = make_model(family).eval()
    logits = model(input_ids=before, use_cache=False).logits
    torch.testing.assert_close(logits, fresh(input_ids=before, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_a_saved_model_does_not_know_of_us(make_model, tmp_path):
    model = make_model("llama")
    find_route(model)
    assert model.config._attn_implementation == PACKED
    model.save_pretrained(tmp_path)
    assert "rlhf" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
