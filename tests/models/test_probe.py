"""`prepare`: a model for which a faster way would silently give other numbers is found, and left as it was."""

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
from rlhf_core.models.forward import (
    completion_states,
    device_of,
    last_states,
    pair_logprobs,
    policy_outputs,
    prepare,
    route_of,
    sequence_scores,
    summed_loss,
    token_logprobs,
    token_scores,
    token_values,
)

UNFIT = {  # with a part of the warning
    "bloom": "reaches none of its layers",
    "mamba": "reaches none of its layers",
    "gpt_oss": "s_aux",
    "gemma2": "softcap",
    "qwen2_moe": "window is 70 tokens",
}


@pytest.fixture
def warnings(caplog):
    """Messages logged so far."""
    caplog.set_level(logging.WARNING, logger="rlhf_core")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("rlhf_core")]


@pytest.mark.parametrize("family", UNFIT)
def test_auto_falls_back_with_one_warning_that_names_the_difference(make_model, groups, warnings, family):
    model = prepare(make_model(family))
    for _ in range(2):
        token_logprobs(model, PackedBatch.pack(groups))
    (warning,) = warnings()
    assert warning.startswith(f"{type(model).__name__} runs in the padded layout: ")
    assert UNFIT[family] in warning
    assert UNFIT[family] in route_of(model).packed_fault


@pytest.mark.parametrize("family", UNFIT)
def test_an_explicit_layout_is_used_or_refused(make_model, groups, warnings, family):
    model = make_model(family)
    with pytest.raises(ValueError, match=rf"layout='packed': expected .* {type(model).__name__} .*{UNFIT[family]}"):
        prepare(model, "packed")
    with pytest.raises(ValueError, match="is not prepared"):
        route_of(model)
    assert route_of(prepare(model, "padded")).layout == "padded"
    assert warnings() == []  # padded was requested, so this is no fallback
    prepare(model)
    assert len(warnings()) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_fit_model_is_switched_without_a_warning(make_model, warnings, family):
    model = make_model(family)
    for layout in ("auto", "packed"):
        assert route_of(prepare(model, layout)).layout == "packed"
        assert model.config._attn_implementation == PACKED
    assert route_of(prepare(model, "padded")).layout == "padded"
    assert route_of(model).packed_fault is None  # it could be packed
    assert warnings() == []


def test_an_unknown_layout(make_model):
    with pytest.raises(ValueError, match="layout='ragged': expected auto, packed or padded"):
        prepare(make_model("llama"), "ragged")


def test_forwards_do_not_probe(make_model, make_scorer, groups):
    batch = PackedBatch.pack(groups)
    for model, run in ((make_model("llama"), token_logprobs), (make_scorer("llama"), sequence_scores)):
        calls = []
        model.base_model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        prepare(model)
        assert len(calls) > 1
        calls.clear()
        for _ in range(3):
            run(model, batch)
        assert len(calls) == 3


@pytest.mark.parametrize(
    "run",
    [
        token_logprobs, policy_outputs, sequence_scores, token_scores, token_values, completion_states, last_states,
        lambda model, batch: summed_loss(model, batch, None), lambda model, batch: pair_logprobs(model, None, batch),
    ],
)  # fmt: skip
def test_a_model_that_was_not_prepared(make_model, run):
    message = r"LlamaForCausalLM is not prepared: call rlhf_core.prepare\(model\)"
    with pytest.raises(ValueError, match=message):
        run(make_model("llama"), PackedBatch.pack([([1, 2], [[3], [4]])]))


def test_an_unprepared_reference(make_model):
    policy, reference, batch = prepare(make_model("llama")), make_model("llama"), PackedBatch.pack([([1], [[2], [3]])])
    for run in (
        lambda: policy_outputs(policy, batch, reference=reference),
        lambda: pair_logprobs(policy, reference, batch),
    ):
        with pytest.raises(ValueError, match="is not prepared"):
            run()


