"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its whole family: a policy from pairs, no
reward model. ORPO, SimPO, CPO and IPO are this same loop with other defaults.

    pairs -> tokens -> PackedBatch (prompt once) -> token log-probs of policy and reference (B, T) -> loss -> AdamW

The policy starts as the reference, so the first step's sigmoid loss is ln 2; anything else means that the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.config import ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig, did_you_mean, require
from rlhf_core.control import RunningMean
from rlhf_core.data.formats import DataError
from rlhf_core.data.loader import Steps, accounts, load_examples, pack_rows, split_rows
from rlhf_core.data.tokenize import Example
from rlhf_core.losses.divergence import score_difference
from rlhf_core.losses.pairs import PreferenceLoss
from rlhf_core.losses.preference import PREFERENCE_LOSSES, preference_loss, wpo_weights
from rlhf_core.losses.registry import options_of
from rlhf_core.models.forward import device_of, pair_logprobs
from rlhf_core.models.load import load_policy, load_reference, save_model
from rlhf_core.models.routers import router_loss
from rlhf_core.ops.logprobs import use_kernels
from rlhf_core.plugins import import_module
from rlhf_core.rollout.sampling import evaluating
from rlhf_core.training.metrics import Averages
from rlhf_core.training.optim import build_optimizer, optimizer_step
from rlhf_core.training.reference import require_reference_settings, require_same_shape, update_reference
from rlhf_core.training.reference_cache import ReferenceLogprobs, cached_logprobs
from rlhf_core.training.run import Run, claim_folder

