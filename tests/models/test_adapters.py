"""Adapters: the gradients of a LoRA written by hand, a reference without a second copy of a weight, PEFT's files."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ConfigError, LoraConfig
from rlhf_core.models.adapters import (
    adapter_of,
    adapter_tensors,
    attach,
    copy_sharing_weights,
    is_adapter_key,
    load_adapter_tensors,
    merged,
)
from rlhf_core.models.forward import policy_outputs, route_of, sequence_scores, token_logprobs, token_values
from rlhf_core.models.load import (
    freeze,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    save_model,
)
from rlhf_core.models.merge import MergeConfig, merge

LORA = LoraConfig(r=4, alpha=8)
# bitsandbytes needs multiples of 64 for 4 bits on the CPU.
WIDE = {
    "llama": dict(hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=1),
    "gpt2": dict(n_embd=64, n_layer=1),
}


def disturb(model: nn.Module, seed: int = 0, size: float = 0.05) -> nn.Module:
    """As if it had been trained: everything that trains is moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trained(folder: Path, target: Path, lora: LoraConfig = LORA, **options) -> tuple[nn.Module, Path]:
    """A policy whose adapter says something, and the folder it is saved in."""
    policy, tokenizer = load_policy(folder, device="cpu", lora=lora, **options)
    save_model(target, disturb(policy), tokenizer)
    return policy, target


def storages(model: nn.Module) -> dict[int, int]:
    """{address: bytes} of all memory that parameters and buffers are in."""
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def added_bytes(model: nn.Module, beside: nn.Module) -> int:
    ours, theirs = storages(model), storages(beside)
    return sum(size for address, size in ours.items() if address not in theirs)


@pytest.fixture
def batch(groups) -> PackedBatch:
    return PackedBatch.pack(groups)


# ------------------------------------------------------------------------------------------------------- by one's own


class HandWritten(nn.Module):
    """y = W x + b + (alpha / r) B A x."""

    def __init__(self, layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.scale * ((x @ self.a.T) @ self.b.T)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_values_and_gradients_are_those_of_a_lora_written_by_hand(make_folder, plain, batch, family, rslora):
    folder = make_folder(family)
    lora = LoraConfig(r=4, alpha=8, rslora=rslora)
    policy = disturb(load_policy(folder, device="cpu", dtype="float64", lora=lora)[0])
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    adapted = dict(policy.named_parameters())
    hands = {}
    for name, layer in [*twin.named_modules()]:
        if isinstance(layer, nn.Linear | Conv1D) and name != "lm_head":
            a, b = (adapted[f"{name}.lora_{letter}.default.weight"].detach() for letter in "AB")
            hands[name] = HandWritten(layer, a, b, 8 / math.sqrt(4) if rslora else 8 / 4)
            twin.set_submodule(name, hands[name])
    assert len(hands) == {"llama": 2 * 7, "gpt2": 2 * 4}[family]

    ours, truth = token_logprobs(policy, batch), plain.logprobs(twin)
    assert torch.allclose(ours.double(), truth, atol=1e-6)
    weights = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for logprobs in (ours, truth):
        (logprobs * weights).sum().backward()
    for name, hand in hands.items():
        for letter, mine in (("A", hand.a), ("B", hand.b)):
            theirs = adapted[f"{name}.lora_{letter}.default.weight"].grad
            assert (theirs - mine.grad).abs().max() <= 1e-6 * mine.grad.abs().max(), (name, letter)
            assert mine.grad.abs().max() > 0
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == {*filter(is_adapter_key, adapted)}


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"modules_to_save": ("embed_tokens",)}], ids=str)
def test_a_new_adapter_says_nothing_and_learns_alone(make_folder, batch, settings):
    folder = make_folder(tie_word_embeddings=True)
    plain, _ = load_policy(folder, device="cpu")
    policy, _ = load_policy(folder, device="cpu", lora=LoraConfig(r=4, **settings))
    assert torch.allclose(token_logprobs(policy, batch), token_logprobs(plain, batch), atol=1e-6)
    trains = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in policy.named_parameters() if is_adapter_key(name)} - {
        name for name in trains if "original_module" in name
    }
    assert len(trains) == 2 * 7 * 2 + (14 if "dora" in settings else 0) + (1 if "modules_to_save" in settings else 0)


