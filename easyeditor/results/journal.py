"""Append-only JSON lines that survive a kill at any moment, written and read by one rule.

A line is whole when it ends in a newline and is a JSON object. What a killed writer left behind the last whole line is
left out (noted, and cut off before the next line is written); blank lines count for nothing; anything else that is no
whole line is damage, and an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from easyeditor.errors import DataError, OutputError
from easyeditor.files import check_place, parse_json, to_json, write_bytes
from easyeditor.reading import check_file


class Journal:
    """Lines appended to one file, each on disk before `append` returns. One writer for each file."""

    def __init__(self, path: Path) -> None:
        """Open for appending; what a killed writer left of its last line is cut off.

        Raises:
            DataError: a damaged line in the middle. OutputError: not writable.
        """
        self.path = path
        check_place(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = max((end for end, *_ in _scan(path, None)), default=0)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
            self._file.truncate(whole)
            self._length = whole
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line and wait until it is on disk.

        Raises:
            OutputError: as `check`; or disk full: what is recorded stays.
        """
        self.check()
        data = memoryview((to_json(line) + "\n").encode())
        try:
            while data:
                written = self._file.write(data) or 0
                self._length += written
                data = data[written:]
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(
                f"{self.path}: cannot be written ({reason}); make room and go on with --resume"
            ) from error

    def check(self) -> None:
        """Raise OutputError if the file is not the one that was opened, or not as long as it was left."""
        own = os.fstat(self._file.fileno())
        try:
            there = os.path.samestat(own, os.stat(self.path))
        except OSError:
            there = False
        if not there or own.st_size != self._length:
            raise OutputError(
                f"{self.path}: was removed, replaced or changed while it was written to; put it back, and go on with it"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_journal(path: Path, notes: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, in order; a file that is not there has none. A torn last line is told in `notes`.

    Raises:
        DataError: a damaged line before the last, or an unreadable file.
    """
    for *_, line in _scan(path, notes):
        yield line


def read_raw(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """`read_journal` with each line's number and bytes, its newline included."""
    for _, number, raw, line in _scan(path, notes):
        yield number, raw, line


def rewind(path: Path, step: int) -> None:
    """Drop what was logged after `step`: a resumed training says it again."""
    if path.exists():
        write_bytes(path, b"".join(raw for _, raw, line in read_raw(path) if line["step"] <= step))


def _scan(path: Path, notes: list[str] | None) -> Iterator[tuple[int, int, bytes, dict[str, Any]]]:
    """Each whole line: where it ends in the file, its number, its bytes, its value."""
    damaged, end = "", 0
    try:
        check_file(path)
        with open(path, "rb") as source:
            for number, raw in enumerate(source, 1):
                end += len(raw)
                if not raw.strip():
                    continue
                if damaged:
                    raise DataError(f"{damaged}, and more lines follow; the file was changed by hand or disk")
                value, wrong = _whole(raw, first=number == 1)
                if value is None:
                    damaged = f"{path}, line {number}: {wrong}"
                else:
                    yield end, number, raw, value
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if damaged and notes is not None:
        notes.append(f"{damaged}; it is the last line, torn when the run was killed, and is left out")


def _whole(raw: bytes, *, first: bool) -> tuple[dict[str, Any] | None, str]:
    """A line's value, or None and what is wrong with it."""
    try:
        value = parse_json(raw.decode("utf-8-sig" if first else "utf-8"))
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg} at character {error.pos + 1})"
    except ValueError as error:
        return None, f"not JSON ({error})"
    if not isinstance(value, dict):
        return None, f"expected a JSON object, found {type(value).__name__}"
    return (value, "") if raw.endswith(b"\n") else (None, "not JSON (no end of line)")
