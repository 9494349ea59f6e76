"""What a trainer does, done again by hand with plain transformers, one completion at a time; and its rewards."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

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


# ------------------------------------------------------------------------------------------------- what a run has done


@dataclass
class Played:
    """One call of `act`: what it was for, the policy as it then was, and what it sampled."""

    purpose: tuple
    policy: Any
    rollout: Any


def record(monkeypatch: pytest.MonkeyPatch, module: Any) -> tuple[list[Played], list[Any]]:
    """Lists that fill with what the trainer in `module` plays, and the scores that each of it gets."""
    played: list[Played] = []
    scored: list[Any] = []
    act, score = module.act, module.score

    def watch_act(policy, tokenizer, rows, config, *purpose, **options):
        rollout = act(policy, tokenizer, rows, config, *purpose, **options)
        played.append(Played(purpose, copy.deepcopy(policy), rollout))
        return rollout

    def watch_score(*args):
        scored.append(score(*args))
        return scored[-1]

    monkeypatch.setattr(module, "act", watch_act)
    monkeypatch.setattr(module, "score", watch_score)
    return played, scored


def descend(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Plain gradient descent in place of AdamW, so that weights tell gradients."""
    monkeypatch.setattr(
        module,
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


def expected_gauges(played: Played, scores, reference, temperature: float, *, left_out: tuple[int, ...] = ()) -> dict:
    """The gauges that all critic-free trainers have; of `left_out` rows the log-probs do not count."""
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
