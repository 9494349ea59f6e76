"""Where a model is: local folders and hub names, of models and of adapters with their bases."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from rlhf_core.config import LoraConfig
from rlhf_core.models.adapters import Base, find_adapter

Quantize = Literal["none", "8bit", "4bit"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
logger = logging.getLogger("rlhf_core.models")


def locate(path: str | Path) -> str:
    """Return a local folder with `~` expanded, or a hub name. A name that looks like a folder is not tried on the hub.

    Raises FileNotFoundError for a local folder that does not exist.
    """
    name = str(Path(path).expanduser()) if isinstance(path, Path) or str(path).startswith("~") else str(path)
    looks_local = isinstance(path, Path) or name.startswith((".", "/")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise FileNotFoundError(f"no model folder at {path}")
    return name


def hub_options(path: str | Path, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Return keywords for from_pretrained, and warn where code that comes with a model will run."""
    if trust_remote_code:
        logger.warning("running code that comes with %s (trust_remote_code)", path)
    return dict(revision=revision, trust_remote_code=trust_remote_code)


class Source(NamedTuple):
    """What a path names: weights, how they are stored, and the adapter on them if the path is an adapter's."""

    path: str
    base: Base
    options: dict[str, Any]  # for from_pretrained of the base
    about: dict[str, Any] | None  # adapter_config.json
    revision: str | None  # of the adapter

    @property
    def adapter(self) -> str | None:
        return None if self.about is None else self.path

    def check(self, lora: LoraConfig | None) -> None:
        """Raise ValueError, before anything is loaded, where nothing could be trained, or two adapters would be."""
        if lora is not None and self.adapter is not None:
            raise ValueError(
                f"{self.path} is an adapter, and training continues with it: expected no lora settings. For a new "
                "adapter, merge this one into its model first (`rlhf merge`)"
            )
        if lora is None and self.adapter is None and self.base.quantize != "none":
            raise ValueError(
                f"quantize={self.base.quantize!r}: quantised weights cannot be trained; expected lora settings as well "
                "(such as --lora.r 16), or an adapter's folder to start from"
            )


def find_source(path: str | Path, revision: str | None, trust_remote_code: bool, dtype: str, quantize: str) -> Source:
    """Return what a path names.

    Raises:
        FileNotFoundError: for a local folder that does not exist, of the model or of an adapter's base.
        ValueError: for an unknown dtype or quantization.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize={quantize!r}: expected one of {', '.join(get_args(Quantize))}")
    name = locate(path)
    about = find_adapter(name, revision)
    model, model_revision = (name, revision) if about is None else (base_path(name, about), about.get("revision"))
    base = Base(str(Path(model).resolve()) if Path(model).is_dir() else model, model_revision, dtype, quantize)
    return Source(name, base, hub_options(model, model_revision, trust_remote_code), about, revision)


def base_path(adapter: str, about: dict[str, Any]) -> str:
    """Return the folder or hub name of an adapter's base model. Raises FileNotFoundError if the folder is missing."""
    base = about.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter}/adapter_config.json does not name its model: expected a base_model_name_or_path")
    try:
        return locate(base)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{adapter} is an adapter of the model in {base}, which does not exist; restore it, or set "
            "base_model_name_or_path in adapter_config.json to its new folder"
        ) from None
