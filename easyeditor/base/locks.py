"""One process at a time: a lock file that says who holds it; the kernel lets go of it when the process ends."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from easyeditor.base.errors import OutputError
from easyeditor.base.files import discard, make_folder, sweep

LOG = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the lock in a run folder."""


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` inside the block; afterwards it is gone. `wait` for another process to let go of it.

    Raises:
        OutputError: another process holds it (says which one `what` is at work in), or is to write a folder that the
            lock would lie in; or the file cannot be made.
    """
    check_above(path)
    try:
        made = make_folder(path.parent)
        handle = _taken(path, what, wait)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        check_above(path)  # again: the other process may have begun meanwhile
        yield
    finally:
        discard(path)  # while it is still ours, so that nobody has just taken it
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file open too
        os.close(handle)
        for folder in made:  # nothing was written into it
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def working(folder: Path, lock: str = LOCK, *, parts: str | None = None) -> Iterator[None]:
    """Hold a run's or training's folder: its lock, and what a killed process left half-written is gone, in the folder
    and in those below its `parts`. Raises OutputError as `locked`."""
    with locked(folder / lock, str(folder)):
        places = [folder]
        if parts is not None and (folder / parts).is_dir():
            places += [folder / parts, *(folder / parts).iterdir()]
        for place in places:
            sweep(place)
        yield


def lock_of(place: Path) -> Path:
    """The lock of a file, or of a folder that has none in it: next to it, under a name that nothing else has."""
    return place.with_name(f"{LOCK}-{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]}")


def check_above(place: Path) -> None:
    """Raise OutputError if another process is to write a folder that `place` lies in, whole."""
    for above in Path(os.path.realpath(place)).parents[:-1]:  # the root has no lock
        with suppress(OSError):  # nobody has one
            handle = os.open(lock_of(above), os.O_RDONLY)
            try:
                _flock(handle, lock_of(above), str(above), wait=False)
            finally:
                os.close(handle)


def _taken(path: Path, what: str, wait: bool) -> int:
    """The lock's open file, ours alone."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(handle, path, what, wait)
            if _is_still(handle, path):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the one who had the lock removed the file: another is there now


def _flock(handle: int, path: Path, what: str, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode("utf-8", "replace") or "another process"
        if not wait:
            raise OutputError(f"{what}: is in use by {holder}; wait for it, or end it") from None
        LOG.info("waiting for %s, which is at work on %s", holder, what)
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
