"""From runs to a report folder: figures, tables, one page. Loads no model."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from easyeditor.base.errors import OutputError
from easyeditor.base.files import check_parent, discard, write_bytes, write_text
from easyeditor.drawing.canvas import Drawn, counted, styled
from easyeditor.drawing.page import html_page, is_page, listed
from easyeditor.drawing.render import to_csv, to_latex, without_run
from easyeditor.drawing.table import Table
from easyeditor.report import curves, run_table, scatter, tables, watched, wild
from easyeditor.report.headline import headline
from easyeditor.results.run import Run

PAGE = "index.html"
MADE = {"figures": ("png", "svg"), "tables": ("csv", "tex")}
"""Folders of a report and the kinds of files it writes there."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report says: `title`, tables (empty ones left out), figures, notes on the data, command lines."""

    title: str
    tables: tuple[Table, ...]
    figures: tuple[Drawn, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]
    verdicts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(run, sentences) of each run that can be judged."""


def make_report(runs: Sequence[Run], worst: int = 8) -> Report:
    """Everything that is known of `runs`; `worst` is how many cases a figure names."""
    makers = (
        run_table.summary_table, tables.collapse_table, wild.wild_table, tables.collapsed_table,
        tables.prediction_table, tables.retention_table, watched.watched_table, tables.time_table,
        tables.screen_table, tables.edits_table,
    )  # fmt: skip
    made = [make(runs) for make in makers]
    return Report(
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs",
        tables=tuple(without_run(table) if len(runs) == 1 else table for table in made if table.rows),
        figures=tuple(draw(runs, worst)),
        notes=tuple(note for run in runs for note in run.notes),
        commands=tuple(line for run in runs if (line := run_table.command_line(run))),
        verdicts=tuple((run.label, lines) for run in runs if (lines := headline(run))),
    )


def draw(runs: Sequence[Run], worst: int = 8) -> list[Drawn]:
    """All figures the runs have data for; those of one run carry its number when there are several."""
    ends = [f"-{number}" if len(runs) > 1 else "" for number in range(1, len(runs) + 1)]
    with styled():
        found = [curves.sequential_figure(runs, "sequential"), watched.watched_figure(runs, "watched")]
        for run, end in zip(runs, ends, strict=True):
            found += [
                scatter.perplexity_figure(run, f"perplexity{end}", worst),
                scatter.denominator_figure(run, f"denominator{end}", worst),
                curves.retention_figure(run, f"retention-map{end}"),
                curves.training_figure(run, f"training{end}"),
            ]
    return [figure for figure in found if figure is not None]


def check_output(folder: Path) -> None:
    """Raise OutputError unless a report can be written at `folder`: it can be made, or is empty, or holds a report."""
    check_parent(folder / PAGE)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is there already and not a folder; choose another --output")
    if folder.is_dir() and any(folder.iterdir()) and not is_page(folder / PAGE):
        raise OutputError(f"{folder}: holds other files and no {PAGE} of ours; choose an empty or new folder")
    for name in MADE:
        if (folder / name).is_symlink() or ((folder / name).exists() and not (folder / name).is_dir()):
            raise OutputError(f"{folder / name}: is a link or no folder; move it away, or choose another --output")


def write_report(report: Report, folder: Path) -> Path:
    """Write all files of a report in place of an earlier report there; returns the page's path. What the earlier page
    lists goes; nothing else is touched. The page comes first, so that what a killed report wrote is listed too.

    Raises:
        OutputError: something cannot be written, or a file of that name is there and not of the earlier report.
    """
    check_output(folder)
    page = folder / PAGE
    files = {
        f"figures/{figure.name}.{end}": getattr(figure, end) for figure in report.figures for end in ("png", "svg")
    }
    for table in report.tables:
        files |= {f"tables/{table.name}.csv": to_csv(table), f"tables/{table.name}.tex": to_latex(table)}
    old = {f"{place}/{name}.{end}" for place, name in listed(page) for end in MADE[place]}
    for name in files.keys() - old:
        if os.path.lexists(folder / name):
            raise OutputError(f"{folder / name}: is there and not of the last report; move it away")
    for name in sorted(old - files.keys()):
        discard(folder / name)
    parts = (report.tables, report.figures, report.notes, report.commands, report.verdicts)
    write_text(page, html_page(report.title, *parts))
    for name, content in files.items():
        write_bytes(folder / name, content.encode() if isinstance(content, str) else content)
    return page


def describe(report: Report) -> str:
    """One line on what a report holds."""
    names = ", ".join(re.sub(r"-\d+$", "", figure.name) for figure in report.figures) or "none"
    return f"{counted(len(report.tables), 'table')}; figures: {names}"
