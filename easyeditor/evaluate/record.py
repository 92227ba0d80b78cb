"""The record of one edit: what was measured before and after, under EasyEdit's names where EasyEdit has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from easyeditor.dataset.sentences import Sentences
from easyeditor.evaluate.metrics import RequestScores, agreement
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.registry import Evaluation
from easyeditor.records import EditRequest, EditResult
from easyeditor.results.collapse import Collapse
from easyeditor.results.record import EditRecord, LayerNumbers, Side


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One edit with what was measured around it; `records` has one for each of its requests.

    `ppl_before` is of the model the edit was made on, `ppl_base` of the original one, before any edit.
    """

    records: tuple[EditRecord, ...]
    result: EditResult
    ppl_base: PerplexityReport | None
    ppl_before: PerplexityReport | None
    ppl_after: PerplexityReport | None
    collapse: Collapse | None
    seconds: dict[str, float]
    """Time spent on `edit`, `metrics` and `perplexity`."""

    @property
    def record(self) -> EditRecord:
        """The record of the edit's only request."""
        (record,) = self.records
        return record


@dataclass(frozen=True, kw_only=True)
class State:
    """What was measured of one state of the model, the scores in the order of the requests."""

    scores: Sequence[RequestScores]
    metrics: Evaluation | None
    ppl: PerplexityReport | None

    def side(self, number: int, *, original: State | None = None, just_before: State | None = None) -> Side:
        """One request's numbers under EasyEdit's names; locality against the `original` model and against that
        `just_before` the edit, where they are others."""
        scores = self.scores[number]
        side = Side(
            rewrite=(scores.rewrite.accuracy,),
            rephrase=tuple(s.accuracy for s in scores.rephrase),
            said={key: tuple(s.said for s in said) for key, said in scores.locality.items()},
            portability={key: tuple(s.accuracy for s in found) for key, found in scores.portability.items()},
            ppl=None if self.ppl is None else self.ppl.mean,
        )
        near = {} if original is None else _agreement(original.scores[number], scores)
        kept = None if just_before is None else _agreement(just_before.scores[number], scores)
        return replace(side, locality=near, locality_just_before=kept)


def _agreement(before: RequestScores, after: RequestScores) -> dict[str, tuple[float, ...]]:
    return {
        key: tuple(agreement(a, b) for a, b in zip(before.locality[key], said, strict=True))
        for key, said in after.locality.items()
    }


def edit_record(
    request: EditRequest,
    number: int,
    states: tuple[State, State, State],
    sentences: Sentences | None,
    *,
    time: float,
    collapse: Collapse | None,
    method: str,
    trace: Mapping[int, LayerNumbers],
    test_prefix: str | None,
    remedy: str | None,
    rounding: Mapping[str, Mapping[str, float]],
) -> EditRecord:
    """The record of request `number` of an edit; `states` are the original model, just before the edit, and after
    it."""
    base, now, after = states
    between = None if now is base else now
    just_before = None if between is None else between.side(number, original=base)
    old, new = base.scores[number].probabilities(), after.scores[number].probabilities()
    if between is not None and just_before is not None:
        just_before = replace(just_before, probabilities=between.scores[number].probabilities())
    rows = {when: state.metrics.rows[number] for when, state in (("before", base), ("after", after)) if state.metrics}
    return EditRecord(
        request=request,
        pre=base.side(number),
        just_before=just_before,
        post=after.side(number, original=base, just_before=between),
        probabilities={key: {"before": p, "after": new[key]} for key, p in old.items()},
        perplexity={
            "sentences": None if sentences is None else sentences.to_json(),
            "before": _plain(base.ppl),
            "just_before": None if between is None else _plain(between.ppl),
            "after": _plain(after.ppl),
        },
        metrics=rows,
        time=time,
        collapse=collapse,
        method=method,
        trace=trace,
        test_prefix=test_prefix,
        remedy=remedy,
        rounding=rounding,
    )


def _plain(report: PerplexityReport | None) -> dict[str, Any] | None:
    return None if report is None else report.to_json()
