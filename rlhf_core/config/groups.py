"""Groups of settings that jobs share: model, data, optimizer, LoRA, sampling, KL, critic, scores and reference."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rlhf_core.config.settings import (
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    require,
    require_attributes,
    split_list,
)


@dataclass(frozen=True, kw_only=True)
class LoadConfig(Settings):
    """How a model is loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights, whatever the checkpoint has. Half precision loses the small updates of fine-tuning."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """Layout of the sequences in a forward pass; auto packs them if a test at load time gives the same numbers."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def options(self) -> dict[str, Any]:
        """Return these settings as keyword arguments of the `load_*` functions."""
        return {name: getattr(self, name) for name in ("dtype", "layout", "revision", "trust_remote_code")}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LoadConfig):
    """Which model to load, and how."""

    path: str
    """A local folder or a name on the hub."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.path), "path", self.path, "a folder or a hub name")

    def options(self) -> dict[str, Any]:
        return super().options() | {"gradient_checkpointing": self.gradient_checkpointing}


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(LoadConfig):
    """The reference: which model, and whether it follows the policy (TR-DPO, arXiv:2404.09656)."""

    path: str | None = None
    """A local folder or a name on the hub. None: the model that training starts from, loaded as that is."""
    update: Literal["none", "ema", "sync"] = "none"
    """Keep the reference fixed, move it as an exponential moving average of the policy, or copy the policy to it."""
    every: PositiveInt = 1
    """Steps between two updates of the reference."""
    rate: Fraction = 0.01
    """Step size of the moving average: reference += rate * (policy - reference)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.path != "", "path", self.path, "a folder or a hub name")
        for name, value in super().options().items():
            unused = self.path is None and value != getattr(LoadConfig, name)
            require(not unused, name, value, "a path beside it; without one the reference is loaded as the model is")


