"""`rlhf score`: what a reward model says of completions that are there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlhf_core.config import DataConfig, ModelConfig, Settings, require
from rlhf_core.data.chat import load_chat_template
from rlhf_core.data.formats import Completion, DataError, named_format, recognise
from rlhf_core.data.loader import load_examples, pack_rows
from rlhf_core.data.sources import BadRow, formatted, read_rows
from rlhf_core.data.tokenize import Example, encode_records, stop_ids
from rlhf_core.evaluation.reward_accuracy import pair_gauges, pair_table, ranked_pairs, step_gauges, step_table
from rlhf_core.models.forward import Layout, sequence_scores, token_scores
from rlhf_core.models.load import freeze, load_reward_model


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Settings):
    """Score completions with a reward model: single ones, pairs, lists, or answers in steps. The mean and spread are
    printed, and where rows say what is better also how often the model agrees."""

    model: ModelConfig
    """The reward model, one head or an ensemble of them, or a process reward model."""
    data: DataConfig
    """Rows with completions."""
    output: str | None = None
    """A JSONL file to write each row to, its scores beside it."""
    name: str = "score"
    """Name of the new column; of pairs it has chosen_ and rejected_ before it, of lists an s after it."""
    combine: Literal["product", "min", "last"] = "product"
    """How a process reward model's probabilities that each step is right make one score of an answer: that all are, the
    least of them, or the last."""
    batch_size: int = 16
    """Rows that go through the model at once."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.name.strip()), "name", self.name, "the name of a column")
        require(self.batch_size > 0, "batch_size", self.batch_size, "more than 0")


class Scored(NamedTuple):
    """What the model says of one row's K completions."""

    example: Example
    scores: Tensor  # (K,)
    spread: Tensor | None = None  # (K,) standard deviation over an ensemble's members
    steps: tuple[Tensor, ...] | None = None  # of a process reward model: for each completion, (S,) logits of its steps


@torch.no_grad()
def score(config: ScoreConfig) -> dict[str, float]:
    """Write the scored rows, print the numbers, and return them."""
    options = dict(device=config.device, new_head=False, **config.model.options())
    model, tokenizer = load_reward_model(config.model.path, **options)
    freeze(model)
    need = need_of(config.data)
    examples = load_examples(config.data, tokenizer, need=need, model=model)
    check_columns(examples[0].record.row, need, config)
    scored = []
    with ExitStack() as stack:
        file = None
        if config.output is not None:
            Path(config.output).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(config.output, "w", encoding="utf-8"))
        bar = stack.enter_context(tqdm(total=len(examples), desc="score", unit=" rows", disable=None, leave=False))
        for start in range(0, len(examples), config.batch_size):
            rows = examples[start : start + config.batch_size]
            if is_process(model):
                part = list(score_steps(model, tokenizer, rows, config))
            else:
                part = list(score_whole(model, rows, layout=config.model.layout))
            for one in part:
                if file is not None:
                    file.write(json.dumps(row_of(one, need, config), ensure_ascii=False) + "\n")
            scored += part
            bar.update(len(rows))
    if not scored:
        raise DataError(f"{config.data.path}: no row is left to score")
    numbers, table = summary(scored, need)
    width = max(map(len, numbers))
    print("\n".join(f"{name:<{width}}  {value:.4g}" for name, value in numbers.items()))
    if table:
        print(f"\n{table}")
    if config.output is not None:
        print(f"score: {len(scored)} rows in {config.output}", file=sys.stderr)
    return numbers


# ------------------------------------------------------------------------------------------------------------- the data


def need_of(data: DataConfig) -> str:
    """What the rows are by their columns, in the words of `load_examples`. Raises DataError for prompts alone."""
    for path in data.paths():
        rows = read_rows(path, data.split)
        for source, row in formatted(rows, data.formatting) if data.formatting else rows:
            if row is None or isinstance(row, BadRow):
                continue
            name = data.format
            need = (named_format(name) if name else recognise(row, need="supervised", source=source)).need
            if need == "prompts":
                raise DataError(
                    f"{source}: found columns {list(row)}: prompts without completions; expected a column completion, "
                    "columns chosen and rejected, or a list of completions"
                )
            return need
    return "supervised"  # nothing to be read: that is said by who reads it


