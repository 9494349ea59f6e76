"""The runs of equality.py: every job in many settings, each for three or four steps of a trained model of 260,032
parameters, with the rows and the small models that they need.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from rlhf_core.trainers import reward, sft

SHARED = Path(os.environ.get("RLHF_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "real"
STORIES = str(SHARED / "models" / "stories260K")

Row = dict[str, Any]
Cases = dict[str, "Case"]


@dataclass(frozen=True)
class Case:
    """A job and its settings. `stops`: steps after which the run is interrupted, to be resumed each time."""

    job: str
    settings: dict[str, Any]
    stops: tuple[int, ...] = ()

    def but(self, *, stops: tuple[int, ...] = (), **changes: Any) -> Case:
        """Return the case with other settings; a group of settings is replaced as a whole."""
        return replace(self, settings=self.settings | changes, stops=stops)


def all_cases(folder: Path) -> Cases:
    """Return all cases by name. `folder` is where `write_data` and `make_models` put their files."""
    groups = (sft_cases, dpo_cases, kto_cases, reward_cases, ppo_cases, grpo_cases, rloo_cases, reinforce_cases)
    groups += (online_dpo_cases, raft_cases, rrhf_cases)
    return {name: case for group in groups for name, case in group(folder).items()}


# ---------------------------------------------------------------------------------------------- the cases

COMMON = dict(model=STORIES, seed=3, device="cpu", progress=False, optim=dict(lr=1e-3))


def rows_in(folder: Path, name: str) -> str:
    return str(folder / f"{name}.jsonl")


def sft_cases(folder: Path) -> Cases:
    weighted, moe = rows_in(folder, "sft_weighted"), str(folder / "moe")
    sft = Case("sft", COMMON | dict(data=rows_in(folder, "sft"), batch_size=8, max_steps=4, epochs=3))
    evaluated = sft.but(eval_data=rows_in(folder, "sft_eval"), eval_every=2)
    return {
        "sft": sft,
        "sft-micro-eval-best": evaluated.but(micro_batch_size=3, keep_best="eval_nll"),
        "sft-lora": sft.but(lora=dict(r=4), micro_batch_size=4),
        "sft-neftune-dft": evaluated.but(data=weighted, neftune_alpha=5.0, loss="dft", micro_batch_tokens=200),
        "sft-smooth": evaluated.but(data=weighted, label_smoothing=0.1, micro_batch_size=5),
        "sft-max-tokens": sft.but(max_tokens_per_batch=300, save_every=2),
        "sft-resume": evaluated.but(micro_batch_size=3, lora=dict(r=4, dropout=0.1), stops=(1, 3)),
        "sft-moe": evaluated.but(model=moe, router_aux_coef=0.1, micro_batch_size=3),
    }


def dpo_cases(folder: Path) -> Cases:
    pairs, weighted, moe = rows_in(folder, "pairs"), rows_in(folder, "pairs_weighted"), str(folder / "moe")
    settings = COMMON | dict(data=pairs, batch_size=7, max_steps=4, epochs=3, reference=dict(cache="off"))
    dpo = Case("dpo", settings)
    evaluated = dpo.but(eval_data=rows_in(folder, "pairs_eval"), eval_every=2)
    mix = dict(loss="sigmoid,bco_pair,sft", loss_weights=[0.8, 0.2, 1.0])
    ema, sync = dict(cache="off", update="ema", rate=0.3), dict(cache="off", update="sync", every=2)
    own_loss = dict(loss="tempered", loss_module="equality_rewards", loss_options=["tau:0.25"])
    return {
        "dpo": evaluated,
        "dpo-micro-cache": evaluated.but(reference=dict(cache="auto"), max_steps=None, epochs=1.5, micro_batch_size=3),
        "dpo-mix": evaluated.but(**mix, micro_batch_size=3),
        "dpo-mix-resume": dpo.but(**mix, stops=(2,)),
        "dpo-aot-micro": evaluated.but(loss="aot", micro_batch_size=3),
        "dpo-aot-mix-micro": evaluated.but(loss="aot_unpaired,sft", micro_batch_size=2),
        "dpo-beta-micro": evaluated.but(loss="beta_dpo", micro_batch_size=3),
        "dpo-beta-resume": dpo.but(loss="beta_dpo", micro_batch_size=3, stops=(1, 2)),
        "dpo-tdpo": evaluated.but(loss="tdpo2", micro_batch_size=4),
        "dpo-wpo": evaluated.but(use_weighting=True, micro_batch_size=4),
        "dpo-weights-odpo": dpo.but(data=weighted, loss="odpo", micro_batch_size=3),
        "dpo-weights": dpo.but(data=weighted, loss="sigmoid,sft", micro_batch_size=3),
        "dpo-lora": evaluated.but(lora=dict(r=4), micro_batch_size=4),
        "dpo-ema": dpo.but(reference=ema, micro_batch_size=4),
        "dpo-sync-resume": evaluated.but(reference=sync, stops=(1, 3)),
        "dpo-js-smooth": dpo.but(f_divergence="js", label_smoothing=0.1),
        "dpo-ld-beta": dpo.but(ld_alpha=0.3, loss="beta_dpo"),
        "dpo-free": dpo.but(reference_free=True, micro_batch_tokens=300),
        "dpo-own-loss": dpo.but(**own_loss),
        "dpo-moe": evaluated.but(model=moe, router_aux_coef=0.1, micro_batch_size=3),
        "dpo-padded": evaluated.but(model=dict(path=STORIES, layout="padded"), micro_batch_size=3),
        "ipo": Case("ipo", dpo.settings),
        "orpo": Case("orpo", evaluated.settings),
        "simpo": Case("simpo", dpo.settings).but(micro_batch_size=3),
        "cpo": Case("cpo", dpo.settings),
    }


def kto_cases(folder: Path) -> Cases:
    pairs, pairs_eval, moe = rows_in(folder, "pairs"), rows_in(folder, "pairs_eval"), str(folder / "moe")
    settings = COMMON | dict(batch_size=6, max_steps=4, reference=dict(cache="off"))
    labelled = Case("kto", settings | dict(data=rows_in(folder, "unpaired")))
    kto = Case("kto", settings | dict(data=pairs, pairs=True))
    cached = kto.but(eval_data=pairs_eval, reference=dict(cache="on"))
    return {
        "kto": kto.but(micro_batch_size=4, eval_data=pairs_eval, eval_every=2),
        "kto-bco": kto.but(loss="bco", stops=(2,)),
        "kto-rows": labelled.but(desirable_weight=1.3, undesirable_weight=0.7, micro_batch_tokens=200),
        "kto-apo": kto.but(loss="apo_zero_unpaired", micro_batch_size=2),
        "kto-cache": cached.but(micro_batch_size=3),
        "kto-bco-cache": cached.but(loss="bco"),
        "kto-ema": kto.but(reference=dict(cache="off", update="ema", rate=0.3), stops=(2,)),
        "kto-lora-moe": kto.but(model=moe, router_aux_coef=0.1, micro_batch_size=3),
    }


def reward_cases(folder: Path) -> Cases:
    process, rankings = rows_in(folder, "process"), rows_in(folder, "rankings")
    settings = COMMON | dict(data=rows_in(folder, "pairs_weighted"), batch_size=8, max_steps=4, epochs=3)
    reward = Case("reward", settings | dict(eval_data=rows_in(folder, "pairs_eval")))
    steps = reward.but(data=process, eval_data=process, learn_from="steps")
    best = dict(keep_best="eval_accuracy", eval_every=2)
    return {
        "reward": reward.but(micro_batch_size=3, center_coef=0.01, eval_every=2),
        "reward-ensemble": reward.but(ensemble=3, label_smoothing=0.1, stops=(2,)),
        "reward-lora": reward.but(lora=dict(r=4), micro_batch_size=5, **best),
        "reward-rankings": reward.but(data=rankings, learn_from="rankings", micro_batch_size=3),
        "reward-steps": steps.but(micro_batch_size=3, stops=(2,)),
    }


SAMPLING = dict(max_new_tokens=12)
VOWELS, SOME_NONE, BY_TOKEN = ("equality_rewards:" + name for name in ("vowels", "some_none", "by_token"))


def on_policy(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return the settings that all jobs that sample share, and more of them."""
    return COMMON | dict(data=rows_in(folder, "prompts"), max_steps=3, sampling=SAMPLING) | settings