def test_the_seed_alone_says_how_an_adapter_starts(make_folder):
    folder = make_folder()

    def first(seed: int, disturbance: int) -> torch.Tensor:
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        policy, _ = load_policy(folder, device="cpu", lora=LORA, seed=seed)
        torch.manual_seed(disturbance)
        assert torch.equal(torch.get_rng_state(), before)
        return adapter_tensors(policy)["model.layers.0.self_attn.q_proj.lora_A.default.weight"]

    assert torch.equal(first(1, 5), first(1, 6))
    assert not torch.equal(first(1, 5), first(2, 5))


def test_only_the_modules_that_were_named(make_folder):
    policy, _ = load_policy(
        make_folder(), device="cpu", lora=LoraConfig(target_modules=("q_proj", "layers.1.mlp.up_proj"))
    )
    adapted = {name.partition(".lora_")[0] for name in adapter_tensors(policy)}
    assert adapted == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_head_or_the_embeddings(make_folder, plain, batch, tmp_path, target, tied):
    """The fused head reads the weight alone, so it must not be used; and folded in, tied matrices are two."""
    folder = make_folder(tie_word_embeddings=tied)
    policy, tokenizer = load_policy(folder, device="cpu", lora=LoraConfig(r=4, target_modules=(target, "q_proj")))
    assert route_of(policy).fused_head == (target != "lm_head")  # found while the adapter changes no output
    disturb(policy)
    truth = plain.logprobs(policy)
    assert torch.allclose(token_logprobs(policy, batch), truth, atol=1e-5)
    save_model(tmp_path / "plain", policy, tokenizer, merge=True)
    again, _ = load_policy(tmp_path / "plain", device="cpu")
    assert torch.allclose(token_logprobs(again, batch), truth, atol=1e-4)
    assert torch.equal(plain.logprobs(policy), truth)  # and the policy is as it was


@pytest.mark.parametrize("quantize", ["none", "8bit"])
def test_activation_checkpointing_changes_nothing(make_folder, batch, quantize):
    folder = make_folder()
    gradients = []
    for checkpointing in (False, True):
        options = dict(device="cpu", lora=LORA, quantize=quantize)
        policy = disturb(load_policy(folder, gradient_checkpointing=checkpointing, **options)[0])
        token_logprobs(policy, batch).sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) == 28
    assert all(torch.allclose(first, second, atol=1e-6) for first, second in zip(*gradients, strict=True))


# ---------------------------------------------------------------------------------------------------------- two models


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ("embed_tokens",)}], ids=str)
def test_the_reference_of_a_new_adapter_shares_every_weight(make_folder, batch, quantize, settings):
    folder = make_folder(tie_word_embeddings=True, **WIDE["llama"])
    options = dict(device="cpu", quantize=quantize)
    policy, tokenizer = load_policy(folder, lora=LoraConfig(r=4, **settings), **options)
    reference = load_reference(folder, policy=policy, policy_tokenizer=tokenizer, **options)
    assert added_bytes(reference, policy) == 0
    assert not any(is_adapter_key(name) for name in reference.state_dict())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert policy.training and not reference.training
    before = token_logprobs(reference, batch)
    assert torch.equal(token_logprobs(policy, batch), before)  # to the bit: a first ratio of 1, a first loss of ln 2
    alone = load_reference(folder, **options)
    assert torch.equal(token_logprobs(alone, batch), before)
    disturb(policy)
    assert not torch.allclose(token_logprobs(policy, batch), before, atol=1e-3)
    assert torch.equal(token_logprobs(reference, batch), before)


