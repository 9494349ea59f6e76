"""`rlhf merge`: merge an adapter into the weights of its model and write a folder that does not need PEFT."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from rlhf_core.config import ConfigError, ModelConfig, PositiveFloat, Settings, require
from rlhf_core.models.adapters import adapter_of, find_adapter, head_tensors
from rlhf_core.models.forward import device_of
from rlhf_core.models.load import freeze, load_policy, load_reward_model, save_model

_LENGTH = 16  # tokens per row of the comparison


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Settings):
    """Merge an adapter into the weights of its model and check that outputs are the same."""

    model: ModelConfig
    """The folder of the adapter, which names its model."""
    output: str
    """A new folder for the merged model, in model.dtype."""
    tolerance: PositiveFloat | None = None
    """Largest allowed difference of any logit or score, relative to the largest of them. None: 1e-4 in float32, 0.05 in
    half precision, whose weights cannot store a small update exactly."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output), "output", self.output, "a folder")


@torch.no_grad()
def merge(config: MergeConfig) -> dict[str, float]:
    """Write the folder, read it again and compare the two models.

    Returns:
        `difference` of any logit or score, relative to the largest of them, and the `tolerance`.

    Raises:
        ConfigError: for a model without an adapter and for an output that is not empty.
        ValueError: where the difference exceeds the tolerance. The folder is removed then.
    """
    about = find_adapter(str(Path(config.model.path).expanduser()), config.model.revision)
    if about is None:
        raise ConfigError(f"model.path={config.model.path!r}: expected an adapter's folder (with adapter_config.json)")
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output={config.output!r}: expected a new or an empty folder")
    load = partial(load_reward_model, new_head=False) if _is_scorer(config.model, about) else load_policy
    options = dict(device=config.device, **config.model.options())
    adapted, tokenizer = load(config.model.path, **options)
    expected = sample_outputs(freeze(adapted))
    save_model(folder, adapted, tokenizer, merge=True)
    merged, _ = load(folder, **options | {"revision": None})
    assert adapter_of(merged) is None
    scale = expected.abs().max().item()
    difference = (sample_outputs(freeze(merged)) - expected).abs().max().item() / scale
    tolerance = config.tolerance or (1e-4 if config.model.dtype == "float32" else 0.05)
    numbers = {"difference": difference, "tolerance": tolerance}
    if not difference <= tolerance:
        shutil.rmtree(folder)
        raise ValueError(
            f"merged in {config.model.dtype}, the model differs from the one with the adapter by {difference:.2g} of "
            f"the largest logit; expected at most tolerance={tolerance:.2g}. The output was removed"
        )
    print(f"merge: the merged model is in {folder}; its logits differ by {difference:.2g}", file=sys.stderr)
    return numbers


def _is_scorer(model: ModelConfig, about: dict[str, Any]) -> bool:
    """Return whether the adapter is a classifier's: by PEFT's task_type or, if that is null, its head or its base."""
    if about.get("task_type") is not None:
        return about["task_type"] in ("SEQ_CLS", "TOKEN_CLS")
    if head_tensors(str(Path(model.path).expanduser()), model.revision):
        return True
    options = dict(revision=about.get("revision"), trust_remote_code=model.trust_remote_code)
    base = AutoConfig.from_pretrained(about["base_model_name_or_path"], **options)
    return any("Classification" in name for name in base.architectures or [])


def sample_outputs(model: PreTrainedModel) -> Tensor:
    """Return logits or scores of a few random rows, float64, by the model's own forward."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (4, _LENGTH), generator=generator)
    logits: Tensor = model(input_ids=ids.to(device_of(model)), use_cache=False).logits
    return logits.double().cpu()
