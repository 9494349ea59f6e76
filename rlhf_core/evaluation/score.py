"""`rlhf score`: score the completions of a data set with a reward model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf_core.config import DataConfig, ModelConfig, PositiveInt, Settings, require
from rlhf_core.data.chat import load_chat_template
from rlhf_core.data.errors import BadRow, DataError
from rlhf_core.data.formats import named_format, recognise
from rlhf_core.data.loader import load_examples, pack_rows
from rlhf_core.data.records import Completion, Example
from rlhf_core.data.sources import formatted, read_rows
from rlhf_core.data.tokenize import encode_records, stop_ids
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.evaluation.reward_accuracy import pair_metrics, pair_table, ranked_pairs, step_metrics, step_table
from rlhf_core.models.forward import sequence_scores, token_scores
from rlhf_core.models.load import freeze, load_reward_model


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Settings):
    """Score completions with a reward model: single ones, pairs, lists, or answers in steps. Prints mean and spread,
    and, for rows that have preferences, how often the model agrees."""

    job: ClassVar[str] = "score"
    common: ClassVar[tuple[str, ...]] = ("model", "data", "output", "name", "combine", "batch_size", "device")

    model: ModelConfig
    """The reward model: with one head, an ensemble, or a process reward model."""
    data: DataConfig
    """Rows with completions."""
    output: str | None = None
    """A JSONL file for the rows with their scores."""
    name: str = "score"
    """Name of the new column; for pairs with the prefixes chosen_ and rejected_, for lists with an s appended."""
    combine: Literal["product", "min", "last"] = "product"
    """How the probabilities of a process reward model that each step is right are combined: their product, minimum, or
    the last of them."""
    batch_size: PositiveInt = 16
    """Rows per forward pass."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... None: a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name.strip()), "name", self.name, "the name of a column")


class Scored(NamedTuple):
    """The scores of one row's K completions."""

    example: Example
    scores: Tensor  # (K,)
    spread: Tensor | None = None  # (K,) standard deviation over the members of an ensemble
    steps: tuple[Tensor, ...] | None = None  # for a process reward model: (S,) logits of each completion's steps


@torch.no_grad()
def score(config: ScoreConfig) -> dict[str, float]:
    """Write the rows with their scores. Print and return the metrics of `summary`."""
    model, tokenizer = load_reward_model(
        config.model.path, device=config.device, new_head=False, **config.model.options()
    )
    freeze(model)
    need = need_of(config.data)
    examples = load_examples(config.data, tokenizer, need=need, model=model)
    check_columns(examples[0].record.row, need, config)
    scored: list[Scored] = []
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
                part = list(score_whole(model, rows))
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
    """Return the `need` of `load_examples` that the columns of the first row serve. Raises DataError for prompts."""
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
    return "supervised"  # no row: `load_examples` raises the error


def is_process(model: PreTrainedModel) -> bool:
    """Whether a reward model scores steps."""
    return "TokenClassification" in type(model).__name__


def in_steps(completion: Completion, separator: str) -> tuple[str, ...]:
    """Split a completion into steps, each with its separator. A blank step is joined to the one before."""
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


def each_in_steps(
    rows: Sequence[Example], model: PreTrainedModel, tokenizer: Tokenizer, data: DataConfig
) -> list[Example]:
    """Return an example in steps for every completion of the rows, tokenised step by step as in training.

    Raises DataError where one does not fit into the maximal length.
    """
    records = [
        replace(row.record, completions=(completion,), steps=steps, step_labels=(False,) * len(steps))
        for row in rows
        for completion in row.record.completions
        for steps in [in_steps(completion, data.step_separator)]
    ]
    examples = encode_records(
        records,
        tokenizer,
        stop_ids=stop_ids(tokenizer, getattr(model, "generation_config", None)),
        max_length=data.max_length or getattr(model.config, "max_position_embeddings", None),
        chat_template=load_chat_template(data.chat_template) if data.chat_template else None,
    )
    if len(examples) != len(records):
        raise DataError(f"{records[0].source} and after: cut into steps, a completion leaves no room for its prompt")
    return examples


# ---------------------------------------------------------------------------------------------------------- the scores


def score_whole(model: PreTrainedModel, rows: Sequence[Example]) -> Iterator[Scored]:
    """Score each row's completions with a reward model: its score, or an ensemble's mean and standard deviation."""
    batch = pack_rows([replace(row, supervised=None) for row in rows])
    members = checked(sequence_scores(model, batch).float().cpu(), rows)
    members = members.view(len(members), -1)
    counts = [len(row.completions) for row in rows]
    for row, own in zip(rows, members.split(counts), strict=True):
        yield Scored(row, own.mean(1), own.std(1, correction=0) if own.shape[1] > 1 else None)


