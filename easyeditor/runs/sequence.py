"""Modes `sequential` and `batch`: edits stay in the model, one or `batch_size` at a time, and are evaluated again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from easyeditor.base.errors import DataError
from easyeditor.evaluate.examined import Examined
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.registry import Evaluation
from easyeditor.results.lines import EditLine, EvaluationLine, Retention, RunLine
from easyeditor.runs.guard import Guarded, guarded
from easyeditor.runs.planning import places
from easyeditor.runs.watching import Watcher, keys_of
from easyeditor.runs.work import Work, edit_line, norms_of, tried
from easyeditor.values.edit import EditResult
from easyeditor.values.plain import mean
from easyeditor.values.record import Row, Side

DELTAS = "deltas"  # folder of the saved edits in a run's
SCORED_TOGETHER = 32  # requests scored in one go at an evaluation


def run_sequence(work: Work) -> None:
    """Edit in order, keep what the guard keeps, evaluate every `eval_every` edits and at the end.

    A step already recorded is not computed again: its saved delta is committed, so the weights are bit-equal to those
    of a run that was never interrupted. A step's delta is on disk before its lines are.
    """
    fit, planned = set(work.numbers), places(work.starts, len(work.requests))
    steps = [[n for n in step if n in fit] for step in planned]  # without what does not fit the model
    base = work.editor.perplexity()
    ppl: PerplexityReport | None = base
    lines: dict[int, EditLine] = {}  # of the edits that are kept
    originals = Originals(work, steps)
    watcher = Watcher(work.editor)
    done = 0
    for step, chunk in zip(planned, steps, strict=True):
        first = step[0]
        known = {n: work.done[n] for n in chunk if n in work.done}
        if len(known) < len(chunk):
            if ppl is None:
                ppl = work.editor.perplexity()
            last = max(lines, default=-1) + 1
            made, ppl = _step(work, watcher, chunk, known, (ppl, base), originals.of(chunk), last, first)
        elif not chunk:
            made = {}
        else:
            made, ppl = known, None  # measured again when it is needed
            if any(_kept(line) for line in made.values()):
                kept = saved_edit(work.folder, first, made.values())
                work.editor.commit(kept, delta_folder(work.folder, first))
                watcher.known(delta_folder(work.folder, first))
        lines |= {
            n: line.without_details(outputs=True)
            for n, line in made.items()
            if isinstance(line, EditLine) and line.kept
        }
        done = first + len(step)
        every = work.settings.eval_every
        if every and done // every > first // every:
            evaluate(work, done, lines, ppl, base)
        if work.settings.stop_on_collapse and any(_collapsed(line) for line in made.values()):
            break
    evaluate(work, done, lines, ppl, base)


class Originals:
    """The original model's numbers of the requests, measured in groups fixed by place, so that a resumed run measures
    the same batches."""

    def __init__(self, work: Work, steps: list[list[int]]) -> None:
        self._work, self._steps = work, steps
        self._together = max(1, SCORED_TOGETHER // work.settings.batch_size)  # steps in a group
        self._group: list[int] = []
        self._measured: Evaluation | None = None  # of the group

    def of(self, chunk: list[int]) -> Evaluation | None:
        """Of one step's requests; None where its group holds a request that cannot be measured."""
        if chunk[0] not in self._group:
            first = self._steps.index(chunk) // self._together * self._together
            steps = self._steps[first : first + self._together]
            self._group = [n for step in steps for n in step]
            prefixes = [self._work.editor.test_prefix(step[0]) for step in steps for _ in step]
            try:
                self._measured = _original(self._work, self._group, prefixes)
            except DataError:  # the step it belongs to says which one
                self._measured = None
        return None if self._measured is None else self._measured.only([self._group.index(n) for n in chunk])


def _original(work: Work, numbers: list[int], prefixes: list[str | None]) -> Evaluation:
    with work.editor.original():
        return work.editor.measure([work.requests[n] for n in numbers], prefixes)


def delta_folder(folder: Path, first: int) -> Path:
    """Where the edit is saved whose first request is at place `first`."""
    return folder / DELTAS / f"{first + 1:06d}"


def saved_edit(folder: Path, first: int, lines: Iterable[RunLine]) -> EditResult:
    """The edit that was saved when `lines` were recorded. Raises DataError: missing, damaged, or another one."""
    place = delta_folder(folder, first)
    saved = EditResult.load(place)
    kept = [line for line in lines if isinstance(line, EditLine) and line.saved_sha256 is not None]
    asked = [(request.prompt, request.target_new) for request in saved.requests]
    same = all((line.request.prompt, line.request.target_new) in asked for line in kept)
    if not same or (kept and saved.sha256() not in {line.saved_sha256 for line in kept}):
        raise DataError(
            f"{place}: is not the edit that was recorded (its sha256 is {saved.sha256()[:12]}…); the run cannot go on "
            "without it: put the right files there, or start a new run"
        )
    return saved


