"""The reference's log-probs of a fixed data set, computed once instead of at every step.

A frozen reference says the same of an example each time it is asked. `cached_logprobs` asks once, before the first
step, keeps the answers in a file, and finds them there again when a run resumes or another one shares the folder.
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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_core.data.loader import micro_batches
from rlhf_core.data.tokenize import Example
from rlhf_core.models.adapters import about_adapter
from rlhf_core.models.forward import Layout, device_of, token_logprobs
from rlhf_core.training.checkpoint import versions

logger = logging.getLogger("rlhf_core.training")


class ReferenceLogprobs:
    """Log-probs under the reference of every completion token of some examples, found again by their token ids."""

    def __init__(self, keys: Sequence[bytes], parts: Sequence[Tensor]):
        self._of = dict(zip(keys, parts, strict=True))

    def of(self, examples: Sequence[Example]) -> Tensor:
        """(M,) in the order of a batch packed from these examples, which are among those it was made of."""
        return torch.cat([self._of[example_key(example)] for example in examples])


def cached_logprobs(
    reference: nn.Module, *sets: Sequence[Example], folder: Path, batch_size: int, layout: Layout = "auto"
) -> ReferenceLogprobs:
    """The reference's log-probs of all examples, from `folder` where the very same ones are there, else computed.

    What is the same is told by a key: the reference's weights and settings, every token id of the examples (so the
    data, the tokenizer, its template and the longest length), the layout, and the versions of what computes. A setting
    of the loss is no part of it. Examples are taken in their own order, `batch_size` at a time, so that a resumed run
    that computes them again has them bit for bit. No example is kept.
    """
    key = cache_key(reference, *sets, layout=layout)
    path = folder / f"{key[:16]}.safetensors"
    flat = _read(path, key)
    if flat is None:
        flat = _compute(reference, sets, batch_size=batch_size, layout=layout)
        _write(path, key, flat)
    keys, lengths = [], []
    for example in chain(*sets):
        keys.append(example_key(example))
        lengths.append(sum(map(len, example.completions)))
    return ReferenceLogprobs(keys, flat.to(device_of(reference)).split(lengths))


def example_key(example: Example) -> bytes:
    """A digest of an example's token ids, prompt and completions apart. Examples of the same ids share one."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (example.prompt, *example.completions):
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.digest()


def cache_key(reference: nn.Module, *sets: Sequence[Example], layout: Layout) -> str:
    """sha256 of everything that these log-probs follow from."""
    digest = hashlib.sha256()
    about = {
        "config": reference.config.to_dict(),
        "adapter": about_adapter(reference),
        "layout": layout,
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
def _compute(reference: nn.Module, sets: Sequence[Sequence[Example]], *, batch_size: int, layout: Layout) -> Tensor:
    parts = []
    for rows in _batched(chain(*sets), batch_size):  # a batch at a time: all of them packed would be held at once
        (batch,) = micro_batches(rows, None)
        parts.append(token_logprobs(reference, batch, layout=layout)[batch.completion_mask.to(device_of(reference))])
    return torch.cat(parts)


def _batched(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while rows := list(islice(examples, size)):
        yield rows


def _read(path: Path, key: str) -> Tensor | None:
    """None where there is no file, or none that can be used."""
    try:
        with safe_open(str(path), "pt") as file:
            flat, about = file.get_tensor("logprobs"), file.metadata() or {}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is computed again: it cannot be read (%s)", path, error)
        return None
    if about != {"key": key, "sha256": _checksum(flat)}:
        logger.warning("%s is computed again: it is not what was written", path)
        return None
    return flat


def _write(path: Path, key: str, flat: Tensor) -> None:
    """Whole or not at all: another run may read it while this one writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    flat = flat.cpu().contiguous()
    save_file({"logprobs": flat}, temporary, metadata={"key": key, "sha256": _checksum(flat)})
    temporary.replace(path)


def _checksum(flat: Tensor) -> str:
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()
