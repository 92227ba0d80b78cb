"""A run whose requests are typed one after another: each edit is tried, looked at, then kept or taken back.

Its folder is that of a sequential run: what was kept lies in `deltas/`, what was taken back is recorded too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from easyeditor.base.errors import DataError
from easyeditor.base.files import discard, to_json, write_bytes, write_json
from easyeditor.base.hparams import HyperParams
from easyeditor.dataset.reader import Dataset
from easyeditor.editing.editor import Editor
from easyeditor.evaluate.examined import Examined
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.results.journal import Journal, read_raw
from easyeditor.results.lines import EditLine, EvaluationLine, Guard
from easyeditor.results.run import CONFIG, MANIFEST, RESULTS, SUMMARY, run_lines
from easyeditor.runs.guard import Guarded, guarded
from easyeditor.runs.manifest import read_manifest
from easyeditor.runs.mass import begun, finish, settle_model, taken_up
from easyeditor.runs.planning import Plan
from easyeditor.runs.ranks import Rank
from easyeditor.runs.sequence import DELTAS, delta_folder, evaluate, saved_edit, settle
from easyeditor.runs.settings import TYPED, RunSettings
from easyeditor.runs.watching import Watcher
from easyeditor.runs.work import Watch, Work, planned_lines
from easyeditor.values.edit import EditRequest, EditResult

TAKEN_BACK = Guard(action="revert", kept=False)


class Session:
    """The edits of one run so far, and the model with those that were kept."""

    def __init__(self, work: Work) -> None:
        """Take up what the run's journal has. Raises DataError: an edit that was kept is not there."""
        self._work = work
        self.editor = work.editor
        self.lines: list[EditLine] = []
        self._requests: list[EditRequest] = []
        self._ppl: PerplexityReport | None = None  # of the model as it is; None: to be measured
        self._watcher = Watcher(self.editor)
        for line in planned_lines(work.folder, work.settings):
            if isinstance(line, EvaluationLine):
                work.evaluated.add(line.after)
            elif isinstance(line, EditLine):
                if line.index != len(self.lines):
                    raise DataError(f"{work.folder}: edit #{line.index} is recorded where #{len(self.lines)} must be")
                self.lines.append(line.without_details(outputs=True))
                self._requests.append(line.request)
        self._work = replace(work, requests=self._requests)
        for number, edit in self._edits():
            place = delta_folder(work.folder, number)
            self.editor.commit(edit, place)
            self._watcher.known(place)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._work.folder

    @property
    def kept(self) -> list[EditLine]:
        """The edits in the model, in order."""
        return [line for line in self.lines if line.kept]

    def edits(self) -> list[EditResult]:
        """What was kept, as it was saved."""
        return [edit for _, edit in self._edits()]

    def try_out(self, request: EditRequest) -> Examined:
        """Compute and measure one edit; the model is as before when this returns.

        Raises:
            DataError: not a request for this model and method. NumericalError: an edit that is not finite.
        """
        place = len(self.lines)
        return self.editor.examine_together([request], ppl_before=self._ppl, draw=place, verbose=True)

    def keep(self, request: EditRequest, examined: Examined) -> None:
        """Keep a tried edit in the model, and record it."""
        self._settle(request, examined, guarded(self._work, [request], examined, len(self.lines), None))

    def take_back(self, request: EditRequest, examined: Examined) -> None:
        """Record a tried edit that is not kept."""
        self._settle(request, examined, Guarded(entries=(TAKEN_BACK,), kept=None, ppl=examined.ppl_before))

    def undo(self) -> EditLine:
        """Take the last kept edit out of the model; its line says so. Raises DataError: none was kept."""
        if not self.kept:
            raise DataError("nothing to take back: no edit is kept")
        last = self.kept[-1]
        ((_, edit),) = [pair for pair in self._edits() if pair[0] == last.index]
        self._rewrite(last.index)
        self.editor.revert(edit)
        self.lines[last.index] = replace(last, guard=TAKEN_BACK, saved_sha256=None)
        self._ppl = None
        with self.editor.original():
            self._watcher = Watcher(self.editor)
        for line in self.kept:
            self._watcher.known(delta_folder(self.folder, line.index))
        return last

    def check(self) -> EvaluationLine:
        """Measure the model with all kept edits, and each of them, and record it."""
        after = len(self.lines)
        if not self.kept:
            raise DataError("nothing to check: no edit is kept")
        with self.editor.original():
            base = self.editor.perplexity()
        evaluate(self._work, after, {line.index: line for line in self.kept}, self._ppl, base)
        found = [line for line in run_lines(self.folder) if isinstance(line, EvaluationLine) and line.after == after]
        return found[0]

    def _edits(self) -> Iterator[tuple[int, EditResult]]:
        for line in self.kept:
            yield line.index, saved_edit(self.folder, line.index, [line])

    def _settle(self, request: EditRequest, examined: Examined, outcome: Guarded) -> None:
        number = len(self.lines)
        manifest = read_manifest(self.folder / MANIFEST)
        write_json(self.folder / MANIFEST, {**manifest, "selected": number + 1})
        self._requests.append(request)
        (line,) = settle(self._work, self._watcher, [number], examined, outcome, number).values()
        assert isinstance(line, EditLine)
        self.lines.append(line.without_details(outputs=True))
        self._ppl = outcome.ppl

    def _rewrite(self, number: int) -> None:
        """The journal anew: edit `number` taken back, and no evaluation that had it."""
        self._work.journal.close()
        path, kept = self.folder / RESULTS, []
        for _, raw, value in read_raw(path):
            if value["kind"] == "edit" and value["index"] == number:
                kept.append((to_json({**value, "guard": TAKEN_BACK.to_json(), "saved_sha256": None}) + "\n").encode())
            elif value["kind"] != "evaluation" or value["after"] <= number:
                kept.append(raw)
        write_bytes(path, b"".join(kept))
        self._work.evaluated.difference_update(range(number + 1, len(self.lines) + 1))
        self._work = replace(self._work, journal=Journal(path))

    def close(self) -> None:
        """Write the summary; a run without any edit leaves nothing behind."""
        self._work.journal.close()
        if self.lines:
            finish(self.folder)
            return
        for name in (RESULTS, MANIFEST, SUMMARY, CONFIG):
            discard(self.folder / name)
        shutil.rmtree(self.folder / DELTAS, ignore_errors=True)  # of an edit that could not be recorded


