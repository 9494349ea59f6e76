"""LoRA adapters through PEFT: put on, read, written, folded in, and a second model over the same base weights.

    y = W x + (alpha / r) B A x         A (r, in) drawn at random, B (out, r) zero, W as it was (arXiv:2106.09685)

PEFT's layers are put into the model in place, so it stays the transformers model that everything else here knows, and
PEFT's own wrapper is kept beside it, for the files. Nothing is ever switched on and off: the model without its adapter
is a second tree of modules whose parameters are the same tensors (`second_tree`). docs/lora.md says it slowly.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf_core.config import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # PEFT's own for the one adapter of a model
HEADS = ("score", "classifier")  # a classifier's, by the names that families give it
_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


@dataclass(frozen=True)
class Base:
    """Which weights a model stands on, and how they are held. Two models with equal ones may share them."""

    path: str
    revision: str | None
    dtype: str
    quantize: str


class Adapter:
    """What a model with an adapter carries beside it: PEFT's wrapper, the base, and where the adapter was read."""

    def __init__(self, wrapper: Any, base: Base, folder: str | None):
        self.wrapper, self.base, self.folder = wrapper, base, folder

    @property
    def config(self) -> Any:
        """PEFT's LoraConfig."""
        return self.wrapper.peft_config[_NAME]


def adapter_of(model: nn.Module) -> Adapter | None:
    """None for a model that has none."""
    return getattr(model, "_rlhf_adapter", None)


def is_adapter_key(name: str) -> bool:
    """Whether a name in a state_dict is an adapter's, and no weight of the base."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter consists of, modules that are trained whole included, by its names in the model's state_dict."""
    return _unshared({name: tensor for name, tensor in model.state_dict().items() if is_adapter_key(name)})


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What `adapter_tensors` gave, put back in place. ValueError where it is another adapter's."""
    own = {name: tensor for name, tensor in model.state_dict().items() if is_adapter_key(name)}
    shapes, saved = ({name: tensor.shape for name, tensor in each.items()} for each in (own, tensors))
    if shapes != saved:
        raise ValueError(f"{len(saved)} tensors of an adapter do not fit the {len(shapes)} of this one")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


# ------------------------------------------------------------------------------------------------------ onto a model


def attach(model: PreTrainedModel, lora: LoraConfig, base: Base, *, seed: int) -> PreTrainedModel:
    """Put a new adapter on the model, which then trains nothing else. Returns the model, changed in place.

    The matrices A follow from the seed, B are zero: the model says what it said.

    Raises ValueError where a name in the settings is no module of the model.
    """
    peft = import_peft()
    ties = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    config = peft.LoraConfig(
        task_type=_task(model),
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules is None else list(lora.target_modules),
        modules_to_save=None if lora.modules_to_save is None else list(lora.modules_to_save),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        ensure_weight_tying=ties and lora.modules_to_save is not None,
    )
    names = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "modules_to_save"):
        for wanted in getattr(lora, field) or ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                raise ValueError(
                    f"lora.{field}: {type(model).__name__} has no module {wanted!r}; it has {_kinds(model)}"
                )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _wrap(peft, model, config, base)


def load_adapter(model: PreTrainedModel, folder: str, base: Base, *, revision: str | None = None) -> PreTrainedModel:
    """Put the adapter of a PEFT folder (or hub name) on the model it belongs to, ready to be trained on.

    On a sequence classifier it may be the adapter of a language model: the score head is then new, and trained with it.

    Raises ValueError for what is no LoRA, and for one that does not fit the model.
    """
    peft = import_peft()
    config = peft.PeftConfig.from_pretrained(folder, revision=revision)
    if config.peft_type != "LORA" or config.bias != "none":
        found = f"{getattr(config.peft_type, 'value', config.peft_type)}, bias={getattr(config, 'bias', 'none')}"
        raise ValueError(f"{folder}: expected a LoRA adapter without trained biases, found {found}")
    config.inference_mode, config.task_type = False, _task(model)
    with torch.random.fork_rng(devices=[]):  # drawn only to be written over
        _wrap(peft, model, config, base, folder)
    wrapper = adapter_of(model).wrapper
    ours, saved = _file_tensors(wrapper), _read(peft, folder, revision)
    heads = {name for name in ours if _is_head(name)}  # already in the model, and copied from there
    missing, unknown = ours.keys() - heads - saved.keys(), saved.keys() - ours.keys() - {*filter(_is_head, saved)}
    if missing or unknown:
        raise ValueError(
            f"{folder}: this adapter does not fit {base.path}: {len(missing)} of its {len(ours)} tensors are missing "
            f"and {len(unknown)} are unknown (such as {min(missing | unknown)})"
        )
    for name, tensor in saved.items():
        if not _is_head(name) and ours[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, but {base.path} needs {tuple(ours[name].shape)}"
            raise ValueError(f"{folder}: {name} is {shapes}")
    peft.set_peft_model_state_dict(wrapper, {name: ours[name] if name in heads else saved[name] for name in ours})
    return model


def _wrap(peft: Any, model: PreTrainedModel, config: Any, base: Base, folder: str | None = None) -> PreTrainedModel:
    whole = {*(config.modules_to_save or ())} - {*HEADS}
    whole |= {name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)}
    config.modules_to_save = sorted(whole) or None
    kind = {"CAUSAL_LM": peft.PeftModelForCausalLM}.get(
        config.task_type, peft.PeftModel
    )  # others name heads of their own
    with warnings.catch_warnings(action="ignore"):  # it asks transformers by names that are older than both
        wrapper = kind(model, config)
    config.modules_to_save = sorted(whole) or None  # for the file as it was: PEFT names what is tied another way
    config.base_model_name_or_path, config.revision = base.path, base.revision
    model._rlhf_adapter = Adapter(wrapper, base, folder)
    return model


