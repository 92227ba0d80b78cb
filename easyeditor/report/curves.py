"""Figures along a sequence: perplexity of several runs, retention of earlier edits, training of a hypernetwork."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easyeditor.drawing import figures
from easyeditor.drawing.canvas import (
    MANY,
    Drawn,
    Scale,
    count_axis,
    counted,
    drawable,
    finish,
    heading,
    legend_above,
    log_axis,
    log_scale,
    new_figure,
    stacked,
)
from easyeditor.drawing.figures import HEAT, Group, edits_axis, run_group
from easyeditor.drawing.palette import BLUE, CYCLE, GREY, VERMILLION
from easyeditor.results.lines import EditLine
from easyeditor.results.run import Run

Grid = NDArray[np.float64]
ROWS, COLUMNS = 240, 200
"""The most cells of a heat map; more edits or evaluations are averaged in groups, and the caption says so."""


def curve(run: Run) -> tuple[list[int], list[float]]:
    """(edits made, perplexity of the model that went on from there), from 0 edits; what was not measured is left out.

    An edit that the guard took back is no point. Edits of one batch were made and measured together: one point.
    """
    points: dict[int, float] = {0: run.base} if run.base is not None else {}
    for edit, following in zip_longest(run.edits, run.edits[1:]):
        same = following is not None and _around(following) == _around(edit)
        if edit.left_ppl is not None and not (edit.mode == "batch" and same):
            points[edit.step] = edit.left_ppl
    points |= {seen.after: seen.ppl for seen in run.evaluations if seen.ppl is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _around(edit: EditLine) -> tuple[float | None, float | None]:
    return edit.record.pre.ppl, edit.record.post.ppl


def sequential_figure(runs: Sequence[Run], name: str) -> Drawn | None:
    """Perplexity against the number of edits, one curve per sequential or batch run; None if there is none."""
    curves = [(run, *curve(run)) for run in runs if run.mode in ("sequential", "batch")]
    curves = [found for found in curves if found[1]]
    if not curves:
        return None
    figure = new_figure(height=5.0 + 0.22 * len(curves))
    axes = figure.subplots()
    limits = sorted({run.threshold for run, *_ in curves if run.threshold is not None})
    scale = log_scale(axes, [value for *_, values in curves for value in values], limits[:1])
    if limits:
        axes.axhline(limits[0], color=GREY, lw=1.2, ls="--", label=f"threshold {limits[0]:,.0f}")
    for number, (run, steps, values) in enumerate(curves):
        _one_curve(axes, run, steps, values, scale, number)
    axes.set_ylabel("perplexity of the edited model")
    edits_axis(axes)
    axes.set_xlim(right=max(1, *(steps[-1] for _, steps, _ in curves)) * 1.02)
    heading(figure, "Perplexity along sequences of edits", counted(len(curves), "run"))
    legend_above(axes, 1)
    back = sum(not edit.kept for run, *_ in curves for edit in run.edits)
    caption = "0 edits is the unedited model. Star: the first model above the threshold. Dot: the end of a run, or a "
    caption += "model whose perplexity is not finite (in the band at the top edge)."
    caption += f" {counted(back, 'edit')} that the guard took back left out." if back else ""
    caption += " The runs have different thresholds; the lowest is drawn." if len(limits) > 1 else ""
    return finish(figure, name, "Perplexity along sequences of edits", caption)


def _one_curve(axes: Any, run: Run, steps: list[int], values: list[float], scale: Scale, number: int) -> None:
    limit = run.threshold if run.threshold is not None else math.inf
    first = next((i for i, value in enumerate(values) if value > limit or not math.isfinite(value)), None)
    end = f"collapsed after {counted(steps[first], 'edit')}" if first is not None else "no collapse"
    group = run_group(number, f"{drawable(run.label, 80)}: {end}", scale.place(values))
    figures.curve(axes, steps, group)
    dots = [*(i for i, value in enumerate(values) if not math.isfinite(value)), -1]
    heights = group.values
    look = {"c": group.color, "zorder": 5}
    axes.scatter([steps[i] for i in dots], [heights[i] for i in dots], s=22, clip_on=False, **look)
    if first is not None:
        axes.scatter(steps[first], heights[first], marker="*", s=150, edgecolors="white", linewidths=0.6, **look)


def retention_grid(run: Run, what: str = "rewrite_acc") -> Grid:
    """(E edits, V evaluations): each edit's accuracy at each evaluation; NaN before it was made, or not measured."""
    order = {edit.index: row for row, edit in enumerate(run.edits)}
    for seen in run.evaluations:
        for row in seen.retention:
            order.setdefault(row.index, len(order))
    grid = np.full((len(order), len(run.evaluations)), np.nan)
    for column, seen in enumerate(run.evaluations):
        values = [getattr(row, what) for row in seen.retention]
        grid[[order[row.index] for row in seen.retention], column] = [np.nan if v is None else v for v in values]
    return grid


