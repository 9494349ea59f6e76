"""Loading and saving the roles: policy, reference, reward model, value model. All are plain Hugging Face folders."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from torch import nn
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
from rlhf_core.models.adapters import (
    HEADS,
    Base,
    adapter_of,
    attach,
    find_adapter,
    head_tensors,
    load_adapter,
    merged,
    quantization,
    save_adapter,
    scorer_beside,
    second_tree,
    settle_quantized,
)
from rlhf_core.models.forward import score_head

Quantize = Literal["none", "8bit", "4bit"]
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
    lora: LoraConfig | None = None,
    quantize: Quantize = "none",
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model to train, and its tokenizer.

    Args:
        path: a local folder or a hub name, of a model or of a PEFT adapter, which is put on its base and trained on.
        dtype: of the weights. float32 unless you say otherwise, whatever the checkpoint holds: half-precision weights
            lose the small updates of fine-tuning.
        device: where to put it; a GPU if there is one.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        lora: put a new adapter on it and train that alone.
        quantize: hold the weights that are not trained in so many bits; the matrix products are those of `dtype`.
        seed: of a new adapter's first matrices.

    Dropout is off, as in DPO and PPO papers: a ratio of two forwards means nothing if each drops other units.

    Raises ValueError where quantised weights would have to be trained, and for `lora` where there is an adapter.
    """
    source = _find(path, revision, trust_remote_code, dtype, quantize)
    source.check(lora)
    model = _load(AutoModelForCausalLM, source, device)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, model, path)
    return _ready(_adapt(model, source, lora, seed), device, gradient_checkpointing), tokenizer


def load_reference(
    path: str | Path,
    *,
    policy: PreTrainedModel | None = None,
    policy_tokenizer: PreTrainedTokenizerBase | None = None,
    follows: bool = False,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: Quantize = "none",
) -> PreTrainedModel:
    """A frozen policy in evaluation mode. Options as for `load_policy`, and:

    Args:
        policy: the policy that is held to it. Where that has an adapter and stands on the same base, the reference is
            a second tree of modules over the same tensors: no weight is there twice. From a folder with an adapter it
            has that one, as it was when training went on from it.
        follows: the reference will be moved towards the policy, so it gets a copy of the policy's new adapter too.

    Raises ValueError where its token ids mean something else to `policy_tokenizer`, if that is given.
    """
    source = _find(path, revision, trust_remote_code, dtype, quantize)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    if policy_tokenizer is not None and not same_vocabulary(tokenizer, policy_tokenizer):
        raise ValueError(f"{path}: its vocabulary is not the policy's, so their log-probs cannot be compared")
    adapter = adapter_of(policy) if policy is not None else None
    if adapter is not None and adapter.base == source.base:
        if follows and adapter.folder == source.adapter:
            return freeze(second_tree(policy, keep_adapter=True))
        model = second_tree(policy)
    else:
        model = _load(AutoModelForCausalLM, source, device)
        check_vocabulary(tokenizer, model, path)
    return freeze(_ready(_adapt(model, source, None, 0), device, gradient_checkpointing))