def test_what_one_tree_is_told_the_other_does_not_hear(make_folder):
    folder = make_folder()
    policy, _ = load_policy(folder, device="cpu", lora=LORA, gradient_checkpointing=True)
    attention = policy.config._attn_implementation
    reference = load_reference(folder, policy=policy, device="cpu")
    reference.set_attn_implementation("eager")
    assert policy.config._attn_implementation == attention != "eager"
    ids = torch.tensor([[3, 4, 5]])
    assert reference.get_input_embeddings()(ids).requires_grad is False
    assert policy.get_input_embeddings()(ids).requires_grad is True


def test_a_model_that_an_adapter_changes_must_be_prepared_again(make_folder, batch):
    folder = make_folder()
    policy, _ = load_policy(folder, device="cpu", lora=LORA)
    for changed in (copy_sharing_weights(policy), copy_sharing_weights(policy, keep_adapter=True), merged(policy)):
        with pytest.raises(ValueError, match="is not prepared"):
            token_logprobs(changed, batch)
    plain, _ = load_policy(folder, device="cpu")
    attach(plain, LORA, adapter_of(policy).base, seed=0)
    with pytest.raises(ValueError, match="is not prepared"):
        token_logprobs(plain, batch)
    with pytest.raises(ValueError, match="expected a model with an adapter"):
        copy_sharing_weights(load_policy(folder, device="cpu")[0])


def test_an_adapter_that_goes_on_has_its_own_start_as_reference(make_folder, batch, tmp_path):
    folder = make_folder()
    started, adapter = trained(folder, tmp_path / "adapter")
    start = token_logprobs(started, batch).detach()
    policy, tokenizer = load_policy(adapter, device="cpu")
    assert torch.equal(token_logprobs(policy, batch), start)
    reference = load_reference(adapter, policy=policy, policy_tokenizer=tokenizer, device="cpu")
    base = load_reference(folder, policy=policy, device="cpu")
    of_adapter = sum(tensor.nbytes for tensor in adapter_tensors(policy).values())
    assert added_bytes(reference, policy) == of_adapter
    assert added_bytes(base, policy) == 0
    second, another = trained(folder, tmp_path / "another", LoraConfig(r=2, target_modules=("up_proj",)))
    reference_of_another = load_reference(another, policy=policy, device="cpu")
    assert torch.equal(token_logprobs(reference_of_another, batch), token_logprobs(second, batch))
    assert added_bytes(reference_of_another, policy) == sum(t.nbytes for t in adapter_tensors(second).values())
    disturb(policy, seed=1)
    assert torch.equal(token_logprobs(reference, batch), start)
    assert torch.equal(token_logprobs(base, batch), token_logprobs(load_reference(folder, device="cpu"), batch))
    assert not torch.allclose(token_logprobs(base, batch), start, atol=1e-3)


def test_a_reference_that_is_to_follow_has_a_copy_of_the_adapter(make_folder, batch):
    folder = make_folder()
    policy, _ = load_policy(folder, device="cpu", lora=LORA)
    reference = load_reference(folder, policy=policy, device="cpu", follows=True)
    names = [{name: p.shape for name, p in model.named_parameters()} for model in (policy, reference)]
    assert names[0] == names[1]
    assert added_bytes(reference, policy) == sum(tensor.nbytes for tensor in adapter_tensors(policy).values())
    disturb(policy)
    assert torch.equal(token_logprobs(reference, batch), token_logprobs(load_reference(folder, device="cpu"), batch))


