"""Every paired loss through the command line, and what the loop does for those that need more than log-probs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_core import cli
from rlhf_core.config import ConfigError, DataConfig, LoraConfig, ModelConfig, OptimConfig
from rlhf_core.control import RunningMean
from rlhf_core.data.formats import DataError
from rlhf_core.data.loader import load_examples, micro_batches
from rlhf_core.losses.preference import PREFERENCE_LOSSES
from rlhf_core.models.forward import token_logprobs
from rlhf_core.models.load import load_policy
from rlhf_core.trainers import dpo
from rlhf_core.training import reference
from tests.trainers.plain import grouped

PLAIN = OptimConfig(lr=3e-3, schedule="constant", eps=1e-3)
FREE = ["orpo", "cpo", "simpo"]
JOBS = {"dpo": dpo.DPOConfig, "ipo": dpo.IPOConfig, "orpo": dpo.ORPOConfig, "cpo": dpo.CPOConfig,
        "simpo": dpo.SimPOConfig}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(material, tmp_path_factory) -> Path:
    """The pairs of every trainer's tests, with a margin each."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"margin": 0.1 * i}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture
def command(material, pairs, tmp_path):
    """command("dpo", "--loss", ...): the exit status of a short run, its metrics in `tmp_path / "run"`."""

    def run(job: str, *more: str, steps: int = 2) -> int:
        words = ["--model", material / "policy", "--data", pairs, "--output", tmp_path / "run", "--batch-size", "10",
                 "--max-steps", steps, "--epochs", "9", "--no-progress", "--overwrite", "--optim.lr", "3e-3",
                 "--optim.schedule", "constant"]  # fmt: skip
        return cli.main([job, *map(str, words), *more])

    return run


def metrics_in(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ the whole table


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_every_loss_of_the_table_trains_from_the_command_line(command, tmp_path, name):
    smoothing = ["--label-smoothing", "0.1"] if name == "exo_pair" else []
    assert command("dpo", "--loss", name, "--beta", "0.5", *smoothing, steps=3) == 0
    first, *_, last = rows = metrics_in(tmp_path / "run")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["grad_norm"] > 0 for row in rows)
    # sft looks at no second completion. discopop rises at a margin of 0 before it falls: there
    # (1 - ln 2) sigmoid'(0) / tau - 1/2 sigmoid(0) - 1/2 = 0.31 * 5 - 0.75 > 0 a unit of beta d.
    if name not in ("sft", "discopop"):
        assert last["margin"] > first["margin"]
        assert last["loss"] < first["loss"]


