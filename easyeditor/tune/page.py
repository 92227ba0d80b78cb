"""The search's page: what was taken and how it does on held-out facts, the curves by layer, every trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from easyeditor.analysis.traced import draw_effects, draw_reach
from easyeditor.drawing.canvas import Drawn, counted, finish, heading, legend_above, stacked
from easyeditor.drawing.figures import Group, cloud
from easyeditor.drawing.page import html_page
from easyeditor.drawing.palette import GREEN, GREY, VERMILLION
from easyeditor.drawing.render import short
from easyeditor.drawing.table import Column, Table
from easyeditor.tune.search import rank
from easyeditor.tune.trials import METRICS
from easyeditor.tune.written import TuneResult, held_within, settled

HEADINGS = {"held_out": "Held-out facts", "trials": "Trials", "layers": "Layers"}
KINDS = {
    **dict.fromkeys((*METRICS, "score"), "percent"),
    **dict.fromkeys(("layer", "requests", "collapsed"), "count"),
    "seconds": "seconds",
}
TITLES = {"rewrite_acc": "rewrite", "rephrase_acc": "rephrase", "locality_acc": "locality", "ppl_ratio": "worst ppl, ×"}
TITLES |= {"ppl_median": "median ppl, ×", "requests": "facts"}


def page(found: TuneResult, tables: Sequence[Table], output: str) -> str:
    """The whole page, of the outcome's tables, inside `styled()`; `output` is the YAML that was written."""
    by_name = {table.name: table for table in tables}
    model, method = found.start.values["model_name"], found.start.method
    return html_page(
        f"{method} for {model}",
        [_table(by_name[name], title) for name, title in HEADINGS.items() if by_name[name].rows],
        [_figure(found)],
        found.start.notes,
        (found.command, f"python single_case_edit.py --hparams {output}"),
        [(str(model), _verdict(found))],
    )


def _verdict(found: TuneResult) -> list[str]:
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


def _table(table: Table, title: str) -> Table:
    titles = [column.title for column in table.columns]
    columns = tuple(Column(TITLES.get(name, name), KINDS.get(name, "")) for name in titles)
    return replace(table, title=title, columns=columns, note=table.title)


def _figure(found: TuneResult) -> Drawn:
    """By layer: what restoring it brings back, how far first places are from other subjects, what trials scored."""
    panels: list[tuple[Callable[[Any, Any], None], Any]]
    panels = [(draw_effects, found.traced), (draw_reach, found.safety), (_scores, found.trials and found)]
    panels = [panel for panel in panels if panel[1]]
    figure, rows = stacked(len(panels), 1.2 + 2.2 * len(panels))
    taken = found.best["settings"]["layers"]
    for axes, (draw, what) in zip(rows, panels, strict=True):
        axes.axvspan(taken[0] - 0.4, taken[-1] + 0.4, color=GREEN, alpha=0.12, lw=0)
        draw(axes, what)
        legend_above(axes, 3)
        axes.set_xlabel("layer" if axes is rows[-1] else "")
    count = len(found.start.parts.blocks)
    rows[-1].set(xlim=(-0.6, count - 0.4), xticks=range(0, count, -(-count // 20)))
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


def _scores(axes: Any, found: TuneResult) -> None:
    groups: dict[str, list[tuple[int, float]]] = {"within the bound": [], "beyond it": [], "given up": []}
    for line in found.trials:
        whole, within, *_ = rank(line, found.most_ratio)
        name = ("within the bound" if within else "beyond it") if whole else "given up"
        groups[name].append((line["settings"]["layers"][-1], 100 * (line["score"] or 0.0)))
    looks = ((GREEN, "o", True), (VERMILLION, "X", True), (GREY, "o", False))
    for (name, points), (color, marker, filled) in zip(groups.items(), looks, strict=True):
        if points:
            group = Group(label=name, values=np.array(points), color=color, marker=marker, filled=filled)
            cloud(axes, [group], "layer", "score (%)")
    axes.set_ylim(-4, 104)
