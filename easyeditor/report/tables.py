"""The report's tables as values: collapsed against normal, predictions, retention, time, the lists of edits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from easyeditor.drawing.table import Column, Table
from easyeditor.results.cause import cause
from easyeditor.results.lines import PARTS, EditLine
from easyeditor.results.run import Run
from easyeditor.values.collapse import is_small, prediction_quality
from easyeditor.values.plain import mean
from easyeditor.values.record import EditRecord

ACCURACIES = {"efficacy": "rewrite_acc", "generalization": "rephrase_acc", "locality": "locality_acc"}
"""The papers' names of columns, and the metric that stands in them."""
_YES = {None: "", True: "yes", False: "no"}


def collapse_table(runs: Sequence[Run]) -> Table:
    """The papers' table (Fall of ROME, tables 2 to 4): collapsed and normal edits side by side, means over edits."""
    rows, chosen = [], _chosen(runs)
    for run in runs:
        by_verdict = {verdict: [e.record for e in run.edits if e.record.collapsed is verdict] for verdict in _YES}
        groups = [("collapsed", by_verdict[True]), ("normal", by_verdict[False])]
        groups += [("all", [e.record for e in run.edits if e.record.collapsed is not None])]
        if by_verdict[None]:
            groups.append(("perplexity not measured", by_verdict[None]))
        rows += [(run.label, name, *_group(edits, chosen)) for name, edits in groups if run.edits]
    return Table(
        name="collapse",
        title="Collapsed and normal edits",
        columns=(
            Column(title="run"),
            Column(title="edits"),
            Column(title="count", kind="count"),
            Column(title="numerator", kind="number"),
            Column(title="|denominator|", kind="number"),
            Column(title="max perplexity", kind="perplexity"),
            *_accuracy_columns(chosen),
        ),
        rows=tuple(rows),
        note="Means over edits, measured right after each edit; max perplexity is the largest. Efficacy, "
        "generalization and locality are the rewrite, rephrase and locality accuracy in %, over the edits that have "
        "such prompts.",
    )


def _group(edits: Sequence[EditRecord], names: Sequence[str]) -> tuple[Any, ...]:
    return (
        len(edits),
        mean(edit.numerator for edit in edits),
        mean(None if edit.denominator is None else abs(edit.denominator) for edit in edits),
        max((edit.post.ppl for edit in edits if edit.post.ppl is not None), default=None),
        *(mean(edit.after(name) for edit in edits) for name in (*ACCURACIES.values(), *names)),
    )


def _chosen(runs: Sequence[Run]) -> list[str]:
    """Names of the registry's metrics that the runs measured, in the order they were asked for."""
    rows = (edit.record.metrics.get("after", {}) for run in runs for edit in run.edits)
    return list(dict.fromkeys(name for row in rows for name in row if name not in ACCURACIES.values()))


def _accuracy_columns(chosen: Sequence[str]) -> tuple[Column, ...]:
    known = tuple(Column(title=title, kind="percent") for title in ACCURACIES)
    return (*known, *(Column(title=name, kind="number") for name in chosen))


def prediction_table(runs: Sequence[Run]) -> Table:
    """How well a small denominator predicted collapse: of the recorded screen, and of the edits' own denominators."""
    rows = []
    for run in runs:
        collapsed = {edit.index: edit.record.collapsed for edit in run.edits if edit.record.collapsed is not None}
        screen = {line.index: line.prediction for line in run.screened}
        small = {
            edit.index: is_small(edit.record.denominator, run.screen_threshold)
            for edit in run.edits
            if edit.record.denominator is not None
        }
        for source, told in (("screen", screen), (f"own |denominator| < {run.screen_threshold:g}", small)):
            pairs = [(said, bool(collapsed[index])) for index, said in told.items() if index in collapsed]
            if pairs:
                found = prediction_quality(pairs)
                counts = (found.pairs, found.predicted, found.happened, found.both)
                rows.append((run.label, source, *counts, found.precision, found.recall))
    titles = ("edits", "predicted", "collapsed", "both")
    return Table(
        name="prediction",
        title="Was collapse predicted?",
        columns=(
            Column(title="run"),
            Column(title="predicted by"),
            *(Column(title=title, kind="count") for title in titles),
            Column(title="precision", kind="percent"),
            Column(title="recall", kind="percent"),
        ),
        rows=tuple(rows),
        note="Precision: share of the predicted that collapsed. Recall: share of the collapsed that were predicted. "
        "Over requests that were both predicted on and edited.",
    )


def screen_table(runs: Sequence[Run]) -> Table:
    """Every screened request, smallest denominator first."""
    rows = [
        (run.label, line.index, line.case_id, line.subject, line.denominator, "yes" if line.prediction else "no")
        for run in runs
        for line in sorted(run.screened, key=lambda line: abs(line.denominator))
    ]
    return Table(
        name="screen",
        title="Screened requests, smallest denominator first",
        columns=(
            Column(title="run"),
            Column(title="index", kind="count"),
            Column(title="case id"),
            Column(title="subject"),
            Column(title="denominator", kind="number"),
            Column(title="predicts collapse"),
        ),
        rows=tuple(rows),
    )