def test_several_losses_are_added_with_their_weights(command, tmp_path):
    """MPO's three, from YAML and from the command line."""
    words = "--loss", "sigmoid,bco_pair,sft", "--loss-weights", "0.8,0.2,1"
    assert command("dpo", *words) == 0
    for row in metrics_in(tmp_path / "run"):
        parts = 0.8 * row["loss_sigmoid"] + 0.2 * row["loss_bco_pair"] + row["loss_sft"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    (tmp_path / "mpo.yaml").write_text("loss: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1]\n")
    before = metrics_in(tmp_path / "run")
    assert command("dpo", "--config", str(tmp_path / "mpo.yaml")) == 0
    assert [row["loss"] for row in metrics_in(tmp_path / "run")] == [row["loss"] for row in before]
    assert command("dpo", *words, "--micro-batch-size", "1") == 0
    for row, other in zip(metrics_in(tmp_path / "run"), before, strict=True):
        for name in ("loss", "loss_sigmoid", "loss_bco_pair", "loss_sft"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), name


def test_a_losss_own_options_are_given_by_name(command, tmp_path, capsys):
    """On the command line and as a group in YAML; one that no loss has is refused with the nearest."""

    def loss(*words: str) -> float:
        assert command("simpo", *words, steps=1) == 0
        return metrics_in(tmp_path / "run")[0]["loss"]

    (tmp_path / "group.yaml").write_text("loss_options: {gamma: 0.25}\n")
    small = loss("--loss-options", "gamma:0.25")
    assert small == loss("--config", str(tmp_path / "group.yaml"))
    assert small < loss("--loss", "simpo,cpo", "--loss-options", "gamma:0.25,nll_coef:1")
    for words, message in {
        "gama:0.5": "loss_options='gama:0.5': expected an option of simpo: gamma; did you mean 'gamma'?",
        "beta:0.5": "loss_options='beta:0.5': expected an option of simpo: gamma",
        "gamma:much": "loss_options='gamma:much': expected name:number",
        "gamma:nan": "loss_options='gamma:nan': expected name:number",
        "gamma": "loss_options='gamma': expected name:number",
        "gamma:1,gamma:2": "loss_options='gamma:2': expected gamma once",
    }.items():
        assert command("simpo", "--loss-options", words) == 2
        assert message in capsys.readouterr().err
    assert command("dpo", "--loss", "simpoo") == 2
    assert "did you mean simpo?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "sigmoid,sigmoid"}, "loss=('sigmoid', 'sigmoid'): expected each name once"),
        ({"loss_weights": "1,2"}, "loss_weights=(1.0, 2.0): expected 1, one for each loss"),
        ({"loss": "aot", "use_weighting": True}, "use_weighting=True: expected False, because aot looks across pairs"),
        ({"loss": "simpo", "reference": "r"}, "reference.path='r': expected None, because simpo needs"),
        ({"loss": "orpo", "reference__update": "sync"}, "reference.update='sync': expected none, because orpo needs"),
        ({"loss": "cpo", "reference__cache": "on"}, "reference.cache='on': expected auto or off, because cpo"),
        ({"reference_free": True, "reference__update": "ema"}, "reference.update='ema': expected none, because"),
        ({"reference__update": "ema", "reference__cache": "on"}, "reference.cache='on': expected auto or off,"),
        ({"loss": "tdpo1", "reference__cache": "on"}, "reference.cache='on': expected auto or off: this loss needs"),
        ({"loss": "tdpo2", "reference_free": True}, "reference_free=True: expected False for this loss"),
        ({"loss": "dpop", "f_divergence": "js"}, "f_divergence=js: not defined for 'dpop'"),
        ({"loss": "simpo", "ld_alpha": 0.5}, "ld_alpha=0.5: not defined for 'simpo'"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError) as caught:
        dpo.DPOConfig(model="m", data="d", output="o", **grouped(changes))
    assert str(caught.value).startswith(message)


# -------------------------------------------------------------------------------------- ORPO, SimPO, CPO, IPO: defaults


def test_each_job_is_dpo_with_its_papers_defaults():
    least = dict(model="m", data="d", output="o")
    loss = {
        job: (config.loss, config.beta, config.loss_options) for job, kind in JOBS.items() if (config := kind(**least))
    }
    assert loss == {
        "dpo": (("sigmoid",), 0.1, None),
        "ipo": (("ipo",), 0.1, None),
        "orpo": (("orpo",), 0.1, None),
        "cpo": (("cpo",), 0.1, ("nll_coef:1.0",)),
        "simpo": (("simpo",), 2.0, ("gamma:1.0",)),
    }
    for job, kind in JOBS.items():
        assert kind.job == job
        assert cli.JOBS[job][:2] == ("rlhf_core.trainers.dpo", kind.__name__)


@pytest.mark.parametrize("job", JOBS)
def test_each_job_trains_under_its_own_name_and_loads_a_reference_only_if_it_needs_one(
    command, tmp_path, monkeypatch, job
):
    asked = []
    original = reference.load_reference
    monkeypatch.setattr(
        reference, "load_reference", lambda *args, **options: asked.append(1) or original(*args, **options)
    )
    assert command(job) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["job"] == job
    assert asked == ([] if job in FREE else [1])
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["loss"] == [{"dpo": "sigmoid"}.get(job, job)]


@pytest.mark.parametrize("loss", ["ipo", "orpo", "cpo", "aot_unpaired", "beta_dpo,tdpo1"])
def test_neither_micro_batches_nor_the_layout_change_what_a_loss_does(train, material, pairs, loss):
    """By rows and by tokens; AOT and beta-DPO look across the pairs of the whole step, not of a micro-batch."""
    shared = dict(loss=loss, data=pairs, eval_data=pairs, max_steps=3, batch_size=10, loss_options=None, beta=0.5)
    whole = train("dpo", **shared)
    padded = {"path": material / "policy", "layout": "padded"}
    for changes in ({"micro_batch_size": 3}, {"micro_batch_tokens": 30}, {"model": padded}):
        other = train("dpo", **shared | changes)
        assert whole.distance(other) < 1e-5
        for row, again in zip(whole.metrics, other.metrics, strict=True):
            assert row.keys() == again.keys()
            for name in row.keys() - ({"accuracy"} if row["step"] == 1 else set()):  # ties, told apart by rounding
                assert again[name] == pytest.approx(row[name], rel=1e-3, abs=2e-5), name


def test_aot_in_micro_batches_of_their_own_would_be_another_loss(train, pairs, monkeypatch):
    """So that the test before could fail."""
    shared = dict(loss="aot_unpaired", data=pairs, max_steps=3, batch_size=10, beta=0.5)
    whole = train("dpo", **shared)
    entry = PREFERENCE_LOSSES["aot_unpaired"]
    monkeypatch.setitem(PREFERENCE_LOSSES, "aot_unpaired", replace(entry, across_pairs=False))
    assert whole.distance(train("dpo", **shared, micro_batch_size=3)) > 1e-4


# ---------------------------------------------------------------------------------------------- what single losses need


def first_row(train, **changes) -> dict[str, float]:
    return train("dpo", max_steps=1, batch_size=10, optim=PLAIN, **changes).metrics[0]


def test_odpo_takes_the_margin_of_each_row(train, pairs, material):
    row = first_row(train, loss="odpo", data=pairs)
    assert row["loss"] == pytest.approx(sum(math.log(1 + math.exp(0.1 * i)) for i in range(10)) / 10, rel=1e-5)
    with pytest.raises(DataError, match=r"pairs.jsonl.*: no margin, which the loss 'odpo' needs; expected a column"):
        first_row(train, loss="odpo", data=material / "pairs.jsonl")


def test_wpo_weighs_a_pair_by_how_likely_the_policy_was_to_say_it(train, material, pairs):
    """ln 2 times the weights, which a plain forward of transformers gives as well."""
    policy, tokenizer = load_policy(material / "policy")
    total = 0.0
    for example in load_examples(DataConfig(path=pairs), tokenizer, need="preference"):
        weight = 1.0
        for completion in example.completions:
            logits = policy(torch.tensor([example.prompt + completion])).logits[0, len(example.prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1)
            said = logprobs.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
            weight *= (said - (2 * logprobs).logsumexp(-1)).mean().exp().item()
        total += weight * math.log(2) / 10
    assert first_row(train, data=pairs, use_weighting=True)["loss"] == pytest.approx(total, rel=1e-5)


def test_tdpo_starts_at_ln_2_and_charges_the_kl_after(train, pairs):
    metrics = train("dpo", loss="tdpo1", data=pairs, max_steps=4, batch_size=10, optim=PLAIN, beta=0.5).metrics
    plain = train("dpo", loss="sigmoid", data=pairs, max_steps=4, batch_size=10, optim=PLAIN, beta=0.5).metrics
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
def test_beta_dpo_remembers_the_gap_of_earlier_steps(train, pairs, ld_alpha):
    """The loss of each step by hand, of one pair: beta (1 + 0.6 (gap - mean of the gaps before)) times the gap."""
    data = DataConfig(path=pairs, limit=1)
    mean, settings = 0.0, dict(max_steps=4, batch_size=1, optim=PLAIN, beta=0.5, ld_alpha=ld_alpha)
    rows = train("dpo", loss="beta_dpo", data=data, **settings).metrics
    assert len({row["gap"] for row in rows}) == 4
    for row in rows:
        beta = 0.5 * (1 + 0.6 * (row["gap"] - mean))
        assert row["loss"] == pytest.approx(math.log(1 + math.exp(-beta * row["gap"])), rel=1e-4)
        mean = 0.9 * mean + 0.1 * row["gap"]
    fixed = dict(loss="beta_dpo", data=data, max_steps=2, batch_size=1, loss_options={"gap_mean": 0.5})
    assert "gap" not in train("dpo", **fixed).metrics[-1]


def test_bco_shifts_its_rewards_by_their_mean_so_far(train, pairs):
    data = DataConfig(path=pairs, limit=1)
    rows = train("dpo", loss="bco_pair", data=data, max_steps=4, batch_size=1, optim=PLAIN, beta=0.5).metrics
    mean = RunningMean()
    for row in rows:
        chosen, rejected = row["chosen_reward"] - mean.mean, row["rejected_reward"] - mean.mean
        expected = math.log(1 + math.exp(-chosen)) + math.log(1 + math.exp(rejected))
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
        assert row["reward"] == pytest.approx((row["chosen_reward"] + row["rejected_reward"]) / 2, abs=1e-6)
        mean.update(row["reward"])
    assert abs(mean.mean) > 1e-4


@pytest.mark.parametrize("loss", ["sigmoid", "cpo"])
def test_a_row_of_weight_2_counts_as_two(train, plain_run, material, tmp_path, loss):
    rows = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()][:3]
    weighted, twice = tmp_path / "weighted.jsonl", tmp_path / "twice.jsonl"
    weighted.write_text("".join(json.dumps(row | {"weight": 1 + (i == 0)}) + "\n" for i, row in enumerate(rows)))
    twice.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rows]))
    other = {"reference": plain_run("sft").folder} if loss == "sigmoid" else {}
    losses = [first_row(train, loss=loss, data=path, **other) for path in (weighted, twice)]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-4)
    with pytest.raises(DataError, match=r"weighted.jsonl.*: its weight is not 1, which the loss 'aot' cannot honour"):
        first_row(train, loss="aot", data=weighted)


