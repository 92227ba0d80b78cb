"""What every mode of a mass edit works with: an editor, the requests, a journal, and the lines it writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from easyeditor.dataset.sentences import Sentences
from easyeditor.errors import ConfigError, DataError, NumericalError
from easyeditor.evaluate.collapse import Collapse
from easyeditor.evaluate.metrics import RequestScores
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.record import Examined
from easyeditor.hparams import HyperParams
from easyeditor.methods.base import EditMethod
from easyeditor.progress import Progress
from easyeditor.records import EditRequest, EditResult
from easyeditor.runs.journal import Journal
from easyeditor.runs.settings import RunSettings

LOG = logging.getLogger(__name__)


class Editing(Protocol):
    """What a mode needs of an editor (BaseEditor has it)."""

    hparams: HyperParams
    method: EditMethod[Any]
    sentences: Sentences | None

    def compute_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[EditResult]:
        """An edit of its own for each request."""
        ...

    def examine_together(
        self,
        requests: Sequence[EditRequest],
        *,
        result: EditResult | None = None,
        ppl_before: PerplexityReport | None = None,
        ppl_base: PerplexityReport | None = None,
        scores_before: Sequence[RequestScores] | None = None,
        scores_base: Sequence[RequestScores] | None = None,
        draw: int | None = None,
    ) -> Examined:
        """Compute and measure one edit."""
        ...

    def score_all(self, requests: Sequence[EditRequest], prefixes: Sequence[str | None]) -> list[RequestScores]:
        """Scores on the model as it is."""
        ...

    def test_prefix(self, draw: int | None = None) -> str | None:
        """The test-time prefix of edit number `draw`."""
        ...

    def perplexity(self) -> PerplexityReport | None:
        """Perplexity of the model as it is."""
        ...

    def judge(
        self,
        before: PerplexityReport | None,
        after: PerplexityReport | None,
        just_before: PerplexityReport | None = None,
    ) -> Collapse | None:
        """The verdict on a change of perplexity."""
        ...

    def fingerprint(self) -> str:
        """Identity of the weights."""
        ...

    def original(self) -> AbstractContextManager[Any]:
        """The model before the first commit inside the block."""
        ...

    def commit(self, result: EditResult) -> None:
        """Keep an edit in the model."""
        ...

    def remedied(self) -> Editing | None:
        """The editor with the method's remedy set."""
        ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """One process's part of a run; `numbers` are places in `requests`, `done` the edits recorded by place,
    `evaluated` the numbers of edits after which an evaluation is recorded."""

    editor: Editing
    settings: RunSettings
    requests: Sequence[EditRequest]
    numbers: Sequence[int]
    journal: Journal
    folder: Path
    done: Mapping[int, Mapping[str, Any]]
    evaluated: set[int]
    watch: Watch

    def record(self, line: Mapping[str, Any]) -> None:
        """Put one line on disk and on the progress bar."""
        self.journal.append(line)
        self.watch.seen(line)


class Watch:
    """Live progress: edits done, current and worst perplexity, collapsed so far."""

    def __init__(self, show: Progress | None, total: int) -> None:
        self._show, self._total = show, total
        self._done, self._collapsed = 0, 0
        self._now: float | None = None
        self._worst: float | None = 0.0  # None: not finite
        self._measured = False

    def seen(self, line: Mapping[str, Any]) -> None:
        """Count one line, new or of an earlier run."""
        if line["kind"] == "evaluation":
            return
        self._done += 1
        if line["kind"] == "edit" and line["collapse"] is not None:
            self._measured = True
            self._now = line["post"]["ppl"]
            finite = self._now is not None and self._worst is not None
            self._worst = max(self._worst or 0.0, self._now or 0.0) if finite else None
            self._collapsed += bool(line["collapse"]["collapsed"])
        self.note("")

    def note(self, text: str) -> None:
        """Show the counts, and what is being worked on."""
        if self._show is not None:
            now = f"ppl {_short(self._now)}, worst {_short(self._worst)}, collapsed {self._collapsed}"
            parts = [now if self._measured else "", text]
            self._show(self._done, self._total, "; ".join(part for part in parts if part))

    @property
    def inner(self) -> Progress:
        """Progress of one computation, shown as a note."""
        return lambda done, of, note: self.note(note)


