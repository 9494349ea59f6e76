"""Scoring: numbers for each completion, from a reward model, from functions of the texts, or from a sum of several."""

from __future__ import annotations

import inspect
import logging
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_core.batch import PackedBatch
from rlhf_core.config import ModelConfig, ScoringConfig
from rlhf_core.data.sources import DataError
from rlhf_core.losses.reward import ensemble_scores
from rlhf_core.models.forward import Layout, sequence_scores
from rlhf_core.models.load import freeze, load_reward_model, same_vocabulary
from rlhf_core.plugins import import_function
from rlhf_core.rollout.checkers import Function, make_checker
from rlhf_core.rollout.sampling import evaluating

logger = logging.getLogger("rlhf_core.rollout")


class Scores(NamedTuple):
    """What the sources of reward say of B completions."""

    total: Tensor  # (B,) float32 on the CPU: the weighted sum of the sources, 0 where not valid
    valid: Tensor  # (B,) bool: False where a source whose weight is not 0 gave None; the sample is to be left out
    components: dict[str, Tensor]  # by the source's name, (B,) float32 before its weight, NaN where it gave None
    seconds: dict[str, float]  # by the source's name, how long it took
    tokens: Tensor | None = None  # (B, T) float32: the part of the total that belongs to single tokens; None is none

    def keep(self, rows: Tensor | slice) -> Scores:
        """Those of some rows: a slice, a bool (B,) or numbers."""
        return self._replace(
            total=self.total[rows],
            valid=self.valid[rows],
            components={name: values[rows] for name, values in self.components.items()},
            tokens=None if self.tokens is None else self.tokens[rows],
        )


Reward = Callable[[list[list[int]], list[list[int]], list[dict[str, Any]]], Scores]
"""(prompt ids, completion ids, data rows) -> Scores."""


def configured_reward(config: ScoringConfig, policy_tokenizer: Any, *, device: str | None = None) -> Reward:
    """The reward that the settings describe, for completions in the policy's tokens.

    A source is named `model`, as its function, or as its checker; in full where two would have the same name.
    """
    functions = [(spec, "reward function", import_function(spec)) for spec in config.reward_function or ()]
    functions += [(spec, "checker", make_checker(spec)) for spec in config.checker or ()]
    names = [spec.partition(":")[0 if kind == "checker" else 2] for spec, kind, _ in functions]
    taken = [*names, "model"]
    rewards = []
    if config.reward_model is not None:
        options = dict(device=device, end_unfinished=config.end_unfinished, lcb_coef=config.reward_lcb)
        rewards.append(load_model_reward(config.reward_model, policy_tokenizer, **options))
    for (spec, kind, function), name in zip(functions, names, strict=True):
        options = dict(name=name if taken.count(name) == 1 else spec, kind=kind, timeout=config.reward_timeout)
        rewards.append(function_reward(function, policy_tokenizer, **options))
    return weighted_sum(rewards, config.reward_weights or [1.0] * len(rewards))


