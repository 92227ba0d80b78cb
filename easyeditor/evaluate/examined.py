"""The record of one edit: what was measured before and after, under EasyEdit's names where EasyEdit has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from easyeditor.dataset.sentences import Sentences
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.registry import Evaluation
from easyeditor.lm.joining import joined
from easyeditor.lm.prompting import Prompting
from easyeditor.values.collapse import Collapse
from easyeditor.values.edit import EditRequest, EditResult
from easyeditor.values.record import EditRecord, LayerNumbers


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
    """What was measured of one state of the model, the requests in order."""

    evaluation: Evaluation
    ppl: PerplexityReport | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Its share of the time, by part, where several states were measured at once."""

    @property
    def mean_ppl(self) -> float | None:
        """The papers' perplexity; None when it was not measured."""
        return None if self.ppl is None else self.ppl.mean


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
    pre, between, new = (state.evaluation.side(number, state.mean_ppl) for state in states)
    old, found = pre.probabilities or {}, new.probabilities or {}
    post, just_before = replace(new, locality=new.agreement(pre), probabilities=None), None
    if now is not base:
        just_before = replace(between, locality=between.agreement(pre))
        post = replace(post, locality_just_before=new.agreement(between))
    return EditRecord(
        request=request,
        time=time,
        pre=replace(pre, probabilities=None),
        just_before=just_before,
        post=post,
        probabilities={key: {"before": old[key], "after": found[key]} for key in old},
        collapse=collapse,
        perplexity={
            "sentences": None if sentences is None else sentences.to_json(),
            "before": _plain(base.ppl),
            "just_before": None if now is base else _plain(now.ppl),
            "after": _plain(after.ppl),
        },
        method=method,
        trace=trace,
        test_prefix=test_prefix,
        remedy=remedy,
        rounding=rounding,
        metrics={
            when: state.evaluation.rows[number]
            for when, state in (("before", base), ("after", after))
            if state.evaluation.names
        },
        target_space=_space(request, after.evaluation.settings[number].prompting),
    )


def _space(request: EditRequest, prompting: Prompting) -> str:
    """White space between a request's prompt and its target; a chat's answer has the usual one, whatever that is."""
    said = " " if prompting.chat else joined(request.prompt, request.target_new, prompting.space)[1]
    return said[: len(said) - len(said.lstrip())]


def _plain(report: PerplexityReport | None) -> dict[str, Any] | None:
    return None if report is None else report.to_json()
