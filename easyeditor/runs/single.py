"""Mode `single`: every edit on the original model. And the screen: denominators only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from easyeditor.base.errors import DataError, NumericalError
from easyeditor.evaluate.examined import State
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.registry import Evaluation
from easyeditor.lm.loading import input_device
from easyeditor.results.lines import ScreenLine
from easyeditor.runs.guard import guarded
from easyeditor.runs.work import Work, edit_line, norms_of, tried
from easyeditor.values.collapse import is_small
from easyeditor.values.edit import EditResult

SCREENED_TOGETHER = 32  # requests whose keys are read in one go: bounds memory


def run_single(work: Work) -> None:
    """Edit, measure and take back every request that is not recorded yet.

    What edits do not change is made once: the base perplexity, the hidden states below the edited layer, the contexts.
    Edits are computed, and measured together, in groups that are fixed by place, so a resumed run has the same numbers;
    a kill repeats a group at most.
    """
    base = None
    for group in _groups(work.numbers, work.together):
        todo = [n for n in group if n not in work.done]
        if not todo:
            continue
        if base is None:
            base = work.editor.perplexity()
        results = _computed(work, group)
        before = _before(work, [n for n in group if n in results])
        after = _after(work, results, before)
        for n in todo:
            if n in before:
                tried(work, [n], partial(_examine, work, n, results[n], base, before[n], after.get(n)))


def _before(work: Work, group: list[int]) -> dict[int, Evaluation]:
    """The unedited model's numbers of a group; one by one where one of its requests cannot be measured."""
    requests, prefixes = [work.requests[n] for n in group], [work.editor.test_prefix(n) for n in group]
    try:
        together = work.editor.measure(requests, prefixes) if group else None
        return {n: together.only([place]) for place, n in enumerate(group)} if together is not None else {}
    except DataError:
        alone = {}
        for n, request, prefix in zip(group, requests, prefixes, strict=True):
            made = tried(work, [n], partial(work.editor.measure, [request], [prefix]))
            if made is not None:
                alone[n] = made
        return alone


def _after(work: Work, results: dict[int, EditResult], before: dict[int, Evaluation]) -> dict[int, State | None]:
    """The edited models of a group, measured together, as the settings say; none where each is measured alone."""
    on_gpu = input_device(work.editor.model).type != "cpu"
    if work.settings.measure == "alone" or (work.settings.measure == "auto" and not on_gpu):
        return {}
    edits = [(work.requests[n], results[n], work.editor.test_prefix(n), before[n]) for n in before]
    return dict(zip(before, work.editor.measure_many(edits), strict=True))


def _examine(
    work: Work, n: int, result: EditResult, base: PerplexityReport | None, before: Evaluation, after: State | None
) -> None:
    """Measure one edit, let the guard act, record it."""
    request = [work.requests[n]]
    examined = work.editor.examine_together(request, result=result, ppl_before=base, before=before, after=after, draw=n)
    outcome = guarded(work, request, examined, n, base)
    norms = norms_of(result)
    work.record(edit_line(examined.record, n, work, norms=norms, seconds=examined.seconds, guard=outcome.entries[0]))


def run_screen(work: Work) -> None:
    """Record the denominator of every request, and whether it predicts a collapse."""
    for group in _groups(work.numbers, SCREENED_TOGETHER):
        if work.done.keys() >= set(group):
            continue
        found = work.editor.method.screen([work.requests[n] for n in group])
        for n, denominator in zip(group, found, strict=True):
            if n in work.done:
                continue
            request = work.requests[n]
            line = ScreenLine(
                index=n,
                case_id=request.case_id,
                subject=request.subject,
                prompt=request.prompt,
                denominator=denominator,
                prediction=is_small(denominator, work.settings.screen_threshold),
            )
            work.record(line)


def _groups(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(numbers[i : i + size]) for i in range(0, len(numbers), size))


def _computed(work: Work, group: list[int]) -> dict[int, EditResult]:
    """The edits of a group; one by one where one of them cannot be made."""
    requests = [work.requests[n] for n in group]
    try:
        return dict(zip(group, work.editor.compute_each(requests, work.watch.inner), strict=True))
    except (NumericalError, DataError):
        found = {}
        for n, request in zip(group, requests, strict=True):
            made = tried(work, [n], partial(work.editor.compute_each, [request], work.watch.inner))
            if made is not None:
                found[n] = made[0]
        return found