GAP_MOMENTUM = 0.9  # of beta-DPO's running mean (arXiv:2407.08639)
Rows = Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(RunConfig):
    """What the jobs share that learn from preferences without a reward model."""

    job: ClassVar[str]

    eval_data: DataConfig | None = None
    """Held-out rows; all gauges of the training rows are logged of them too, as eval_accuracy and the like."""
    reference: ModelConfig | None = None
    """The model that the policy is held to; the model to start from, if not given."""
    loss_module: str | None = None
    """A Python module of your own that registers a loss, imported first."""
    loss_options: tuple[str, ...] | None = None
    """What single losses have to be told, by the names in docs/losses.md: name:number, several with commas, such as
    gamma:0.5,nll_coef:1."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    cache_reference: Literal["auto", "on", "off"] = "auto"
    """Compute the reference's log-probs once, before the first step; auto does where examples are seen twice."""
    reference_cache: str | None = None
    """Folder for the cached log-probs, to be shared between runs; the output folder, if not given."""
    reference_update: Literal["none", "ema", "sync"] = "none"
    """Whether the reference stays as it is, follows as a moving average of the policy, or is made equal to it."""
    reference_every: int = 1
    """Steps between two updates of the reference."""
    reference_rate: float = 0.01
    """How far a moving average goes towards the policy at each update, 0 to 1."""
    router_aux_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, over the tokens of each micro-batch."""

    def __post_init__(self):
        given = self.loss_options
        if isinstance(given, dict):  # as YAML has it
            pairs = tuple(f"{name}:{value}" for name, value in given.items()) or None
            object.__setattr__(self, "loss_options", pairs)
        super().__post_init__()
        if self.loss_module is not None:
            import_module(self.loss_module)
        require_reference_settings(self)
        require(self.router_aux_coef >= 0, "router_aux_coef", self.router_aux_coef, "0 or more")
        still = self.reference_update == "none" or self.cache_reference != "on"
        require(still, "cache_reference", "on", "auto or off, because the reference moves")

    def named_losses(self, table: dict[str, PreferenceLoss], names: Sequence[str]) -> dict[str, PreferenceLoss]:
        """The entries of the table by these names; ConfigError for a name that it has not."""
        for name in names:
            if name not in table:
                known = f"one of {', '.join(sorted(table))}{did_you_mean(name, table)}"
                raise ConfigError(f"loss={name!r}: expected {known}")
        return {name: table[name] for name in names}

    def options(self, entries: dict[str, PreferenceLoss]) -> dict[str, float]:
        """`loss_options` as numbers; ConfigError for one that no loss has, and for what is no number."""
        own = set().union(*(options_of(entry.function) for entry in entries.values())) - {"beta", "label_smoothing"}
        numbers: dict[str, float] = {}
        for text in self.loss_options or ():
            name, _, value = text.partition(":")
            if name not in own:
                known = f"an option of {', '.join(entries)}: {', '.join(sorted(own)) or 'there is none'}"
                raise ConfigError(f"loss_options={text!r}: expected {known}{did_you_mean(name, own)}")
            require(name not in numbers, "loss_options", text, f"{name} once")
            try:
                numbers[name] = float(value)
            except ValueError:
                numbers[name] = math.nan
            require(math.isfinite(numbers[name]), "loss_options", text, "name:number")
        return numbers

    def needs_no_reference(self, why: str) -> None:
        """ConfigError for what is said of a reference where there is none."""
        for field, silent in (("reference", None), ("reference_update", "none"), ("reference_cache", None)):
            value = getattr(self, field)
            require(value == silent, field, getattr(value, "path", value), f"{silent}, because {why}")
        require(self.cache_reference != "on", "cache_reference", "on", f"auto or off, because {why}")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """Train a policy directly on preference pairs."""

    job: ClassVar[str] = "dpo"

    loss: tuple[str, ...] = ("sigmoid",)
    """Name of the preference loss (docs/losses.md lists them), or several with commas, which are added."""
    loss_weights: tuple[float, ...] | None = None
    """What each of several losses is multiplied by; none: 1 each."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What holds the policy to the reference, for losses that are made of the difference of two log-ratios."""
    f_alpha: float = 0.5
    """The alpha of f_divergence=alpha."""
    ld_alpha: float | None = None
    """LD-DPO: tokens of the longer completion beyond the length of the shorter one count this much, 0 to 1."""
    reference_free: bool = False
    """Take the reference to be uniform, so that none is loaded."""
    use_weighting: bool = False
    """WPO: weigh each pair by how likely the policy itself would have been to say both completions."""

    def __post_init__(self):
        super().__post_init__()
        require(len({*self.loss}) == len(self.loss), "loss", self.loss, "each of them once")
        weights, count = self.loss_weights, len(self.loss)
        require(weights is None or len(weights) == count, "loss_weights", weights, f"{count}, one for each loss")
        require(weights is None or any(weights), "loss_weights", weights, "at least one that is not 0")
        require(not self.loads_reference or not self.reference_free, "reference_free", True, "False for this loss")
        if not self.loads_reference:
            free = "reference_free is True" if self.reference_free else f"{', '.join(self.loss)} needs none"
            self.needs_no_reference(free)
        whole = not self.exact_kl or self.cache_reference != "on"
        require(whole, "cache_reference", "on", "auto or off: this loss needs the reference's whole distribution")
        alone = [name for name, entry in self.entries.items() if not entry.pair_weights]
        why = f"False, because {', '.join(alone)} looks across pairs"
        require(not (self.use_weighting and alone), "use_weighting", True, why)
        one, margin = torch.zeros(1, 1), torch.zeros(1)
        terms = dict(margin=margin, chosen_kl=one, rejected_kl=one)
        if self.use_weighting:
            terms["pair_weights"] = torch.ones(1)
        rehearse(self, **terms, **self.settings())

    @property
    def entries(self) -> dict[str, PreferenceLoss]:
        """The table's entries of the losses that were named."""
        return self.named_losses(PREFERENCE_LOSSES, self.loss)

    @property
    def exact_kl(self) -> bool:
        """Whether a loss asks for the KL of the whole distribution at each token (TDPO)."""
        return any("chosen_kl" in entry.needs for entry in self.entries.values())

    @property
    def loads_reference(self) -> bool:
        needed = any(entry.needs_reference for entry in self.entries.values()) and not self.reference_free
        return needed or self.exact_kl

    def settings(self) -> dict[str, Any]:
        """Keywords of `preference_loss` that stay the same, but for beta and label_smoothing."""
        return dict(
            weights=self.loss_weights,
            reference_free=self.reference_free,
            f_divergence=self.f_divergence,
            f_alpha=self.f_alpha,
            ld_alpha=self.ld_alpha,
            **self.options(self.entries),
        )


@dataclass(frozen=True, kw_only=True)
class IPOConfig(DPOConfig):
    """Train on preference pairs with IPO: a margin that is aimed at, not pushed for ever."""

    job: ClassVar[str] = "ipo"
    loss: tuple[str, ...] = ("ipo",)


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(DPOConfig):
    """Train on preference pairs with ORPO: fine-tuning and preference at once, from a base model, no reference."""

    job: ClassVar[str] = "orpo"
    loss: tuple[str, ...] = ("orpo",)
    beta: float = 0.1
    """Weight of the odds ratio beside the chosen completions' log-likelihood; the paper's lambda."""
    optim: OptimConfig = OptimConfig(lr=5e-6)


