"""From a file to the gradient of one step: our trainers against TRL 1.16's on the same rows.

Ours is the job itself, `train(config)`, in float64 as TRL's numbers are, watched in place of its optimizer's step.
Tokens are held to the id, the loss and every parameter's gradient to 2e-6 of its size. Where TRL is at fault, a test
named after the fault holds ours to what is right.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_core.config import DataConfig, OptimConfig
from rlhf_core.data.labelled import mismatched_rows
from rlhf_core.data.loader import load_examples, step_examples
from rlhf_core.data.tokenize import Example
from rlhf_core.models.load import load_tokenizer
from rlhf_core.trainers import dpo, kto, reward, sft
from rlhf_core.training import offline, reference
from rlhf_core.training import run as run_module
from tests.parity import material
from tests.parity.golden import Case, case_name, read

TOLERANCE = 2e-6
PATHS, FAULTS = read("trl_paths"), read("trl_faults")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and files, where both sides find them."""
    folder = tmp_path_factory.mktemp("paths")
    for name in ("policy", "reference", "lower_reference", "reward_model"):
        material.save(getattr(material, name)(), folder / name)
    for name in material.rows():
        material.write_rows(folder, name)
    return folder


# ----------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", PATHS.cases)
def test_loss_and_gradient(name: str, folder: Path, tmp_path: Path, monkeypatch):
    case = PATHS.cases[name]
    module, config = our_run(case.settings, folder, tmp_path)
    loss, gradient = first_step(module, config, monkeypatch)
    assert loss == pytest.approx(case.results["loss"].item(), rel=TOLERANCE)
    hold_gradient(gradient, case)


def hold_gradient(ours: Tensor, case: Case) -> None:
    """Each line is a parameter's: its gradient's norm, and products that differ by as much as the gradient does."""
    theirs = case.results["gradient"]
    assert (theirs[:, 0] > 0).all(), "a parameter without gradient proves nothing"
    assert ((ours - theirs).abs() / theirs[:, :1]).max() <= TOLERANCE


def our_run(settings: dict[str, Any], folder: Path, output: Path) -> tuple[ModuleType, Any]:
    """The trainer and the settings that are TRL's in our names."""
    settings = dict(settings)
    trainer, rows = settings.pop("trainer"), settings.pop("rows")
    turns = "all" if settings.pop("assistant_only_loss", False) else "last"
    common = dict(
        model=str(folder / ("reward_model" if trainer == "reward" else "policy")),
        data=DataConfig(path=str(folder / f"{rows}.jsonl"), turns=turns),
        output=str(output),
        batch_size=len(material.rows()[rows]),
        max_steps=1,
        seed=seed_of_the_files_order(len(material.rows()[rows])),
        progress=False,
    )
    if trainer == "sft":
        return sft, sft.SFTConfig(**common, loss=settings.pop("loss_type", "nll"), **settings)
    if trainer == "reward":
        return reward, reward.RewardConfig(
            **common, center_coef=settings.pop("center_rewards_coefficient", 0.0), **settings
        )
    common |= dict(beta=settings.pop("beta"))
    if trainer == "orpo":
        return dpo, dpo.ORPOConfig(**common, **settings)
    loss = settings.pop("loss_type")
    if trainer == "cpo":
        return dpo, our_cpo(loss, common, settings)
    if loss != ["sft"]:  # which is held to no reference, so that one is refused
        common |= dict(reference=str(folder / ("lower_reference" if trainer == "kto" else "reference")))
    common |= dict(loss=loss)
    return (
        (kto, kto.KTOConfig(**common, **settings)) if trainer == "kto" else (dpo, dpo.DPOConfig(**common, **settings))
    )


