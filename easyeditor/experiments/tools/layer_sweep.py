"""C-ROME at every layer: where it collapses although its key is consistent, and what a consistent value changes."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.dataset.sets import DATA, load_collapse
from easyeditor.drawing import figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding, Outcome, ResultTable
from easyeditor.drawing.palette import BLACK, BLUE, GREY, ORANGE, VERMILLION
from easyeditor.evaluate.scoring import score
from easyeditor.experiments.tools.lab import Lab, hparams_of

REQUESTS = DATA / "requests" / "layer_sweep.json"
WAYS = ("ROME", "C-ROME", "C-ROME, consistent value")
COLUMNS = (
    *("layer", "case", "prompt", "method", "|v0|", "|v*|", "numerator", "denominator", "|dW|", "perplexity"),
    *("collapsed", "P(target) behind a prefix"),
)
Rows = list[list[Any]]


def experiment(args: argparse.Namespace) -> Outcome:
    """Edit the same requests at every layer in three ways."""
    hparams = hparams_of(args)
    file = str(REQUESTS) if args.collapse is None else args.collapse
    requests = load_collapse(str(hparams.model_name), file, args.limit, hparams.seed)
    lab = Lab(hparams, requests, None, bare=args.without_bos)
    layers = lab.method.parts.dense if args.layers is None else args.layers
    lab.method.parts.check_layers(layers, "--layers")
    base = lab.perplexity()
    rows: Rows = []
    with steps("layers") as show:
        for number, layer in enumerate(layers, 1):
            rows += _at_layer(lab, layer, base)
            show(number, len(layers), f"layer {layer}")
    return Outcome(
        tables=[
            _summary(rows, base),
            ResultTable(name="edits", title="every edit", columns=COLUMNS, rows=rows, printed=False),
        ],
        figures={"layer_sweep": _draw(rows, base, hparams.collapse_threshold)},
        findings=_findings(rows),
        look_for="layers where C-ROME (circles) rises above the threshold, and whether the consistent value (squares) "
        "does there.",
        config=lab.config(),
        manifest=lab.manifest("update-norms --sweep"),
        result={"perplexity_unedited": base, "layers": layers},
    )


def _at_layer(lab: Lab, layer: int, base: float) -> Rows:
    plain = lab.relaid(layers=[layer])
    consistent = lab.relaid(layers=[layer], if_c_rome=True, consistent_value=True)
    prefix = next((c for c in lab.method.contexts if c != "{}"), "{}")
    rows: Rows = []
    for request in lab.collapse.requests:
        for way, own, c_rome in zip(WAYS, (plain, plain, consistent), (False, True, True), strict=True):
            delta, trace = own.edit(request, if_c_rome=c_rome)
            ppl = plain.perplexity(delta)
            with own.applied(delta):
                pair = (prefix.replace("{}", request.prompt), request.target_new)
                likely = score(lab.editor.model, lab.editor.tok, [pair])[0].probability
            values = [trace.value_norm_before, trace.value_norm_after, trace.numerator_norm, trace.denominator]
            measured = [*values, trace.delta_norm, ppl, lab.collapsed(base, ppl), likely]
            rows.append([layer, request.case_id, request.prompt, way, *measured])
    return rows


def _of(rows: Rows, way: str, column: str) -> dict[int, Any]:
    """A column's values by layer."""
    place = COLUMNS.index(column)
    layers = dict.fromkeys(row[0] for row in rows)
    return {layer: np.array([row[place] for row in rows if row[0] == layer and row[3] == way]) for layer in layers}


