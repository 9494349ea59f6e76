"""The decoder's static cache against its dynamic one: the same samples, in shapes that never change."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, StaticCache

from rlhf_core.config import ConfigError, SamplingConfig
from rlhf_core.models.forward import prepare, route_of, token_logprobs
from rlhf_core.models.heads import ValueHead
from rlhf_core.rollout import engines
from rlhf_core.rollout.sampling import sample

OFTEN = frozenset(range(8))  # stop tokens that come at many different places


def numbers() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def head_of(policy) -> ValueHead:
    head = ValueHead(policy.config.hidden_size)
    torch.nn.init.normal_(head.linear.weight, generator=numbers())
    return head


def test_a_policy_that_calls_its_decoder_and_not_its_trunk():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)
    policy = prepare(OPTForCausalLM(OPTConfig(vocab_size=40, max_position_embeddings=64, **sizes))).eval()
    rollout = sample(policy, [[5, 6, 7], [9]], 2, max_new_tokens=6, stop_ids=OFTEN, generator=numbers())
    batch = rollout.pack()
    expected = token_logprobs(policy, batch)[batch.completion_mask]
    torch.testing.assert_close(rollout.logprobs[batch.completion_mask], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])  # gemma3 with a sliding window
@pytest.mark.parametrize(("n", "batch_size"), [(1, 64), (4, 6)])
def test_samples_are_those_of_the_dynamic_cache(make_policy, prompts, family, n, batch_size):
    """Token for token; log-probs and values differ by the rounding of sums over more places, of weight 0."""
    policy = make_policy(family)
    assert route_of(policy).layout == "packed"
    options = dict(
        max_new_tokens=12, stop_ids=OFTEN, temperature=0.8, batch_size=batch_size, value_head=head_of(policy)
    )
    dynamic = sample(policy, prompts, n, generator=numbers(), **options)
    static = sample(policy, prompts, n, generator=numbers(), cache="static", **options)
    assert static.completions == dynamic.completions
    assert torch.equal(static.finished, dynamic.finished)
    assert static.finished.sum() > 0 and len({*map(len, static.completions)}) > 3
    torch.testing.assert_close(static.logprobs, dynamic.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(static.values, dynamic.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("same_length", [True, False])
def test_no_shape_ever_changes(make_policy, prompts, same_length):
    """After the forward of the prompts: neither the input tokens, nor a key; finished rows stay."""
    policy = make_policy()
    prompts = [prompt[:3] for prompt in prompts if len(prompt) >= 3] if same_length else prompts
    seen = []

    def watch(trunk, args, inputs, output) -> None:
        cache = inputs["past_key_values"]
        assert isinstance(cache, StaticCache)
        seen.append((tuple(inputs["input_ids"].shape), {tuple(layer.keys.shape) for layer in cache.layers}))

    policy.base_model.register_forward_hook(watch, with_kwargs=True)
    options = dict(max_new_tokens=9, stop_ids=OFTEN, generator=numbers(), cache="static")
    rollout = sample(policy, prompts, 3, **options)
    (first, _), *others = seen
    rows, longest = 3 * len(prompts), max(map(len, prompts)) + 9
    assert first == (len(prompts), max(map(len, prompts)))
    assert rollout.finished.any() and len(others) == max(map(len, rollout.completions)) - 1
    heads, size = policy.config.num_key_value_heads, policy.config.hidden_size // policy.config.num_attention_heads
    assert all(other == ((rows, 1), {(rows, heads, longest, size)}) for other in others)


def test_the_setting_reaches_the_decoder(make_policy, make_tokenizer, prompts, monkeypatch):
    asked = []
    monkeypatch.setattr(engines, "sample", lambda *args, **options: asked.append(options["cache"]))
    tokenizer = make_tokenizer(unk_token="w0", eos_token="w2")
    for cache in ("static", "dynamic"):
        engines.sample_completions(make_policy(), tokenizer, prompts, SamplingConfig(kv_cache=cache), numbers())
    assert asked == ["static", "dynamic"]
    with pytest.raises(ConfigError, match="kv_cache='static': expected dynamic, because engine='continuous' has"):
        SamplingConfig(engine="continuous", kv_cache="static")
