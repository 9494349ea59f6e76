"""Tokenised data sets cached in a folder: built once, memory-mapped, shared between runs.

    CACHE/1f0c.../tokens  bounds  firsts    the flat arrays of `examples.py`
                  rows    row_ends          the other fields of each example, one JSON line each, and where each ends
                  manifest.json             key, account, size and checksum of each file; written last

A data set is written in pieces, so that it may be larger than memory, to a temporary folder that is renamed when it is
complete: two runs may build the same one at once. One that is damaged, or has another key, is rebuilt.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlhf_core.config import alternatives
from rlhf_core.data.account import Account
from rlhf_core.data.errors import DataError
from rlhf_core.data.examples import Columns, Examples, Metadata
from rlhf_core.data.records import Example, Record
from rlhf_core.data.tokenizer import Tokenizer

logger = logging.getLogger("rlhf_core.data")

ARRAYS = {"tokens": np.int32, "bounds": np.int64, "firsts": np.int64, "row_ends": np.int64}
MANIFEST = "manifest.json"
EXAMPLES_PER_WRITE = 1000


def cached_examples(folder: Path, about: dict[str, Any], make: Callable[[Account], Iterable[Example]]) -> Examples:
    """Return the examples that `about` describes: from `folder`, or else built, written there and read back.

    about: everything that determines them, as JSON values; the key is its sha256.
    make: yields them in order, and counts what it drops in the account that it is given.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    place = folder / key[:20]
    examples = _open(place, key)
    if examples is not None:
        return examples
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=folder))
    try:
        _write(temporary, key, about, make)
        _move_into_place(temporary, place, key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    examples = _open(place, key)
    if examples is None:
        raise DataError(f"{place}: what was written a moment ago cannot be read back; check the disk")
    return examples


# -------------------------------------------------------------------------------------------------------------- writing


def _write(folder: Path, key: str, about: dict[str, Any], make: Callable[[Account], Iterable[Example]]) -> None:
    account, columns = Account(), Columns()
    lines: list[bytes] = []
    row_end = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(_HashedFile(folder / name)) for name in (*ARRAYS, "rows")}
        files["row_ends"].write(np.zeros(1, dtype=np.int64))

        def flush() -> None:
            nonlocal row_end
            for name, column in zip(("tokens", "bounds", "firsts"), columns.take(), strict=True):
                files[name].write(column)
            ends = row_end + np.cumsum([len(line) for line in lines], dtype=np.int64)
            files["rows"].write(b"".join(lines))
            files["row_ends"].write(ends)
            row_end = int(ends[-1])
            lines.clear()

        for example in make(account):
            account.keep(example)
            lines.append(_to_line(columns.add(example)))
            if len(lines) == EXAMPLES_PER_WRITE:
                flush()
        if not account.rows:
            raise DataError(account.nothing_left())
        if lines:
            flush()
    manifest = {
        "key": key,
        "files": {name: {"bytes": file.size, "sha256": file.digest.hexdigest()} for name, file in files.items()},
        "account": account.to_dict(),
        "about": about,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


class _HashedFile:
    """A file that is written sequentially, with its size and checksum."""

    def __init__(self, path: Path):
        self._path, self.size, self.digest = path, 0, hashlib.sha256()

    def __enter__(self) -> "_HashedFile":
        self._file: IO[bytes] = open(self._path, "wb")
        return self

    def write(self, data: Any) -> None:
        """Write bytes or an array."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.digest.update(view)
        self.size += len(view)

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def _move_into_place(temporary: Path, place: Path, key: str) -> None:
    """Rename, unless another run was first. An unusable folder in the way is moved aside and deleted."""
    while True:
        try:
            temporary.rename(place)
            return
        except OSError:
            if _open(place, key) is not None:
                return
        if not place.exists():  # a rename fails for other reasons too, such as a full disk
            raise DataError(f"data.cache: {temporary} cannot be renamed to {place}")
        old = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        with suppress(FileNotFoundError):  # another run was faster
            place.rename(old / "damaged")
        shutil.rmtree(old, ignore_errors=True)


def _to_line(metadata: Metadata) -> bytes:
    record, others = metadata
    changed = {
        field.name: value for field in fields(Record) if (value := getattr(record, field.name)) is not field.default
    }

    def refuse(value: object) -> None:
        raise DataError(
            f"{record.source}: a column holds a {type(value).__name__}, which data.cache cannot keep as JSON; leave "
            "the column out with data.formatting, or do without the cache"
        )

    text = json.dumps([changed, others], ensure_ascii=False, separators=(",", ":"), default=refuse)
    return text.encode("utf-8", "surrogatepass") + b"\n"  # an unused column may contain half a surrogate pair


# -------------------------------------------------------------------------------------------------------------- reading


def _open(place: Path, key: str) -> Examples | None:
    """Return the cached examples; None where there are none, or none that can be used, which is logged."""
    if not place.is_dir():
        return None
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        if manifest["key"] != key:
            raise ValueError("it has another key")
        for name in (*ARRAYS, "rows"):
            with open(place / name, "rb") as file:
                found: dict[str, Any] = {"bytes": os.fstat(file.fileno()).st_size}
                if found["bytes"] == manifest["files"][name]["bytes"]:
                    found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            if found != manifest["files"][name]:
                raise ValueError(f"the file {name} is not what was written")
        arrays = {name: np.asarray(np.memmap(place / name, dtype=kind, mode="r")) for name, kind in ARRAYS.items()}
        lines = _Lines(place / "rows", arrays.pop("row_ends"))
        return Examples(**arrays, metadata=lines, account=Account.from_dict(manifest["account"]))
    except (OSError, ValueError, KeyError, TypeError) as error:  # json.JSONDecodeError is a ValueError
        logger.warning(f"{place} is rebuilt: it cannot be used ({error})")
        return None


class _Lines(Sequence[Metadata]):
    """The lines of a memory-mapped file, parsed when they are read."""

    def __init__(self, path: Path, ends: np.ndarray):
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Metadata:  # type: ignore[override]  # slices are not needed
        line = self._bytes[self._ends[i] : self._ends[i + 1]]
        record, others = json.loads(line.decode("utf-8", "surrogatepass"))
        return Record(**_with_tuples(Record, record)), _with_tuples(Example, others)


def _with_tuples(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields that are tuples: JSON has lists only."""
    return {
        name: tuple(value) if name in _tuples(kind) and value is not None else value for name, value in values.items()
    }


@cache
def _tuples(kind: type) -> frozenset[str]:
    """Return the names of the fields of a dataclass that are tuples."""
    hints = typing.get_type_hints(kind)
    return frozenset(
        name for name, hint in hints.items() if tuple in [typing.get_origin(one) for one in alternatives(hint)]
    )


# ------------------------------------------------------------------------------------------------------------- the key


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """Return a sha256 of all that determines a tokenizer's output: vocabulary, rules, added tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        tokenizer.special_tokens_map,
        sorted((id, repr(token)) for id, token in tokenizer.added_tokens_decoder.items()),
        tokenizer.chat_template,
        tokenizer("a")["input_ids"],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def describe_code() -> str:
    """Return a sha256 of the modules that turn rows into tokens."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