# -------------------------------------------------------------------------------------------------------- the reference

MOVED = dict(optim=OptimConfig(lr=3e-2, schedule="constant"), batch_size=10, beta=0.5, max_steps=4)


def test_a_synced_reference_starts_each_stretch_at_ln_2(train):
    rows = train("dpo", reference__update="sync", reference__every=2, **MOVED).metrics
    assert [row["loss"] == pytest.approx(math.log(2), abs=1e-6) for row in rows] == [True, False, True, False]


def test_a_reference_with_adapters_follows_and_is_resumed_to_the_bit(configure, train, train_with_stops):
    """It starts as the policy, so it has a copy of the adapter, over the same weights."""
    settings = dict(lora=LoraConfig(r=4), reference__update="sync", reference__every=2, **MOVED)
    whole = train("dpo", **settings)
    at_ln_2 = [row["loss"] == pytest.approx(math.log(2), abs=1e-6) for row in whole.metrics]
    assert at_ln_2 == [True, False, True, False]
    resumed = train_with_stops(configure("dpo", **settings), [3])
    assert resumed.same_weights(whole) and resumed.metrics == whole.metrics


def test_an_average_of_weights_that_cannot_hold_its_steps_is_refused(train, material):
    half = ModelConfig(path=material / "policy", dtype="bfloat16")
    with pytest.raises(ConfigError, match="reference.update='ema': expected sync, or a reference.dtype of float32"):
        train("dpo", model=half, reference__update="ema", **MOVED)
    train("dpo", model=half, reference=material / "policy", reference__update="ema", **MOVED | {"max_steps": 1})


