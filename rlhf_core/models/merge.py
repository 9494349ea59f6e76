"""`rlhf merge`: an adapter folded into the weights of its model, as a folder that needs no PEFT any more."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from rlhf_core.config import ConfigError, ModelConfig, Settings, require
from rlhf_core.models.adapters import adapter_of, find_adapter, head_tensors
from rlhf_core.models.forward import device_of
from rlhf_core.models.load import freeze, load_policy, load_reward_model, save_model

_LENGTH = 16  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Settings):
    """Fold an adapter into the weights of its model and check that the two say the same."""

    model: ModelConfig
    """The folder of the adapter, which names its model."""
    output: str
    """A new folder for the plain model, in model.dtype."""
    tolerance: float | None = None
    """Largest difference of any logit or score, as a share of the largest of them; none: 1e-4 in float32, 0.05 in half
    precision, whose weights cannot hold a small update exactly."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.output), "output", self.output, "a folder")
        require(self.tolerance is None or self.tolerance > 0, "tolerance", self.tolerance, "more than 0, or none")


@torch.no_grad()
def merge(config: MergeConfig) -> dict[str, float]:
    """Write the folder, read it again and compare. Returns `difference`, how far the merged model is from the one with
    the adapter, as a share of the largest logit or score, and the `tolerance`.

    Raises ConfigError for a model without an adapter and an output that is not empty, ValueError where they disagree.
    """
    about = find_adapter(str(Path(config.model.path).expanduser()), config.model.revision)
    if about is None:
        raise ConfigError(f"model.path={config.model.path!r}: expected an adapter's folder (with adapter_config.json)")
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output={config.output!r}: expected a new or an empty folder")
    load = partial(load_reward_model, new_head=False) if _scores(config.model, about) else load_policy
    options = dict(device=config.device, **config.model.options())
    adapted, tokenizer = load(config.model.path, **options)
    expected = say(freeze(adapted))
    save_model(folder, adapted, tokenizer, merge=True)
    merged, _ = load(folder, **options | {"revision": None})
    assert adapter_of(merged) is None
    scale = expected.abs().max().item()
    difference = (say(freeze(merged)) - expected).abs().max().item() / scale
    tolerance = config.tolerance or (1e-4 if config.model.dtype == "float32" else 0.05)
    numbers = {"difference": difference, "tolerance": tolerance}
    if not difference <= tolerance:
        shutil.rmtree(folder)
        raise ValueError(
            f"merged in {config.model.dtype}, the model differs from the one with the adapter by {difference:.2g} of "
            f"the largest logit; expected at most tolerance={tolerance:.2g}. Nothing was kept"
        )
    print(f"merge: the plain model is in {folder}; its logits differ by {difference:.2g}", file=sys.stderr)
    return numbers


def _scores(model: ModelConfig, about: dict[str, Any]) -> bool:
    """Whether the adapter is of a classifier. PEFT's task_type may be null: then the head tells, or the base."""
    if about.get("task_type") is not None:
        return about["task_type"] in ("SEQ_CLS", "TOKEN_CLS")
    if head_tensors(str(Path(model.path).expanduser()), model.revision):
        return True
    options = dict(revision=about.get("revision"), trust_remote_code=model.trust_remote_code)
    base = AutoConfig.from_pretrained(about["base_model_name_or_path"], **options)
    return any("Classification" in name for name in base.architectures or [])


def say(model: nn.Module) -> Tensor:
    """Logits or scores of a few random rows by the model's own, ordinary forward, float64: what anybody else gets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (4, _LENGTH), generator=generator)
    return model(input_ids=ids.to(device_of(model)), use_cache=False).logits.double().cpu()