def _task(model: PreTrainedModel) -> str:
    found = [task for ending, task in _TASKS.items() if ending in type(model).__name__]
    return found[0] if found else "CAUSAL_LM"


def _is_head(name: str) -> bool:
    """Whether it is a tensor of a classifier's head, by its name in an adapter's file."""
    return name.startswith(tuple(f"base_model.model.{head}." for head in HEADS))


def _kinds(model: nn.Module) -> str:
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    return ", ".join(sorted(names))


def _file_tensors(wrapper: nn.Module) -> dict[str, Tensor]:
    """The adapter by the names it has in PEFT's files."""
    return import_peft().get_peft_model_state_dict(wrapper, save_embedding_layers=False)


# ---------------------------------------------------------------------------------------------------- beside a model


def second_tree(model: nn.Module, *, keep_adapter: bool = False) -> nn.Module:
    """The model without its adapter (or with a copy of it), as modules of its own over the very same base tensors.

    Nothing but the adapter's copy takes memory, and what one of the two is told (its mode, its hooks, its attention
    function) the other does not hear. Only what no one trains may be shared: an adapter must be on the model.
    """
    assert adapter_of(model) is not None
    memo: dict[int, Any] = {id(tensor): tensor for name, tensor in _tensors(model) if not is_adapter_key(name)}
    for module in model.modules():  # scales and the like, which bitsandbytes keeps beside its weights
        for beside in (getattr(module, "quant_state", None), getattr(module, "state", None)):
            if type(beside).__module__.startswith("bitsandbytes"):
                memo[id(beside)] = beside
    tree = copy.deepcopy(model, memo)
    if hasattr(tree, "disable_input_require_grads"):  # a hook of activation checkpointing
        tree.disable_input_require_grads()
    if not keep_adapter:
        _drop(tree)
    return tree


def scorer_beside(policy: PreTrainedModel, kind: Any, **about: Any) -> PreTrainedModel:
    """A classifier on a second tree of the policy's trunk, without its adapter; the head is new and says 0.

    Args:
        kind: transformers' auto class of it. about: what its config says that the policy's does not.
    """
    tree = second_tree(policy)
    for name, value in about.items():
        setattr(tree.config, name, value)
    with torch.device("meta"):
        scorer = kind.from_config(tree.config)
    trunk = tree.base_model
    setattr(scorer, scorer.base_model_prefix, trunk)
    scorer.config = tree.config
    for name in HEADS:
        if isinstance(head := getattr(scorer, name, None), nn.Linear):
            first = next(trunk.parameters())
            head.to_empty(device=first.device).to(getattr(torch, adapter_of(policy).base.dtype))
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
    for name in ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method", "hf_quantizer"):
        if hasattr(tree, name):
            setattr(scorer, name, getattr(tree, name))
    return scorer


def merged(model: nn.Module) -> nn.Module:
    """The model with its adapter folded into the weights, W + (alpha / r) B A: plain modules again, a new tree.

    Weights that have no adapter are shared with the model, the others are copies.

    Raises ValueError for a quantised model, whose weights cannot hold the sum.
    """
    adapter = adapter_of(model)
    if adapter.base.quantize != "none":
        raise ValueError(
            f"weights held in {adapter.base.quantize} cannot take an adapter in; load the folder with quantize=none"
        )
    tree = second_tree(model, keep_adapter=True)
    for module in [*tree.modules()]:
        if hasattr(module, "base_layer"):  # to be changed, so no longer shared, nor tied to what has no adapter
            plain = module.base_layer
            plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    wrapper = adapter_of(tree).wrapper
    del tree._rlhf_adapter
    with warnings.catch_warnings(action="ignore"):  # it says that it notes in the config what is no longer tied
        return wrapper.merge_and_unload(safe_merge=True)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _drop(tree: nn.Module) -> None:
    """Put back what the adapter's modules stand for. PEFT's own `unload` would keep those that are trained whole."""
    for name, module in [*tree.named_modules()]:
        plain = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if plain is not None and not is_adapter_key(name):
            tree.set_submodule(name, plain)
    del tree.peft_config, tree._rlhf_adapter