def test_another_reference_shares_nothing(make_folder):
    policy, _ = load_policy(make_folder(), device="cpu", lora=LORA)
    other = load_reference(make_folder(seed=1), policy=policy, device="cpu")
    assert not {*storages(other)} & {*storages(policy)}


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_a_critic_of_the_policys_own_base_shares_it_and_learns_alone(make_folder, batch, quantize):
    folder = make_folder(**WIDE["llama"])
    options = dict(device="cpu", lora=LORA, quantize=quantize)
    policy, _ = load_policy(folder, **options)
    before = token_logprobs(policy, batch).detach()
    critic = load_value_model(folder, policy=policy, **options)
    own = sum(tensor.nbytes for tensor in adapter_tensors(critic).values())
    assert added_bytes(critic, policy) == own + critic.score.original_module.weight.nbytes
    assert torch.equal(token_values(critic, batch), torch.zeros(batch.completion_mask.shape))
    disturb(critic)
    values = token_values(critic, batch)
    assert values.abs().max() > 0
    values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert torch.equal(token_logprobs(policy, batch), before)
    apart = load_value_model(folder, **options)
    load_adapter_tensors(apart, adapter_tensors(critic))
    assert torch.equal(token_values(apart, batch), values)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"rslora": True}, {"modules_to_save": ("lm_head",)}], ids=str)
def test_peft_reads_what_was_saved_and_plain_transformers_what_was_folded_in(
    make_folder, plain, batch, tmp_path, family, settings
):
    from peft import AutoPeftModelForCausalLM

    folder = make_folder(family)
    policy, adapter = trained(folder, tmp_path / "adapter", LoraConfig(r=4, **settings))
    ours = token_logprobs(policy, batch).detach()
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (adapter / "model.safetensors").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert torch.allclose(plain.logprobs(theirs), ours, atol=1e-5)
    assert torch.equal(token_logprobs(load_policy(adapter, device="cpu")[0], batch), ours)
    save_model(tmp_path / "plain", policy, load_tokenizer(adapter), merge=True)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.allclose(plain.logprobs(folded), ours, atol=1e-4)
    assert adapter_of(policy) is not None and torch.equal(token_logprobs(policy, batch), ours)


def test_what_peft_has_saved_is_read(make_folder, plain, batch, tmp_path):
    import peft

    folder = make_folder()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    policy, tokenizer = load_policy(tmp_path / "adapter", device="cpu")  # without a tokenizer: that of the base
    assert tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()
    assert torch.allclose(token_logprobs(policy, batch), plain.logprobs(theirs), atol=1e-5)


def test_an_adapter_that_does_not_say_what_it_is_for_is_merged_into_its_own_model(make_folder, batch, tmp_path):
    """PEFT's task_type may be null; a policy is then no reward model."""
    import peft

    config = peft.LoraConfig(r=3, target_modules=["q_proj"])
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(make_folder()), config)
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merge(MergeConfig(model={"path": str(tmp_path / "adapter")}, output=str(tmp_path / "merged"), device="cpu"))
    folders = (tmp_path / "adapter", tmp_path / "merged")
    adapted, plainly = (token_logprobs(load_policy(folder, device="cpu")[0], batch) for folder in folders)
    assert torch.allclose(adapted, plainly, atol=1e-5)


