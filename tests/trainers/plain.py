"""What a trainer does, done again by hand with plain transformers, one completion at a time; and its rewards."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_core.rollout import online
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.online import OnlineRun
from rlhf_core.rollout.rewards import Scores
from rlhf_core.training import run as run_module

# ------------------------------------------------------------------------------------- rewards, as a config names them


def vowels(prompts, completions, rows):
    """Nearly every completion scores differently."""
    return [sum(map(completion.count, "aeiou")) / 10 + completion.count("dolo") for completion in completions]


def picky(prompts, completions, rows):
    """The same, but none for a completion that holds an h."""
    return [
        None if "h" in completion else score
        for completion, score in zip(completions, vowels(prompts, completions, rows), strict=True)
    ]


def stepwise(prompts, completions, rows, completion_ids):
    """By turns a vowel count for the whole completion, none, and for each token a reward of its own, by its id."""
    whole = vowels(prompts, completions, rows)
    return [
        (whole[i], None, [(token % 7) / 10 - 0.2 for token in ids], [(token % 3) / 10 for token in ids])[i % 4]
        for i, ids in enumerate(completion_ids)
    ]


def silent(prompts, completions, rows):
    return [None] * len(prompts)


def by_prompt(prompts, completions, rows):
    """All alike where the prompt is a word or two, else as above."""
    scores = vowels(prompts, completions, rows)
    return [0.5 if len(prompt.split()) < 3 else score for prompt, score in zip(prompts, scores, strict=True)]


# ------------------------------------------------------------------------------------------------- settings of a run


def sweep(names: Iterable[str], fast: Collection[str]) -> list[Any]:
    """Return the values of a parameter, those that are not in `fast` with the mark `slow`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def grouped(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with each `kl__coef` as part of a group `kl`, whose other fields keep the job's defaults."""
    plain = {name: value for name, value in settings.items() if "__" not in name}
    for name, value in settings.items():
        group, _, field = name.partition("__")
        if field:
            before = plain.get(group, {})
            plain[group] = (before if isinstance(before, dict) else {"path": before}) | {field: value}
    return plain


# ------------------------------------------------------------------------------------------------- what a run has done


@dataclass
class Played:
    """One call of `OnlineRun.sample`: its purpose, copies of the models as they then were, and what was sampled."""

    purpose: tuple
    policy: Any
    reference: Any
    critic: Any
    rollout: Experience
    scores: Scores | None = None


def record(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Played], list[Scores]]:
    """Return lists that fill with what the runs that follow sample, and with the reward's scores of it."""
    played: list[Played] = []
    scored: list[Scores] = []
    sample, score = OnlineRun.sample, online.score_completions

    def watch_sample(self, model, rows, *purpose, **options):
        models = [copy.deepcopy(each) for each in (model, self.reference, self._models.get("critic"))]
        rollout = sample(self, model, rows, *purpose, **options)
        played.append(Played(purpose, *models, rollout))
        return rollout

    def watch_score(*args):
        played[-1].scores = score(*args)
        scored.append(played[-1].scores)
        return scored[-1]

    monkeypatch.setattr(OnlineRun, "sample", watch_sample)
    monkeypatch.setattr(online, "score_completions", watch_score)
    return played, scored


def descend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent in place of AdamW, so that weights show gradients."""
    monkeypatch.setattr(
        run_module,
        "build_optimizer",
        lambda models, config: torch.optim.SGD([p for model in models for p in model.parameters()], lr=config.lr),
    )


def token_logprobs(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (T,) of a completion's tokens, with gradient, from an ordinary forward."""
    model.set_attn_implementation("eager")
    rows = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    logprobs = rows.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def all_logprobs(model, rollout, temperature: float = 1.0) -> list[Tensor]:
    """Of each completion, without gradient."""
    with torch.no_grad():
        pairs = zip(rollout.prompts, rollout.completions, strict=True)
        return [token_logprobs(model, prompt, completion, temperature)[0] for prompt, completion in pairs]


def step_downhill(model, loss: Tensor, lr: float) -> float:
    """One step of plain gradient descent, unclipped; returns the gradient's norm."""
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
        for parameter in model.parameters():
            parameter -= lr * parameter.grad
    return norm


def largest_difference(model, folder) -> float:
    """Of any weight, between a model and one that was saved."""
    saved = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    return max((parameter - saved[name]).abs().max().item() for name, parameter in model.named_parameters())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float], correction: int = 0) -> float:
    return (sum((value - mean(values)) ** 2 for value in values) / (len(values) - correction)) ** 0.5


def expected_metrics(played: Played, scores, reference, temperature: float, *, left_out: tuple[int, ...] = ()) -> dict:
    """The metrics that all critic-free trainers have; of `left_out` rows the log-probs do not count."""
    rollout = played.rollout
    logprobs, entropies, kls = all_logprobs(played.policy, rollout, temperature), [], []
    ref_logprobs = all_logprobs(reference, rollout, temperature)
    for row, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        if row not in left_out:
            kls.append((logprobs[row] - ref_logprobs[row]).sum().item())
            entropies += token_logprobs(played.policy, prompt, completion, temperature)[1].tolist()
    lengths = [len(completion) for completion in rollout.completions]
    ended = [completion[-1] == 2 for completion in rollout.completions]
    given = [score for score, valid in zip(scores.total.tolist(), scores.valid.tolist(), strict=True) if valid]
    assert len(set(lengths)) > 1 and 0 < sum(ended) < len(ended)  # else masks would not matter
    assert abs(mean(kls)) > 0.05
    return {
        "score": mean(given),
        "score_std": spread(given),
        "kl": mean(kls),
        "length": mean(lengths),
        "eos_rate": mean(ended),
        "entropy": mean(entropies),
        "excluded": len(lengths) - len(given),
        "approx_kl": 0.0,
        "ratio_max": 1.0,
    }
