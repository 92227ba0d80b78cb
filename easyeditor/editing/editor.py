"""Editor: load, compute, apply, evaluate. Orchestration only; the work is done in methods/, evaluate/ and lm/."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel

from easyeditor.base.errors import DataError
from easyeditor.base.hparams import HyperParams
from easyeditor.base.progress import Progress, Stopwatch, progress_bar
from easyeditor.dataset.formats import parse
from easyeditor.dataset.probes import Reading
from easyeditor.editing.measuring import Measuring
from easyeditor.evaluate.accuracy import record_pairs
from easyeditor.evaluate.examined import Examined as Examined
from easyeditor.evaluate.examined import State, sides, target_space
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.registry import Evaluation
from easyeditor.lm import weights
from easyeditor.lm.architectures import max_positions
from easyeditor.lm.scored import line
from easyeditor.lm.tokens import answered, check_length
from easyeditor.values.collapse import Collapse
from easyeditor.values.edit import EditRequest, EditResult
from easyeditor.values.record import EditRecord
from easyeditor.values.request import reconcile

LOG = logging.getLogger(__name__)

LOST_TO_ROUNDING = 0.05
"""Part of an update (of its norm) that rounding may take without a warning."""

Request = EditRequest | Mapping[str, Any]


class Editor(Measuring):
    """Edits facts in one model with one method, and measures what the edit did.

    Edits are values: `compute` -> EditResult, then `applied`, `commit`, `revert`; `examine` measures around one.
    EasyEdit's calls are on top of it (easyedit.py: BaseEditor).
    """

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> Self:
        """Load the model the hyper-parameters name (or take the pair they hold)."""
        return cls(hparams)

    # -- edits as values ------------------------------------------------------------------------------------------

    def compute(self, requests: Request | Sequence[Request], *, verbose: bool = False, label: str = "") -> EditResult:
        """The edit for `requests` as a value; the model's weights are left alone.

        A repeated request is edited once (by UltraEdit as often as it comes), and requests that share a subject are
        edited and noted (both as a warning).

        Raises:
            DataError: no request, a bad one, one without the subject the method needs, or two that contradict each
                other.
        """
        listed = [requests] if isinstance(requests, (EditRequest, Mapping)) else list(requests)
        if not listed:
            raise DataError("no requests to edit")
        reading = Reading(needs_subject=self.method.needs_subject)
        made = [r if isinstance(r, EditRequest) else parse(r, f"request {i}", i, reading) for i, r in enumerate(listed)]
        reading.tell("requests")
        kept, notes = reconcile(made, repeats=self.method.keeps_repeats)
        self._check_subjects(kept)
        for note in notes:
            LOG.warning(note)
        with progress_bar(f"{label} {self.method.title}", verbose) as show, self._products():
            result = self.method.edit(kept, show)
        return replace(result, hparams=self.hparams.to_dict(), model_fingerprint=self.fingerprint())

    def compute_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[EditResult]:
        """An edit of its own for each request, all on the model as it is; faster than one `compute` after another."""
        self._check_subjects(requests)
        hparams, model = self.hparams.to_dict(), self.fingerprint()
        with self._products():
            results = self.method.edit_each(requests, progress)
        return [replace(result, hparams=hparams, model_fingerprint=model) for result in results]

    def _check_subjects(self, requests: Sequence[EditRequest]) -> None:
        """Raise DataError for a request without the subject that the method needs."""
        for request in requests:
            if self.method.needs_subject and not request.subject:
                raise DataError(
                    f"request {request.case_id!r}: {self.method.title} needs the subject: give subject=, the words in "
                    "the prompt whose fact is changed"
                )

    def check(self, request: EditRequest, prefix: str | None) -> bool:
        """True; raises DataError unless the request has what the method needs, and the texts it is edited and scored
        with fit the model. Nothing is computed."""
        self._check_subjects([request])
        self.method.check(request)
        settings = self._settings(request, prefix)
        pairs = record_pairs(request, settings)
        rows = [line(self.tok, *pair, settings.prompting).ids for pair in pairs]
        check_length(rows, max_positions(self.model), lambda i: answered([request], pairs[i][0]))
        return True

    def remedied(self) -> Self | None:
        """An editor of the same model and commits with the method's remedy set; None without a remedy."""
        method = self.method.remedied()
        if method is None:
            return None
        self._perplexity_probe()  # made now, so that both use one
        other = copy.copy(self)
        other._method, other.hparams, other._bound = method, method.hparams, (self.model, self.tok, method.hparams)
        return other

    @contextmanager
    def applied(self, result: EditResult) -> Iterator[PreTrainedModel]:
        """The edited model inside the block; the weights are bit-equal to before after it, also on error."""
        with self.method.recalling(result), weights.applied(self.model, result.deltas):
            yield self.model

    @property
    def edited(self) -> bool:
        """Are edits committed to the model?"""
        return len(self._ledger) > 0

    @contextmanager
    def original(self) -> Iterator[PreTrainedModel]:
        """The model before the first commit inside the block; as it was, bit-exactly, after it, also on error."""
        with self._ledger.original(), self.method.recalling(None):
            yield self.model

    def commit(self, result: EditResult, saved: Path | None = None) -> None:
        """Keep an edit in the model; `revert` takes it back. With `saved`, the folder it is saved in, its deltas and
        what its method remembers of it are not kept a second time."""
        method = self.method
        method.check_kind(result)
        if not self.edited:
            self._base = None
        self._ledger.commit(result.deltas, saved)
        try:
            method.committed(result if saved is None else replace(result, folder=saved))
        except BaseException:
            self._ledger.revert(result.deltas)
            raise

    def revert(self, result: EditResult) -> None:
        """Take a committed edit back, bit-exactly; edits committed after it stay, as if it had never been made."""
        if not self.method.holds(result) or not self._ledger.revert(result.deltas):
            raise DataError("this edit is not committed in this editor, so there is nothing to revert")
        self.method.reverted(result)

    def revert_all(self) -> None:
        """Back to the weights before the first commit, bit-exactly."""
        self._ledger.revert_all()
        self.method.reverted(None)

    def fingerprint(self) -> str:
        """Identity of the model's present weights (a sampled hash; see `lm.weights.fingerprint`)."""
        return weights.fingerprint(self.model)

    def examine(
        self,
        request: EditRequest,
        *,
        ppl_before: PerplexityReport | None = None,
        verbose: bool = False,
        label: str = "",
    ) -> Examined:
        """`examine_together` of one request: the record of one edit."""
        return self.examine_together([request], ppl_before=ppl_before, verbose=verbose, label=label)

    def examine_together(
        self,
        requests: Sequence[EditRequest],
        *,
        result: EditResult | None = None,
        ppl_before: PerplexityReport | None = None,
        ppl_base: PerplexityReport | None = None,
        before: Evaluation | None = None,
        base: Evaluation | None = None,
        after: State | None = None,
        draw: int | None = None,
        verbose: bool = False,
        label: str = "",
    ) -> Examined:
        """Compute one edit for `requests`, measure the model before and with it, and take it back.

        `pre`, locality and the verdict are those of the original model, before the first commit; where edits are
        committed, the model as it is (just before this edit) is measured too. What is known already is given: the edit
        (`result`), what `measure` and perplexity gave on the model as it is (`…before`) and on the original one
        (`…base`), and what `measure_many` gave (`after`). `draw` is for `test_prefix`. Nothing stays in the model, also
        on error.
        """
        prefix = self.test_prefix(draw)
        clock = Stopwatch()

        def state(
            title: str,
            evaluation: Evaluation | None = None,
            ppl: PerplexityReport | None = None,
            *,
            metrics: bool = True,
            against: Evaluation | None = None,
        ) -> State:
            """Measure the model as it is; what is given is not measured again."""
            with clock("metrics"):
                if evaluation is None:
                    prefixes = [prefix] * len(requests)
                    evaluation = self.measure(requests, prefixes, metrics=metrics, before=against)
            with clock("perplexity"):
                if ppl is None:
                    ppl = self.perplexity(verbose=verbose, title=f"{label} perplexity {title}")
            return State(evaluation=evaluation, ppl=ppl)

        if self.edited:
            now = state("before", before, ppl_before, metrics=False)
            with self.original():
                first = state("of the original", base, ppl_base or self._base)
            self._base = first.ppl
        else:
            now = first = state("before", before or base, ppl_before or ppl_base)
        if result is None:
            with clock("edit"):
                result = self.compute(requests, verbose=verbose, label=label)
        else:
            clock.seconds["edit"] = result.seconds
        if after is None:
            with self.applied(result):
                after = state("after", against=first.evaluation)
        for part, seconds in after.seconds.items():
            clock.seconds[part] += seconds
        collapse = self.verdict(first.ppl, after.ppl, now.ppl)
        records = self._records(requests, result, (first, now, after), collapse, prefix, clock.seconds["edit"])
        return Examined(
            records=tuple(records),
            result=result,
            ppl_base=first.ppl,
            ppl_before=now.ppl,
            ppl_after=after.ppl,
            collapse=collapse,
            seconds=clock.seconds,
        )

    def _rounding(self, result: EditResult) -> dict[str, dict[str, float]]:
        """What rounding to the weights' dtype leaves of an edit, by weight; a warning where it takes a good part."""
        found = weights.rounding(self.model, result.deltas)
        for name, part in found.items():
            if part.lost > LOST_TO_ROUNDING:
                LOG.warning(
                    "%s: %.0f %% of the update is lost in rounding to %s (norm %.3g meant, %.3g written); load a wider "
                    "dtype",
                    *(name, 100 * part.lost, self.model.get_parameter(name).dtype, part.intended, part.written),
                )
        return {name: asdict(part) for name, part in found.items()}

    def _records(
        self,
        requests: Sequence[EditRequest],
        result: EditResult,
        states: tuple[State, State, State],
        collapse: Collapse | None,
        prefix: str | None,
        seconds: float,
    ) -> Iterator[EditRecord]:
        """Each request's record; `states` are the original model, just before the edit, and after it."""
        base, now, after = states
        reports = {"before": base.ppl, "just_before": None if now is base else now.ppl, "after": after.ppl}
        perplexity = {when: None if report is None else report.to_json() for when, report in reports.items()}
        rounding = self._rounding(result)
        traces = {made.place: trace for made, trace in zip(result.requests, result.traces, strict=True)}
        for number, request in enumerate(requests):
            pre, just_before, post = sides(states, number)
            old, new = pre.probabilities or {}, post.probabilities or {}
            yield EditRecord(
                request=request,
                time=seconds / len(requests),
                pre=replace(pre, probabilities=None),
                just_before=just_before,
                post=replace(post, probabilities=None),
                probabilities={key: {"before": old[key], "after": new[key]} for key in old},
                collapse=collapse,
                perplexity={"sentences": None if self.sentences is None else self.sentences.to_json(), **perplexity},
                method=self.method.title,
                trace={layer: trace.numbers() for layer, trace in traces[request.place].items()},
                test_prefix=prefix,
                remedy=self.method.remedy,
                rounding=rounding,
                metrics={
                    when: state.evaluation.rows[number]
                    for when, state in (("before", base), ("after", after))
                    if state.evaluation.names
                },
                target_space=target_space(request, self.method.scoring),
            )
