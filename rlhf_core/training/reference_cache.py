"""The reference's log-probs of a fixed data set, computed once instead of at every step.

A frozen reference gives the same log-probs for an example every time. `cached_logprobs` computes them before the first
step and keeps them in a file, where a resumed run, or another run that shares the folder, finds them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.data.loader import micro_batches
from rlhf_core.data.records import Example
from rlhf_core.models.adapters import about_adapter
from rlhf_core.models.forward import device_of, route_of, token_logprobs
from rlhf_core.training.checkpoint import versions

logger = logging.getLogger("rlhf_core.training")


class ReferenceLogprobs:
    """Log-probs under the reference of every completion token of some examples, looked up by their token ids."""

    def __init__(self, keys: Sequence[bytes], parts: Sequence[Tensor]):
        self._of = dict(zip(keys, parts, strict=True))

    def of(self, examples: Sequence[Example]) -> Tensor:
        """Return (M,) log-probs in the order of a batch packed from these examples."""
        return torch.cat([self._of[example_key(example)] for example in examples])


def cached_logprobs(
    reference: PreTrainedModel, *sets: Sequence[Example], folder: Path, batch_size: int
) -> ReferenceLogprobs:
    """Return the reference's log-probs of all examples, from `folder` if they are there, computed otherwise.

    They are identified by a key: the reference's weights and settings, every token id of the examples (and so the
    data, the tokenizer, its template and the maximum length), the layout, and the versions of the libraries. Settings
    of the loss are not part of it. Examples are processed in their own order, `batch_size` at a time, so that a resumed
    run computes them bit for bit. The examples themselves are not kept.
    """
    key = cache_key(reference, *sets)
    path = folder / f"{key[:16]}.safetensors"
    flat = _read(path, key)
    if flat is None:
        flat = _compute(reference, sets, batch_size=batch_size)
        _write(path, key, flat)
    keys, lengths = [], []
    for example in chain(*sets):
        keys.append(example_key(example))
        lengths.append(sum(map(len, example.completions)))
    return ReferenceLogprobs(keys, flat.to(device_of(reference)).split(lengths))


def example_key(example: Example) -> bytes:
    """Return a digest of an example's token ids, of prompt and completions separately."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (example.prompt, *example.completions):
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.digest()


def cache_key(reference: PreTrainedModel, *sets: Sequence[Example]) -> str:
    """Return the sha256 of everything that these log-probs depend on."""
    digest = hashlib.sha256()
    about = {
        "config": reference.config.to_dict(),
        "adapter": about_adapter(reference),
        "layout": route_of(reference).layout,
        "device": device_of(reference).type,
        "versions": versions(),
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(reference.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for example in chain(*sets):
        digest.update(example_key(example))
    return digest.hexdigest()


@torch.no_grad()
def _compute(reference: PreTrainedModel, sets: Sequence[Sequence[Example]], *, batch_size: int) -> Tensor:
    parts = []
    for rows in _batched(chain(*sets), batch_size):  # one batch at a time, so that only one is in memory
        (batch,) = micro_batches(rows, None)
        parts.append(token_logprobs(reference, batch)[batch.completion_mask.to(device_of(reference))])
    return torch.cat(parts)


def _batched(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while rows := list(islice(examples, size)):
        yield rows


def _read(path: Path, key: str) -> Tensor | None:
    """Return None if there is no file, or none that can be used."""
    try:
        with safe_open(str(path), "pt") as file:
            flat, about = file.get_tensor("logprobs"), file.metadata() or {}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is computed again: it cannot be read (%s)", path, error)
        return None
    if about != {"key": key, "sha256": _checksum(flat)}:
        logger.warning("%s is computed again: its checksum differs", path)
        return None
    return cast(Tensor, flat)


def _write(path: Path, key: str, flat: Tensor) -> None:
    """Write the file atomically: another run may read it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    flat = flat.cpu().contiguous()
    save_file({"logprobs": flat}, temporary, metadata={"key": key, "sha256": _checksum(flat)})
    temporary.replace(path)


def _checksum(flat: Tensor) -> str:
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
