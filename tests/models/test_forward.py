"""The way through a model gives the numbers and the gradients of transformers' own padded forward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlhf_core.batch import PackedBatch
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import (
    completion_states,
    last_states,
    pair_logprobs,
    policy_outputs,
    prepare,
    route_of,
    sequence_scores,
    summed_loss,
    token_logprobs,
    token_values,
)
from rlhf_core.models.heads import ValueHead
from rlhf_kernels.registry import implementation

PACKED_FAMILIES = ["llama", "qwen2", "gpt2", "mistral", "gemma3", "cohere", "granite", "capped"]
PADDED_FAMILIES = ["bloom", "mamba", "gpt_oss", "gemma2", "qwen2_moe"]


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("family", PACKED_FAMILIES)
@pytest.mark.parametrize(("layout", "share"), [("packed", True), ("packed", False), ("auto", "auto"), ("padded", True)])
def test_logprobs_are_those_of_the_plain_forward(make_model, twin, groups, plain, agree, family, layout, share):
    model = make_model(family)
    other, batch = twin(model), PackedBatch.pack(groups, share=share)
    agree(prepare(model, layout), lambda model: token_logprobs(model, batch), other, plain.logprobs)
    assert route_of(model).fused_head


@pytest.mark.parametrize("family", PADDED_FAMILIES)
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_logprobs_of_models_that_fall_back(make_model, twin, groups, plain, agree, family, layout):
    model = make_model(family)
    other, batch = twin(model), PackedBatch.pack(groups, share=True)
    agree(prepare(model, layout), lambda model: token_logprobs(model, batch), other, plain.logprobs)
    assert route_of(model).layout == "padded"


@pytest.mark.parametrize("family", ["llama", "cohere", "capped", "bloom", "gpt_oss"])
@pytest.mark.parametrize(("dft", "temperature"), [(False, 1.0), (True, 0.7)], ids=["plain", "dft"])
def test_a_loss_summed_in_one_pass_is_the_loss_of_all_log_probs(
    make_model, groups, agree, family, dft, temperature, monkeypatch
):
    """Over several blocks of the head or the model's own logits, and with a loss that is not linear in a log-prob."""
    monkeypatch.setattr(implementation("linear_logprobs", "torch"), "block_rows", lambda weight: 16)
    model, other = prepare(make_model(family)), prepare(make_model(family))
    batch = PackedBatch.pack(groups, share=True)
    options = dict(normalizer=7.0, dft=dft)
    found = []

    def in_one_pass(model):
        result = summed_loss(model, batch, lambda *tokens: sft_loss(*tokens, **options), temperature=temperature)
        assert not result.logprobs.requires_grad
        assert result.router_loss is None
        found.append(result.logprobs)
        return result.loss[None]

    def of_all(model):
        logprobs = token_logprobs(model, batch, temperature=temperature)
        found.append(logprobs.detach())
        return sft_loss(logprobs, batch.completion_mask, **options)[0][None]

    agree(model, in_one_pass, other, of_all)
    torch.testing.assert_close(*found)


