"""Several completions of a prompt, values, rows that leave early."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from rlhf_core.config import SamplingConfig
from rlhf_core.models.forward import policy_outputs, prepare
from rlhf_core.models.heads import ValueHead
from rlhf_core.rollout import sampling
from rlhf_core.rollout.engines import sample_completions
from rlhf_core.rollout.sampling import sample
from rlhf_core.seeding import generator
from tests.rollout.test_sampling import draw, sample_by_hand

OFTEN = frozenset(range(8))  # stop tokens that come at many different places
FAMILIES = ["llama", "gpt2", "gemma3", "bloom", "mamba"]


def head_of(policy) -> ValueHead:
    head = ValueHead(policy.config.hidden_size)
    with torch.no_grad():
        head.linear.weight.normal_(generator=torch.Generator().manual_seed(3))
        head.linear.bias.fill_(0.5)
    return head


@pytest.fixture
def widths():
    """widths(policy): the shapes of the inputs of every forward of its trunk that follows."""

    def watch(policy) -> list[tuple[int, int]]:
        shapes: list[tuple[int, int]] = []
        policy.base_model.register_forward_pre_hook(
            lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
        )
        return shapes

    return watch


# ---------------------------------------------------------------------------------------------------- several samples


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sample_is_drawn_from_the_whole_distribution(make_policy, prompts, family):
    rollout = draw(make_policy(family), prompts, n=3, temperature=0.8)
    completions, logprobs = sample_by_hand(make_policy(family), prompts, n=3, max_new_tokens=10, temperature=0.8)
    assert rollout.completions == completions
    torch.testing.assert_close(rollout.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert rollout.prompts == [prompt for prompt in prompts for _ in range(3)]
    assert rollout.group_size == 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_more_samples_leave_the_first_ones_as_they_were(make_policy, prompts, family):
    policy = make_policy(family)
    many = draw(policy, prompts, n=5, stop_ids=OFTEN)
    assert len({tuple(completion) for completion in many.completions[:5]}) > 3
    for n in (1, 2, 4):
        few = draw(policy, prompts, n=n, stop_ids=OFTEN)
        assert few.completions == [many.completions[i * 5 + j] for i in range(len(prompts)) for j in range(n)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_samples_do_not_depend_on_the_batch(make_policy, prompts, family):
    """Batches that hold several groups, one, parts of one, or the end of one and the start of another."""
    policy = make_policy(family)
    together = draw(policy, prompts, n=4, stop_ids=OFTEN, value_head=head_of(policy))
    for batch_size in (1, 3, 5, 9):
        parts = draw(policy, prompts, n=4, stop_ids=OFTEN, value_head=head_of(policy), batch_size=batch_size)
        assert parts.completions == together.completions
        assert torch.equal(parts.finished, together.finished)
        torch.testing.assert_close(parts.logprobs, together.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(parts.values, together.values, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_computed_once_and_rows_that_ended_no_more(make_policy, prompts, widths):
    policy = make_policy()
    shapes = widths(policy)
    rollout = draw(policy, prompts, n=4, max_new_tokens=40, stop_ids=OFTEN)
    assert rollout.finished.all()
    assert shapes[0] == (len(prompts), max(map(len, prompts)))
    rows, running = [], len(rollout.completions)
    for t, (height, width) in enumerate(shapes[1:], start=1):
        running = sum(len(completion) > t for completion in rollout.completions)
        assert width == 1
        assert running <= height <= max(running / (1 - sampling._FINISHED_SHARE), 1)
        rows.append(height)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] < 24
    assert len(shapes) == max(map(len, rollout.completions))


def test_a_batch_holds_no_more_rows_than_asked(make_policy, prompts, widths):
    for n, batch_size, expected in ((4, 10, 8), (4, 3, 3), (1, 5, 5)):
        policy = make_policy()
        shapes = widths(policy)
        draw(policy, prompts, n=n, batch_size=batch_size)
        assert max(height for height, width in shapes) == expected


def test_prompts_of_one_length_need_no_mask(make_policy):
    """Without a padding mask as with one, which a longer prompt beside them makes necessary."""
    policy, equal = make_policy(), [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    masks = []
    policy.base_model.register_forward_pre_hook(
        lambda module, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )
    alone = draw(policy, equal, n=2)
    assert {mask is None for mask in masks} == {True}
    masks.clear()
    beside = draw(policy, [*equal, [3] * 9], n=2)
    # The fourth prompt's numbers of round 1 come between: only the first samples draw with the same numbers.
    assert not any(mask is None for mask in masks)
    assert beside.completions[0:6:2] == alone.completions[0::2]


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_is_an_error(make_policy, prompts, n):
    with pytest.raises(ValueError, match=f"n={n}: expected 1 or more"):
        draw(make_policy(), prompts, n=n)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_broken_policy_is_named_as_such(make_policy, prompts, value, temperature):
    policy = make_policy(tie_word_embeddings=False)
    with torch.no_grad():
        policy.lm_head.weight[7] = value
    with pytest.raises(ValueError, match="prompt 0, sample 0, token 0: the policy's logits are not finite"):
        draw(policy, prompts, n=2, temperature=temperature)


# ------------------------------------------------------------------------------------------------------- teacher-forced


@torch.no_grad()
def values_by_hand(policy, head, prompt, completion) -> torch.Tensor:
    """Of the state before each token, from one ordinary forward of the sequence alone."""
    policy.eval()
    output = policy(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False)
    states = output.hidden_states[-1][0, len(prompt) - 1 : -1]
    return states @ head.linear.weight[0] + head.linear.bias


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_values_are_those_of_the_states_before_the_tokens(make_policy, prompts, family, n):
    policy = make_policy(family)
    head = head_of(policy)
    rollout = draw(policy, prompts, n=n, stop_ids=OFTEN, value_head=head)
    assert rollout.values.shape == rollout.logprobs.shape
    assert rollout.values.dtype == torch.float32
    assert not rollout.values.requires_grad
    for row, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        expected = values_by_hand(policy, head, prompt, completion)
        torch.testing.assert_close(rollout.values[row, : len(completion)], expected, rtol=1e-4, atol=1e-4)
        assert not rollout.values[row, len(completion) :].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_is_recorded_is_what_a_teacher_forced_pass_says(make_policy, prompts, family, temperature):
    """By the forward that trainers use, the groups' prompts shared."""
    policy = make_policy(family)
    head = head_of(policy)
    rollout = draw(policy, prompts, n=3, temperature=temperature, stop_ids=OFTEN, value_head=head)
    with torch.no_grad():
        forced = policy_outputs(policy.eval(), rollout.pack(), value_head=head, temperature=temperature)
    torch.testing.assert_close(rollout.logprobs, forced.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.values, forced.values, rtol=1e-5, atol=1e-5)