def our_cpo(loss: str, common: dict[str, Any], settings: dict[str, Any]) -> dpo.DPOConfig:
    """The job of that name, or DPO's with the losses that CPO's trainer has besides: none has a reference."""
    nll, names = settings.pop("cpo_alpha"), {"simpo_gamma": "gamma", "alpha": "reward_alpha"}
    options = tuple(f"{names[name]}:{value}" for name, value in settings.items())
    if loss == "sigmoid":
        return dpo.CPOConfig(**common, loss_options=(f"nll_coef:{nll}",))
    if loss == "simpo" and not nll:
        return dpo.SimPOConfig(**common, loss_options=options)
    if nll:
        return dpo.DPOConfig(**common, loss=(loss, "sft"), loss_weights=(1.0, nll), loss_options=options)
    return dpo.DPOConfig(**common, loss=loss, reference_free=loss in ("hinge", "ipo"), loss_options=options or None)


@cache
def seed_of_the_files_order(count: int) -> int:
    """KTO lends each row's completion to the next: the first seed whose first epoch goes through the file in order."""
    order = list(range(count))
    return next(seed for seed in itertools.count() if step_examples(order, count, seed=seed, step=1) == order)


def first_step(module: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[float, Tensor]:
    """Loss and the gradient's fingerprint in the first step of `module.train(config)`."""
    gradients = []
    with monkeypatch.context() as patch:
        models = in_float64(patch)

        def look(*_: Any) -> dict[str, float]:
            gradients.append(material.fingerprint(models[0]))
            return {}

        patch.setattr(run_module, "optimizer_step", look)
        module.train(config)
    [loss], [gradient] = losses_of(config), gradients
    return loss, gradient


def in_float64(patch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Have trainers load their models in float64. Return the list that they are added to, the trained one first."""
    models: list[nn.Module] = []

    def exact(load: Callable) -> Callable:
        def loaded(*args: Any, **options: Any) -> Any:
            model = load(*args, **options | {"dtype": "float64"})
            models.append(model[0] if isinstance(model, tuple) else model)
            return model

        return loaded

    for place, name in ((offline, "load_policy"), (reward, "load_reward_model"), (reference, "load_reference")):
        patch.setattr(place, name, exact(getattr(place, name)))
    return models


def losses_of(config: Any) -> list[float]:
    """By step, as the run has logged them."""
    return [json.loads(line)["loss"] for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ the same tokens

NEEDS = {"sft": "supervised", "kto": "unpaired"}


@pytest.mark.parametrize("files", sorted({name.rpartition(".")[0] for name in PATHS.inputs}))
def test_tokens(files: str, folder: Path):
    trainer, rows = files.split(".")
    theirs = {
        name.rpartition(".")[2]: unpadded(ids) for name, ids in PATHS.inputs.items() if name.startswith(f"{files}.")
    }
    assert our_tokens(trainer, our_examples(trainer, rows, folder)) == theirs


def unpadded(rows: Tensor) -> list[list[int]]:
    return [[token for token in row if token != -1] for row in rows.tolist()]


def our_examples(trainer: str, rows: str, folder: Path) -> list[Example]:
    data = DataConfig(path=str(folder / f"{rows}.jsonl"), turns="all" if rows == "conversations" else "last")
    return list(load_examples(data, load_tokenizer(folder / "policy"), need=NEEDS.get(trainer, "preference")))


def our_tokens(trainer: str, examples: list[Example]) -> dict[str, list[list[int]]]:
    """By the names of TRL's columns. It calls a BOS before plain text learned, which nothing predicts."""
    if trainer == "sft":
        plain = examples[0].record.prompt is None
        return {
            "ids": [row.prompt + row.completions[0] for row in examples],
            "labels": [(row.prompt if plain else [-100] * len(row.prompt)) + learned(row) for row in examples],
        }
    if trainer == "kto":
        columns = {
            "prompt": [row.prompt for row in examples],
            "completion": [row.completions[0] for row in examples],
            "KL_completion": [row.completions[0] for row in mismatched_rows(examples, examples, None)],
        }
        return columns
    columns = {"prompt": [row.prompt for row in examples]} if trainer == "dpo" else {}
    for place, side in enumerate(("chosen", "rejected")):
        own = [row.completions[place] for row in examples]
        whole = [row.prompt + row.completions[place] for row in examples]
        if trainer in ("dpo", "reward"):
            columns[side] = own if trainer == "dpo" else whole
        else:
            hidden = [[-100] * len(row.prompt) + row.completions[place] for row in examples]
            columns |= {f"{side}_input_ids": whole, f"{side}_labels": hidden}
    return columns


def learned(row: Example) -> list[int]:
    marks = row.supervised[0] if row.supervised else [True] * len(row.completions[0])
    return [token if mark else -100 for token, mark in zip(row.completions[0], marks, strict=True)]


# ------------------------------------------------------------------------------------------- where TRL is not followed


def theirs(**settings: Any) -> float:
    return FAULTS.cases[case_name(settings)].results["loss"].item()


def of_pairs(folder: Path, output: Path, **settings: Any) -> dpo.DPOConfig:
    """DPO on the pairs, all in one step, with the policy as its own reference."""
    common = dict(model=str(folder / "policy"), data=str(folder / "pairs.jsonl"), output=str(output), progress=False)
    return dpo.DPOConfig(**common | dict(batch_size=len(material.TEXT), max_steps=1, beta=0.3) | settings)


def plain_logprobs(model: nn.Module, folder: Path) -> list[list[tuple[Tensor, Tensor, int]]]:
    """[pair][side] (T, V) log-probs of what follows, the (T,) ids that do, and where the completion's begin."""
    found = []
    for row in our_examples("dpo", "pairs", folder):
        texts = [torch.tensor([row.prompt + completion]) for completion in row.completions]
        with torch.no_grad():
            found.append(
                [(model(ids).logits[0, :-1].log_softmax(-1), ids[0, 1:], len(row.prompt) - 1) for ids in texts]
            )
    return found


def log_ratios(folder: Path) -> Tensor:
    """(pairs, 2) log(policy / reference) of chosen and rejected."""
    totals = []
    for model in (material.policy(), material.reference()):
        rows = plain_logprobs(model, folder)
        totals.append([[lp.gather(-1, ids[:, None])[start:].sum() for lp, ids, start in sides] for sides in rows])
    return torch.tensor(totals[0]) - torch.tensor(totals[1])


def test_a_synced_reference_is_resumed_as_it_was(folder: Path, tmp_path: Path, monkeypatch):
    """0.5 (a). TRL's resumed run is held to the reference of the start; ours goes on as if nothing had been. Four steps
    of AdamW lie between the file and the number that both sides have without an interruption."""
    optim = OptimConfig(lr=0.01, schedule="constant")
    follows = dict(reference=dict(update="sync", every=2))
    config = of_pairs(folder, tmp_path / "whole", epochs=4, max_steps=4, save_every=3, optim=optim, **follows)
    with monkeypatch.context() as patch:
        in_float64(patch)
        dpo.train(config)
        stopped = shutil.copytree(config.output, tmp_path / "stopped")
        resumed = replace(config, output=str(stopped), resume=True)
        dpo.train(resumed)
    whole = theirs(fault="synced reference", resumed=False)
    assert losses_of(config)[3] == pytest.approx(whole, rel=1e-5)
    assert losses_of(resumed) == losses_of(config)
    assert theirs(fault="synced reference", resumed=True) < 0.1 * whole


def test_cached_logprobs_are_those_of_the_loss_that_asks(folder: Path, tmp_path: Path, monkeypatch):
    """0.5 (b). A policy that is its own reference has a loss of ln 2, whatever an earlier run has cached."""
    cached = dict(reference=dict(cache="on", cache_folder=str(tmp_path / "cache")))
    for ld_alpha in (None, 0.5):
        config = of_pairs(folder, tmp_path / f"{ld_alpha}", ld_alpha=ld_alpha, **cached)
        assert first_step(dpo, config, monkeypatch)[0] == pytest.approx(math.log(2), rel=TOLERANCE)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the second run asked the reference again"
    assert theirs(fault="cached reference", cached=False) == pytest.approx(math.log(2), rel=TOLERANCE)
    assert theirs(fault="cached reference", cached=True) > 1


def test_label_smoothing_is_honoured(folder: Path, tmp_path: Path, monkeypatch):
    """0.5 (c). -(1 - e) log sigmoid(z) - e log sigmoid(-z), which TRL's sigmoid loss has for e = 0 alone."""
    ratios = log_ratios(folder)
    z = 0.3 * (ratios[:, 0] - ratios[:, 1])
    for smoothing in (0.0, 0.3):
        right = -((1 - smoothing) * F.logsigmoid(z) + smoothing * F.logsigmoid(-z)).mean().item()
        config = of_pairs(
            folder, tmp_path / f"{smoothing}", label_smoothing=smoothing, reference=str(folder / "reference")
        )
        assert first_step(dpo, config, monkeypatch)[0] == pytest.approx(right, rel=TOLERANCE)
        assert (theirs(fault="label smoothing", label_smoothing=smoothing) == pytest.approx(right)) == (smoothing == 0)


@pytest.mark.parametrize("loss", ["hinge", "sft"])
def test_pairs_are_weighted_in_losses_where_trl_crashes(loss: str, folder: Path, tmp_path: Path, monkeypatch):
    """0.5 (d). Each pair's loss times exp of the mean over tokens of log p - log sum_v p_v^2, of both completions."""
    assert any(name.startswith(f"{loss} ") and "use_weighting" in name for name in read("trl_dpo").absent)
    weights, likelihoods, lengths = [], [], []
    for sides in plain_logprobs(material.policy(), folder):
        tokens = [lp.gather(-1, ids[:, None])[start:, 0] for lp, ids, start in sides]
        agreement = [(2 * lp).logsumexp(-1)[start:] for lp, _, start in sides]
        weights.append(math.exp(sum((one - two).mean() for one, two in zip(tokens, agreement, strict=True))))
        likelihoods.append(tokens[0].sum())
        lengths.append(len(tokens[0]))
    weights, ratios = torch.tensor(weights), log_ratios(folder)
    if loss == "hinge":
        right = (weights * (1 - 0.3 * (ratios[:, 0] - ratios[:, 1])).relu()).mean()
    else:
        right = -(weights * torch.tensor(likelihoods)).sum() / sum(lengths)
    held = dict(reference=str(folder / "reference")) if loss == "hinge" else {}
    config = of_pairs(folder, tmp_path / "run", loss=loss, use_weighting=True, **held)
    ours, gradient = first_step(dpo, config, monkeypatch)
    assert ours == pytest.approx(right.item(), rel=TOLERANCE)
    assert gradient.isfinite().all() and (gradient[:, 0] > 0).all()


def test_a_score_is_read_at_the_end_though_pad_is_end(folder: Path, tmp_path: Path, monkeypatch):
    """0.5 (e). Which token pads is nothing to the loss; TRL then reads the score at the token before the end."""
    same = material.save(material.reward_model(), tmp_path / "same", pad_token="<|end|>")
    case = PATHS.cases["trainer=reward rows=pairs"]
    _, config = our_run(case.settings, folder, tmp_path / "run")
    loss, gradient = first_step(reward, replace(config, model=str(same)), monkeypatch)
    assert loss == pytest.approx(case.results["loss"].item(), rel=TOLERANCE)
    hold_gradient(gradient, case)
    assert theirs(fault="pad is end") != pytest.approx(case.results["loss"].item(), rel=0.1)


@pytest.mark.parametrize("settings", [dict(loss="sigmoid", f_divergence="forward_kl"), dict(loss="discopop")], ids=str)
def test_far_from_the_reference_a_step_is_taken(settings: dict, folder: Path, tmp_path: Path):
    """0.5 (f). TRL's loss is no number where a ratio of probabilities is more than a float holds. Here in float32, the
    precision that people train in, and to the end of the step."""
    assert len(FAULTS.absent) == 2 and all(reason == "the loss is nan" for reason in FAULTS.absent.values())
    far = material.save(material.move_far(material.policy()), tmp_path / "far")
    config = of_pairs(folder, tmp_path / "run", model=str(far), reference=str(folder / "reference"), **settings)
    dpo.train(config)
    [line] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
    before, after = (load_file(path / "model.safetensors") for path in (far, tmp_path / "run"))
    assert all(after[name].isfinite().all() for name in after)
    assert any(not torch.equal(after[name], before[name].float()) for name in after)


def test_orpo_learns_the_completion_and_not_the_prompt(folder: Path, tmp_path: Path, monkeypatch):
    """TRL's likelihood, like its authors', is of prompt and completion; ours, as in all of SFT, of the completion."""
    tokens, starts, odds = [], [], []
    for sides in plain_logprobs(material.policy(), folder):
        tokens.append(sides[0][0].gather(-1, sides[0][1][:, None])[:, 0])
        starts.append(sides[0][2])
        means = [lp.gather(-1, ids[:, None])[start:].mean() for lp, ids, start in sides]
        chosen, rejected = (mean - torch.log1p(-mean.exp()) for mean in means)
        odds.append(-0.3 * F.logsigmoid(chosen - rejected))
    completions = torch.cat([row[start:] for row, start in zip(tokens, starts, strict=True)])
    common = dict(model=str(folder / "policy"), data=str(folder / "pairs.jsonl"), output=str(tmp_path / "run"))
    config = dpo.ORPOConfig(**common, batch_size=len(material.TEXT), max_steps=1, beta=0.3, progress=False)
    right = (torch.stack(odds).mean() - completions.mean()).item()
    assert first_step(dpo, config, monkeypatch)[0] == pytest.approx(right, rel=TOLERANCE)
    with_prompts = (torch.stack(odds).mean() - torch.cat(tokens).mean()).item()
    assert theirs(fault="prompt is learned") == pytest.approx(with_prompts, rel=TOLERANCE)


def test_a_prompt_that_ends_in_a_space_keeps_it(folder: Path):
    """The policy is trained on what it will be asked. TRL tokenises prompt and completion as one text, in which the
    space may be the completion's first word's: then the prompt loses it."""
    encode = load_tokenizer(folder / "policy")
    ids = unpadded(FAULTS.inputs["bridged.ids"])
    labels = unpadded(FAULTS.inputs["bridged.labels"])
    lost = 0
    for row, whole, learnt in zip(our_examples("sft", "bridged", folder), ids, labels, strict=True):
        asked = encode(row.record.prompt)["input_ids"]
        assert row.prompt == asked
        lost += whole[: learnt.count(-100)] == asked[:-1]
    assert lost > 0, "TRL keeps it too: the two can be held to the same tokens"


def test_holding_tells_a_wrong_gradient():
    """One entry of one parameter, off by 1e-5 of that parameter's norm, is refused; off by 1e-7, it is not."""
    model = material.policy()
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        parameter.grad = material.hashed(parameter.numel(), number).view_as(parameter)
    case = Case({}, {"gradient": material.fingerprint(model)})
    for _, parameter in model.named_parameters():
        right, norm = parameter.grad.clone(), parameter.grad.norm()
        for error in (1e-7, 1e-5):
            parameter.grad = right.clone()
            parameter.grad.flatten()[-1] += error * norm
            with contextlib.nullcontext() if error == 1e-7 else pytest.raises(AssertionError):
                hold_gradient(material.fingerprint(model), case)
        parameter.grad = right
