"""One kind of progress bar for everything that takes long, and one stopwatch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from easyeditor.base.process import look, shown

Progress = Callable[[int, int, str], None]
"""Called with (done, of, note): what a progress bar needs."""


EVERY_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


@contextmanager
def progress_bar(title: str, shown: bool, *, initial: int = 0) -> Iterator[Progress | None]:
    """Progress on stderr: a bar on a terminal, else a plain line at most every 10 s and one at the end.

    None when it is not to be shown; `initial` were done in an earlier run.
    """
    if not shown:
        yield None
        return
    with _bar(title.strip(), initial) if sys.stderr.isatty() else _lines(title.strip(), initial) as show:
        yield show


@contextmanager
def _bar(title: str, initial: int) -> Iterator[Progress]:
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    with tqdm(desc=shown(title), initial=initial, leave=True, dynamic_ncols=True, file=stream) as bar:

        def show(done: int, of: int, note: str) -> None:
            look()
            bar.total = of
            bar.n = done
            bar.set_postfix_str(shown(note), refresh=False)
            bar.refresh()

        yield show
        if bar.total is not None and bar.n < bar.total:  # stopped early: the rest was not needed
            bar.total = bar.n
            bar.refresh()


@contextmanager
def _lines(title: str, initial: int) -> Iterator[Progress]:
    started = written = time.monotonic()
    last: tuple[int, int, str] | None = None

    def say(done: int, of: int, note: str) -> None:
        took = time.monotonic() - started
        left = f", about {(of - done) * took / (done - initial):.0f} s left" if initial < done < of else ""
        sys.stderr.write(f"{title}: {done}/{of}, {took:.0f} s{left}{', ' + note if note else ''}\n")
        sys.stderr.flush()

    def show(done: int, of: int, note: str) -> None:
        nonlocal written, last
        look()
        last = done, of, note
        if time.monotonic() - written >= EVERY_SECONDS:
            written = time.monotonic()
            say(done, of, note)
            last = None

    try:
        yield show
    except BaseException:
        if last:
            say(*last)
        raise
    if last:  # stopped early: the rest was not needed
        say(last[0], last[0], last[2])


class Stopwatch:
    """Seconds spent under each name: ``with clock("metrics"): …``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def steps(title: str) -> Iterator[Progress]:
    """A progress bar on stderr for an experiment's requests."""
    with progress_bar(title, True) as show:
        assert show is not None
        yield show