def weighted_sum(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """The sum of several rewards, each multiplied by its weight. One whose weight is 0 is only measured.

    A completion to which any other of them gives None has no sum: it is not valid.
    """

    def score(prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Scores:
        parts = [reward(prompts, completions, rows) for reward in rewards]
        counted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
        valid = torch.stack([part.valid for part, _ in counted]).all(0)
        total = torch.stack([weight * part.total for part, weight in counted]).sum(0)
        if not total.isfinite().all():
            i = int((~total.isfinite()).nonzero()[0])
            raise ValueError(f"reward_weights={tuple(weights)}: the sum of sample {i} is {total[i]}, expected less")
        paid = [weight * part.tokens for part, weight in counted if part.tokens is not None]
        return Scores(
            total=torch.where(valid, total, 0.0),
            valid=valid,
            components={name: values for part in parts for name, values in part.components.items()},
            seconds={name: seconds for part in parts for name, seconds in part.seconds.items()},
            tokens=torch.where(valid[:, None], torch.stack(paid).sum(0), 0.0) if paid else None,
        )

    return score


# -------------------------------------------------------------------------------------------------------- reward models


def model_reward(
    reward_model: nn.Module,
    reward_tokenizer: Any,
    policy_tokenizer: Any,
    *,
    batch_size: int = 64,
    layout: Layout = "auto",
    end_unfinished: bool = False,
    lcb_coef: float = 0.0,
    name: str = "model",
) -> Reward:
    """Scores of a reward model. Token ids are passed as they are where both share a vocabulary, else the texts.

    An ensemble's score is the mean of its members, less `lcb_coef` times their standard deviation.

    With `end_unfinished` a completion that was cut off is scored as if its end token had followed. A prompt loses its
    left where the model has no positions for all of it, as in data. The reward raises ValueError for a score that is
    not finite and for a completion that alone is too long.
    """
    translate = not same_vocabulary(reward_tokenizer, policy_tokenizer)
    labels, ensemble = reward_model.config.num_labels, getattr(reward_model.config, "reward_ensemble", False)
    if labels != 1 and not ensemble:
        raise ValueError(f"{type(reward_model).__name__} has {labels} labels; a reward model has one")
    if lcb_coef and labels == 1:
        raise ValueError(f"reward_lcb={lcb_coef}: the reward model has one head, expected an ensemble, or 0")
    positions = getattr(reward_model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def score(prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Scores:
        began = time.perf_counter()
        if translate:
            prompts, completions = _translate(prompts, completions, policy_tokenizer, reward_tokenizer)
        if end_unfinished:
            ends, end = {*reward_tokenizer.all_special_ids}, [reward_tokenizer.eos_token_id]
            completions = [ids if ids[-1] in ends else ids + end for ids in completions]
        if positions is not None:
            prompts = _fit(prompts, completions, positions, reward_tokenizer.bos_token_id)
        scores = []
        with evaluating(reward_model):
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                batch = PackedBatch.pack([(p, [c]) for p, c in zip(prompts[part], completions[part], strict=True)])
                members = sequence_scores(reward_model, batch, layout=layout).cpu()
                scores.append(members if labels == 1 else ensemble_scores(members.T, lcb_coef=lcb_coef))
        values = torch.cat(scores)
        if not values.isfinite().all():
            i = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward model: sample {i} got {values[i].item()}, expected a finite number; "
                + _begin(reward_tokenizer.decode(completions[i]))
            )
        return _of_one_source(name, values, time.perf_counter() - began)

    return score


def _fit(prompts: list[list[int]], completions: list[list[int]], positions: int, start: int | None) -> list[list[int]]:
    """The prompts, cut on the left, but for a BOS, where they do not fit before their completions."""
    rooms = [positions - len(completion) for completion in completions]
    for i, room in enumerate(rooms):
        if room < 1:
            raise ValueError(
                f"reward model: sample {i} has a completion of {len(completions[i])} tokens, "
                f"expected at most {positions - 1}, because the model's max_position_embeddings={positions}"
            )
    cut = sum(len(prompt) > room for prompt, room in zip(prompts, rooms, strict=True))
    if cut:
        logger.warning("reward model: %d of %d prompts lose their left; %d positions", cut, len(prompts), positions)
    fitted = []
    for prompt, room in zip(prompts, rooms, strict=True):
        head = prompt[:1] if prompt[:1] == [start] and 1 < room < len(prompt) else []
        fitted.append(head + prompt[max(len(prompt) - room + len(head), 0) :])
    return fitted


def load_model_reward(
    source: ModelConfig, policy_tokenizer: Any, *, device: str | None = None, **options: Any
) -> Reward:
    """The frozen reward model of a config, as a reward for completions in the policy's tokens (see `model_reward`).

    Raises ValueError for a policy, whose score head would be new and random.
    """
    reward_model, reward_tokenizer = load_reward_model(source.path, device=device, new_head=False, **source.options())
    return model_reward(freeze(reward_model), reward_tokenizer, policy_tokenizer, layout=source.layout, **options)


# ------------------------------------------------------------------------------------------------------------ functions


def function_reward(
    function: Function,
    policy_tokenizer: Any,
    *,
    name: str | None = None,
    kind: str = "reward function",
    timeout: float | None = None,
) -> Reward:
    """Scores of `function(prompts, completions, records)`: lists of texts (without special tokens) and of data rows.

    A function with a parameter `completion_ids` is also given the completions' tokens, by that name: lists of ids, an
    end token included.

    It returns for each completion one of these, all numbers finite:

    - a number;
    - None, for one that is to be left out;
    - a list (tuple, tensor, array) of numbers, one for each of its tokens, an end token included;
    - a dictionary of numbers by their places in its text: {17: 0.5} belongs to the token that holds character 17, and
      the length of the text stands for the last token.

    Where it gave more than one number for a completion its score is their sum, and `Scores.tokens` says where they
    belong. When it raises, or is not done after `timeout` seconds, it is called once more with one sample after the
    other, to name the one to blame.

    Args:
        name: of the component, and in messages; the function's own if not given. kind: what to call it there.

    The reward raises ValueError that names function and sample for all that is no score.
    """
    name = name or getattr(function, "__name__", str(function))
    with_ids = _has_parameter(function, "completion_ids")

    def answer_to(prompts: list[str], completions: list[str], rows: list[dict[str, Any]], ids: list[list[int]]) -> Any:
        """As a list if it is a sequence of any kind."""
        answer = function(prompts, completions, rows, **({"completion_ids": ids} if with_ids else {}))
        if isinstance(answer, Tensor):
            answer = answer.detach().cpu()
        listable = isinstance(answer, Iterable) and not isinstance(answer, str | Mapping | Set)
        return list(answer) if listable and getattr(answer, "ndim", 1) else answer

    def score(prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Scores:
        began = time.perf_counter()
        prompts = policy_tokenizer.batch_decode(prompts, skip_special_tokens=True)
        texts = policy_tokenizer.batch_decode(completions, skip_special_tokens=True)
        # What a function does to a row or to ids, it does to a copy.
        columns = prompts, texts, [dict(row) for row in rows], [list(ids) for ids in completions]
        try:
            answer = call_within(timeout, answer_to, *columns)
        except (Exception, TimeIsUp) as error:
            fault = blame(error, answer_to, timeout, *columns, begin=lambda i: _begin(texts[i]))
            raise ValueError(f"{kind} {name}: {fault}") from error
        if not isinstance(answer, list) or len(answer) != len(texts):
            got = f"{len(answer)} scores" if isinstance(answer, list) else repr(answer)
            raise ValueError(f"{kind} {name}: {got} for {len(texts)} completions")
        values, tokens = [], []
        for i, one in enumerate(answer):
            try:
                value, own = _read_score(one, completions[i], texts[i], policy_tokenizer)
            except ValueError as fault:
                raise ValueError(f"{kind} {name}: sample {i} {fault}; {_begin(texts[i])}") from None
            values.append(value)
            tokens.append(torch.zeros(len(completions[i])) if own is None else torch.tensor(own))
        scores = _of_one_source(name, torch.tensor(values), time.perf_counter() - began)
        several = any(isinstance(one, Mapping) or _is_sequence(one) for one in answer)
        return scores._replace(tokens=pad_sequence(tokens, batch_first=True)) if several else scores

    return score


def _has_parameter(function: Function, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C do not say
        return False


def _read_score(answer: Any, ids: list[int], text: str, tokenizer: Any) -> tuple[float, list[float] | None]:
    """One completion's score, NaN for none, and what of it belongs to each token, if anything does.

    Raises ValueError: "got ..., expected ...".
    """
    if answer is None:
        return math.nan, None
    if isinstance(answer, Mapping):
        return _read_places(answer, ids, text, tokenizer)
    if not _is_sequence(answer):
        number = _number(answer)
        if number is None:
            raise ValueError(f"got {answer!r}, expected a finite number, or None to leave it out")
        return number, None
    numbers = [_number(one) for one in answer]
    if len(numbers) != len(ids):
        raise ValueError(f"got {len(numbers)} numbers, expected one for each of its {len(ids)} tokens")
    if None in numbers:
        t = numbers.index(None)
        raise ValueError(f"got {answer[t]!r} for token {t}, expected a finite number")
    return _sum(numbers), numbers


def _read_places(answer: Mapping, ids: list[int], text: str, tokenizer: Any) -> tuple[float, list[float]]:
    """The same for numbers by their places in the text."""
    numbers, shown = [0.0] * len(ids), []
    for place, value in answer.items():
        number = _number(value)
        if number is None:
            raise ValueError(f"got {value!r} for character {place!r}, expected a finite number")
        if not isinstance(place, Integral) or isinstance(place, bool) or not 0 <= place <= len(text):
            raise ValueError(f"got a number for character {place!r}, expected one from 0 to {len(text)}")
        # The first token after which the text has that character. A part of one may be decoded to several others.
        token = len(ids) - 1
        if place < len(text):
            shown = shown or tokenizer.batch_decode([ids[: k + 1] for k in range(len(ids))], skip_special_tokens=True)
            wanted = text[: place + 1]
            token = next((k for k, so_far in enumerate(shown) if so_far.startswith(wanted)), token)
        numbers[token] += number
    return _sum(numbers), numbers


def _is_sequence(answer: Any) -> bool:
    """Whether a completion got a list of numbers; a tensor or an array of one number alone is that number."""
    if isinstance(answer, Tensor | np.ndarray):
        return answer.ndim == 1 and len(answer) != 1
    return isinstance(answer, list | tuple)


def _sum(numbers: list[float]) -> float:
    total = _number(math.fsum(numbers))
    if total is None:
        raise ValueError(f"got numbers whose sum is {math.fsum(numbers)}, expected a finite one")
    return total


def _number(value: Any) -> float | None:
    """A score as a float, None if it is not a number or not a finite float32."""
    single = isinstance(value, Real | np.bool_) or (isinstance(value, Tensor) and value.numel() == 1)
    try:
        number = float(value) if single else math.nan
    except (OverflowError, RuntimeError):  # an integer too large, a complex tensor
        return None
    return number if abs(number) <= torch.finfo(torch.float32).max else None


def _of_one_source(name: str, values: Tensor, seconds: float) -> Scores:
    valid = ~values.isnan()
    return Scores(torch.where(valid, values, 0.0), valid, {name: values}, {name: seconds})


def _begin(completion: str) -> str:
    return f"its completion begins {completion[:60]!r}"


def blame(
    error: BaseException,
    function: Callable[..., Any],
    timeout: float | None,
    *columns: list,
    begin: Callable[[int], str],
    what: str = "sample",
) -> str:
    """What went wrong in `function(*columns)`, and with which sample: each row of the columns is given to the function
    alone, until one fails or time is up.

    Args:
        begin: a sample's number -> how to recognise it. what: to call a sample, `sample` or `pair`.
    """
    row = 0

    def one_by_one() -> None:
        nonlocal row
        for values in zip(*columns, strict=True):
            function(*([value] for value in values))
            row += 1

    def trouble(error: BaseException) -> str:
        if isinstance(error, TimeIsUp):
            return f"no answer within reward_timeout={timeout:g} seconds"
        if isinstance(error, DataError):
            return str(error)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"

    try:
        call_within(timeout, one_by_one)
    except (Exception, TimeIsUp) as again:
        return f"{what} {row}: {trouble(again)}; {begin(row)}"
    return (
        f"{trouble(error)} for {len(columns[0])} {what}s together, though each alone is answered; "
        f"the first of them: {begin(0)}"
    )


# ------------------------------------------------------------------------------------------------------------- patience


class TimeIsUp(BaseException):
    """A call took too long. No Exception, so that a function that catches those does not catch its own end."""


def call_within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, or TimeIsUp after so many seconds; None waits for ever.

    In the main thread an alarm interrupts the call, which also ends what holds the interpreter, as a regular expression
    that tries for ever does. Elsewhere (another thread, Windows) the call goes into a thread of its own, which is left
    behind when its time is up.
    """
    if seconds is None:
        return function(*arguments)
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _with_alarm(seconds, function, *arguments)
    return _in_a_thread(seconds, function, *arguments)


def _with_alarm(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    over = False

    def ring(number: int, frame: Any) -> None:
        if not over:
            raise TimeIsUp

    handler = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # 0 would be never
    try:
        try:
            return function(*arguments)
        finally:
            over = True
    finally:  # someone else's alarm goes on as if nothing had been
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), 1e-6), interval)


def _in_a_thread(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    outcome: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            outcome.append((True, function(*arguments)))
        except BaseException as error:  # raised again where it is waited for
            outcome.append((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeIsUp
    done, answer = outcome[0]
    if not done:
        raise answer
    return answer


# --------------------------------------------------------------------------------------------------- other vocabularies


def _translate(
    prompts: list[list[int]], completions: list[list[int]], source: Any, target: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Texts of one tokenizer as ids of another, prompt and completion apart, the end marked where it was reached."""
    start = target.eos_token_id if target.bos_token_id is None else target.bos_token_id
    special = {token for token, added in source.added_tokens_decoder.items() if added.special}
    special |= {*source.all_special_ids}
    new_prompts, new_completions = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        # Decoded together, then cut: many tokenizers drop the space in front of a text that is decoded alone.
        before, whole = source.batch_decode([prompt, prompt + completion], skip_special_tokens=True)
        text = whole[len(before) :] if whole.startswith(before) else source.decode(completion, skip_special_tokens=True)
        ids = target(text, add_special_tokens=False)["input_ids"]
        ended = not ids or completion[-1] in special
        new_prompts.append(target(before)["input_ids"] or [start])
        new_completions.append(ids + [target.eos_token_id] if ended else ids)
    return new_prompts, new_completions
