"""What every mode of a mass edit works with: an editor, the requests, a journal, and the lines it writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError, NumericalError
from easyeditor.base.files import plain, to_json
from easyeditor.base.progress import Progress
from easyeditor.editing.editor import Editor
from easyeditor.results.journal import Journal
from easyeditor.results.lines import PARTS, EditLine, EvaluationLine, FailureLine, Guard, RunLine, ScreenLine
from easyeditor.results.run import placed_lines
from easyeditor.results.shown import shown_ppl
from easyeditor.results.watched import Watched
from easyeditor.runs.settings import RunSettings
from easyeditor.values.edit import EditRequest, EditResult
from easyeditor.values.record import EditRecord

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One process's part of a run; `numbers` are places in `requests`, `starts` where each edit of a
    sequence begins, `done` the edits recorded by place, `evaluated` the numbers of edits after which an evaluation is
    recorded."""

    editor: Editor
    settings: RunSettings
    together: int = 1
    """Edits computed together in mode single: what the settings say, or what `auto` came to when the run began."""
    requests: Sequence[EditRequest]
    numbers: Sequence[int] = ()
    starts: Sequence[int] = ()
    journal: Journal
    folder: Path
    done: Mapping[int, RunLine] = field(default_factory=dict)
    evaluated: set[int] = field(default_factory=set)
    watch: Watch

    def record(self, line: RunLine) -> None:
        """Put one line on disk and on the progress bar."""
        self.journal.append(line.to_json())
        self.watch.seen(line)


class Watch:
    """Live progress: edits done, current and worst perplexity, collapsed so far."""

    def __init__(self, show: Progress | None, total: int) -> None:
        self._show, self._total = show, total
        self._done, self._collapsed = 0, 0
        self._now: float | None = None
        self._worst: float | None = None

    def seen(self, line: RunLine) -> None:
        """Count one line, new or of an earlier run."""
        if isinstance(line, EvaluationLine):
            return
        self._done += 1
        if isinstance(line, EditLine) and line.record.post.ppl is not None:
            self._now = line.record.post.ppl
            self._worst = max(self._worst or 0.0, self._now)
            self._collapsed += bool(line.record.collapsed)
        self.note("")

    def note(self, text: str) -> None:
        """Show the counts, and what is being worked on."""
        if self._show is not None:
            now = f"ppl {shown_ppl(self._now)}, worst {shown_ppl(self._worst)}, collapsed {self._collapsed}"
            parts = [now if self._now is not None else "", text]
            self._show(self._done, self._total, "; ".join(part for part in parts if part))

    @property
    def inner(self) -> Progress:
        """Progress of one computation, shown as a note."""
        return lambda done, of, note: self.note(note)


def failed(request: EditRequest, number: int, mode: str, error: Exception) -> FailureLine:
    """The line of a request whose edit could not be computed."""
    LOG.warning("record %d (case %r) has no edit: %s", number, request.case_id, error)
    why, step = f"{type(error).__name__}: {error}", number + 1
    return FailureLine(index=number, step=step, case_id=request.case_id, prompt=request.prompt, mode=mode, error=why)


def planned_lines(
    folder: Path, settings: RunSettings, requests: Sequence[EditRequest] | None = None
) -> Iterator[RunLine]:
    """What a resumed run has recorded, each line compared with the plan (of typed `requests` nothing is known).

    Raises:
        DataError: a line that this run cannot have written (file and line are named).
    """
    for where, line in placed_lines(folder):
        if why := _unplanned(line, settings, requests):
            raise DataError(f"{where}: is not of this run: {why}; put the run's own file there, or start a new run")
        yield line