@contextmanager
def session(
    hparams: HyperParams,
    settings: RunSettings,
    make_editor: Callable[[HyperParams], Editor],
    *,
    output: str | None = None,
    resume: Path | None = None,
) -> Iterator[Session]:
    """A session in a new run folder, or in one of an earlier session; its summary is written however it ends.

    Raises:
        ConfigError: another model than the run's. DataError: a damaged run. OutputError: not writable, or in use.
    """
    data = Dataset(source=TYPED, format="typed", sha256="", requests=())
    what, rank = Plan(hparams, settings, data, ()), Rank()
    run_at = begun(output, what) if resume is None else taken_up(resume, rank)
    with run_at as folder:
        editor = make_editor(hparams)
        settle_model(folder, what, editor, rank)
        journal, watch = Journal(folder / RESULTS), Watch(None, 0)
        work = Work(editor=editor, settings=settings, requests=(), journal=journal, folder=folder, watch=watch)
        opened = Session(work)
        discard(folder / SUMMARY)
        try:
            yield opened
        finally:
            opened.close()
    if not opened.lines and resume is None:
        _remove_empty(folder, output is None)


def typed_settings(metrics: list[str]) -> RunSettings:
    """The settings of a run whose requests are typed."""
    return RunSettings(data=TYPED, mode="sequential", metrics=metrics)


def _remove_empty(folder: Path, ours: bool) -> None:
    if ours and not any(folder.iterdir()):
        folder.rmdir()
