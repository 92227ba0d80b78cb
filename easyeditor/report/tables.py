"""The report's tables as values: collapsed against normal, predictions, retention, time, the lists of edits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.report.journal import PARTS, Edit
from easyeditor.report.load import Run
from easyeditor.report.verdict import TYPICAL_DENOMINATOR

_YES = {None: "", True: "yes", False: "no"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: `kind` is text, count, number, perplexity, percent (stored as a share of 1) or seconds."""

    title: str
    kind: str = "text"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as values. None is "not known"; infinity is "not finite". `name` is its file name without ending."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


def collapse_table(runs: Sequence[Run]) -> Table:
    """The papers' table (Fall of ROME, tables 2 to 4): collapsed and normal edits side by side, means over edits."""
    rows = []
    for run in runs:
        judged = [edit for edit in run.edits if edit.collapsed is not None]
        groups = [("collapsed", [e for e in judged if e.collapsed]), ("normal", [e for e in judged if not e.collapsed])]
        groups += [("all", judged)]
        if len(judged) < len(run.edits):
            groups.append(("perplexity not measured", [e for e in run.edits if e.collapsed is None]))
        rows += [(run.label, name, *_group(edits)) for name, edits in groups if run.edits]
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
            Column(title="efficacy", kind="percent"),
            Column(title="generalization", kind="percent"),
            Column(title="locality", kind="percent"),
        ),
        rows=tuple(rows),
        note="Means over edits, measured right after each edit; max perplexity is the largest. Efficacy, "
        "generalization and locality are the rewrite, rephrase and locality accuracy in %, over the edits that have "
        "such prompts.",
    )


