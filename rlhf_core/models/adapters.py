"""LoRA adapters through PEFT: attach, read, write and merge them, and copy a model without copying its base weights.

    y = W x + (alpha / r) B A x         A (r, in) random, B (out, r) zero at first, W unchanged (arXiv:2106.09685)

PEFT's layers are put into the model in place, so its class stays that of transformers; PEFT's own wrapper is kept for
reading and writing files. Adapters are never switched off and on: the model without its adapter is another tree of
modules whose parameters are the same tensors (`copy_sharing_weights`). See docs/lora.md.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import warnings
from collections.abc import Mapping
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
from rlhf_core.models.route import forget_route

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # PEFT's name for a model's only adapter
HEADS = ("score", "classifier")  # names that families give a classifier's head
_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


@dataclass(frozen=True)
class Base:
    """Which weights an adapter is for, and how they are stored. Models with equal bases can share the weights."""

    path: str
    revision: str | None
    dtype: str
    quantize: str


class Adapter:
    """What is kept on a model with an adapter: PEFT's wrapper, the base, and the folder the adapter was read from."""

    def __init__(self, wrapper: Any, base: Base, folder: str | None) -> None:
        self.wrapper, self.base, self.folder = wrapper, base, folder

    @property
    def config(self) -> Any:
        """PEFT's LoraConfig."""
        return self.wrapper.peft_config[_NAME]


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter on a model, None where there is none."""
    return getattr(model, "_rlhf_adapter", None)


def is_adapter_key(name: str) -> bool:
    """Return whether a name in a state_dict belongs to the adapter, not to the base."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors, fully trained modules included, by their names in the model's state_dict."""
    return _unshared({name: tensor for name, tensor in model.state_dict().items() if is_adapter_key(name)})


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the result of `adapter_tensors` into the model's adapter. Raises ValueError where names or shapes differ."""
    own = {name: tensor for name, tensor in model.state_dict().items() if is_adapter_key(name)}
    shapes, saved = ({name: tensor.shape for name, tensor in each.items()} for each in (own, tensors))
    if shapes != saved:
        raise ValueError(f"{len(saved)} tensors of an adapter do not fit the {len(shapes)} of the model's adapter")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


# ---------------------------------------------------------------------------------------------------------- attaching


def attach(model: PreTrainedModel, lora: LoraConfig, base: Base, *, seed: int) -> PreTrainedModel:
    """Put a new adapter on the model and freeze everything else. Return the model, changed in place.

    The matrices A depend on the seed only, B are zero: outputs do not change. A prepared model must be prepared again.

    Raises:
        ValueError: for a name in the settings that is no module of the model.
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
    """Put the adapter of a PEFT folder (or hub name) on its base model, trainable. Return the model, changed in place.

    On a sequence classifier it may be the adapter of a language model: the score head is then new, and trained with it.
    A prepared model must be prepared again.

    Raises:
        ValueError: for an adapter that is no LoRA or does not fit the model.
        OSError: for one that cannot be read.
    """
    peft = import_peft()
    config = peft.PeftConfig.from_pretrained(folder, revision=revision)
    if config.peft_type != "LORA" or config.bias != "none":
        found = f"{getattr(config.peft_type, 'value', config.peft_type)}, bias={getattr(config, 'bias', 'none')}"
        raise ValueError(f"{folder}: expected a LoRA adapter without trained biases, found {found}")
    config.inference_mode, config.task_type = False, _task(model)
    with torch.random.fork_rng(devices=[]):  # drawn, then overwritten
        _wrap(peft, model, config, base, folder)
    wrapper = _require_adapter(model).wrapper
    ours, saved = _file_tensors(wrapper), _read(peft, folder, revision)
    heads = {name for name in ours if _is_head(name)}  # they are in the model already
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
    """Put PEFT's layers into the model and keep the wrapper on it. The score head, if any, is trained fully."""
    fully_trained = {*(config.modules_to_save or ())} - {*HEADS}
    fully_trained |= {name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)}
    config.modules_to_save = sorted(fully_trained) or None
    # PEFT's classes for classifiers would add heads of their own.
    kind = {"CAUSAL_LM": peft.PeftModelForCausalLM}.get(config.task_type, peft.PeftModel)
    with warnings.catch_warnings(action="ignore"):  # PEFT reads deprecated attributes of transformers
        wrapper = kind(model, config)
    config.modules_to_save = sorted(fully_trained) or None  # PEFT has replaced the names of tied modules
    config.base_model_name_or_path, config.revision = base.path, base.revision
    model._rlhf_adapter = Adapter(wrapper, base, folder)
    forget_route(model)
    return model


