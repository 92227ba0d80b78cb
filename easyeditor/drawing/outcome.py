"""What an experiment hands back: tables, figures and findings; and how they are written and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from easyeditor.base.files import write_bytes, write_text
from easyeditor.drawing.canvas import finish
from easyeditor.drawing.render import rich_table, to_csv
from easyeditor.drawing.table import Table
from easyeditor.results.folder import write_run


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
        verdict = {True: "holds here", False: "does not hold here", None: "cannot be told here"}[self.holds]
        return f"{self.claim}: {verdict} ({self.because})."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything one experiment found. The first table becomes `table.csv`, the others `<name>.csv`."""

    tables: Sequence[Table]
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
            write_text(folder / names[-1], to_csv(table))
        for name, figure in self.figures.items():
            drawn = finish(figure, name)
            for kind in ("png", "svg"):
                names.append(f"{name}.{kind}")
                write_bytes(folder / names[-1], getattr(drawn, kind))
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
            if table.longest != 0:
                console.print(rich_table(table))
        console.print(f"\nLook for: {self.look_for}", highlight=False, markup=False)
        for finding in self.findings:
            style = {True: "green", False: "red", None: "yellow"}[finding.holds]
            console.print(finding.sentence, style=style, highlight=False, markup=False)