@pytest.mark.real
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_trained_weights(stories, twin, groups, plain, agree, layout):
    """Sharper attention than random weights': plain float32 itself is 1.6e-5 from float64 here, and ours 2e-5."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    batch = PackedBatch.pack(groups, share=True)
    other, truth = twin(model), plain.logprobs
    agree(prepare(model, layout), lambda model: token_logprobs(model, batch), other, truth, tolerance=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_foreign_checkpoint(shared, twin, make_plain, agree, layout):
    """A GPT-2 of hidden size 2 that somebody else saved, without an LM head of its own: the head is tied.

    A LayerNorm over two numbers divides by their difference, so rounding weighs more than elsewhere.
    """
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "tiny_random_gpt2", dtype=torch.float32).eval()
    groups = [([3, 4, 5], [[6, 7, 8, 20], [9, 20]]), ([20], [[1, 2, 3]])]
    batch = PackedBatch.pack(groups, share=True)
    other, truth = twin(model), make_plain(groups).logprobs
    agree(prepare(model, layout), lambda model: token_logprobs(model, batch), other, truth, tolerance=1e-4)


def count_calls(module: torch.nn.Module) -> list[int]:
    calls = [0]

    def count(*_):
        calls[0] += 1

    module.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba"])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_activation_checkpointing_changes_no_number(make_model, twin, groups, plain, agree, family, layout):
    model = make_model(family)
    other = twin(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    batch = PackedBatch.pack(groups, share=True)
    prepare(model, layout)
    layer = model.base_model.layers[0]
    calls = count_calls(layer.norm if family == "mamba" else layer.input_layernorm)
    counted = []

    def run(model):
        logprobs = token_logprobs(model, batch)
        counted.append(calls[0])
        return logprobs

    agree(model, run, other, plain.logprobs)
    assert counted == [1]
    assert calls == [2], "the layer was not computed again in the backward pass: nothing was checkpointed"


@pytest.mark.parametrize("family", ["llama", "cohere", "granite", "capped", "bloom"])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_temperature_divides_the_logits(make_model, twin, groups, plain, agree, family, temperature):
    model = make_model(family)
    other, batch = twin(model), PackedBatch.pack(groups)
    agree(
        prepare(model),
        lambda model: token_logprobs(model, batch, temperature=temperature),
        other,
        lambda model: plain.logprobs(model, temperature),
    )


@pytest.mark.parametrize("family", ["llama", "capped", "bloom"])
def test_entropy_of_the_distribution(make_model, twin, groups, plain, family):
    model = make_model(family)
    distribution = torch.distributions.Categorical(logits=plain.logits(twin(model)) / 1.3)
    outputs = policy_outputs(prepare(model), PackedBatch.pack(groups), entropy=True, temperature=1.3)
    torch.testing.assert_close(outputs.entropy, distribution.entropy() * plain.mask, rtol=1e-5, atol=1e-5)
    assert not outputs.entropy.requires_grad
    assert outputs.values is None
    assert policy_outputs(model, PackedBatch.pack(groups)).entropy is None


class Squared(LlamaForCausalLM):
    """A model whose logits are not described by its config."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.square()
        return output


@pytest.mark.parametrize("layout", ["packed", "auto", "padded"])
def test_a_head_that_is_not_linear_runs_by_its_own_logits(make_model, twin, groups, plain, agree, layout):
    model = Squared(make_model("llama").config)
    other, batch = twin(model), PackedBatch.pack(groups, share=True)
    agree(
        prepare(model, layout), lambda model: token_logprobs(model, batch, temperature=0.8), other,
        lambda model: plain.logprobs(model, 0.8),
    )  # fmt: skip
    assert not route_of(model).fused_head
    outputs = policy_outputs(model, batch, entropy=True)
    entropy = torch.distributions.Categorical(logits=plain.logits(other)).entropy()
    torch.testing.assert_close(outputs.entropy, entropy * plain.mask, rtol=1e-5, atol=1e-5)


def test_an_unknown_config_entry_of_a_known_name_does_no_harm(make_model, twin, groups, plain, agree):
    """A Llama with Cohere's `logit_scale` in its config does not scale its logits."""
    model = make_model("llama", logit_scale=0.5)
    other, batch = twin(model), PackedBatch.pack(groups)
    agree(prepare(model), lambda model: token_logprobs(model, batch), other, plain.logprobs)
    assert not route_of(model).fused_head


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_half_precision_weights_give_float32_logprobs(make_model, groups, plain, layout):
    """As near to the truth as transformers' own bfloat16 forward is, give or take a quarter."""
    exact = make_model("llama", initializer_range=0.1).eval()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())  # the same weights: only the arithmetic differs
    with torch.no_grad():
        truth, own = plain.logprobs(exact), plain.logprobs(copy.deepcopy(model)).float()
        logprobs = token_logprobs(prepare(model, layout), PackedBatch.pack(groups, share=True))
    assert logprobs.dtype == torch.float32
    error, own_error = (logprobs - truth)[plain.mask].norm(), (own - truth)[plain.mask].norm()
    assert error < 1.25 * own_error
    assert route_of(model).layout == layout


