"""PPO and RLOO as they are run, weights and all, against optima that are formulas.

One prompt, and so few completions that they can be written down:

    bandit   six symbols, one place: 6 completions
    27       three symbols, three places
    15       two symbols and EOS, up to three places

The policy is a transformer of two layers in a folder, the reward a Python function of the text, and the trainers run
from their config to their saved weights as for anybody. What those weights say of each completion is then read off by
plain transformers, in float64, and compared with ref exp(r / beta) / Z.

All other tokens, among them EOS where it is none of the symbols, have a bias of -30 in the head and are never sampled.

What makes this file fail, each tried below: the sign of the scores, the sign of the KL, on both trainers.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rlhf_core.config import OptimConfig, SamplingConfig
from rlhf_core.trainers import ppo, rloo
from tests.trainers.plain import grouped

BETA = 1.0
ROWS = 2000  # of the one prompt
WORDS = ["<pad>", "<bos>", "<eos>", "go", "a", "b", "c", "d", "e", "f"]
EOS, PROMPT = WORDS.index("<eos>"), [WORDS.index("<bos>"), WORDS.index("go")]


@dataclass(frozen=True)
class World:
    """One prompt, N completions and what each is worth; `folder` holds a policy and many rows of the prompt."""

    folder: Path
    completions: list[list[int]]
    rewards: Tensor  # (N,) float64
    longest: int

    def token_logprobs(self, folder: Path, *, vocabulary: bool = False) -> Tensor:
        """(N, T) float64 of a saved policy by plain transformers, 0 after the end; or (N, T, V), of every token."""
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        padded = [completion + [0] * (self.longest - len(completion)) for completion in self.completions]
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([PROMPT + row for row in padded])).logits
        logprobs = logits[:, len(PROMPT) - 1 : -1].log_softmax(-1)
        mask = torch.tensor([[t < len(one) for t in range(self.longest)] for one in self.completions])
        if vocabulary:
            return torch.where(mask[..., None], logprobs, 0.0)
        return torch.where(mask, logprobs.gather(-1, torch.tensor(padded)[..., None]).squeeze(-1), 0.0)

    def distribution(self, folder: Path) -> Tensor:
        """(N,) probabilities of whole completions."""
        chances = self.token_logprobs(folder).sum(-1).exp()
        assert chances.sum().item() == pytest.approx(1, abs=1e-6), "there are other completions than these"
        return chances

    @property
    def reference(self) -> Tensor:
        return self.distribution(self.folder)

    @property
    def optimum(self) -> Tensor:
        """ref exp(r / beta) / Z"""
        return (self.reference.log() + self.rewards / BETA).softmax(-1)


def make_world(folder: Path, name: str, symbols: list[str], longest: int, seed: int, head: float = 0.3) -> World:
    """A random policy, the reference too, and random rewards, as a user has them: a model folder, JSONL, a module."""
    folder.mkdir()
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", PROMPT[0])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.1, bos_token_id=PROMPT[0], eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    policy = PhiForCausalLM(config)
    with torch.no_grad():
        policy.lm_head.weight.mul_(head)  # small: a mild distribution on features that tell
        policy.lm_head.bias.copy_(torch.tensor([0.0 if word in symbols else -30.0 for word in WORDS]))
    transformers_logging.disable_progress_bar()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "go"}\n' * ROWS)

    completions: list[list[int]] = []
    for places in itertools.product([WORDS.index(symbol) for symbol in symbols], repeat=longest):
        completion = list(places[: places.index(EOS) + 1] if EOS in places else places)
        if completion not in completions:
            completions.append(completion)
    rewards = torch.randn(len(completions), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    worth = {
        " ".join(WORDS[token] for token in completion if token != EOS): reward
        for completion, reward in zip(completions, rewards.tolist(), strict=True)
    }
    (folder / f"world_{name}.py").write_text(
        f"WORTH = {worth!r}\n\n\n"
        "def reward(prompts, completions, rows):\n    return [WORTH[text] for text in completions]\n\n\n"
        "def upside_down(prompts, completions, rows):\n    return [-WORTH[text] for text in completions]\n"
    )
    return World(folder, completions, rewards, longest)


SYMBOLS = {"bandit": (["a", "b", "c", "d", "e", "f"], 1), "27": (["a", "b", "c"], 3), "15": (["a", "b", "<eos>"], 3)}
SEEDS = {"bandit": 0, "27": 0, "15": 2}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Iterator[dict[str, World]]:
    folder = tmp_path_factory.mktemp("worlds")
    made = {name: make_world(folder / name, name, *how, SEEDS[name]) for name, how in SYMBOLS.items()}
    made["other"] = make_world(folder / "other", "other", *SYMBOLS["27"], seed=1, head=1.0)
    before = sys.path.copy()
    sys.path += [str(world.folder) for world in made.values()]
    yield made
    sys.path[:] = before


@dataclass(frozen=True)
class Outcome:
    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of policy and critic."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {f"{path.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


@pytest.fixture
def train(worlds, tmp_path) -> Callable[..., Outcome]:
    """train(trainer, world, **settings): run it from beginning to end."""
    number = itertools.count()

    def run(trainer: Any, name: str, *, reward: str = "reward", **changes: Any) -> Outcome:
        world, folder = worlds[name], tmp_path / f"run-{next(number)}"
        kind, settings = SETTINGS[trainer]
        settings = COMMON | settings | changes
        trainer.train(
            kind(
                model=world.folder,
                data=world.folder / "prompts.jsonl",
                output=folder,
                reward_function=f"world_{name}:{reward}",
                sampling=SamplingConfig(max_new_tokens=world.longest, batch_size=ROWS),
                **grouped(settings),
            )
        )
        return Outcome(folder)

    return run


SCHEDULE = dict(schedule="linear", warmup_ratio=0.1)
COMMON = dict(kl__coef=BETA, epochs=10_000, progress=False)
SETTINGS: dict[Any, tuple[type, dict[str, Any]]] = {
    ppo: (
        ppo.PPOConfig,
        dict(
            batch_size=256, minibatch_size=128, rollout_epochs=2, kl__target=None, max_steps=80,
            optim=OptimConfig(lr=6e-3, **SCHEDULE),
        ),
    ),
    rloo: (
        rloo.RLOOConfig,
        dict(
            batch_size=1, num_generations=256, minibatch_size=256, max_steps=120, optim=OptimConfig(lr=6e-3, **SCHEDULE)
        ),
    ),
}  # fmt: skip
TOLERANCE = {ppo: 0.02, rloo: 0.01}
trainers = pytest.mark.parametrize("trainer", SETTINGS, ids=["ppo", "rloo"])

# What it costs to leave the reference has to weigh as much in the loss as in the reward, so advantages are not scaled.
PLAIN = dict(whiten_advantages=False)
FULL = PLAIN | dict(kl__estimator="full", kl__apply_to="both")
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ppo-bandit": (ppo, "bandit", dict(minibatch_size=256, max_steps=50, optim=OptimConfig(lr=4e-3, **SCHEDULE))),
    "ppo-27": (ppo, "27", PLAIN),
    "ppo-15": (ppo, "15", {}),
    # At the optimum k1 gives every completion the same reward, the full KL does not: its noise stays,
    # which needs more samples.
    "ppo-15-full": (ppo, "15", FULL | dict(batch_size=1024, minibatch_size=512)),
    "ppo-27-full": (
        ppo, "27", FULL | dict(
            batch_size=512, minibatch_size=256, optim=OptimConfig(lr=4e-3, schedule="cosine", warmup_ratio=0.1)
        ),
    ),
    "rloo-bandit": (rloo, "bandit", dict(max_steps=80)),
    "rloo-bandit-full": (
        rloo, "bandit", dict(kl__estimator="full", max_steps=50, optim=OptimConfig(lr=4e-3, **SCHEDULE))
    ),
    "rloo-27": (rloo, "27", {}),
    "rloo-15": (rloo, "15", {}),
}  # fmt: skip


EVEN = {"rloo-bandit-full"}


def draw_evenly(monkeypatch) -> None:
    """What the samples of a prompt draw with fills the cube (Kronecker's sequence), shifted at random as a whole.

    Each sample is as random as ever, so a gradient's mean is what it was; together they are nearly of the policy's
    proportions, which leaves little of its noise. The full KL's does not vanish at the optimum, so that a distance of
    0.01 would else take a hundred thousand samples.
    """
    original = torch.rand

    def rand(*shape: int, **options: Any) -> Tensor:
        if len(shape) < 3:
            return original(*shape, **options)
        root = 1.0  # of x^(T + 1) = x + 1
        for _ in range(50):
            root = (1 + root) ** (1 / (shape[2] + 1))
        strides = torch.tensor([root ** -(t + 1) for t in range(shape[2])], dtype=torch.float64)
        samples = torch.arange(shape[0], dtype=torch.float64)[:, None, None]
        return (samples * strides + original(1, *shape[1:], **options)) % 1

    monkeypatch.setattr(torch, "rand", rand)


SLOW = {"ppo-27", "ppo-15-full", "rloo-27"}  # each a world and a KL that another case has too


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_the_optimum_is_found(worlds, train, total_variation, monkeypatch, case):
    trainer, name, changes = CASES[case]
    if case in EVEN:
        draw_evenly(monkeypatch)
    world = worlds[name]
    assert total_variation(world.reference, world.optimum) > 0.25
    assert (
        total_variation(world.distribution(train(trainer, name, **changes).folder), world.optimum) < TOLERANCE[trainer]
    )


def test_the_worlds_are_whole(worlds):
    assert [len(world.completions) for world in worlds.values()] == [6, 27, 15, 27]
    for world in worlds.values():
        assert world.reference.sum().item() == pytest.approx(1, abs=1e-9)
        assert world.reference.max() < 0.7


# ------------------------------------------------------------------------------------------------- the check can fail


def swapped_kl_penalty(monkeypatch, trainer) -> list[bool]:
    """Policy and reference exchanged in the KL penalty, so that leaving the reference is rewarded."""
    called, original = [], trainer.kl_penalty

    def swapped(scores, logprobs, ref_logprobs, *args, **options):
        called.append(True)
        return original(scores, ref_logprobs, logprobs, *args, **options)

    monkeypatch.setattr(trainer, "kl_penalty", swapped)
    return called


QUICK = dict(max_steps=25)


@trainers
def test_a_few_steps_bring_the_optimum_nearer(worlds, train, total_variation, trainer):
    """The measure of the next two tests: with nothing wrong, that many steps go the right way."""
    world = worlds["27"]
    before = total_variation(world.reference, world.optimum)
    assert total_variation(world.distribution(train(trainer, "27", **QUICK).folder), world.optimum) < 0.5 * before


@trainers
def test_scores_upside_down_are_not_forgiven(worlds, train, total_variation, trainer):
    world = worlds["27"]
    before = total_variation(world.reference, world.optimum)
    run = train(trainer, "27", reward="upside_down", **QUICK)
    assert total_variation(world.distribution(run.folder), world.optimum) > before + 0.1


@trainers
def test_a_kl_penalty_upside_down_is_not_forgiven(worlds, train, total_variation, monkeypatch, trainer):
    world = worlds["27"]
    called = swapped_kl_penalty(monkeypatch, trainer)
    end = world.distribution(train(trainer, "27", **QUICK).folder)
    assert called
    assert total_variation(end, world.optimum) > 0.3


# --------------------------------------------------------------------------------------------------------- the metrics

STILL = OptimConfig(lr=1e-12, schedule="constant")


@pytest.mark.parametrize("estimator", [dict(kl__estimator="k1"), FULL], ids=["k1", "full"])
def test_the_metrics_of_ppo_are_what_enumeration_says(worlds, train, estimator):
    """KL, entropy and score of a policy and a reference that differ, over 2000 samples, to 4 standard errors."""
    world, other, count = worlds["27"], worlds["other"], 2000
    run = train(ppo, "27", **estimator, reference=str(other.folder), batch_size=count, rollout_epochs=1, max_steps=1,
                minibatch_size=500, optim=STILL)  # fmt: skip
    everything, ref_everything = (
        world.token_logprobs(folder, vocabulary=True) for folder in (world.folder, other.folder)
    )
    logprobs, ref_logprobs = (world.token_logprobs(folder).sum(-1) for folder in (world.folder, other.folder))
    chances = logprobs.exp()
    exact = (chances * (logprobs - ref_logprobs)).sum()
    of_states = (everything.exp() * (everything - ref_everything)).sum((-1, -2))
    assert (chances * of_states).sum().item() == pytest.approx(
        exact.item()
    )  # the chain rule: the same, summed by states
    assert exact > 0.1
    samples = {
        "kl": of_states if estimator["kl__estimator"] == "full" else logprobs - ref_logprobs,
        "entropy": -(everything.exp() * everything).sum((-1, -2)) / world.longest,
        "score": world.rewards,
    }
    (row,) = run.metrics
    for name, values in samples.items():
        mean = (chances * values).sum().item()
        error = math.sqrt((chances * (values - mean) ** 2).sum().item() / count)
        assert row[name] == pytest.approx(mean, abs=4 * error), name
        assert 4 * error < 0.25 * abs(mean) or name == "score"  # a bound that means something


@pytest.mark.parametrize("kl", [{}, FULL], ids=["k1", "full"])
def test_the_first_ratio_is_one_to_the_last_bit(train, monkeypatch, kl):
    seen, original = [], ppo.policy_loss

    def watch(**options):
        loss, stats = original(**options)
        seen.append({name: value.item() for name, value in stats.items()})
        return loss, stats

    monkeypatch.setattr(ppo, "policy_loss", watch)
    train(ppo, "15", **kl, batch_size=64, minibatch_size=16, rollout_epochs=1, max_steps=3)
    assert len(seen) == 3 * 4
    for first in seen[::4]:
        assert first == {"approx_kl": 0.0, "ratio_max": 1.0, "clip_fraction": 0.0}
    assert all(stats["ratio_max"] != 1 for number, stats in enumerate(seen) if number % 4)


@pytest.mark.parametrize("kl", [{}, FULL], ids=["k1", "full"])
def test_a_step_of_ppo_does_not_depend_on_the_micro_batches(train, kl):
    """Rollout, two epochs and their updates. A large epsilon, or Adam would blow up the rounding of tiny gradients."""
    steady = OptimConfig(lr=1e-2, schedule="constant", eps=1e-3)
    runs = [
        train(ppo, "15", **kl, batch_size=24, minibatch_size=12, micro_batch_size=size, max_steps=1, optim=steady)
        for size in (None, 3, 1)
    ]
    whole, *parts = [run.weights for run in runs]
    for weights in parts:
        assert weights.keys() == whole.keys() and len(whole) > 20
        assert max((weights[name] - whole[name]).abs().max().item() for name in whole) < 1e-6
