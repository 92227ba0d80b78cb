"""The survey's page: one table, curves of all methods, what quality costs, published values next to ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from easyeditor.drawing.canvas import styled
from easyeditor.drawing.table import Read, Table
from easyeditor.report import compared, curves, watched
from easyeditor.report.build import Report
from easyeditor.results.run import CONFIG, Run, load_run
from easyeditor.runs.planning import batch_of
from easyeditor.survey.cells import Cell, CellProgress, progress_of
from easyeditor.survey.plan import Expected, Survey
from easyeditor.survey.quality import ACCURACIES, SCORES, Measured, measured, pairs_table, quality_of, score_of
from easyeditor.values.estimates import Estimate, mean_of, median_of

QUALITY = "harmonic mean of efficacy, generalization and locality (of those the data has)"
COLUMNS = (
    ("efficacy", "rewrite_acc", "percent"),
    ("generalization", "rephrase_acc", "percent"),
    ("locality", "locality_acc", "percent"),
    *((name, name, "percent") for name in SCORES),
    ("S", "S", "percent"),
    ("hit rate", "recall_hit", "percent"),
    ("tokens a question", "recall_tokens", "number"),
    ("fluency", "GE", "number"),
)


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A cell and what it came to: `values` has each metric's mean with its interval, `measured` every request's own."""

    progress: CellProgress
    run: Run | None
    measured: Measured | None
    values: dict[str, Estimate | None]
    quality: Estimate | None
    seconds: Estimate | None
    memory_gb: float | None

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self.progress.cell


def outcomes_of(cells: Sequence[Cell]) -> list[CellResult]:
    """Every cell's outcome, from what is recorded so far."""
    return [_outcome(progress, _label(progress.cell, cells)) for progress in progress_of(cells)]


def make_page(survey: Survey, plan: Path, outcomes: Sequence[CellResult]) -> Report:
    """The whole page; `plan` is the file it is made again from."""
    runs = [outcome.run for outcome in outcomes if outcome.run is not None]
    sequences = [run for run in runs if run.mode != "single"]
    priced = [
        compared.Priced(label=o.run.label, seconds=float(o.seconds), quality=float(o.quality))
        for o in outcomes
        if o.run is not None and o.seconds is not None and o.quality is not None
    ]
    with styled():
        drawn = (
            curves.sequential_figure(sequences, "perplexity"),
            compared.efficacy_figure(sequences, "efficacy"),
            compared.cost_figure(priced, "cost", QUALITY),
            watched.watched_figure(sequences, "watched"),
        )
    pairs = pairs_table([o.measured for o in outcomes if o.measured is not None], COLUMNS)
    tables = [survey_table(outcomes), pairs, expected_table(survey.expected, outcomes), watched.watched_table(runs)]
    done = sum(outcome.cell.done for outcome in outcomes)
    notes = [f"{done} of {len(outcomes)} cells are done."] if done < len(outcomes) else []
    notes += [f"{o.cell.name}: {o.progress.state}" for o in outcomes if o.progress.state.startswith("failed")]
    return Report(
        title=survey.plan.name,
        tables=tuple(table for table in tables if table.rows),
        figures=tuple(figure for figure in drawn if figure is not None),
        notes=tuple(notes),
        commands=(f"python -m easyeditor.survey {plan}", "# one cell alone:", *(o.cell.command for o in outcomes)),
    )


def survey_table(outcomes: Sequence[CellResult]) -> Table:
    """One row a cell."""
    return Table.of(
        "survey",
        "All cells",
        _columns(outcomes),
        outcomes,
        note="In brackets: the 95 % interval over requests (for seconds: over batches). Sequences are measured at "
        "their last evaluation, over all edits in the model; single edits right after each. Perplexity: of the last "
        "model of a sequence; the median over single edits"
        f"{_begun(outcomes)}. docs/report.md explains each column.",
    )


def _columns(outcomes: Sequence[CellResult]) -> list[tuple[str, str, Read]]:
    """The survey's columns, read of an outcome, without the metrics that no cell has a value of."""
    kept = [(t, name, kind) for t, name, kind in COLUMNS if any(o.values.get(name) is not None for o in outcomes)]
    return [
        ("group", "", lambda o: o.cell.group),
        ("method", "", lambda o: o.cell.method),
        ("seed", "count", lambda o: o.cell.seed),
        ("edits", "count", lambda o: o.progress.made),
        *((title, kind, lambda o, name=name: o.values.get(name)) for title, name, kind in kept),
        ("perplexity", "perplexity", lambda o: _perplexity(o.run)),
        ("first beyond threshold", "", lambda o: first_beyond(o.run)),
        ("seconds an edit", "seconds", lambda o: o.seconds),
        ("memory (GB)", "number", lambda o: o.memory_gb),
        ("state", "", lambda o: o.progress.state),
    ]


