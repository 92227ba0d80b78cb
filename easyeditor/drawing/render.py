"""A table as terminal text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from easyeditor.drawing.table import Column, Table
from easyeditor.results.shown import shown_ppl
from easyeditor.values.estimates import Estimate

_SHORT = {
    "|denominator|": "|denom.|",
    "max perplexity": "max ppl",
    "generalization": "general.",
    "perplexity": "ppl",
    "numerator": "numer.",
}
"""Titles in a terminal, so that the papers' table fits 80 columns."""
NUMERIC = ("count", "number", "perplexity", "percent", "seconds")


def shown(value: Any, column: Column) -> str:
    """A cell for reading: rounded, thousands apart, accuracies in %; an estimate with its interval."""
    if value is None:
        return "–"
    if isinstance(value, Estimate) and value.low is not None:
        middle, low, high = (shown(float(number), column) for number in (value, value.low, value.high or 0.0))
        return f"{middle} [{low}, {high}]"
    if column.kind == "text":
        return " ".join(str(value).split())
    if column.kind == "perplexity":
        return shown_ppl(value)
    if not math.isfinite(value):
        return "not finite"
    if column.kind == "count":
        return f"{value:,}"
    if column.kind == "percent":
        return f"{100 * value:.2f}"
    if column.kind == "seconds":
        return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"


def cut(text: str, longest: int) -> str:
    """`text`, or its beginning and an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def without_run(table: Table) -> Table:
    """The table less its column of run labels, for a report on one run."""
    if not table.columns or table.columns[0].title != "run":
        return table
    rows = tuple(row[1:] for row in table.rows)
    return Table(name=table.name, title=table.title, columns=table.columns[1:], rows=rows, note=table.note)


def rich_table(table: Table, longest: int | None = None, leave_out: Sequence[str] = ()) -> RichTable:
    """For a terminal: the first `longest` rows, without the columns titled in `leave_out`."""
    made = RichTable(title=Text(table.title, style="bold"), title_justify="left", header_style="bold")
    made.box, made.pad_edge, made.padding = SIMPLE_HEAD, False, (0, 0, 0, 1)
    if longest is not None and len(table.rows) > longest:
        made.caption = Text(f"{len(table.rows) - longest:,} more rows in {table.name}.csv")
        made.caption_justify = "left"
    kept = [(place, column) for place, column in enumerate(table.columns) if column.title not in leave_out]
    for _, column in kept:
        right = column.kind in NUMERIC
        title = escape(_SHORT.get(column.title, column.title))
        made.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in table.rows[:longest]:
        made.add_row(*(_cell(row[place], column) for place, column in kept))
    return made


def _cell(value: Any, column: Column) -> Text:
    unit = {"percent": "%", "seconds": " s"}.get(column.kind, "") if value is not None else ""
    return Text(_printable(shown(value, column)) + unit)


def _printable(text: str) -> str:
    """At most 72 characters, none of them a control character, which a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in cut(text, 72))


def to_csv(table: Table) -> str:
    """All rows with full precision: accuracies as shares of 1, `inf` for not finite, empty for not known. A column of
    estimates is followed by its lows and its highs."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    wide = [any(isinstance(row[place], Estimate) for row in table.rows) for place in range(len(table.columns))]
    titles = zip((column.title for column in table.columns), wide, strict=True)
    writer.writerow(name for t, is_wide in titles for name in ((t, f"{t} low", f"{t} high") if is_wide else (t,)))
    for row in table.rows:
        cells = zip(row, wide, strict=True)
        writer.writerow(part for value, is_wide in cells for part in (_three(value) if is_wide else (value,)))
    return sink.getvalue()


def _three(value: Any) -> tuple[Any, Any, Any]:
    return (float(value), value.low, value.high) if isinstance(value, Estimate) else (value, None, None)


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "–": "--",
}  # fmt: skip


def latex_escaped(text: str) -> str:
    """`text` with every character LaTeX gives a meaning to written out, on one line."""
    return "".join(_LATEX.get(c, c if c.isprintable() else " ") for c in " ".join(text.split()))


def to_latex(table: Table, longest: int = 200) -> str:
    """A booktabs `tabular` of the first `longest` rows, ready to \\input."""
    align = "".join("r" if column.kind in NUMERIC else "l" for column in table.columns)
    percent = {column.title: r" (\%)" for column in table.columns if column.kind == "percent"}
    titles = [latex_escaped(column.title) + percent.get(column.title, "") for column in table.columns]
    lines = [
        f"% {latex_escaped(table.title)}. Needs \\usepackage{{booktabs}} and, for \\textquotedbl, "
        "\\usepackage[T1]{fontenc}.",
        f"\\begin{{tabular}}{{{align}}}",
        "\\toprule",
        " & ".join(titles) + r" \\",
        "\\midrule",
    ]
    for row in table.rows[:longest]:
        cells = (
            latex_escaped(cut(shown(value, column), 300)) for value, column in zip(row, table.columns, strict=True)
        )
        lines.append(" & ".join(cells) + r" \\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    if len(table.rows) > longest:
        lines.append(f"% {len(table.rows) - longest} more rows in {table.name}.csv")
    return "\n".join(lines) + "\n"