def _summary(rows: Rows, base: float) -> ResultTable:
    worst = [_of(rows, way, "perplexity") for way in WAYS]
    averaged = [*(_of(rows, way, "|v0|") for way in WAYS[1:]), _reach(rows)]
    likely = [_of(rows, way, "P(target) behind a prefix") for way in WAYS[1:]]
    made = [
        [
            layer,
            *(float(column[layer].mean()) for column in averaged),
            *(float(column[layer].max()) for column in worst),
            *(float(column[layer].mean()) for column in likely),
        ]
        for layer in dict.fromkeys(row[0] for row in rows)
    ]
    columns = ["layer", "|v0| bare", "|v0| mean", "reach", *(f"{way}: highest ppl" for way in WAYS)]
    columns += [f"{way}: P(target)" for way in WAYS[1:]]
    title = (
        f"perplexity after the edit, unedited {base:.1f}; P(target) behind a prefix; reach: how many times as far as "
        "the edited key C-ROME's update moves the subject's own key in first place"
    )
    return ResultTable(name="summary", title=title, columns=columns, rows=made)


def _reach(rows: Rows) -> dict[int, Any]:
    """|k^u u| / |kbar u| by layer: what C-ROME's update does to the first token's key, relative to the edited one."""
    first, mean = (_of(rows, way, "denominator") for way in WAYS[:2])
    return {layer: np.abs(first[layer]) / np.abs(mean[layer]) for layer in first}


def _moved(rows: Rows, way: str) -> dict[int, float]:
    """How far the update moves the output for the subject in first place, as a multiple of that output's norm; the most
    at each layer."""
    reach, start, numerator = _reach(rows), _of(rows, "C-ROME", "|v0|"), _of(rows, way, "numerator")
    return {layer: float((reach[layer] * numerator[layer] / start[layer]).max()) for layer in reach}


def _findings(rows: Rows) -> list[Finding]:
    collapsed = {way: [layer for layer, hit in _of(rows, way, "collapsed").items() if hit.any()] for way in WAYS}
    start = _of(rows, "C-ROME", "|v0|")
    hit, cured = collapsed["C-ROME"], collapsed["C-ROME, consistent value"]
    shown = ", ".join(f"{layer} (|v0| {start[layer].max():,.0f})" for layer in hit) or "none"
    other = [float(value.max()) for layer, value in start.items() if layer not in hit]
    moved = _moved(rows, WAYS[2])
    most = ", ".join(f"{layer} ({moved[layer]:.2g})" for layer in cured) or "none"
    return [
        Finding(
            claim="C-ROME collapses at no layer",
            holds=not hit,
            because=f"layers where it does: {shown}" + (f"; |v0| elsewhere at most {max(other):,.0f}" if other else ""),
        ),
        Finding(
            claim="Our addition, a value consistent over contexts, closes the hole",
            holds=None if not hit else not cured,
            because=f"layers that collapse with it: {most} of {len(start)} swept; in brackets how far the update moves "
            "a first token's output, as a multiple of its norm",
        ),
    ]


def _draw(rows: Rows, base: float, threshold: float) -> Figure:
    figure = figures.panels(["Perplexity after one edit, by layer", "Norm of the initial value v₀"], width=5.4)
    looks = [(ORANGE, "^", ":"), (VERMILLION, "o", "-"), (BLUE, "s", "--")]
    ppl_ax, start_ax = figure.get_axes()
    layers = list(dict.fromkeys(row[0] for row in rows))
    for ax, column, ways in ((ppl_ax, "perplexity", WAYS), (start_ax, "|v0|", WAYS[1:])):
        groups = [
            Group(
                label=way, values=np.stack(list(_of(rows, way, column).values()), axis=1), color=c, marker=m, line=line
            )
            for way, (c, m, line) in zip(WAYS, looks, strict=True)
            if way in ways
        ]
        figures.bands(ax, layers, groups, "layer", "perplexity" if column == "perplexity" else "‖v₀‖", every=True)
    ppl_ax.axhline(threshold, color=GREY, linestyle=":", linewidth=1)
    ppl_ax.axhline(base, color=BLACK, linewidth=0.7)
    for ax in (ppl_ax, start_ax):
        figures.log_scale(ax, "y")
    figures.legend_below(figure, ppl_ax, 3)
    return figure
