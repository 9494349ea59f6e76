"""Loading and saving the roles: policy, reference, reward model, value model. All are plain Hugging Face folders."""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
logger = logging.getLogger("rlhf_core.models")


def load_policy(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model to train, and its tokenizer.

    Args:
        path: a local folder or a hub name.
        dtype: of the weights. float32 unless you say otherwise, whatever the checkpoint holds: half-precision weights
            lose the small updates of fine-tuning.
        device: where to put it; a GPU if there is one.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.

    Dropout is off, as in DPO and PPO papers: a ratio of two forwards means nothing if each drops other units.
    """
    path, options = _locate(path), _hub_options(path, revision, trust_remote_code)
    model = _load(AutoModelForCausalLM, path, dtype, options)
    if gradient_checkpointing:
        _checkpoint_activations(model)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, model, path)
    return model.to(device or default_device()).train(), tokenizer


def load_reference(
    path: str | Path, *, policy_tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> PreTrainedModel:
    """A frozen policy in evaluation mode. Options as for `load_policy`.

    Raises ValueError where its token ids mean something else to `policy_tokenizer`, if that is given.
    """
    reference, tokenizer = load_policy(path, **options)
    if policy_tokenizer is not None and not same_vocabulary(tokenizer, policy_tokenizer):
        raise ValueError(f"{path}: its vocabulary is not the policy's, so their log-probs cannot be compared")
    return freeze(reference)


def load_reward_model(
    path: str | Path, *, seed: int = 0, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label: an existing one as it is, or a policy's trunk with a new score head.

    A new head is drawn from N(0, 1 / (hidden size + 1)) (Stiennon et al. 2020, arXiv:2009.01325). The config gets a pad
    token that ends no completion, because plain transformers finds the last token of a padded row by that id.
    Options as for `load_policy`.

    Raises ValueError for a classifier with another number of labels.
    """
    model, tokenizer, head_is_new = _load_scorer(path, **options)
    if head_is_new:
        weight = model.score.weight
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            weight.copy_(drawn * (weight.shape[1] + 1) ** -0.5)
    return model, tokenizer


def load_value_model(path: str | Path, **options: Any) -> PreTrainedModel:
    """A critic with its own trunk: a reward model with its score head kept, or a policy with a head that says 0.

    Options as for `load_policy`.
    """
    model, _, head_is_new = _load_scorer(path, **options)
    if head_is_new:
        nn.init.zeros_(model.score.weight)
    return model


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(_locate(path), **_hub_options(path, revision, trust_remote_code))


def freeze(model: nn.Module) -> nn.Module:
    """No gradients, evaluation mode."""
    return model.requires_grad_(False).eval()


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_model(folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A folder that plain transformers loads: weights, config, generation config, tokenizer."""
    with _quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def same_vocabulary(tokenizer: Any, other: Any) -> bool:
    """True where ids mean the same, but for a pad token that only one has: reward models are given one of their own."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    extra = {tokenizer.pad_token, other.pad_token} - (ours.keys() & theirs.keys())
    return all(token in extra for token, _ in ours.items() ^ theirs.items())


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, path: str | Path) -> None:
    """ValueError if the tokenizer knows ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"{path}: the tokenizer's largest id is {largest} but the model has {rows} embedding rows; "
            "this tokenizer does not belong to these weights"
        )


# ------------------------------------------------------------------------------------------------------------- inside


def _locate(path: str | Path) -> str:
    """A local folder, `~` written out, or a hub name. What looks like a folder is never asked for over the net."""
    name = str(Path(path).expanduser()) if isinstance(path, Path) or str(path).startswith("~") else str(path)
    looks_local = isinstance(path, Path) or name.startswith((".", "/")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise FileNotFoundError(f"no model folder at {path}")
    return name


def _hub_options(path: str | Path, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    if trust_remote_code:
        logger.warning("running code that comes with %s (trust_remote_code)", path)
    return dict(revision=revision, trust_remote_code=trust_remote_code)


def _load(auto_class: type, path: str | Path, dtype: str, options: dict[str, Any], **more: Any) -> PreTrainedModel:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    config = AutoConfig.from_pretrained(path, **options)
    for name, value in more.items():
        setattr(config, name, value)
    # Modules read their dropout from the config when they are built; afterwards the config says again what it said.
    dropouts = {name: value for name, value in vars(config).items() if "drop" in name and isinstance(value, float)}
    quiet = copy.deepcopy(config)
    for name in dropouts:
        setattr(quiet, name, 0.0)
    try:
        with _quiet_transformers():
            model = auto_class.from_pretrained(path, config=quiet, dtype=DTYPES[dtype], **options)
    except SafetensorError as error:
        raise OSError(f"{path}: its weights cannot be read ({error})") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, value in dropouts.items():
        setattr(model.config, name, value)
    return model


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """By its name in transformers 5.23, or by the one it had before, which is deprecated there."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _load_scorer(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """A one-label classifier, its tokenizer, and whether its score head is new and still has to be set."""
    path, options = _locate(path), _hub_options(path, revision, trust_remote_code)
    config = AutoConfig.from_pretrained(path, **options)
    head_is_new = not any("SequenceClassification" in name for name in config.architectures or [])
    if not head_is_new and config.num_labels != 1:
        raise ValueError(f"{path} is a classifier with {config.num_labels} labels; a reward model has one, its score")
    model = _load(AutoModelForSequenceClassification, path, dtype, options, num_labels=1)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(f"{path}: {type(model).__name__} has no linear `score` head")
    if head_is_new and model.score.bias is not None:
        nn.init.zeros_(model.score.bias)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, model, path)
    _pad_safely(model, tokenizer, _end_ids(path, revision, config, tokenizer))
    if gradient_checkpointing:
        _checkpoint_activations(model)
    return model.to(device or default_device()).train(), tokenizer, head_is_new


def _end_ids(path: str, revision: str | None, *sources: Any) -> set[int]:
    """Every id that ends a completion by one of the sources or by the folder's generation config, if it has one."""
    with contextlib.suppress(OSError):
        sources += (GenerationConfig.from_pretrained(path, revision=revision),)
    found = [getattr(source, "eos_token_id", None) for source in sources]
    return {end for ends in found for end in (ends if isinstance(ends, list) else [ends])} - {None}


def _pad_safely(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> None:
    """Pad on the right, where no position shifts, with an id that ends no completion; a new one if there is none."""
    unsafe = {None, *end_ids}
    if tokenizer.pad_token_id in unsafe:
        if tokenizer.unk_token_id not in unsafe:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.padding_side = "right"
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _quiet_transformers():
    """No bars and no report of a head that is new on purpose."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
