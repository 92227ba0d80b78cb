"""The record of one edit: what was measured before and after, under EasyEdit's names where EasyEdit has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.registry import Evaluation
from easyeditor.lm.joining import joined
from easyeditor.lm.prompting import Prompting
from easyeditor.values.collapse import Collapse
from easyeditor.values.edit import EditRequest, EditResult
from easyeditor.values.record import EditRecord, Side


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


def sides(states: tuple[State, State, State], number: int) -> tuple[Side, Side | None, Side]:
    """Request `number` on the original model, just before the edit where that is another model, and after it."""
    base, now, _ = states
    pre, between, post = (state.evaluation.side(number, state.mean_ppl) for state in states)
    post = replace(post, locality=post.agreement(pre))
    if now is base:
        return pre, None, post
    between = replace(between, locality=between.agreement(pre))
    return pre, between, replace(post, locality_just_before=post.agreement(between))


def target_space(request: EditRequest, prompting: Prompting) -> str:
    """White space between a request's prompt and its target; a chat's answer has the usual one, whatever that is."""
    target = " " if prompting.chat else joined(request.prompt, request.target_new, prompting.space)[1]
    return target[: len(target) - len(target.lstrip())]
