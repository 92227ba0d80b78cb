"""Records as a file has them: JSON, JSON lines, CSV, Parquet; their fields are read in formats.py."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.base.files import parse_unchecked
from easyeditor.base.reading import read_bytes
from easyeditor.dataset.formats import FORMATS

Raw = tuple[Any, str | None]
"""One record as it is in the source, or None and what is wrong with it."""
LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
FILES = (".json", *LINES, *TABLES, ".parquet")
FOREIGN = {"<": "an HTML or XML page", "version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull"}
"""How a text begins that is no data at all, though it is named like some."""


def from_file(path: Path) -> tuple[Iterator[Raw], str]:
    """A file's records and its SHA-256. Raises DataError: not readable, empty, or not what its name says."""
    try:
        content = read_bytes(path)
        if content[:4] == b"PAR1":
            return _parquet(content, path), hashlib.sha256(content).hexdigest()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable UTF-8 text file ({error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    for start, what in FOREIGN.items():
        if text.lstrip().startswith(start):
            raise DataError(f"{path}: this is {what}")
    suffix = path.suffix.lower()
    raw = _table(text, TABLES[suffix]) if suffix in TABLES else None
    raw = raw or (_lines(text) if _is_lines(text, path) else _whole(text, path))
    return raw, hashlib.sha256(content).hexdigest()


def _parquet(content: bytes, path: Path) -> Iterator[Raw]:
    from pyarrow import ArrowException, parquet  # comes with `datasets`

    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:300]})") from error
    return (({key: value for key, value in row.items() if value is not None}, None) for row in rows)


def _table(text: str, delimiter: str) -> Iterator[Raw]:
    """Rows under their header, every cell a text."""
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            more = None if None not in row else f"line {rows.line_num} has more cells than the header has names"
            yield {key: value for key, value in row.items() if key}, more
    except csv.Error as error:
        yield None, f"not CSV after line {rows.line_num} ({error})"


def _is_lines(text: str, path: Path) -> bool:
    """JSON lines: by the file's name, or because its first line is an object by itself and more follow."""
    if path.suffix.lower() in LINES:
        return True
    head, _, rest = text.lstrip().partition("\n")
    if not head.startswith("{") or not rest.strip():
        return False
    try:
        return isinstance(parse_unchecked(head), dict)
    except ValueError:
        return False


def _whole(text: str, path: Path) -> Iterator[Raw]:
    try:
        value = parse_unchecked(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} of {text.count(chr(10)) + 1} lines"
        raise DataError(f"{path}: not whole JSON ({error.msg} at {where}); is the file cut off?") from error
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if isinstance(value, dict):
        value = _records(value)
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list of records, found {type(value).__name__}")
    return ((item, None) for item in value)


def _records(value: dict[str, Any]) -> list[Any]:
    """One record; or the columns, the records by name, or the named list of a file that is no list."""
    parts = list(value.values())
    known = any(needed <= value.keys() for needed, _ in FORMATS.values())
    lists, objects = (all(isinstance(part, kind) for part in parts) for kind in (list, dict))
    if known and len(parts) > 1 and lists and len({len(part) for part in parts}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if known and len(parts) > 1 and objects and all(part.keys() == parts[0].keys() for part in parts):
        return [{name: part[row] for name, part in value.items()} for row in parts[0]]
    if not known and parts and objects:
        return parts
    if not known and len(parts) == 1 and lists:
        return list(parts[0])
    return [value]


def _lines(text: str) -> Iterator[Raw]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                yield parse_unchecked(line), None
        except ValueError as error:
            yield None, f"line {number} is not JSON ({error})"