def test_recording_values_changes_no_sample(make_policy, prompts):
    policy = make_policy()
    plain = draw(policy, prompts, n=2)
    valued = draw(policy, prompts, n=2, value_head=head_of(policy))
    assert plain.values is None
    assert valued.completions == plain.completions
    assert torch.equal(valued.logprobs, plain.logprobs)


@pytest.mark.real
def test_groups_of_stories(stories):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = prepare(AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "Lily", "The dog ran to the big red")]
    head = head_of(policy)
    rollout = draw(policy, prompts, n=8, max_new_tokens=150, stop_ids=frozenset({1, 2}), value_head=head)
    with torch.no_grad():
        forced = policy_outputs(policy, rollout.pack(), value_head=head)
    torch.testing.assert_close(rollout.logprobs, forced.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rollout.values, forced.values, rtol=1e-4, atol=1e-4)
    assert len({tuple(completion) for completion in rollout.completions}) == 24


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("seed", range(4))
def test_a_preallocated_layer_is_a_cache(seed):
    """Against transformers' own layer: appends of many lengths, as many as are allocated and more; rows that leave."""
    torch.manual_seed(seed)
    ours, theirs, rows = sampling._PreallocatedLayer(), DynamicLayer(), 5
    ours.batch_select_indices(torch.tensor([0]))  # before there is anything
    for length in (7, 1, 1, 30, 1, sampling._GROWTH, 2 * sampling._GROWTH + 3, 1, 1):
        new = torch.randn(2, rows, 2, length, 4)
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        indices = torch.randint(rows, (int(torch.randint(1, 7, ())),))
        for layer in (ours, theirs):
            layer.batch_select_indices(indices)
        rows = len(indices)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_completions_longer_than_what_is_allocated(make_policy, prompts):
    length = sampling._GROWTH + 10
    rollout = draw(make_policy(), prompts[:2], n=2, max_new_tokens=length)
    completions, logprobs = sample_by_hand(make_policy(), prompts[:2], n=2, max_new_tokens=length)
    assert rollout.completions == completions
    torch.testing.assert_close(rollout.logprobs, logprobs, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the settings


def test_completions_are_sampled_by_the_settings(make_policy, make_tokenizer, prompts):
    policy, tokenizer = make_policy(), make_tokenizer(eos_token="w2")
    policy.generation_config.eos_token_id = 2
    head = head_of(policy)
    config = SamplingConfig(max_new_tokens=7, temperature=0.7, batch_size=5)
    numbers = generator(3, "rollout", 4)
    rollout = sample_completions(policy, tokenizer, prompts, config, numbers, n=2, value_head=head)
    expected = sample(
        policy, prompts, 2, max_new_tokens=7, temperature=0.7, stop_ids=frozenset({2}),
        generator=generator(3, "rollout", 4), value_head=head,
    )  # fmt: skip
    assert rollout.completions == expected.completions
    torch.testing.assert_close(rollout.values, expected.values, rtol=1e-4, atol=1e-4)
    other = sample_completions(policy, tokenizer, prompts, config, generator(3, "rollout", 5))
    assert other.completions != [rollout.completions[row] for row in range(0, 12, 2)]
    assert other.values is None


# ------------------------------------------------------------------------------------------ choosing, block after block


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 300, 1024])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_choose_walks_through_a_large_vocabulary(vocabulary, temperature):
    """Against one walk over all tokens; whole blocks without probability, at the ends too, are stepped over."""
    torch.manual_seed(vocabulary)
    logits = 3 * torch.randn(vocabulary)
    logits[torch.rand(vocabulary) < 0.3] = float("-inf")
    if vocabulary > 256:
        logits[:128], logits[256:280] = float("-inf"), float("-inf")
    logits[-1] = 0.0
    uniform = torch.rand(500, dtype=torch.float64)
    uniform[:3] = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = sampling.choose(logits.expand(500, -1), uniform, temperature)
    probabilities = (logits.double() / temperature).softmax(-1)
    passed = list(itertools.accumulate(probabilities.tolist()))
    for number, token in zip(uniform.tolist(), tokens.tolist(), strict=True):
        assert probabilities[token] > 0
        assert (passed[token - 1] if token else 0) - 1e-7 <= number * passed[-1] <= passed[token] + 1e-7
    torch.testing.assert_close(logprobs, probabilities.log()[tokens].float(), rtol=1e-5, atol=1e-5)