def test_an_average_is_between_a_copy_and_standing_still(train):
    still = train("dpo", **MOVED)
    for rate, other in ((0.0, still), (1.0, train("dpo", reference__update="sync", **MOVED))):
        assert train("dpo", reference__update="ema", reference__rate=rate, **MOVED).same_weights(other)
    half = train("dpo", reference__update="ema", reference__rate=0.5, **MOVED).metrics[-1]["margin"]
    assert 1e-3 < half < still.metrics[-1]["margin"]


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({}, True),
        ({"reference__update": "ema"}, False),
        ({"loss": "tdpo1"}, False),
        ({"epochs": 1, "max_steps": None, "max_tokens_per_batch": 20}, False),  # more steps than 10 rows / 6, once each
        ({"epochs": 2, "max_steps": None, "max_tokens_per_batch": 40}, True),
    ],
    ids=str,
)
def test_a_reference_that_stays_and_is_asked_twice_is_cached(train, changes, cached):
    assert (train("dpo", **changes).folder / "reference_logprobs").exists() == cached


@pytest.mark.parametrize(
    "changes",
    [
        {"reference__update": "sync", "reference__every": 2},
        {"reference__update": "ema", "reference__rate": 0.3},
        {"reference__cache": "on"},
        {"loss": "beta_dpo,bco_pair,tdpo1", "micro_batch_size": 4},
        {"loss": "simpo,sft", "loss_weights": [1.0, 0.2]},
    ],
    ids=str,
)
def test_each_kind_of_reference_and_all_that_is_remembered_is_resumed_to_the_bit(
    configure, train, train_with_stops, changes
):
    settings = dict(optim=OptimConfig(lr=3e-2, schedule="constant"), beta=0.5, **changes)
    whole = train("dpo", **settings)
    resumed = train_with_stops(configure("dpo", **settings), [1, 3])
    assert resumed.same_weights(whole)
    assert resumed.metrics == whole.metrics


