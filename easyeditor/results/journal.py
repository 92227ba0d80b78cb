"""Append-only JSON lines that survive a kill at any moment, written and read by one rule.

A line is whole when it ends in a newline and is a JSON object. What a killed writer left behind the last whole line is
left out (noted, and cut off before the next line is written); blank lines count for nothing; anything else that is no
whole line is damage, and an error. A journal that a user names (`--kept`) begins with a line that says what it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from easyeditor.base.errors import DataError, OutputError
from easyeditor.base.files import check_place, parse_json, to_json, write_bytes, write_text
from easyeditor.base.reading import check_file

KEPT = ("tune", "trace", "protection")
"""The commands whose `--kept` names a journal."""

LONGEST_LINE = 1 << 28
"""Bytes of a line: a record has thousands."""


class Journal:
    """Lines appended to one file, each on disk before `append` returns. One writer for each file."""

    def __init__(self, path: Path, of: str | None = None) -> None:
        """Open for appending; what a killed writer left of its last line is cut off. `of` is the command whose `--kept`
        named the file; else it lies in a folder of our own.

        Raises:
            DataError: a damaged line in the middle, or a file of something else. OutputError: not writable.
        """
        self.path = path
        check_place(path) if of is None else check_kept(path, of)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if of is not None and not (path.exists() and path.stat().st_size):
                write_text(path, to_json(_heading(of)) + "\n")  # whole or not there
            whole = max((end for end, *_ in _scan(path, None)), default=0)
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed by `close`
            self._file.seek(whole)
            if not _torn(self._file.read(), of):
                self.close()
                raise DataError(f"{path}: what follows its last whole line is no line of a journal; move the file away")
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


def check_kept(path: Path, of: str) -> None:
    """Raise OutputError unless `path` can be the `--kept` file of the command `of`: its journal, nothing, or empty."""
    check_place(path)
    if not path.exists() or not path.stat().st_size:
        return
    try:
        lines = [line for *_, line in _scan(path, None)]
    except DataError as error:
        raise OutputError(f"--kept {error}; name another file") from error
    if lines[:1] != [_heading(of)]:
        raise OutputError(f"--kept {path}: is there and was not written by --kept of {of}; name another file")


def read_journal(path: Path, notes: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, in order, without the first that says what it is; a file that is not there has
    none. A torn last line is told in `notes`.

    Raises:
        DataError: a damaged line before the last, or an unreadable file.
    """
    for *_, line in _scan(path, notes):
        if line.get("kind") != "journal":
            yield line


def _heading(of: str) -> dict[str, Any]:
    return {"kind": "journal", "of": of}


def _torn(end: bytes, of: str | None) -> bool:
    """Can this be what a kill or a power cut left of a line: its beginning, or zeros?"""
    end = end.strip(b"\0\r\n\t ")
    value, _ = _whole(end + b"\n", first=True)
    return not end or (b'{"'.startswith(end[:2]) and (value is None or of is not None or "kind" in value))


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
            for number, raw in enumerate(iter(lambda: source.readline(LONGEST_LINE + 1), b""), 1):
                if len(raw) > LONGEST_LINE:
                    raise DataError(f"{path}, line {number}: more than {LONGEST_LINE:,} bytes; no line of a run is")
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
