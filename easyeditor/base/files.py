"""Atomic files: what is there is whole. Non-finite numbers become null, because JSON has none."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import DataError, OutputError
from easyeditor.base.reading import read_text

if TYPE_CHECKING:
    from torch import Tensor


SCRATCH = ".part-"
"""What is being written lies under this prefix and random digits, created exclusively: nobody else's file."""

_OURS = re.compile(re.escape(SCRATCH) + "[0-9a-f]{16}")
_JUST_BEGUN = 60.0  # seconds in which a folder may have been made and not yet been claimed

LARGEST = 2**63 - 1
"""The largest integer read from a file or a flag: what torch and numpy can hold."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a place next to `path` to write to; after the block it is at `path`, on disk, or nothing does.

    Raises:
        OutputError: disk full, read-only folder, no place for a file.
    """
    check_place(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _scratch(path)
        open(part, "xb").close()
        try:
            yield part
            _to_disk(part)
            part.replace(path)
        except BaseException:
            discard(part)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder next to `path` to fill; after the block it is at `path`, on disk, or nothing does.

    What a process that was killed had begun for `path` is removed first.

    Raises:
        OutputError: `path` holds something already, or cannot be written.
    """
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(path)
        part = _scratch(path)
        part.mkdir()
        claim = os.open(part, os.O_RDONLY)
        try:
            with suppress(OSError):  # where a file system has no locks nothing of others is removed either
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield part
            _as_readable(part)
            for file in part.rglob("*"):
                if file.is_file():
                    _to_disk(file)
            part.replace(path)  # in place of nothing, or of an empty folder
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            os.close(claim)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _scratch(path: Path) -> Path:
    """A new name next to `path`: the first half is `path`'s, the other random."""
    return path.with_name(_stem(path) + secrets.token_hex(4))


def _stem(path: Path) -> str:
    return SCRATCH + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, in which nobody else is at work now. Only names that
    are made here go; what a link leads to stays."""
    with suppress(OSError):
        for part in [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]:
            _remove(part)


def sweep_for(path: Path) -> None:
    """As `sweep`, of what was begun for `path`, which nobody else writes now."""
    with suppress(OSError):
        for part in [part for part in path.parent.glob(f"{_stem(path)}*") if _OURS.fullmatch(part.name)]:
            _remove(part)


def _remove_dead(path: Path) -> None:
    """Remove folders begun for `path` whose processes are no more: nobody holds their lock."""
    with suppress(OSError):
        for part in path.parent.glob(f"{_stem(path)}*"):
            if not _OURS.fullmatch(part.name) or part.is_symlink() or not part.is_dir():
                continue
            claim = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - part.stat().st_mtime > _JUST_BEGUN:
                    _remove(part)
            except BlockingIOError:
                continue  # a process is at work on it
            finally:
                os.close(claim)


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        discard(part)


def _to_disk(file: Path) -> None:
    with open(file, "rb+") as written:
        os.fsync(written.fileno())


def _as_readable(folder: Path) -> None:
    """Give every file below `folder` the mode the umask gives: safetensors makes files that only their owner reads."""
    probe = folder / SCRATCH
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it. Raises OutputError (disk full, read-only folder)."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for what is no text."""
    with whole_file(path) as part:
        part.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as part:
        mode = part.stat().st_mode  # safetensors makes files that only their owner reads, whatever the umask says
        own = _scratch(path)  # a folder: safetensors writes to a temporary file of its own name, which a kill leaves
        own.mkdir()
        try:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, own / "t", metadata)
            (own / "t").replace(part)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            _remove(own)
        part.chmod(mode)


def check_place(path: Path) -> None:
    """Raise OutputError unless a regular file can be written at `path`: nothing is there, or a file, in a folder."""
    check_parent(path)
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is there already and not a regular file; choose another")


def check_free(folder: Path) -> None:
    """Raise OutputError unless `folder` is absent (below a folder) or an empty folder, and no link."""
    check_parent(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise OutputError(f"{folder}: is there already and not an empty folder; choose another")


def check_new(folder: Path) -> None:
    """Raise OutputError unless `folder` is absent, or holds nothing but hidden files: what is there stays."""
    if folder != Path():
        check_parent(folder)
    if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
        raise OutputError(f"{folder}: is there already and not an empty folder; choose another")


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were not there, deepest first."""
    made = []
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            break
        made.append(place)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def check_parent(path: Path) -> None:
    """Raise OutputError unless something can be made at `path`, which is there already or lies below a folder."""
    if not path.name:
        raise OutputError(f"{path}: is a folder, not a place for a new file or folder")
    try:
        if path.is_symlink() and not path.exists():
            raise OutputError(f"{path}: is a link to what is not there; choose another")
        os.path.lexists(path) or os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, too long a name, a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: is no place for a file or folder ({reason})") from error
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), None)
    if above is not None and not above.is_dir():
        raise OutputError(f"{path}: cannot be made, because {above} is not a folder")
    if above is not None and not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be written, because {above} is read-only; choose another")


def discard(path: Path) -> None:
    """Remove a half-written file, if it can be."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, to_json(value, indent=1) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; NaN and infinities become null."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Only what JSON can hold: mappings, lists, texts, finite numbers, booleans, null; anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises DataError: missing, unreadable, not JSON."""
    try:
        return parse_json(read_text(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error


_SUSPECT = re.compile(r"\\u[dD][89a-fA-F]|\d{19}")  # what a lone surrogate or an integer beyond 63 bits has in it


def parse_json(text: str) -> Any:
    """JSON text to a value. Raises ValueError, also for nesting without end and for what `check_value` refuses."""
    value = parse_unchecked(text)
    if _SUSPECT.search(text):
        check_value(value)
    return value


def parse_unchecked(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """As `parse_json` for a list of records, each of which its reader gives to `check_value`; `pairs` makes
    an object of its keys and values."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_value(value: Any) -> None:
    """Raise ValueError if a value read from outside holds a text that UTF-8 cannot, or an integer beyond 63 bits."""
    if isinstance(value, str):
        check_encodable(value)
    elif isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ValueError("it holds an integer beyond 63 bits")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_value(key)
            check_value(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_value(item)


def check_encodable(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, or a byte of the command line that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {text[:80]!r} is not UTF-8") from error
