"""BaseEditor: load, compute, apply, evaluate. Orchestration only; the work is done in methods/, evaluate/ and lm/."""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from easyeditor.dataset.formats import parse
from easyeditor.dataset.sentences import Sentences, load_sentences
from easyeditor.easyedit import EasyEditCalls
from easyeditor.errors import ConfigError, DataError
from easyeditor.evaluate import collapse as verdict
from easyeditor.evaluate.collapse import Collapse
from easyeditor.evaluate.metric import Settings
from easyeditor.evaluate.metrics import RequestScores, score_requests
from easyeditor.evaluate.perplexity import PerplexityProbe, PerplexityReport
from easyeditor.evaluate.record import Examined as Examined
from easyeditor.evaluate.record import Measured, edit_record
from easyeditor.evaluate.registry import Evaluation, chosen, evaluate
from easyeditor.hparams import HyperParams
from easyeditor.lm import weights
from easyeditor.lm.loading import load
from easyeditor.lm.tokens import SLOT
from easyeditor.methods.registry import method_class
from easyeditor.progress import Progress, Stopwatch, progress_bar
from easyeditor.records import EditRequest, EditResult
from easyeditor.request import reconcile

LOG = logging.getLogger(__name__)

Request = EditRequest | Mapping[str, Any]


class BaseEditor(EasyEditCalls):
    """Edits facts in one model with one method, and measures what the edit did.

    As values: `compute` -> EditResult, then `applied`, `commit`, `revert`. As EasyEdit: `edit(prompts=…, …)` and
    `batch_edit` (easyedit.py).
    """

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> BaseEditor:
        """Load the model the hyper-parameters name (or take the pair they hold)."""
        return cls(hparams)

    def __init__(
        self, hparams: HyperParams, *, sentences: Sentences | None = None, metrics: Sequence[str] = ()
    ) -> None:
        """`sentences` replaces the perplexity set that `ppl_sentence_num` chooses; `metrics` of the registry are
        measured around every edit beside EasyEdit's."""
        if not isinstance(hparams, HyperParams):
            raise ConfigError(
                f"BaseEditor needs hyper-parameters such as ROMEHyperParams, found {type(hparams).__name__}"
            )
        self.hparams = hparams.checked()
        self.metrics = tuple(metric.name for metric in chosen(metrics)) if metrics else ()
        self.model, self.tok = load(
            self.hparams.model_name,
            device=self.hparams.device,
            dtype=self.hparams.dtype,
            fp16=self.hparams.fp16,
            model_parallel=self.hparams.model_parallel,
        )
        self.method = method_class(self.hparams.alg_name)(self.model, self.tok, self.hparams)
        self.sentences = sentences
        if sentences is None and self.hparams.ppl_sentence_num:
            self.sentences = load_sentences(self.hparams.ppl_sentence_num)
        self._ledger = weights.Ledger(self.model)
        self._probe: PerplexityProbe | None = None
        self._prefixes = random.Random(self.hparams.seed)

    # -- edits as values ------------------------------------------------------------------------------------------

    def compute(self, requests: Request | Sequence[Request], *, verbose: bool = False, label: str = "") -> EditResult:
        """The edit for `requests` as a value; the model's weights are left alone.

        A repeated request is edited once, and requests that share a subject are edited and noted (both as a warning).

        Raises:
            DataError: no request, a bad one, or two that contradict each other.
        """
        listed = [requests] if isinstance(requests, (EditRequest, Mapping)) else list(requests)
        if not listed:
            raise DataError("no requests to edit")
        made = [r if isinstance(r, EditRequest) else parse(r, f"request {i}", i) for i, r in enumerate(listed)]
        kept, notes = reconcile(made)
        for note in notes:
            LOG.warning(note)
        with progress_bar(f"{label} {self.method.title}", verbose) as show:
            result = self.method.edit(kept, show)
        return dataclasses.replace(result, hparams=self.hparams.to_dict(), model_fingerprint=self.fingerprint())

    def compute_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[EditResult]:
        """An edit of its own for each request, all on the model as it is; faster than one `compute` after another."""
        hparams, model = self.hparams.to_dict(), self.fingerprint()
        results = self.method.edit_each(requests, progress)
        return [dataclasses.replace(result, hparams=hparams, model_fingerprint=model) for result in results]

    def remedied(self) -> BaseEditor | None:
        """An editor of the same model and commits with the method's remedy set; None without a remedy."""
        method = self.method.remedied()
        if method is None:
            return None
        self._perplexity_probe()  # made now, so that both use one
        other = copy.copy(self)
        other.method, other.hparams = method, method.hparams
        return other

    @contextmanager
    def applied(self, result: EditResult) -> Iterator[PreTrainedModel]:
        """The edited model inside the block; the weights are bit-equal to before after it, also on error."""
        with weights.applied(self.model, result.deltas):
            yield self.model

    def commit(self, result: EditResult) -> None:
        """Keep an edit in the model; `revert` takes it back."""
        self._ledger.commit(result.deltas)
        self.method.committed(result)

    def revert(self, result: EditResult) -> None:
        """Take a committed edit back, bit-exactly; edits committed after it stay, as if it had never been made."""
        if not self._ledger.revert(result.deltas):
            raise DataError("this edit is not committed in this editor, so there is nothing to revert")
        self.method.reverted(result)

    def revert_all(self) -> None:
        """Back to the weights before the first commit, bit-exactly."""
        self._ledger.revert_all()
        self.method.reverted(None)

    def fingerprint(self) -> str:
        """Identity of the model's present weights (a sampled hash; see `lm.weights.fingerprint`)."""
        return weights.fingerprint(self.model)

    # -- measurements ---------------------------------------------------------------------------------------------

    def perplexity(self, *, verbose: bool = False) -> PerplexityReport | None:
        """Perplexity of the model as it is now; None when `ppl_sentence_num` is 0."""
        return self._measure("perplexity", verbose)

    def score(self, request: EditRequest, prefix: str | None = None) -> RequestScores:
        """All metrics of one request on the model as it is now."""
        (scores,) = self.score_all([request], [prefix])
        return scores

    def score_all(self, requests: Sequence[EditRequest], prefixes: Sequence[str | None]) -> list[RequestScores]:
        """`score` of several requests, batched together."""
        return score_requests(
            self.model,
            self.tok,
            requests,
            prefixes=prefixes,
            prefix_rephrase=getattr(self.hparams, "if_prefix", False) == "all",
            batch_tokens=self.hparams.batch_tokens,
        )

    def evaluate(
        self, requests: Sequence[EditRequest], prefix: str | None = None, before: Evaluation | None = None
    ) -> Evaluation | None:
        """The chosen `metrics` of requests on the model as it is; None when none is chosen. `before` is what this gave
        on the unedited model, which locality compares with."""
        if not self.metrics:
            return None
        settings = Settings(
            prefix=prefix,
            prefix_rephrase=getattr(self.hparams, "if_prefix", False) == "all",
            seed=self.hparams.seed,
            batch_tokens=self.hparams.batch_tokens,
        )
        return evaluate(self.model, self.tok, requests, self.metrics, settings=settings, before=before)

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
        scores_before: Sequence[RequestScores] | None = None,
        draw: int | None = None,
        verbose: bool = False,
        label: str = "",
    ) -> Examined:
        """Compute one edit for `requests`, measure the model before and with it, and take it back.

        What is known already is given: the edit (`result`), the perplexity and the scores of the model as it is.
        `ppl_base` is what the verdict compares with, where edits made earlier are in the model already. `draw` is for
        `test_prefix`. Nothing stays in the model, also on error.
        """
        prefix = self.test_prefix(draw)
        clock = Stopwatch()
        if scores_before is None:
            with clock("metrics"):
                scores_before = self.score_all(requests, [prefix] * len(requests))
        with clock("metrics"):
            before = self.evaluate(requests, prefix)
        if ppl_before is None:
            with clock("perplexity"):
                ppl_before = self._measure(f"{label} perplexity before", verbose)
        if result is None:
            with clock("edit"):
                result = self.compute(requests, verbose=verbose, label=label)
        else:
            clock.seconds["edit"] = result.seconds
        with self.applied(result):
            with clock("metrics"):
                scores_after = self.score_all(requests, [prefix] * len(requests))
                after = self.evaluate(requests, prefix, before)
            with clock("perplexity"):
                ppl_after = self._measure(f"{label} perplexity after", verbose)
        collapse = self.judge(ppl_base or ppl_before, ppl_after)
        seconds = clock.seconds["edit"] / len(requests)
        place_of = {made.place: place for place, made in enumerate(result.requests)}
        records = []
        for n, (request, old, new) in enumerate(zip(requests, scores_before, scores_after, strict=True)):
            measured = Measured(old, new, ppl_before, ppl_after, seconds)
            record = self._record(request, result, place_of[request.place], measured, collapse, prefix)
            if before is not None and after is not None:
                record["metrics"] = {"before": before.row(n), "after": after.row(n)}
            records.append(record)
        return Examined(
            records=tuple(records),
            result=result,
            ppl_before=ppl_before,
            ppl_after=ppl_after,
            collapse=collapse,
            seconds=clock.seconds,
        )

    def _record(
        self,
        request: EditRequest,
        result: EditResult,
        place: int,
        measured: Measured,
        collapse: Collapse | None,
        prefix: str | None,
    ) -> dict[str, Any]:
        """One request's record; `place` is its number in `result`."""
        return {
            **edit_record(request, measured, collapse, self.sentences),
            "method": self.method.title,
            "trace": result.trace_json()[place],
            "test_prefix": prefix,
            "remedy": self.method.remedy,
        }

    def _measure(self, title: str, verbose: bool) -> PerplexityReport | None:
        probe = self._perplexity_probe()
        if probe is None:
            return None
        with progress_bar(title, verbose) as show:
            return probe.measure(None if show is None else lambda done, of: show(done, of, ""))

    def _perplexity_probe(self) -> PerplexityProbe | None:
        if self._probe is None and self.sentences is not None:
            self._probe = PerplexityProbe(
                self.model,
                self.tok,
                self.sentences.texts,
                parts=self.method.parts,
                resume_layer=min(self.method.layers),
                fast=self.hparams.replay,
                batch_size=self.hparams.ppl_batch_size,
                longest=self.hparams.longest_text,
            )
        return self._probe

    def test_prefix(self, draw: int | None = None) -> str | None:
        """One of the contexts that hold text, drawn by the seed, when `if_prefix` asks for it.

        Draws follow each other; with `draw`, a number of the caller's, the seed and that number alone decide.
        """
        if not getattr(self.hparams, "if_prefix", False):
            return None
        texts = [context for context in self.method.contexts if context != SLOT]
        if not texts:
            raise ConfigError("if_prefix needs a context with text in it; context_templates has only '{}'")
        source = self._prefixes if draw is None else random.Random(f"{self.hparams.seed} {draw}")
        return source.choice(texts)

    def judge(self, before: PerplexityReport | None, after: PerplexityReport | None) -> Collapse | None:
        """The verdict on a change of perplexity; None when it was not measured."""
        if before is None or after is None:
            return None
        limits = {"threshold": self.hparams.collapse_threshold, "ratio": self.hparams.collapse_ratio}
        return verdict.judge(before.mean, after.mean, **limits)
