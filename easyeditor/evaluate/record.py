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
    """One request on the model before and after an edit that took `seconds`."""

    before: RequestScores
    after: RequestScores
    ppl_before: PerplexityReport | None
    ppl_after: PerplexityReport | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One edit with what was measured around it; `records` has one for each of its requests."""

    records: tuple[dict[str, Any], ...]
    result: EditResult
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
    old, new = measured.before, measured.after
    ppl_before, ppl_after = measured.ppl_before, measured.ppl_after
    after = new.probabilities()
    return {
        "case_id": request.case_id,
        "requested_rewrite": request.to_json(),
        "time": measured.seconds,
        "pre": {**old.to_json(), "ppl": None if ppl_before is None else ppl_before.mean},
        "post": {**new.to_json(old), "ppl": None if ppl_after is None else ppl_after.mean},
        "probabilities": {key: {"before": p, "after": after[key]} for key, p in old.probabilities().items()},
        "collapse": None if collapse is None else collapse.to_json(),
        "perplexity": {
            "sentences": None if sentences is None else sentences.to_json(),
            "before": None if ppl_before is None else ppl_before.to_json(),
            "after": None if ppl_after is None else ppl_after.to_json(),
        },
    }
