"""Tokenised data sets kept in a folder: made once, mapped into memory, shared between runs.

    CACHE/1f0c.../tokens  bounds  firsts    the flat arrays of `examples.py`
                  rows    row_ends          everything else of each example, a JSON line each, and where these end
                  manifest.json             key, account, size and checksum of each file; written last

A data set is written piece by piece, so that it may be larger than memory, into a folder with a name of its own, which
takes its place whole: two runs may make the same one at once. One that is damaged, or of another key, is made anew.
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
from rlhf_core.data.examples import Columns, Examples, Note
from rlhf_core.data.formats import DataError, Record
from rlhf_core.data.tokenize import Example

logger = logging.getLogger("rlhf_core.data")

ARRAYS = {"tokens": np.int32, "bounds": np.int64, "firsts": np.int64, "row_ends": np.int64}
MANIFEST = "manifest.json"
EXAMPLES_AT_ONCE = 1000  # that are held before they are written


def cached_examples(folder: Path, about: dict[str, Any], make: Callable[[Account], Iterable[Example]]) -> Examples:
    """The examples that `about` describes: from `folder`, or else made, written there and read back.

    about: everything that they follow from, as JSON holds it; the key is its sha256. make: yields them in order, and
    tells the account it is given of what it drops.
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
        _take_place(temporary, place, key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    examples = _open(place, key)
    if examples is None:
        raise DataError(f"{place}: what was written a moment ago cannot be read back; is the disk sound?")
    return examples


# -------------------------------------------------------------------------------------------------------------- writing


def _write(folder: Path, key: str, about: dict[str, Any], make: Callable[[Account], Iterable[Example]]) -> None:
    account, columns, lines, row_end = Account(), Columns(), [], 0
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
            if len(lines) == EXAMPLES_AT_ONCE:
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
    """A file that is written from front to back, and its checksum."""

    def __init__(self, path: Path):
        self._path, self.size, self.digest = path, 0, hashlib.sha256()

    def __enter__(self) -> "_HashedFile":
        self._file: IO[bytes] = open(self._path, "wb")
        return self

    def write(self, data: Any) -> None:
        """Bytes, or an array."""
        data = memoryview(data).cast("B")
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def _take_place(temporary: Path, place: Path, key: str) -> None:
    """Rename, unless another run was first. What lies there and cannot be used is moved away, then deleted."""
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
        with suppress(FileNotFoundError):  # where another run was faster
            place.rename(old / "damaged")
        shutil.rmtree(old, ignore_errors=True)


def _to_line(note: Note) -> bytes:
    record, others = note
    held = {
        field.name: value for field in fields(Record) if (value := getattr(record, field.name)) is not field.default
    }

    def refuse(value: object) -> None:
        raise DataError(
            f"{record.source}: a column holds a {type(value).__name__}, which data.cache cannot keep as JSON; leave "
            "the column out with data.formatting, or do without the cache"
        )

    text = json.dumps([held, others], ensure_ascii=False, separators=(",", ":"), default=refuse)
    return text.encode("utf-8", "surrogatepass") + b"\n"  # half a pair may stand in a column that nobody reads


# -------------------------------------------------------------------------------------------------------------- reading


def _open(place: Path, key: str) -> Examples | None:
    """None where there is nothing, or nothing that can be used; the second is said."""
    if not place.is_dir():
        return None
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        if manifest["key"] != key:
            raise ValueError("it was made of something else")
        for name in (*ARRAYS, "rows"):
            with open(place / name, "rb") as file:
                found = {"bytes": os.fstat(file.fileno()).st_size}
                if found["bytes"] == manifest["files"][name]["bytes"]:
                    found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            if found != manifest["files"][name]:
                raise ValueError(f"the file {name} is not what was written")
        arrays = {name: np.asarray(np.memmap(place / name, dtype=kind, mode="r")) for name, kind in ARRAYS.items()}
        lines = _Lines(place / "rows", arrays.pop("row_ends"))
        return Examples(**arrays, notes=lines, account=Account.from_dict(manifest["account"]))
    except (OSError, ValueError, KeyError, TypeError) as error:  # JSON's error is a ValueError
        logger.warning(f"{place} is made anew: it cannot be used ({error})")
        return None


class _Lines(Sequence[Note]):
    """The lines of a file, mapped into memory and read one at a time."""

    def __init__(self, path: Path, ends: np.ndarray):
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Note:
        line = self._bytes[self._ends[i] : self._ends[i + 1]]
        record, others = json.loads(line.decode("utf-8", "surrogatepass"))
        return Record(**_with_tuples(Record, record)), _with_tuples(Example, others)


def _with_tuples(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {
        name: tuple(value) if name in _tuples(kind) and value is not None else value for name, value in values.items()
    }


@cache
def _tuples(kind: type) -> frozenset[str]:
    """The fields of a dataclass that are tuples."""
    hints = typing.get_type_hints(kind)
    return frozenset(
        name for name, hint in hints.items() if tuple in [typing.get_origin(one) for one in alternatives(hint)]
    )


# ------------------------------------------------------------------------------------------------------- what it is of


def describe_tokenizer(tokenizer: Any) -> str:
    """sha256 of everything a tokenizer does: vocabulary, rules, added and special tokens, template."""
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
    """sha256 of the modules that turn rows into tokens."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
