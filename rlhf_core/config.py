"""Settings that jobs share. Frozen dataclasses with a sentence under every field; the CLI turns those into its help.

No torch here: `rlhf --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot be: the message names the field, what was found and what was expected."""


def require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{field}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is held."""

    path: str
    """A local folder or a hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, whatever the checkpoint holds. Half precision loses the small updates of fine-tuning."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """How sequences go through the model; auto is packed where a probe finds that it gives the same numbers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def options(self) -> dict[str, Any]:
        """Keywords for `load_policy` and its kin."""
        return dict(
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from, and how they become tokens."""

    path: str
    """A JSONL, JSON, parquet or CSV file (or .gz), a folder of the datasets library, or a hub name."""
    format: str | None = None
    """Name of the rows' format; told from their columns if not given."""
    split: str | None = None
    """Split of a hub dataset or of a datasets folder."""
    limit: int | None = None
    """Read no more than this many rows."""
    skip_bad_rows: int = 0
    """Skip and count up to this many rows that cannot be used; one more is an error."""
    max_length: int | None = None
    """Longest prompt and completion together, in tokens: longer prompts are cut on the left. None: the model's own."""
    chat_template: str | None = None
    """A Jinja file, or `plain`, for rows of messages where the tokenizer has no template."""

    def __post_init__(self):
        require(self.skip_bad_rows >= 0, "data.skip_bad_rows", self.skip_bad_rows, "0 or more")
        require(self.limit is None or self.limit > 0, "data.limit", self.limit, "more than 0")
        require(self.max_length is None or self.max_length > 1, "data.max_length", self.max_length, "2 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning-rate schedule and the gradient clip."""

    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after warm-up; cosine and linear end at 0."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the rate rises from 0."""
    weight_decay: float = 0.0
    """Of matrices; never of biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; None leaves them."""

    def __post_init__(self):
        require(self.lr > 0, "optim.lr", self.lr, "more than 0")
        require(0 <= self.warmup_ratio < 1, "optim.warmup_ratio", self.warmup_ratio, "0 <= warmup_ratio < 1")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.eps > 0, "optim.eps", self.eps, "more than 0")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "optim.max_grad_norm",
            self.max_grad_norm,
            "more than 0",
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are sampled: from the whole distribution, no top-k and no top-p."""

    max_new_tokens: int = 64
    """Longest completion."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    batch_size: int = 64
    """Completions decoded together."""

    def __post_init__(self):
        require(self.max_new_tokens > 0, "sampling.max_new_tokens", self.max_new_tokens, "more than 0")
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "0 or more")
        require(self.batch_size > 0, "sampling.batch_size", self.batch_size, "more than 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has."""

    model: ModelConfig
    """The model to start from."""
    data: DataConfig
    """What to train on."""
    output: str
    """Folder for the trained model, metrics, settings and checkpoints."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    batch_size: int = 16
    """Rows of data to an optimizer step."""
    micro_batch_size: int | None = None
    """Rows that go through the model at once; memory grows with it, results do not change. None: batch_size."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many steps, whatever epochs says."""
    seed: int = 0
    """Everything random follows from it."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""
    resume: bool = False
    """Continue from the newest whole checkpoint in the output folder, or start if there is none."""
    overwrite: bool = False
    """Start anew in an output folder that is not empty, deleting what an earlier run left there."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves none but the one an interruption makes."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    eval_every: int = 0
    """Steps between evaluations on eval_data; 0 evaluates once, at the end."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the extra `tensorboard`)."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self):
        for field in ("model", "data", "eval_data", "reward_model"):  # a bare string is a path
            if isinstance(getattr(self, field, None), str | Path):
                kind = DataConfig if "data" in field else ModelConfig
                object.__setattr__(self, field, kind(path=str(getattr(self, field))))
        object.__setattr__(self, "output", str(self.output))
        require(bool(self.output), "output", self.output, "a folder")
        for field in ("batch_size", "epochs", "keep_checkpoints"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        for field in ("micro_batch_size", "max_steps"):
            value = getattr(self, field)
            require(value is None or value > 0, field, value, "more than 0")
        for field in ("save_every", "eval_every"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(
            not (self.resume and self.overwrite),
            "overwrite",
            True,
            "False with resume: one keeps what the other deletes",
        )


# ---------------------------------------------------------------------------------- dictionaries (YAML) and dataclasses


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as YAML and JSON hold them."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else plain(value)
        for field in dataclasses.fields(config)
    }


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Build a config, checking names and types; ConfigError says which field is wrong and how.

    A group that has a `path` may be written as that path alone: `data: pairs.jsonl`.
    """
    kinds = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in kinds]
    if unknown:
        raise ConfigError(f"no setting named {where}{unknown[0]}{did_you_mean(unknown[0], kinds)}")
    arguments = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = values[field.name]
            if dataclasses.is_dataclass(field.default) and isinstance(value, dict):  # a job's own defaults stay
                value = to_dict(field.default) | value
            arguments[field.name] = _convert(kinds[field.name], value, where + field.name)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}{field.name} is missing")
    return cls(**arguments)


def did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def alternatives(kind: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, NoneType); a plain type -> itself alone."""
    return (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )


def _convert(kind: Any, value: Any, where: str) -> Any:
    """A YAML or command-line value as the field's type."""
    kinds = alternatives(kind)
    if type(None) in kinds and (value is None or value in ("none", "None", "null")):
        return None
    [kind] = [one for one in kinds if one is not type(None)]
    if dataclasses.is_dataclass(kind):
        if isinstance(value, str) and "path" in typing.get_type_hints(kind):
            value = {"path": value}
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r}: expected a group of settings")
        return from_dict(kind, value, where + ".")
    if typing.get_origin(kind) is Literal:
        require(value in typing.get_args(kind), where, value, "one of " + ", ".join(map(str, typing.get_args(kind))))
        return value
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        inner = typing.get_args(kind)
        require(isinstance(items, list | tuple) and len(items) == len(inner), where, value, f"{len(inner)} numbers")
        return tuple(_convert(one, item, where) for one, item in zip(inner, items, strict=True))
    if kind is bool:
        require(isinstance(value, bool), where, value, "true or false")
        return value
    if kind is str:
        require(isinstance(value, str | int | float) and not isinstance(value, bool), where, value, "a text")
        return str(value)
    try:  # numbers; YAML reads 5e-6 as a text
        if isinstance(value, bool):
            raise ValueError
        if kind is int and not float(value).is_integer():
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}={value!r}: expected {'a whole number' if kind is int else 'a number'}") from None