def ppo_cases(folder: Path) -> Cases:
    kl = dict(horizon=40)
    sizes = dict(batch_size=8, minibatch_size=4, rollout_epochs=2)
    ppo = Case("ppo", on_policy(folder, **sizes, reward_function=VOWELS, kl=kl))
    evaluation = dict(eval_data=rows_in(folder, "prompts_eval"), eval_every=2)
    small = ppo.but(micro_batch_size=3)
    slow = ppo.but(optim=dict(lr=2e-4))
    truncated = slow.but(model=str(folder / "talker"), sampling=dict(max_new_tokens=8))
    truncated_micro = truncated.but(micro_batch_size=3)
    texts = rows_in(folder, "sft")
    return {
        "ppo": ppo.but(**evaluation),
        "ppo-micro": small.but(minibatch_size=5, **evaluation),
        "ppo-policy": small.but(value=dict(model="policy")),
        "ppo-reward": ppo.but(
            reward_function=None, reward_model=str(folder / "reward_model"), value=dict(model="reward"),
            whiten_rewards=True, **evaluation,
        ),
        "ppo-klloss": ppo.but(kl=kl | dict(apply_to="loss", estimator="k2"), micro_batch_size=2),
        "ppo-klloss-k1": ppo.but(kl=kl | dict(apply_to="loss", estimator="k1"), whiten_advantages=True),
        "ppo-full": small.but(kl=kl | dict(estimator="full")),
        "ppo-full-both": small.but(kl=kl | dict(estimator="full", apply_to="both"), value=dict(warmup=1)),
        "ppo-ptx": small.but(ptx_data=texts, ptx_coef=0.5),
        "ppo-scores": ppo.but(score=dict(center=8, scale="normalize", clip=0.8)),
        "ppo-scores-resume": ppo.but(score=dict(center=8, scale="scale"), **evaluation, stops=(1, 2)),
        "ppo-eos-subtract": truncated_micro.but(score=dict(missing_eos="subtract")),
        "ppo-eos-replace": truncated_micro.but(score=dict(missing_eos="replace")),
        "ppo-eos-mask": truncated_micro.but(score=dict(missing_eos="mask")),
        "ppo-eos-bootstrap": truncated_micro.but(score=dict(missing_eos="bootstrap")),
        "ppo-eos-bootstrap-policy": truncated.but(score=dict(missing_eos="bootstrap"), value=dict(model="policy")),
        "ppo-stop": slow.but(kl=kl | dict(stop=3e-3), rollout_epochs=4, micro_batch_size=2, stops=(2,)),
        "ppo-limit": slow.but(ratio_limit=1.12, ptx_data=texts, ptx_coef=0.2, micro_batch_size=2),
        "ppo-entropy": ppo.but(entropy_coef=0.01),
        "ppo-detach": ppo.but(value=dict(detach=True, clip=None)),
        "ppo-linear": ppo.but(kl=kl | dict(control="linear", coef_end=0.2), stops=(2,)),
        "ppo-fixed-ema": ppo.but(
            kl=kl | dict(control="fixed"), reference=dict(update="ema", rate=0.5), stops=(1,)
        ),
        "ppo-recorded": ppo.but(recorded="on"),
        "ppo-importance": small.but(importance="sequence"),
        "ppo-none": ppo.but(reward_function=SOME_NONE),
        "ppo-tokens": ppo.but(reward_function=BY_TOKEN, score=dict(scale="scale"), recorded="auto", stops=(1,)),
        "ppo-lora": small.but(lora=dict(r=4)),
        "ppo-temp": ppo.but(sampling=dict(max_new_tokens=10, temperature=0.7), gamma=0.9, lam=0.8),
        "ppo-padded": ppo.but(model=dict(path=STORIES, layout="padded")),
    }  # fmt: skip


