"""The guard: what is done about an edit that collapses the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from easyeditor.base.errors import NumericalError
from easyeditor.evaluate.examined import Examined
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.results.lines import Guard
from easyeditor.runs.work import Work
from easyeditor.values.edit import EditRequest, EditResult


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """What the guard made of an edit: each record's `guard` entry, the edit that is kept (None: none), and
    perplexity of the model that the next edit begins with."""

    entries: tuple[Guard | None, ...]
    kept: EditResult | None
    ppl: PerplexityReport | None


def guarded(
    work: Work,
    requests: Sequence[EditRequest],
    examined: Examined,
    draw: int,
    base: PerplexityReport | None,
    last: int = 0,
) -> Guarded:
    """Keep a collapsing edit, take it back, or take it back and do it again with the method's remedy. A rollback also
    says which state is kept: the model after step `last`, the latest whose edit is kept."""
    action, count = work.settings.on_collapse, len(requests)
    if examined.collapse is None or not examined.collapse.collapsed:
        return Guarded(entries=(None,) * count, kept=examined.result, ppl=examined.ppl_after)
    if action == "keep":
        return Guarded(entries=(Guard(action=action, kept=True),) * count, kept=examined.result, ppl=examined.ppl_after)
    if action == "revert":
        return Guarded(entries=(Guard(action=action, kept=False),) * count, kept=None, ppl=examined.ppl_before)
    if action == "rollback":
        entry = Guard(action=action, kept=False, back_to=last)
        return Guarded(entries=(entry,) * count, kept=None, ppl=examined.ppl_before)
    again = Guard(action=action, settings=work.editor.method.remedy, kept=False)
    editor = work.editor.remedied()
    assert editor is not None  # checked before the run began
    try:
        redone = editor.examine_together(requests, ppl_before=examined.ppl_before, ppl_base=base, draw=draw)
    except NumericalError as error:
        return Guarded(entries=(replace(again, error=str(error)),) * count, kept=None, ppl=examined.ppl_before)
    kept = redone.collapse is not None and not redone.collapse.collapsed
    own = tuple(replace(again, kept=kept, seconds=redone.seconds, record=record) for record in redone.records)
    if kept:
        return Guarded(entries=own, kept=redone.result, ppl=redone.ppl_after)
    return Guarded(entries=own, kept=None, ppl=examined.ppl_before)
