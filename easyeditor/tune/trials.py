"""One trial: facts edited with some settings, and what came of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.analysis.tools.sets import starts_with_one_word
from easyeditor.dataset.sentences import Sentences
from easyeditor.editor import Editor
from easyeditor.errors import DataError, NumericalError
from easyeditor.evaluate.registry import Evaluation, evaluate, harmonic_mean
from easyeditor.records import EditRequest
from easyeditor.results.values import mean
from easyeditor.tune.start import Start

METRICS = ("rewrite_acc", "rephrase_acc", "locality_acc")
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Requests to edit, what the unedited model says to them, and the sentences perplexity is measured on."""

    name: str
    requests: tuple[EditRequest, ...]
    before: Evaluation
    sentences: Sentences


def drawn(
    requests: Sequence[EditRequest], edits: int, held_out: int, seed: int
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Requests to search with, and others to judge by: no subject is in both, none twice, none a single word in first
    place (their edits are another question: docs/collapse.md).

    Raises:
        DataError: there are too few.
    """
    order = [r for r in requests if r.subject and not starts_with_one_word(r)]
    random.Random(seed).shuffle(order)
    single = list({request.subject: request for request in order}.values())
    if len(single) < edits + held_out:
        raise DataError(
            f"the data has {len(single)} subjects that are not one word in first place; {edits} + {held_out} are asked "
            "for; give more data, or lower --edits and --held-out"
        )
    return single[:edits], single[edits : edits + held_out]


def sample(start: Start, name: str, requests: Sequence[EditRequest], sentences: Sentences) -> Sample:
    """Ask the unedited model."""
    before = evaluate(start.model, start.tok, requests, METRICS)
    return Sample(name=name, requests=tuple(requests), before=before, sentences=sentences)


def trial(start: Start, settings: Mapping[str, Any], on: Sample) -> Line:
    """Edit a sample's requests, each alone or, where the method writes several as one edit, together; measure them.

    `ppl_ratio` is the worst edit's perplexity against the unedited model's, None where it is not finite; `score` the
    harmonic mean of the mean accuracies, None where the edit could not be computed (`failed` says why).
    """
    began = time.monotonic()
    line: Line = {"kind": on.name, "settings": dict(settings), "requests": len(on.requests)}
    editor = Editor(start.hparams(settings), sentences=on.sentences)
    try:
        groups, ratios, collapsed, rows = _edited(editor, on)
    except NumericalError as error:
        empty = dict.fromkeys((*METRICS, "score", "ppl_ratio", "ppl_median"))
        return {**line, **empty, "collapsed": 0, "failed": str(error), "seconds": time.monotonic() - began}
    means = {name: mean([v for row in rows if (v := row[name].value) is not None]) for name in METRICS}
    worst = max(ratios)
    return {
        **line,
        "edits": groups,
        **means,
        "score": harmonic_mean([value for value in means.values() if value is not None]),
        "ppl_ratio": worst if math.isfinite(worst) else None,
        "ppl_median": sorted(ratios)[len(ratios) // 2] if math.isfinite(worst) else None,
        "collapsed": collapsed,
        "seconds": time.monotonic() - began,
    }


def _edited(editor: Editor, on: Sample) -> tuple[int, list[float], int, list[Mapping[str, Any]]]:
    """How many edits, each one's perplexity ratio, how many collapsed, and every request's metrics."""
    base = editor.perplexity()
    assert base is not None
    every = list(range(len(on.requests)))
    groups = [every] if editor.method.joint else [[n] for n in every]
    results = [editor.compute(on.requests)] if editor.method.joint else editor.compute_each(on.requests)
    ratios: list[float] = []
    rows: list[Mapping[str, Any]] = []
    collapsed = 0
    for numbers, result in zip(groups, results, strict=True):
        with editor.applied(result):
            own = [on.requests[n] for n in numbers]
            rows += evaluate(editor.model, editor.tok, own, METRICS, before=on.before.only(numbers)).rows
            after = editor.perplexity()
        assert after is not None
        ratios.append(after.mean / base.mean)
        verdict = editor.judge(base, after)
        collapsed += verdict is not None and verdict.collapsed
    return len(groups), ratios, collapsed, rows
