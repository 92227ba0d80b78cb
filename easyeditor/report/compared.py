"""Figures that hold several runs against each other: efficacy of all edits so far; what quality costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from easyeditor.drawing.canvas import (
    Drawn,
    counted,
    drawable,
    finish,
    heading,
    label_points,
    legend_above,
    log_axis,
    new_figure,
    stacked,
)
from easyeditor.drawing.figures import Group, cloud, curve, edits_axis, run_group
from easyeditor.drawing.palette import BLUE
from easyeditor.results.run import Run

Points = Mapping[int, float | None]
"""A number by edits made; None is not drawn."""


def along_edits(
    name: str, title: str, caption: str, height: float, panels: Mapping[str, Sequence[tuple[Run, Points]]]
) -> Drawn | None:
    """Panels, titled by what they show, with a curve for each run against the edits made; None without any point."""
    known = {
        what: [(run, [(x, y) for x, y in found.items() if y is not None and math.isfinite(y)]) for run, found in runs]
        for what, runs in panels.items()
    }
    if not any(found for runs in known.values() for _, found in runs):
        return None
    count = max(map(len, known.values()))
    figure, rows = stacked(len(panels), height + 0.22 * count)
    for axes, (what, runs) in zip(rows, known.items(), strict=True):
        for number, (run, found) in enumerate(runs):
            group = run_group(number, drawable(run.label, 90), [y for _, y in found])
            curve(axes, [x for x, _ in found], group)
        axes.set_ylabel(what)
        if "%" in what:
            axes.set_ylim(-3, 103)
    edits_axis(rows[-1])
    heading(figure, title, counted(count, "run"))
    if count > 1 or len(rows) == 1:
        legend_above(rows[0], 1)
    return finish(figure, name, title, caption)


def efficacy_figure(runs: Sequence[Run], name: str) -> Drawn | None:
    """Mean rewrite accuracy of all edits in the model at each evaluation, a curve for each run; None without any."""
    means = [(run, {seen.after: seen.means()["rewrite_acc"] for seen in run.evaluations}) for run in runs]
    shares = [(run, {x: 100 * y for x, y in found.items() if y is not None}) for run, found in means if found]
    title = "Efficacy of all edits so far"
    caption = "Mean rewrite accuracy over the edits that are in the model, measured anew at each evaluation."
    return along_edits(name, title, caption, 5.0, {"efficacy of all edits so far (%)": shares})


@dataclass(frozen=True, kw_only=True)
class Priced:
    """One run as a point: seconds an edit, and its quality from 0 to 1."""

    label: str
    seconds: float
    quality: float


def cost_figure(priced: Sequence[Priced], name: str, quality: str) -> Drawn | None:
    """Seconds an edit against `quality` (what it is, in words), named where there is room; None without points."""
    runs = [run for run in priced if run.seconds > 0]
    if not runs:
        return None
    figure = new_figure()
    axes = figure.subplots()
    places = [(run.seconds, 100 * run.quality) for run in runs]
    cloud(axes, [Group(label="", values=np.array(places), color=BLUE)], "seconds an edit", "quality (%)")
    log_axis(axes, "x", min(places)[0] / 2, max(places)[0] * 2)
    axes.set_ylim(-5, 108)
    heading(figure, "What quality costs", counted(len(runs), "run"))
    named = [(*place, drawable(run.label, 40)) for place, run in zip(places, runs, strict=True)]
    shown = label_points(axes, named, places, len(named))
    caption = f"Up and left is better. Quality: {quality}."
    caption += "" if shown == len(named) else f" {counted(len(named) - shown, 'point')} without room for a name."
    return finish(figure, name, "What quality costs", caption)