# ------------------------------------------------------------------------------------------------------- the evaluation


def test_the_best_model_by_a_metric_is_kept_and_resumed_to_the_bit(configure, train, train_with_stops, material):
    settings = dict(
        eval_data=material / "pairs.jsonl", eval_every=1, keep_best="eval_loss", max_steps=6, beta=0.5,
        optim=OptimConfig(lr=1.0, schedule="constant"),  # so high that the last is not the best
    )  # fmt: skip
    whole = train("dpo", **settings)
    losses = [row["eval_loss"] for row in whole.metrics]
    best = json.loads((whole.folder / "best" / "best.json").read_text())
    assert best == {"metric": "eval_loss", "value": min(losses), "step": losses.index(min(losses)) + 1}
    assert best["step"] < 6
    shorter = train("dpo", **settings | {"max_steps": best["step"]})
    kept, last = load_policy(whole.folder / "best")[0], load_policy(shorter.folder)[0]
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), last.parameters(), strict=True))
    resumed = train_with_stops(configure("dpo", **settings), [best["step"], 5])
    assert resumed.same_weights(whole)  # the best one's are among them
    assert json.loads((resumed.folder / "best" / "best.json").read_text()) == best


def test_an_evaluation_on_the_training_rows_says_what_the_next_step_will(train, material):
    """The same metrics: after step 1 the evaluation ones are those of step 2 on the same rows, before it moves."""
    first, second = train(
        "dpo", eval_data=material / "pairs.jsonl", eval_every=1, max_steps=2, batch_size=10, optim=PLAIN
    ).metrics
    metrics = {name for name in first if name.startswith("eval_")}
    assert {f"eval_{name}" for name in first.keys() - metrics - {"step", "lr", "grad_norm"}} == metrics
    for name in metrics:
        assert first[name] == pytest.approx(second[name.removeprefix("eval_")], rel=1e-4, abs=1e-6)


def test_metrics_of_a_mixture_of_experts(train, material, tmp_path):
    """Its balance is logged, in training and evaluation; more weight on it makes it better."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(material / "policy")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1, initializer_range=0.5,
        max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    shared = dict(model=tmp_path / "moe", batch_size=10, max_steps=5, optim=PLAIN)
    assert "router_loss" not in train("dpo", **shared | {"max_steps": 1}).metrics[-1]
    for job, data in (("dpo", "pairs"), ("kto", "labelled"), ("sft", "sft")):
        data = material / f"{data}.jsonl"
        rows = train(job, **shared | {"data": data, "eval_data": data, "router_aux_coef": 10.0}).metrics
        assert rows[-1]["router_loss"] < rows[0]["router_loss"] - 0.01
        assert job == "sft" or "eval_router_loss" in rows[-1]
    with pytest.raises(ValueError, match="router_loss=True: LlamaForCausalLM has no load-balancing loss"):
        train("dpo", router_aux_coef=1.0)


def test_the_metrics_are_those_of_the_log_probs(train, material, plain_run):
    """chosen and rejected rewards, their margin and the accuracy from plain log-probs of two models."""
    other = plain_run("sft").folder
    policy, tokenizer = load_policy(material / "policy")
    reference, _ = load_policy(other)
    examples = load_examples(DataConfig(path=material / "pairs.jsonl"), tokenizer, need="preference")
    (batch,) = micro_batches(examples, None)
    with torch.no_grad():
        rewards = 0.3 * (token_logprobs(policy, batch) - token_logprobs(reference, batch)).sum(-1).view(-1, 2)
    row = first_row(train, reference=other, beta=0.3)
    assert row["chosen_reward"] == pytest.approx(rewards[:, 0].mean().item(), rel=1e-4)
    assert row["rejected_reward"] == pytest.approx(rewards[:, 1].mean().item(), rel=1e-4)
    assert row["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), rel=1e-3)
    assert row["accuracy"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).float().mean().item())
