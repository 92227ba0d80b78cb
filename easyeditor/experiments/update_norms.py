"""Numerator, denominator, size and perplexity of ROME's and C-ROME's updates on both sets, beside the papers'.

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
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.drawing import figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding, Outcome, ResultTable, short
from easyeditor.experiments.tools import layer_sweep
from easyeditor.experiments.tools.lab import Lab, common_flags, oriented, set_flags
from easyeditor.experiments.tools.papers import MAX_PERPLEXITY, MODELS, UPDATE_NORMS
from easyeditor.experiments.tools.projection import separation
from easyeditor.values.edit import WeightDelta

APART = 0.95
HEAT_CELLS = (96, 128)
COLUMNS = ("set", "case", "prompt", "method", "numerator", "denominator", "|dW|", "|dW|/|W|", "perplexity", "collapsed")
Rows = list[list[Any]]


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
    rome = [row for row in rows if row[3].startswith("ROME")]
    return Outcome(
        tables=[
            _summary(rows, base),
            _beside_papers(rows, base),
            ResultTable(name="requests", title="every edit", columns=COLUMNS, rows=rows, printed=False),
        ],
        figures={"update_norms": _draw(rows, lab.hparams.collapse_threshold), "heat_map": _heat_map(lab, rome, deltas)},
        findings=_findings(rows),
        look_for="ROME's denominators of the collapse set orders of magnitude below the normal set's, its updates as "
        "much larger; C-ROME's of both sets alike.",
        config=lab.config(),
        manifest=lab.manifest("update-norms"),
        result={"perplexity_unedited": base},
    )


def _edits(lab: Lab, base: float, both_moments: bool) -> tuple[Rows, list[WeightDelta]]:
    """All rows, and ROME's update for each of the ROME rows."""
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
    requests = [(one.name, request) for one in lab.sets for request in one.requests]
    with steps("edits") as show:
        for number, (name, request) in enumerate(requests, 1):
            for method, choice in ways.items():
                delta, trace = lab.edit(request, **choice)
                ppl = lab.perplexity(delta)
                numbers = [trace.numerator_norm, trace.denominator, trace.delta_norm, trace.delta_norm / size, ppl]
                rows.append([name, request.case_id, request.prompt, method, *numbers, lab.collapsed(base, ppl)])
                if method.startswith("ROME"):
                    deltas.append(delta)
            show(number, len(requests), f"{request.subject}: {ppl:,.0f}")
    return rows, deltas


def _column(rows: Rows, name: str, method: str, column: str) -> Any:
    place = COLUMNS.index(column)
    return np.array([row[place] for row in rows if row[0] == name and row[3] == method], dtype=np.float64)


def _methods(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row[3] for row in rows))


def _summary(rows: Rows, base: float) -> ResultTable:
    made: Rows = []
    for method in _methods(rows):
        for name in ("collapse", "normal"):
            size, ppl = (_column(rows, name, method, column) for column in ("|dW|", "perplexity"))
            down, up = np.abs(_column(rows, name, method, "denominator")), _column(rows, name, method, "numerator")
            collapsed = int(_column(rows, name, method, "collapsed").sum())
            means = [float(up.mean()), float(down.mean()), float(down.min()), float(size.mean())]
            spread = [float(ppl.min()), float(ppl.mean()), float(ppl.max())]
            made.append([method, name, len(ppl), *means, *spread, collapsed])
    columns = ["method", "set", "edits", "numerator", "|denominator|", "smallest", "|dW|", "ppl min", "mean", "max"]
    title = f"means over edits; perplexity of the unedited model: {base:.1f}"
    return ResultTable(name="summary", title=title, columns=[*columns, "collapsed"], rows=made)


def _beside_papers(rows: Rows, base: float) -> ResultTable:
    methods = {name: next(m for m in _methods(rows) if m.startswith(name)) for name in ("ROME", "C-ROME")}
    made: Rows = []
    for name, numbers in UPDATE_NORMS.items():
        for place, what in enumerate(("numerator", "denominator")):
            ours = float(np.abs(_column(rows, name, methods["ROME"], what)).mean())
            made.append([f"ROME, {name}: mean {what}", ours, *(numbers[model][place] for model in MODELS)])
    for what, worst in MAX_PERPLEXITY.items():
        method, _, name = what.partition(", ")
        ours = base if not name else float(_column(rows, name, methods[method], "perplexity").max())
        made.append([f"{what}: highest perplexity", ours, *(worst[model] for model in MODELS)])
    return ResultTable(name="papers", title="beside the papers' tables", columns=["", "ours", *MODELS], rows=made)


