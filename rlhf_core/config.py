"""Settings that jobs share. Frozen dataclasses with a sentence under every field; the CLI turns those into its help.

No torch here: `rlhf --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot be: the message names the field, what was found and what was expected."""


def require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{field}={value!r}: expected {expected}")


def require_attributes(field: str, attributes: Sequence[str] | None, expected: str, *, values: bool = False) -> None:
    """What is written into a prompt: each NAME or NAME:VALUE (with `values`, only the latter), no name twice."""
    form = r"[^:,\n]+(:[^:,\n]*[^:,\s])" + "?" * (not values)
    right = all(re.fullmatch(form, one) for one in attributes or ())
    names = [one.partition(":")[0] for one in attributes or ()]
    require(right and len({*names}) == len(names), field, attributes, expected)


# ---------------------------------------------------------------------------------- dictionaries (YAML) and dataclasses


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as YAML and JSON hold them."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else plain(value)
        for field in dataclasses.fields(config)
    }


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Build a config, checking names, types and ranges; ConfigError says which field is wrong and how."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{name}: no setting of that name{did_you_mean(name, fields)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{name} is missing")
    return cls(**values)


def did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def alternatives(kind: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, NoneType); a plain type -> itself alone."""
    return (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )


def _convert(kind: Any, value: Any, where: str) -> Any:
    """A value from Python, YAML or the command line as the field's type."""
    kinds = alternatives(kind)
    alone = value.get("path") if isinstance(value, dict) else value  # --eval-data none switches off what a file gave
    if type(None) in kinds and (value is None or alone in ("none", "None", "null")):
        return None
    [kind] = [one for one in kinds if one is not type(None)]
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, str | Path) and "path" in typing.get_type_hints(kind):
            value = {"path": value}
        require(isinstance(value, dict), where, value, "a group of settings")
        try:
            return from_dict(kind, value)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None
    if typing.get_origin(kind) is Literal:
        require(value in typing.get_args(kind), where, value, "one of " + ", ".join(map(str, typing.get_args(kind))))
        return value
    if typing.get_origin(kind) is tuple:
        items = _split(value) if isinstance(value, str) else value
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:  # as many as there are; one may stand alone
            items = items if isinstance(items, list | tuple) else [items]
            require(len(items) > 0, where, value, "one or more, commas between them")
            inner = inner[:1] * len(items)
        require(isinstance(items, list | tuple) and len(items) == len(inner), where, value, f"{len(inner)} numbers")
        return tuple(_convert(one, item, where) for one, item in zip(inner, items, strict=True))
    if kind is bool:
        require(isinstance(value, bool), where, value, "true or false")
        return value
    if kind is str:
        require(isinstance(value, str | int | float | Path) and not isinstance(value, bool), where, value, "a text")
        return str(value)
    try:  # numbers; YAML reads 5e-6 as a text
        number = float("nan" if isinstance(value, bool) else value)
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where}={value!r}: expected {'a whole' if kind is int else 'a finite'} number") from None
    if kind is float:
        return number
    return int(value) if isinstance(value, int) or str(value).isdecimal() else int(number)  # a float holds 53 bits