def test_a_reward_models_head_is_trained_and_saved_with_its_adapter(make_folder, batch, tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    folder = make_folder()
    model, tokenizer = load_reward_model(folder, device="cpu", lora=LORA, seed=3)
    whole, _ = load_reward_model(folder, device="cpu", seed=3)
    assert torch.allclose(sequence_scores(model, batch), sequence_scores(whole, batch), atol=1e-6)
    assert model.score.modules_to_save.default.weight.requires_grad
    scores = sequence_scores(disturb(model), batch).detach()
    save_model(tmp_path / "adapter", model, tokenizer)
    again, _ = load_reward_model(tmp_path / "adapter", device="cpu", new_head=False)
    assert torch.equal(sequence_scores(again, batch), scores)
    assert torch.equal(sequence_scores(load_value_model(tmp_path / "adapter", device="cpu"), batch), scores)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    span = batch.spans[0]
    ids = torch.cat([batch.input_ids[span.prompt_start : span.prompt_end], batch.input_ids[span.start : span.end]])
    theirs.config.pad_token_id = tokenizer.pad_token_id
    assert theirs.eval()(input_ids=ids[None]).logits.item() == pytest.approx(scores[0].item(), abs=1e-5)
    save_model(tmp_path / "plain", model, tokenizer, merge=True)
    folded, _ = load_reward_model(tmp_path / "plain", device="cpu", new_head=False)
    assert torch.allclose(sequence_scores(folded, batch), scores, atol=1e-4)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("kind", [{"heads": 3}, {"steps": True}], ids=str)
def test_ensembles_and_process_reward_models_have_adapters_too(make_folder, batch, tmp_path, kind):
    model, tokenizer = load_reward_model(make_folder(), device="cpu", lora=LORA, **kind)
    scores = sequence_scores(disturb(model), batch).detach()
    save_model(tmp_path / "adapter", model, tokenizer)
    again, _ = load_reward_model(tmp_path / "adapter", device="cpu", new_head=False)
    assert torch.equal(sequence_scores(again, batch), scores)
    assert again.config.num_labels == kind.get("heads", 1)


def test_a_critic_goes_on_with_the_adapter_of_its_reward_model(make_folder, batch, tmp_path):
    folder = make_folder()
    policy, tokenizer = load_policy(folder, device="cpu", lora=LORA)
    reward_model, _ = load_reward_model(folder, device="cpu", lora=LORA)
    save_model(tmp_path / "reward", disturb(reward_model), tokenizer)
    critic = load_value_model(tmp_path / "reward", policy=policy, device="cpu", lora=LORA)
    assert torch.equal(sequence_scores(critic, batch), sequence_scores(reward_model, batch))
    assert sum(parameter.requires_grad for parameter in critic.parameters()) == 28 + 1


def test_a_reward_model_from_a_policys_adapter_starts_where_that_is(make_folder, batch, tmp_path):
    policy, adapter = trained(make_folder(), tmp_path / "adapter")
    model, _ = load_reward_model(adapter, device="cpu")
    ids = torch.tensor([[3, 4, 5, 6]])
    states = [each.base_model(input_ids=ids).last_hidden_state for each in (policy, model)]
    assert torch.equal(*states)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 28 + 1
    with pytest.raises(ValueError, match="is no reward model: expected one with a trained score head"):
        load_reward_model(adapter, device="cpu", new_head=False)


def test_a_pad_token_that_was_added_is_added_again(make_folder, make_tokenizer, batch, tmp_path):
    """A base whose tokenizer has no other token than its end to pad with: the score's embeddings have a row more."""
    folder = make_folder(tokenizer=make_tokenizer(eos_token=2, pad_token=2))
    policy, _ = load_policy(folder, device="cpu", lora=LORA)
    model, tokenizer = load_reward_model(folder, device="cpu", lora=LORA)
    assert model.get_input_embeddings().num_embeddings == 62
    save_model(tmp_path / "adapter", disturb(model), tokenizer)
    again, _ = load_reward_model(tmp_path / "adapter", device="cpu")
    assert torch.equal(sequence_scores(again, batch), sequence_scores(model, batch))
    load_value_model(folder, policy=policy, device="cpu", lora=LORA)
    assert policy.get_input_embeddings().weight.shape[0] == 61


def test_what_a_checkpoint_holds_fits_back_to_the_bit(make_folder, batch):
    folder = make_folder(tie_word_embeddings=True)
    lora = LoraConfig(r=4, modules_to_save=("embed_tokens",))
    first, second = (load_policy(folder, device="cpu", lora=lora)[0] for _ in range(2))
    load_adapter_tensors(second, adapter_tensors(disturb(first)))
    assert torch.equal(token_logprobs(first, batch), token_logprobs(second, batch))
    other, _ = load_policy(folder, device="cpu", lora=LORA)
    with pytest.raises(ValueError, match="tensors of an adapter do not fit"):
        load_adapter_tensors(other, adapter_tensors(first))


# ----------------------------------------------------------------------------------------------------- 8 and 4 bits


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_layers_are_their_unpacked_weights(make_folder, plain, batch, family, quantize):
    """Values and gradients of the adapters against a model whose weights are those numbers in full."""
    import bitsandbytes as bnb

    folder = make_folder(family, **WIDE[family])
    policy = disturb(load_policy(folder, device="cpu", lora=LORA, quantize=quantize)[0])
    twin, _ = load_policy(folder, device="cpu", lora=LORA)
    load_adapter_tensors(twin, adapter_tensors(policy))
    layers = dict(policy.named_modules())
    packed, rounding = 0, []
    for name, layer in twin.named_modules():
        if not hasattr(layer, "base_layer"):
            continue
        base, plain_layer = layers[name].base_layer, layer.base_layer
        if quantize == "4bit":
            weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            assert base.weight.dtype == torch.uint8 and base.weight.quant_state.quant_type == "nf4"
            assert base.weight.quant_state.nested
        else:
            weight = base.state.CB * base.state.SCB[:, None] / 127
            assert base.weight.dtype == torch.int8
        weight = weight.T if isinstance(plain_layer, Conv1D) else weight
        rounding.append(((weight - plain_layer.weight).norm() / plain_layer.weight.norm()).item())
        plain_layer.weight.data = weight.clone()
        packed += 1
    assert packed == {"llama": 7, "gpt2": 4}[family]
    low, high = {"8bit": (0.005, 0.01), "4bit": (0.085, 0.1)}[quantize]  # of normal weights: 0.0073 and 0.092
    assert low < min(rounding) and max(rounding) < high
    assert type(policy.get_output_embeddings()) is nn.Linear  # the head stays as it was
    assert route_of(policy).layout == "packed"
    for model in (policy, twin):
        token_logprobs(model, batch).sum().backward()
    assert torch.allclose(token_logprobs(policy, batch), plain.logprobs(twin), atol=1e-4)
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 * packed
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == (name in gradients)
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-4 * gradients[name].abs().max().item())
    training = token_logprobs(policy, batch)
    assert torch.equal(token_logprobs(freeze(policy), batch), training)  # one forward, whatever the mode


