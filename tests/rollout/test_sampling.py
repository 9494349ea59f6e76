"""Sampling, against a reader that runs every sequence alone and whole, and walks through the distribution by hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core.models.forward import prepare, route_of, token_logprobs
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.sampling import choose, sample, sampling_disagreement

NEVER = frozenset({10_000})  # a stop token outside the vocabulary


def draw(policy, prompts, *, seed: int = 0, **options) -> Experience:
    options = dict(max_new_tokens=10, stop_ids=NEVER) | options
    return sample(policy, prompts, generator=torch.Generator().manual_seed(seed), **options)


@torch.no_grad()
def sample_by_hand(policy, prompts, *, n: int = 1, max_new_tokens: int, temperature: float = 1.0, seed: int = 0):
    """Every sequence alone, unpadded, whole at every token; the token where the running sum passes the number drawn.

    The numbers of all first samples are drawn before those of the second ones.
    """
    policy.eval()
    generator = torch.Generator().manual_seed(seed)
    rounds = [
        torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64).tolist() for _ in range(n)
    ]
    rows = [(prompt, rounds[j][i]) for i, prompt in enumerate(prompts) for j in range(n)]
    completions, logprobs = [], []
    for prompt, numbers in rows:
        sequence, line = list(prompt), []
        for number in numbers:
            logits = policy(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].double() / temperature
            probabilities = logits.softmax(-1).tolist()
            passed = itertools.accumulate(probabilities)
            token = next(token for token, total in enumerate(passed) if total > number)
            sequence.append(token)
            line.append(math.log(probabilities[token]))
        completions.append(sequence[len(prompt) :])
        logprobs.append(line)
    return completions, torch.tensor(logprobs)


# -------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom", "mamba"])
def test_each_token_is_drawn_from_the_whole_distribution(make_policy, prompts, family):
    """With a cache and padding on the left, or, where a model must fall back, without: the same as with neither."""
    policy = make_policy(family)
    rollout = draw(policy, prompts)
    completions, logprobs = sample_by_hand(make_policy(family), prompts, max_new_tokens=10)
    assert rollout.completions == completions
    torch.testing.assert_close(rollout.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert rollout.prompts == prompts
    assert route_of(policy).layout == ("padded" if family in ("bloom", "mamba") else "packed")


def test_a_seed_is_all_the_chance_there_is(make_policy, prompts):
    policy = make_policy()
    torch.manual_seed(1)
    first = draw(policy, prompts, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert draw(policy, prompts, seed=5).completions == first.completions
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(policy, prompts, seed=6).completions != first.completions


@pytest.mark.parametrize(("family", "temperature"), [("llama", 3.0), ("mamba", 1.0), ("mamba", 0.5)])
def test_recorded_logprobs_are_those_of_a_teacher_forced_pass(make_policy, prompts, family, temperature):
    policy = make_policy(family)
    rollout = draw(policy, prompts, temperature=temperature, stop_ids=frozenset(range(8)))
    forced = token_logprobs(policy.eval(), rollout.pack(), temperature=temperature)
    torch.testing.assert_close(rollout.logprobs, forced, rtol=1e-4, atol=1e-4)
    assert rollout.logprobs.dtype == torch.float32
    assert not rollout.logprobs.requires_grad


@pytest.mark.real
def test_real_weights(stories):
    """Greedy as transformers decodes, one prompt at a time; and sampled stories whose log-probs are true."""
    policy = prepare(AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    texts = ["Once upon a time", "Lily", "One day, a boy named Tim went to the park. He saw a big", ""]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert all(prompt[0] == 1 for prompt in prompts)  # BOS, which is also EOS: nothing ends before it began
    stops = frozenset({1, 2})
    greedy = draw(policy, prompts, max_new_tokens=60, temperature=0, stop_ids=stops)
    for prompt, completion in zip(prompts, greedy.completions, strict=True):
        ids = torch.tensor([prompt])
        theirs = policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60, eos_token_id=[1, 2],
            pad_token_id=0,
        )  # fmt: skip
        assert theirs[0, len(prompt) :].tolist() == completion
    assert tokenizer.decode(greedy.completions[0]).startswith(", there was a little girl named Lily")
    sampled = draw(policy, prompts * 3, max_new_tokens=60, stop_ids=stops)
    forced = token_logprobs(policy, sampled.pack())
    torch.testing.assert_close(sampled.logprobs, forced, rtol=1e-4, atol=1e-4)
    mean = forced.sum() / sum(map(len, sampled.completions))
    assert -2.2 < mean < -0.8  # a model's own samples are about as likely as its entropy says: no filter, no noise


def test_greedy_logprobs_are_those_of_temperature_one(make_policy, prompts):
    policy = make_policy()
    rollout = draw(policy, prompts, temperature=0)
    forced = token_logprobs(policy.eval(), rollout.pack())
    torch.testing.assert_close(rollout.logprobs, forced, rtol=1e-4, atol=1e-4)
    assert rollout.completions == draw(policy, prompts, temperature=0, seed=1).completions


def test_half_precision(make_policy, prompts):
    policy = make_policy().bfloat16()
    rollout = draw(policy, prompts)
    assert rollout.logprobs.dtype == torch.float32
    torch.testing.assert_close(rollout.logprobs, token_logprobs(policy.eval(), rollout.pack()), rtol=0.1, atol=0.1)


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_completion_ends_at_its_first_stop_token_and_keeps_it(make_policy, prompts, family):
    """As if it had gone on and been cut off there."""
    policy, stops = make_policy(family), frozenset({4, 7, 11, 23})
    endless = draw(policy, prompts, max_new_tokens=15)
    rollout = draw(policy, prompts, max_new_tokens=15, stop_ids=stops)
    for row, (completion, whole) in enumerate(zip(rollout.completions, endless.completions, strict=True)):
        ends = [i for i, token in enumerate(whole) if token in stops]
        length = ends[0] + 1 if ends else 15
        assert completion == whole[:length]
        assert rollout.finished[row].item() == bool(ends)
        torch.testing.assert_close(rollout.logprobs[row, :length], endless.logprobs[row, :length])
        assert rollout.logprobs[row, length:].tolist() == [0] * (rollout.logprobs.shape[1] - length)
    assert len({completion[-1] for completion in rollout.completions} & stops) > 1
    assert 0 < rollout.finished.sum() < len(prompts)
    assert not endless.finished.any()
    assert endless.logprobs.shape == (len(prompts), 15)


def test_no_work_after_the_last_one_ended(make_policy, prompts):
    policy, stops = make_policy(), frozenset(range(0, 40, 3))
    calls = []
    policy.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    rollout = draw(policy, prompts, max_new_tokens=100, stop_ids=stops)
    longest = max(map(len, rollout.completions))
    assert rollout.finished.all()
    assert len(calls) == longest < 100
    assert rollout.logprobs.shape == (len(prompts), longest)


def test_one_token(make_policy, prompts):
    rollout = draw(make_policy(), prompts, max_new_tokens=1)
    assert [len(completion) for completion in rollout.completions] == [1] * len(prompts)


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompts"), ([[3], []], "prompt 1 is empty")])
def test_there_must_be_something_to_continue(make_policy, prompts, message):
    with pytest.raises(ValueError, match=message):
        draw(make_policy(), prompts)


def test_batches_of_a_rollout(make_policy, prompts):
    rollout = draw(make_policy(), prompts, stop_ids=frozenset(range(8)))
    lengths = [len(completion) for completion in rollout.completions]
    whole = rollout.pack()
    assert whole.completion_mask.sum(-1).tolist() == lengths
    assert whole.completion_mask.shape == rollout.logprobs.shape
    for row, completion in enumerate(rollout.completions):
        assert whole.completion_ids()[row, : len(completion)].tolist() == completion
    some = rollout.select([4, 0]).pack()
    assert some.completion_mask.shape == (2, max(lengths))
    assert some.completion_mask.sum(-1).tolist() == [lengths[4], lengths[0]]
    parts = list(rollout.packs(4))
    assert [part.num_completions for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.completion_mask for part in parts]), whole.completion_mask)


# ----------------------------------------------------------------------------------------------------------- the policy


def test_a_policy_in_training_is_evaluated_and_trains_on(make_policy, prompts):
    """Dropout and activation checkpointing are on: neither touches the samples, and the cache works."""
    quiet = draw(make_policy(), prompts)
    policy = make_policy(attention_dropout=0.5)
    getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    policy.model.norm.eval()  # a part that somebody keeps from training
    flags = {name: module.training for name, module in policy.named_modules()}
    assert set(flags.values()) == {True, False}
    assert draw(policy, prompts).completions == quiet.completions
    assert {name: module.training for name, module in policy.named_modules()} == flags
    assert policy.model.layers[0].gradient_checkpointing
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_flags_come_back_after_an_error_too(make_policy, prompts):
    policy = make_policy()
    with pytest.raises(IndexError):
        draw(policy, [[99]])  # no such token
    assert policy.training


# --------------------------------------------------------------------------------------------------------------- choose

KNOWN = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.0, 0.25, 0.0])


@pytest.mark.parametrize("count", [16, 256])
def test_choose_follows_the_distribution(count):
    """`count` numbers spread evenly over [0, 1) fall on each token exactly as often as it is likely."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = choose(KNOWN.log().expand(count, -1), uniform, 1.0)
    assert torch.bincount(tokens, minlength=7).tolist() == (KNOWN * count).tolist()
    torch.testing.assert_close(logprobs, KNOWN.log()[tokens])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_choose_at_a_temperature(temperature):
    """0.25, 0.5, 0.25 sharpened to 1/6, 4/6, 1/6, or flattened to 1, sqrt 2, 1 over their sum."""
    count = 60_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = choose(KNOWN.log().expand(count, -1), uniform, temperature)
    powers = KNOWN.double() ** (1 / temperature)
    expected = powers / powers.sum()
    assert ((torch.bincount(tokens, minlength=7) - expected * count).abs() <= 1).all()
    torch.testing.assert_close(logprobs, expected.log()[tokens].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_choose_never_takes_what_has_no_probability(dtype):
    """At either end of [0, 1), with impossible tokens first, last and between, by -inf or by underflow."""
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for lowest in (float("-inf"), -1e4):
        logits = torch.tensor([lowest, 3.0, lowest, 5.0, 4.5, lowest, lowest]).expand(3, -1).to(dtype)
        tokens, logprobs = choose(logits, ends, 1.0)
        assert tokens.tolist() == [1, 1, 4]
        assert logprobs.dtype == torch.float32
        assert logprobs.isfinite().all()


@given(
    st.lists(st.floats(-30, 30) | st.just(float("-inf")), min_size=1, max_size=30).filter(
        lambda logits: max(logits) > float("-inf")
    ),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([0.3, 1.0, 4.0]),
)
@settings(deadline=None)
def test_choose_inverts_the_cumulative_sum(logits, uniform, temperature):
    tokens, _ = choose(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64), temperature)
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    token, total = tokens.item(), sum(weights)
    assert weights[token] > 0
    # Up to the rounding of float32 logits, the token is where the sum passes the number.
    assert sum(weights[:token]) / total <= uniform + 1e-4
    assert sum(weights[: token + 1]) / total >= uniform - 1e-4


def test_choose_at_temperature_zero_takes_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    tokens, logprobs = choose(logits, torch.tensor([0.99, 0.99], dtype=torch.float64), 0)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


# ---------------------------------------------------------------------------------------------------------- disagreeing


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({}, None),
        (dict(top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0), None),
        (dict(top_k=None, top_p=None, min_p=None, repetition_penalty=None), None),
        (dict(top_k=50), "top_k=50"),
        (dict(top_p=0.9, min_p=0.05), "top_p=0.9, min_p=0.05"),
        (dict(repetition_penalty=1.2, do_sample=True), "repetition_penalty=1.2"),
    ],
)
def test_what_a_checkpoint_wants_otherwise(wishes, said):
    assert sampling_disagreement(SimpleNamespace(**wishes)) == said
