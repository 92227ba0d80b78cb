"""One kind of progress bar for everything that takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int, str], None]
"""Called with (done, of, note): what a progress bar needs."""


@contextmanager
def progress_bar(title: str, shown: bool) -> Iterator[Progress | None]:
    """A bar with time left on stderr, or None when it is not to be shown."""
    if not shown:
        yield None
        return
    with tqdm(desc=title.strip(), leave=True, dynamic_ncols=True, file=sys.stderr) as bar:

        def show(done: int, of: int, note: str) -> None:
            bar.total = of
            bar.n = done
            bar.set_postfix_str(note, refresh=False)
            bar.refresh()

        yield show
        if bar.total is not None and bar.n < bar.total:  # stopped early: the rest was not needed
            bar.total = bar.n
            bar.refresh()