@dataclass(frozen=True, kw_only=True)
class SimPOConfig(DPOConfig):
    """Train on preference pairs with SimPO: mean log-probs and a target margin, without a reference."""

    job: ClassVar[str] = "simpo"
    loss: tuple[str, ...] = ("simpo",)
    loss_options: tuple[str, ...] | None = ("gamma:1.0",)
    beta: float = 2.0
    """Scale of the difference of mean log-probs; the target margin gamma is best set as a share of it, about a half."""
    optim: OptimConfig = OptimConfig(lr=6e-7, warmup_ratio=0.1)
    batch_size: int = 128


@dataclass(frozen=True, kw_only=True)
class CPOConfig(DPOConfig):
    """Train on preference pairs with CPO: DPO against a uniform reference, and the chosen completions' likelihood."""

    job: ClassVar[str] = "cpo"
    loss: tuple[str, ...] = ("cpo",)
    loss_options: tuple[str, ...] | None = ("nll_coef:1.0",)
    beta: float = 0.1
    """Scale of the difference of log-probs."""


def rehearse(config: Any, **more: Any) -> None:
    """The loss on two numbers, so that a setting it would refuse is refused before anything is loaded."""
    one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    pair = dict(chosen_logprobs=one, rejected_logprobs=one, chosen_mask=mask, rejected_mask=mask)
    pair |= dict(ref_chosen_logprobs=one, ref_rejected_logprobs=one)
    try:
        preference_loss(config.loss, **pair, beta=config.beta, label_smoothing=config.label_smoothing, **more)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def train(config: DPOConfig) -> dict[str, float]:
    """Run to the end; the policy is saved in `config.output`. Returns the last evaluation's metrics."""
    claim_folder(config)
    torch.manual_seed(config.seed)
    loading = dict(device=config.device, lora=config.lora, quantize=config.quantize, seed=config.seed)
    policy, tokenizer = load_policy(config.model.path, **loading, **config.model.options())
    examples = load_examples(config.data, tokenizer, need="preference", model=policy)
    held_out = load_examples(config.eval_data, tokenizer, need="preference", model=policy) if config.eval_data else []
    optimizer = build_optimizer([policy], config.optim)
    steps = Steps(examples, config)
    total_steps = steps.total
    reference, cache = None, None
    if config.loads_reference:
        reference = load_held_to(config, policy, tokenizer)
        reference, cache = cache_if_it_pays(config, reference, examples, held_out, total_steps, keep=config.exact_kl)
    modules = {"policy": policy} | ({"reference": reference} if config.reference_update != "none" else {})
    running = running_means(config)
    across_pairs = any(entry.across_pairs for entry in config.entries.values())
    evaluation: dict[str, float] = {}

    def pairs_of(rows: Rows) -> dict[str, Tensor]:
        """What `preference_loss` is given of these rows: log-probs of policy and reference, masks, weights, margins."""
        batch = pack_rows(rows)
        asked = dict(kl=config.exact_kl, agreement=config.use_weighting)
        pairs = pair_logprobs(policy, reference, batch, layout=config.model.layout, **asked)
        if cache is not None:
            ref_logprobs = batch.to(device_of(policy)).scatter(cache.of(rows))
            pairs |= dict(ref_chosen_logprobs=ref_logprobs[0::2], ref_rejected_logprobs=ref_logprobs[1::2])
        return pairs | row_terms(rows, pairs, config)

    first_look = torch.no_grad()(pairs_of)

    def loss_of(pairs: dict[str, Tensor], **normalizers: float) -> tuple[Tensor, dict[str, Tensor]]:
        held = {name: mean.mean for name, mean in running.items()}
        settings = dict(beta=config.beta, label_smoothing=config.label_smoothing, **config.settings(), **held)
        loss, stats = preference_loss(config.loss, **pairs, **settings, **normalizers)
        return loss, stats | remembered_gauges(pairs, running, config)

    def losses(rows: Rows) -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
        """Each micro-batch's part of the loss over all rows, its stats, and its share of them."""
        parts = split_rows(rows, config)
        normalizers = dict(normalizer=sum(row.weight for row in rows), token_normalizer=chosen_tokens(rows))
        joint = None
        if across_pairs and len(parts) > 1:
            joint = joint_loss([first_look(part) for part in parts], loss_of, normalizers)
        for number, part in enumerate(parts):
            share = len(part) / len(rows)
            with router_loss(policy, config.router_aux_coef) as router:
                pairs = pairs_of(part)
            loss, stats = loss_of(pairs, **normalizers) if joint is None else joint.part(number, pairs, share)
            if joint is None:  # of each loss of a mix, as of their sum, this is the part that these rows have
                stats |= {name: stats[name] / share for name in stats if name.startswith("loss_")}
            stats = {"loss": loss.detach() / share, **stats}
            if config.router_aux_coef:
                stats["router_loss"] = router.value.detach()
            yield loss + router.term(share), stats, share

    def write(folder: Path) -> None:
        save_model(folder, policy, tokenizer)

    kept = dict(modules=modules, optimizer=optimizer, controllers=running)
    run = Run(config.job, config, total_steps, **kept, write=write, about={"data": accounts(examples)})
    with run:
        for step in run.steps():
            rows = steps.rows(step)
            averages = Averages()
            for loss, stats, share in losses(rows):
                loss.backward()
                averages.add(stats, weight=share)
            metrics = averages.means() | optimizer_step(optimizer, config.optim, step, total_steps)
            if held_out and run.evaluate_now(step):
                evaluation = evaluate(policy, held_out, losses)
                metrics |= evaluation
            run.log(step, metrics, show=("loss", "accuracy", "eval_accuracy"))
            for name, mean in running.items():
                mean.update(metrics[REMEMBERED[name][1]], len(rows))
            update_reference(reference, policy, step, config)
        run.save(summary=evaluation)
    return evaluation