def _findings(rows: Rows) -> list[Finding]:
    rome, c_rome = (next(m for m in _methods(rows) if m.startswith(name)) for name in ("ROME", "C-ROME"))
    down = {name: np.abs(_column(rows, name, rome, "denominator")) for name in ("collapse", "normal")}
    up = {name: _column(rows, name, rome, "numerator").mean() for name in ("collapse", "normal")}
    apart = separation(down["collapse"], down["normal"])
    less, more = down["normal"].mean() / down["collapse"].mean(), up["collapse"] / up["normal"]
    hit = {(m, n): _column(rows, n, m, "collapsed") for m in (rome, c_rome) for n in ("collapse", "normal")}
    worst = max(_column(rows, name, c_rome, "perplexity").max() for name in ("collapse", "normal"))
    return [
        Finding(
            claim="ROME's denominators are far smaller in collapse cases",
            holds=bool(apart >= APART),
            because=f"mean {down['collapse'].mean():.3g} against {down['normal'].mean():.3g}; "
            f"{apart:.0%} of pairs in that order",
        ),
        Finding(
            claim="The denominator makes the update large, not the numerator",
            holds=bool(less > max(more, 1 / more)),
            because=f"collapse cases: numerator {more:.3g} times the normal one, denominator 1/{less:.3g} of it",
        ),
        Finding(
            claim="ROME collapses the collapse cases and no normal one",
            holds=bool(hit[rome, "collapse"].mean() > 0.5 and not hit[rome, "normal"].any()),
            because=f"{hit[rome, 'collapse'].sum():.0f} of {len(hit[rome, 'collapse'])} collapse cases, "
            f"{hit[rome, 'normal'].sum():.0f} of {len(hit[rome, 'normal'])} normal ones",
        ),
        Finding(
            claim="C-ROME collapses neither",
            holds=not any(hit[c_rome, name].any() for name in ("collapse", "normal")),
            because=f"highest perplexity {worst:,.1f}",
        ),
    ]


def _draw(rows: Rows, threshold: float) -> Figure:
    shown = {"numerator": "numerator", "denominator": "|denominator|", "|dW|": "‖ΔW‖", "perplexity": "perplexity"}
    methods = _methods(rows)
    figure = figures.panels(list(shown.values()), columns=2, width=1.2 + 1.9 * len(methods), height=3.2)
    for ax, (column, label) in zip(figure.get_axes(), shown.items(), strict=True):
        groups = [
            Group(
                label=f"{method}\n{name}",
                values=np.abs(_column(rows, name, method, column)),
                color=figures.COLLAPSE if name == "collapse" else figures.NORMAL,
                marker="^" if name == "collapse" else "o",
                filled=method.startswith("ROME"),
            )
            for method in methods
            for name in ("collapse", "normal")
        ]
        line = (threshold, "collapse threshold") if column == "perplexity" else None
        figures.strips(ax, groups, label, line=line)
    return figure


def _heat_map(lab: Lab, rome: Rows, deltas: list[WeightDelta]) -> Figure:
    """|dW| of the stablest normal edit and of the worst collapse case, the largest entry in each cell of a grid."""
    picked = {}
    for name, best in (("normal", min), ("collapse", max)):
        places = [i for i, row in enumerate(rome) if row[0] == name]
        picked[name] = best(places, key=lambda i: rome[i][8])
    titles, maps = [], []
    for name, place in picked.items():
        row = rome[place]
        titles.append(f"{name}: {textwrap.shorten(row[2], 32)}\nperplexity {short(row[8])}, ‖ΔW‖ {short(row[6])}")
        maps.append(figures.max_pooled(oriented(deltas[place].dense(), lab.method, lab.layer).numpy(), *HEAT_CELLS))
    figure = figures.panels(titles)
    xlabel = "key dimension (grouped)"
    figures.heat_maps(figure, maps, xlabel, "value dimension (grouped)", "largest |ΔW| in a cell")
    return figure
