"""Load and save policies, references, reward models and value models, as plain Hugging Face folders."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from rlhf_core.config import LoraConfig
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.models.adapters import (
    HEADS,
    adapter_of,
    attach,
    copy_sharing_weights,
    find_adapter,
    head_tensors,
    load_adapter,
    merged,
    quantization,
    save_adapter,
    scorer_sharing_weights,
    settle_quantized,
)
from rlhf_core.models.heads import score_head
from rlhf_core.models.route import Layout, prepare
from rlhf_core.models.source import DTYPES, Quantize, Source, base_path, find_source, hub_options, locate

Module = TypeVar("Module", bound=nn.Module)


def load_policy(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    layout: Layout = "auto",
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    lora: LoraConfig | None = None,
    quantize: Quantize = "none",
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model to train, in training mode, and its tokenizer.

    Dropout is off, as in the DPO and PPO papers: the ratio of two forwards has no meaning if each drops other units.

    Args:
        path: a local folder or a hub name, of a model or of a PEFT adapter, which is put on its base and trained on.
        dtype: of the weights, whatever the checkpoint has. float32 by default: half-precision weights lose the small
            updates of fine-tuning.
        device: default: a GPU if there is one.
        layout: of sequences in a forward; see `prepare`.
        gradient_checkpointing: recompute activations in the backward pass instead of storing them.
        lora: put a new adapter on the model and train only that.
        quantize: store the weights that are not trained in 8 or 4 bits; matrix products are computed in `dtype`.
        seed: of a new adapter's first matrices.

    Raises:
        FileNotFoundError: for a local folder that does not exist.
        OSError: for weights that cannot be read.
        ValueError: for quantised weights that would have to be trained, for `lora` with a folder that has an adapter,
            for a tokenizer that does not belong to the model, and for a layout that the model does not support.
    """
    source = find_source(path, revision, trust_remote_code, dtype, quantize)
    source.check(lora)
    model = _load(AutoModelForCausalLM, source, device)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, model, path)
    model = _place(_adapt(model, source, lora, seed), device, gradient_checkpointing)
    return prepare(model, layout), tokenizer


def load_reference(
    path: str | Path,
    *,
    policy: PreTrainedModel | None = None,
    policy_tokenizer: Tokenizer | None = None,
    follows: bool = False,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    layout: Layout = "auto",
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: Quantize = "none",
) -> PreTrainedModel:
    """Load a frozen policy in evaluation mode.

    Args:
        policy: the policy that is compared with it. If that has an adapter and the same base, the reference is a copy
            that shares the base's weights. From a folder with an adapter it gets that adapter, as it was when training
            continued from it.
        policy_tokenizer: to verify that token ids mean the same to both.
        follows: the reference will be moved towards the policy, so it gets a copy of the policy's new adapter too.

    The other arguments and errors are those of `load_policy`.

    Raises:
        ValueError: also where the vocabulary is not that of `policy_tokenizer`.
    """
    source = find_source(path, revision, trust_remote_code, dtype, quantize)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    if policy_tokenizer is not None and not same_vocabulary(tokenizer, policy_tokenizer):
        raise ValueError(f"{path}: its vocabulary is not the policy's, so their log-probs cannot be compared")
    adapter = None if policy is None else adapter_of(policy)
    if policy is not None and adapter is not None and adapter.base == source.base:
        if follows and adapter.folder == source.adapter:
            return freeze(prepare(copy_sharing_weights(policy, keep_adapter=True), layout))
        model = copy_sharing_weights(policy)
    else:
        model = _load(AutoModelForCausalLM, source, device)
        check_vocabulary(tokenizer, model, path)
    model = _place(_adapt(model, source, None, 0), device, gradient_checkpointing)
    return freeze(prepare(model, layout))


