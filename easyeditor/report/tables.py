"""The report's tables as values: collapsed against normal, predictions, retention, time, the lists of edits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from easyeditor.drawing.table import Read, Spec, Table
from easyeditor.results.cause import cause
from easyeditor.results.lines import PARTS, EditLine
from easyeditor.results.run import Run
from easyeditor.values.collapse import is_small, prediction_quality
from easyeditor.values.plain import mean
from easyeditor.values.record import EditRecord

ACCURACIES = {"efficacy": "rewrite_acc", "generalization": "rephrase_acc", "locality": "locality_acc"}
"""The papers' names of columns, and the metric that each shows."""
ROWS = 10
"""Rows of a table that a terminal shows; the files have all."""
Getter = tuple[str, str, Read]
"""A column of a table of edits or requests: title, kind, and how it is read."""
RUN = ("run", "text")
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
    return Table.of(
        "collapse",
        "Collapsed and normal edits",
        (
            *(RUN, ("edits", "text"), ("count", "count"), ("numerator", "number"), ("|denominator|", "number")),
            *(("max perplexity", "perplexity"), *_accuracy_columns(chosen)),
        ),
        rows,
        note="Means over edits, measured right after each edit; max perplexity is the largest. Efficacy, "
        "generalization and locality are the rewrite, rephrase and locality accuracy in %, over the edits that have "
        "such prompts.",
        longest=ROWS,
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


def _accuracy_columns(chosen: Sequence[str]) -> tuple[Spec, ...]:
    return (*((title, "percent") for title in ACCURACIES), *((name, "number") for name in chosen))


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
            pairs = [(guess, bool(collapsed[index])) for index, guess in told.items() if index in collapsed]
            if pairs:
                found = prediction_quality(pairs)
                numbers = (found.pairs, found.predicted, found.happened, found.both, found.precision, found.recall)
                rows.append((run.label, source, *numbers))
    counts = ((title, "count") for title in ("edits", "predicted", "collapsed", "both"))
    return Table.of(
        "prediction",
        "Was collapse predicted?",
        (RUN, ("predicted by", "text"), *counts, ("precision", "percent"), ("recall", "percent")),
        rows,
        note="Precision: share of the predicted that collapsed. Recall: share of the collapsed that were predicted. "
        "Over requests that were both predicted on and edited.",
        longest=ROWS,
    )


def screen_table(runs: Sequence[Run]) -> Table:
    """Every screened request, smallest denominator first."""
    lines = ((run.label, line) for run in runs for line in sorted(run.screened, key=lambda line: abs(line.denominator)))
    columns: tuple[Getter, ...] = (
        ("index", "count", lambda line: line.index),
        ("case id", "", lambda line: line.case_id),
        ("subject", "", lambda line: line.subject),
        ("denominator", "number", lambda line: line.denominator),
        ("predicts collapse", "", lambda line: _YES[line.prediction]),
    )
    return _by_run("screen", "Screened requests, smallest denominator first", columns, lines, longest=0)


def retention_table(runs: Sequence[Run]) -> Table:
    """What a sequence left: perplexity and mean accuracies over all edits so far, at each evaluation."""
    rows, chosen = [], _chosen(runs)
    for run in runs:
        for seen in run.evaluations:
            means = seen.means()
            values = (means.get(name) for name in (*ACCURACIES.values(), *chosen))
            rows.append((run.label, seen.after, seen.ppl, _YES[seen.collapsed], *values))
    return Table.of(
        "retention",
        "Evaluations along the sequence",
        (RUN, ("after edits", "count"), ("perplexity", "perplexity"), "collapsed", *_accuracy_columns(chosen)),
        rows,
        note="Means over all edits made so far, on the model that holds them.",
        longest=ROWS,
    )


def time_table(runs: Sequence[Run]) -> Table:
    """Where the time went: edit, metrics, perplexity, and the rest of each edit's total."""
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        total = math.fsum(_spent(edit) for edit in run.edits)
        for part in (*PARTS, "other", "total"):
            spent = [value for edit in run.edits if (value := _part(edit, part)) is not None]
            if spent:
                share = math.fsum(spent) / total if total else None
                rows.append((run.label, part, *_times(spent), share))
    seconds = ((title, "seconds") for title in ("sum", "mean", "median", "longest"))
    return Table.of(
        "time",
        "Time",
        (RUN, "part", ("edits", "count"), *seconds, ("share", "percent")),
        rows,
        note="Seconds as each record has them; loading the model and measuring the unedited one are not in it.",
        longest=ROWS,
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


BRIEF = ("run", "index", "subject", "target", "perplexity", "denominator", "efficacy")
"""Columns of the list of collapsed edits that a terminal has room for."""
_EDIT_COLUMNS: tuple[Getter, ...] = (
    ("index", "count", lambda e: e.index),
    ("step", "count", lambda e: e.step),
    ("case id", "", lambda e: str(e.request.case_id)),
    ("subject", "text", lambda e: e.request.subject),
    ("prompt", "", lambda e: e.request.prompt),
    ("target", "text", lambda e: e.request.target_new),
    ("perplexity", "perplexity", lambda e: e.record.post.ppl),
    ("denominator", "number", lambda e: e.record.denominator),
    ("numerator", "number", lambda e: e.record.numerator),
    *((title, "percent", lambda e, name=name: e.record.after(name)) for title, name in ACCURACIES.items()),
    ("guard", "", lambda e: "" if e.guard is None else e.guard.words),
)


def edits_table(runs: Sequence[Run]) -> Table:
    """Every edit, one row each."""
    extra: tuple[Getter, ...] = (
        ("collapsed", "", lambda e: _YES[e.record.collapsed]),
        ("perplexity before", "perplexity", lambda e: e.record.pre.ppl),
        ("perplexity left by the guard", "perplexity", lambda e: e.left_ppl),
        *((f"{part} time", "seconds", lambda e, part=part: e.seconds.get(part)) for part in (*PARTS, "total")),
    )
    columns = (*_EDIT_COLUMNS, *_metric_columns(runs), *extra)
    return _by_run("edits", "All edits", columns, ((r.label, e) for r in runs for e in r.edits), longest=0)


def collapsed_table(runs: Sequence[Run]) -> Table:
    """The collapsed edits, highest perplexity first, each with the cause its numbers show."""
    cases = [(run.label, edit) for run in runs for edit in run.edits if edit.record.collapsed]
    cases.sort(key=lambda case: -(case[1].record.post.ppl or 0.0))
    causes: tuple[Getter, ...] = (("cause", "", lambda e: cause(e.record)),)
    columns = (*_EDIT_COLUMNS, *_metric_columns(runs), *causes)
    rest: dict[str, Any] = {"longest": ROWS, "brief": (*BRIEF, *_chosen(runs))}
    return _by_run("collapsed", "Collapsed edits, worst first", columns, cases, **rest)


def _metric_columns(runs: Sequence[Run]) -> tuple[Getter, ...]:
    return tuple((name, "number", lambda e, name=name: e.record.after(name)) for name in _chosen(runs))


def _by_run(name: str, title: str, columns: Sequence[Getter], cases: Iterable[tuple[str, Any]], **rest: Any) -> Table:
    """A row for each (run's label, item)."""
    rows = ((label, *(read(item) for *_, read in columns)) for label, item in cases)
    return Table.of(name, title, (RUN, *((title, kind) for title, kind, _ in columns)), rows, **rest)
