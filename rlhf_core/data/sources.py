"""Read rows from a file, a folder or a hub data set, one after another, each with its place.

The meaning of columns is up to `formats.py`. A row that cannot be read is yielded as a `BadRow`, so that the caller
decides whether to stop or to count and continue. Damage that makes all that follows unreadable (a broken JSON list, a
damaged parquet file) raises `DataError` at once.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import traceback
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from rlhf_core.data.errors import BadRow, DataError
from rlhf_core.data.records import Row
from rlhf_core.plugins import import_function

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")  # name, owner/name, and either with :configuration

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)
_GZIP_ADVICE = "the gzip file is cut short or damaged; copy or download it again"
_CSV_LABELS = {"0": 0, "1": 1, "true": True, "false": False}


def read_rows(path: str | Path, split: str | None = None) -> Iterator[tuple[str, Row | BadRow]]:
    """Yield (place, row) for every row behind `path`, in order.

    path: a file (JSONL, JSON list, either gzipped; CSV; parquet), a folder saved by `datasets`, a folder of such files,
        or the name of a hub dataset, "owner/name" or "owner/name:configuration".
    split: the split of a folder or hub dataset; None takes "train" where there is one. A file has no splits.
    The place is "pairs.jsonl:12" (a line) for JSONL and "data.json row 3" for everything else, both counted from 1.
    Raises DataError when nothing is at the path, or what is there cannot be read at all.
    """
    place = Path(path).expanduser()
    if place.is_dir() and ((place / "state.json").is_file() or (place / "dataset_dict.json").is_file()):
        return _saved_dataset_rows(place, split)
    if place.is_dir():
        return chain.from_iterable(_file_rows(file) for file in _files_of_split(place, split))
    if not place.exists():
        return _hub_rows(str(path), split)
    if split is not None:
        raise DataError(f"{path}: split {split!r} was asked for, but a single file has no splits; leave the split out")
    return _file_rows(place)


def fingerprint(path: str | Path, split: str | None = None) -> str:
    """Return a sha256 of the names and bytes of the files behind `path`, or the `datasets` fingerprint of a hub set."""
    place = Path(path).expanduser()
    if not place.exists():
        return f"{path} {_hub_dataset(str(path), split)._fingerprint}"
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        files = sorted(file for file in place.rglob("*") if file.is_file())
    else:
        files = _files_of_split(place, split) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def formatted(rows: Iterable[tuple[str, Row | BadRow]], name: str) -> Iterator[tuple[str, Row | BadRow | None]]:
    """Apply the user's function (name: "module:function") to every row. It returns a row, or None to leave it out.

    Where it fails, or returns something else, the row becomes a bad row whose reason names the function and the line
    that failed; the message of the exception is not repeated, since it may quote the row.
    """
    function = import_function(name)
    for place, row in rows:
        if isinstance(row, BadRow):
            yield place, row
            continue
        try:
            made = function(row)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            reason = BadRow(f"the formatting function {name} fails: {type(error).__name__} at {where}")
            reason.__cause__ = error
            yield place, reason
            continue
        if made is None or isinstance(made, dict):
            yield place, made
        else:
            yield place, BadRow(f"the formatting function {name} returned {kind_of(made)}, expected a row or None")


def kind_of(value: object) -> str:
    """Return the kind of a value, in words for an error message: "a string", "null", "a list"."""
    if value is None:
        return "null"
    names = {bool: "a true/false value", str: "a string", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------------------- files


def _file_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """Read the rows of one file. Gzip, parquet and JSON lists are recognised by content, CSV by the file name."""
    with open(path, "rb") as stream:
        is_parquet = stream.read(4) == b"PAR1"
    if is_parquet:
        return _parquet_rows(path)
    if path.name.lower().removesuffix(".gz").endswith(".csv"):
        return _csv_rows(path)
    if _first_character(path) == b"[":
        return _json_list_rows(path)
    return _jsonl_rows(path)


def _open_bytes(path: Path) -> gzip.GzipFile | IO[bytes]:
    """Open a file for its bytes, decompressed if it is gzip, whatever its name."""
    with open(path, "rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_gzip else open(path, "rb")


def _first_character(path: Path) -> bytes:
    try:
        with _open_bytes(path) as stream:
            return stream.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]
    except _DAMAGED_GZIP:
        return b""  # the reader of the rows meets the damage again and reports where it is


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    number = 0
    try:
        with _open_bytes(path) as lines:
            # Bytes are split at \n only; a str would also be split at U+2028 and similar, which are legal inside JSON.
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(_BYTE_ORDER_MARK).strip()
                if line:
                    yield f"{path.name}:{number}", _parse_line(line)
    except _DAMAGED_GZIP:
        yield f"{path.name}:{number + 1}", BadRow(_GZIP_ADVICE)


def _parse_line(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object_of_unique_keys)
    except UnicodeDecodeError:
        return BadRow("the line is not UTF-8 text")
    except json.JSONDecodeError as error:
        return BadRow(f"the line is not valid JSON ({error.msg}), expected one object a line")
    except BadRow as reason:
        return reason
    return _checked_row(row)


def _json_list_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    try:
        with _open_bytes(path) as stream:
            rows = json.loads(stream.read().decode("utf-8-sig"), object_pairs_hook=_object_of_unique_keys)
    except _DAMAGED_GZIP as error:
        raise DataError(f"{path.name}: {_GZIP_ADVICE}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: byte {error.start} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: the file starts like a JSON list but is not valid JSON: {error.msg}, "
            f"column {error.colno}"
        ) from error
    except BadRow as reason:
        raise DataError(f"{path.name}: {reason}") from reason
    for number, row in enumerate(rows, start=1):
        yield f"{path.name} row {number}", _checked_row(row)


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """Build an object of a JSON file; the default would keep the last of two equal keys silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise BadRow(f"the key {twice[:40]!r} comes twice in one object, expected once")
    return row