def _step(
    work: Work,
    watcher: Watcher,
    chunk: list[int],
    known: Mapping[int, RunLine],
    ppl: tuple[PerplexityReport | None, PerplexityReport | None],
    original: Evaluation | None,
    last: int,
    first: int,
) -> tuple[Mapping[int, RunLine], PerplexityReport | None]:
    """One edit: compute and measure, save its delta, keep it, record its lines. Returns lines and perplexity.

    `ppl` is that of the model as it is, and of the original one; `last` the latest step whose edit is kept; `first` the
    place where the edit begins.
    """
    requests = [work.requests[n] for n in chunk]
    work.watch.note(f"edit {chunk[0] + 1}")
    examined = tried(
        work,
        chunk,
        lambda: work.editor.examine_together(
            requests, ppl_before=ppl[0], ppl_base=ppl[1], base=original, draw=chunk[0]
        ),
    )
    if examined is None:
        return {}, ppl[0]
    outcome = guarded(work, requests, examined, chunk[0], ppl[1], last)
    return settle(work, watcher, chunk, examined, outcome, first, known), outcome.ppl


def settle(
    work: Work,
    watcher: Watcher,
    chunk: list[int],
    examined: Examined,
    outcome: Guarded,
    first: int,
    known: Mapping[int, RunLine] | None = None,
) -> dict[int, RunLine]:
    """Save and commit what is kept of the edit that begins at place `first`, then record its lines, but for those
    `known`."""
    place = delta_folder(work.folder, first)
    edit = outcome.kept or examined.result
    keys_NK, saved = keys_of(edit), None
    nearest = watcher.nearest(keys_NK)
    if outcome.kept is not None:
        outcome.kept.save(place)
        saved = outcome.kept.sha256()
        watcher.keep(keys_NK, place, save=True)
        work.editor.commit(outcome.kept, place)
    watched = watcher.seen(edit, nearest)
    seconds = {name: value / len(chunk) for name, value in examined.seconds.items()}
    norms = norms_of(examined.result)  # once: those of a batch are the same on all its lines
    made: dict[int, RunLine] = {}
    for n, record, guard in zip(chunk, examined.records, outcome.entries, strict=True):
        seen = watched if n == chunk[-1] else None
        line = edit_line(record, n, work, norms=norms, seconds=seconds, guard=guard, saved=saved, watched=seen)
        made[n] = line
        if n not in (known or {}):
            work.record(line)
    return made


def evaluate(
    work: Work,
    after: int,
    lines: Mapping[int, EditLine],
    ppl: PerplexityReport | None,
    base: PerplexityReport | None,
) -> None:
    """Record how the model and all edits in it fare after `after` edits, unless it is recorded."""
    if after == 0 or after in work.evaluated:
        return
    work.evaluated.add(after)
    work.watch.note(f"evaluating {len(lines)} edits")
    measured = ppl if ppl is not None else work.editor.perplexity()
    retention = []
    numbers = sorted(lines)
    for start in range(0, len(numbers), SCORED_TOGETHER):
        group = numbers[start : start + SCORED_TOGETHER]
        prefixes = [lines[n].kept_record.test_prefix for n in group]
        original = _original(work, group, prefixes) if work.editor.compares else None
        now = work.editor.measure([work.requests[n] for n in group], prefixes, before=original)
        retention += [_retained(n, lines[n], now.side(k), now.rows[k]) for k, n in enumerate(group)]
    collapse = work.editor.verdict(base, measured)
    work.record(
        EvaluationLine(
            after=after,
            ppl=None if measured is None else measured.mean,
            collapsed=None if collapse is None else collapse.collapsed,
            retention=tuple(retention),
        )
    )


def _retained(number: int, line: EditLine, now: Side, metrics: Row) -> Retention:
    """One edit's accuracies now; locality is agreement with what the original model answered, and also with
    what the model answered just before that edit."""

    def locality(before: Side) -> float | None:
        return mean(value for values in now.agreement(before).values() for value in values)

    record = line.kept_record
    return Retention(
        index=number,
        case_id=line.request.case_id,
        rewrite_acc=now.rewrite[0],
        rephrase_acc=mean(now.rephrase),
        locality_acc=locality(record.pre),
        locality_just_before_acc=locality(record.just_before or record.pre),
        metrics={name: found.value for name, found in metrics.items()},
    )


def _kept(line: RunLine) -> bool:
    return isinstance(line, EditLine) and line.kept


def _collapsed(line: RunLine) -> bool:
    """Did this edit collapse the model, and stay in it or was it rolled back?"""
    return isinstance(line, EditLine) and line.guard is not None and line.guard.action in ("keep", "rollback")