def is_process(model: nn.Module) -> bool:
    """Whether a reward model scores steps."""
    return "TokenClassification" in type(model).__name__


def in_steps(completion: Completion, separator: str) -> tuple[str, ...]:
    """The steps of an answer: what ends with the separator, and the rest. A blank piece belongs to the step before."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    pieces = [piece + separator for piece in text.split(separator)]
    pieces[-1] = pieces[-1].removesuffix(separator)
    steps = pieces[:1]
    for piece in pieces[1:]:
        if piece.strip() and steps[-1].strip():
            steps.append(piece)
        else:
            steps[-1] += piece
    return tuple(steps)


def each_in_steps(rows: Sequence[Example], model: Any, tokenizer: Any, data: DataConfig) -> list[Example]:
    """An example in steps for every completion of the rows, tokenised step by step as a process reward model has seen
    it in training. Raises DataError where one does not fit."""
    records = [
        replace(row.record, completions=(completion,), steps=steps, step_labels=(False,) * len(steps))
        for row in rows
        for completion in row.record.completions
        for steps in [in_steps(completion, data.step_separator)]
    ]
    options = dict(
        stop_ids=stop_ids(tokenizer, getattr(model, "generation_config", None)),
        max_length=data.max_length or getattr(model.config, "max_position_embeddings", None),
        chat_template=load_chat_template(data.chat_template) if data.chat_template else None,
    )
    examples = encode_records(records, tokenizer, **options)
    if len(examples) != len(records):
        raise DataError(f"{records[0].source} and after: cut into steps, a completion leaves no room for its prompt")
    return examples


# ---------------------------------------------------------------------------------------------------------- the scores


def score_whole(model: nn.Module, rows: Sequence[Example], *, layout: Layout = "auto") -> Iterator[Scored]:
    """Each row's completions by a reward model: the score, or an ensemble's mean and standard deviation."""
    batch = pack_rows([replace(row, supervised=None) for row in rows])
    members = checked(sequence_scores(model, batch, layout=layout).float().cpu(), rows)
    members = members.view(len(members), -1)
    counts = [len(row.completions) for row in rows]
    for row, own in zip(rows, members.split(counts), strict=True):
        yield Scored(row, own.mean(1), own.std(1, correction=0) if own.shape[1] > 1 else None)


def score_steps(model: nn.Module, tokenizer: Any, rows: Sequence[Example], config: ScoreConfig) -> Iterator[Scored]:
    """Each row's completions by a process reward model, their steps one by one and together."""
    data = config.data
    marked = rows if rows[0].step_ends is not None else each_in_steps(rows, model, tokenizer, data)
    logits = token_scores(model, pack_rows(marked), layout=config.model.layout).float().cpu()
    of_each = iter([own[list(example.step_ends)] for own, example in zip(logits, marked, strict=True)])
    for row in rows:
        steps = tuple(checked(next(of_each), [row]) for _ in row.completions)
        yield Scored(row, torch.stack([combined(own, config.combine) for own in steps]), steps=steps)


def combined(logits: Tensor, how: str) -> Tensor:
    """One score, a probability, from the (S,) logits of an answer's steps (Lightman et al. 2023, arXiv:2305.20050)."""
    if how == "product":
        return torch.nn.functional.logsigmoid(logits).sum().exp()
    return (logits.min() if how == "min" else logits[-1]).sigmoid()


def checked(scores: Tensor, rows: Sequence[Example]) -> Tensor:
    if not scores.isfinite().all():
        place = rows[0].record.source if len(rows) == 1 else f"{rows[0].record.source} to {rows[-1].record.source}"
        raise ValueError(f"{place}: the reward model gives a score that is not finite")
    return scores


# ----------------------------------------------------------------------------------------------------------- the result


def columns_of(need: str, name: str, *, process: bool) -> list[str]:
    """The names of a row's new columns that hold scores, without those of their spread."""
    if need == "preference":
        return [f"chosen_{name}", f"rejected_{name}"]
    if need == "ranking":
        return [f"{name}s"]
    return [name, f"step_{name}s"] if process else [name]