@dataclass(frozen=True, kw_only=True)
class CachedReferenceConfig(ReferenceConfig):
    """The reference of a job on fixed data, whose log-probs can be computed once."""

    cache: Literal["auto", "on", "off"] = "auto"
    """Compute the reference's log-probs once, before the first step; auto does so if examples are seen twice."""
    cache_folder: str | None = None
    """Folder of the cached log-probs, to share them between runs. None: the output folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.update == "none" or self.cache != "on", "cache", "on", "auto or off, because the reference moves")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Which rows to read, and how to tokenize them."""

    path: str
    """A JSONL, JSON, parquet or CSV file (or .gz), a folder of the datasets library, or a name on the hub; several are
    separated by commas (\\, is a comma inside a name)."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Share of each of several data sets in an epoch, such as 3,1: the one that is largest relative to its weight is
    seen once, the others are repeated. None: all rows of each, once."""
    format: str | None = None
    """Name of the rows' format. None: detect it from the columns, for each data set."""
    formatting: str | None = None
    """A Python function of your own, as module:function, that turns each row (a dict) into one of a known format, or
    returns None to skip it."""
    split: str | None = None
    """Split of a data set on the hub or of a datasets folder."""
    limit: PositiveInt | None = None
    """Read at most this many rows of each data set."""
    skip_bad_rows: NonNegativeInt = 0
    """Skip and count up to this many unusable rows of a data set; one more is an error."""
    max_length: Annotated[int, Bounds(least=2)] | None = None
    """Longest prompt and completion together, in tokens. None: the model's own limit."""
    truncation: Literal["prompt", "drop", "error"] = "prompt"
    """What to do with a longer row: truncate its prompt on the left (plain text on the right), drop and count it, or
    raise an error."""
    chat_template: str | None = None
    """A Jinja file, or `plain`, for rows of messages if the tokenizer has no template."""
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation to train on."""
    system: str | None = None
    """A system prompt for conversations without one."""
    attributes: tuple[str, ...] | None = None
    """Attributes of the answer to write into the prompt (SteerLM): names of columns with ratings, such as
    helpfulness,verbosity; or helpfulness:4, for every row."""
    step_separator: str = "\n"
    """Text between the steps of an answer, in rows with a label for each step."""
    cache: str | None = None
    """Folder for the tokenized rows, for later runs and for data larger than memory: they are written piece by piece
    and read one at a time."""
    preview: NonNegativeInt = 0
    """Show this many rows as the model will see them, with the supervised tokens marked, and stop before training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(self.paths()), "path", self.path, "a file, a folder or a hub name")
        weights = self.weights
        require(weights is None or len(weights) == len(self.paths()), "weights", weights, "a number for each data set")
        module_and_function = self.formatting is None or re.fullmatch(r"[^:]+:[^:]+", self.formatting)
        require(bool(module_and_function), "formatting", self.formatting, "module:function")
        require(self.system is None or bool(self.system.strip()), "system", self.system, "a text")
        require_attributes("attributes", self.attributes, "names of columns, or NAME:VALUE, each name once")
        separator = self.step_separator
        require(bool(separator), "step_separator", separator, "one character or more")
        require(r"\n" not in separator, "step_separator", separator, "a line break itself: $'\\n' in a shell")

    def paths(self) -> tuple[str, ...]:
        """Return the path of each data set. A path that exists as written is one, even with commas in its name."""
        exists = bool(self.path) and Path(self.path).expanduser().exists()
        return (self.path,) if exists else tuple(part.strip() for part in split_list(self.path))


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """AdamW, its learning-rate schedule and gradient clipping."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after warm-up; cosine and linear end at 0."""
    warmup_ratio: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Fraction of the steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices; biases and norms have none."""
    betas: tuple[Annotated[float, Bounds(least=0, below=1)], Annotated[float, Bounds(least=0, below=1)]] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings):
    """Train low-rank adapters and freeze the model's own weights (LoRA; needs the extra `lora`)."""

    r: PositiveInt = 16
    """Rank of the update of each matrix. Any setting of this group trains adapters instead of the model."""
    alpha: PositiveInt = 32
    """Scale of the update: it is multiplied by alpha / r."""
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Dropout probability of an adapter's inputs in training."""
    target_modules: tuple[str, ...] | None = None
    """Names, or ends of names, of the modules that get an adapter, separated by commas. None: every linear layer but
    the head."""
    modules_to_save: tuple[str, ...] | None = None
    """Names of modules to train and save whole, such as embed_tokens. A new score head always is."""
    rslora: bool = False
    """Multiply the update by alpha / sqrt(r) instead, so that a large r does not weaken it (arXiv:2312.03732)."""
    dora: bool = False
    """Also train the magnitude of each row of the adapted matrix (DoRA, arXiv:2402.09353); slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("target_modules", "modules_to_save"):
            names = getattr(self, field) or ()
            require(all(names) and len({*names}) == len(names), field, names, "names of modules, each of them once")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How to sample completions, always from the whole distribution: no top-k and no top-p."""

    max_new_tokens: PositiveInt = 64
    """Longest completion, in tokens."""
    temperature: NonNegativeFloat = 1.0
    """Divisor of the logits; 0 takes the most likely token."""
    batch_size: PositiveInt = 64
    """Completions decoded together."""
    engine: Literal["builtin", "continuous", "server"] = "builtin"
    """Decode with this library, with transformers' continuous batching, or on a server with OpenAI's protocol such as
    vLLM. Only the first gives the same samples for the same seed."""
    kv_cache: Literal["dynamic", "static"] = "dynamic"
    """Cache of the built-in engine: one that grows and drops finished rows, or one of the size of the longest
    completion from the start, whose fixed shape CUDA graphs need."""
    server_url: str | None = None
    """Address of the server, such as http://localhost:8000; its /v1/completions must take and return token ids."""
    server_model: str | None = None
    """Name of the model on the server. None: the first that it lists."""
    server_timeout: PositiveFloat = 600.0
    """Longest wait for one answer, in seconds."""
    server_retries: NonNegativeInt = 3
    """How often to repeat a request if the server does not answer or fails."""
    server_weights: str | None = None
    """Folder to write the policy to before each rollout, for the server to load."""
    server_refresh: str | None = None
    """How to make the server load it: a URL to which {"path": folder} is posted, or a command that gets the folder as
    its last argument. None: the server's model is loaded already and does not change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.kv_cache == "dynamic" or self.engine == "builtin"
        require(own, "kv_cache", self.kv_cache, f"dynamic, because engine={self.engine!r} has a cache of its own")
        for field in ("server_url", "server_model", "server_weights", "server_refresh"):
            value = getattr(self, field)
            require(value is None or self.engine == "server", field, value, "engine='server' beside it")
        url = self.server_url
        needed = self.engine != "server" or (url is not None and url.startswith(("http://", "https://")))
        require(needed, "server_url", url, "an address such as http://localhost:8000, for engine='server'")
        both = (self.server_weights is None) == (self.server_refresh is None)
        require(both, "server_weights", self.server_weights, "a folder if server_refresh is given, and none otherwise")


@dataclass(frozen=True, kw_only=True)
class KLConfig(Settings):
    """The KL penalty, KL(policy || reference): its coefficient, its estimate, and where it is applied."""

    coef: NonNegativeFloat | None = 0.05
    """Coefficient of the KL penalty, and the start of an adaptive or linear one; 0 loads no reference. None: the value
    in the paper of the loss."""
    estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """Estimate the KL from the sampled tokens (k2 is also called mse), or compute it over the full vocabulary.
    rlhf_core/ops/kl.py explains which estimate is unbiased where; a biased one warns."""
    apply_to: Literal["reward", "loss", "both"] = "reward"
    """Subtract the penalty from each token's reward, add it to the loss, or both, which the full KL needs to have the
    right gradient over whole completions."""
    control: Literal["fixed", "adaptive", "linear"] = "fixed"
    """Keep the coefficient fixed, adapt it so that the KL reaches `target`, or move it linearly to `coef_end`."""
    target: PositiveFloat | None = 6.0
    """KL that an adaptive coefficient aims at, in nats per completion. None keeps the coefficient fixed."""
    horizon: PositiveInt = 10_000
    """Completions over which an adaptive coefficient moves; a smaller horizon is faster."""
    coef_end: NonNegativeFloat = 0.0
    """Value of a linear coefficient at the last step."""
    ratio: bool = False
    """Multiply each estimate by the token's ratio, with its gradient: the gradients of k1 and k3 become unbiased."""
    stop: PositiveFloat | None = None
    """End the updates on a rollout once the policy is 1.5 times this far from the policy that sampled it, in nats per
    token."""
    measure: bool = False
    """Load the reference and log the KL even if the coefficient is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        adapted = self.coef != 0 or not self.adapts
        require(adapted, "coef", self.coef, "more than 0 with control='adaptive', which multiplies it")
        once = self.apply_to != "both" or self.estimator == "full"
        require(once, "apply_to", "both", "estimator='full': any other estimate would be applied twice")

    @property
    def active(self) -> bool:
        """Whether a reference is needed: the coefficient is or becomes more than 0, or the KL is to be measured."""
        return self.measure or bool(self.coef) or (self.control == "linear" and self.coef_end > 0)

    @property
    def adapts(self) -> bool:
        """Whether the coefficient depends on the measured KL."""
        return self.control == "adaptive" and self.target is not None


@dataclass(frozen=True, kw_only=True)
class ValueConfig(Settings):
    """The critic: its model and its loss."""

    model: Literal["head", "policy", "reward"] = "head"
    """A head on the policy's trunk, or a model of its own that starts from the policy or from the reward model."""
    coef: NonNegativeFloat = 0.1
    """Coefficient of the value loss."""
    clip: PositiveFloat | None = 0.2
    """Largest change of a value from the one at sampling time that the loss counts. None: no limit."""
    detach: bool = False
    """Stop the gradient of a value head at the policy's trunk."""
    warmup: NonNegativeInt = 0
    """Steps at the start that train the critic alone; the policy, and the trunk under a value head, are frozen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.detach or self.model == "head", "detach", True, "model='head', which shares the policy's trunk"
        )


@dataclass(frozen=True, kw_only=True)
class ScoreShapingConfig(Settings):
    """How scores are shaped before they become rewards, in this order: center, scale, clip, truncated completions."""

    center: NonNegativeInt = 0
    """Completions of the initial policy to sample before the first step; their mean score is subtracted from every
    score."""
    scale: Literal["none", "scale", "normalize"] = "none"
    """Divide scores by the standard deviation of all scores so far; normalize also subtracts their mean."""
    clip: PositiveFloat | None = None
    """Largest absolute score, applied after centering and scaling."""
    missing_eos: Literal["none", "subtract", "replace", "mask", "bootstrap"] = "none"
    """What to do with a truncated completion: nothing; subtract missing_eos_penalty from its score; replace its score
    by -missing_eos_penalty; leave it out of the loss; or add the critic's value of the rest."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Penalty of a truncated completion with missing_eos=subtract or replace, in units of the shaped scores."""
    overlong_buffer: NonNegativeInt = 0
    """DAPO's overlong shaping: over the last tokens before max_new_tokens, as many as given here, the score falls
    linearly by 1. 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        penalty, default = self.missing_eos_penalty, ScoreShapingConfig.missing_eos_penalty
        used = self.missing_eos in ("subtract", "replace") or penalty == default
        require(used, "missing_eos_penalty", penalty, "missing_eos=subtract or replace beside it")
