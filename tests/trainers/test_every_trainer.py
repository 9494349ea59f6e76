"""What holds for every trainer alike, and for PPO with each of its critics."""

import functools
import importlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf_core.batch import PackedBatch
from rlhf_core.config import DataConfig, ModelConfig, OptimConfig
from rlhf_core.models.forward import sequence_scores, token_logprobs, token_scores
from rlhf_core.models.heads import ValueHead
from rlhf_core.models.load import load_policy, load_reward_model
from rlhf_core.training import run as run_module
from rlhf_core.training.run import Run

JOBS = ["sft", "sft-noisy", "sft-smooth", "reward", "reward-ensemble", "reward-rankings", "reward-steps"]
JOBS += ["dpo", "kto", "simpo", "ppo-head", "ppo-policy", "ppo-reward", "grpo", "rloo", "reinforce"]
JOBS += ["online-dpo", "raft", "rrhf"]
DATA = {"sft": "sft", "sft-noisy": "weighted", "sft-smooth": "weighted", "reward": "pairs",
        "reward-ensemble": "margins", "reward-rankings": "rankings", "reward-steps": "steps", "dpo": "pairs",
        "kto": "labelled", "simpo": "pairs"}  # fmt: skip
STEADY = OptimConfig(lr=3e-3, schedule="linear", eps=1e-3)  # as in conftest.py
every_job = pytest.mark.parametrize("job", JOBS)
# What the run and step objects do is tested with a few jobs: one of each kind of step, and of each way to load a model.
some_jobs = pytest.mark.parametrize("job", ["sft", "reward", "dpo", "ppo-head", "ppo-policy", "grpo"])


def name_of(job: str) -> str:
    """As the command line has it: without the kind of critic, of loss or of data."""
    return job.partition("-")[0] if job.startswith(("ppo", "sft", "reward")) else job


def trainer(job: str) -> ModuleType:
    name = {"simpo": "dpo"}.get(job, name_of(job))
    return importlib.import_module(f"rlhf_core.trainers.{name.replace('-', '_')}")


# ------------------------------------------------------------------------------------------------------- to be resumed


@every_job
def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_bit(configure, plain_run, train_with_stops, job):
    uninterrupted = plain_run(job)
    resumed = train_with_stops(configure(job), [2, 3])  # 2 is the end of an epoch
    assert resumed.same_weights(uninterrupted)
    assert resumed.metrics == uninterrupted.metrics
    assert len(resumed.metrics) == 4


@some_jobs
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint_to_the_bit(configure, train, plain_run, monkeypatch, job):
    uninterrupted = plain_run(job)
    config = configure(job, save_every=2, keep_checkpoints=1)
    original = Run.log

    def crash(self, step, *args, **options):
        if step == 4:
            raise RuntimeError("crash")
        original(self, step, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setattr(Run, "log", crash)
        train(config)
    assert [path.name for path in Path(config.output, "checkpoints").iterdir()] == ["step-000002"]
    resumed = train(replace(config, resume=True))
    assert resumed.same_weights(uninterrupted)
    assert resumed.metrics == uninterrupted.metrics


# ---------------------------------------------------------------------------------------- what must not change a result


@every_job
def test_another_seed_gives_another_run(train, plain_run, job):
    first, other = plain_run(job), train(job, seed=1)
    assert not first.same_weights(other)
    assert [row["grad_norm"] for row in first.metrics] != [row["grad_norm"] for row in other.metrics]


@every_job
def test_the_same_seed_gives_the_same_run_whatever_the_global_random_state(train, plain_run, monkeypatch, job):
    original = Run.__enter__

    def disturb(self):
        torch.manual_seed(1234)
        return original(self)

    monkeypatch.setattr(Run, "__enter__", disturb)
    again = train(job)
    assert again.same_weights(plain_run(job))
    assert again.metrics == plain_run(job).metrics


@every_job
def test_the_size_of_micro_batches_does_not_matter(train, plain_run, job):
    """Of 3: there are steps of 6 rows and of 4, so some micro-batches have one row."""
    whole, parts = plain_run(job), train(job, micro_batch_size=3)
    assert whole.distance(parts) < 1e-5
    for row, other in zip(whole.metrics, parts.metrics, strict=True):
        assert row.keys() == other.keys()
        ties = abs(row.get("margin", 1.0)) < 1e-6  # at DPO's first step, told apart by rounding alone
        for name in row.keys() - ({"accuracy"} if ties else set()):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=2e-5), name


