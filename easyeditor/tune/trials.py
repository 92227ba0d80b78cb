"""One trial: facts edited with some settings, a few before the others, and what came of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.base.errors import DataError, NumericalError
from easyeditor.dataset.reader import Record
from easyeditor.dataset.sentences import Sentences
from easyeditor.dataset.sets import starts_with_one_word
from easyeditor.editing.editor import Editor
from easyeditor.evaluate.registry import Evaluation, harmonic_mean
from easyeditor.tune.start import Start
from easyeditor.values.edit import EditRequest
from easyeditor.values.plain import mean

METRICS = ("rewrite_acc", "rephrase_acc", "locality_acc")
FIRST = 3
"""Facts a trial begins with where each is an edit of its own; most settings are given up after them."""
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Requests to edit, what the unedited model says to them, and the sentences perplexity is measured on."""

    name: str
    requests: tuple[EditRequest, ...]
    before: Evaluation
    sentences: Sentences


def drawn(records: Sequence[Record], counts: Sequence[int], seed: int) -> list[tuple[EditRequest, ...]]:
    """So many requests for each of `counts`: no record and no subject is in two of them, none twice, none a single word
    in first place (their edits are another question: docs/findings/collapse.md).

    Raises:
        DataError: there are too few.
    """
    usable = [(n, [r for r in own if r.subject and not starts_with_one_word(r)]) for n, own in records]
    order = [record for record in usable if record[1]]
    random.Random(seed).shuffle(order)
    left = list({request.subject: (n, request) for n, own in order for request in own}.values())
    subjects, samples = len(left), []
    for count in counts:
        taken, left = left[:count], left[count:]
        if len(taken) < count:
            raise DataError(
                f"the data has {subjects} subjects that are not one word in first place; "
                f"{' + '.join(map(str, counts))} are asked for, no record in two of them; give more data, or lower "
                "--edits and --held-out"
            )
        samples.append(tuple(request for _, request in taken))
        used = {n for n, _ in taken}
        left = [pair for pair in left if pair[0] not in used]
    return samples


def sample(start: Start, name: str, requests: Sequence[EditRequest], sentences: Sentences) -> Sample:
    """Ask the unedited model."""
    editor = Editor(start.hparams({}), sentences=sentences, metrics=METRICS)
    before = editor.measure(requests, [None] * len(requests))
    return Sample(name=name, requests=tuple(requests), before=before, sentences=sentences)


def trial(start: Start, settings: Mapping[str, Any], on: Sample, lost: Callable[[Line], bool] | None = None) -> Line:
    """Edit a sample's requests, each alone or, where the method writes several as one edit, together; measure them.

    With `lost` a few are edited first, and the others only if it does not say so of the line they make (`left_after`).
    `rows` has each request's metrics and the perplexity ratio of its edit (None where that is not finite).
    """
    began = time.monotonic()
    line: Line = {"kind": on.name, "settings": dict(settings)}
    editor = Editor(start.hparams(settings), sentences=on.sentences, metrics=METRICS)
    every = list(range(len(on.requests)))
    few = len(every) if editor.method.joint or lost is None else min(FIRST, len(every))
    rows: list[Line] = []
    try:
        for numbers in (every[:few], every[few:]):
            rows += _edited(editor, on, numbers) if numbers else ()
            line |= summed(rows)
            if lost is not None and len(rows) < len(every) and lost(line):
                line["left_after"] = len(rows)
                break
    except NumericalError as error:
        line |= {**summed([]), "failed": str(error)}
    return {**line, "rows": rows, "seconds": time.monotonic() - began}


def summed(rows: Sequence[Line]) -> Line:
    """Means of the accuracies and their harmonic mean (`score`), the worst and the median perplexity ratio."""
    means = {name: mean(row[name] for row in rows) for name in METRICS}
    ratios = sorted(math.inf if row["ppl_ratio"] is None else row["ppl_ratio"] for row in rows)
    ends = (ratios[-1], ratios[len(ratios) // 2]) if rows else (math.inf, math.inf)
    worst, median = (end if math.isfinite(end) else None for end in ends)
    return {
        "requests": len(rows),
        **means,
        "score": harmonic_mean([value for value in means.values() if value is not None]) if rows else None,
        "ppl_ratio": worst,
        "ppl_median": median,
        "collapsed": sum(row["collapsed"] for row in rows),
    }


def _edited(editor: Editor, on: Sample, numbers: Sequence[int]) -> Iterator[Line]:
    """The row of each of these requests. Edits that can be are measured together, as `mass_edit.py` measures them."""
    base = editor.perplexity()
    assert base is not None
    groups = [list(numbers)] if editor.method.joint else [[n] for n in numbers]
    asked = [on.requests[n] for n in numbers]
    results = [editor.compute(asked)] if editor.method.joint else editor.compute_each(asked)
    own = [(on.requests[g[0]], r, None, on.before.only(g[:1])) for g, r in zip(groups, results, strict=True)]
    states = [None] if editor.method.joint else editor.measure_many(own)
    for group, result, state in zip(groups, results, states, strict=True):
        if state is None:
            with editor.applied(result):
                found = editor.measure(
                    [on.requests[n] for n in group], [None] * len(group), before=on.before.only(group)
                )
                after = editor.perplexity()
        else:
            found, after = state.evaluation, state.ppl
        assert after is not None
        ratio = after.mean / base.mean
        verdict = editor.verdict(base, after)
        for row in found.rows:
            yield {
                **{name: row[name].value for name in METRICS},
                "ppl_ratio": ratio if math.isfinite(ratio) else None,
                "collapsed": verdict is not None and verdict.collapsed,
            }
