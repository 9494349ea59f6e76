"""Which tokens a summed loss sees and how they weigh; means over the vocabulary; scores along a completion."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForTokenClassification

from rlhf_core.batch import PackedBatch
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import (
    policy_outputs,
    prepare,
    sequence_scores,
    summed_loss,
    token_logprobs,
    token_scores,
)
from rlhf_kernels.registry import implementation

LAYOUTS = pytest.mark.parametrize("layout", ["packed", "padded"])


def flags_of(groups) -> list[list[list[bool]]]:
    """Some tokens of each completion, at least one."""
    generator = torch.Generator().manual_seed(3)
    flags = [[torch.rand(len(c), generator=generator) < 0.6 for c in completions] for _, completions in groups]
    for completions in flags:
        for one in completions:
            one[0] |= not one.any()
    return [[one.tolist() for one in completions] for completions in flags]


@pytest.mark.parametrize("family", ["llama", "cohere", "capped", "bloom"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_summed_loss_sees_the_supervised_tokens_alone(
    make_model, twin, groups, plain, agree, monkeypatch, family, weighted
):
    """Against the plain forward, where everything is computed and the mask taken last; over several blocks."""
    monkeypatch.setattr(implementation("linear_logprobs", "torch"), "block_rows", lambda weight: 7)
    flags = flags_of(groups)
    batch = PackedBatch.pack([(*group, one) for group, one in zip(groups, flags, strict=True)], share=True)
    weights = torch.linspace(0, 2, batch.num_completions) if weighted else None
    model = make_model(family)
    found = []

    def ours(model):
        result = summed_loss(model, batch, partial(sft_loss, normalizer=7.0, dft=True), weights=weights)
        found.append(result.logprobs)
        return result.loss[None]

    def truth(model):
        logprobs, total = plain.logprobs(model), 0.0
        rows = [one for completions in flags for one in completions]
        for row, one in enumerate(rows):
            for t, counts in enumerate(one):
                if counts:
                    weight = 1.0 if weights is None else weights[row]
                    total = total - weight * logprobs[row, t].detach().exp() * logprobs[row, t] / 7
        found.append(torch.where(batch.loss_mask, logprobs.detach(), 0.0))
        return total[None]

    other = twin(model)
    agree(prepare(model), ours, other, truth)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "granite", "capped", "bloom"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mean_log_prob_of_the_vocabulary(make_model, twin, groups, plain, agree, family, temperature):
    """With its gradient, and without the logits where they are linear in the state."""
    model = make_model(family)
    batch = PackedBatch.pack(groups, share=True)

    def ours(model):
        return policy_outputs(model, batch, temperature=temperature, mean_logprob=True).mean_logprob

    def truth(model):
        return (plain.logits(model) / temperature).log_softmax(-1).mean(-1) * plain.mask

    other = twin(model)
    agree(prepare(model), ours, other, truth, tolerance=3e-5)


def test_the_mean_log_prob_with_a_bias_in_the_head(make_model, groups, plain):
    model = make_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(61, generator=torch.Generator().manual_seed(0)))
    expected = plain.logits(model).log_softmax(-1).mean(-1) * plain.mask
    batch = PackedBatch.pack(groups)
    mean = policy_outputs(prepare(model), batch, mean_logprob=True).mean_logprob
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "capped", "bloom"])
def test_the_argmax_is_that_of_the_logits(make_model, groups, plain, family):
    model = make_model(family)
    with torch.no_grad():
        logits = plain.logits(model)
    top = logits.argmax(-1)
    groups = [(prompt, [list(c) for c in completions]) for prompt, completions in groups]
    batch = PackedBatch.pack(groups)
    found = policy_outputs(prepare(model), batch, is_argmax=True).is_argmax
    assert found.dtype == torch.bool
    assert torch.equal(found, (top == plain.targets) & plain.mask)
    # Random weights are rarely right: with each row's last token replaced by the argmax, they are.
    lasts = plain.mask.sum(-1) - 1
    row = 0
    for _, completions in groups:
        for completion in completions:
            completion[-1] = top[row, lasts[row]].item()
            row += 1
    found = policy_outputs(model, PackedBatch.pack(groups), is_argmax=True).is_argmax
    assert found[torch.arange(row), lasts].all()


@LAYOUTS
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_along_a_completion_are_those_of_a_token_classifier(
    make_model, twin, groups, plain, agree, family, layout, share
):
    """Read at the token itself, in a model with the head of plain transformers, whatever it is named."""
    model = make_model(family, auto=AutoModelForTokenClassification, num_labels=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    other, batch = twin(model), PackedBatch.pack(groups, share=share)

    def truth(model):
        logits = model(input_ids=plain.input_ids, attention_mask=plain.attention_mask).logits.squeeze(-1)
        return logits.gather(1, plain.predicts + plain.mask.long()) * plain.mask

    agree(prepare(model, layout), lambda model: token_scores(model, batch), other, truth)


@LAYOUTS
def test_the_last_of_them_is_the_score_of_the_completion(make_scorer, groups, layout):
    model = prepare(make_scorer("llama"), layout)
    batch = PackedBatch.pack(groups, share=True)
    along = token_scores(model, batch)
    lasts = batch.completion_mask.sum(-1) - 1
    expected = sequence_scores(model, batch)
    torch.testing.assert_close(along[torch.arange(len(lasts)), lasts], expected)


def test_an_ensemble_has_a_score_of_every_member(make_scorer, groups):
    model = prepare(make_scorer("llama"))
    members = torch.nn.Linear(32, 3, bias=False)
    batch, model.score = PackedBatch.pack(groups), members
    scores = sequence_scores(model, batch)
    assert scores.shape == (batch.num_completions, 3)
    for number in range(3):
        model.score = torch.nn.Linear(32, 1, bias=False)
        model.score.weight = torch.nn.Parameter(members.weight[number : number + 1])
        torch.testing.assert_close(sequence_scores(model, batch), scores[:, number])


def test_log_probs_are_of_all_completion_tokens_whatever_is_supervised(make_model, groups):
    model, flags = prepare(make_model("llama")), flags_of(groups)
    partly = PackedBatch.pack([(*group, one) for group, one in zip(groups, flags, strict=True)])
    torch.testing.assert_close(token_logprobs(model, partly), token_logprobs(model, PackedBatch.pack(groups)))
