"""What SFT minimises: which tokens, how much each weighs, smoothed or not, and the noise that only training hears."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_core.config import ConfigError, DataConfig, OptimConfig
from rlhf_core.data.loader import load_examples
from rlhf_core.models.load import load_policy
from rlhf_core.trainers import sft
from rlhf_core.training.offline import OfflineRun
from tests.trainers.plain import sweep

MESSAGES = [
    {"role": "user", "content": "solano peta"},
    {"role": "assistant", "content": "dolo mutano"},
    {"role": "user", "content": "galosh"},
    {"role": "assistant", "content": "misu"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_logprobs(folder, prompt: str, completion: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of transformers' own forward: (T, V) log-probs where completion tokens are predicted, and the (T,) tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1), torch.tensor(after)


ROWS = [
    {"prompt": "solano peta", "completion": "dolo mutano", "weight": 0.5},
    {"prompt": "galosh", "completion": "misu", "weight": 2.0},
    {"prompt": "kelano", "completion": "vesa hilo rena", "weight": 1.25},
]


def by_hand(folder, one) -> float:
    """The weighted mean over tokens of one(log-probs (V,), token)."""
    total = weight = 0.0
    for row in ROWS:
        logprobs, tokens = plain_logprobs(folder, row["prompt"], row["completion"])
        total += row["weight"] * sum(one(p, token) for p, token in zip(logprobs, tokens, strict=True))
        weight += row["weight"] * len(tokens)
    return float(total / weight)


@pytest.mark.parametrize(
    ("changes", "one"),
    [
        ({}, lambda p, token: -p[token]),
        ({"loss": "dft"}, lambda p, token: -p[token].exp() * p[token]),
        ({"label_smoothing": 0.2}, lambda p, token: -0.8 * p[token] - 0.2 * p.mean()),
    ],
    ids=["nll", "dft", "smoothed"],
)
@pytest.mark.parametrize("micro", [{}, {"micro_batch_size": 1}, {"micro_batch_tokens": 9}], ids=str)
def test_the_loss_is_a_weighted_mean_over_tokens(train, material, tmp_path, changes, one, micro):
    """Of plain transformers' log-probs; the nll beside it, and the evaluation's, are plain means of all tokens."""
    data = write(tmp_path / "rows.jsonl", ROWS)
    optim = OptimConfig(lr=1e-12)
    row = train("sft", data=data, eval_data=data, max_steps=1, optim=optim, **changes, **micro).metrics[0]
    assert row["loss"] == pytest.approx(by_hand(material / "policy", one), rel=1e-5)
    assert row["eval_loss"] == pytest.approx(row["loss"], rel=1e-5)
    pairs = [plain_logprobs(material / "policy", each["prompt"], each["completion"]) for each in ROWS]
    own = torch.cat([p.gather(1, tokens[:, None])[:, 0] for p, tokens in pairs])
    top = torch.cat([p.argmax(1) == tokens for p, tokens in pairs])
    assert row["nll"] == pytest.approx(-own.mean().item(), rel=1e-5)
    assert row["eval_nll"] == pytest.approx(row["nll"], rel=1e-5)
    assert row["eval_perplexity"] == pytest.approx(math.exp(row["nll"]), rel=1e-4)
    assert row["eval_accuracy"] == pytest.approx(top.float().mean().item())
    assert row["tokens"] == len(own)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_all_turns_or_the_last(train, material, tmp_path, layout):
    """Of a conversation the assistant's turns are learned, in one sequence; what the user says never is."""
    path = write(tmp_path / "rows.jsonl", [{"messages": MESSAGES}])
    policy, tokenizer = load_policy(material / "policy")
    counts = {}
    for turns in ("last", "all"):
        data = DataConfig(path=path, turns=turns, chat_template="plain")
        [example] = load_examples(data, tokenizer, need="supervised", model=policy)
        row = train("sft", data=data, max_steps=1, model={"path": material / "policy", "layout": layout}).metrics[0]
        whole = torch.tensor([example.prompt + example.completions[0]])
        with torch.no_grad():
            logprobs = AutoModelForCausalLM.from_pretrained(material / "policy")(whole).logits.log_softmax(-1)
        start = len(example.prompt)
        flags = example.supervised[0] if example.supervised else [True] * len(example.completions[0])
        own = [
            -logprobs[0, start + t - 1, token].item()
            for t, token in enumerate(example.completions[0])
            if flags[t]
        ]  # fmt: skip
        assert row["nll"] == pytest.approx(sum(own) / len(own), rel=1e-4)
        assert row["tokens"] == counts.setdefault(turns, len(own))
    assert counts["all"] > counts["last"]


# ------------------------------------------------------------------------------------------------------------ the noise


def test_noise_is_for_training_alone(train, material):
    """The first step's loss is another one; the evaluation after a step that changes nothing is as without noise."""
    still = dict(max_steps=1, optim=OptimConfig(lr=1e-12), eval_data=material / "sft.jsonl")
    quiet = train("sft", **still).metrics[0]
    noisy = train("sft", neftune_alpha=20.0, **still).metrics[0]
    assert abs(noisy["nll"] - quiet["nll"]) > 1e-3
    assert noisy["eval_nll"] == pytest.approx(quiet["eval_nll"], rel=1e-6)