def _checked_row(row: object) -> Row | BadRow:
    return row if isinstance(row, dict) else BadRow(f"found {kind_of(row)}, expected an object with named fields")


def _csv_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    csv.field_size_limit(2**31 - 1)  # the standard limit, 128 KiB a field, is shorter than a long document
    with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        number = 0
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise DataError(f"{path.name}: found columns {names} in the header, expected each name once")
            for number, row in enumerate(reader, start=1):
                yield f"{path.name} row {number}", _typed_csv_row(row)
        except _DAMAGED_GZIP as error:
            raise DataError(f"{path.name} after row {number}: {_GZIP_ADVICE}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name} after row {number}: the file is not UTF-8 text") from error
        except csv.Error as error:
            raise DataError(f"{path.name} after row {number}: the file is not valid CSV: {error}") from error


def _typed_csv_row(row: Row) -> Row | BadRow:
    """Convert the label of a CSV row, whose values are all text: no other field of a format is of another type."""
    if None in row:
        return BadRow("the row has more fields than the header has names (is a comma not in quotes?)")
    label = row.get("label")
    if isinstance(label, str):
        row["label"] = _CSV_LABELS.get(label.strip().lower(), label)
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow  # imported here, like `datasets` below, because both are slow to import and most runs need neither
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name} row {number + 1}: the parquet file cannot be read: {error}") from error


# -------------------------------------------------------------------------------------------------- folders and the hub


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    """Return the data files whose names contain the split as a word ("train-00000-of-00002.parquet", "a_train.jsonl").

    Without a split, those of "train" if there are any (a test file must never be trained on), else all.
    """
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(DATA_SUFFIXES))
    named = [file for file in files if (split or "train") in re.split(r"[\W_]+", file.name)]
    if split and not named:
        raise DataError(f"{folder}: no file is named after the split {split!r}; found {[file.name for file in files]}")
    if not files:
        raise DataError(f"{folder}: no data file in there, expected {', '.join(DATA_SUFFIXES)} or a saved dataset")
    return named or files


def _saved_dataset_rows(folder: Path, split: str | None) -> Iterator[tuple[str, Row]]:
    """Read the rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the type depends on which part is missing or damaged
        raise DataError(f"{folder}: datasets cannot load the folder ({type(error).__name__}: {error})") from error
    if isinstance(dataset, dict):  # a DatasetDict
        name = split or "train"
        if name not in dataset:
            raise DataError(f"{folder}: no split {name!r}, found {sorted(dataset)}; choose one with --data.split")
        dataset = dataset[name]
    elif split is not None:
        raise DataError(f"{folder}: split {split!r} was asked for, but the folder holds a single dataset; leave it out")
    for number, row in enumerate(dataset, start=1):
        yield f"{folder.name} row {number}", row


def _hub_rows(name: str, split: str | None) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(_hub_dataset(name, split), start=1):
        yield f"{name} row {number}", row


def _hub_dataset(name: str, split: str | None) -> Any:
    if name.lower().endswith(DATA_SUFFIXES) or not HUB_NAME.fullmatch(name):
        raise DataError(f"{name}: no such file or folder{_similar_path(Path(name).expanduser())}")
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:
        # The hub fails in many ways (offline, private, misspelt, no such split): keep the reason.
        raise DataError(
            f"{name}: neither a file or folder here nor a hub dataset that loads ({type(error).__name__}: {error}); "
            "a configuration goes after a colon, owner/name:configuration, and a split under --data.split"
        ) from error


def _similar_path(path: Path) -> str:
    """Return '; did you mean ...' if the folder has something of nearly that name, else an empty string."""
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