def grpo_cases(folder: Path) -> Cases:
    kl = dict(coef=0.04)
    sizes = dict(batch_size=4, num_generations=4, minibatch_size=8)
    grpo = Case("grpo", on_policy(folder, **sizes, reward_function=VOWELS, kl=kl))  # two updates a rollout
    single = grpo.but(minibatch_size=16)  # one update a rollout
    evaluation = dict(eval_data=rows_in(folder, "prompts_eval"), eval_every=2)
    coarse, constant = "equality_rewards:coarse", "equality_rewards:constant"
    return {
        "grpo": single.but(**evaluation),
        "grpo-micro-epochs": grpo.but(micro_batch_size=6, rollout_epochs=2, **evaluation),
        "grpo-dapo": single.but(
            loss="dapo", reward_function=coarse, dynamic_sampling=2, micro_batch_size=4, score=dict(overlong_buffer=4)
        ),
        "grpo-dynamic-epochs": grpo.but(
            reward_function=coarse, dynamic_sampling=0, rollout_epochs=2, micro_batch_size=4
        ),
        "grpo-flat": single.but(reward_function=constant, dynamic_sampling=1),
        "grpo-dr": grpo.but(loss="dr_grpo", kl=dict(coef=0.0, measure=True)),
        "grpo-gspo": grpo.but(loss="gspo", micro_batch_size=4),
        "grpo-bnpo": single.but(loss="bnpo", micro_batch_size=5),
        "grpo-cispo": grpo.but(loss="cispo", loss_options=["ratio_max:3.0"]),
        "grpo-klratio": grpo.but(kl=kl | dict(estimator="k1", ratio=True), loss_options=["dual_clip:3.0"]),
        "grpo-none": grpo.but(
            reward_function=SOME_NONE, score=dict(missing_eos="subtract", missing_eos_penalty=1.0), rollout_epochs=2
        ),
        "grpo-truncated": grpo.but(
            model=str(folder / "talker"), sampling=dict(max_new_tokens=10), score=dict(missing_eos="mask"),
            micro_batch_size=4,
        ),
        "grpo-recorded": grpo.but(recorded="on"),
        "grpo-importance": grpo.but(importance="token"),
        "grpo-lora": grpo.but(lora=dict(r=4)),
        "grpo-resume": grpo.but(recorded="auto", **evaluation, stops=(1, 2)),
        "grpo-rm": single.but(reward_model=str(folder / "reward_model"), reward_weights=[1.0, 0.1]),
        "grpo-vespo": grpo.but(loss="vespo"),
        "grpo-luspo": grpo.but(loss="luspo", micro_batch_size=4),
        "grpo-sapo": grpo.but(loss="sapo", loss_options=["temperature_neg:1.1"], micro_batch_size=4),
        "grpo-batch-scale": grpo.but(scale="batch", kl=kl | dict(estimator="k3"), micro_batch_size=4),
    }  # fmt: skip


