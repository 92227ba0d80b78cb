"""A table as terminal text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
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
SHORTEST_TEXT = 8  # characters a printed text is never cut below


def shown(value: Any, column: Column) -> str:
    """A cell for reading: rounded, thousands apart, accuracies in %; an estimate with its interval."""
    if isinstance(value, Estimate) and value.low is not None:
        middle, low, high = (shown(float(number), column) for number in (value, value.low, value.high or 0.0))
        return f"{middle} [{low}, {high}]"
    if value is None or column.kind in ("", "text", "right"):
        return " ".join(short(value).split())
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


def short(value: Any) -> str:
    """A value by itself: four significant digits, yes or no, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def cut(text: str, longest: int) -> str:
    """`text`, or its beginning and an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def without_run(table: Table) -> Table:
    """The table less its column of run labels, for a report on one run."""
    if table.columns[0].title != "run":
        return table
    return replace(table, columns=table.columns[1:], rows=tuple(row[1:] for row in table.rows))


def rich_table(table: Table, *, framed: bool = False) -> RichTable:
    """For a terminal: numbers whole, texts cut where there is no room; `framed` with lines around its cells."""
    made = RichTable(title_justify="left", header_style="bold")
    if table.title:
        made.title = Text(table.title, style="" if framed else "bold")
    if not framed:
        made.box, made.pad_edge, made.padding = SIMPLE_HEAD, False, (0, 0, 0, 1)
    rows = table.rows[: table.longest]
    if len(rows) < len(table.rows):
        made.caption = Text(f"{len(table.rows) - len(rows):,} more rows in {table.name}.csv")
        made.caption_justify = "left"
    kept = [n for n, column in enumerate(table.columns) if table.brief is None or column.title in table.brief]
    numeric = table.numeric
    cells = [[_cell(row[n], table.columns[n]) for n in kept] for row in rows]
    for place, n in enumerate(kept):
        column, number = table.columns[n], numeric[n]
        widest = max((len(row[place]) for row in cells), default=1)
        least = widest if number else 1 if column.kind == "text" else min(widest, SHORTEST_TEXT)
        made.add_column(
            escape(column.title if framed else _SHORT.get(column.title, column.title)),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=column.kind not in ("", "text"),
            min_width=least,
        )
    for row in cells:
        made.add_row(*row)
    return made


def _cell(value: Any, column: Column) -> Text:
    unit = {"percent": "%", "seconds": " s"}.get(column.kind, "") if value is not None else ""
    whole = column.kind == "text"
    text = _printable(shown(value, column)) + unit
    return Text(text, no_wrap=not whole, overflow="fold" if whole else "ellipsis")


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
    align = "".join("r" if number else "l" for number in table.numeric)
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