def _unplanned(line: RunLine, settings: RunSettings, requests: Sequence[EditRequest] | None) -> str | None:
    """Why a line cannot be one of this run, if so."""
    if isinstance(line, EvaluationLine):
        if settings.mode == "single":
            return "an evaluation, which mode single has not"
        cases = [(row.index, row.case_id) for row in line.retention]
        return None if requests is None else _other(cases, line.after, requests)
    if isinstance(line, ScreenLine) != settings.screen:
        return (
            f"a line of kind {line.to_json()['kind']!r}, and the run {'is' if settings.screen else 'is not'} a screen"
        )
    if not isinstance(line, ScreenLine):
        if line.mode != settings.mode:
            return f"its mode is {line.mode}, the run's {settings.mode}"
        if line.step != line.index + 1:
            return f"it is step {line.step}, and its index {line.index}"
    if requests is None:
        return None
    case = line.request.case_id if isinstance(line, EditLine) else line.case_id
    if why := _other([(line.index, case)], line.index + 1, requests):
        return why
    wanted = requests[line.index]
    asked = line.request.prompt if isinstance(line, EditLine) else line.prompt
    same = asked == wanted.prompt
    if isinstance(line, EditLine):
        same = to_json(line.request.to_json()) == to_json(wanted.to_json())
    if isinstance(line, ScreenLine):
        same = same and line.subject == wanted.subject
    return (
        None if same else f"its request ({asked!r:.60}) is not number {line.index} of the data ({wanted.prompt!r:.60})"
    )


def _other(cases: Sequence[tuple[int, Any]], below: int, requests: Sequence[EditRequest]) -> str | None:
    """Why cases, by index, are not those of the run's first `below` requests."""
    if below > len(requests):
        return f"it is of record {below}, and the run has {len(requests)} requests"
    for index, case in cases:
        if index >= below or plain(requests[index].case_id) != case:
            return f"its case {case!r:.60} is not number {index} of the data"
    return None


def norms_of(result: EditResult) -> dict[str, float]:
    """How far an edit moves each weight."""
    norms: dict[str, float] = {}
    for delta in result.deltas:
        norms[delta.name] = (norms.get(delta.name, 0.0) ** 2 + delta.norm() ** 2) ** 0.5
    return norms


def edit_line(
    record: EditRecord,
    number: int,
    work: Work,
    *,
    norms: Mapping[str, float],
    seconds: Mapping[str, float],
    guard: Guard | None,
    saved: str | None = None,
    watched: Watched | None = None,
) -> EditLine:
    """The line of one edit: its record, its place, the norms of its update (`norms_of`), its time (s), the guard's
    action, the hash of the `saved` edit if it stays in the model, what a sequence watches."""
    spent = {name: seconds.get(name, 0.0) for name in PARTS}
    return EditLine(
        record=record,
        index=number,
        step=number + 1,
        mode=work.settings.mode,
        seconds={**spent, "total": sum(spent.values())},
        guard=guard,
        delta=norms,
        saved_sha256=saved,
        watched=watched,
    )


def tried(work: Work, numbers: Sequence[int], compute: Callable[[], Any]) -> Any:
    """`compute()`; None when it failed in a way that is the requests' own, which is recorded for each of them.

    A non-finite edit is a finding, and recorded; a request that cannot be edited stops the run unless `skip_bad`.
    """
    try:
        return compute()
    except (NumericalError, DataError) as error:
        if isinstance(error, DataError) and not work.settings.skip_bad:
            which = ", ".join(str(n) for n in numbers)
            raise DataError(f"record {which} of the selection: {error}; --skip-bad leaves such records out") from error
        for number in numbers:
            if number not in work.done:
                work.record(failed(work.requests[number], number, work.settings.mode, error))
        return None


def fitting(work: Work) -> list[int]:
    """The places whose requests fit the model, asked before the first edit; with `skip_bad` the others are recorded,
    each alone, and the rest of their batch is still edited."""
    known = {n for n, line in work.done.items() if not isinstance(line, FailureLine)}

    def fits(n: int) -> Any:
        return tried(work, [n], lambda: work.editor.check(work.requests[n], work.editor.test_prefix(n)))

    return [n for n in work.numbers if n in known or fits(n)]