def load_reward_model(
    path: str | Path,
    *,
    heads: int | None = None,
    steps: bool | None = None,
    new_head: bool = True,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    layout: Layout = "auto",
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    lora: LoraConfig | None = None,
    quantize: Quantize = "none",
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier with one label, the score, and its tokenizer: an existing one, or a policy with a new head.

    A new head is drawn from N(0, 1 / (hidden size + 1)) (Stiennon et al. 2020, arXiv:2009.01325). The config gets a pad
    token that ends no completion, because plain transformers finds the last token of a padded row by that id.

    Args:
        heads: size of an ensemble of heads on one trunk, stored as a classifier with as many labels and
            `reward_ensemble` in its config. None: as many as there are, or one new head.
        steps: True for a process reward model, a token classifier; False for a sequence classifier; None: as it is.
        new_head: accept a policy, which gets a new head. Use False to score: a new head is not trained.
        seed: of a new head and of a new adapter's first matrices.

    The other arguments and errors are those of `load_policy`.

    Raises:
        ValueError: also for a classifier of several labels that is no ensemble or has other than `heads` of them, and
            for a policy with `new_head=False`.
    """
    source = find_source(path, revision, trust_remote_code, dtype, quantize)
    source.check(lora)
    model, tokenizer, head_is_new = _load_scorer(path, source, device, heads=heads, steps=steps, new_head=new_head)
    if head_is_new:
        weight = _score_weight(model)
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            weight.copy_(drawn * (weight.shape[1] + 1) ** -0.5)
    model = _place(_adapt(model, source, lora, seed), device, gradient_checkpointing)
    return prepare(model, layout), tokenizer


def load_value_model(
    path: str | Path,
    *,
    policy: PreTrainedModel | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    layout: Layout = "auto",
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    lora: LoraConfig | None = None,
    quantize: Quantize = "none",
    seed: int = 0,
) -> PreTrainedModel:
    """Load a critic with its own trunk: a reward model with its score head, or a policy with a new head of zeros.

    Of an ensemble's heads it gets the mean.

    Args:
        policy: the policy that it is the critic of. If that has an adapter and the same base, the two share the base's
            weights.

    The other arguments and errors are those of `load_policy`; `lora` is ignored where the critic of a policy has an
    adapter of its own, which is then trained on.
    """
    source = find_source(path, revision, trust_remote_code, dtype, quantize)
    if policy is not None and source.adapter is not None:
        lora = None
    source.check(lora)
    model, _, head_is_new = _load_scorer(path, source, device, policy=policy)
    if head_is_new:
        nn.init.zeros_(model.score.weight)
    if model.config.num_labels > 1:
        model.score.weight = nn.Parameter(model.score.weight.detach().mean(0, keepdim=True))
        model.score.out_features = model.num_labels = model.config.num_labels = 1
        model.config.reward_ensemble = False
    model = _place(_adapt(model, source, lora, seed), device, gradient_checkpointing)
    return prepare(model, layout)


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder or hub name; for an adapter without one, that of its base."""
    name = locate(path)
    about = find_adapter(name, revision)
    if about is None or _has_tokenizer(name, revision):
        none = {} if about is None else {"config": PreTrainedConfig()}  # such a folder has no config.json
        return AutoTokenizer.from_pretrained(name, **none, **hub_options(path, revision, trust_remote_code))
    return load_tokenizer(base_path(name, about), revision=about.get("revision"), trust_remote_code=trust_remote_code)


def freeze(model: Module) -> Module:
    """Turn gradients off and set evaluation mode. Return the model, changed in place."""
    return model.requires_grad_(False).eval()


def without_dropout(model: Module) -> Module:
    """Set every dropout probability to 0, also in an adapter that was trained with dropout. Return the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def default_device() -> str:
    """Return "cuda" if there is a GPU, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_model(folder: str | Path, model: PreTrainedModel, tokenizer: Tokenizer, *, merge: bool = False) -> None:
    """Write a folder that plain transformers loads: weights, config, generation config, tokenizer.

    For a model with an adapter, write a PEFT folder with the adapter only; with `merge`, the model with the adapter
    merged into its weights.
    """
    with _quiet_transformers():
        if adapter_of(model) is None:
            model.save_pretrained(folder)
        elif merge:
            merged(model).save_pretrained(folder)
        else:
            save_adapter(folder, model)
        tokenizer.save_pretrained(folder)


def same_vocabulary(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Return whether all ids mean the same, except a pad token that only one has, as reward models get their own."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    extra = {tokenizer.pad_token, other.pad_token} - (ours.keys() & theirs.keys())
    return all(token in extra for token, _ in ours.items() ^ theirs.items())


def check_vocabulary(tokenizer: Tokenizer, model: PreTrainedModel, path: str | Path) -> None:
    """Raise ValueError if the tokenizer has ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"{path}: the tokenizer's largest id is {largest} but the model has {rows} embedding rows; "
            "this tokenizer does not belong to these weights"
        )


# ----------------------------------------------------------------------------------------------------------- loading


def _load(
    auto_class: Any,
    source: Source,
    device: str | torch.device | None,
    *,
    heads: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the base of a source, without dropout.

    `settings` are written into its config. `heads` are not quantised.
    """
    path, options = source.base.path, source.options
    config = AutoConfig.from_pretrained(path, **options)
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    # Modules read their dropout from the config when they are built. The saved config must be as it was.
    dropouts = {name: value for name, value in vars(config).items() if "drop" in name and isinstance(value, float)}
    quiet = copy.deepcopy(config)
    for name in dropouts:
        setattr(quiet, name, 0.0)
    if source.base.quantize != "none":
        options = options | quantization(source.base, device or default_device(), heads)
    try:
        with _quiet_transformers():
            model = auto_class.from_pretrained(path, config=quiet, dtype=DTYPES[source.base.dtype], **options)
    except SafetensorError as error:
        raise OSError(f"{path}: its weights cannot be read ({error})") from error
    without_dropout(model)
    for name, value in dropouts.items():
        setattr(model.config, name, value)
    settle_quantized(model)
    return model


def _adapt(model: PreTrainedModel, source: Source, lora: LoraConfig | None, seed: int) -> PreTrainedModel:
    """Put the source's adapter on the model, or a new one if settings for it are given."""
    if source.adapter is not None:
        return load_adapter(model, source.adapter, source.base, revision=source.revision)
    return model if lora is None else attach(model, lora, source.base, seed=seed)


def _place(model: PreTrainedModel, device: str | torch.device | None, gradient_checkpointing: bool) -> PreTrainedModel:
    """Move the model to its device and set training mode. Quantised weights are on their device since loading."""
    if gradient_checkpointing:
        _checkpoint_activations(model)
    if not getattr(model, "is_quantized", False):
        model = model.to(device or default_device())
    return model.train()


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn activation checkpointing on, by its name in transformers 5.23 or the earlier one, deprecated there."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


class _Scorer(NamedTuple):
    """A classifier of scores without its adapter, its tokenizer, and whether its head is new and not yet drawn."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head_is_new: bool


def _load_scorer(
    path: str | Path,
    source: Source,
    device: str | torch.device | None,
    *,
    heads: int | None = None,
    steps: bool | None = None,
    new_head: bool = True,
    policy: PreTrainedModel | None = None,
) -> _Scorer:
    """Load the base of a reward or value model as a classifier, with the score head of the source if it has one.

    The adapter is put on afterwards, by `_adapt`: it starts from the head as it is then.
    """
    config = AutoConfig.from_pretrained(source.base.path, **source.options)
    found = " ".join(config.architectures or [])
    saved: dict[str, Tensor] = {}
    if source.about is not None:
        saved = head_tensors(source.path, source.revision)
    if source.about is not None and saved:  # the adapter's folder has the head; the base's config does not describe it
        found = {"TOKEN_CLS": "TokenClassification"}.get(source.about["task_type"], "SequenceClassification")
        config.num_labels = len(next(iter(saved.values())))
        config.reward_ensemble = config.num_labels > 1
    head_is_new = "SequenceClassification" not in found and "TokenClassification" not in found
    labels = _check_labels(path, config, heads, head_is_new=head_is_new, new_head=new_head)
    steps = "TokenClassification" in found if steps is None else steps
    if steps and labels > 1:
        raise ValueError(f"{path} is an ensemble of {labels} score heads; a process reward model starts from one")
    kind = AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
    settings: dict[str, Any] = dict(num_labels=labels, **({"reward_ensemble": True} if labels > 1 else {}))
    adapter = None if policy is None else adapter_of(policy)
    if policy is not None and adapter is not None and adapter.base == source.base and head_is_new:
        model = scorer_sharing_weights(policy, kind, settings)
    else:
        model = _load(kind, source, device, heads=HEADS, settings=settings)
    head = score_head(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{path}: {type(model).__name__} has no linear `score` head")
    # Heads of sequence classifiers have no bias.
    bias_is_new = head_is_new or (steps and "TokenClassification" not in found)
    if head.bias is not None and bias_is_new:
        nn.init.zeros_(head.bias)
    if saved:
        head.load_state_dict({"bias": head.bias, **saved} if head.bias is not None else saved)
    tokenizer = load_tokenizer(
        path, revision=source.revision, trust_remote_code=bool(source.options["trust_remote_code"])
    )
    if source.adapter is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # for the pad token that it was saved with
    check_vocabulary(tokenizer, model, path)
    _pad_safely(model, tokenizer, _end_ids(source.base.path, source.base.revision, config, tokenizer))
    return _Scorer(model, tokenizer, head_is_new)


def _check_labels(
    path: str | Path, config: PreTrainedConfig, heads: int | None, *, head_is_new: bool, new_head: bool
) -> int:
    """Return how many score heads the model gets; ValueError for a model that cannot be the requested scorer."""
    if head_is_new and not new_head:
        raise ValueError(f"{path} is no reward model: expected one with a trained score head, as rlhf reward saves it")
    ensemble = bool(getattr(config, "reward_ensemble", False))
    if not head_is_new and config.num_labels != 1 and not ensemble:
        raise ValueError(f"{path} is a classifier with {config.num_labels} labels; a reward model has one, its score")
    labels: int = (heads or 1) if head_is_new else config.num_labels
    if heads not in (None, labels):
        raise ValueError(
            f"{path} has {labels} score heads; an ensemble of {heads} starts from a policy, or from {heads}"
        )
    return labels


def _score_weight(model: PreTrainedModel) -> Tensor:
    """Return the weight (N, H) of the score head, which `_load_scorer` has verified."""
    head = score_head(model)
    assert isinstance(head, nn.Linear)
    return head.weight


def _has_tokenizer(name: str, revision: str | None) -> bool:
    options = dict(_raise_exceptions_for_missing_entries=False, revision=revision)
    return any(cached_file(name, file, **options) for file in ("tokenizer_config.json", "tokenizer.json"))


def _end_ids(path: str, revision: str | None, *sources: Any) -> set[int]:
    """Return every id that ends a completion according to the sources or the folder's generation config, if any."""
    with contextlib.suppress(OSError):
        sources += (GenerationConfig.from_pretrained(path, revision=revision),)
    found = [getattr(source, "eos_token_id", None) for source in sources]
    return {end for ends in found for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


def _pad_safely(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> None:
    """Pad on the right, which shifts no position, with an id that ends no completion; add one if there is none."""
    unsafe = {None, *end_ids}
    if tokenizer.pad_token_id in unsafe:
        if tokenizer.unk_token_id not in unsafe:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > (embeddings := model.get_input_embeddings()).num_embeddings:
                shared = embeddings.weight  # possibly a policy's too, and transformers resizes in place
                embeddings.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.padding_side = "right"
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Show no progress bars inside, and no report of a head that is new on purpose."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
