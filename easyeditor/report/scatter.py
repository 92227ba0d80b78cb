"""Figures with one point per edit: perplexity of every edited model; denominator against perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from easyeditor.drawing.canvas import (
    MANY,
    Drawn,
    Scale,
    count_axis,
    counted,
    drawable,
    finish,
    heading,
    label_points,
    legend_above,
    log_axis,
    log_scale,
    new_figure,
)
from easyeditor.drawing.figures import Group, points
from easyeditor.drawing.palette import BLACK, BLUE, GREY, VERMILLION
from easyeditor.results.lines import EditLine
from easyeditor.results.run import Run

Judged = tuple[EditLine, float]
"""An edit and its perplexity (infinity: not finite)."""


def perplexity_figure(run: Run, name: str, worst: int = 8) -> Drawn | None:
    """Perplexity of every edited model on a logarithmic axis; None when none was measured."""
    judged = _judged(run.edits)
    if not judged:
        return None
    figure = new_figure()
    axes = figure.subplots()
    scale = log_scale(axes, [ppl for _, ppl in judged], [run.base, run.threshold])
    single = run.mode == "single"
    places = [edit.index if single else edit.step for edit, _ in judged]
    _reference_lines(axes, run)
    _points(axes, [float(place) for place in places], judged, scale)
    axes.set_xlabel("place of the request in the dataset" if single else "edit number in the sequence")
    count_axis(axes.xaxis)
    axes.set_xlim(*_padded(min(places), max(places)))
    heading(figure, "Perplexity after each edit", run.label)
    legend_above(axes)
    named = _name_worst(axes, judged, [float(place) for place in places], scale, worst)
    return finish(figure, name, "Perplexity of every edited model", _caption(run, judged, named))


def denominator_figure(run: Run, name: str, worst: int = 8) -> Drawn | None:
    """|denominator| against perplexity, both logarithmic; None for methods without a denominator."""
    both = [(edit, ppl) for edit, ppl in _judged(run.edits) if edit.record.denominator is not None]
    if not both:
        return None
    sizes = [abs(edit.record.denominator or 0.0) for edit, _ in both]
    positive = [size for size in sizes if size > 0]
    shown, limit = [*positive, run.screen_threshold], run.screen_threshold
    spread = max(max(shown) / min(shown), 10.0)
    left, right = min(shown) / spread**0.08, max(shown) * spread**0.08
    figure = new_figure()
    axes = figure.subplots()
    scale = log_scale(axes, [ppl for _, ppl in both], [run.base, run.threshold])
    log_axis(axes, "x", left, right)
    _reference_lines(axes, run)
    axes.axvline(limit, color=BLACK, lw=1.0, ls="-.", label=f"collapse predicted below {limit:g}")
    places = [size if size > 0 else left for size in sizes]
    _points(axes, places, both, scale)
    axes.set_xlabel("|denominator| of the update (smallest over the edited layers)")
    heading(figure, "Denominator against perplexity", run.label)
    legend_above(axes, 3)
    _name_worst(axes, both, places, scale, worst)
    zero, lost = len(sizes) - len(positive), len(_judged(run.edits)) - len(both)
    caption = _rule(both, limit)
    caption += f" {counted(zero, 'denominator')} of exactly 0 drawn at the left edge." if zero else ""
    caption += f" {counted(lost, 'edit')} without a denominator left out." if lost else ""
    return finish(figure, name, "Denominator against perplexity", caption)


def _judged(edits: Sequence[EditLine]) -> list[Judged]:
    return [(edit, edit.record.post.ppl) for edit in edits if edit.record.post.ppl is not None]


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = max(0.5, (high - low) * 0.03)
    return low - pad, high + pad


def _reference_lines(axes: Any, run: Run) -> None:
    if run.threshold is not None:
        axes.axhline(run.threshold, color=VERMILLION, lw=1.2, ls="--", label=f"threshold {run.threshold:,.0f}")
    if run.base is not None and math.isfinite(run.base):
        axes.axhline(run.base, color=GREY, lw=1.2, ls=":", label=f"unedited model {run.base:,.1f}")


def _points(axes: Any, places: Sequence[float], judged: Sequence[Judged], scale: Scale) -> None:
    """Perplexity: normal edits as circles, collapsed as triangles, not finite as crossed squares in the band."""
    kinds = (
        ("normal", BLUE, "o", 16, [math.isfinite(p) and not e.record.collapsed for e, p in judged]),
        ("collapsed", VERMILLION, "^", 30, [math.isfinite(p) and bool(e.record.collapsed) for e, p in judged]),
        ("not finite", BLACK, "X", 36, [not math.isfinite(p) for _, p in judged]),
    )
    heights = scale.place(ppl for _, ppl in judged)
    few = len(judged) <= MANY
    for label, colour, marker, size, chosen in kinds:
        x = [place for place, mine in zip(places, chosen, strict=True) if mine]
        if x:
            group = Group(label=f"{label} ({len(x):,})", values=(), color=colour, marker=marker)
            y = [height for height, mine in zip(heights, chosen, strict=True) if mine]
            look = {"size": size if few else size / 4, "alpha": 0.85 if few else 0.5, "rasterized": not few}
            points(axes, x, y, group, **look, linewidths=0, zorder=4, clip_on=False)
    axes.set_ylabel("perplexity of the edited model")


def _name_worst(axes: Any, judged: Sequence[Judged], places: Sequence[float], scale: Scale, worst: int) -> int:
    order = sorted(range(len(judged)), key=lambda i: (-judged[i][1], places[i]))
    collapsed = [i for i in order if judged[i][0].record.collapsed]
    order, most = (collapsed[: 4 * worst], worst) if collapsed else (order[: min(3, worst)], 3)
    heights = scale.place(ppl for _, ppl in judged)
    named = ((i, judged[i][0]) for i in order)
    points = [(places[i], heights[i], f"{drawable(e.request.subject, 24)} (#{e.index})") for i, e in named]
    some = sorted(range(len(judged)), key=lambda i: -judged[i][1])[:MANY]
    return label_points(axes, points, [(places[i], heights[i]) for i in some], most)


def _caption(run: Run, judged: Sequence[Judged], named: int) -> str:
    collapsed = sum(bool(edit.record.collapsed) for edit, _ in judged)
    lost = sum(not math.isfinite(ppl) for _, ppl in judged)
    text = f"{counted(len(judged), 'edited model')}, {collapsed:,} collapsed."
    text += " Subjects are named worst first, where there is room (#: place in the dataset)." if named else ""
    text += f" {lost:,} with a perplexity that is not finite, drawn in the band at the top edge." if lost else ""
    unmeasured = len(run.edits) - len(judged)
    text += f" {counted(unmeasured, 'edit')} without a measured perplexity left out." if unmeasured else ""
    if len({edit.record.collapse.limit for edit, _ in judged if edit.record.collapse is not None}) > 1:
        text += " The limit moves with the perplexity before each edit; the line shows the first one's."
    return text


def _rule(both: Sequence[Judged], limit: float) -> str:
    small = [abs(edit.record.denominator or 0.0) < limit for edit, _ in both]
    hit = sum(low and bool(edit.record.collapsed) for low, (edit, _) in zip(small, both, strict=True))
    collapsed = sum(bool(edit.record.collapsed) for edit, _ in both)
    return (
        f"{counted(len(both), 'edit')}: {sum(small):,} with |denominator| < {limit:g}, {hit:,} of them "
        f"collapsed; {collapsed:,} collapsed in all."
    )