def check_columns(row: dict[str, Any], need: str, config: ScoreConfig) -> None:
    """DataError where a row has a column of that name already; a list's own order is written anew."""
    for column in columns_of(need, config.name, process=False) if need != "ranking" else []:
        if column in row:
            raise DataError(f"the rows have a column {column!r} already; --name gives the new one another name")


def row_of(scored: Scored, need: str, config: ScoreConfig) -> dict[str, Any]:
    """The row as it was read, and its scores. Of a list the completions stand as they were ranked, and the scores with
    them are all that is said of their order: training on rankings can take it as it is."""
    record, name = scored.example.record, config.name
    row, scores = dict(record.row), plain(scored.scores)
    spread = None if scored.spread is None else plain(scored.spread)
    steps = None if scored.steps is None else [plain(own.sigmoid()) for own in scored.steps]
    if need == "ranking":
        for column in ("responses", "completions", "ranks", "scores"):
            row.pop(column, None)
        row |= {"completions": list(record.completions), f"{name}s": scores}
        row |= ({f"{name}s_std": spread} if spread else {}) | ({f"step_{name}s": steps} if steps else {})
        return row
    sides = ("chosen_", "rejected_") if need == "preference" else ("",)
    for place, side in enumerate(sides):
        row[side + name] = scores[place]
        if spread:
            row[f"{side}{name}_std"] = spread[place]
        if steps:
            row[f"{side}step_{name}s"] = steps[place]
    return row


def plain(values: Tensor) -> list[float]:
    """Numbers as they are written: as many digits as a float32 has."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def summary(scored: Sequence[Scored], need: str) -> tuple[dict[str, float], str]:
    """The numbers of all rows, and a table where there is more to say."""
    rows, flat = [one.example for one in scored], torch.cat([one.scores for one in scored])
    numbers = {
        "rows": len(scored),
        "completions": len(flat),
        "score": flat.mean().item(),
        "score_std": flat.std(correction=0).item(),
        "score_min": flat.min().item(),
        "score_max": flat.max().item(),
    }
    if scored[0].spread is not None:
        numbers["disagreement"] = torch.cat([one.spread for one in scored]).mean().item()
    process, table = scored[0].steps is not None, ""
    ordered = [one for one in scored if {"ranks", "scores"} & one.example.record.row.keys()]
    if need == "unpaired":
        wanted = torch.tensor([row.record.label for row in rows])
        numbers |= wanted_gauges(flat, wanted)
    elif need == "preference" or (need == "ranking" and ordered):
        told = scored if need == "preference" else ordered
        pairs = ranked_pairs(torch.cat([one.scores for one in told]), [one.example for one in told])
        margins = pairs[0] - pairs[1]
        numbers |= {"accuracy": ((1 + margins.sign()) / 2).mean().item(), "margin": margins.mean().item()}
        gauges = pair_gauges(*pairs)
        if process:  # differences of probabilities are no logits
            gauges.pop("calibration_error")
        else:
            table = pair_table(*pairs)
        numbers |= gauges
    elif need == "process" and process:
        logits = torch.cat([own for one in scored for own in one.steps])
        labels = torch.tensor([label for row in rows for label in row.step_labels])
        right = (1 + (2 * labels.float() - 1) * logits.sign()) / 2
        numbers |= {"steps": len(labels), "accuracy": right.mean().item()} | step_gauges(logits, labels)
        table = step_table(logits, labels)
    return numbers, table


def wanted_gauges(scores: Tensor, wanted: Tensor) -> dict[str, float]:
    """Mean scores of wanted and unwanted completions, and `auc`, how often one of the first scores higher than one of
    the second (a tie counts half). What one side alone cannot tell is absent."""
    sides = {"wanted": scores[wanted], "unwanted": scores[~wanted]}
    numbers = {f"{name}_score": own.mean().item() for name, own in sides.items() if len(own)}
    if len(numbers) == 2:
        below = torch.sort(sides["unwanted"]).values
        wins = torch.searchsorted(below, sides["wanted"]) + torch.searchsorted(below, sides["wanted"], right=True)
        numbers["auc"] = (wins.double().mean() / (2 * len(below))).item()
    return numbers
