"""Teacher-forced numbers and what the model says by itself, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from easyeditor.drawing.table import Table
from easyeditor.report.tables import ACCURACIES
from easyeditor.results.run import Run
from easyeditor.values.plain import mean

WAYS = {
    "WILD": "wild_{}",
    "WILD, in an instruction": "wild_qa_{}",
    "WILD, in a chat": "wild_chat_{}",
    "judged": "wild_judge_{}",
    "judged, in an instruction": "wild_judge_qa_{}",
    "judged, in a chat": "wild_judge_chat_{}",
}
"""A column, and the metrics it holds, by what is measured."""


def wild_table(runs: Sequence[Run]) -> Table:
    """A row for rewrite, rephrase and locality of each run; a column for each way that the runs measured."""
    names = {name for run in runs for edit in run.edits for name in edit.record.metrics.get("after", {})}
    parts = {word: accuracy.removesuffix("_acc") for word, accuracy in ACCURACIES.items()}
    ways = {title: form for title, form in WAYS.items() if names & {form.format(part) for part in parts.values()}}
    rows = [
        (run.label, word, len(run.edits), *(_mean(run, name) for name in (ACCURACIES[word], *_named(ways, part))))
        for run in runs
        for word, part in parts.items()
        if ways and run.edits
    ]
    return Table.of(
        "wild",
        "Teacher-forced, and what the model says by itself",
        ("run", "of the edit", ("edits", "count"), *((title, "percent") for title in ("teacher-forced", *ways))),
        rows,
        longest=0,
        note="Means over edits, right after each. Teacher-forced: the right tokens are fed in and each is compared. "
        "WILD: the model goes on by itself, and the whole text must be the target (locality: what it was before).",
    )


def _named(ways: dict[str, str], part: str) -> list[str]:
    return [form.format(part) for form in ways.values()]


def _mean(run: Run, name: str) -> float | None:
    return mean(edit.record.after(name) for edit in run.edits)
