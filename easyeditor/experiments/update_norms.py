"""Numerator, denominator, size and perplexity of ROME's and C-ROME's updates on both sets, next to the papers'.

  python -m easyeditor.analysis update-norms               about five minutes on two CPU cores: one search a request
  python -m easyeditor.analysis update-norms --both-moments --set stats_dir=data/stats mom2_dataset=wikipedia-excerpt
        each update with C = identity and with collected statistics (python -m easyeditor.stats): the papers do not say
        which of the two their numbers come from
  python -m easyeditor.analysis update-norms --sweep       every layer: ROME, C-ROME, and C-ROME with consistent_value
  python -m easyeditor.analysis update-norms --sweep --layers 3 5 7 9 11 --limit 4

Fall of ROME, tables 2 and 3: in collapse cases the numerator is ordinary and the denominator nearly zero, so the
update is huge and perplexity explodes; C-ROME's denominators are ordinary and nothing collapses. Butterfly Effect: |dW|
of a collapsed edit is far larger than of a stable one. The sweep asks what neither paper does: at which layers does
C-ROME collapse itself, because its initial value v0 still comes from the bare first token, and does v0 as the mean over
contexts (`consistent_value: true`) prevent it?
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.render import short
from easyeditor.drawing.table import Table
from easyeditor.experiments.tools import layer_sweep
from easyeditor.experiments.tools.lab import SETS, Lab, column, common_flags, group, oriented, set_flags
from easyeditor.experiments.tools.papers import MAX_PERPLEXITY, MODELS, UPDATE_NORMS
from easyeditor.experiments.tools.projection import separation
from easyeditor.values.edit import WeightDelta

APART = 0.95
HEAT_CELLS = (96, 128)
COLUMNS = ("set", "case", "prompt", "method", "numerator", "denominator", "|dW|", "|dW|/|W|", "perplexity", "collapsed")


class Row(NamedTuple):
    """One edit, in the order of `COLUMNS`."""

    set: str
    case: Any
    prompt: str
    method: str
    numerator: float | None
    denominator: float | None
    size: float
    share: float
    ppl: float
    collapsed: bool


def add_flags(p: argparse.ArgumentParser) -> None:
    """The two sets, C, and the sweep."""
    common_flags(p)
    set_flags(p, limit=8)
    p.add_argument("--both-moments", action="store_true", help="also with the second moment C (needs statistics)")
    p.add_argument("--sweep", action="store_true", help="sweep layers with the collapse set (default: 2 requests)")
    p.add_argument("--layers", type=int, nargs="+", metavar="L", help="layers of the sweep (default: all)")


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Edit every request in every way, measure, compare; or sweep the layers."""
    if args.sweep or args.layers is not None:
        return layer_sweep.experiment(args)
    lab = Lab.of(args)
    base = lab.perplexity()
    rows, deltas = _edits(lab, base, args.both_moments)
    return Outcome(
        tables=[
            _summary(rows, base),
            _beside_papers(rows, base),
            Table.of("requests", "every edit", COLUMNS, rows, longest=0),
        ],
        figures={"update_norms": _draw(rows, lab.hparams.collapse_threshold), "heat_map": _heat_map(lab, rows, deltas)},
        findings=_findings(rows),
        look_for="ROME's denominators of the collapse set orders of magnitude below the normal set's, its updates as "
        "much larger; C-ROME's of both sets alike.",
        **lab.recorded("update-norms"),
        result={"perplexity_unedited": base},
    )


def _edits(lab: Lab, base: float, both_moments: bool) -> tuple[list[Row], list[WeightDelta]]:
    """All rows, and the update of each."""
    ways: dict[str, dict[str, bool]] = {"ROME": {"if_c_rome": False}, "C-ROME": {"if_c_rome": True}}
    if both_moments:
        ways = {
            f"{name}, C {'collected' if mom2 else '= 1'}": {**choice, "mom2_adjustment": mom2}
            for name, choice in ways.items()
            for mom2 in (False, True)
        }
        lab.method.moment(lab.layer)  # missing statistics show at once
    size = float(lab.weight().norm())
    rows, deltas = [], []
    with steps("edits") as show:
        for number, (name, request) in enumerate(lab.requests, 1):
            for method, choice in ways.items():
                delta, trace = lab.edit(request, **choice)
                ppl = lab.perplexity(delta)
                sizes = (trace.numerator_norm, trace.denominator, trace.delta_norm, trace.delta_norm / size)
                collapsed = lab.collapsed(base, ppl)
                rows.append(Row(name, request.case_id, request.prompt, method, *sizes, ppl, collapsed))
                deltas.append(delta)
            show(number, len(lab.requests), f"{request.subject}: {ppl:,.0f}")
    return rows, deltas