@every_job
def test_the_layout_does_not_matter(train, plain_run, material, job):
    padded = train(job, model=ModelConfig(path=material / "policy", layout="padded"))
    assert 0 < plain_run(job).distance(padded) < 1e-5  # 0 would be the same layout twice


@pytest.mark.parametrize("job", ["sft", "sft-smooth", "reward", "dpo", "ppo-head", "ppo-policy", "grpo"])
def test_gradient_checkpointing_does_not_matter(train, material, monkeypatch, job):
    calls = []
    original = LlamaMLP.forward

    def count(self, states):
        calls[-1] += torch.is_grad_enabled()
        return original(self, states)

    monkeypatch.setattr(LlamaMLP, "forward", count)
    outcomes = []
    for checkpointing in (False, True):
        calls.append(0)
        model = ModelConfig(path=material / "policy", gradient_checkpointing=checkpointing)
        outcomes.append(train(job, max_steps=2, model=model))
    assert calls[1] > calls[0]  # forwards were done again
    assert outcomes[0].distance(outcomes[1]) < 1e-6


# -------------------------------------------------------------------------------------------- what must change a result

COMMON = [
    {"optim": replace(STEADY, lr=1e-3)},
    {"optim": replace(STEADY, schedule="constant")},
    {"optim": replace(STEADY, warmup_ratio=0.5)},
    {"optim": replace(STEADY, weight_decay=0.1)},
    {"optim": replace(STEADY, betas=(0.8, 0.999))},
    {"optim": replace(STEADY, betas=(0.9, 0.9))},
    {"optim": replace(STEADY, eps=1e-8)},
    {"optim": replace(STEADY, max_grad_norm=0.01)},
    {"batch_size": 5},
    {"max_steps": 3},
    {"max_steps": None, "epochs": 3},
]
NO_END = {"score__missing_eos": "subtract", "score__missing_eos_penalty": 1.5}
OWN = {
    "sft": [{"loss": "dft"}, {"label_smoothing": 0.1}, {"neftune_alpha": 5.0}],
    "sft-noisy": [{"loss": "nll"}, {"neftune_alpha": 1.0}],
    "sft-smooth": [{"label_smoothing": 0.3}],
    "reward": [{"center_coef": 0.0}, {"label_smoothing": 0.1}, {"ensemble": 2}],
    "reward-ensemble": [{"label_smoothing": 0.0}, {"margins": False}],
    "dpo": [
        {"beta": 0.5}, {"label_smoothing": 0.3}, {"loss": "ipo"}, {"loss": "hinge,cpo"},
        {"loss": "sigmoid,sft", "loss_weights": [1, 0.5]}, {"loss": "r_dpo", "loss_options": ["length_coef:0.5"]},
        {"f_divergence": "js"}, {"f_divergence": "alpha", "f_alpha": 0.9}, {"ld_alpha": 0.2}, {"reference_free": True},
        {"use_weighting": True}, {"reference__update": "sync"}, {"reference__update": "ema", "reference__rate": 0.5},
    ],
    "kto": [
        {"beta": 0.1}, {"desirable_weight": 2.0}, {"undesirable_weight": 1.0}, {"loss": "bco"},
        {"loss": "apo_zero_unpaired"}, {"loss": "bco", "loss_options": {"delta": 0.7}}, {"reference__update": "sync"},
    ],
    "simpo": [{"beta": 0.5}, {"loss_options": {"gamma": 0.1}}, {"label_smoothing": 0.3}, {"loss": "alphapo"}],
    "ppo-head": [
        {"minibatch_size": 3}, {"rollout_epochs": 1}, {"clip": 1e-3}, {"value__clip": 1e-3}, {"value__clip": None},
        {"value__coef": 1.0}, {"gamma": 0.9}, {"lam": 0.5}, {"kl__coef": 0.5}, {"kl__target": 0.01},
        {"kl__target": None}, {"kl__horizon": 5}, {"sampling": {"max_new_tokens": 3}},
        {"sampling": {"max_new_tokens": 5, "temperature": 0.8}},
    ],
    "grpo": [
        {"num_generations": 4}, {"minibatch_size": 6}, {"rollout_epochs": 1}, {"loss": "dapo"}, {"scale": "batch"},
        {"scale": "group"}, {"kl__coef": 0.5}, {"kl__estimator": "k1", "kl__ratio": True},
        {"loss_options": {"clip": 1e-3}},
        {"loss_options": {"clip_high": 1e-3}}, {"loss_options": {"dual_clip": 1.21}}, {"score__overlong_buffer": 4},
        NO_END, {"score__missing_eos": "mask"}, {"sampling": {"max_new_tokens": 5, "temperature": 0.8}},
    ],
    "rloo": [
        {"num_generations": 4}, {"minibatch_size": 6}, {"rollout_epochs": 1}, {"kl__coef": 0.5}, {"clip": 1e-3},
        {"kl__estimator": "full"}, NO_END,
        {"sampling": {"max_new_tokens": 5, "temperature": 0.8}},
    ],
    "online-dpo": [
        {"num_generations": 2}, {"minibatch_size": 3}, {"rollout_epochs": 2}, {"loss": "ipo"}, {"beta": 0.5},
        {"label_smoothing": 0.3}, NO_END, {"xpo_alpha": 0.0, "num_generations": 2},
        {"xpo_alpha": 0.1, "num_generations": 2}, {"sampling": {"max_new_tokens": 5, "temperature": 0.8}},
    ],
    "raft": [
        {"num_generations": 4}, {"minibatch_size": 3}, {"rollout_epochs": 1}, {"keep": "all", "min_score": 0.5},
        {"min_score": 1.0}, {"kl__coef": 0.0}, NO_END,
        {"sampling": {"max_new_tokens": 5, "temperature": 0.8}},
    ],
    "rrhf": [
        {"num_generations": 4}, {"minibatch_size": 3}, {"rollout_epochs": 1}, {"loss": "plackett_luce"},
        {"loss_options": {"nll_coef": 0.5}}, NO_END, {"sampling": {"max_new_tokens": 5, "temperature": 0.8}},
    ],
    "reinforce": [
        {"num_generations": 1}, {"minibatch_size": 6}, {"rollout_epochs": 1}, {"kl__coef": 0.5}, {"clip": 1e-3},
        {"clip": None}, {"gamma": 0.5}, {"baseline": "none"}, {"baseline": "mean"}, {"baseline": "global"},
        NO_END, {"sampling": {"max_new_tokens": 5, "temperature": 0.8}},
    ],
}  # fmt: skip
# Compared in steps that reach their clips; scaled by its spread, a group of two has the same advantages always.
BOLD = {"ppo-head": dict(kl__target=0.5), "grpo": dict(scale="none"), "rloo": {}, "reinforce": {}}


