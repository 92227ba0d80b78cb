"""Every point at which a run changes what is on disk, and a hook that ends a process at one of them.

A point is a call: a file opened for writing, a folder made, a file renamed or removed (Python's audit events), or an
`os.fsync`. The state of the disk between two calls is the state just before the second, so a process that ends just
before each call in turn has ended in every state there is. Where a file is being written (an fsync, or a file opened
to append to) a second end leaves half of what is new there: torn.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
HALF_A_LINE = b'{"kind": "ed'


@dataclass(frozen=True, kw_only=True)
class End:
    """Process `rank` of command number `job` ends just before its call number `place`, by a signal sent to itself.

    `torn`: half of what is new in the file of that call is on disk, and the rest is not.
    """

    job: int
    rank: int
    place: int
    torn: bool = False
    signum: int = signal.SIGKILL


def ends(logs: dict[tuple[int, int], Path], signum: int = signal.SIGKILL) -> Iterator[End]:
    """Every end there is by `signum`, from the logs of an undisturbed run: (job, rank) -> log."""
    for (job, rank), log in sorted(logs.items()):
        for place, point in enumerate(log.read_text(encoding="utf-8").splitlines()):
            yield End(job=job, rank=rank, place=place, signum=signum)
            if point.startswith("torn "):
                yield End(job=job, rank=rank, place=place, torn=True, signum=signum)


def spread(found: Sequence[End], most: int) -> list[End]:
    """At most `most` of the ends, evenly spread."""
    return list(found) if len(found) <= most else [found[(2 * i + 1) * len(found) // (2 * most)] for i in range(most)]


def watch(root: Path, log: Path, end: End | None) -> None:
    """From now on write every point below `root` that this process comes to into `log`; end at `end`."""
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    sizes: dict[int, int] = {}  # inode -> bytes that were there when it was opened, or that an fsync has seen
    seen, busy, fsync = 0, False, os.fsync

    def point(name: str, tear: Callable[[], object] | None = None) -> None:
        nonlocal seen, busy
        busy, here, seen = True, seen, seen + 1
        os.write(sink, f"{'torn ' if tear else ''}{name}\n".encode())
        if end is not None and here == end.place:
            if end.torn and tear is not None:
                tear()
            busy = False
            os.kill(os.getpid(), end.signum)
        busy = False

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if busy or not (event == "open" or event in EVENTS) or isinstance(args[0], int):
            return
        path = os.path.abspath(os.fsdecode(args[0]))
        if not path.startswith(str(root)):
            return
        if event != "open":
            point(f"{event} {path}")
        elif args[2] & (os.O_WRONLY | os.O_RDWR):
            opened(path, args[1] or "")

    def opened(path: str, mode: str) -> None:
        if os.path.exists(path):
            status = os.stat(path)
            sizes[status.st_ino] = 0 if "w" in mode else status.st_size
        point(f"open {path}", (lambda: _append(path)) if "a" in mode else None)

    def synced(file: int) -> None:
        status = os.fstat(file)
        new = status.st_size - sizes.get(status.st_ino, 0)
        new = new if new > 0 else status.st_size  # the inode is that of a file that is gone
        point(f"fsync {new} bytes", lambda: os.ftruncate(file, status.st_size - max(1, new // 2)))
        fsync(file)
        sizes[status.st_ino] = status.st_size

    os.fsync = synced
    sys.addaudithook(audit)


def _append(path: str) -> None:
    with open(path, "ab") as sink:
        sink.write(HALF_A_LINE)