def _require_adapter(model: PreTrainedModel) -> Adapter:
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError(f"{type(model).__name__}: expected a model with an adapter")
    return adapter


def _task(model: PreTrainedModel) -> str:
    found = [task for ending, task in _TASKS.items() if ending in type(model).__name__]
    return found[0] if found else "CAUSAL_LM"


def _is_head(name: str) -> bool:
    """Return whether a name in an adapter's file belongs to a classifier's head."""
    return name.startswith(tuple(f"base_model.model.{head}." for head in HEADS))


def _kinds(model: nn.Module) -> str:
    """Return the names of the model's linear layers, for an error message."""
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    return ", ".join(sorted(names))


def _file_tensors(wrapper: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names in PEFT's files."""
    tensors: dict[str, Tensor] = import_peft().get_peft_model_state_dict(wrapper, save_embedding_layers=False)
    return tensors


# ------------------------------------------------------------------------------------------------------ sharing weights


def copy_sharing_weights(model: PreTrainedModel, *, keep_adapter: bool = False) -> PreTrainedModel:
    """Copy a model with an adapter: new modules over the same base tensors, without the adapter or with a copy of it.

    Only the adapter's copy takes memory. Modes, hooks and the attention implementation of the two are independent. The
    copy must be prepared.

    Raises:
        ValueError: for a model without an adapter, whose weights may be trained and so cannot be shared.
    """
    _require_adapter(model)
    memo: dict[int, Any] = {id(tensor): tensor for name, tensor in _tensors(model) if not is_adapter_key(name)}
    for module in model.modules():  # scales and the like, which bitsandbytes stores beside its weights
        for state in (getattr(module, "quant_state", None), getattr(module, "state", None)):
            if type(state).__module__.startswith("bitsandbytes"):
                memo[id(state)] = state
    duplicate = copy.deepcopy(model, memo)
    forget_route(duplicate)
    if hasattr(duplicate, "disable_input_require_grads"):  # a hook of activation checkpointing
        duplicate.disable_input_require_grads()
    if not keep_adapter:
        _remove_adapter(duplicate)
    return duplicate


def scorer_sharing_weights(policy: PreTrainedModel, kind: Any, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Return a classifier that shares the weights of the policy's trunk, without its adapter; the new head is zero.

    Args:
        kind: transformers' auto class of the classifier. settings: what its config has that the policy's has not.
    """
    dtype = getattr(torch, _require_adapter(policy).base.dtype)
    duplicate = copy_sharing_weights(policy)
    for name, value in settings.items():
        setattr(duplicate.config, name, value)
    with torch.device("meta"):
        scorer = kind.from_config(duplicate.config)
    trunk = duplicate.base_model
    setattr(scorer, scorer.base_model_prefix, trunk)
    scorer.config = duplicate.config
    for name in HEADS:
        if isinstance(head := getattr(scorer, name, None), nn.Linear):
            head.to_empty(device=next(trunk.parameters()).device).to(dtype)
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
    for name in ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method", "hf_quantizer"):
        if hasattr(duplicate, name):
            setattr(scorer, name, getattr(duplicate, name))
    return scorer


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model with its adapter merged into the weights, W + (alpha / r) B A, as plain modules.

    Weights that have no adapter are shared with the model, the others are copies.

    Raises:
        ValueError: for a quantised model, whose weights cannot store the sum.
    """
    quantize = _require_adapter(model).base.quantize
    if quantize != "none":
        raise ValueError(
            f"quantize={quantize!r}: expected none to merge an adapter, because quantised weights cannot store the sum"
        )
    duplicate = copy_sharing_weights(model, keep_adapter=True)
    for module in [*duplicate.modules()]:
        if hasattr(module, "base_layer"):  # its weight will change: no longer shared, nor tied to one without adapter
            plain = module.base_layer
            plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    wrapper = _require_adapter(duplicate).wrapper
    del duplicate._rlhf_adapter
    with warnings.catch_warnings(action="ignore"):  # PEFT warns that it updates the config of untied weights
        return wrapper.merge_and_unload(safe_merge=True)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _remove_adapter(model: PreTrainedModel) -> None:
    """Replace the adapter's modules by the base's. PEFT's own `unload` would keep the fully trained ones."""
    for name, module in [*model.named_modules()]:
        plain = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if plain is not None and not is_adapter_key(name):
            model.set_submodule(name, plain)
    del model.peft_config, model._rlhf_adapter


# ------------------------------------------------------------------------------------------------------------- files


def find_adapter(path: str, revision: str | None) -> dict[str, Any] | None:
    """Return the content of adapter_config.json in a folder or hub name; None where there is none."""
    file = find_adapter_config_file(path, revision=revision)
    if file is None:
        return None
    about: dict[str, Any] = json.loads(Path(file).read_text())
    return about


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors needs: repeated ones, such as tied embeddings, are copied."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        unshared[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return unshared


def head_tensors(folder: str, revision: str | None) -> dict[str, Tensor]:
    """Return {"weight": ...} of the classifier's head saved with an adapter; empty where there is none."""
    saved = _read(import_peft(), folder, revision)
    return {name.rpartition(".")[2]: tensor for name, tensor in saved.items() if _is_head(name)}


def _read(peft: Any, folder: str, revision: str | None) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = peft.load_peft_weights(folder, device="cpu", revision=revision)
        return tensors
    except SafetensorError as error:
        raise OSError(f"{folder}: its adapter cannot be read ({error})") from error


def base_of(folder: str) -> str | None:
    """Return the path of the base of the adapter in a local folder; None where there is no adapter."""
    return (find_adapter(folder, None) or {}).get("base_model_name_or_path")


def save_adapter(folder: str | Path, model: PreTrainedModel) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them, and the generation config."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    adapter = _require_adapter(model)
    config = copy.copy(adapter.config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    save_file(_unshared(_file_tensors(adapter.wrapper)), Path(folder) / WEIGHTS, metadata={"format": "pt"})
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def about_adapter(model: nn.Module) -> dict[str, Any] | None:
    """Return the settings of an adapter that change outputs and are not in its tensors; None without an adapter."""
    adapter = adapter_of(model)
    if adapter is None:
        return None
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
    return {name: getattr(adapter.config, name) for name in names}


# ------------------------------------------------------------------------------------------------ optional packages


def import_peft() -> Any:
    """Import PEFT. Raises ImportError with the command that installs it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # silences warnings about missing kernels
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapters need PEFT: pip install 'rlhf-core[lora]' ({error})") from None
    return peft


# ---------------------------------------------------------------------------------------------------- in 8 and 4 bits


def quantization(base: Base, device: str | torch.device, heads: tuple[str, ...]) -> dict[str, Any]:
    """Return keywords for from_pretrained: bitsandbytes' 8 bits, or 4 bits of type nf4 with quantised scales (QLoRA).

    `heads` are not quantised; without any, transformers does not quantise the LM head.
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


def settle_quantized(model: PreTrainedModel) -> None:
    """Make quantised layers compute the same in training and evaluation and in every batch.

    Otherwise the first ratio of PPO would not be 1. Without gradient, bitsandbytes computes differently: in 8 bits it
    also rounds activations, by scales that depend on the rest of the batch, and in 4 bits some processors multiply in
    bfloat16. Here only weights are quantised; a layer unpacks them when it runs, and again in the backward pass.

    Raises:
        ValueError: for a layer that bitsandbytes unpacks wrongly.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state, device = module.weight.quant_state, module.weight.device.type
            if device == "cpu" and state.shape[-1] % state.blocksize and not _unpacks_partial_blocks(state.blocksize):
                raise ValueError(
                    f"quantize='4bit': {name} has {state.shape[-1]} inputs; expected a multiple of {state.blocksize} "
                    "on this processor, where bitsandbytes unpacks others wrongly. Use quantize=8bit"
                )
        if type(module).__name__ == "Linear8bitLt":
            module.init_8bit_state()
            kind: Any = type(module)
            module.__class__ = _steady_eight_bit(kind)


@functools.cache
def _unpacks_partial_blocks(blocksize: int) -> bool:
    """Return whether bitsandbytes unpacks blocks that reach over the end of a row, which depends on the processor."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(-1, 1, 2 * blocksize).sin().view(4, -1)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
    return bool((dequantize_4bit(packed, state) - weight).norm() < 0.2 * weight.norm())


@functools.cache
def _steady_eight_bit(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of bitsandbytes' 8-bit layer that never rounds activations."""
    return type("SteadyLinear8bit", (kind,), {"forward": _eight_bit_forward})


def _eight_bit_forward(layer: Any, states: Tensor) -> Tensor:
    from bitsandbytes.autograd._functions import MatMul8bitFp

    output: Tensor = MatMul8bitFp.apply(states, layer.weight, None, layer.bias, layer.state)
    return output