# ------------------------------------------------------------------------------------------------------------- files


def find_adapter(path: str, revision: str | None) -> dict[str, Any] | None:
    """The settings in a folder or hub name with an adapter, None where there is none."""
    file = find_adapter_config_file(path, revision=revision)
    return None if file is None else json.loads(Path(file).read_text())


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files take them: of tensors that are one, such as tied embeddings, the second and later ones copied."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return apart


def head_tensors(folder: str, revision: str | None) -> dict[str, Tensor]:
    """{"weight": ...} of the classifier's head that was saved with an adapter; empty where there is none."""
    saved = _read(import_peft(), folder, revision)
    return {name.rpartition(".")[2]: tensor for name, tensor in saved.items() if _is_head(name)}


def _read(peft: Any, folder: str, revision: str | None) -> dict[str, Tensor]:
    try:
        return peft.load_peft_weights(folder, device="cpu", revision=revision)
    except SafetensorError as error:
        raise OSError(f"{folder}: its adapter cannot be read ({error})") from error


def base_of(folder: str) -> str | None:
    """Where the model is that the adapter in a local folder belongs to; None where there is no adapter."""
    return (find_adapter(folder, None) or {}).get("base_model_name_or_path")


def save_adapter(folder: str | Path, model: PreTrainedModel) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT reads them, and the generation config."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = copy.copy(adapter_of(model).config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    save_file(_unshared(_file_tensors(adapter_of(model).wrapper)), Path(folder) / WEIGHTS, metadata={"format": "pt"})
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def about_adapter(model: nn.Module) -> dict[str, Any] | None:
    """What of an adapter its tensors do not say, for what hangs on it; None for a model without one."""
    adapter = adapter_of(model)
    if adapter is None:
        return None
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
    return {name: getattr(adapter.config, name) for name in names}


# ------------------------------------------------------------------------------------------------- what must be there


def import_peft() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says which kernels it has not found
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapters need PEFT: pip install 'rlhf-core[lora]' ({error})") from None
    return peft


# ---------------------------------------------------------------------------------------------------- in 8 and 4 bits


def quantization(base: Base, device: str | torch.device, heads: tuple[str, ...]) -> dict[str, Any]:
    """Keywords for from_pretrained: bitsandbytes' 8 bits, or 4 bits of kind nf4 with quantised scales (QLoRA).

    `heads` are left as they are; without any, transformers leaves the LM head.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(f"quantize={base.quantize!r}: pip install 'rlhf-core[quantize]' ({error})") from None
    config = BitsAndBytesConfig(
        load_in_8bit=base.quantize == "8bit",
        load_in_4bit=base.quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, base.dtype),
        llm_int8_skip_modules=[*heads] or None,
    )
    return dict(quantization_config=config, device_map={"": torch.device(device)})


def settle_quantized(model: nn.Module) -> None:
    """One forward for training and for evaluation alike, and for every batch, or the first ratio would not be 1.

    bitsandbytes has others where no gradient is wanted: in 8 bits the activations are rounded as well, by scales that
    hang on what else is in the batch, and in 4 bits some processors multiply in bfloat16. Here weights alone are in few
    bits; a layer's are unpacked when it runs, and again in the backward pass.

    Raises ValueError for a layer that bitsandbytes gets wrong.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            about, device = module.weight.quant_state, module.weight.device.type
            if device == "cpu" and about.shape[-1] % about.blocksize:
                raise ValueError(
                    f"quantize='4bit': {name} has {about.shape[-1]} inputs; expected a multiple of {about.blocksize} "
                    "on the CPU, where bitsandbytes unpacks others wrongly. quantize=8bit can hold it"
                )
        if type(module).__name__ == "Linear8bitLt":
            module.init_8bit_state()
            module.__class__ = _steady_eight_bit(type(module))


@functools.cache
def _steady_eight_bit(kind: type) -> type:
    from bitsandbytes.autograd._functions import MatMul8bitFp

    def forward(self, states: Tensor) -> Tensor:
        return MatMul8bitFp.apply(states, self.weight, None, self.bias, self.state)

    return type("SteadyLinear8bit", (kind,), {"forward": forward})