def failed(request: EditRequest, number: int, mode: str, error: Exception) -> dict[str, Any]:
    """The line of a request whose edit could not be computed."""
    LOG.warning("record %d (case %r) has no edit: %s", number, request.case_id, error)
    return {
        "kind": "failed",
        "index": number,
        "step": number + 1,
        "case_id": request.case_id,
        "prompt": request.prompt,
        "mode": mode,
        "error": f"{type(error).__name__}: {error}",
    }


def edit_line(
    record: Mapping[str, Any],
    number: int,
    work: Work,
    *,
    result: EditResult,
    seconds: Mapping[str, float],
    guard: Mapping[str, Any] | None,
    saved: str | None = None,
) -> dict[str, Any]:
    """The line of one edit: its record, its place, its time (s), the guard's action, the norms of its update, the hash
    of the `saved` edit if it stays in the model."""
    spent = {name: seconds.get(name, 0.0) for name in ("edit", "metrics", "perplexity")}
    norms: dict[str, float] = {}
    for delta in result.deltas:
        norms[delta.name] = (norms.get(delta.name, 0.0) ** 2 + delta.norm() ** 2) ** 0.5
    return {
        **record,
        "kind": "edit",
        "index": number,
        "step": number + 1,
        "mode": work.settings.mode,
        "seconds": {**spent, "total": sum(spent.values())},
        "guard": guard,
        "delta": norms,
        "saved_sha256": saved,
    }


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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the guard made of an edit: each record's `guard` entry, and the edit that stands (None: none)."""

    entries: tuple[dict[str, Any] | None, ...]
    kept: EditResult | None
    ppl: PerplexityReport | None


def guarded(
    work: Work, requests: Sequence[EditRequest], examined: Examined, draw: int, base: PerplexityReport | None
) -> Outcome:
    """Keep a collapsing edit, take it back, or take it back and do it again with the method's remedy."""
    action, count = work.settings.on_collapse, len(requests)
    if examined.collapse is None or not examined.collapse.collapsed:
        return Outcome(entries=(None,) * count, kept=examined.result, ppl=examined.ppl_after)
    if action == "keep":
        entry = {"action": action, "kept": True}
        return Outcome(entries=(entry,) * count, kept=examined.result, ppl=examined.ppl_after)
    if action == "revert":
        return Outcome(entries=({"action": action, "kept": False},) * count, kept=None, ppl=examined.ppl_before)
    again = {"action": action, "settings": work.editor.method.remedy}
    editor = work.editor.remedied()
    assert editor is not None  # checked before the run began
    try:
        redone = editor.examine_together(requests, ppl_before=examined.ppl_before, ppl_base=base, draw=draw)
    except NumericalError as error:
        entry = {**again, "kept": False, "error": str(error)}
        return Outcome(entries=(entry,) * count, kept=None, ppl=examined.ppl_before)
    stands = redone.collapse is not None and not redone.collapse.collapsed
    own = tuple(
        {
            **again,
            "kept": stands,
            "seconds": redone.seconds,
            "record": {key: value for key, value in record.items() if key not in ("case_id", "requested_rewrite")},
        }
        for record in redone.records
    )
    if stands:
        return Outcome(entries=own, kept=redone.result, ppl=redone.ppl_after)
    return Outcome(entries=own, kept=None, ppl=examined.ppl_before)


def brief(line: Mapping[str, Any], sequence: bool) -> dict[str, Any]:
    """What is needed of a recorded line to go on: little, so that thousands fit; more for edits that stay.

    Raises:
        ConfigError: a line of an earlier version, whose `pre` was the model just before the edit.
    """
    if line["kind"] != "edit":
        return {"kind": line["kind"]}
    guard, kept = line["guard"], {}
    if sequence:
        if "just_before" not in line:
            raise ConfigError(
                "this sequence was begun by an earlier version, which measured `pre` just before each edit and not on "
                "the original model, so its records and new ones would not mean the same; start a new run"
            )
        kept = {key: line[key] for key in ("case_id", "test_prefix", "pre", "just_before")}
        kept["saved_sha256"] = line.get("saved_sha256")  # null in runs begun before it was recorded
    elif guard is not None:
        guard = {key: value for key, value in guard.items() if key != "record"}
    return {**kept, "kind": "edit", "collapse": line["collapse"], "post": {"ppl": line["post"]["ppl"]}, "guard": guard}


def stands(line: Mapping[str, Any]) -> bool:
    """Is the edit of this line in the model (or would be, were edits kept)?"""
    return line["kind"] == "edit" and (line["guard"] is None or line["guard"]["kept"])


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