def test_a_wrapper_does_not_inherit_the_route(make_model):
    """A wrapper that passes attributes on may compute something else: it is prepared by itself."""

    class Wrapper(LlamaForCausalLM):
        def __getattr__(self, name):
            if name == "rlhf_route":
                return route_of(inner)
            return super().__getattr__(name)

    inner = prepare(make_model("llama"))
    wrapper = Wrapper(inner.config)
    with pytest.raises(ValueError, match="Wrapper is not prepared"):
        route_of(wrapper)
    assert device_of(prepare(wrapper)).type == "cpu"
    assert route_of(wrapper) == route_of(inner)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_oss"])
def test_it_leaves_no_trace(make_model, family):
    model = make_model(family, attn_implementation="eager")
    model.base_model.get_input_embeddings().eval()  # a submodule with a mode of its own
    flags = {name: module.training for name, module in model.named_modules()}
    assert set(flags.values()) == {True, False}
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert route_of(prepare(model)).layout == ("packed" if family == "llama" else "padded")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    if family != "llama":
        assert model.config._attn_implementation == "eager"


def another_attention(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


class IgnoresPositions(LlamaForCausalLM):
    """A Llama that ignores position ids, as OPT does, with the attention of any Llama."""

    def __init__(self, config):
        super().__init__(config)
        self.model = TrunkIgnoresPositions(config)


class TrunkIgnoresPositions(LlamaModel):
    def forward(self, input_ids, position_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


def test_whatever_attention_a_model_had_it_gets_back(make_model):
    AttentionInterface.register("another_attention", another_attention)
    AttentionMaskInterface.register("another_attention", sdpa_mask)
    model = IgnoresPositions(make_model("llama").config)
    model.set_attn_implementation("another_attention")
    assert route_of(prepare(model)).layout == "padded"
    assert model.config._attn_implementation == "another_attention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_numbers_decide_where_nothing_else_does(make_model, warnings, dtype, outlier):
    """Also in bfloat16, and where one column of the states is as much larger than the rest as in trained models."""
    config = make_model("llama").config
    torch.manual_seed(0)
    ignores, normal = IgnoresPositions(config), LlamaForCausalLM(config)
    normal.load_state_dict(ignores.state_dict())
    for model in (ignores, normal):
        with torch.no_grad():
            model.model.norm.weight[3] = outlier
        model.to(dtype).eval()
    assert route_of(prepare(normal)).layout == "packed"
    assert route_of(prepare(ignores)).layout == "padded"
    (warning,) = warnings()
    assert "hidden states differ from the padded forward by 0." in warning


def test_chunked_attention_is_unknown(make_model):
    with pytest.raises(ValueError, match="chunked"):
        prepare(make_model("llama", attention_chunk_size=8), "packed")


@pytest.mark.parametrize("family", ["qwen2_moe", "mistral", "gemma3"])
def test_a_wide_window_is_kept(make_model, make_plain, family):
    """Wider than the probe is long: later tokens must not see further, in either layout."""
    model = make_model(family, sliding_window=70).eval()
    other = copy.deepcopy(model)
    tokens = torch.randint(61, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    groups = [(tokens[:80], [tokens[80:], tokens[:5]])]
    with torch.no_grad():
        logprobs = token_logprobs(prepare(model), PackedBatch.pack(groups, share=True))
        torch.testing.assert_close(logprobs, make_plain(groups).logprobs(other), rtol=1e-5, atol=1e-5)


def test_an_attention_that_was_changed_since_is_switched_again(make_model, groups):
    """Plain attention would let every token of the stream see all before it, without an error."""
    model, batch = prepare(make_model("llama").eval()), PackedBatch.pack(groups, share=True)
    before = token_logprobs(model, batch)
    model.set_attn_implementation("eager")
    assert torch.equal(token_logprobs(model, batch), before)


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
    assert route_of(prepare(model)).layout == "packed"
    assert torch.equal(model.generate(**inputs), before)
    # And its ordinary forward gives the same.
    fresh = make_model(family).eval()
    logits = model(input_ids=before, use_cache=False).logits
    torch.testing.assert_close(logits, fresh(input_ids=before, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_a_saved_model_has_no_trace_of_it(make_model, tmp_path):
    model = prepare(make_model("llama"))
    assert model.config._attn_implementation == PACKED
    model.save_pretrained(tmp_path)
    assert "rlhf" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