def settings_of(job: str) -> dict[str, Any]:
    return dict(optim=replace(STEADY, lr=3e-2)) | BOLD[job] if job in BOLD else {}


@pytest.fixture(scope="module")
def bold_run(train, plain_run) -> Callable[[str], Any]:
    """The run that others with one changed setting are compared with, done once."""
    return functools.cache(lambda job: train(job, **settings_of(job)) if job in BOLD else plain_run(job))


@pytest.mark.parametrize(
    ("job", "changes"),
    [(job, changes) for job, own in OWN.items() for changes in [*(COMMON if job == "sft" else []), *own]],
    ids=str,
)
def test_no_setting_is_ignored(train, bold_run, job, changes):
    before = bold_run(job)
    assert train(job, **settings_of(job) | changes).distance(before) > 1e-6


@every_job
def test_the_reference_and_the_data_are_those_that_were_named(train, plain_run, material, job):
    data = DataConfig(path=material / f"{DATA.get(job, 'prompts')}.jsonl", limit=3)
    assert not train(job, data=data).same_weights(plain_run(job))
    if name_of(job) not in ("sft", "reward", "simpo"):
        other = train(job, reference=plain_run("sft").folder)
        if job == "rrhf":  # there is none in its loss, and only the KL tells
            assert abs(other.metrics[0]["kl"]) > 1e-3
        else:
            assert not other.same_weights(plain_run(job))