@torch.no_grad()
def evaluate(policy: nn.Module, examples: Rows, losses: Callable) -> dict[str, float]:
    """The training gauges over held-out rows."""
    averages = Averages()
    with evaluating(policy):
        for _, stats, share in losses(examples):
            averages.add(stats, weight=share)
    return {f"eval_{name}": value for name, value in averages.means().items()}


# -------------------------------------------------------------------------------------------------------- the reference


def load_held_to(config: PreferenceConfig, policy: nn.Module, tokenizer: Any) -> nn.Module:
    """The model that the policy is held to."""
    source, moves = config.reference or config.model, config.reference_update != "none"
    options = dict(device=config.device, quantize=config.quantize, **source.options())
    reference = load_reference(source.path, policy=policy, policy_tokenizer=tokenizer, follows=moves, **options)
    if moves:
        require_same_shape(reference, policy, config)
    return reference


def cache_if_it_pays(
    config: PreferenceConfig, reference: nn.Module, examples: Rows, held_out: Rows, total_steps: int, *, keep: bool
) -> tuple[nn.Module | None, ReferenceLogprobs | None]:
    """The reference and no cache, or a cache and no reference; `keep` where the loss must ask the reference itself."""
    once = Steps(examples, replace(config, epochs=1.0, max_steps=None)).total  # what filling the cache costs
    pays = total_steps > once and not keep and config.reference_update == "none"
    if not {"on": True, "off": False, "auto": pays}[config.cache_reference]:
        return reference, None
    folder = Path(config.reference_cache or Path(config.output, "reference_logprobs"))
    size = config.micro_batch_size or config.batch_size
    with use_kernels(config.kernels):
        sets = *getattr(examples, "parts", [examples]), *getattr(held_out, "parts", [held_out])
        cache = cached_logprobs(reference, *sets, folder=folder, batch_size=size, layout=config.model.layout)
    return reference if keep else None, cache


# ------------------------------------------------------------------------------------------------ what losses are given


def row_terms(rows: Rows, pairs: dict[str, Tensor], config: DPOConfig) -> dict[str, Tensor]:
    """`pair_weights`, from the rows and from WPO, and the rows' `margin`; (B,) each, where the losses know of them.

    Takes the statistics that WPO needs out of `pairs`. Raises DataError for a row that a loss can do nothing with.
    """
    terms: dict[str, Tensor] = {}
    device = pairs["chosen_logprobs"].device
    alone = [name for name, entry in config.entries.items() if not entry.pair_weights]
    if not alone:
        terms["pair_weights"] = torch.tensor([row.weight for row in rows], device=device)
    for row in rows if alone else ():
        if row.weight != 1:
            raise DataError(f"{row.record.source}: its weight is not 1, which the loss {alone[0]!r} cannot honour")
    if config.use_weighting:
        for side in ("chosen", "rejected"):
            agreement = pairs.pop(f"{side}_log_sum_sq_probs")
            weights = wpo_weights(pairs[f"{side}_logprobs"], agreement, pairs[f"{side}_mask"])
            terms["pair_weights"] = terms["pair_weights"] * weights
    scored = [name for name, entry in config.entries.items() if "margin" in entry.needs]
    for row in rows if scored else ():
        if row.margin is None:
            raise DataError(
                f"{row.record.source}: no margin, which the loss {scored[0]!r} needs; expected a column margin, or "
                "score_chosen and score_rejected"
            )
    if scored:
        terms["margin"] = torch.tensor([row.margin for row in rows], device=device)
    return terms