def rloo_cases(folder: Path) -> Cases:
    sizes = dict(batch_size=4, num_generations=4, minibatch_size=8)
    rloo = Case("rloo", on_policy(folder, **sizes, reward_function=VOWELS))
    penalty = dict(missing_eos="subtract", missing_eos_penalty=0.5)
    return {
        "rloo": rloo.but(eval_data=rows_in(folder, "prompts_eval"), eval_every=2),
        "rloo-full": rloo.but(kl=dict(estimator="full"), micro_batch_size=4),
        "rloo-epochs": rloo.but(rollout_epochs=2, recorded="auto", micro_batch_size=6, stops=(1,)),
        "rloo-none": rloo.but(reward_function=SOME_NONE, score=penalty, importance="sequence"),
    }


def reinforce_cases(folder: Path) -> Cases:
    reinforce = Case("reinforce", on_policy(folder, batch_size=8, minibatch_size=8, reward_function=VOWELS))
    penalty = dict(missing_eos="subtract", missing_eos_penalty=0.5)
    return {
        "reinforce": reinforce.but(eval_data=rows_in(folder, "prompts_eval"), eval_every=2),
        "reinforce-remax": reinforce.but(baseline="remax", score=penalty, micro_batch_size=3),
        "reinforce-global": reinforce.but(
            baseline="global", minibatch_size=4, rollout_epochs=2, recorded="auto", gamma=0.9, stops=(1,)
        ),
        "reinforce-noclip": reinforce.but(
            reward_function=SOME_NONE, baseline="none", clip=None, num_generations=2, rollout_epochs=2
        ),
        "reinforce-tokens": reinforce.but(
            reward_function=BY_TOKEN, baseline="none", importance="token", micro_batch_size=3
        ),
    }


