"""The process a script runs in: signals that ask it to end, and standard streams that may be gone."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f]")
"""What a terminal obeys: control characters (C0 without tab and line feed, DEL, C1), direction marks."""
AGAIN = 1.0  # seconds: a signal that comes sooner is the same one, sent to the process and to its group


class Terminated(KeyboardInterrupt):
    """SIGTERM came: everything that undoes or keeps its work on Ctrl-C does so now."""


_KINDS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_asked: list[type[KeyboardInterrupt]] = []  # what the first signal asked for


def look() -> None:
    """End here if a signal asked for it and its exception was lost: Python drops one that is raised in a garbage
    collection, and a library may swallow it. Loops over edits, batches and steps look; it costs nothing."""
    if _asked:
        raise _asked[0]


@contextmanager
def heard() -> Iterator[None]:
    """A block during which a signal came ends with its exception, whatever became of that inside."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if _asked:
            raise _asked[0] from error
        raise
    look()


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Terminated, now or at the next `look`; a second one ends the
    process at once. Under torchrun, which sends its own after that of the terminal, only the first one counts. A signal
    that was ignored or handled already stays so."""
    first, hook = 0.0, sys.unraisablehook

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not _asked:
            first = time.monotonic()
            _asked.append(_KINDS[number])
            raise _asked[0]
        if time.monotonic() - first > AGAIN and "TORCHELASTIC_RUN_ID" not in os.environ:
            with suppress(OSError):
                os.write(2, b"interrupted again: ended at once\n")
            os._exit(128 + number)

    def lost(found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):  # `look` raises it again
            hook(found)

    before = {number: signal.getsignal(number) for number in _KINDS}
    ours = [number for number, kept in before.items() if kept in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number in ours:
            signal.signal(number, stop)
        sys.unraisablehook = lost
        with heard():
            yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        sys.unraisablehook = hook
        _asked.clear()


class _Stream(io.FileIO):
    """A standard stream whose loss ends no work: from the first error on, which is kept, nothing more is written."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return memoryview(data).nbytes


def shown(text: str) -> str:
    """A text for a terminal: what it would obey is spelled as JSON does, so JSON stays what it was."""
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Shown(io.TextIOWrapper):
    """A standard stream on which every text is `shown`; a line begun anew (bars of libraries) stays so."""

    def write(self, text: str) -> int:
        begin = text[: text.startswith("\r")]
        super().write(begin + shown(text[len(begin) :]))
        return len(text)

    @property
    def rich_proxied_file(self) -> _Obeyed:
        """Where rich writes."""
        return _Obeyed(self)


class _Obeyed:
    """The same stream for who styles and moves on purpose, and shows data himself."""

    def __init__(self, stream: _Shown) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return io.TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Segments:
    """Something rich draws, its texts `shown`."""

    def __init__(self, drawn: Any) -> None:
        self._drawn = drawn

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for segment in console.render(self._drawn, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))


class _Hook:
    """rich's place for what is done to all that a console prints."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        """Each with its texts shown."""
        return [_Segments(one) for one in renderables]


def terminal(width: int | None = None) -> Console:
    """The console of every table and sentence, on standard output."""
    from rich.console import Console

    made = Console(width=width)
    made.push_render_hook(_Hook())  # type: ignore[arg-type]  # rich asks for one method
    return made


@contextmanager
def streams() -> Iterator[None]:
    """Inside, standard output and error are UTF-8 and show every text (`shown`), and no write to them fails
    (`lost`). One that was closed takes nothing, and no other file gets its number, which messages would go to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free: this one
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - standard input stays open
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        try:
            raw = _Stream(number if stream is None else stream.fileno(), "wb", closefd=False)
        except (OSError, ValueError):  # a caller's stand-in, which has no number
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            continue
        if stream is not None:
            stream.flush()
        live = name == "stderr" or raw.isatty()
        buffer = io.BufferedWriter(raw)
        setattr(sys, name, _Shown(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=live))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def lost() -> OSError | None:
    """Why standard output takes nothing more; None while it does."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Stream) else None