def load_reward_model(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int | None = None,
    steps: bool | None = None,
    new_head: bool = True,
    lora: LoraConfig | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with one label, the score: an existing one as it is, or a policy's trunk with a new score head.

    A new head is drawn from N(0, 1 / (hidden size + 1)) (Stiennon et al. 2020, arXiv:2009.01325). The config gets a pad
    token that ends no completion, because plain transformers finds the last token of a padded row by that id.

    Args:
        heads: an ensemble of so many on one trunk, which is a classifier with as many labels that says in its config
            that they are members of an ensemble. None: as many as there are, one where they are new.
        steps: a process reward model, which is a token classifier; False: a sequence classifier. None: as it is.
        new_head: whether a policy may be given a head. To score with one that was never trained is a mistake.
        options: as for `load_policy`.

    Raises ValueError for a classifier of several labels that is no ensemble, or has other than `heads` of them, and for
    a policy without new_head.
    """
    model, tokenizer, head_is_new, finish = _load_scorer(
        path, heads=heads, steps=steps, new_head=new_head, lora=lora, seed=seed, **options
    )
    if head_is_new:
        weight = score_head(model).weight
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            weight.copy_(drawn * (weight.shape[1] + 1) ** -0.5)
    return finish(model), tokenizer


def load_value_model(path: str | Path, *, policy: PreTrainedModel | None = None, **options: Any) -> PreTrainedModel:
    """A critic with its own trunk: a reward model with its score head kept, or a policy with a head that says 0.

    Of an ensemble's heads it keeps the mean, which is a head too. Where the `policy` has an adapter and stands on the
    same base, the two share that base's weights. Options as for `load_policy`.
    """
    model, _, head_is_new, finish = _load_scorer(path, beside=policy, **options)
    if head_is_new:
        nn.init.zeros_(model.score.weight)
    if model.config.num_labels > 1:
        model.score.weight = nn.Parameter(model.score.weight.detach().mean(0, keepdim=True))
        model.score.out_features = model.num_labels = model.config.num_labels = 1
        model.config.reward_ensemble = False
    return finish(model)


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Of a model's folder or hub name; of an adapter's, where it has none of its own, that of its base."""
    name = _locate(path)
    about = find_adapter(name, revision)
    if about is None or _has_tokenizer(name, revision):
        none = {} if about is None else {"config": PreTrainedConfig()}  # such a folder has no config.json
        return AutoTokenizer.from_pretrained(name, **none, **_hub_options(path, revision, trust_remote_code))
    return load_tokenizer(_base_of(name, about), revision=about.get("revision"), trust_remote_code=trust_remote_code)


def freeze(model: nn.Module) -> nn.Module:
    """No gradients, evaluation mode."""
    return model.requires_grad_(False).eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, in which nothing is dropped: no adapter that was trained with dropout brings it along."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_model(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, merge: bool = False
) -> None:
    """A folder that plain transformers loads: weights, config, generation config, tokenizer.

    Of a model with an adapter, a PEFT folder: the adapter alone. With `merge` it is folded into the weights instead.
    """
    with _quiet_transformers():
        if adapter_of(model) is None:
            model.save_pretrained(folder)
        elif merge:
            merged(model).save_pretrained(folder)
        else:
            save_adapter(folder, model)
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


class _Source(NamedTuple):
    """What a path stands for: weights, how they are held, and the adapter that goes on them, if the path is one's."""

    path: str
    base: Base
    options: dict[str, Any]  # for from_pretrained of the base
    about: dict[str, Any] | None  # adapter_config.json
    revision: str | None  # of the adapter

    @property
    def adapter(self) -> str | None:
        return None if self.about is None else self.path

    def check(self, lora: LoraConfig | None) -> None:
        """Before anything is loaded: whether something can be trained, and only one adapter."""
        if lora is not None and self.adapter is not None:
            raise ValueError(
                f"{self.path} is an adapter, which goes on being trained as it is: leave out the lora settings, or put "
                "a new one on its model after `rlhf merge`"
            )
        if lora is None and self.adapter is None and self.base.quantize != "none":
            raise ValueError(
                f"quantize={self.base.quantize!r}: weights in so few bits are not trained; expected lora settings "
                "beside it (such as --lora.r 16), or an adapter's folder to start from"
            )


def _find(path: str | Path, revision: str | None, trust_remote_code: bool, dtype: str, quantize: str) -> _Source:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize={quantize!r}: expected one of {', '.join(get_args(Quantize))}")
    name = _locate(path)
    about = find_adapter(name, revision)
    base_path, base_revision = (name, revision) if about is None else (_base_of(name, about), about.get("revision"))
    base = Base(
        str(Path(base_path).resolve()) if Path(base_path).is_dir() else base_path, base_revision, dtype, quantize
    )
    return _Source(name, base, _hub_options(base_path, base_revision, trust_remote_code), about, revision)


def _has_tokenizer(name: str, revision: str | None) -> bool:
    options = dict(_raise_exceptions_for_missing_entries=False, revision=revision)
    return any(cached_file(name, file, **options) for file in ("tokenizer_config.json", "tokenizer.json"))


def _base_of(adapter: str, about: dict[str, Any]) -> str:
    """Where the model is that an adapter belongs to. FileNotFoundError where it is not there."""
    base = about.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter}/adapter_config.json does not name its model: expected a base_model_name_or_path")
    try:
        return _locate(base)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{adapter} is an adapter of the model in {base}, which is not there; put it back, or write where it is "
            "now into adapter_config.json as base_model_name_or_path"
        ) from None


