"""Settings that kinds of jobs share: every training run, every job that scores, every job that samples to learn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from rlhf_core.config.groups import (
    DataConfig,
    KLConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    SamplingConfig,
    ScoreShapingConfig,
)
from rlhf_core.config.settings import (
    Bounds,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    require,
)
from rlhf_core.plugins import import_module


@dataclass(frozen=True, kw_only=True)
class LossOptions(Settings):
    """The settings of every job whose loss is chosen by name."""

    loss_module: str | None = None
    """A Python module of your own that registers a loss; it is imported first."""
    loss_options: tuple[str, ...] | None = None
    """Options of the loss, by the names in docs/losses.md: name:number, several separated by commas, such as
    gamma:0.5,nll_coef:1."""

    def __post_init__(self) -> None:
        if isinstance(self.loss_options, dict):  # as YAML has it
            texts = tuple(f"{name}:{value}" for name, value in self.loss_options.items()) or None
            object.__setattr__(self, "loss_options", texts)
        super().__post_init__()
        if self.loss_module is not None:
            import_module(self.loss_module)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """The settings of every training run."""

    job: ClassVar[str]
    common: ClassVar[tuple[str, ...]] = (  # the settings that --help shows
        "model", "data", "output", "batch_size", "micro_batch_size", "epochs", "max_steps", "optim.lr", "eval_data",
        "lora.r", "seed", "resume",
    )  # fmt: skip

    model: ModelConfig
    """The model to start from: a local folder or a name on the hub."""
    data: DataConfig
    """The rows to train on: a JSONL, JSON, parquet or CSV file, a folder, or a name on the hub."""
    output: str
    """Folder for the trained model, metrics, settings and checkpoints."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model, if any setting of this group is given."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Load the frozen weights in 8 or 4 bits, with lora or an adapter's folder as the model (needs the extra
    `quantize`)."""
    batch_size: PositiveInt = 16
    """Rows per optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Rows per forward pass; memory grows with it, results do not change. None: batch_size."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens per forward pass: rows are combined to fill it (best fit, longest first). A longer row goes alone. Results
    do not change."""
    epochs: PositiveFloat = 1.0
    """Passes over the data."""
    max_tokens_per_batch: PositiveInt | None = None
    """Largest number of tokens per optimizer step, in addition to batch_size; a longer row is a step of its own."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps, whatever `epochs` is."""
    seed: Annotated[int, Bounds(least=0, below=2**63, words="0 <= seed < 2^63")] = 0
    """Seed of everything random."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... None: a GPU if there is one."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the fused operations; auto is Triton on a GPU and torch elsewhere (or as RLHF_KERNELS sets)."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the output folder, or start if there is none."""
    overwrite: bool = False
    """Start anew in an output folder that is not empty, and delete the files of the earlier run."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints; 0 saves one only when the run is interrupted."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on eval_data; 0 evaluates once, at the end."""
    keep_best: str | None = None
    """Name of an evaluation metric, such as eval_accuracy: the best model by it is kept in output/best. More is better,
    except for a name with loss, nll, kl, error or perplexity in it."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the extra `tensorboard`)."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output), "output", self.output, "a folder")
        if self.keep_best is not None:
            best = self.keep_best
            require(best.startswith("eval_"), "keep_best", best, "an evaluation metric, such as eval_loss")
            given = getattr(self, "eval_data", None) is not None and self.eval_every > 0
            require(given, "keep_best", best, "eval_data, and eval_every more than 0, to find the best model by")
        both = self.resume and self.overwrite
        require(not both, "overwrite", True, "False with resume: one keeps what the other deletes")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(Settings):
    """What scores completions: a reward model, functions, checkers, or the weighted sum of several of these."""

    reward_model: ModelConfig | None = None
    """The reward model; it may have its own tokenizer."""
    reward_function: tuple[str, ...] | None = None
    """module:function, called with lists of prompts, completions and data rows; returns their scores, None to exclude a
    completion. Several are separated by commas."""
    checker: tuple[str, ...] | None = None
    """A check that scores 1 if it passes and 0 if not: exact:COLUMN or numeric:COLUMN (the row's column has the right
    answer), regex:PATTERN (found in the completion), format:TAG+TAG (<TAG>..</TAG> <TAG>..</TAG> and nothing else).
    Several are separated by commas; a comma inside a pattern has a backslash before it."""
    reward_weights: tuple[float, ...] | None = None
    """Weights of the scores in their sum: reward model, functions, checkers, in this order. 0 only logs a score. None:
    1 each."""
    reward_timeout: PositiveFloat | None = 600.0
    """Longest time for a function or checker to score one batch, in seconds. None: no limit."""
    reward_lcb: NonNegativeFloat = 0.0
    """With an ensemble as the reward model: standard deviations of its members to subtract from their mean."""
    end_unfinished: bool = False
    """Append the end token to a truncated completion before a reward model scores it, since it was trained on ended
    ones."""

    def __post_init__(self) -> None:
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
        for field in ("reward_lcb", "end_unfinished"):
            value = getattr(self, field)
            require(not value or self.reward_model is not None, field, value, "a reward_model beside it")

    def reward_sources(self) -> tuple[str, ...]:
        """Return the names of the sources of the scores, in the order of the weights."""
        model = () if self.reward_model is None else ("reward_model",)
        return (*model, *(self.reward_function or ()), *(self.checker or ()))


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(ScoringConfig, RunConfig):
    """The settings of every job that samples completions from the policy, scores them and learns from them."""

    common: ClassVar[tuple[str, ...]] = (
        "model", "data", "output", "reward_model", "reward_function", "checker", "batch_size", "minibatch_size",
        "micro_batch_size", "sampling.max_new_tokens", "max_steps", "optim.lr", "lora.r", "eval_data",
    )  # fmt: skip

    has_critic: ClassVar[bool] = False  # whether there are values that missing_eos=bootstrap can use

    reference: ReferenceConfig = ReferenceConfig()
    """The reference that the policy is compared with."""
    score: ScoreShapingConfig = ScoreShapingConfig()
    """How scores are shaped."""
    eval_data: DataConfig | None = None
    """Prompts for evaluation; their mean score and KL are logged as eval_score and eval_kl."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    batch_size: PositiveInt = 64
    """Prompts per rollout."""
    minibatch_size: PositiveInt = 16
    """Completions per optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Completions per forward pass; memory grows with it, results do not change. None: minibatch_size."""
    rollout_epochs: PositiveInt = 1
    """Passes over each rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("micro_batch_tokens", "max_tokens_per_batch"):
            value = getattr(self, field)
            require(value is None, field, value, "none: a rollout is split by minibatch_size and micro_batch_size")
        stale = self.sampling.engine == "server" and self.sampling.server_refresh is None
        require(not stale, "sampling.server_refresh", None, "how the server gets the weights that training changes")
        plain = self.sampling.engine != "server" or self.quantize == "none"
        require(plain, "quantize", self.quantize, "none with engine='server', which is given plain weights")
        dropout = 0.0 if self.lora is None else self.lora.dropout
        require(dropout == 0, "lora.dropout", dropout, "0: log-probs of two forward passes are compared")
        temperature = self.sampling.temperature
        require(temperature > 0, "sampling.temperature", temperature, "more than 0, to learn")
        bootstraps = self.score.missing_eos == "bootstrap"
        expected = "another value, because the job has no critic"
        require(self.has_critic or not bootstraps, "score.missing_eos", "bootstrap", expected)
        buffer, longest = self.score.overlong_buffer, self.sampling.max_new_tokens
        require(buffer <= longest, "score.overlong_buffer", buffer, f"0 to sampling.max_new_tokens={longest}")


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(OnPolicyConfig):
    """The settings of every job whose loss has the ratio of the policy to the one that sampled."""

    common: ClassVar[tuple[str, ...]] = (*OnPolicyConfig.common, "kl.coef")
    kl_choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # settings of `kl` that the job restricts

    kl: KLConfig = KLConfig()
    """The KL penalty."""
    recorded: Literal["off", "auto", "on"] = "off"
    """Use the log-probs (and a value head's values) recorded while sampling, which saves a forward pass; off recomputes
    them, so that the first ratio is exactly 1. They are compared with a forward pass once per run: if they differ, auto
    recomputes from then on and on is an error. Nothing is saved if a forward pass is needed anyway, for the full KL or
    for the update itself."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Weight each token's loss by its probability in our own forward pass over that in the sampling engine, or a whole
    completion's loss by that of the completion: for engines whose numbers differ from ours, such as a server's."""
    importance_max: Annotated[float, Bounds(above=1)] = 3.0
    """Largest importance weight; larger ones are truncated to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weighted = self.importance != "none"
        both = weighted and self.recorded != "off"
        require(not both, "importance", self.importance, "none with recorded: its ratios are to the engine")
        rescaled = self.sampling.engine == "server" and self.sampling.temperature != 1  # its log-probs are recomputed
        expected = "none with a server at a sampling.temperature other than 1"
        require(not (rescaled and weighted), "importance", self.importance, expected)
        full = self.kl.estimator == "full"
        require(self.recorded != "on" or not full, "recorded", "on", "off or auto: the full KL needs a forward pass")
        for field, choices in self.kl_choices.items():
            value = getattr(self.kl, field)
            expected = " or ".join(str(choice).lower() for choice in choices)
            require(value in choices, f"kl.{field}", value, f"{expected}, in rlhf {self.job}")
        group = max(getattr(self, "num_generations", 1), 1)
        expected = f"a multiple of num_generations={group}, because a prompt's completions stay together"
        require(self.minibatch_size % group == 0, "minibatch_size", self.minibatch_size, expected)
        named = self.kl.coef is not None or type(self).kl.coef is None
        require(named, "kl.coef", None, "a number, 0 or more")