# ---------------------------------------------------------------------------------------------------- values and scores


def random_value_head(size: int = 32) -> ValueHead:
    torch.manual_seed(2)
    head = ValueHead(size)
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.linear.bias)
    return head


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_values_come_from_the_same_forward(make_model, twin, groups, plain, agree, family):
    model, head = make_model(family), random_value_head()
    other, other_head = twin(model), twin(head)
    batch = PackedBatch.pack(groups, share=True)
    prepare(model)
    calls = count_calls(model.base_model)
    agree(
        model,
        lambda model: policy_outputs(model, batch, value_head=head).values,
        other,
        lambda model: other_head(plain.states(model.base_model)) * plain.mask,
    )
    assert calls == [1]
    for parameter, truth in zip(head.parameters(), other_head.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, truth.grad, rtol=1e-5, atol=1e-5)
    outputs = policy_outputs(model, batch, value_head=head)
    torch.testing.assert_close(outputs.logprobs, plain.logprobs(other), rtol=1e-5, atol=1e-5)


def test_values_beside_a_models_own_logits(make_model, twin, groups, plain):
    model, head = Squared(make_model("llama").config), random_value_head()
    truth = head(plain.states(twin(model).base_model)) * plain.mask
    values = policy_outputs(prepare(model), PackedBatch.pack(groups), value_head=head).values
    torch.testing.assert_close(values, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_token_values_are_read_before_the_token(make_scorer, twin, groups, plain, agree, family, layout):
    model = make_scorer(family)
    other, batch = twin(model), PackedBatch.pack(groups, share=True)
    agree(
        prepare(model, layout),
        lambda model: token_values(model, batch),
        other,
        lambda model: model.score(plain.states(model.base_model)).squeeze(-1) * plain.mask,
    )


def test_a_value_may_not_see_its_token(make_scorer, groups):
    model = prepare(make_scorer("llama")).eval()
    before = token_values(model, PackedBatch.pack(groups, share=True))
    groups[0][1][1][5] += 1  # the sixth token of the second completion
    change = (token_values(model, PackedBatch.pack(groups, share=True)) - before).abs()[1]
    assert change[:6].max() < 1e-6
    assert change[6:14].min() > 1e-6


def last_token_scores(model, groups) -> torch.Tensor:
    """Row by row, without padding, by transformers' own classifier, which then reads the last token."""
    model.config.pad_token_id = None
    rows = [[*prompt, *completion] for prompt, completions in groups for completion in completions]
    return torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[:, 0] for row in rows])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3", "bloom"])
@pytest.mark.parametrize(("layout", "share"), [("auto", True), ("auto", False), ("padded", True)])
def test_scores_are_read_at_the_last_token(make_scorer, twin, groups, agree, family, layout, share):
    model = make_scorer(family)
    other, batch = twin(model), PackedBatch.pack(groups, share=share)
    agree(
        prepare(model, layout),
        lambda model: sequence_scores(model, batch),
        other,
        lambda model: last_token_scores(model, groups),
    )


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("pad", [None, 0, 2, 7])
def test_no_id_decides_where_a_completion_ends(make_scorer, twin, layout, pad):
    """The last tokens are pad, EOS, or pad after pad: each counts."""
    model = make_scorer("llama").eval()
    groups = [([1, 5, 0], [[7, 2], [7, 2, 0], [0, 0, 0], [7], [2]]), ([2, 2], [[7, 7]])]
    truth = last_token_scores(twin(model), groups)
    model.config.pad_token_id = pad
    scores = sequence_scores(prepare(model, layout), PackedBatch.pack(groups, share=True))
    torch.testing.assert_close(scores, truth, rtol=1e-5, atol=1e-5)