def _load(
    auto_class: type, source: _Source, device: str | torch.device | None, *, heads: tuple[str, ...] = (), **more: Any
) -> PreTrainedModel:
    """The base of a source. `more` is set in its config; `heads` are left as they are where it is quantised."""
    path, options = source.base.path, source.options
    config = AutoConfig.from_pretrained(path, **options)
    for name, value in more.items():
        setattr(config, name, value)
    # Modules read their dropout from the config when they are built; afterwards the config says again what it said.
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


def _adapt(model: PreTrainedModel, source: _Source, lora: LoraConfig | None, seed: int) -> PreTrainedModel:
    """With the adapter that the source has, or with a new one where settings for it are given."""
    if source.adapter is not None:
        return load_adapter(model, source.adapter, source.base, revision=source.revision)
    return model if lora is None else attach(model, lora, source.base, seed=seed)


def _ready(model: PreTrainedModel, device: str | torch.device | None, gradient_checkpointing: bool) -> PreTrainedModel:
    """In its place and in training mode. Quantised weights are where they belong since they were loaded."""
    if gradient_checkpointing:
        _checkpoint_activations(model)
    if not getattr(model, "is_quantized", False):
        model = model.to(device or default_device())
    return model.train()


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
    heads: int | None = None,
    steps: bool | None = None,
    new_head: bool = True,
    lora: LoraConfig | None = None,
    quantize: Quantize = "none",
    seed: int = 0,
    beside: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool, Callable[[PreTrainedModel], PreTrainedModel]]:
    """A classifier of scores, its tokenizer, whether its score head is new and still has to be set, and what is to be
    called on it then: it puts the adapter on, which takes the head as it is.
    """
    source = _find(path, revision, trust_remote_code, dtype, quantize)
    lora = None if beside is not None and source.adapter is not None else lora  # a critic goes on with the one it has
    source.check(lora)
    config = AutoConfig.from_pretrained(source.base.path, **source.options)
    found = " ".join(config.architectures or [])
    saved = {} if source.adapter is None else head_tensors(source.adapter, source.revision)
    if saved:  # the adapter's folder has the head, and the base says nothing of it
        found = {"TOKEN_CLS": "TokenClassification"}.get(source.about["task_type"], "SequenceClassification")
        config.num_labels = len(next(iter(saved.values())))
        config.reward_ensemble = config.num_labels > 1
    head_is_new = "SequenceClassification" not in found and "TokenClassification" not in found
    if head_is_new and not new_head:
        raise ValueError(f"{path} is no reward model: expected one with a trained score head, as rlhf reward saves it")
    ensemble = bool(getattr(config, "reward_ensemble", False))
    if not head_is_new and config.num_labels != 1 and not ensemble:
        raise ValueError(f"{path} is a classifier with {config.num_labels} labels; a reward model has one, its score")
    labels = (heads or 1) if head_is_new else config.num_labels
    if heads not in (None, labels):
        raise ValueError(
            f"{path} has {labels} score heads; an ensemble of {heads} starts from a policy, or from {heads}"
        )
    steps = "TokenClassification" in found if steps is None else steps
    if steps and labels > 1:
        raise ValueError(f"{path} is an ensemble of {labels} score heads; a process reward model starts from one")
    kind = AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
    about = dict(num_labels=labels, **({"reward_ensemble": True} if labels > 1 else {}))
    adapter = adapter_of(beside) if beside is not None else None
    if adapter is not None and adapter.base == source.base and head_is_new:
        model = scorer_beside(beside, kind, **about)
    else:
        model = _load(kind, source, device, heads=HEADS, **about)
    head = score_head(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{path}: {type(model).__name__} has no linear `score` head")
    bias_is_new = head_is_new or (steps and "TokenClassification" not in found)  # sequence classifiers have none
    if head.bias is not None and bias_is_new:
        nn.init.zeros_(head.bias)
    if saved:
        head.load_state_dict({"bias": head.bias, **saved} if head.bias is not None else saved)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    if source.adapter is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the pad token that it was saved with
    check_vocabulary(tokenizer, model, path)
    _pad_safely(model, tokenizer, _end_ids(source.base.path, source.base.revision, config, tokenizer))

    def finish(model: PreTrainedModel) -> PreTrainedModel:
        return _ready(_adapt(model, source, lora, seed), device, gradient_checkpointing)

    return model, tokenizer, head_is_new, finish


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
            if len(tokenizer) > (embeddings := model.get_input_embeddings()).num_embeddings:
                shared = embeddings.weight  # perhaps with a policy, and transformers resizes in place
                embeddings.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
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
