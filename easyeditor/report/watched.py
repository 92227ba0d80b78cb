"""What was watched along sequences: growth and drift of the weights, nearness of keys; the forecast in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from matplotlib.ticker import MaxNLocator

from easyeditor.drawing.canvas import (
    DASHES,
    THOUSANDS,
    Drawn,
    counted,
    drawable,
    finish,
    heading,
    legend_above,
    new_figure,
)
from easyeditor.drawing.palette import CYCLE
from easyeditor.drawing.table import Column, Table
from easyeditor.results.forecast import forecast, hindsight, points_of
from easyeditor.results.run import Run
from easyeditor.results.watched import Watched

Values = dict[int, float | None]
"""One number by step."""


def _largest(values: Iterable[float]) -> float | None:
    return max((value for value in values if not math.isnan(value)), default=None)


def values_over_anchor(run: Run) -> Values:
    """The largest ||v*|| of each step as a multiple of the method's norm anchor; for a method without one, of the mean
    of the run's first step. None for a method without values."""
    found: Values = {}
    own: list[float] = []  # of the requests of a step
    first: float | None = None
    for edit in run.edits:
        trace = edit.record.trace
        norm = trace[max(trace)].value_norm_after if trace else None
        own += [] if norm is None else [norm]
        if edit.watched is None:
            continue
        if first is None and own:
            first = statistics.fmean(own)
        found[edit.step] = max(own) / first if own and first and edit.watched.anchor is None else edit.watched.anchor
        own = []
    return found


def _each(taken: Callable[[Watched], float | None]) -> Callable[[Run], Values]:
    return lambda run: {edit.step: taken(edit.watched) for edit in run.edits if edit.watched is not None}


PANELS: tuple[tuple[str, Callable[[Run], Values]], ...] = (
    ("||W|| / ||W original||", _each(lambda seen: _largest(seen.growth.values()))),
    ("drift", _each(lambda seen: _largest(seen.drift.values()))),
    ("nearest earlier key", _each(lambda seen: seen.key_cosine)),
    ("||v*|| / anchor", values_over_anchor),
)
"""What a panel of the figure shows: the largest over the edited weights where there are several."""


def watched_table(runs: Sequence[Run]) -> Table:
    """One row a sequence: its weights at the end, the nearest keys, and where perplexity is going."""
    rows = []
    for run in runs:
        seen = [edit.watched for edit in run.edits if edit.watched is not None]
        if not seen:
            continue
        points, limit = points_of(run.edits), run.threshold
        told = None if limit is None else forecast(points, limit)
        right, made = (0, 0) if limit is None else hindsight(points, limit)
        cosine = max((w.key_cosine for w in seen if w.key_cosine is not None), default=None)
        anchor = max((value for value in values_over_anchor(run).values() if value is not None), default=None)
        ends = (_largest(seen[-1].growth.values()), _largest(seen[-1].drift.values()))
        rows.append((run.label, *ends, cosine, anchor, "" if told is None else told.words, made, right))
    return Table(
        name="watched",
        title="Watched along the sequence",
        columns=(
            Column(title="run"),
            Column(title="weight growth", kind="number"),
            Column(title="subspace drift", kind="number"),
            Column(title="nearest keys", kind="number"),
            Column(title="value / anchor", kind="number"),
            Column(title="forecast"),
            Column(title="crossings predicted", kind="count"),
            Column(title="of these right", kind="count"),
        ),
        rows=tuple(rows),
        note="Growth (norm over the original's) and drift (0: leading directions as in the original, 1: at right "
        "angles) after the last step, the largest over the edited weights; the largest cosine of new keys to earlier "
        "ones; the largest value norm over the norm anchor, or, where the method has none, over the mean of the run's "
        "first step. Crossings predicted: those the same rule would have named on the way, and how many lay within a "
        "factor of two. docs/runs.md has the rule.",
    )


def watched_figure(runs: Sequence[Run], name: str) -> Drawn | None:
    """Growth, drift and nearness of keys against edits made, a curve for each sequence; None without any."""
    chosen = [run for run in runs if any(edit.watched is not None for edit in run.edits)]
    if not chosen:
        return None
    figure = new_figure(height=8.2 + 0.22 * len(chosen))
    panels = figure.subplots(len(PANELS), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, taken) in zip(panels, PANELS, strict=True):
        for number, run in enumerate(chosen):
            points = [(step, v) for step, v in taken(run).items() if v is not None and math.isfinite(v)]
            style = DASHES[number // len(CYCLE) % len(DASHES)]
            look = {"color": CYCLE[number % len(CYCLE)], "ls": style, "marker": "o" if len(points) < 40 else ""}
            axes.plot(
                [step for step, _ in points], [value for _, value in points], ms=3, lw=1.4,
                label=drawable(run.label, 90), **look,
            )  # fmt: skip
        axes.set_ylabel(title)
    panels[-1].set_xlabel("edits made")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].xaxis.set_major_formatter(THOUSANDS)
    panels[-1].set_xlim(left=0)
    heading(figure, "Watched along sequences of edits", counted(len(chosen), "run"))
    if len(chosen) > 1:
        legend_above(panels[0], 1)
    caption = "Largest over the edited weights. Drift: 0 is the original's leading directions, 1 at right angles to "
    caption += "them. Nearest earlier key: largest cosine of a step's keys to those of earlier edits. Anchor: the "
    caption += "method's, else the mean norm of the first step's values."
    return finish(figure, name, "Watched along sequences of edits", caption)