@pytest.mark.parametrize(
    ("job", "dtype"),
    [
        (job, "bfloat16")
        for job in ("sft", "sft-smooth", "reward", "dpo", "kto", "ppo-head", "ppo-policy", "grpo", "raft")
    ]
    + [("sft", "float16")],
)
def test_half_precision_is_trained_saved_and_resumed(configure, train, train_with_stops, material, job, dtype):
    settings = dict(model=ModelConfig(path=material / "policy", dtype=dtype), max_steps=2)
    outcome = train(job, **settings)
    assert all(math.isfinite(value) for row in outcome.metrics for value in row.values())
    kinds = {name.split(":")[0]: tensor.dtype for name, tensor in outcome.weights.items()}
    assert kinds["model.safetensors"] == getattr(torch, dtype)
    assert kinds.get("value_head.safetensors", torch.float32) == torch.float32
    assert train_with_stops(configure(job, **settings), [1]).same_weights(outcome)


# ------------------------------------------------------------------------------------------------------- what it leaves


@every_job
def test_what_was_trained_loads_in_plain_transformers(plain_run, material, job):
    outcome = plain_run(job)
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder)
    prompt, completion = (
        tokenizer("solano peta")["input_ids"],
        tokenizer("dolo .", add_special_tokens=False)["input_ids"],
    )
    batch = PackedBatch.pack([(prompt, [completion])])
    whole = torch.tensor([prompt + completion])
    with torch.no_grad():
        if name_of(job) == "reward":
            kind = AutoModelForTokenClassification if job == "reward-steps" else AutoModelForSequenceClassification
            plain = kind.from_pretrained(outcome.folder)
            ours, _ = load_reward_model(outcome.folder)
            assert plain.config.num_labels == (3 if job == "reward-ensemble" else 1)
            logits = plain(whole).logits[0]
            if job == "reward-steps":
                assert torch.allclose(logits[len(prompt) :, 0], token_scores(ours, batch)[0], atol=1e-5)
                logits = logits[-1]
            assert torch.allclose(logits, sequence_scores(ours, batch)[0], atol=1e-5)
        else:
            plain = AutoModelForCausalLM.from_pretrained(outcome.folder)
            ours, _ = load_policy(outcome.folder)
            logprobs = plain(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = logprobs.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
            assert torch.allclose(token_logprobs(ours, batch)[0], expected, atol=1e-5)
    source = material / "policy"
    before = dict(type(plain).from_pretrained(source, num_labels=plain.config.num_labels).named_parameters())
    moved = [name for name, after in plain.named_parameters() if not torch.equal(before[name], after)]
    assert len(moved) == len(before)  # all of it was trained


@pytest.mark.parametrize("job", ["ppo-head", "ppo-policy", "ppo-reward"])
def test_ppo_leaves_its_critic(plain_run, material, job):
    outcome = plain_run(job)
    if job == "ppo-head":
        head = ValueHead.load(outcome.folder)
        assert head.linear.weight.abs().min() > 0  # from 0, where it began
        assert not (outcome.folder / "value_model").exists()
    else:
        critic = AutoModelForSequenceClassification.from_pretrained(outcome.folder / "value_model")
        start = material / ("policy" if job == "ppo-policy" else "reward_model")
        before = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
        assert 0 < (critic.model.norm.weight - before.model.norm.weight).abs().max() < 0.1
        assert AutoTokenizer.from_pretrained(outcome.folder / "value_model").eos_token == "<eos>"
        assert not (outcome.folder / "value_head.safetensors").exists()


SCORED = {"loss", "accuracy", "margin", "chosen_score", "rejected_score"}
HELD_OUT = {
    "sft": {"accuracy", "perplexity"},
    "reward": {"accuracy_longer", "accuracy_shorter", "chosen_longer", "prefers_longer", "length_correlation",
               "calibration_error"},
}  # fmt: skip
OF_STEPS = {"accuracy_right", "accuracy_wrong", "calibration_error"}
POLICY = {"score", "score_std", "kl", "length", "eos_rate", "entropy", "policy_loss", "approx_kl", "clip_fraction",
          "ratio_max"}  # fmt: skip
LABELLED = ("reward", "dpo", "kto", "simpo")
PAIRED = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob"}
PLAYED = {"score", "score_std", "kl", "length", "eos_rate", "excluded", "kept", "skipped"}


@every_job
def test_metrics_of_every_step_and_of_evaluations(train, material, job):
    """And of evaluations the best model, by one of their metrics."""
    metric = {"sft": "eval_nll"}.get(name_of(job), "eval_accuracy" if name_of(job) in LABELLED else "eval_score")
    outcome = train(job, eval_data=material / f"{DATA.get(job, 'prompts')}.jsonl", eval_every=3, keep_best=metric)
    expected = {
        "sft": {"loss", "nll", "tokens"},
        "sft-noisy": {"loss", "nll", "tokens"},
        "sft-smooth": {"loss", "nll", "tokens"},
        "reward": SCORED,
        "reward-ensemble": SCORED | {"disagreement"},
        "reward-rankings": {"loss", "accuracy", "margin"},
        "reward-steps": {"loss", "accuracy"},
        "dpo": PAIRED,
        "kto": {"loss", "accuracy", "margin", "desirable", "desirable_reward", "undesirable_reward", "kl"},
        "simpo": PAIRED,
        "grpo": POLICY | {"excluded", "flat_groups", "kl_loss"},
        "rloo": POLICY | {"excluded", "flat_groups"},
        "reinforce": POLICY | {"excluded", "greedy_score"},
        "online-dpo": PLAYED | PAIRED | {"ties"},
        "raft": PLAYED | {"flat_groups", "kept_score", "nll"},
        "rrhf": PLAYED | {"flat_groups", "loss", "accuracy"},
    }.get(job, POLICY | {"kl_coef", "explained_variance", "value_loss", "value_clip_fraction", "value_mean",
                         "excluded", "paid_score", "skipped"})  # fmt: skip
    evaluation = {"score", "kl"} if "score" in expected else (expected - {"tokens"}) | HELD_OUT.get(name_of(job), set())
    evaluation = {f"eval_{name}" for name in (evaluation if job != "reward-steps" else expected | OF_STEPS)}
    for row in outcome.metrics:
        wanted = {"step", "grad_norm", "lr"} | expected | (evaluation if row["step"] in (3, 4) else set())
        assert row.keys() - {"eval_accuracy_alike"} == wanted  # whether any two lengths are alike is up to the data
        assert all(isinstance(value, int | float) for value in row.values())
    last = outcome.metrics[-1]
    assert outcome.result == {name: value for name, value in last.items() if name.startswith("eval_")}
    about = json.loads((outcome.folder / "run.json").read_text())
    assert about["job"] == name_of(job)
    assert about["total_steps"] == 4
    best = json.loads((outcome.folder / "best" / "best.json").read_text())
    assert (best["step"], best["value"]) in [(row["step"], row.get(metric)) for row in outcome.metrics]
    files = {path.name for path in outcome.folder.iterdir() if path.suffix in (".safetensors", ".json")}
    assert files - {"run.json"} == {path.name for path in (outcome.folder / "best").iterdir() if path.is_file()} - {
        "best.json", "chat_template.jinja"
    }  # fmt: skip


@pytest.mark.parametrize("job", ["sft", "reward", "dpo", "kto", "ppo-head", "grpo", "online-dpo", "raft", "rrhf"])
def test_fewer_rows_than_a_batch_are_trained_on(train, job):
    outcome = train(job, batch_size=64, epochs=2, max_steps=None, optim=OptimConfig(lr=1e-3, schedule="constant"))
    assert [row["step"] for row in outcome.metrics] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in outcome.metrics)