def chosen_tokens(rows: Rows) -> float:
    """Tokens of the chosen completions that a loss counts, each as often as its row's weight says."""
    flags = (row.completions[0] if row.supervised is None else row.supervised[0] for row in rows)
    learned = (len(each) if row.supervised is None else sum(each) for row, each in zip(rows, flags, strict=True))
    return sum(row.weight * count for row, count in zip(rows, learned, strict=True))


REMEMBERED = {"gap_mean": ("beta_dpo", "gap"), "delta": ("bco_pair", "reward")}
"""Options that are means over earlier steps: of which loss, and the gauge of a step that goes into each."""


def running_means(config: DPOConfig) -> dict[str, RunningMean]:
    """What the losses want remembered, by the option that it is given as: none that `loss_options` holds fixed."""
    kinds = {"gap_mean": RunningMean(GAP_MOMENTUM), "delta": RunningMean()}
    fixed = config.options(config.entries)
    return {name: mean for name, mean in kinds.items() if REMEMBERED[name][0] in config.loss and name not in fixed}


@torch.no_grad()
def remembered_gauges(
    pairs: dict[str, Tensor], running: dict[str, RunningMean], config: DPOConfig
) -> dict[str, Tensor]:
    """`gap`, the mean difference of the pairs' log-ratios, and `reward`, the mean of both sides' beta * log-ratio."""
    if not running:
        return {}
    ratios = []
    shorter = torch.minimum(*(pairs[f"{side}_mask"].sum(-1) for side in ("chosen", "rejected")))
    for side in ("chosen", "rejected"):
        logprobs = pairs[f"{side}_logprobs"]
        ratio = logprobs if config.reference_free else logprobs - pairs[f"ref_{side}_logprobs"]
        mask = pairs[f"{side}_mask"]
        ratio = torch.where(mask, ratio, 0.0)
        if config.ld_alpha is not None:
            ratio = torch.where(mask.cumsum(-1) <= shorter[:, None], ratio, config.ld_alpha * ratio)
        ratios.append(ratio.sum(-1))
    gap = score_difference(*ratios, divergence=config.f_divergence, alpha=config.f_alpha).mean()
    gauges = {"gap": gap, "reward": config.beta * (ratios[0] + ratios[1]).mean() / 2}
    return {gauge: gauges[gauge] for name, (_, gauge) in REMEMBERED.items() if name in running}


# ---------------------------------------------------------------------------------------- losses that look across pairs

SLOPED = ("chosen_logprobs", "rejected_logprobs", "chosen_kl", "rejected_kl")
"""What of a pair carries a gradient."""


@dataclass(frozen=True)
class JointLoss:
    """The loss of several micro-batches together: its value, its stats, and its slope at every log-prob of each."""

    loss: Tensor
    stats: dict[str, Tensor]
    slopes: list[dict[str, Tensor]]

    def part(self, number: int, pairs: dict[str, Tensor], share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What of the loss is this micro-batch's, with the gradient that its own log-probs carry back."""
        slopes = self.slopes[number]
        carrier = torch.stack([(pairs[name] * slope).sum() for name, slope in slopes.items()]).sum()
        return carrier - carrier.detach() + self.loss * share, self.stats


def joint_loss(pieces: list[dict[str, Tensor]], loss_of: Callable, normalizers: dict[str, float]) -> JointLoss:
    """A loss that looks across pairs, of all micro-batches of a step, in the memory of one.

    The log-probs of all come first, without a graph. The loss of them has a slope at each log-prob. Every micro-batch
    is then run again and carries its slopes back into the weights: by the chain rule, the gradient of the whole.
    """
    whole = side_by_side(pieces)
    inputs = {name: whole[name].requires_grad_() for name in SLOPED if name in whole}
    with torch.enable_grad():
        loss, stats = loss_of(whole, **normalizers)
    found = torch.autograd.grad(loss, [*inputs.values()], allow_unused=True)
    by_name = {name: slope for name, slope in zip(inputs, found, strict=True) if slope is not None}
    slopes, start = [], 0
    for piece in pieces:
        end = start + len(piece["chosen_mask"])
        slopes.append({name: slope[start:end, : piece[name].shape[1]] for name, slope in by_name.items()})
        start = end
    return JointLoss(loss.detach(), stats, slopes)


def side_by_side(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The pairs of all pieces as one: (B, T) tensors padded to a common T, (B,) ones as they are."""
    whole = {}
    for name in pieces[0]:
        tensors = [piece[name] for piece in pieces]
        if tensors[0].ndim == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        whole[name] = torch.cat(tensors)
    return whole
