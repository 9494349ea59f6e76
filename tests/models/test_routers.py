"""The load-balancing loss of a mixture of experts: transformers' own number, over real tokens, with its gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_core.batch import PackedBatch
from rlhf_core.losses.sft import sft_loss
from rlhf_core.models.forward import policy_outputs, prepare, summed_loss, token_logprobs
from rlhf_core.models.load import freeze
from rlhf_core.models.routers import has_router_loss

COMMON = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, num_experts_per_tok=2,
)  # fmt: skip
MIXTURES = {
    "mixtral": COMMON | dict(num_local_experts=4),
    "qwen3_moe": COMMON | dict(num_experts=4, moe_intermediate_size=16, head_dim=8),
    "olmoe": COMMON | dict(num_experts=4),
}
ROW = torch.tensor([[1, 5, 6, 7, 8, 9, 4, 2]])
PAIRS = [([1, 5, 6, 9], [[7, 8, 2], [9, 2]]), ([1, 3, 8], [[4, 2], [5, 6, 7, 2]])]


def make_mixture(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, settings = name, MIXTURES[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | changes)).train()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_the_models_own_on_one_unpadded_row(name, layout):
    model = make_mixture(name)
    own = model(input_ids=ROW, output_router_logits=True).aux_loss
    batch = PackedBatch.pack([(ROW[0, :3].tolist(), [ROW[0, 3:].tolist()])])
    balance = policy_outputs(prepare(model, layout), batch, router_loss=True).router_loss
    assert balance.shape == ()
    assert balance.item() == pytest.approx(own.item(), rel=1e-5)
    theirs, ours = (torch.autograd.grad(loss, [*model.parameters()], allow_unused=True) for loss in (own, balance))
    moved = 0
    for a, b in zip(theirs, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
            moved += bool(a.abs().max() > 1e-6)
    assert moved > 2


def test_it_counts_real_tokens_alone():
    """Of rows of different lengths, padded on the right or not at all; a prompt that is not shared counts twice."""
    model = make_mixture("mixtral")
    batch = PackedBatch.pack(PAIRS, share=False)
    values = []
    for layout in ("packed", "padded"):
        values.append(policy_outputs(prepare(model, layout), batch, router_loss=True).router_loss.item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    rows = [[*prompt, *completion] for prompt, completions in PAIRS for completion in completions]
    probs, sent = torch.zeros(4), torch.zeros(4)
    tokens = sum(map(len, rows))
    for row in rows:  # each row alone, counted by hand over both layers
        for logits in model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits:
            p = logits.softmax(-1)
            probs += p.sum(0).detach() / (2 * tokens)
            sent += torch.bincount(p.topk(2, -1).indices.flatten(), minlength=4) / (2 * tokens)
    assert values[0] == pytest.approx(4 * (probs * sent).sum().item(), rel=1e-5)


def test_it_is_the_policys_alone_and_none_unless_requested():
    model, reference = prepare(make_mixture("mixtral")), prepare(freeze(make_mixture("mixtral")))
    reference.model.layers[0].mlp.gate.weight.data.normal_()
    batch = PackedBatch.pack(PAIRS)
    alone = policy_outputs(model, batch, router_loss=True).router_loss
    both = policy_outputs(model, batch, reference=reference, router_loss=True).router_loss
    assert both.item() == alone.item() != policy_outputs(reference, batch, router_loss=True).router_loss.item()
    assert policy_outputs(model, batch).router_loss is None
    assert summed_loss(model, batch, lambda logprobs, mask: (logprobs.sum(), {})).router_loss is None


def test_with_logits_of_the_models_own():
    """Where the head is not linear: the same router loss as by the fused head, in the same layout."""
    model, other = make_mixture("mixtral"), make_mixture("mixtral", logit_scale=0.5)  # Mixtral has no such scale
    batch = PackedBatch.pack(PAIRS)
    expected = policy_outputs(prepare(model, "padded"), batch, router_loss=True).router_loss
    assert not prepare(other).rlhf_route.fused_head
    for run in (
        lambda: policy_outputs(other, batch, router_loss=True),
        lambda: summed_loss(other, batch, lambda logprobs, mask: (logprobs.sum(), {}), router_loss=True),
    ):
        assert run().router_loss.item() == expected.item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_a_loss_that_is_its_own_backward(checkpointing):
    """SFT's: the routers get the sum of both gradients, with activations stored or recomputed."""
    model = prepare(make_mixture("mixtral"))
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = PackedBatch.pack([(prompt, completions[:1]) for prompt, completions in PAIRS])
    result = summed_loss(model, batch, lambda *tokens: sft_loss(*tokens, normalizer=5), router_loss=True)
    (result.loss + 0.1 * result.router_loss).backward()
    gates = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logprobs = token_logprobs(model, batch)
    balance = policy_outputs(model, batch, router_loss=True).router_loss
    (-logprobs.sum() / 5 + 0.1 * balance).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gates[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_model_without_experts_is_refused(make_model):
    model, batch = prepare(make_model("llama")), PackedBatch.pack(PAIRS)
    assert has_router_loss(make_mixture("olmoe")) and not has_router_loss(model)
    message = "router_loss=True: LlamaForCausalLM has no load-balancing loss; expected a mixture of experts"
    with pytest.raises(ValueError, match=message):
        policy_outputs(model, batch, router_loss=True)
    with pytest.raises(ValueError, match=message):
        summed_loss(model, batch, lambda logprobs, mask: (logprobs.sum(), {}), router_loss=True)
