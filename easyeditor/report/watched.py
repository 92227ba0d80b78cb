"""What was watched along sequences: growth and drift of the weights, nearness of keys; the forecast in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from easyeditor.drawing.canvas import Drawn
from easyeditor.drawing.table import Table
from easyeditor.report.compared import along_edits
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


PANELS: dict[str, Callable[[Run], Values]] = {
    "||W|| / ||W original||": _each(lambda seen: _largest(seen.growth.values())),
    "drift": _each(lambda seen: _largest(seen.drift.values())),
    "nearest earlier key": _each(lambda seen: seen.key_cosine),
    "||v*|| / anchor": values_over_anchor,
}
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
    counts = ("crossings predicted", "of these right")
    numbers = ("weight growth", "subspace drift", "nearest keys", "value / anchor")
    return Table.of(
        "watched",
        "Watched along the sequence",
        ["run", *((t, "number") for t in numbers), "forecast", *((t, "count") for t in counts)],
        rows,
        longest=0,
        note="Growth (norm over the original's) and drift (0: leading directions as in the original, 1: at right "
        "angles) after the last step, the largest over the edited weights; the largest cosine of new keys to earlier "
        "ones; the largest value norm over the norm anchor, or, where the method has none, over the mean of the run's "
        "first step. Crossings predicted: those the same rule would have named on the way, and how many lay within a "
        "factor of two. docs/runs.md has the rule.",
    )


def watched_figure(runs: Sequence[Run], name: str) -> Drawn | None:
    """Growth, drift and nearness of keys against edits made, a curve for each sequence; None without any."""
    chosen = [run for run in runs if any(edit.watched is not None for edit in run.edits)]
    caption = "Largest over the edited weights. Drift: 0 is the original's leading directions, 1 at right angles to "
    caption += "them. Nearest earlier key: largest cosine of a step's keys to those of earlier edits. Anchor: the "
    caption += "method's, else the mean norm of the first step's values."
    panels = {title: [(run, read(run)) for run in chosen] for title, read in PANELS.items()}
    return along_edits(name, "Watched along sequences of edits", caption, 8.2, panels)