def test_choose_at_the_end_of_a_block():
    """256 tokens of 1 / 256 each: the numbers k / 256 fall on token k exactly, also where k begins a block."""
    uniform = torch.arange(256, dtype=torch.float64) / 256
    tokens, _ = sampling.choose(torch.zeros(256, 256), uniform, 1.0)
    assert tokens.tolist() == list(range(256))
    tokens, _ = sampling.choose(torch.zeros(256, 256), uniform + 1 / 256 - 2.0**-50, 1.0)
    assert tokens.tolist() == list(range(256))


def test_rounding_at_the_end_of_a_block_chooses_nothing_impossible():
    """Numbers a hair below the sum over a block, which the walk inside may round to less; token 128 is impossible."""
    logits = 10 * torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    logits[:, 128] = float("-inf")
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    first, second = weights.view(-1, 2, 128).sum(-1, dtype=torch.float64).unbind(1)
    uniform = first / (first + second)
    reached = 0
    for _ in range(4):
        uniform = torch.nextafter(uniform, torch.zeros_like(uniform))
        tokens, logprobs = sampling.choose(logits, uniform, 1.0)
        assert logprobs.isfinite().all()
        reached += (tokens < 128).sum().item()
    assert reached > 8000


def test_prompts_of_like_length_go_together(make_policy, prompts, widths):
    policy = make_policy()
    shapes = widths(policy)
    rollout = draw(policy, prompts, batch_size=2, max_new_tokens=1)
    assert shapes == [(2, 14), (2, 5), (2, 2)]  # of 14, 9, 5, 3, 2 and 1 tokens
    assert rollout.prompts == prompts
