"""Scores of completions: from a reward model, from functions of the texts, or from a weighted sum of several."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ModelConfig, ScoringConfig
from rlhf_core.data.records import Example
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.losses.reward import ensemble_scores
from rlhf_core.models.forward import evaluating, sequence_scores
from rlhf_core.models.load import freeze, load_reward_model, same_vocabulary
from rlhf_core.plugins import import_function
from rlhf_core.rollout.checkers import Function, make_checker
from rlhf_core.rollout.experience import Experience
from rlhf_core.rollout.retokenize import retokenize, truncate_prompts
from rlhf_core.rollout.score_parsing import is_sequence, parse_score
from rlhf_core.rollout.timeouts import CallTimeout, call_within, describe_failure


class Scores(NamedTuple):
    """Scores of B completions."""

    total: Tensor  # (B,) float32 on the CPU: the weighted sum of the sources, 0 where not valid
    valid: Tensor  # (B,) bool: False where a source whose weight is not 0 returned None; to be excluded
    components: dict[str, Tensor]  # by the name of the source, (B,) float32 before its weight, NaN for None
    seconds: dict[str, float]  # by the name of the source, the time it took
    tokens: Tensor | None = None  # (B, T) float32: the part of the total that belongs to single tokens, if any

    def select(self, rows: Tensor | slice) -> Scores:
        """Return some rows, given as a slice, as a bool tensor (B,) or as numbers."""
        return self._replace(
            total=self.total[rows],
            valid=self.valid[rows],
            components={name: values[rows] for name, values in self.components.items()},
            tokens=None if self.tokens is None else self.tokens[rows],
        )


Reward = Callable[[list[list[int]], list[list[int]], list[dict[str, Any]]], Scores]
"""(prompt ids, completion ids, data rows) -> Scores."""


def configured_reward(config: ScoringConfig, policy_tokenizer: Tokenizer, *, device: str | None = None) -> Reward:
    """Return the reward that the settings describe, for completions in the policy's tokens.

    A source is named `model`, or by its function, or by its checker; in full where two would have the same name.
    """
    functions = [(spec, "reward function", import_function(spec)) for spec in config.reward_function or ()]
    functions += [(spec, "checker", make_checker(spec)) for spec in config.checker or ()]
    names = [spec.partition(":")[0 if kind == "checker" else 2] for spec, kind, _ in functions]
    taken = [*names, "model"]
    rewards: list[Reward] = []
    if (source := config.reward_model) is not None:
        end, lcb_coef = config.end_unfinished, config.reward_lcb
        rewards.append(
            load_model_reward(source, policy_tokenizer, device=device, end_unfinished=end, lcb_coef=lcb_coef)
        )
    for (spec, kind, function), short in zip(functions, names, strict=True):
        name = short if taken.count(short) == 1 else spec
        rewards.append(function_reward(function, policy_tokenizer, name=name, kind=kind, timeout=config.reward_timeout))
    return weighted_sum(rewards, config.reward_weights or [1.0] * len(rewards))


def score_completions(reward: Reward, experience: Experience, examples: Sequence[Example]) -> Scores:
    """Score every completion; the data row of each example is given with all completions of its prompt.

    Args:
        examples: one for each group of the experience, in its order.
    """
    rows = [example.record.row for example in examples for _ in range(experience.group_size)]
    return reward(experience.prompts, experience.completions, rows)


def score_metrics(scores: Scores) -> dict[str, float]:
    """Return the metrics of scores: mean and standard deviation of the valid ones, and the number of the others,
    `excluded`.

    With several sources, `reward/NAME` is the mean of each, before its weight, over the completions to which it gave a
    number. `reward_seconds` is the time that all sources took. A mean without values is NaN.
    """
    total = scores.total[scores.valid]
    sources = scores.components if len(scores.components) > 1 else {}
    return {
        "score": total.mean().item(),
        "score_std": total.std(correction=0).item() if len(total) else math.nan,
        **{f"reward/{name}": values.nanmean().item() for name, values in sources.items()},
        "excluded": int((~scores.valid).sum()),
        "reward_seconds": round(sum(scores.seconds.values()), 3),
    }


def rollout_metrics(experience: Experience, scores: Scores) -> dict[str, float]:
    """Return the metrics of a rollout: those of `score_metrics`, the mean `length` in tokens, and `eos_rate`, the
    share of completions that ended with a stop token."""
    return score_metrics(scores) | {
        "length": sum(map(len, experience.completions)) / len(experience.completions),
        "eos_rate": experience.finished.float().mean().item(),
    }


def weighted_sum(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """Return the sum of several rewards, each multiplied by its weight.

    A source whose weight is 0 is called and reported, but not added. A completion to which any other source gives None
    has no sum: it is not valid. The reward raises ValueError for a sum that is not a finite float32.
    """
    return _WeightedSum(rewards, weights)


@dataclass(frozen=True)
class _WeightedSum:
    rewards: Sequence[Reward]
    weights: Sequence[float]

    def __call__(self, prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Scores:
        parts = [reward(prompts, completions, rows) for reward in self.rewards]
        counted = [(part, weight) for part, weight in zip(parts, self.weights, strict=True) if weight]
        valid = torch.stack([part.valid for part, _ in counted]).all(0)
        total = torch.stack([weight * part.total for part, weight in counted]).sum(0)
        if not total.isfinite().all():
            i = int((~total.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward_weights={tuple(self.weights)}: the sum of sample {i} is {total[i]}, expected less"
            )
        tokens = [weight * part.tokens for part, weight in counted if part.tokens is not None]
        return Scores(
            total=torch.where(valid, total, 0.0),
            valid=valid,
            components={name: values for part in parts for name, values in part.components.items()},
            seconds={name: seconds for part in parts for name, seconds in part.seconds.items()},
            tokens=torch.where(valid[:, None], torch.stack(tokens).sum(0), 0.0) if tokens else None,
        )


# -------------------------------------------------------------------------------------------------------- reward models


def load_model_reward(
    source: ModelConfig,
    policy_tokenizer: Tokenizer,
    *,
    device: str | None = None,
    end_unfinished: bool = False,
    lcb_coef: float = 0.0,
) -> Reward:
    """Load and freeze the reward model of a config; return it as a reward for completions in the policy's tokens.

    See `model_reward`. Raises ValueError for a policy, whose score head would be new and random.
    """
    reward_model, reward_tokenizer = load_reward_model(source.path, device=device, new_head=False, **source.options())
    freeze(reward_model)
    return model_reward(
        reward_model, reward_tokenizer, policy_tokenizer, end_unfinished=end_unfinished, lcb_coef=lcb_coef
    )


def model_reward(
    reward_model: PreTrainedModel,
    reward_tokenizer: Tokenizer,
    policy_tokenizer: Tokenizer,
    *,
    batch_size: int = 64,
    end_unfinished: bool = False,
    lcb_coef: float = 0.0,
    name: str = "model",
) -> Reward:
    """Return the scores of a reward model as a reward. Token ids are passed on where both tokenizers share a
    vocabulary, otherwise the texts are tokenized again.

    The score of an ensemble is the mean of its members, less `lcb_coef` times their standard deviation. Prompts are
    truncated on the left where the model has too few positions, as in data. The reward raises ValueError for a score
    that is not finite and for a completion that alone exceeds the positions.

    Args:
        batch_size: completions in one forward.
        end_unfinished: score a truncated completion as if its EOS had followed.
        name: of the component.

    Raises:
        ValueError: for a model with several labels that is no ensemble, for an `lcb_coef` without an ensemble, and for
            `end_unfinished` without an EOS.
    """
    labels, ensemble = reward_model.config.num_labels, getattr(reward_model.config, "reward_ensemble", False)
    if labels != 1 and not ensemble:
        raise ValueError(f"{type(reward_model).__name__} has {labels} labels; a reward model has one")
    if lcb_coef and labels == 1:
        raise ValueError(f"reward_lcb={lcb_coef}: the reward model has one head, expected an ensemble, or 0")
    if end_unfinished and reward_tokenizer.eos_token_id is None:
        raise ValueError("end_unfinished=True: expected a reward model whose tokenizer has an EOS token")
    return _ModelReward(
        model=reward_model,
        tokenizer=reward_tokenizer,
        policy_tokenizer=None if same_vocabulary(reward_tokenizer, policy_tokenizer) else policy_tokenizer,
        batch_size=batch_size,
        end=reward_tokenizer.eos_token_id if end_unfinished else None,
        lcb_coef=lcb_coef,
        name=name,
    )


@dataclass(frozen=True)
class _ModelReward:
    model: PreTrainedModel
    tokenizer: Tokenizer
    policy_tokenizer: Tokenizer | None  # None: it shares its vocabulary with `tokenizer`
    batch_size: int
    end: int | None  # token that is appended to truncated completions
    lcb_coef: float
    name: str

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Scores:
        began = time.perf_counter()
        if self.policy_tokenizer is not None:
            prompts, completions = retokenize(prompts, completions, self.policy_tokenizer, self.tokenizer)
        if self.end is not None:
            ends = {*self.tokenizer.all_special_ids}
            completions = [ids if ids[-1] in ends else [*ids, self.end] for ids in completions]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None:
            prompts = truncate_prompts(prompts, completions, positions, self.tokenizer.bos_token_id)
        scores = []
        with evaluating(self.model):
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                batch = PackedBatch.pack([(p, [c]) for p, c in zip(prompts[part], completions[part], strict=True)])
                members = sequence_scores(self.model, batch).cpu()
                scores.append(members if members.ndim == 1 else ensemble_scores(members.T, lcb_coef=self.lcb_coef))
        values = torch.cat(scores)
        if not values.isfinite().all():
            i = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward model: sample {i} got {values[i].item()}, expected a finite number; "
                + _beginning(self.tokenizer.decode(completions[i]))
            )
        return _single_source(self.name, values, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------------------ functions


def function_reward(
    function: Function,
    policy_tokenizer: Tokenizer,
    *,
    name: str | None = None,
    kind: str = "reward function",
    timeout: float | None = None,
) -> Reward:
    """Return a reward that calls `function(prompts, completions, records)`: lists of texts (without special tokens)
    and of data rows.

    A function with a parameter `completion_ids` also receives the tokens of the completions under that name: lists of
    ids, an end token included.

    For each completion it returns one of these, all numbers finite:

    - a number;
    - None, to exclude the completion;
    - a list (tuple, tensor, array) of numbers, one for each of its tokens, an end token included;
    - a dictionary of numbers by character position in its text: {17: 0.5} belongs to the token that holds character
      17, and the length of the text stands for the last token.

    Where it returns several numbers for a completion, the score is their sum, and `Scores.tokens` holds them by token.
    When it raises, or does not return within `timeout` seconds, it is called again with one completion at a time, to
    find the one that causes it. The reward raises ValueError, which names function and sample, for every failure and
    for anything else that is returned.

    Args:
        name: of the component, and in messages; by default the function's own. kind: what messages call it.
    """
    return _FunctionReward(
        function=function,
        tokenizer=policy_tokenizer,
        name=name or str(getattr(function, "__name__", function)),
        kind=kind,
        timeout=timeout,
        takes_ids=_has_parameter(function, "completion_ids"),
    )


@dataclass(frozen=True)
class _FunctionReward:
    function: Function
    tokenizer: Tokenizer
    name: str
    kind: str
    timeout: float | None
    takes_ids: bool

    def __call__(self, prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Scores:
        began = time.perf_counter()
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        columns = (
            self.tokenizer.batch_decode(prompts, skip_special_tokens=True),
            texts,
            [dict(row) for row in rows],  # copies, which the function may change
            [list(ids) for ids in completions],
        )
        try:
            answer = call_within(self.timeout, self._call, *columns)
        except (Exception, CallTimeout) as error:
            fault = describe_failure(error, self._call, self.timeout, *columns, begin=[*map(_beginning, texts)])
            raise ValueError(f"{self.kind} {self.name}: {fault}") from error
        if not isinstance(answer, list) or len(answer) != len(texts):
            got = f"{len(answer)} scores" if isinstance(answer, list) else repr(answer)
            raise ValueError(f"{self.kind} {self.name}: {got} for {len(texts)} completions")
        values, tokens = [], []
        for i, (one, ids) in enumerate(zip(answer, completions, strict=True)):
            try:
                value, numbers = parse_score(one, ids, texts[i], self.tokenizer)
            except ValueError as fault:
                raise ValueError(f"{self.kind} {self.name}: sample {i} {fault}; {_beginning(texts[i])}") from None
            values.append(value)
            tokens.append(torch.zeros(len(ids)) if numbers is None else torch.tensor(numbers))
        scores = _single_source(self.name, torch.tensor(values), time.perf_counter() - began)
        by_token = any(isinstance(one, Mapping) or is_sequence(one) for one in answer)
        return scores._replace(tokens=pad_sequence(tokens, batch_first=True)) if by_token else scores

    def _call(self, prompts: list[str], texts: list[str], rows: list[dict[str, Any]], ids: list[list[int]]) -> Any:
        """Call the function; convert its answer to a list if it is a sequence of any kind."""
        keywords = {"completion_ids": ids} if self.takes_ids else {}
        answer: Any = self.function(prompts, texts, rows, **keywords)
        if isinstance(answer, Tensor):
            answer = answer.detach().cpu()
        listable = isinstance(answer, Iterable) and not isinstance(answer, str | Mapping | Set)
        has_rows = getattr(answer, "ndim", None) != 0  # a tensor or array of no dimension has none
        return list(answer) if listable and has_rows else answer


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        return False


def _single_source(name: str, values: Tensor, seconds: float) -> Scores:
    valid = ~values.isnan()
    return Scores(torch.where(valid, values, 0.0), valid, {name: values}, {name: seconds})


def _beginning(completion: str) -> str:
    return f"its completion begins {completion[:60]!r}"
