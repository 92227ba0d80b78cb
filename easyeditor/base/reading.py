"""What is read from outside: regular files, of a size that is known before anything of them is read."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEXT = 1 << 29
"""Bytes of a text, JSON or YAML file, all of which is read at once."""
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def check_file(path: Path, most: int | None = None) -> int:
    """The size in bytes of a regular file. Nothing else is opened: a FIFO would be waited for.

    Raises:
        OSError: nothing is there, something else than a regular file, more than `most` bytes, or an HTML page where the
            name says something else.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a device')}, not a regular file")
    if most is not None and found.st_size > most:
        raise OSError(f"it has {found.st_size:,} bytes; at most {most:,} are read")
    with open(path, "rb") as source:
        if not str(path).endswith(".html") and _PAGE.match(source.read(512)):
            raise OSError("it is an HTML page, perhaps of an error, saved in place of the file: fetch it again")
    return found.st_size


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """All of a regular file. Raises OSError as `check_file`."""
    size = check_file(path, most)
    with open(path, "rb") as source:
        return source.read(size)


def read_text(path: Path) -> str:
    """A whole text file. Raises OSError as `check_file`, ValueError where it is not UTF-8."""
    return read_bytes(path).decode("utf-8-sig")


def memory() -> int:
    """Bytes of this machine's memory: a file with more cannot be read whole."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def open_tensors(path: Path) -> Any:
    """`safetensors.safe_open` of a regular file. Raises OSError as `check_file`, and SafetensorError."""
    from safetensors import safe_open

    check_file(path, memory())
    return safe_open(str(path), framework="pt")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises as `open_tensors`."""
    with open_tensors(path) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