def retention_table(runs: Sequence[Run]) -> Table:
    """What a sequence left: perplexity and mean accuracies over all edits so far, at each evaluation."""
    rows, chosen = [], _chosen(runs)
    for run in runs:
        for seen in run.evaluations:
            means = seen.means()
            values = (means.get(name) for name in (*ACCURACIES.values(), *chosen))
            rows.append((run.label, seen.after, seen.ppl, _YES[seen.collapsed], *values))
    return Table(
        name="retention",
        title="Evaluations along the sequence",
        columns=(
            Column(title="run"),
            Column(title="after edits", kind="count"),
            Column(title="perplexity", kind="perplexity"),
            Column(title="collapsed"),
            *_accuracy_columns(chosen),
        ),
        rows=tuple(rows),
        note="Means over all edits made so far, on the model that holds them.",
    )


def time_table(runs: Sequence[Run]) -> Table:
    """Where the time went: edit, metrics, perplexity, and the rest of each edit's total."""
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        total = math.fsum(_spent(edit) for edit in run.edits)
        for part in (*PARTS, "other", "total"):
            seconds = [value for edit in run.edits if (value := _part(edit, part)) is not None]
            if seconds:
                share = math.fsum(seconds) / total if total else None
                rows.append((run.label, part, *_times(seconds), share))
    return Table(
        name="time",
        title="Time",
        columns=(
            Column(title="run"),
            Column(title="part"),
            Column(title="edits", kind="count"),
            Column(title="sum", kind="seconds"),
            Column(title="mean", kind="seconds"),
            Column(title="median", kind="seconds"),
            Column(title="longest", kind="seconds"),
            Column(title="share", kind="percent"),
        ),
        rows=tuple(rows),
        note="Seconds as each record has them; loading the model and measuring the unedited one are not in it.",
    )


def _times(seconds: Sequence[float]) -> tuple[int, float, float, float, float]:
    total = math.fsum(seconds)
    return len(seconds), total, total / len(seconds), statistics.median(seconds), max(seconds)


def _spent(edit: EditLine) -> float:
    return edit.seconds.get("total", math.fsum(edit.seconds.values()))


def _part(edit: EditLine, part: str) -> float | None:
    if part == "other":
        known = math.fsum(value for key, value in edit.seconds.items() if key != "total")
        return max(0.0, edit.seconds["total"] - known) if "total" in edit.seconds else None
    return _spent(edit) if part == "total" and edit.seconds else edit.seconds.get(part)


Getter = tuple[str, str, Callable[[EditLine], Any]]
"""A column of a table of edits: title, kind, and what stands in it."""
_EDIT_COLUMNS: tuple[Getter, ...] = (
    ("index", "count", lambda e: e.index),
    ("step", "count", lambda e: e.step),
    ("case id", "text", lambda e: str(e.request.case_id)),
    ("subject", "text", lambda e: e.request.subject),
    ("prompt", "text", lambda e: e.request.prompt),
    ("target", "text", lambda e: e.request.target_new),
    ("perplexity", "perplexity", lambda e: e.record.post.ppl),
    ("denominator", "number", lambda e: e.record.denominator),
    ("numerator", "number", lambda e: e.record.numerator),
    *((title, "percent", lambda e, name=name: e.record.after(name)) for title, name in ACCURACIES.items()),
    ("guard", "text", lambda e: "" if e.guard is None else e.guard.words),
)


def edits_table(runs: Sequence[Run]) -> Table:
    """Every edit, one row each."""
    extra: tuple[Getter, ...] = (
        ("collapsed", "text", lambda e: _YES[e.record.collapsed]),
        ("perplexity before", "perplexity", lambda e: e.record.pre.ppl),
        ("perplexity left by the guard", "perplexity", lambda e: e.left_ppl),
        *((f"{part} time", "seconds", lambda e, part=part: e.seconds.get(part)) for part in (*PARTS, "total")),
    )
    columns = (*_EDIT_COLUMNS, *_metric_columns(runs), *extra)
    return _edit_rows("edits", "All edits", columns, ((r.label, e) for r in runs for e in r.edits))


def collapsed_table(runs: Sequence[Run]) -> Table:
    """The collapsed edits, highest perplexity first, each with the cause its numbers show."""
    cases = [(run.label, edit) for run in runs for edit in run.edits if edit.record.collapsed]
    cases.sort(key=lambda case: -(case[1].record.post.ppl or 0.0))
    causes: tuple[Getter, ...] = (("cause", "text", lambda e: cause(e.record)),)
    columns = (*_EDIT_COLUMNS, *_metric_columns(runs), *causes)
    return _edit_rows("collapsed", "Collapsed edits, worst first", columns, cases)


def _metric_columns(runs: Sequence[Run]) -> tuple[Getter, ...]:
    return tuple((name, "number", lambda e, name=name: e.record.after(name)) for name in _chosen(runs))


def _edit_rows(name: str, title: str, columns: Sequence[Getter], cases: Iterable[tuple[str, EditLine]]) -> Table:
    return Table(
        name=name,
        title=title,
        columns=(Column(title="run"), *(Column(title=title, kind=kind) for title, kind, _ in columns)),
        rows=tuple((label, *(value(edit) for *_, value in columns)) for label, edit in cases),
    )