@some_jobs
def test_the_rate_follows_the_schedule_and_the_norm_is_clipped(train, job):
    rates = [row["lr"] for row in train(job, optim=OptimConfig(lr=0.01, schedule="linear", warmup_ratio=0.5)).metrics]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


@some_jobs
def test_the_clip_reaches_the_weights(train, monkeypatch, job):
    """With plain SGD of rate 1 and one step, the weights move by the clipped norm, or by the whole of it."""
    moved = []

    def build(modules, config):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        original = optimizer.step

        def step():
            original()
            moved.append(sum((p - b).square().sum() for p, b in zip(parameters, before, strict=True)).sqrt().item())

        optimizer.step = step
        return optimizer

    monkeypatch.setattr(run_module, "build_optimizer", build)
    single = dict(max_steps=1)
    if job.startswith("ppo"):
        single |= dict(minibatch_size=6, rollout_epochs=1)
    elif job in ("grpo", "rloo", "reinforce"):
        single |= dict(minibatch_size=12, rollout_epochs=1)
    elif job in ("online-dpo", "raft", "rrhf"):
        single |= dict(minibatch_size=6, rollout_epochs=1)
    schedule = dict(lr=1.0, schedule="constant")
    clipped = train(job, **single, optim=OptimConfig(max_grad_norm=1e-2, **schedule))
    whole = train(job, **single, optim=OptimConfig(max_grad_norm=None, **schedule))
    norm = whole.metrics[0]["grad_norm"]
    assert clipped.metrics[0]["grad_norm"] == pytest.approx(norm)
    assert norm > 0.02
    assert moved == pytest.approx([1e-2, norm], rel=1e-3)


