"""The record of one edit: what was measured before and after, under EasyEdit's names where EasyEdit has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from easyeditor.dataset.sentences import Sentences
from easyeditor.evaluate.collapse import Collapse
from easyeditor.evaluate.metrics import RequestScores
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.records import EditRequest, EditResult


@dataclass(frozen=True)
class Measured:
    """One request on the original model and after an edit that took `seconds`; and just before that edit, where others
    were in the model already (else None)."""

    before: RequestScores
    after: RequestScores
    ppl_before: PerplexityReport | None
    ppl_after: PerplexityReport | None
    seconds: float
    just_before: RequestScores | None = None
    ppl_just_before: PerplexityReport | None = None


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One edit with what was measured around it; `records` has one for each of its requests.

    `ppl_before` is of the model the edit was made on, `ppl_base` of the original one, before any edit.
    """

    records: tuple[dict[str, Any], ...]
    result: EditResult
    ppl_base: PerplexityReport | None
    ppl_before: PerplexityReport | None
    ppl_after: PerplexityReport | None
    collapse: Collapse | None
    seconds: dict[str, float]
    """Time spent on `edit`, `metrics` and `perplexity`."""

    @property
    def record(self) -> dict[str, Any]:
        """The record of the edit's only request."""
        (record,) = self.records
        return record


def edit_record(
    request: EditRequest, measured: Measured, collapse: Collapse | None, sentences: Sentences | None
) -> dict[str, Any]:
    """The measured part of a record, as plain data; docs/metrics.md says what each number means."""
    old, new, between = measured.before, measured.after, measured.just_before
    ppl_before, ppl_after = measured.ppl_before, measured.ppl_after
    after = new.probabilities()
    return {
        "case_id": request.case_id,
        "requested_rewrite": request.to_json(),
        "time": measured.seconds,
        "pre": {**old.to_json(), "ppl": _mean(ppl_before)},
        "just_before": None if between is None else _just_before(between, old, measured.ppl_just_before),
        "post": {**new.to_json(old), **_kept(between, new), "ppl": _mean(ppl_after)},
        "probabilities": {key: {"before": p, "after": after[key]} for key, p in old.probabilities().items()},
        "collapse": None if collapse is None else collapse.to_json(),
        "perplexity": {
            "sentences": None if sentences is None else sentences.to_json(),
            "before": _plain(ppl_before),
            "just_before": _plain(measured.ppl_just_before),
            "after": _plain(ppl_after),
        },
    }


def _just_before(between: RequestScores, original: RequestScores, ppl: PerplexityReport | None) -> dict[str, Any]:
    """As `pre`, of the model the edit was made on; its locality is agreement with the original model."""
    return {**between.to_json(original), "ppl": _mean(ppl), "probabilities": between.probabilities()}


def _kept(between: RequestScores | None, after: RequestScores) -> dict[str, Any]:
    """Locality of this edit alone: agreement with the model it was made on."""
    if between is None:
        return {}
    locality = after.to_json(between)["locality"]
    return {"locality_just_before": {key: value for key, value in locality.items() if key.endswith("_acc")}}


def _mean(report: PerplexityReport | None) -> float | None:
    return None if report is None else report.mean


def _plain(report: PerplexityReport | None) -> dict[str, Any] | None:
    return None if report is None else report.to_json()
