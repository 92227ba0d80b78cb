"""Running the cells of a survey: those that are not done, dealt out over torchrun's processes; one that fails is named
and the others go on."""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from easyeditor.base.errors import EasyEditorError, out_of_memory
from easyeditor.base.files import discard, write_json
from easyeditor.base.process import look
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.results.run import CONFIG
from easyeditor.runs.mass import begun, execute, taken_up
from easyeditor.runs.ranks import POLL, Rank
from easyeditor.survey.cells import MEMORY, Cell

LOG = logging.getLogger(__name__)


def run_cells(cells: Sequence[Cell], rank: Rank, show: bool) -> None:
    """Run this process's share; the first process waits for the others', so that it sees all of them."""
    share = [cells[n] for n in rank.share(range(len(cells)))]
    for cell in share:
        discard(cell.failure)
    for cell in share:
        if cell.done:
            LOG.info("%s: done already", cell.name)
            continue
        LOG.info("%s: %d requests", cell.name, cell.size)
        try:
            run_cell(cell, show)
            look()
        except Exception as error:
            look()  # the end of a run that a signal ended is no finding
            if not isinstance(error, EasyEditorError) and not out_of_memory(error):
                raise
            found = " ".join(f"{type(error).__name__}: {error}".split())
            LOG.warning("%s: could not be run: %s", cell.name, found)
            write_json(cell.failure, {"cell": cell.name, "error": found})
    while rank.first and rank.world > 1 and not all(cell.done or cell.failure.exists() for cell in cells):
        time.sleep(10 * POLL)


def run_cell(cell: Cell, show: bool) -> None:
    """One cell, begun or resumed, as mass_edit.py does it; raises what that raises."""
    alone, folder = Rank(), cell.folder
    made = (folder / CONFIG).exists()
    measured = restart_peak()
    try:
        with taken_up(folder, alone) if made else begun(str(folder), cell.what):
            editor = functools.partial(BaseEditor, metrics=cell.what.settings.metrics)
            execute(folder, cell.what, editor, alone, show)
        peak = peak_bytes() if measured else None
        known = [value for value in (peak, cell.peak) if value is not None]
        write_json(folder / MEMORY, {"bytes": max(known, default=None), "of": _of()})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def restart_peak() -> bool:
    """Begin a new measurement of the most memory taken; False where this machine has none."""
    if torch.cuda.is_available():
        for card in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(card)
        return True
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts at what is used now
        return True
    return False


def peak_bytes() -> int | None:
    """The most memory taken since `restart_peak`: what torch allocated on all GPUs, else the process's resident set."""
    if torch.cuda.is_available():
        return sum(int(torch.cuda.max_memory_allocated(card)) for card in range(torch.cuda.device_count()))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def _of() -> str:
    return "GPU" if torch.cuda.is_available() else "process"