def test_noise_is_drawn_anew_at_every_step(train):
    """With one row and weights that stand still, the losses of steps differ by their noise alone."""
    still = dict(batch_size=10, max_steps=3, optim=OptimConfig(lr=1e-12))
    losses = [row["nll"] for row in train("sft", neftune_alpha=20.0, **still).metrics]
    assert len(set(losses)) == 3
    assert max(losses) - min(losses) > 1e-4


def test_noise_follows_the_row_and_not_its_place_among_micro_batches(train):
    """Best fit puts rows into other groups than their order; each keeps its noise."""
    whole = train("sft", neftune_alpha=20.0, max_steps=2)
    for micro in ({"micro_batch_size": 1}, {"micro_batch_tokens": 14}):
        parts = train("sft", neftune_alpha=20.0, max_steps=2, **micro)
        assert whole.distance(parts) < 1e-5
        assert parts.metrics[0]["nll"] == pytest.approx(whole.metrics[0]["nll"], rel=1e-5)


@pytest.mark.parametrize(
    "changes", sweep([{"loss": "dft"}, {"label_smoothing": 0.1}, {"neftune_alpha": 5.0}], [{"loss": "dft"}]), ids=str
)
def test_every_kind_memorises_its_rows(train, material, changes):
    """DFT more slowly from weights that know nothing: what is unlikely hardly pulls."""
    settings = dict(optim=OptimConfig(lr=2e-2, schedule="linear"), eval_data=material / "sft.jsonl")
    run = train("sft", max_steps=60, epochs=60, batch_size=10, **settings, **changes)
    assert run.metrics[0]["nll"] > 3
    assert run.metrics[-1]["eval_accuracy"] > (0.6 if "loss" in changes else 0.8)


# ---------------------------------------------------------------------------------------------------------- the routers


@pytest.fixture(scope="module")
def experts(material, tmp_path_factory):
    """A mixture of four experts with the material's tokenizer."""
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = AutoTokenizer.from_pretrained(material / "policy")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, num_local_experts=4,
        num_experts_per_tok=2, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_experts_are_kept_busy_alike(train, experts):
    """A strong pull brings the balance near its least, which is the number of experts a token has: 2."""
    settings = dict(model=experts, batch_size=10, max_steps=25, epochs=25, optim=OptimConfig(lr=2e-2))
    rows = train("sft", router_aux_coef=1.0, **settings).metrics
    assert rows[0]["router_loss"] > rows[-1]["router_loss"]
    assert rows[-1]["router_loss"] == pytest.approx(2.0, abs=0.1)
    without = train("sft", **settings).metrics
    assert "router_loss" not in without[0]
    assert without[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)  # the balance is no part of it


def test_a_model_without_experts_has_no_balance(train):
    with pytest.raises(ValueError, match="router_loss=True: LlamaForCausalLM has no load-balancing loss"):
        train("sft", router_aux_coef=1.0)


def test_settings_that_contradict_each_other(configure):
    with pytest.raises(ConfigError, match="label_smoothing=0.1: expected 0 with loss='dft'"):
        configure("sft", loss="dft", label_smoothing=0.1)


def test_the_best_by_the_metrics_of_sft(train, material):
    outcome = train("sft", eval_data=material / "sft.jsonl", eval_every=1, keep_best="eval_nll")
    best = json.loads((outcome.folder / "best" / "best.json").read_text())
    assert best["value"] == min(row["eval_nll"] for row in outcome.metrics)


def test_evaluation_in_one_piece_or_in_many(configure, material):
    found = []
    for size in (10, 3):
        config = configure("sft", eval_data=material / "weighted.jsonl", batch_size=size)
        with OfflineRun(config, need="supervised", evaluate=sft.evaluate) as run, run.evaluation_batch() as rows:
            assert rows.num_micro_batches == -(-10 // size)
            found.append(sft.evaluate(run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_the_evaluation_cover_the_same_turns(train, material, tmp_path, smoothing):
    """Of several turns only the assistant's are learned and evaluated, with label smoothing too."""
    path = write(tmp_path / "rows.jsonl", [{"messages": MESSAGES}])
    data = DataConfig(path=path, turns="all", chat_template="plain")
    policy, tokenizer = load_policy(material / "policy")
    [example] = load_examples(data, tokenizer, need="supervised", model=policy)
    assert not all(example.supervised[0])
    still = dict(max_steps=1, optim=OptimConfig(lr=1e-12))
    row = train("sft", data=data, eval_data=data, label_smoothing=smoothing, **still).metrics[0]
    whole, start = torch.tensor([example.prompt + example.completions[0]]), len(example.prompt)
    with torch.no_grad():
        rows = AutoModelForCausalLM.from_pretrained(material / "policy")(whole).logits[0].log_softmax(-1)
    own = [
        -(1 - smoothing) * rows[start + t - 1, token] - smoothing * rows[start + t - 1].mean()
        for t, token in enumerate(example.completions[0])
        if example.supervised[0][t]
    ]
    assert row["loss"] == pytest.approx(sum(own).item() / len(own), rel=1e-4)
    assert row["eval_loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert row["eval_nll"] == pytest.approx(row["nll"], rel=1e-5)