def online_dpo_cases(folder: Path) -> Cases:
    settings = on_policy(folder, batch_size=6, minibatch_size=4)
    online = Case("online-dpo", settings | dict(reward_function=VOWELS))
    judged = Case("online-dpo", settings | dict(judge="equality_rewards:prefers_short"))
    evaluation = dict(eval_data=rows_in(folder, "prompts_eval"), eval_every=2)
    penalty = dict(missing_eos="subtract", missing_eos_penalty=0.3)
    return {
        "online-dpo": online.but(micro_batch_size=2, rollout_epochs=2, **evaluation),
        "online-xpo": online.but(xpo_alpha=0.1),
        "online-best": online.but(reward_function=SOME_NONE, num_generations=4, loss="ipo", score=penalty, stops=(1,)),
        "online-judge": judged.but(label_smoothing=0.1, **evaluation),
        "online-judge-xpo": judged.but(xpo_alpha=0.2, micro_batch_size=2),
        "online-aot": online.but(loss="aot", num_generations=3),
    }


def raft_cases(folder: Path) -> Cases:
    sizes = dict(batch_size=6, num_generations=4, minibatch_size=4)
    raft = Case("raft", on_policy(folder, **sizes, reward_function=VOWELS, kl=dict(measure=True)))
    penalty = dict(missing_eos="subtract", missing_eos_penalty=1.0)
    return {
        "raft": raft.but(eval_data=rows_in(folder, "prompts_eval"), eval_every=2),
        "raft-all": raft.but(keep="all", min_score=3.0, kl=dict(coef=0.05), micro_batch_size=3, stops=(1,)),
        "raft-none-epochs": raft.but(reward_function=SOME_NONE, score=penalty, rollout_epochs=2, micro_batch_size=1),
        "raft-one": raft.but(num_generations=1, keep="all", min_score=3.5),
    }


def rrhf_cases(folder: Path) -> Cases:
    sizes = dict(batch_size=6, num_generations=4, minibatch_size=4)
    rrhf = Case("rrhf", on_policy(folder, **sizes, reward_function=VOWELS))
    penalty = dict(missing_eos="subtract", missing_eos_penalty=0.5)
    return {
        "rrhf": rrhf.but(eval_data=rows_in(folder, "prompts_eval"), eval_every=2),
        "rrhf-pl": rrhf.but(loss="plackett_luce", micro_batch_size=2, rollout_epochs=2),
        "rrhf-none": rrhf.but(
            reward_function=SOME_NONE, score=penalty, loss_options=["nll_coef:0.5"], micro_batch_size=1, stops=(1,)
        ),
    }


# ---------------------------------------------------------------------------------------------- their rows and models