def test_a_policy_has_no_scores(make_model, groups):
    for function in (sequence_scores, token_values):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no `score` head; load it with load_reward_model"):
            function(prepare(make_model("llama")), PackedBatch.pack(groups))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_states_of_the_rows_that_predict_and_of_the_last_tokens(make_model, twin, groups, plain, layout):
    model = make_model("gemma3").eval()
    other, batch = twin(model).base_model, PackedBatch.pack(groups, share=True)
    prepare(model, layout)
    truth = plain.states(other)[plain.mask]
    torch.testing.assert_close(completion_states(model, batch), truth, rtol=1e-5, atol=1e-5)
    rows = [[*prompt, *completion] for prompt, completions in groups for completion in completions]
    truth = torch.cat([other(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[:, -1] for row in rows])
    torch.testing.assert_close(last_states(model, batch), truth, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_log_probs_of_pairs(make_model):
    policy, reference = prepare(make_model("llama").eval()), prepare(make_model("llama", seed=1).eval())
    rows = [([1, 5, 6], [[7, 8, 2], [9, 2]], [[0, 1, 1], [1, 1]]), ([1, 3], [[4, 2], [5, 6, 7, 2]])]
    batch = PackedBatch.pack(rows, share=True)
    pairs = pair_logprobs(policy, reference, batch)
    logprobs, ref_logprobs = token_logprobs(policy, batch), token_logprobs(reference, batch)
    for start, side in enumerate((pairs.chosen, pairs.rejected)):
        assert torch.equal(side.logprobs, logprobs[start::2])
        assert torch.equal(side.ref_logprobs, ref_logprobs[start::2])
        assert torch.equal(side.mask, batch.loss_mask[start::2])
        assert side.logprobs.requires_grad and not side.ref_logprobs.requires_grad
        assert side.kl is None
    assert pairs.weights is None and pairs.margin is None
    assert reference.lm_head.weight.requires_grad  # run without gradient, not frozen


def test_pairs_without_a_reference(make_model):
    pairs = pair_logprobs(prepare(make_model("llama")), None, PackedBatch.pack([([1], [[2, 3], [4]])]))
    for side in (pairs.chosen, pairs.rejected):
        assert side.ref_logprobs is None and side.kl is None


@pytest.mark.parametrize("family", ["llama", "capped", "granite"])
def test_the_exact_kl_of_tdpo_and_the_agreement_of_wpo(make_model, family):
    """By definition, from logits: KL(reference || policy) with its gradient, and log sum_v p_v^2 without."""
    policy, reference = prepare(make_model(family).eval()), prepare(make_model(family, seed=1).eval())
    rows = [([1, 5, 6], [[7, 8, 2], [9, 2]]), ([1, 3], [[4, 2], [5, 6, 7, 2]])]
    batch = PackedBatch.pack(rows)
    pairs = pair_logprobs(policy, reference, batch, kl=True)
    log_sum_sq_probs = policy_outputs(policy, batch, log_sum_sq_probs=True).log_sum_sq_probs
    expected_kl = []
    for i, (prompt, completions) in enumerate(rows):
        for start, completion in enumerate(completions):
            row, places = torch.tensor([prompt + completion]), slice(len(prompt) - 1, -1)
            p = policy(row).logits[0, places].log_softmax(-1)
            q = reference(row).logits[0, places].log_softmax(-1).detach()
            kl = (q.exp() * (q - p)).sum(-1)
            expected_kl.append(kl.sum())
            length, side = len(completion), (pairs.chosen, pairs.rejected)[start]
            torch.testing.assert_close(side.kl[i, :length], kl, rtol=1e-4, atol=1e-5)
            assert not side.kl[i, length:].any()
            agreement = (2 * p).logsumexp(-1).detach()
            torch.testing.assert_close(log_sum_sq_probs[2 * i + start, :length], agreement, rtol=1e-4, atol=1e-5)
    assert not log_sum_sq_probs.requires_grad
    weights = list(policy.parameters())
    ours = torch.autograd.grad(pairs.chosen.kl.sum() + pairs.rejected.kl.sum(), weights)
    theirs = torch.autograd.grad(torch.stack(expected_kl).sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="kl=True: expected a reference"):
        pair_logprobs(policy, None, batch, kl=True)


def test_an_odd_number_makes_no_pairs(make_model):
    with pytest.raises(ValueError, match="num_completions=3: expected pairs"):
        pair_logprobs(make_model("llama"), None, PackedBatch.pack([([1], [[2, 3], [4], [5]])]))


# ------------------------------------------------------------------------------------------------------------ isolation


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba"])
@pytest.mark.parametrize("share", [True, False])
def test_sequences_do_not_see_each_other(make_model, groups, family, share):
    """Other tokens in one completion, or in one prompt, change that completion's, or that prompt's, numbers alone."""
    model = prepare(make_model(family).eval())

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            return token_logprobs(model, PackedBatch.pack(groups, share=share))

    before = logprobs()
    completion = groups[0][1][1]  # row 1
    completion[:] = [(token + 1) % 61 for token in completion]
    change = (logprobs() - before).abs().amax(-1)
    assert change[1] > 1e-2
    assert change[[0, *range(2, len(change))]].max() < 1e-6

    before = logprobs()
    prompt = groups[3][0]  # of rows 6 and 7
    prompt[:] = [(token + 1) % 61 for token in prompt]
    change = (logprobs() - before).abs().amax(-1)
    assert change[[6, 7]].min() > 1e-2
    assert change[[*range(6), 8]].max() < 1e-6


# ------------------------------------------------------------------------------------------- the whole distribution


@pytest.mark.parametrize(
    ("family", "other"),
    [
        ("llama", "llama"), ("cohere", "cohere"), ("capped", "capped"), ("bloom", "bloom"),
        ("llama", "granite"), ("capped", "llama"), ("llama", "bloom"),  # heads of two kinds: from their logits
    ],
)  # fmt: skip
@pytest.mark.parametrize("gradient", [False, True], ids=["fused", "with entropy"])
def test_the_exact_kl_to_a_reference(make_model, twin, groups, plain, agree, family, other, gradient):
    """Summed over the vocabulary of plain logits, with its gradient to the policy and none to the reference."""
    model, reference = make_model(family), make_model(other, seed=1)
    truth, batch = twin(model), PackedBatch.pack(groups, share=True)
    with torch.no_grad():
        theirs = (plain.logits(twin(reference)) / 1.3).log_softmax(-1)

    def exact(model):
        ours = (plain.logits(model) / 1.3).log_softmax(-1)
        return (ours.exp() * (ours - theirs)).sum(-1) * plain.mask

    options = dict(reference=prepare(reference), temperature=1.3, entropy_gradient=gradient)
    agree(prepare(model), lambda model: policy_outputs(model, batch, **options).kl, truth, exact)
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert policy_outputs(model, batch).kl is None


def test_the_kl_to_itself_is_nothing(make_model, groups):
    model = prepare(make_model("llama"))
    kl = policy_outputs(model, PackedBatch.pack(groups), reference=model).kl
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "cohere", "granite", "capped", "bloom"])
def test_entropy_with_its_gradient(make_model, twin, groups, plain, agree, family):
    batch = PackedBatch.pack(groups, share=True)
    model = make_model(family)

    def by_hand(model):
        logprobs = (plain.logits(model) / 1.3).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1) * plain.mask

    def ours(model):
        return policy_outputs(model, batch, temperature=1.3, entropy_gradient=True).entropy

    other = twin(model)
    agree(prepare(model), ours, other, by_hand)


@pytest.mark.parametrize("family", ["llama", "cohere", "capped"])
def test_log_probs_and_values_beside_such_an_entropy(make_model, groups, family):
    model, head = prepare(make_model(family)), ValueHead(32)
    torch.nn.init.normal_(head.linear.weight)
    batch = PackedBatch.pack(groups)
    plainly = policy_outputs(model, batch, value_head=head, temperature=0.7, entropy=True)
    outputs = policy_outputs(model, batch, value_head=head, temperature=0.7, entropy_gradient=True)
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(outputs, name), getattr(plainly, name), rtol=1e-5, atol=1e-5)
    assert outputs.entropy.requires_grad and not plainly.entropy.requires_grad
