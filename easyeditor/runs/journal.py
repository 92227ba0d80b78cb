"""Append-only JSON lines that survive a kill at any moment: whole lines are on disk, a torn last line is dropped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from easyeditor.errors import DataError, OutputError
from easyeditor.files import check_place, parse_json, to_json


class Journal:
    """Lines appended to one file, each flushed to disk before `append` returns. One writer for each file."""

    def __init__(self, path: Path) -> None:
        """Open for appending; what a killed writer left of its last line is cut off.

        Raises:
            DataError: a damaged line in the middle. OutputError: not writable.
        """
        self.path = path
        check_place(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = _whole_bytes(path)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
            self._file.truncate(whole)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line and wait until it is on disk. Raises OutputError (disk full): what is recorded stays."""
        data = memoryview((to_json(line) + "\n").encode())
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(
                f"{self.path}: cannot be written ({reason}); make room and go on with --resume"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, in order; a torn last line is left out; a file that is not there has none.

    Raises:
        DataError: a damaged line before the last, or an unreadable file.
    """
    for _, line in _scan(path):
        yield line


def read_raw(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """`read_journal` with each line's bytes, its newline included."""
    yield from _scan(path)


def _whole_bytes(path: Path) -> int:
    """Length of the file without a torn last line."""
    return sum(len(raw) for raw, _ in _scan(path))


def _scan(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line's bytes and value."""
    damaged: str | None = None
    try:
        with open(path, "rb") as source:
            for number, raw in enumerate(source, 1):
                if damaged is not None:
                    raise DataError(f"{path}: {damaged}, and more lines follow; the file was changed by hand or disk")
                try:
                    value = parse_json(raw.decode("utf-8"))
                except ValueError:
                    damaged = f"line {number} is not JSON"
                    continue
                if not raw.endswith(b"\n") or not isinstance(value, dict):
                    damaged = f"line {number} is not a whole record"
                    continue
                yield raw, value
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
