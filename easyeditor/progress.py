"""One kind of progress bar for everything that takes long, and one stopwatch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int, str], None]
"""Called with (done, of, note): what a progress bar needs."""


@contextmanager
def progress_bar(title: str, shown: bool, *, initial: int = 0) -> Iterator[Progress | None]:
    """A bar with time left on stderr, or None when it is not to be shown; `initial` were done in an earlier run."""
    if not shown:
        yield None
        return
    with tqdm(desc=title.strip(), initial=initial, leave=True, dynamic_ncols=True, file=sys.stderr) as bar:

        def show(done: int, of: int, note: str) -> None:
            bar.total = of
            bar.n = done
            bar.set_postfix_str(note, refresh=False)
            bar.refresh()

        yield show
        if bar.total is not None and bar.n < bar.total:  # stopped early: the rest was not needed
            bar.total = bar.n
            bar.refresh()


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