def score_steps(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[Example], config: ScoreConfig
) -> Iterator[Scored]:
    """Score the steps of each row's completions with a process reward model, and combine them."""
    data = config.data
    marked = rows if rows[0].step_ends is not None else each_in_steps(rows, model, tokenizer, data)
    logits = token_scores(model, pack_rows(marked)).float().cpu()
    of_each = iter([own[list(example.step_ends)] for own, example in zip(logits, marked, strict=True)])
    for row in rows:
        steps = tuple(checked(next(of_each), [row]) for _ in row.completions)
        yield Scored(row, torch.stack([combined(own, config.combine) for own in steps]), steps=steps)


def combined(logits: Tensor, how: str) -> Tensor:
    """Combine (S,) logits of steps to one score, a probability (Lightman et al. 2023, arXiv:2305.20050)."""
    if how == "product":
        return torch.nn.functional.logsigmoid(logits).sum().exp()
    return (logits.min() if how == "min" else logits[-1]).sigmoid()


def checked(scores: Tensor, rows: Sequence[Example]) -> Tensor:
    """Return the scores. Raises ValueError if one is not finite."""
    if not scores.isfinite().all():
        place = rows[0].record.source if len(rows) == 1 else f"{rows[0].record.source} to {rows[-1].record.source}"
        raise ValueError(f"{place}: the reward model gives a score that is not finite")
    return scores


# ----------------------------------------------------------------------------------------------------------- the result


def columns_of(need: str, name: str, *, process: bool) -> list[str]:
    """Return the names of a row's new columns for scores, without those for their spread."""
    if need == "preference":
        return [f"chosen_{name}", f"rejected_{name}"]
    if need == "ranking":
        return [f"{name}s"]
    return [name, f"step_{name}s"] if process else [name]


def check_columns(row: dict[str, Any], need: str, config: ScoreConfig) -> None:
    """Raise DataError where a row has a column of that name already; the ranks of a list are replaced."""
    for column in columns_of(need, config.name, process=False) if need != "ranking" else []:
        if column in row:
            raise DataError(f"the rows have a column {column!r} already; --name gives the new one another name")


def row_of(scored: Scored, need: str, config: ScoreConfig) -> dict[str, Any]:
    """Return the row as it was read, with its scores.

    The completions of a list are written in the order of their ranks, and their scores replace all columns for their
    order, so that `rlhf reward` can train on the result.
    """
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
    """Return numbers rounded to the precision of float32, for writing."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def summary(scored: Sequence[Scored], need: str) -> tuple[dict[str, float], str]:
    """Return the metrics of all rows, and a table with details, empty if there are none."""
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
        numbers |= wanted_metrics(flat, wanted)
    elif need == "preference" or (need == "ranking" and ordered):
        paired = scored if need == "preference" else ordered
        pairs = ranked_pairs(torch.cat([one.scores for one in paired]), [one.example for one in paired])
        margins = pairs[0] - pairs[1]
        numbers |= {"accuracy": ((1 + margins.sign()) / 2).mean().item(), "margin": margins.mean().item()}
        metrics = pair_metrics(*pairs)
        if process:  # differences of probabilities are no logits
            metrics.pop("calibration_error")
        else:
            table = pair_table(*pairs)
        numbers |= metrics
    elif need == "process" and process:
        logits = torch.cat([own for one in scored for own in one.steps])
        labels = torch.tensor([label for row in rows for label in row.step_labels])
        right = (1 + (2 * labels.float() - 1) * logits.sign()) / 2
        numbers |= {"steps": len(labels), "accuracy": right.mean().item()} | step_metrics(logits, labels)
        table = step_table(logits, labels)
    return numbers, table


def wanted_metrics(scores: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return the metrics of labelled completions.

    `wanted_score`, `unwanted_score`: mean scores of each label. `auc`: how often a wanted completion scores higher than
    an unwanted one; a tie counts half. Metrics of a label without completions are absent.
    """
    sides = {"wanted": scores[wanted], "unwanted": scores[~wanted]}
    numbers = {f"{name}_score": own.mean().item() for name, own in sides.items() if len(own)}
    if len(numbers) == 2:
        below = torch.sort(sides["unwanted"]).values
        wins = torch.searchsorted(below, sides["wanted"]) + torch.searchsorted(below, sides["wanted"], right=True)
        numbers["auc"] = (wins.double().mean() / (2 * len(below))).item()
    return numbers
