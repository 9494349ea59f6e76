"""Roles from folders and back: what is loaded is what was there, and what is saved is what plain transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from rlhf_core.batch import PackedBatch
from rlhf_core.models.forward import route_of, sequence_scores, token_logprobs, token_values
from rlhf_core.models.load import (
    check_vocabulary,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    save_model,
)


def load_any(load, folder, **options):
    """The model alone, whichever loader it is."""
    loaded = load(folder, device="cpu", **options)
    return loaded[0] if isinstance(loaded, tuple) else loaded


every_loader = pytest.mark.parametrize("load", [load_policy, load_reference, load_reward_model, load_value_model])


# ------------------------------------------------------------------------------------------------------- what is loaded


@every_loader
def test_never_silently_half(make_folder, load):
    folder = make_folder(dtype=torch.bfloat16)
    model = load_any(load, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    saved = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert saved.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, saved.float())


@every_loader
def test_every_loader_prepares_the_model(make_folder, load):
    folder = make_folder()
    assert route_of(load_any(load, folder)).layout == "packed"
    assert route_of(load_any(load, folder, layout="padded")).layout == "padded"
    with pytest.raises(ValueError, match="layout='packed': expected auto or padded"):
        load_any(load, make_folder("gemma2"), layout="packed")


@every_loader
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_dtype_that_was_asked_for(make_folder, load, dtype):
    model = load_any(load, make_folder(), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@every_loader
def test_an_unknown_dtype(make_folder, load):
    with pytest.raises(ValueError, match="dtype='half': expected one of float32, bfloat16, float16, float64"):
        load_any(load, make_folder(), dtype="half")


@every_loader
@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no-where", "some/where/else", Path("nowhere")])
def test_a_missing_folder_is_named_and_nobody_is_asked_over_the_net(load, path):
    with pytest.raises(FileNotFoundError, match=f"no model folder at {path}"):
        load(path)


def test_a_folder_in_the_home_directory(make_folder, monkeypatch):
    folder = make_folder()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_policy(f"~/{folder.name}")[0].config.vocab_size == 61


def test_a_policy_is_the_models_own_class_ready_to_train(make_folder):
    folder = make_folder()
    policy, tokenizer = load_policy(folder, device="cpu")
    assert type(policy).__name__ == "LlamaForCausalLM"
    assert policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]


@every_loader
def test_activation_checkpointing_on_request(make_folder, load):
    folder = make_folder()
    assert not load_any(load, folder).model.layers[0].gradient_checkpointing
    assert load_any(load, folder, gradient_checkpointing=True).model.layers[0].gradient_checkpointing


def test_a_reference_is_frozen(make_folder):
    reference = load_reference(make_folder())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not any(module.training for module in reference.modules())


def test_a_reference_with_another_vocabulary_is_refused(make_folder, make_tokenizer):
    folder = make_folder()
    load_reference(folder, policy_tokenizer=load_tokenizer(folder))
    with pytest.raises(ValueError, match=f"{folder}: its vocabulary is not the policy's"):
        load_reference(folder, policy_tokenizer=make_tokenizer(unk_token=0, bos_token=3, eos_token=2))


@every_loader
def test_weights_that_cannot_be_read_are_said_with_their_folder(make_folder, load):
    folder = make_folder()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(OSError, match=f"{folder}: its weights cannot be read"):
        load(folder)


@every_loader
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", dict(attn_pdrop=0.5, resid_pdrop=0.4, embd_pdrop=0.3)),
        ("llama", dict(attention_dropout=0.5)),
    ],
)
def test_no_unit_is_dropped_and_the_config_says_what_it_said(make_folder, tmp_path, load, family, settings):
    model = load_any(load, make_folder(family, **settings)).train()
    ids = torch.arange(3, 40)[None]
    trained, evaluated = model.base_model(ids), model.base_model.eval()(ids)
    assert torch.equal(trained.last_hidden_state, evaluated.last_hidden_state)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in settings} == settings


def test_a_tokenizer_of_other_weights(make_folder, make_tokenizer):
    folder = make_folder(tokenizer=make_tokenizer(size=70, eos_token=2))
    for load in (load_policy, load_reward_model):
        with pytest.raises(ValueError, match="largest id is 69 but the model has 61 embedding rows"):
            load(folder)


def test_more_rows_than_words_are_nothing_to_mend(make_folder, make_tokenizer):
    """Embeddings are padded to round numbers; they stay so, also where a pad token is added."""
    folder = make_folder(tokenizer=make_tokenizer(size=20, unk_token=2, eos_token=2))
    policy, tokenizer = load_policy(folder)
    check_vocabulary(tokenizer, policy, folder)
    model, tokenizer = load_reward_model(folder)
    assert tokenizer.pad_token_id == 20
    assert policy.get_input_embeddings().num_embeddings == model.get_input_embeddings().num_embeddings == 61


def test_code_that_comes_with_a_model_is_announced(make_folder, caplog):
    folder = make_folder()
    load_tokenizer(folder)
    assert caplog.text == ""
    load_tokenizer(folder, trust_remote_code=True)
    assert f"running code that comes with {folder}" in caplog.text


# ---------------------------------------------------------------------------------------------- reward and value models


def assert_same_trunk(model, folder):
    saved = load_file(folder / "model.safetensors")
    trunk = {name: value for name, value in model.state_dict().items() if not name.startswith("score")}
    assert len(trunk) > 10
    for name, value in trunk.items():
        assert torch.equal(value, saved[name]), name


def test_a_reward_model_from_a_policy(make_folder):
    """A new head from N(0, 1 / (hidden + 1)), by the seed it is given and by nothing else."""
    folder = make_folder(hidden_size=512, num_attention_heads=4, head_dim=8)
    model, _ = load_reward_model(folder)
    weight = model.score.weight.detach()
    assert weight.shape == (1, 512)
    # The standard deviation of 512 normal numbers is within 12 % of the truth but once in ten thousand draws.
    assert weight.std().item() == pytest.approx(513**-0.5, rel=0.12)
    assert abs(weight.mean().item()) < 4 * (513 * 512) ** -0.5
    assert model.score.bias is None
    assert_same_trunk(model, folder)
    torch.manual_seed(99)
    assert torch.equal(load_reward_model(folder, seed=0)[0].score.weight, weight)
    assert not torch.equal(load_reward_model(folder, seed=1)[0].score.weight, weight)
    assert model.training
    assert model.config.num_labels == 1


@pytest.fixture
def reward_folder(make_folder, tmp_path) -> Path:
    """A reward model as another program would have saved it."""
    folder = tmp_path / "reward"
    source = make_folder()
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [load_reward_model, load_value_model])
def test_an_existing_head_is_kept(reward_folder, load):
    model = load_any(load, reward_folder)
    assert torch.equal(model.score.weight, load_file(reward_folder / "model.safetensors")["score.weight"])
    assert_same_trunk(model, reward_folder)


def test_a_value_model_from_a_policy_begins_at_zero(make_folder):
    folder = make_folder()
    model = load_value_model(folder)
    assert_same_trunk(model, folder)
    assert token_values(model, PackedBatch.pack([([5, 6], [[7, 8, 2]])])).tolist() == [[0.0, 0.0, 0.0]]


def test_a_classifier_of_three_labels_is_no_reward_model(make_folder, tmp_path):
    source = make_folder()
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    for load in (load_reward_model, load_value_model):
        with pytest.raises(ValueError, match="a classifier with 3 labels; a reward model has one"):
            load(tmp_path)


def test_a_classifier_without_a_score_head(make_tokenizer, tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertForSequenceClassification(BertConfig(vocab_size=61, num_labels=1, **sizes)).save_pretrained(tmp_path)
    make_tokenizer(unk_token=0, eos_token=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no linear `score` head"):
        load_reward_model(tmp_path)


# -------------------------------------------------------------------------------------------------------------- padding

# Special tokens of a tokenizer, ends by the generation config, and the pad id that a reward model must get.
PAD_CASES = {
    "a pad token of its own": (dict(unk_token=0, eos_token=2, pad_token=3), None, 3),
    "no pad token": (dict(unk_token=0, eos_token=2), None, 0),
    "no pad token and unk is eos": (dict(unk_token=2, eos_token=2, bos_token=2), None, 61),
    "no pad token and no unk": (dict(eos_token=2), None, 61),
    "pad is eos": (dict(unk_token=0, eos_token=2, pad_token=2), None, 0),
    "pad and unk are eos": (dict(unk_token=2, eos_token=2, pad_token=2), None, 61),
    "bos is eos": (dict(unk_token=0, bos_token=1, eos_token=1, pad_token=0), [1, 2], 0),
    "pad is another end": (dict(unk_token=0, eos_token=2, pad_token=3), [2, 3], 0),
    "pad and unk are other ends": (dict(unk_token=4, eos_token=2, pad_token=3), [2, 3, 4], 61),
}


@pytest.mark.parametrize("case", PAD_CASES)
def test_the_pad_token_of_a_reward_model_ends_no_completion(make_folder, make_tokenizer, case):
    special, ends, pad = PAD_CASES[case]
    folder = make_folder(tokenizer=make_tokenizer(padding_side="left", **special), ends=ends)
    model, tokenizer = load_reward_model(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id == pad
    assert model.get_input_embeddings().num_embeddings == max(61, pad + 1)
    assert tokenizer.eos_token_id == special["eos_token"]
    assert tokenizer.padding_side == "right"
    policy, tokenizer = load_policy(folder)  # a policy's is its own affair
    assert tokenizer.pad_token_id == special.get("pad_token")
    assert policy.get_input_embeddings().num_embeddings == 61


def test_an_end_that_only_the_config_names(make_folder, make_tokenizer):
    folder = make_folder(tokenizer=make_tokenizer(unk_token=0, eos_token=2, pad_token=3), eos_token_id=[2, 3])
    (folder / "generation_config.json").unlink()
    assert load_reward_model(folder)[1].pad_token_id == 0


# ----------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize(("family", "settings"), [("gpt2", {}), ("llama", dict(tie_word_embeddings=True))])
def test_tied_weights_stay_tied(make_folder, tmp_path, family, settings):
    policy, tokenizer = load_policy(make_folder(family, **settings))
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(1.5)
    save_model(tmp_path, policy, tokenizer)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name]
    again, _ = load_policy(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert again.state_dict().keys() == policy.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, policy.state_dict()[name]), name


def test_generation_config_and_ends_are_saved_with_a_policy(make_folder, tmp_path):
    policy, tokenizer = load_policy(make_folder(ends=[2, 5]))
    save_model(tmp_path, policy, tokenizer)
    assert load_policy(tmp_path)[0].generation_config.eos_token_id == [2, 5]


PLAIN_PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
results = {}
with torch.no_grad():
    for name, (kind, folder, texts) in json.load(open(sys.argv[1])).items():
        auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
        model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        if kind == "policy":
            ids = [tokenizer(text)["input_ids"] for text in texts]
            results[name] = [model(torch.tensor([row])).logits[0].log_softmax(-1).tolist() for row in ids]
        else:
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            results[name] = model(**batch).logits.squeeze(-1).tolist()
assert not [module for module in sys.modules if module.startswith("rlhf")]
print(json.dumps(results))
"""