def _begun(outcomes: Sequence[CellResult]) -> str:
    """The models whose perplexity is with BOS."""
    models = dict.fromkeys(o.run.model for o in outcomes if o.run is not None and o.run.bos)
    return f"; with BOS for {', '.join(models)}" if models else ""


def brief_table(outcomes: Sequence[CellResult]) -> Table:
    """The survey's table for a terminal: few columns, no intervals."""
    wanted = ("efficacy", "generalization", "locality", "S", "perplexity")
    kept = [column for column in _columns(outcomes) if column[0] in wanted]
    rows = [
        (o.run.label if o.run else o.cell.name, *(_plain(read(o)) for *_, read in kept), first_beyond(o.run))
        for o in outcomes
    ]
    return Table.of("survey", "All cells", [("cell", "text"), *(column[:2] for column in kept), "beyond"], rows)


def _plain(value: float | None) -> float | None:
    return None if value is None else float(value)


def expected_table(expected: Sequence[Expected], outcomes: Sequence[CellResult]) -> Table:
    """Published values next to ours, each seed apart."""
    rows = []
    for item in expected:
        for o in outcomes:
            if (o.cell.group, o.cell.method) == (item.group, item.method):
                for name, published in item.values.items():
                    ours = o.values.get(name)
                    apart = None if ours is None else float(ours) - published
                    where = (o.cell.group, o.cell.method, o.cell.seed)
                    rows.append((*where, name, published, ours, apart, item.source))
    numbers = ((title, "number") for title in ("published", "ours", "ours less published"))
    return Table.of(
        "expected",
        "Published values next to ours",
        ["group", "method", ("seed", "count"), "metric", *numbers, "source"],
        rows,
        note="In the metric's own unit: shares of 1, bits for GE. A dash: not measured yet.",
    )


def first_beyond(run: Run | None) -> str | None:
    """The first edit of a sequence whose model was beyond the threshold; how many of single edits were."""
    judged = [] if run is None else [edit for edit in run.edits if edit.record.collapsed is not None]
    beyond = [edit.step for edit in judged if edit.record.collapsed]
    if run is None or not judged:
        return None
    if run.mode == "single":
        return f"{len(beyond):,} of {len(judged):,} alone"
    return f"{min(beyond):,}" if beyond else "none"


def _perplexity(run: Run | None) -> float | None:
    if run is None:
        return None
    if run.mode == "single":
        return median_of([e.left_ppl for e in run.edits if e.left_ppl is not None])
    return curves.curve(run)[1][-1] if curves.curve(run)[1] else None


def _outcome(progress: CellProgress, label: str) -> CellResult:
    cell = progress.cell
    run = load_run(cell.folder) if progress.made and (cell.folder / CONFIG).exists() else None
    if run is None:
        nothing: dict[str, Any] = dict.fromkeys(("run", "measured", "quality", "seconds", "memory_gb"))
        return CellResult(progress=progress, values={}, **nothing)
    own = measured(run, cell.group, cell.method, cell.seed)
    found = own.values
    values = {name: mean_of(numbers) for name, numbers in found.items()} | {"S": score_of(found)}
    first_of = batch_of(cell.folder, run.manifest)
    steps = {first_of(edit.index): edit.seconds["edit"] for edit in run.edits}
    return CellResult(
        progress=progress,
        run=replace(run, label=label),
        measured=own,
        values=values,
        quality=quality_of({name: found.get(name, []) for name in ACCURACIES}),
        seconds=mean_of(list(steps.values())),
        memory_gb=None if cell.peak is None else cell.peak / 1e9,
    )


def _label(cell: Cell, cells: Sequence[Cell]) -> str:
    """Method, with group and seed where the survey has several."""
    parts = [cell.method]
    parts += [cell.group] if len({other.group for other in cells}) > 1 else []
    parts += [f"seed {cell.seed}"] if len({other.seed for other in cells}) > 1 else []
    return ", ".join(parts)