def test_half_precision_computes_in_it_and_keeps_its_adapters_in_full(make_folder, batch):
    policy, _ = load_policy(make_folder(**WIDE["llama"]), device="cpu", dtype="bfloat16", lora=LORA, quantize="4bit")
    assert policy.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in adapter_tensors(policy).values()} == {torch.float32}
    assert policy.model.layers[0].mlp.up_proj.base_layer.compute_dtype == torch.bfloat16
    outputs = policy_outputs(policy, batch, entropy=True)
    outputs.logprobs.sum().backward()
    assert torch.isfinite(outputs.entropy).all()


def test_quantised_weights_take_a_quarter_and_an_eighth(make_folder):
    folder = make_folder(**WIDE["llama"])

    def size(quantize: str) -> int:
        policy, _ = load_policy(folder, device="cpu", lora=LORA, quantize=quantize)
        return sum(p.nbytes for name, p in policy.named_parameters() if ".base_layer.weight" in name)

    full = size("none")
    assert (size("8bit"), size("4bit")) == (full // 4, full // 8)


# --------------------------------------------------------------------------------------------------- what it minds


def test_settings_that_cannot_be():
    for settings, message in (
        ({"r": 0}, "r=0: expected more than 0"),
        ({"alpha": 0}, "alpha=0: expected more than 0"),
        ({"dropout": 1.0}, "dropout=1.0: expected 0 <= dropout < 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoraConfig(**settings)


def test_names_of_modules_that_are_not_there(make_folder):
    for field in ("target_modules", "modules_to_save"):
        with pytest.raises(
            ValueError, match=f"lora.{field}: LlamaForCausalLM has no module 'proj'; it has down_proj, "
        ):
            load_policy(make_folder(), device="cpu", lora=LoraConfig(**{field: ("proj",)}))


def test_quantised_weights_are_not_trained_and_take_no_adapter_in(make_folder):
    folder = make_folder()
    with pytest.raises(ValueError, match="quantize='4bit': quantised weights cannot be trained; expected lora"):
        load_policy(folder, device="cpu", quantize="4bit")
    policy, _ = load_policy(folder, device="cpu", quantize="8bit", lora=LORA)
    with pytest.raises(ValueError, match="quantize='8bit': expected none to merge an adapter"):
        merged(policy)
    with pytest.raises(ValueError, match="quantize='2bit': expected one of none, 8bit, 4bit"):
        load_policy(folder, device="cpu", quantize="2bit")


@pytest.mark.parametrize("right", [True, False])
def test_4_bits_that_would_be_unpacked_wrongly_are_refused(make_folder, monkeypatch, right: bool):
    """On some processors, blocks that reach over the end of a row are scaled by another block's scale there."""
    import bitsandbytes as bnb

    from rlhf_core.models import adapters

    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    error = (bnb.functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
    assert adapters._unpacks_partial_blocks(64) == (error < 0.2)  # so the check agrees with this processor
    monkeypatch.setattr(adapters, "_unpacks_partial_blocks", lambda blocksize: right)
    if right:
        load_policy(make_folder(), device="cpu", lora=LORA, quantize="4bit")
        return
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj has 32 inputs; expected a multiple of 64 on this"):
        load_policy(make_folder(), device="cpu", lora=LORA, quantize="4bit")


def test_one_adapter_is_enough(make_folder, tmp_path):
    _, adapter = trained(make_folder(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, and training continues with it: expected no lora settings"):
        load_policy(adapter, device="cpu", lora=LORA)


def test_a_base_that_is_gone_is_named(make_folder, tmp_path):
    folder = make_folder()
    _, adapter = trained(folder, tmp_path / "adapter")
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=f"{adapter} is an adapter of the model in {folder}, which does not exist"
    ):
        load_policy(adapter, device="cpu")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name its model: expected a base_model_name_or_path"):
        load_policy(adapter, device="cpu")


def test_an_adapter_of_another_model_or_another_kind(make_folder, tmp_path):
    import peft

    _, adapter = trained(make_folder(), tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def settle(**changes) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))

    wide = make_folder(intermediate_size=64)
    settle(base_model_name_or_path=str(wide))
    with pytest.raises(ValueError, match=rf"proj.lora_.\.weight is .*, but {wide} needs"):
        load_policy(adapter, device="cpu")
    deep = make_folder(num_hidden_layers=3)
    settle(base_model_name_or_path=str(deep), target_modules="all-linear")
    with pytest.raises(ValueError, match=f"does not fit {deep}: 14 of its 42 tensors are missing and 0 are unknown"):
        load_policy(adapter, device="cpu")
    settle(bias="all")
    with pytest.raises(ValueError, match="expected a LoRA adapter without trained biases, found LORA, bias=all"):
        load_policy(adapter, device="cpu")
    settle(bias="none")
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(OSError, match="its adapter cannot be read"):
        load_policy(adapter, device="cpu")

    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    other = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(make_folder()), config)
    other.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="expected a LoRA adapter without trained biases, found IA3"):
        load_policy(tmp_path / "ia3", device="cpu")


@pytest.mark.parametrize(
    "module, options, message",
    [
        ("peft", {"lora": LORA}, r"adapters need PEFT: pip install 'rlhf-core\[lora\]'"),
        ("bitsandbytes", {"lora": LORA, "quantize": "4bit"}, r"quantize='4bit': pip install 'rlhf-core\[quantize\]'"),
    ],
)
def test_what_is_not_installed_is_named(make_folder, monkeypatch, module, options, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        load_policy(make_folder(), device="cpu", **options)


def test_the_hand_written_one_can_be_wrong():
    """The comparison above sees a scale that is off."""
    layer = nn.Linear(3, 3, dtype=torch.float64)
    a, b = torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    x = torch.ones(1, 3, dtype=torch.float64)
    right, wrong = HandWritten(layer, a, b, 2.0)(x), HandWritten(copy.deepcopy(layer), a, b, 1.0)(x)
    assert torch.allclose(right - F.linear(x, layer.weight, layer.bias), torch.full((1, 3), 2.0 * 2 * 3.0).double())
    assert not torch.allclose(right, wrong)
