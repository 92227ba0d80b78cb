"""One self-contained HTML page: figures inside it, no script or style from elsewhere, all texts escaped."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from easyeditor.base.reading import check_file, read_bytes
from easyeditor.drawing.canvas import Drawn
from easyeditor.drawing.render import cut, shown
from easyeditor.drawing.table import Table

LONGEST = 500
"""Rows of a table on the page; all of them are in its CSV file."""
WIDEST = 300
"""Characters of a text in a table on the page; all of it is in the CSV file."""

_CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5a5a5a; --paper: #ffffff; --line: #d4d4d4; --tint: #f4f4f4;
  --link: #00588c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a8a8a8; --paper: #17191c; --line: #3c4046;
  --tint: #22262b; --link: #7cc4f0; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
a { color: var(--link); } nav a { margin-right: 1rem; white-space: nowrap; }
p, figcaption { max-width: 80ch; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: 8px; }
.wide { overflow-x: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; max-width: 26rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--tint); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after {
  content: " \\2193"; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
"""

# Sorts by the raw value in data-v: numbers as numbers, texts as texts, what is not known last.
_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = table.tHead.rows[0].cells;
  Array.from(heads).forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    Array.from(heads).forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0], numeric = head.classList.contains("n");
    const value = row => { const v = row.cells[column].dataset.v; return numeric && v !== "" ? Number(v) : v; };
    Array.from(body.rows).sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? (x === y ? 0 : x < y ? -1 : 1) : x.localeCompare(y);
      return down ? -order : order;
    }).forEach(row => body.appendChild(row));
  }));
});
"""


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def is_page(path: Path) -> bool:
    """Is this file a page that `html_page` made (known by its content policy)?"""
    try:
        check_file(path)
        with open(path, "rb") as source:
            return _POLICY.encode() in source.read(1000)
    except OSError:
        return False


def listed(path: Path) -> list[tuple[str, str]]:
    """(`figures` or `tables`, name) of each figure and table on a page that `html_page` made; none without a page."""
    text = read_bytes(path).decode(errors="replace") if is_page(path) else ""
    found = re.findall(r'<h2 id="([A-Za-z0-9][\w.-]*)">[^<]*</h2>\n<(figure|div)', text)
    return [("figures" if tag == "figure" else "tables", name) for name, tag in found]


def html_page(
    title: str,
    tables: Sequence[Table],
    figures: Sequence[Drawn],
    notes: Sequence[str],
    commands: Sequence[str],
    verdicts: Sequence[tuple[str, Sequence[str]]] = (),
) -> str:
    """The whole page: the verdicts, (run, sentences) each, then the figures, then what was run and the other tables."""
    sections = [_figure(figure) for figure in figures] + [_table(table) for table in tables] + [_commands(commands)]
    links = [("verdict", "Verdict")] if verdicts else []
    links += [(figure.name, figure.title) for figure in figures] + [(table.name, table.title) for table in tables]
    links.append(("again", "How to run it again"))
    nav = " ".join(f'<a href="#{escape(name)}">{escape(text)}</a>' for name, text in links)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_CSS}</style></head>\n<body>",
            f"<h1>{escape(title)}</h1>\n<nav>{nav}</nav>",
            _verdicts(verdicts),
            _notes(notes),
            *sections,
            f"<script>{_SCRIPT}</script>\n</body></html>\n",
        ]
    )


def _verdicts(verdicts: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A paragraph for each run, its first sentence bold; the run's name where there are several."""
    parts = []
    for label, (first, *rest) in verdicts:
        name = f"{escape(label)}: " if len(verdicts) > 1 else ""
        lines = [f"<strong>{name}{escape(first)}</strong>", *map(escape, rest)]
        parts.append(f"<p>{'<br>'.join(lines)}</p>")
    return '<h2 id="verdict">Verdict</h2>\n' + "\n".join(parts) if parts else ""


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2 id="notes">Notes on the data</h2>\n<ul>{items}</ul>'


def _commands(commands: Sequence[str]) -> str:
    body = "\n".join(escape(command) for command in commands) or "The manifests hold no command line."
    return f'<h2 id="again">How to run it again</h2>\n<pre>{body}</pre>'


def _figure(figure: Drawn) -> str:
    picture = base64.b64encode(figure.svg).decode("ascii")
    return (
        f'<h2 id="{escape(figure.name)}">{escape(figure.title)}</h2>\n<figure>'
        f'<img alt="{escape(figure.title)}" src="data:image/svg+xml;base64,{picture}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    kinds = [' class="n"' if number else "" for number in table.numeric]
    heads = "".join(
        f"<th{kind}><button>{escape(column.title)}{' (%)' if column.kind == 'percent' else ''}</button></th>"
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    body = []
    for row in table.rows[:LONGEST]:
        cells = zip(row, table.columns, kinds, strict=True)
        body.append(
            "<tr>"
            + "".join(f"<td{k} data-v{_raw(v)}>{escape(cut(shown(v, c), WIDEST))}</td>" for v, c, k in cells)
            + "</tr>"
        )
    notes = [table.note] if table.note else []
    if len(table.rows) > LONGEST:
        notes.append(f"The first {LONGEST:,} of {len(table.rows):,} rows; all are in tables/{table.name}.csv.")
    if any(isinstance(value, str) and len(value) > WIDEST for row in table.rows[:LONGEST] for value in row):
        notes.append(f"Texts are cut after {WIDEST} characters; tables/{table.name}.csv has all of them.")
    return (
        f'<h2 id="{escape(table.name)}">{escape(table.title)}</h2>\n<div class="wide"><table class="sortable"><thead>'
        f"<tr>{heads}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
        + "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    )  # fmt: skip


def _raw(value: object) -> str:
    """The attribute `data-v` is sorted by: `=""` for what is not known, Infinity for what is not finite."""
    if value is None:
        return '=""'
    if isinstance(value, float) and not math.isfinite(value):
        return '="Infinity"'
    return f'="{escape(cut(str(value), WIDEST))}"'