def retention_figure(run: Run, name: str) -> Drawn | None:
    """Which edits still hold after n edits: a heat map, and the mean above it; None without evaluations."""
    grid = retention_grid(run)
    if not grid.size or np.isnan(grid).all():
        return None
    edits, evaluations = grid.shape
    after = [seen.after for seen in run.evaluations]
    figure = new_figure(height=6.4)
    means, heat = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 2.6]})
    for what, label, colour, marker in (
        ("rewrite_acc", "rewrite (efficacy)", BLUE, "o"),
        ("rephrase_acc", "rephrase (generalization)", VERMILLION, "s"),
        ("locality_acc", "locality", GREY, "^"),
    ):
        mean = _column_means(retention_grid(run, what))
        if not np.isnan(mean).all():
            figures.curve(means, range(evaluations), Group(label=label, values=mean, color=colour, marker=marker))
    means.set(ylim=(-0.03, 1.03), ylabel="mean over\nedits so far")
    legend_above(means, 3)
    cells, rows, columns = _grouped(grid)
    image = heat.imshow(
        cells, aspect="auto", interpolation="nearest", cmap=HEAT, vmin=0, vmax=1, origin="upper",
        extent=(-0.5, evaluations - 0.5, edits + 0.5, 0.5),
    )  # fmt: skip
    heat.set_facecolor("#F2F2F2")
    heat.grid(visible=False)
    ticks = range(0, evaluations, math.ceil(evaluations / 14))
    heat.set_xticks(ticks, [f"{after[tick]:,}" for tick in ticks])
    heat.set(xlabel="evaluation after n edits", ylabel="edit, in the order made")
    count_axis(heat.yaxis)
    figure.colorbar(image, ax=heat, label="rewrite accuracy", pad=0.01)
    heading(figure, "Retention of earlier edits", run.label)
    caption = "Rewrite accuracy of each edit at each evaluation; light grey: not made yet, or not measured."
    if rows > 1 or columns > 1:
        caption += f" To stay readable each cell is the mean over {counted(rows, 'edit')} and "
        caption += f"{counted(columns, 'evaluation')}."
    return finish(figure, name, "Retention of earlier edits", caption)


def _column_means(grid: Grid) -> Grid:
    known = ~np.isnan(grid)
    count = known.sum(axis=0)
    total = np.where(known, grid, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _grouped(grid: Grid) -> tuple[Grid, int, int]:
    """`grid` with at most ROWS x COLUMNS cells, and how many rows and columns make one cell; unknown cells do not
    count into the means."""
    rows, columns = (math.ceil(size / most) for size, most in zip(grid.shape, (ROWS, COLUMNS), strict=True))
    pad = [(0, -grid.shape[0] % rows), (0, -grid.shape[1] % columns)]
    wide = np.pad(grid, pad, constant_values=np.nan)
    blocks = wide.reshape(wide.shape[0] // rows, rows, wide.shape[1] // columns, columns).transpose(1, 3, 0, 2)
    flat = blocks.reshape(rows * columns, -1)
    return _column_means(flat).reshape(blocks.shape[2:]), rows, columns


PANELS = (
    ("loss", (("edit_loss", "edit loss"), ("locality_loss", "locality loss"), ("total_loss", "total loss"))),
    ("accuracy", (("edit_acc", "edit accuracy"), ("locality_acc", "locality"))),
    ("drawdown", (("locality_drawdown", "locality drawdown"),)),
)


def training_figure(run: Run, name: str) -> Drawn | None:
    """Losses, accuracies and drawdown against the step, training thin and validation marked; None without a log."""
    known = {key for line in run.training for key, value in line.values.items() if math.isfinite(value)}
    panels = [(title, [item for item in items if item[0] in known]) for title, items in PANELS]
    panels = [(title, items) for title, items in panels if items]
    if not panels:
        return None
    figure, rows = stacked(len(panels), 1.4 + 2.3 * len(panels))
    lost = 0
    for axes, (title, items) in zip(rows, panels, strict=True):
        for number, (key, label) in enumerate(items):
            lost += _training_lines(axes, run, key, label, CYCLE[number])
        axes.set_ylabel(title)
        if title == "accuracy":
            axes.set_ylim(-0.03, 1.03)
        elif title == "loss" and all(np.all(line.get_ydata() > 0) for line in axes.lines):
            log_axis(axes, "y")
        elif title == "drawdown" and all(np.all(line.get_ydata() >= 0) for line in axes.lines):
            axes.set_ylim(0, 1.08 * max(1e-9, *(float(np.max(line.get_ydata())) for line in axes.lines)))
        legend_above(axes, 2)
    count_axis(rows[-1].xaxis)
    rows[-1].set_xlabel("training step")
    heading(figure, "Training of the hypernetwork", run.label)
    caption = "Thin: training, as logged; bold: its running mean; marked: validation on held-out requests."
    caption += f" {counted(lost, 'value')} not finite: crosses at the top edge of their panel." if lost else ""
    return finish(figure, name, "Training of the hypernetwork", caption)


def _training_lines(axes: Any, run: Run, key: str, label: str, colour: str) -> int:
    """Draw one quantity; returns how many of its values are not finite (marked at the top edge)."""
    lost: list[int] = []
    for what, line, marker in (("training", "-", ""), ("validation", "--", "D")):
        mine = [t for t in run.training if t.validation == (what == "validation") and key in t.values]
        good = [(t.step, t.values[key]) for t in mine if math.isfinite(t.values[key])]
        lost += [t.step for t in mine if not math.isfinite(t.values[key])]
        steps, values = np.array(good, dtype=np.float64).reshape(-1, 2).T
        name, wide = f"{label}, {what}", 1 if marker else max(1, len(good) // 50)
        if wide > 1:
            axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3, rasterized=len(values) > MANY)
            whole = len(values) // wide * wide
            steps, values = (part[:whole].reshape(-1, wide).mean(axis=1) for part in (steps, values))
            name += f" (mean of {wide})"
        if good:
            figures.curve(axes, steps, Group(label=name, values=values, color=colour, marker=marker, line=line))
    if lost:
        look = {"c": colour, "marker": "X", "s": 36, "zorder": 5}
        axes.scatter(lost, [0.97] * len(lost), transform=axes.get_xaxis_transform(), **look)
    return len(lost)
