"""C-ROME at every layer: where it collapses although its key is consistent, and what a consistent value changes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.dataset.sets import DATA, load_collapse
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.palette import BLACK, BLUE, ORANGE, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.evaluate.scoring import score
from easyeditor.experiments.tools.lab import Lab, column, hparams_of
from easyeditor.lm.tokens import SLOT

REQUESTS = DATA / "requests" / "layer_sweep.json"
WAYS = ("ROME", "C-ROME", "C-ROME, consistent value")
COLUMNS = (
    *("layer", "case", "prompt", "method", "|v0|", "|v*|", "numerator", "denominator", "|dW|", "perplexity"),
    *("collapsed", "P(target) behind a prefix"),
)
LOOKS = ((ORANGE, "^", ":"), (VERMILLION, "o", "-"), (BLUE, "s", "--"))
Array = np.ndarray[Any, np.dtype[np.float64]]


class Row(NamedTuple):
    """One edit, in the order of `COLUMNS`."""

    layer: int
    case: Any
    prompt: str
    method: str
    start: float | None
    target: float | None
    numerator: float | None
    denominator: float | None
    size: float
    ppl: float
    collapsed: bool
    likely: float


def experiment(args: argparse.Namespace) -> Outcome:
    """Edit the same requests at every layer in three ways."""
    hparams = hparams_of(args)
    file = str(REQUESTS) if args.collapse is None else args.collapse
    requests = load_collapse(str(hparams.model_name), file, args.limit, hparams.seed)
    lab = Lab(hparams, requests, None, bare=args.without_bos)
    layers = lab.method.parts.dense if args.layers is None else args.layers
    lab.method.parts.check_layers(layers, "--layers")
    base = lab.perplexity()
    rows: list[Row] = []
    with steps("layers") as show:
        for number, layer in enumerate(layers, 1):
            rows += _at_layer(lab, layer, base)
            show(number, len(layers), f"layer {layer}")
    return Outcome(
        tables=[
            _summary(rows, base),
            Table.of("edits", "every edit", COLUMNS, rows, longest=0),
        ],
        figures={"layer_sweep": _draw(rows, base, hparams.collapse_threshold)},
        findings=_findings(rows),
        look_for="layers where C-ROME (circles) rises above the threshold, and whether the consistent value (squares) "
        "does there.",
        **lab.recorded("update-norms --sweep"),
        result={"perplexity_unedited": base, "layers": layers},
    )


def _at_layer(lab: Lab, layer: int, base: float) -> Iterator[Row]:
    plain = lab.relaid(layers=[layer])
    consistent = lab.relaid(layers=[layer], if_c_rome=True, consistent_value=True)
    prefix = next((c for c in lab.method.contexts if c != SLOT), SLOT)
    for request in lab.collapse.requests:
        pair = (prefix.replace(SLOT, request.prompt), request.target_new)
        for way, own, c_rome in zip(WAYS, (plain, plain, consistent), (False, True, True), strict=True):
            delta, trace = own.edit(request, if_c_rome=c_rome)
            ppl = plain.perplexity(delta)
            with own.applied(delta):
                likely = score(lab.editor.model, lab.editor.tok, [pair])[0].probability
            yield Row(
                *(layer, request.case_id, request.prompt, way),
                *(trace.value_norm_before, trace.value_norm_after, trace.numerator_norm, trace.denominator),
                *(trace.delta_norm, ppl, lab.collapsed(base, ppl), likely),
            )


def _of(rows: Sequence[Row], way: str, field: str) -> dict[int, Array]:
    """A field's values (requests) by layer."""
    return {layer: column(rows, field, layer=layer, method=way) for layer in dict.fromkeys(row.layer for row in rows)}


def _reach(rows: Sequence[Row]) -> dict[int, Array]:
    """|k^u u| / |kbar u| by layer: what C-ROME's update does to the first token's key, relative to the edited one."""
    first, mean = (_of(rows, way, "denominator") for way in WAYS[:2])
    return {layer: np.abs(first[layer]) / np.abs(mean[layer]) for layer in first}


def _summary(rows: Sequence[Row], base: float) -> Table:
    means = {f"|v0| {what}": _of(rows, way, "start") for what, way in zip(("bare", "mean"), WAYS[1:], strict=True)}
    means["reach"] = reach = _reach(rows)
    worst = {f"{way}: highest ppl": _of(rows, way, "ppl") for way in WAYS}
    likely = {f"{way}: P(target)": _of(rows, way, "likely") for way in WAYS[1:]}
    made = [
        [
            layer,
            *(float(values[layer].mean()) for values in means.values()),
            *(float(values[layer].max()) for values in worst.values()),
            *(float(values[layer].mean()) for values in likely.values()),
        ]
        for layer in reach
    ]
    title = (
        f"perplexity after the edit, unedited {base:.1f}; P(target) behind a prefix; reach: how many times as far as "
        "the edited key C-ROME's update moves the subject's own key in first place"
    )
    return Table.of("summary", title, ["layer", *means, *worst, *likely], made)


def _findings(rows: Sequence[Row]) -> list[Finding]:
    hit, cured = ([n for n, own in _of(rows, way, "collapsed").items() if own.any()] for way in WAYS[1:])
    start, reach, numerator = _of(rows, "C-ROME", "start"), _reach(rows), _of(rows, WAYS[2], "numerator")
    shown = ", ".join(f"{layer} (|v0| {start[layer].max():,.0f})" for layer in hit) or "none"
    other = [float(value.max()) for layer, value in start.items() if layer not in hit]
    # how far the update moves the output for the subject in first place, as a multiple of that output's norm
    moved = {layer: float((reach[layer] * numerator[layer] / start[layer]).max()) for layer in cured}
    most = ", ".join(f"{layer} ({far:.2g})" for layer, far in moved.items()) or "none"
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


def _draw(rows: Sequence[Row], base: float, threshold: float) -> Figure:
    figure = canvas.panels(["Perplexity after one edit, by layer", "Norm of the initial value v₀"], width=5.4)
    ppl_ax, start_ax = figure.get_axes()
    for ax, field, label, first in ((ppl_ax, "ppl", "perplexity", 0), (start_ax, "start", "‖v₀‖", 1)):
        by_way = {way: _of(rows, way, field) for way in WAYS[first:]}
        groups = [
            figures.Group(label=way, values=np.stack(list(own.values()), axis=1), color=color, marker=marker, line=line)
            for (way, own), (color, marker, line) in zip(by_way.items(), LOOKS[first:], strict=True)
        ]
        figures.curves(ax, list(by_way[WAYS[1]]), groups, "layer", label)
    figures.level(ppl_ax, threshold)
    ppl_ax.axhline(base, color=BLACK, linewidth=0.7)
    for ax in (ppl_ax, start_ax):
        canvas.log_axis(ax, "y")
    canvas.legend_below(figure, ppl_ax, 3)
    return figure
