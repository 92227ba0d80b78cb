"""The search's page: what was taken and how it does on held-out facts, the curves by layer, every trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from easyeditor.analysis.traced import LOOKS, NAMES, average, kinds_of
from easyeditor.analysis.tracing import LAST
from easyeditor.drawing.canvas import Drawn, counted, finish, heading, legend_above, log_ticks, new_figure, styled
from easyeditor.drawing.outcome import ResultTable, short
from easyeditor.drawing.page import html_page
from easyeditor.drawing.palette import GREEN, GREY, VERMILLION
from easyeditor.drawing.table import Column, Table
from easyeditor.tune.search import rank
from easyeditor.tune.trials import METRICS
from easyeditor.tune.written import Search, held_within, settled

HEADINGS = {"held_out": "Held-out facts", "trials": "Trials", "layers": "Layers"}
KINDS = {
    **dict.fromkeys((*METRICS, "score"), "percent"),
    **dict.fromkeys(("layer", "requests", "collapsed"), "count"),
    "seconds": "seconds",
}
TITLES = {"rewrite_acc": "rewrite", "rephrase_acc": "rephrase", "locality_acc": "locality", "ppl_ratio": "worst ppl, ×"}
TITLES |= {"ppl_median": "median ppl, ×", "requests": "facts"}


def page(found: Search, tables: Sequence[ResultTable], output: str) -> str:
    """The whole page, of the outcome's tables; `output` is the YAML that was written."""
    with styled():
        figure = _figure(found)
    by_name = {table.name: table for table in tables}
    model, method = found.start.values["model_name"], found.start.method
    return html_page(
        f"{method} for {model}",
        [_table(by_name[name], title) for name, title in HEADINGS.items() if by_name[name].rows],
        [figure],
        found.start.said,
        (found.command, f"python single_case_edit.py --hparams {output}"),
        [(str(model), _verdict(found))],
    )


def _verdict(found: Search) -> list[str]:
    held = found.held_out[0]
    settings = ", ".join(f"{key} {value}" for key, value in found.best["settings"].items())
    if held["score"] is None:
        return [f"Taken: {settings}.", f"The held-out facts could not be edited: {held['failed']}"]
    bound = "" if held_within(found) else f" That is beyond the bound of {found.most_ratio:g}."
    if not settled(found):
        bound = f" No trial kept perplexity within {found.most_ratio:g} times the unedited."
    told = f"rewrite {held['rewrite_acc']:.1%}, {held['collapsed'] or 'none'} collapsed, "
    told += f"worst perplexity {short(held['ppl_ratio'])} times the unedited"
    return [
        f"On {counted(held['requests'], 'held-out fact')}: {told}.{bound}",
        f"Taken: {settings}.",
    ]


def _table(table: ResultTable, title: str) -> Table:
    first = [next((row[n] for row in table.rows if row[n] is not None), "") for n in range(len(table.columns))]
    columns = [
        Column(title=TITLES.get(name, name), kind=KINDS.get(name, "number" if _is_number(value) else "text"))
        for name, value in zip(table.columns, first, strict=True)
    ]
    rows = tuple(tuple("yes" if v is True else "no" if v is False else v for v in row) for row in table.rows)
    return Table(name=table.name, title=title, columns=tuple(columns), rows=rows, note=table.title)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(found: Search) -> Drawn:
    """By layer: what restoring it brings back, how far first places are from other subjects, what trials scored."""
    panels = [
        panel for panel, known in ((_effects, found.traced), (_reach, found.safety), (_scores, found.trials)) if known
    ]
    figure = new_figure(height=1.2 + 2.2 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    taken = found.best["settings"]["layers"]
    for axes, panel in zip(rows, panels, strict=True):
        axes.axvspan(taken[0] - 0.4, taken[-1] + 0.4, color=GREEN, alpha=0.12, lw=0)
        panel(axes, found)
        legend_above(axes, 3)
    rows[-1].set_xlabel("layer")
    count = len(found.start.parts.blocks)
    rows[-1].set_xlim(-0.6, count - 0.4)
    rows[-1].set_xticks(range(0, count, -(-count // 20)))
    title = "By layer: causal trace, collapse safety, trials"
    heading(figure, title, f"{found.start.method}, {found.start.values['model_name']}")
    caption = (
        "Green: the layers that were taken. Trace: average indirect effect of putting back a state or MLP outputs at "
    )
    caption += (
        f"the subject's last token ({counted(len(found.traced), 'fact')}). Reach: |kᵘ·u|/|k̄·u| of one-word subjects in "
    )
    caption += "first place, median and range; 1 is as any other subject. Score: of each trial, by its last layer."
    return finish(figure, "layers", title, caption)


def _effects(axes: Any, found: Search) -> None:
    for kind in kinds_of(found.traced):
        if (values := average(found.traced, kind, LAST)) is not None:
            color, marker, line = LOOKS[kind]
            axes.plot(range(len(values)), values, color=color, marker=marker, ls=line, ms=4, label=NAMES[kind])
    axes.set_ylabel("effect")


def _reach(axes: Any, found: Search) -> None:
    layers = [one.layer for one in found.safety]
    ends = [[one.least_reach for one in found.safety], [one.most_reach for one in found.safety]]
    axes.fill_between(layers, *ends, color=VERMILLION, alpha=0.15, lw=0)
    axes.plot(
        layers, [one.reach for one in found.safety], color=VERMILLION, marker="o", ms=4, label="reach, first place"
    )
    axes.axhline(1, color=GREY, ls=":", lw=1)
    axes.set_yscale("log")
    low, high = min([1.0, *ends[0]]), max([1.0, *ends[1]])
    axes.set_ylim(max(low, 1e-9) / 1.3, high * 1.3)
    log_ticks(axes.yaxis, *axes.get_ylim())
    axes.set_ylabel("reach")


def _scores(axes: Any, found: Search) -> None:
    groups: dict[str, list[tuple[int, float]]] = {"within the bound": [], "beyond it": [], "given up": []}
    for line in found.trials:
        whole, within, *_ = rank(line, found.most_ratio)
        name = ("within the bound" if within else "beyond it") if whole else "given up"
        groups[name].append((line["settings"]["layers"][-1], 100 * (line["score"] or 0.0)))
    looks = ((GREEN, "o", GREEN), (VERMILLION, "X", VERMILLION), (GREY, "o", "none"))
    for (name, points), (color, marker, face) in zip(groups.items(), looks, strict=True):
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, facecolors=face, s=34, label=name)
    axes.set_ylim(-4, 104)
    axes.set_ylabel("score (%)")