def _methods(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def _summary(rows: list[Row], base: float) -> Table:
    made = []
    for method in _methods(rows):
        for name in SETS:
            own = [row for row in rows if (row.method, row.set) == (method, name)]
            ppl, down = column(own, "ppl"), np.abs(column(own, "denominator"))
            means = [column(own, "numerator").mean(), down.mean(), down.min(), column(own, "size").mean()]
            numbers = map(float, (*means, ppl.min(), ppl.mean(), ppl.max()))
            made.append([method, name, len(own), *numbers, sum(row.collapsed for row in own)])
    columns = ["method", "set", "edits", "numerator", "|denominator|", "smallest", "|dW|", "ppl min", "mean", "max"]
    title = f"means over edits; perplexity of the unedited model: {base:.1f}"
    return Table.of("summary", title, [*columns, "collapsed"], made)


def _beside_papers(rows: list[Row], base: float) -> Table:
    methods = {name: next(m for m in _methods(rows) if m.startswith(name)) for name in ("ROME", "C-ROME")}
    made: list[list[Any]] = []
    for name, numbers in UPDATE_NORMS.items():
        for place, what in enumerate(("numerator", "denominator")):
            ours = float(np.abs(column(rows, what, set=name, method=methods["ROME"])).mean())
            made.append([f"ROME, {name}: mean {what}", ours, *(numbers[model][place] for model in MODELS)])
    for what, worst in MAX_PERPLEXITY.items():
        method, _, name = what.partition(", ")
        ours = float(column(rows, "ppl", set=name, method=methods[method]).max()) if name else base
        made.append([f"{what}: highest perplexity", ours, *(worst[model] for model in MODELS)])
    return Table.of("papers", "next to the papers' tables", ["", "ours", *MODELS], made)


def _findings(rows: list[Row]) -> list[Finding]:
    rome, c_rome = (next(m for m in _methods(rows) if m.startswith(name)) for name in ("ROME", "C-ROME"))
    down, normal_down = (np.abs(column(rows, "denominator", set=name, method=rome)) for name in SETS)
    up, normal_up = (column(rows, "numerator", set=name, method=rome).mean() for name in SETS)
    apart = separation(down, normal_down)
    less, more = normal_down.mean() / down.mean(), up / normal_up
    hit, normal_hit = (column(rows, "collapsed", set=name, method=rome) for name in SETS)
    return [
        Finding(
            claim="ROME's denominators are far smaller in collapse cases",
            holds=apart >= APART,
            because=f"mean {down.mean():.3g} against {normal_down.mean():.3g}; {apart:.0%} of pairs in that order",
        ),
        Finding(
            claim="The denominator makes the update large, not the numerator",
            holds=bool(less > max(more, 1 / more)),
            because=f"collapse cases: numerator {more:.3g} times the normal one, denominator 1/{less:.3g} of it",
        ),
        Finding(
            claim="ROME collapses the collapse cases and no normal one",
            holds=bool(hit.mean() > 0.5 and not normal_hit.any()),
            because=f"{hit.sum():.0f} of {len(hit)} collapse cases, {normal_hit.sum():.0f} of {len(normal_hit)} "
            "normal ones",
        ),
        Finding(
            claim="C-ROME collapses neither",
            holds=not column(rows, "collapsed", method=c_rome).any(),
            because=f"highest perplexity {column(rows, 'ppl', method=c_rome).max():,.1f}",
        ),
    ]


def _draw(rows: list[Row], threshold: float) -> Figure:
    shown = {"numerator": "numerator", "denominator": "|denominator|", "size": "‖ΔW‖", "ppl": "perplexity"}
    methods = _methods(rows)
    figure = canvas.panels(list(shown.values()), columns=2, width=1.2 + 1.9 * len(methods), height=3.2)
    for ax, (field, label) in zip(figure.get_axes(), shown.items(), strict=True):
        groups = [
            group(
                name,
                np.abs(column(rows, field, set=name, method=method)),
                label=f"{method}\n{name}",
                filled=method.startswith("ROME"),
            )
            for method in methods
            for name in SETS
        ]
        figures.strips(ax, groups, label, line=(threshold, "collapse threshold") if field == "ppl" else None)
    return figure


def _heat_map(lab: Lab, rows: list[Row], deltas: list[WeightDelta]) -> Figure:
    """|dW| of ROME's stablest normal edit and of its worst collapse case, the largest entry in each cell of a grid."""
    rome = [(row, delta) for row, delta in zip(rows, deltas, strict=True) if row.method.startswith("ROME")]
    picked = [
        best((pair for pair in rome if pair[0].set == name), key=lambda pair: pair[0].ppl)
        for name, best in (("normal", min), ("collapse", max))
    ]
    titles, maps = [], []
    for row, delta in picked:
        told = f"perplexity {short(row.ppl)}, ‖ΔW‖ {short(row.size)}"
        titles.append(f"{row.set}: {textwrap.shorten(row.prompt, 32)}\n{told}")
        maps.append(figures.max_pooled(oriented(delta.dense(), lab.method, lab.layer).numpy(), *HEAT_CELLS))
    figure = canvas.panels(titles)
    figures.heat_maps(figure, maps, "key dimension (grouped)", "value dimension (grouped)", "largest |ΔW| in a cell")
    return figure