def write_data(folder: Path) -> None:
    """Write the rows of all cases, taken from the shared data, as JSONL files."""
    pairs = [pair_of(row) for row in shared_rows("pref_rasbt_train", 40)]
    pairs_eval = [pair_of(row) for row in shared_rows("pref_rasbt_test", 10)]
    weights = [dict(weight=0.5 + i % 3, margin=i % 4 / 2) for i in range(len(pairs))]
    texts = [dict(prompt=row["prompt"], completion=row["chosen"]) for row in pairs]
    files: dict[str, Iterable[Row]] = {
        "pairs": pairs,
        "pairs_eval": pairs_eval,
        "pairs_weighted": [pair | more for pair, more in zip(pairs, weights, strict=True)],
        "sft": texts,
        "sft_eval": [dict(prompt=row["prompt"], completion=row["chosen"]) for row in pairs_eval],
        "sft_weighted": [row | dict(weight=(0.5, 1.0, 2.0)[i % 3]) for i, row in enumerate(texts)],
        "unpaired": [labelled_row(row, i, j) for i, row in enumerate(pairs) for j in (0, 1)],
        "rankings": [ranking_of(row, 2 + i % 2) for i, row in enumerate(pairs)],
        "process": [
            dict(prompt=row["prompt"], completions=[row["chosen"], row["rejected"]], labels=[True, i % 2 == 0])
            for i, row in enumerate(pairs)
        ],
        "prompts": [dict(prompt=prompt) for prompt in story_prompts("train", 24)],
        "prompts_eval": [dict(prompt=prompt) for prompt in story_prompts("test", 6)],
    }
    for name, rows in files.items():
        write_rows(folder, name, rows)


def make_models(folder: Path, names: set[str]) -> None:
    """Make those of the small models `reward_model`, `talker` and `moe` that `names` names."""
    for name, make in (("reward_model", make_reward_model), ("talker", make_talker), ("moe", make_moe)):
        if name in names:
            make(folder)


def make_reward_model(folder: Path) -> None:
    """Train a reward model for five steps."""
    reward.train(
        reward.RewardConfig(
            model=STORIES, data=rows_in(folder, "pairs"), output=str(folder / "reward_model"), batch_size=8,
            max_steps=5, optim=dict(lr=1e-3), device="cpu", progress=False,
        )
    )  # fmt: skip


def make_talker(folder: Path) -> None:
    """Train a policy to end its stories soon: some of its completions end, and others are truncated."""
    endings = [" The end.", " So he went home and was happy.", " She ran."] * 8
    prompts = story_prompts("train", len(endings))
    rows = [dict(prompt=prompt, completion=text) for prompt, text in zip(prompts, endings, strict=True)]
    write_rows(folder, "short", rows)
    sft.train(
        sft.SFTConfig(
            model=STORIES, data=rows_in(folder, "short"), output=str(folder / "talker"), batch_size=8, epochs=12,
            optim=dict(lr=3e-3), device="cpu", progress=False,
        )
    )  # fmt: skip


def make_moe(folder: Path) -> None:
    """Make a small mixture of experts with random weights, for the losses of its routers."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "moe")
    tokenizer.save_pretrained(folder / "moe")


def shared_rows(name: str, count: int) -> list[Row]:
    with gzip.open(SHARED / "data" / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def write_rows(folder: Path, name: str, rows: Iterable[Row]) -> None:
    Path(rows_in(folder, name)).write_text("".join(json.dumps(row) + "\n" for row in rows))


def story_prompts(split: str, count: int) -> list[str]:
    return [row["prompt"][:80] for row in shared_rows(f"prompts_tinystories_{split}", count)]


def pair_of(row: Row) -> Row:
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def labelled_row(pair: Row, number: int, side: int) -> Row:
    """Return one side of a pair as a row with a label: 0 is the chosen one."""
    completion = pair["rejected" if side else "chosen"]
    weight = (0.5, 1.0, 1.5)[(number + side) % 3]
    return dict(prompt=pair["prompt"], completion=completion, label=side == 0, weight=weight)


def ranking_of(pair: Row, length: int) -> Row:
    """Return a list of two or three completions; the third is the rejected one, reversed."""
    completions = [pair["chosen"], pair["rejected"], pair["rejected"][::-1]]
    return dict(prompt=pair["prompt"], completions=completions[:length], ranks=[1, 2, 3][:length])
