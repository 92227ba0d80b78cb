"""Figures that hold several runs against each other: efficacy of all edits so far; what quality costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from easyeditor.drawing.canvas import (
    DASHES,
    THOUSANDS,
    Drawn,
    counted,
    drawable,
    finish,
    heading,
    label_points,
    legend_above,
    log_ticks,
    new_figure,
)
from easyeditor.drawing.palette import BLUE, CYCLE
from easyeditor.results.run import Run


def look(number: int) -> dict[str, Any]:
    """Colour and dashes of the `number`-th curve of a figure."""
    return {"color": CYCLE[number % len(CYCLE)], "ls": DASHES[number // len(CYCLE) % len(DASHES)]}


def efficacy_figure(runs: Sequence[Run], name: str) -> Drawn | None:
    """Mean rewrite accuracy of all edits in the model at each evaluation, a curve for each run; None without any."""
    curves = [(run, [(seen.after, seen.means()["rewrite_acc"]) for seen in run.evaluations]) for run in runs]
    curves = [(run, points) for run, points in curves if any(value is not None for _, value in points)]
    if not curves:
        return None
    figure = new_figure(height=5.0 + 0.22 * len(curves))
    axes = figure.subplots()
    for number, (run, points) in enumerate(curves):
        known = [(after, 100 * value) for after, value in points if value is not None]
        places, values = [after for after, _ in known], [value for _, value in known]
        axes.plot(places, values, marker="o", ms=4, lw=1.6, label=drawable(run.label, 90), **look(number))
    axes.set_xlabel("edits made")
    axes.set_ylabel("efficacy of all edits so far (%)")
    axes.set_ylim(-3, 103)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(THOUSANDS)
    heading(figure, "Efficacy of all edits so far", counted(len(curves), "run"))
    legend_above(axes, 1)
    caption = "Mean rewrite accuracy over the edits that are in the model, measured anew at each evaluation."
    return finish(figure, name, "Efficacy of all edits so far", caption)


@dataclass(frozen=True, kw_only=True)
class Priced:
    """One run as a point: seconds an edit, and its quality from 0 to 1."""

    label: str
    seconds: float
    quality: float


def cost_figure(points: Sequence[Priced], name: str, quality: str) -> Drawn | None:
    """Seconds an edit against `quality` (what it is, in words), named where there is room; None without points."""
    points = [point for point in points if point.seconds > 0]
    if not points:
        return None
    figure = new_figure()
    axes = figure.subplots()
    places = [(point.seconds, 100 * point.quality) for point in points]
    axes.scatter([x for x, _ in places], [y for _, y in places], c=BLUE, s=42, zorder=3)
    low, high = min(x for x, _ in places) / 2, max(x for x, _ in places) * 2
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis, low, high)
    axes.set_ylim(-5, 108)
    axes.set_xlabel("seconds an edit")
    axes.set_ylabel("quality (%)")
    heading(figure, "What quality costs", counted(len(points), "run"))
    named = [(x, y, drawable(point.label, 40)) for (x, y), point in zip(places, points, strict=True)]
    shown = label_points(axes, named, places, len(named))
    caption = f"Up and left is better. Quality: {quality}."
    caption += "" if shown == len(named) else f" {counted(len(named) - shown, 'point')} without room for a name."
    return finish(figure, name, "What quality costs", caption)