def in_plain_transformers(jobs: dict, folder: Path) -> dict:
    """What a process of its own, which never imports rlhf_core, gets from saved folders."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_PROGRAM, folder / "jobs.json"],
        capture_output=True, text=True, timeout=200, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def as_if_trained(model) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.eval()


def split_anywhere(tokenizer, texts: list[str]) -> PackedBatch:
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return PackedBatch.pack([(row[:1], [row[1:]]) for row in rows])


def spell(tokenizer, rows: list[list[int]]) -> list[str]:
    return [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in rows]


REAL = {  # texts of different lengths, some of them ended
    "stories260K": ["Once upon a time", "Lily and Tom saw a big dog. They", "One day the cat ran away<s>", "The"],
    "tiny_random_gpt2": ["lower newer", "wider", "low er lowest n", "new<|endoftext|>"],
}


@pytest.mark.real
@torch.no_grad()
def test_plain_transformers_gets_the_same_numbers(make_folder, make_tokenizer, shared, tmp_path):
    """Policies token by token; reward models on padded batches of texts, which end with every kind of end."""
    jobs, truths = {}, {}

    def job(name: str, load, source: Path, texts) -> None:
        model, tokenizer = load(source)
        as_if_trained(model)
        texts = texts(tokenizer) if callable(texts) else texts
        batch = split_anywhere(tokenizer, texts)
        is_policy = load is load_policy
        truths[name] = (token_logprobs if is_policy else sequence_scores)(model, batch), batch.completion_ids()
        save_model(tmp_path / name, model, tokenizer)
        jobs[name] = ("policy" if is_policy else "reward", str(tmp_path / name), texts)

    for name, texts in REAL.items():
        job(f"{name} policy", load_policy, shared / "models" / name, texts)
        job(f"{name} reward", load_reward_model, shared / "models" / name, texts)
    for number, (case, (special, ends, _)) in enumerate(PAD_CASES.items()):
        family = "gpt2" if number % 3 else "llama"  # positions of a GPT-2 shift where rows are padded on the left
        tokenizer = make_tokenizer(padding_side="left", **special)
        source = make_folder(family, tokenizer=tokenizer, ends=ends)
        rows = [[5, 6, 7, 8, 9], [5, 9], [11, 12, 13, 14, 15, 16, 17]]
        rows += [[8, 7, end, end] for end in {special["eos_token"], *(ends or [])}]
        job(f"{family}, {case}", load_reward_model, source, lambda tokenizer, rows=rows: spell(tokenizer, rows))

    results = in_plain_transformers(jobs, tmp_path)
    assert results.keys() == truths.keys()
    for name, (values, targets) in truths.items():
        if jobs[name][0] == "reward":
            torch.testing.assert_close(torch.tensor(results[name]), values, rtol=1e-5, atol=1e-5, msg=name)
            continue
        for row, table, ids in zip(values, results[name], targets, strict=True):
            truth = torch.tensor(table)[:-1].gather(-1, ids[: len(table) - 1, None]).squeeze(-1)
            torch.testing.assert_close(row[: len(truth)], truth, rtol=1e-5, atol=1e-5, msg=name)
