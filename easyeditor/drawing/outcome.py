"""What an experiment hands back: tables, figures and findings; and how they are written and printed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from easyeditor.base.files import write_text
from easyeditor.drawing.figures import save
from easyeditor.results.folder import write_run

SHORTEST_TEXT = 8  # characters a printed text is never cut below


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """Named columns and rows of texts and numbers; None is "not measured". Printed unless it is long, and then only the
    columns in `shown` (None: all)."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    printed: bool = True
    shown: Sequence[str] | None = None

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    def csv(self) -> str:
        """The table as CSV, full precision, an empty cell for None."""
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return sink.getvalue()

    def to_json(self) -> list[dict[str, Any]]:
        """One mapping per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding of the papers (`claim`), whether it holds in this run (None: these data cannot tell), and the numbers
    that say so."""

    claim: str
    holds: bool | None
    because: str

    @property
    def sentence(self) -> str:
        """The finding as one sentence."""
        said = {True: "holds here", False: "does not hold here", None: "cannot be told here"}[self.holds]
        return f"{self.claim}: {said} ({self.because})."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything one experiment found. The first table becomes `table.csv`, the others `<name>.csv`."""

    tables: Sequence[ResultTable]
    findings: Sequence[Finding]
    look_for: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> list[str]:
        """Write the run folder: CSV files, figures as PNG and SVG, config, manifest, and `result.json` last.

        Returns the names of the files a reader opens first.
        """
        names = []
        for number, table in enumerate(self.tables):
            names.append("table.csv" if number == 0 else f"{table.name}.csv")
            write_text(folder / names[-1], table.csv())
        for name, figure in self.figures.items():
            names += save(figure, folder, name)
        result = {
            "tables": {table.name: table.to_json() for table in self.tables},
            "findings": [{"claim": f.claim, "holds": f.holds, "because": f.because} for f in self.findings],
            "look_for": self.look_for,
            **self.result,
        }
        write_run(folder, config=dict(self.config), manifest=dict(self.manifest), result=result)
        return names

    def show(self, console: Console) -> None:
        """Print the tables, what to look for, and whether the papers' findings hold."""
        for table in self.tables:
            if table.printed:
                console.print(_drawn(table))
        console.print(f"\nLook for: {self.look_for}", highlight=False, markup=False)
        for finding in self.findings:
            style = {True: "green", False: "red", None: "yellow"}[finding.holds]
            console.print(finding.sentence, style=style, highlight=False, markup=False)


def short(value: Any) -> str:
    """A cell as a reader wants it: four significant digits, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def _drawn(table: ResultTable) -> rich_table.Table:
    """For a terminal: numbers whole, texts cut where there is no room."""
    drawn = rich_table.Table(title=escape(table.title), title_justify="left", header_style="bold", title_style="bold")
    drawn.box, drawn.pad_edge, drawn.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
    kept = [place for place, column in enumerate(table.columns) if table.shown is None or column in table.shown]
    for place in kept:
        numeric = any(isinstance(row[place], (int, float)) for row in table.rows)
        widest = max((len(short(row[place])) for row in table.rows), default=1)
        title, least = escape(table.columns[place]), widest if numeric else min(widest, SHORTEST_TEXT)
        drawn.add_column(title, justify="right" if numeric else "left", overflow="fold", min_width=least)
    for row in table.rows:
        drawn.add_row(*[Text(short(row[place]), no_wrap=True, overflow="ellipsis") for place in kept])
    return drawn