# -------------------------------------------------------------------------------------------------------- what it minds


@pytest.mark.parametrize("job", ["sft", "reward", "dpo", "kto", "ppo-head", "grpo", "online-dpo", "raft"])
def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(configure, train, monkeypatch, job):
    module = trainer(job)
    name = {
        "sft": "sft_loss", "raft": "sft_loss", "reward": "bradley_terry_loss", "rrhf": "ranked_preference_loss",
        "sft-noisy": "sft_loss", "sft-smooth": "sft_loss", "reward-ensemble": "bradley_terry_loss",
        "reward-rankings": "plackett_luce_loss", "reward-steps": "process_reward_loss",
        "dpo": "preference_loss", "kto": "unpaired_preference_loss", "simpo": "preference_loss",
        "online-dpo": "preference_loss",
    }.get(job, "policy_loss")  # fmt: skip
    original = getattr(module, name)

    def poisoned(*args, **options):
        loss, stats = original(*args, **options)
        return loss * float("nan"), stats

    monkeypatch.setattr(module, name, poisoned)
    weights = []
    build = run_module.build_optimizer

    def watch(modules, config):
        weights.extend((p, p.detach().clone()) for module in modules for p in module.parameters())
        return build(modules, config)

    monkeypatch.setattr(run_module, "build_optimizer", watch)
    config = configure(job, max_steps=20, optim=OptimConfig(lr=1.0))
    with pytest.raises(FloatingPointError, match="not finite in each of the last 5 steps"):
        train(config)
    assert all(torch.equal(now, before) for now, before in weights)
    assert json.loads(Path(config.output, "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] == "nan"


def test_nothing_is_said_that_nobody_needs(train, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        for job in JOBS:
            train(job, max_steps=1)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
