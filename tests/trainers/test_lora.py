"""Adapters in every trainer: they alone learn, they alone are kept, and the base answers as the reference."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_core import cli
from rlhf_core.config import ConfigError, DataConfig, LoraConfig, OptimConfig, SamplingConfig
from rlhf_core.data.loader import load_examples
from rlhf_core.models.adapters import is_adapter_key
from rlhf_core.models.forward import token_logprobs
from rlhf_core.models.load import load_policy, load_reference, load_tokenizer
from rlhf_core.rollout.engines import refresh_server
from rlhf_core.training.reference_cache import cache_key

LORA = LoraConfig(r=4, alpha=8)
FAST = OptimConfig(lr=3e-2, schedule="constant", eps=1e-3)
JOBS = ["sft", "reward", "reward-ensemble", "reward-steps", "dpo", "kto", "simpo", "ppo-head", "ppo-policy"]
JOBS += ["ppo-reward", "grpo", "rloo", "reinforce", "online-dpo", "raft", "rrhf"]


def adapter_file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def wide(material, tmp_path_factory) -> Path:
    """A policy whose layers bitsandbytes can hold in 4 bits on the CPU."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = load_tokenizer(material / "policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_every_trainer_trains_an_adapter_and_nothing_else(train, material, job):
    before = (material / "policy" / "model.safetensors").read_bytes()
    outcome = train(job, lora=LORA, max_steps=2, save_every=1, optim=FAST)
    assert (material / "policy" / "model.safetensors").read_bytes() == before
    assert (outcome.folder / "adapter_config.json").is_file()
    assert not (outcome.folder / "model.safetensors").exists()
    saved = adapter_file(outcome.folder)
    moved = {name for name, tensor in saved.items() if "lora_B" in name and tensor.abs().max() > 0}
    assert len(moved) == 14 and len(saved) >= 28  # all of them, from zero
    settings = json.loads((outcome.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(material / "policy")
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert all(math.isfinite(row["grad_norm"]) for row in outcome.metrics)
    kept = outcome.folder / "checkpoints" / "step-000002"
    for file in kept.glob("*.safetensors"):
        names = {*load_file(file)}
        assert file.stem == "optimizer" or all(map(is_adapter_key, names)) or names == {"linear.weight", "linear.bias"}
    if job == "ppo-policy":  # the critic has an adapter of its own, on the same base
        critic = adapter_file(outcome.folder / "value_model")
        assert any(name.endswith("score.weight") and tensor.abs().max() > 0 for name, tensor in critic.items())


def test_the_first_loss_of_dpo_is_ln_2_and_the_first_ratio_of_ppo_1(train):
    dpo = train("dpo", lora=LORA, max_steps=2, reference__cache="off", optim=FAST)
    assert dpo.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert dpo.metrics[0]["margin"] == 0.0  # to the bit
    assert dpo.metrics[1]["margin"] != 0.0
    ppo = train("ppo-head", lora=LORA, max_steps=2, rollout_epochs=1, minibatch_size=6, optim=FAST)
    assert ppo.metrics[0]["kl"] == 0.0
    assert ppo.metrics[0]["ratio_max"] == 1.0
    assert ppo.metrics[1]["kl"] != 0.0


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy"])
def test_an_adapter_that_was_trained_with_dropout_drops_nothing_where_policies_are_compared(train, job):
    adapter = train("sft", lora=replace(LORA, dropout=0.5), max_steps=2, optim=FAST).folder
    goes_on = train(job, model=adapter, max_steps=1, rollout_epochs=1, minibatch_size=6)
    assert goes_on.metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert goes_on.metrics[0]["ratio_max"] == 1.0


def test_the_base_of_an_adapter_is_not_written_over(train):
    base = train("sft", max_steps=1).folder
    adapter = train("sft", model=base, lora=LORA, max_steps=1).folder
    with pytest.raises(ConfigError, match=f"writing to it would destroy the input {base}"):
        train("dpo", model=adapter, output=base, overwrite=True)
    assert (base / "model.safetensors").exists()


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_models_train_and_start_where_their_reference_is(train, wide, quantize):
    options = dict(model=wide, lora=LORA, quantize=quantize, optim=FAST)
    dpo = train("dpo", max_steps=4, reference__cache="off", **options)
    assert dpo.metrics[0]["margin"] == 0.0
    assert dpo.metrics[3]["loss"] < 0.9 * dpo.metrics[0]["loss"]
    ppo = train("ppo-policy", max_steps=1, rollout_epochs=1, minibatch_size=6, **options)
    assert (ppo.metrics[0]["kl"], ppo.metrics[0]["ratio_max"]) == (0.0, 1.0)


RESUMED = {
    "sft": {"lora": replace(LORA, dropout=0.3)},
    "reward": {"lora": LORA},
    "dpo": {"lora": LORA, "reference__cache": "off"},
    "dpo-moving": {"lora": LORA, "reference__update": "ema", "reference__rate": 0.5},
    "dpo-4bit": {"lora": LORA, "quantize": "4bit", "reference__cache": "on"},
    "ppo-head": {"lora": LORA},
    "ppo-policy": {"lora": replace(LORA, dora=True)},
    "ppo-moving": {"lora": LORA, "reference__update": "sync"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_bit(configure, train, train_with_stops, wide, case):
    job = {"dpo-moving": "dpo", "dpo-4bit": "dpo", "ppo-moving": "ppo-head"}.get(case, case)
    changes = RESUMED[case] | ({"model": wide} if "quantize" in RESUMED[case] else {})
    uninterrupted = train(job, **changes, max_steps=3, optim=FAST)
    resumed = train_with_stops(configure(job, **changes, max_steps=3, optim=FAST), [2])
    assert resumed.same_weights(uninterrupted)
    assert resumed.metrics == uninterrupted.metrics
    assert len(resumed.metrics) == 3


def test_sft_with_an_adapter_learns_and_dropout_is_in_it(train, material):
    options = dict(max_steps=12, eval_data=material / "sft.jsonl", eval_every=4, optim=FAST)
    learned = train("sft", lora=LORA, **options)
    losses = [row["eval_nll"] for row in learned.metrics if "eval_nll" in row]
    assert losses[2] < losses[1] < losses[0] < learned.metrics[0]["nll"]
    assert losses[2] < 0.6 * learned.metrics[0]["nll"]
    dropped = train("sft", lora=replace(LORA, dropout=0.5), **options)
    assert not dropped.same_weights(learned)


def test_training_goes_on_from_an_adapter_with_its_start_as_reference(train, material):
    started = train("sft", lora=LORA, max_steps=4, optim=FAST).folder
    options = dict(model=started, max_steps=2, reference__cache="off", optim=FAST)
    own = train("dpo", **options)
    assert own.metrics[0]["margin"] == 0.0
    of_base = train("dpo", **options, reference=material / "policy")
    assert abs(of_base.metrics[0]["margin"]) > 1e-2
    first, second = adapter_file(started), adapter_file(own.folder)
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    settings = json.loads((own.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(material / "policy")  # not the adapter it came from
    with pytest.raises(ValueError, match="is an adapter, and training continues with it: expected no lora settings"):
        train("dpo", **options, lora=LORA)


def test_cached_reference_logprobs_are_those_of_the_base(train, material):
    """Of a new adapter they are shared with a run that trains everything; of another alpha they are others."""
    tokenizer = load_tokenizer(material / "policy")

    def key(path: Path, **options) -> str:
        examples = load_examples(DataConfig(path=material / "pairs.jsonl"), tokenizer, need="preference")
        policy, _ = load_policy(path, device="cpu", **options)
        return cache_key(load_reference(path, policy=policy, device="cpu"), examples)

    assert key(material / "policy", lora=LORA) == key(material / "policy")
    adapter = train("sft", lora=LORA, max_steps=1, optim=FAST).folder
    first = key(adapter)
    assert first != key(material / "policy")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 9}))
    assert key(adapter) != first
    cached, asked = (train("dpo", lora=LORA, max_steps=2, reference__cache=choice) for choice in ("on", "off"))
    assert cached.distance(asked) < 1e-6


def test_a_server_is_given_plain_weights(material, tmp_path):
    policy, tokenizer = load_policy(material / "policy", device="cpu", lora=LORA)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    folder = tmp_path / "weights"
    sampling = SamplingConfig(
        engine="server", server_url="http://localhost:1", server_weights=folder, server_refresh="true"
    )
    refresh_server(policy, tokenizer, sampling)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(plain(ids).logits, policy(ids).logits, atol=1e-4)


SERVED = dict(engine="server", server_url="http://localhost:1", server_weights="w", server_refresh="true")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora": {"dropout": 0.1}}, r"lora.dropout=0.1: expected 0: log-probs of two forward passes are compared"),
        ({"quantize": "4bit", "sampling": SERVED}, "quantize='4bit': expected none with engine='server'"),
    ],
)
def test_settings_that_contradict_each_other(configure, settings, message):
    with pytest.raises(ConfigError, match=message):
        configure("grpo", **settings)


def test_the_command_line(material, tmp_path, capsys):
    """Train an adapter, go on from it, use it, fold it in."""
    options = ["--max-steps", "1", "--no-progress", "--batch-size", "4"]

    def run(job: str, *words: str | Path) -> str:
        assert cli.main([job, *map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    adapter, going_on, plain = tmp_path / "adapter", tmp_path / "on", tmp_path / "plain"
    files = {name: material / f"{name}.jsonl" for name in ("sft", "pairs", "prompts")}
    run("sft", "--model", material / "policy", "--data", files["sft"], "--output", adapter, "--lora.r", 2,
        "--lora.alpha", 4, "--optim.lr", 0.1, *options)  # fmt: skip
    assert "lora:\n  r: 2\n  alpha: 4\n" in (adapter / "run.yaml").read_text()
    run("dpo", "--model", adapter, "--data", files["pairs"], "--output", going_on, "--optim.lr", 0.1, *options)
    sampling = ["--sampling.max-new-tokens", "3"]
    completed = run("generate", "--model", going_on, "--prompt", "solano peta", *sampling)
    run("evaluate", "--model", going_on, "--baseline", adapter, "--data", files["prompts"], *sampling,
        "--reward-function", "lumo_rewards:likes")  # fmt: skip
    run("merge", "--model", going_on, "--output", plain)
    assert run("generate", "--model", plain, "--prompt", "solano peta", *sampling) == completed
    assert cli.main(["merge", "--model", str(going_on), "--output", str(plain)]) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert cli.main(["merge", "--model", str(material / "policy"), "--output", str(tmp_path / "x")]) == 2
    assert "expected an adapter's folder (with adapter_config.json)" in capsys.readouterr().err
    reward = tmp_path / "reward"
    run("reward", "--model", adapter, "--data", files["pairs"], "--output", reward, *options)
    run("merge", "--model", reward, "--output", tmp_path / "plain_reward")


def test_merged_weights_that_disagree_are_not_kept(train, tmp_path, capsys, monkeypatch):
    adapter = train("sft", lora=LORA, max_steps=1, optim=FAST).folder
    words = ["merge", "--model", str(adapter), "--output", str(tmp_path / "plain")]
    assert cli.main([*words, "--tolerance", "1e-12"]) == 1
    assert "merged in float32, the model differs from the one with the adapter by" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert cli.main([*words, "--model.dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "plain" / "model.safetensors").values()} == {torch.bfloat16}


def test_sampling_from_an_adapter_is_sampling_from_the_model_it_makes(train, material):
    from rlhf_core.rollout.sampling import sample
    from rlhf_core.seeding import generator

    policy, tokenizer = load_policy(train("sft", lora=LORA, max_steps=3, optim=FAST).folder, device="cpu")
    prompts = [[3, 4, 5], [6, 7]]
    options = dict(max_new_tokens=4, stop_ids=frozenset({tokenizer.eos_token_id}))
    rollout = sample(policy, prompts, generator=generator(0, "test"), **options)
    batch = rollout.pack()
    assert torch.allclose(rollout.logprobs, token_logprobs(policy, batch).detach(), atol=1e-4)


@pytest.mark.parametrize(("job", "data"), [("sft", "sft"), ("dpo", "pairs"), ("kto", "labelled")])
def test_dropout_is_off_in_the_evaluation(train, material, job, data):
    """With weights that stand still, the losses of two steps differ by dropout alone, and evaluations do not differ."""
    started = train("sft", lora=replace(LORA, dropout=0.5), max_steps=4, optim=FAST).folder
    still = dict(model=started, max_steps=2, batch_size=10, eval_every=1, optim=OptimConfig(lr=1e-12))
    first, second = train(job, eval_data=material / f"{data}.jsonl", **still).metrics
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-4)
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=1e-6)
