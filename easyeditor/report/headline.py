"""What a report opens with: how many edits collapsed the model, the worst, the medians, what to do."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from easyeditor.results.cause import remedy
from easyeditor.results.lines import EditLine
from easyeditor.results.run import Run
from easyeditor.results.shown import ppl_name, shown_ppl


def headline(run: Run) -> tuple[str, ...]:
    """Sentences, the verdict first; numbers are over the edits whose perplexity was measured."""
    judged = [edit for edit in run.edits if edit.record.collapsed is not None]
    if not judged:
        return _without_verdict(run)
    collapsed = [edit for edit in judged if edit.record.collapsed]
    lines = [_headline(run, len(collapsed), len(judged)), _perplexities(run, judged)]
    if denominators := _denominators(judged, collapsed):
        lines.append(denominators)
    return (*lines, _advice(collapsed))


def _without_verdict(run: Run) -> tuple[str, ...]:
    if run.edits:
        return ("No verdict on collapse: perplexity was not measured (ppl_sentence_num: 0).",)
    if run.screened:
        predicted = sum(line.prediction for line in run.screened)
        return (
            f"{predicted:,} of {len(run.screened):,} screened requests are predicted to collapse the model "
            f"(|denominator| < {run.screen_threshold:g}). Nothing was edited.",
        )
    return ()


def _headline(run: Run, collapsed: int, judged: int) -> str:
    limit = f"threshold {shown_ppl(run.threshold)}"
    if not collapsed:
        return f"No collapse: {judged:,} of {judged:,} edits kept the model below the {limit}."
    first = ""
    if run.mode in ("sequential", "batch"):
        first = f", the first at step {next(edit.step for edit in run.edits if edit.record.collapsed):,}"
    return f"COLLAPSED: {collapsed:,} of {judged:,} edits ({collapsed / judged:.1%}){first}; {limit}."


def _perplexities(run: Run, judged: Sequence[EditLine]) -> str:
    worst = max(judged, key=_ppl)
    middle = statistics.median(_ppl(edit) for edit in judged)
    base = "" if run.base is None else f"unedited {shown_ppl(run.base)}, "
    return (
        f"P{ppl_name(run.bos)[1:]}: {base}median after an edit {shown_ppl(middle)}, worst "
        f"{shown_ppl(_ppl(worst))} ({worst.request.subject or worst.request.prompt}, #{worst.index})."
    )


def _ppl(edit: EditLine) -> float:
    value = edit.record.post.ppl
    return math.inf if value is None or math.isnan(value) else value


def _denominators(judged: Sequence[EditLine], collapsed: Sequence[EditLine]) -> str:
    """Medians of |denominator|, the cause of most collapses of ROME; empty for a method without one."""
    others = [edit for edit in judged if not edit.record.collapsed]
    groups = [("collapsed", _median(collapsed)), ("others", _median(others))]
    medians = ", ".join(f"{name} {middle:.3g}" for name, middle in groups if middle is not None)
    return f"Median |denominator|: {medians}." if medians else ""


def _median(edits: Iterable[EditLine]) -> float | None:
    known = [abs(edit.record.denominator) for edit in edits if edit.record.denominator is not None]
    return statistics.median(known) if known else None


def _advice(collapsed: Sequence[EditLine]) -> str:
    """The remedy that fits most of the collapsed edits."""
    if not collapsed:
        return "Nothing to do."
    found = Counter(text for edit in collapsed if (text := remedy(edit.record)))
    if found:
        text, times = found.most_common(1)[0]
        return f"Try: {text} (fits {times:,} of the {len(collapsed):,})."
    return "The list of collapsed edits below has the cause of each."