def _group(edits: Sequence[Edit]) -> tuple[Any, ...]:
    ppls = [edit.ppl for edit in edits if edit.ppl is not None]
    return (
        len(edits),
        mean(edit.numerator for edit in edits),
        mean(None if edit.denominator is None else abs(edit.denominator) for edit in edits),
        max(ppls) if ppls else None,
        mean(edit.rewrite for edit in edits),
        mean(edit.rephrase for edit in edits),
        mean(edit.locality for edit in edits),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def prediction_table(runs: Sequence[Run]) -> Table:
    """How well a small denominator foretold collapse: of the recorded screen, and of the edits' own denominators."""
    rows = []
    for run in runs:
        collapsed = {edit.index: edit.collapsed for edit in run.edits if edit.collapsed is not None}
        screen = {line.index: line.prediction for line in run.screened}
        small = {
            edit.index: abs(edit.denominator) < run.screen_threshold
            for edit in run.edits
            if edit.denominator is not None
        }
        for source, told in (("screen", screen), (f"own |denominator| < {run.screen_threshold:g}", small)):
            pairs = [(said, bool(collapsed[index])) for index, said in told.items() if index in collapsed]
            if pairs:
                rows.append((run.label, source, *agreement(pairs)))
    titles = ("edits", "predicted", "collapsed", "both")
    return Table(
        name="prediction",
        title="Was collapse foretold?",
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


def agreement(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int, int, int, float | None, float | None]:
    """(pairs, predicted, happened, both, precision, recall) of (predicted, happened) pairs; None for 0 / 0."""
    predicted, happened = sum(said for said, _ in pairs), sum(was for _, was in pairs)
    both = sum(said and was for said, was in pairs)
    precision = both / predicted if predicted else None
    return len(pairs), predicted, happened, both, precision, both / happened if happened else None


def screen_table(runs: Sequence[Run]) -> Table:
    """Every screened request, smallest denominator first."""
    rows = [
        (run.label, line.index, line.case_id, line.subject, line.denominator, "yes" if line.prediction else "no")
        for run in runs
        for line in sorted(run.screened, key=lambda s: math.inf if s.denominator is None else abs(s.denominator))
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
    rows = [
        (
            run.label,
            seen.after,
            seen.ppl,
            _YES[seen.collapsed],
            *(mean(_known(values)) for values in (seen.rewrite, seen.rephrase, seen.locality)),
        )
        for run in runs
        for seen in run.evaluations
    ]
    return Table(
        name="retention",
        title="Evaluations along the sequence",
        columns=(
            Column(title="run"),
            Column(title="after edits", kind="count"),
            Column(title="perplexity", kind="perplexity"),
            Column(title="collapsed"),
            Column(title="efficacy", kind="percent"),
            Column(title="generalization", kind="percent"),
            Column(title="locality", kind="percent"),
        ),
        rows=tuple(rows),
        note="Means over all edits made so far, on the model that holds them.",
    )


def _known(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if not math.isnan(value)]


def time_table(runs: Sequence[Run]) -> Table:
    """Where the time went: edit, metrics, perplexity, and the rest of each edit's total."""
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        total = math.fsum(_spent(edit) for edit in run.edits)
        for part in (*PARTS[:-1], "other", "total"):
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


def _spent(edit: Edit) -> float:
    return edit.seconds.get("total", math.fsum(edit.seconds.values()))


def _part(edit: Edit, part: str) -> float | None:
    if part == "other":
        known = math.fsum(value for key, value in edit.seconds.items() if key != "total")
        return max(0.0, edit.seconds["total"] - known) if "total" in edit.seconds else None
    return _spent(edit) if part == "total" and edit.seconds else edit.seconds.get(part)


_EDIT_COLUMNS: tuple[tuple[str, str, Callable[[Edit], Any]], ...] = (
    ("index", "count", lambda e: e.index),
    ("step", "count", lambda e: e.step),
    ("case id", "text", lambda e: e.case_id),
    ("subject", "text", lambda e: e.subject),
    ("prompt", "text", lambda e: e.prompt),
    ("target", "text", lambda e: e.target_new),
    ("perplexity", "perplexity", lambda e: e.ppl),
    ("denominator", "number", lambda e: e.denominator),
    ("numerator", "number", lambda e: e.numerator),
    ("efficacy", "percent", lambda e: e.rewrite),
    ("generalization", "percent", lambda e: e.rephrase),
    ("locality", "percent", lambda e: e.locality),
    ("guard", "text", lambda e: e.guard),
)


def edits_table(runs: Sequence[Run]) -> Table:
    """Every edit, one row each."""
    extra: tuple[tuple[str, str, Callable[[Edit], Any]], ...] = (
        ("collapsed", "text", lambda e: _YES[e.collapsed]),
        ("perplexity before", "perplexity", lambda e: e.ppl_before),
        ("perplexity left by the guard", "perplexity", lambda e: e.left_ppl),
        *((f"{part} time", "seconds", lambda e, part=part: e.seconds.get(part)) for part in PARTS),
    )
    return _edit_rows("edits", "All edits", (*_EDIT_COLUMNS, *extra), ((r.label, e) for r in runs for e in r.edits))


def collapsed_table(runs: Sequence[Run]) -> Table:
    """The collapsed edits, highest perplexity first, each with the cause its numbers show."""
    cases = [(run.label, edit) for run in runs for edit in run.edits if edit.collapsed]
    cases.sort(key=lambda case: -(case[1].ppl or 0.0))
    causes: tuple[tuple[str, str, Callable[[Edit], Any]], ...] = (("cause", "text", cause),)
    return _edit_rows("collapsed", "Collapsed edits, worst first", (*_EDIT_COLUMNS, *causes), cases)


def _edit_rows(name: str, title: str, columns: Sequence[Any], cases: Iterable[tuple[str, Edit]]) -> Table:
    return Table(
        name=name,
        title=title,
        columns=(Column(title="run"), *(Column(title=title, kind=kind) for title, kind, _ in columns)),
        rows=tuple((label, *(value(edit) for *_, value in columns)) for label, edit in cases),
    )


def cause(edit: Edit) -> str:
    """Why the numbers say an edit collapsed: the same test and words as the verdict on a single edit."""
    if edit.denominator is None:
        return "the method has no denominator; look at the size of the update"
    if abs(edit.denominator) < TYPICAL_DENOMINATOR:
        return (
            f"denominator at layer {edit.layer} is {edit.denominator:.3g} (typical is > {TYPICAL_DENOMINATOR:g}): the "
            "key of the bare prompt hardly overlaps the mean key over contexts"
        )
    grown = "" if edit.value_growth is None else f"; the value grew {edit.value_growth:.3g}-fold"
    return f"denominator is ordinary ({edit.denominator:.3g}), so the keys are not the cause{grown}"


def shown_perplexity(value: float | None) -> str:
    """A perplexity for reading."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"