def _split(text: str) -> list[str]:
    """The parts between commas. A comma that belongs to a part is written with a backslash before it."""
    return [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", text)]


# --------------------------------------------------------------------------------------------------- what a run is told


class Settings:
    """What every config does when it is made: each field is checked and brought to its type, as YAML's values are.

    A group that has a `path` may be given as that path alone.
    """

    def __post_init__(self):
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if dataclasses.is_dataclass(field.default) and isinstance(value, dict):  # a job's own defaults stay
                value = to_dict(field.default) | value
            object.__setattr__(self, field.name, _convert(kinds[field.name], value, field.name))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Which model, and how it is held."""

    path: str
    """A local folder or a hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, whatever the checkpoint holds. Half precision loses the small updates of fine-tuning."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """How sequences go through the model; auto is packed where a probe finds that it gives the same numbers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.path), "path", self.path, "a folder or a hub name")

    def options(self) -> dict[str, Any]:
        """Keywords for `load_policy` and its kin."""
        return dict(
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Where the rows come from, and how they become tokens."""

    path: str
    """A JSONL, JSON, parquet or CSV file (or .gz), a folder of the datasets library, or a hub name; or several of these
    with commas between them (\\, is a comma inside a name)."""
    weights: tuple[float, ...] | None = None
    """Share of each of several data sets in an epoch, such as 3,1: the one that is largest for its weight is seen once,
    the others again and again. None: all of each, once."""
    format: str | None = None
    """Name of the rows' format; told from their columns, for each data set, if not given."""
    formatting: str | None = None
    """A Python function of your own, as module:function, that makes each row (a dict) one of a known format, or returns
    None to leave it out."""
    split: str | None = None
    """Split of a hub dataset or of a datasets folder."""
    limit: int | None = None
    """Read no more than this many rows of each data set."""
    skip_bad_rows: int = 0
    """Skip and count up to this many rows of a data set that cannot be used; one more is an error."""
    max_length: int | None = None
    """Longest prompt and completion together, in tokens. None: the model's own."""
    truncation: Literal["prompt", "drop", "error"] = "prompt"
    """What becomes of a longer row: its prompt is cut on the left (plain text on the right), it is dropped and counted,
    or it is an error."""
    chat_template: str | None = None
    """A Jinja file, or `plain`, for rows of messages where the tokenizer has no template."""
    turns: Literal["last", "all"] = "last"
    """What of a conversation is learned: its last assistant turn, or all of them."""
    system: str | None = None
    """A system prompt for conversations that have none of their own."""
    attributes: tuple[str, ...] | None = None
    """What the prompt says of its answer (SteerLM): names of columns with ratings, such as helpfulness,verbosity; or
    helpfulness:4, which says that of every row."""
    step_separator: str = "\n"
    """What stands between the steps of an answer, in rows with a label for each step."""
    cache: str | None = None
    """Folder where the tokenised rows are kept, for later runs and for data larger than memory: they are written there
    piece by piece, and read from there one at a time."""
    preview: int = 0
    """Show so many rows as the model will see them, with what is learned marked, and stop before training."""

    def __post_init__(self):
        super().__post_init__()
        require(all(self.paths()), "path", self.path, "a file, a folder or a hub name")
        weights = self.weights
        require(weights is None or len(weights) == len(self.paths()), "weights", weights, "a number for each data set")
        require(weights is None or min(weights) > 0, "weights", weights, "more than 0")
        module_and_function = self.formatting is None or re.fullmatch(r"[^:]+:[^:]+", self.formatting)
        require(bool(module_and_function), "formatting", self.formatting, "module:function")
        require(self.preview >= 0, "preview", self.preview, "0 or more")
        require(self.skip_bad_rows >= 0, "skip_bad_rows", self.skip_bad_rows, "0 or more")
        require(self.limit is None or self.limit > 0, "limit", self.limit, "more than 0")
        require(self.max_length is None or self.max_length > 1, "max_length", self.max_length, "2 or more")
        require(self.system is None or bool(self.system.strip()), "system", self.system, "a text")
        require_attributes("attributes", self.attributes, "names of columns, or NAME:VALUE, each name once")
        separator = self.step_separator
        require(bool(separator), "step_separator", separator, "one character or more")
        require(r"\n" not in separator, "step_separator", separator, "a line break itself: $'\\n' in a shell")

    def paths(self) -> tuple[str, ...]:
        """Each data set by itself. What exists as it is written is one, whatever commas are in its name."""
        exists = bool(self.path) and Path(self.path).expanduser().exists()
        return (self.path,) if exists else tuple(part.strip() for part in _split(self.path))


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
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
        super().__post_init__()
        require(self.lr > 0, "lr", self.lr, "more than 0")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "0 <= warmup_ratio < 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "0 <= beta < 1")
        require(self.eps > 0, "eps", self.eps, "more than 0")
        norm = self.max_grad_norm
        require(norm is None or norm > 0, "max_grad_norm", norm, "more than 0, or none")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings):
    """Train small matrices beside the model's own, which stay as they are (LoRA; needs the extra `lora`)."""

    r: int = 16
    """Rank of the update of each matrix."""
    alpha: int = 32
    """The update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: tuple[str, ...] | None = None
    """Names, or ends of names, of the modules that get an adapter, commas between them. None: every linear layer but
    the head."""
    modules_to_save: tuple[str, ...] | None = None
    """Names of modules that are trained and saved whole, such as embed_tokens. A new score head always is."""
    rslora: bool = False
    """Multiply the update by alpha / sqrt(r), so that a large r does not weaken it (arXiv:2312.03732)."""
    dora: bool = False
    """Learn a length for each row of the changed matrix as well (DoRA, arXiv:2402.09353); slower."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("r", "alpha"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= dropout < 1")
        for field in ("target_modules", "modules_to_save"):
            names = getattr(self, field) or ()
            require(all(names) and len({*names}) == len(names), field, names, "names of modules, each of them once")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How completions are sampled: from the whole distribution, no top-k and no top-p."""

    max_new_tokens: int = 64
    """Longest completion."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    batch_size: int = 64
    """Completions decoded together."""
    engine: Literal["builtin", "continuous", "server"] = "builtin"
    """Who decodes: this library, transformers' continuous batching, or a server with OpenAI's protocol such as vLLM.
    Only with the first the same seed always gives the same samples."""
    kv_cache: Literal["dynamic", "static"] = "dynamic"
    """Where the built-in engine keeps keys and values: in room that grows and that rows leave when they end, or in
    that of the longest completion from the start, of one shape throughout, as CUDA graphs need."""
    server_url: str | None = None
    """Where the server is, as http://localhost:8000; its /v1/completions must take and give token ids."""
    server_model: str | None = None
    """The model's name on the server; none takes the first that it lists."""
    server_timeout: float = 600.0
    """Seconds to wait for one answer."""
    server_retries: int = 3
    """How often a request is sent again when the server does not answer or fails."""
    server_weights: str | None = None
    """Folder where the policy is written before each rollout, for the server to load."""
    server_refresh: str | None = None
    """How the server is made to load it: a URL that {"path": folder} is posted to, or a command that gets the folder as
    its last word. None: the server holds the model already, and it does not change."""

    def __post_init__(self):
        super().__post_init__()
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "more than 0")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(self.batch_size > 0, "batch_size", self.batch_size, "more than 0")
        require(self.server_timeout > 0, "server_timeout", self.server_timeout, "more than 0")
        require(self.server_retries >= 0, "server_retries", self.server_retries, "0 or more")
        own = self.kv_cache == "dynamic" or self.engine == "builtin"
        require(own, "kv_cache", self.kv_cache, f"dynamic, because engine={self.engine!r} has a cache of its own")
        for field in ("server_url", "server_model", "server_weights", "server_refresh"):
            value = getattr(self, field)
            require(value is None or self.engine == "server", field, value, "engine='server' beside it")
        url = self.server_url
        needed = self.engine != "server" or (url is not None and url.startswith(("http://", "https://")))
        require(needed, "server_url", url, "an address such as http://localhost:8000, for engine='server'")
        both = (self.server_weights is None) == (self.server_refresh is None)
        require(both, "server_weights", self.server_weights, "a folder where there is a server_refresh, and none else")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """What every training run has."""

    model: ModelConfig
    """The model to start from."""
    data: DataConfig
    """What to train on."""
    output: str
    """Folder for the trained model, metrics, settings and checkpoints."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model; any of these settings switches them on."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Hold the weights that are not trained in 8 or 4 bits, for lora or an adapter's folder (needs the extra
    `quantize`)."""
    batch_size: int = 16
    """Rows of data to an optimizer step."""
    micro_batch_size: int | None = None
    """Rows that go through the model at once; memory grows with it, results do not change. None: batch_size."""
    micro_batch_tokens: int | None = None
    """Tokens that go through the model at once: rows are put together so that they fill it (best fit, the longest
    first). A longer row goes alone. Results do not change."""
    epochs: float = 1.0
    """Passes over the data."""
    max_tokens_per_batch: int | None = None
    """End an optimizer step's rows before they have more tokens than this together; a longer row is a step alone.
    batch_size still limits their number."""
    max_steps: int | None = None
    """Stop after this many steps, whatever epochs says."""
    seed: int = 0
    """Everything random follows from it."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """How the fused operations run; auto is Triton on a GPU and torch elsewhere (or what RLHF_KERNELS says)."""
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
    keep_best: str | None = None
    """Name of a gauge of eval_data, such as eval_accuracy: the model that was best by it is kept in output/best.
    More is better, but for a name with loss, nll, kl, error or perplexity in it."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the extra `tensorboard`)."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.output), "output", self.output, "a folder")
        for field in ("batch_size", "epochs", "keep_checkpoints"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        for field in ("micro_batch_size", "micro_batch_tokens", "max_tokens_per_batch", "max_steps"):
            value = getattr(self, field)
            require(value is None or value > 0, field, value, "more than 0")
        for field in ("save_every", "eval_every"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 <= seed < 2^63")
        if self.keep_best is not None:
            best = self.keep_best
            require(best.startswith("eval_"), "keep_best", best, "a gauge of the evaluation, such as eval_loss")
            given = getattr(self, "eval_data", None) is not None and self.eval_every > 0
            require(given, "keep_best", best, "eval_data, and eval_every more than 0, to find the best by")
        require(
            not (self.resume and self.overwrite),
            "overwrite",
            True,
            "False with resume: one keeps what the other deletes",
        )


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(Settings):
    """What scores completions: a reward model, functions, checkers, or the weighted sum of several of these."""

    reward_model: ModelConfig | None = None
    """The reward model; it may have a tokenizer of its own."""
    reward_function: tuple[str, ...] | None = None
    """module:function, called with lists of prompts, completions and data rows; returns their scores, None for a
    completion to be left out. Several with commas."""
    checker: tuple[str, ...] | None = None
    """What scores 1 if right and 0 if not: exact:COLUMN or numeric:COLUMN (the row's column has the right answer),
    regex:PATTERN (found in the completion), format:TAG+TAG (<TAG>..</TAG> <TAG>..</TAG> and nothing else). Several with
    commas; one inside a pattern has a backslash before it."""
    reward_weights: tuple[float, ...] | None = None
    """What each score is multiplied by before they are added: reward model, functions, checkers, in this order. 0 only
    logs it; none: 1 each."""
    reward_timeout: float | None = 600.0
    """Seconds that a function or checker may take to score one batch; none waits for ever."""
    reward_lcb: float = 0.0
    """With an ensemble as the reward model: so many standard deviations of its members are taken off their mean."""
    end_unfinished: bool = False
    """Score a completion that was cut off as if its end token had followed, as in all that a reward model has seen."""

    def __post_init__(self):
        super().__post_init__()
        sources = self.reward_sources()
        if not sources:
            fields = [name for name in ("reward_model", "reward_function", "checker", "judge") if hasattr(self, name)]
            raise ConfigError(f"{', '.join(fields)}: expected at least one of them")
        for field, form, expected in (
            ("reward_function", r"[^:]+:[^:]+", "module:function"),
            ("checker", r".+", "names such as numeric:answer"),
        ):
            names = getattr(self, field) or ()
            require(all(re.fullmatch(form, name) for name in names), field, names, expected)
            require(len({*names}) == len(names), field, names, "each of them once")
        if self.reward_weights is not None:
            expected = f"a number for each of {', '.join(sources)}"
            require(len(self.reward_weights) == len(sources), "reward_weights", self.reward_weights, expected)
            require(any(self.reward_weights), "reward_weights", self.reward_weights, "at least one that is not 0")
        timeout = self.reward_timeout
        require(timeout is None or timeout > 0, "reward_timeout", timeout, "more than 0, or none")
        require(self.reward_lcb >= 0, "reward_lcb", self.reward_lcb, "0 or more")
        for field in ("reward_lcb", "end_unfinished"):
            value = getattr(self, field)
            require(not value or self.reward_model is not None, field, value, "a reward_model beside it")

    def reward_sources(self) -> tuple[str, ...]:
        """What scores, as it was given, in the order of the weights."""
        model = () if self.reward_model is None else ("reward_model",)
        return (*model, *(self.reward_function or ()), *(self.checker or ()))


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(ScoringConfig, RunConfig):
    """What every job has that samples completions from the policy and scores them."""

    reference: ModelConfig | None = None
    """The model that the policy is held to; the model to start from, if not given."""
    eval_data: DataConfig | None = None
    """Held-out prompts; their mean score and KL are logged as eval_score and eval_kl."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    batch_size: int = 64
    """Prompts to a rollout."""
    minibatch_size: int = 16
    """Completions to an optimizer step."""

    def __post_init__(self):
        super().__post_init__()
        require(self.minibatch_size > 0, "minibatch_size", self.minibatch_size, "more than 0")
        for field in ("micro_batch_tokens", "max_tokens_per_batch"):
            value = getattr(self, field)
            require(value is None, field, value, "none: rollouts go by batch_size, minibatch_size and micro_batch_size")
        stale = self.sampling.engine == "server" and self.sampling.server_refresh is None
        require(not stale, "sampling.server_refresh", None, "how the server gets the weights that training changes")
        plain = self.sampling.engine != "server" or self.quantize == "none"
        require(plain, "quantize", self.quantize, "none with engine='server', which is given plain weights")
        dropout = 0.0 if self.lora is None else self.lora.dropout
        require(dropout == 0, "lora.dropout", dropout, "0: log-probs of two forwards are compared, which must agree")
        require(
            self.sampling.temperature > 0, "sampling.temperature", self.sampling.temperature, "more than 0, to learn"
        )


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(OnPolicyConfig):
    """What every job has whose loss holds the policy to the one that sampled, by the ratio of their log-probs."""

    recorded: Literal["off", "auto", "on"] = "off"
    """Take log-probs, and a value head's values, as recorded while decoding and spare a forward; off keeps the first
    ratio at 1. They are compared with a forward once a run: where they differ, auto goes on with forwards and on is an
    error. Where a forward is needed anyway, for the exact KL, or is the update's own, nothing is spared."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Weigh each token's loss by how much likelier our own forward finds it than the engine that sampled it did, or all
    of a completion's by that of the whole: for engines whose numbers are not quite ours, such as a server's."""
    importance_max: float = 3.0
    """Where such a weight is cut off."""

    def __post_init__(self):
        super().__post_init__()
        require(self.importance_max > 1, "importance_max", self.importance_max, "more than 1, where weights start")
        weighs = self.importance != "none" and self.recorded != "off"
        require(not weighs, "importance", self.importance, "none with recorded, whose ratios are to the engine's own")
        own = self.sampling.engine == "server" and self.sampling.temperature != 1  # its log-probs are then ours
        weighs = self.importance != "none" and own
        require(not weighs, "importance", self.importance, "none with a server at a sampling.temperature other than 1")
        asks = getattr(self, "kl_estimator", None) == "full"
        require(self.recorded != "on" or not asks, "recorded", "on", "off or auto: kl_estimator='full' needs a forward")
