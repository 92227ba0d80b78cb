"""BaseEditor: load, compute, apply, evaluate. Orchestration only; the work is done in methods/, evaluate/ and lm/."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from easyeditor.dataset.columns import requests_from_columns
from easyeditor.dataset.formats import parse
from easyeditor.dataset.sentences import Sentences, load_sentences
from easyeditor.errors import ConfigError, DataError
from easyeditor.evaluate.collapse import Collapse, judge
from easyeditor.evaluate.metrics import RequestScores, score_request
from easyeditor.evaluate.perplexity import PerplexityProbe, PerplexityReport
from easyeditor.evaluate.record import Measured, edit_record
from easyeditor.hparams import HyperParams
from easyeditor.lm import weights
from easyeditor.lm.loading import load
from easyeditor.lm.tokens import SLOT
from easyeditor.methods.registry import method_class
from easyeditor.progress import progress_bar
from easyeditor.records import EditRequest, EditResult
from easyeditor.request import reconcile

LOG = logging.getLogger(__name__)

Request = EditRequest | Mapping[str, Any]


class BaseEditor:
    """Edits facts in one model with one method, and measures what the edit did.

    As values: `compute` -> EditResult, then `applied`, `commit`, `revert`. As EasyEdit: `edit(prompts=…, …)`.
    """

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> BaseEditor:
        """Load the model the hyper-parameters name (or take the pair they hold)."""
        return cls(hparams)

    def __init__(self, hparams: HyperParams, *, sentences: Sentences | None = None) -> None:
        """`sentences` replaces the perplexity set that `ppl_sentence_num` chooses."""
        if not isinstance(hparams, HyperParams):
            raise ConfigError(
                f"BaseEditor needs hyper-parameters such as ROMEHyperParams, found {type(hparams).__name__}"
            )
        self.hparams = hparams.checked()
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

    @contextmanager
    def applied(self, result: EditResult) -> Iterator[PreTrainedModel]:
        """The edited model inside the block; the weights are bit-equal to before after it, also on error."""
        with weights.applied(self.model, result.deltas):
            yield self.model

    def commit(self, result: EditResult) -> None:
        """Keep an edit in the model; `revert` takes it back."""
        self._ledger.commit(result.deltas)

    def revert(self, result: EditResult) -> None:
        """Take a committed edit back, bit-exactly; edits committed after it stay, as if it had never been made."""
        if not self._ledger.revert(result.deltas):
            raise DataError("this edit is not committed in this editor, so there is nothing to revert")

    def revert_all(self) -> None:
        """Back to the weights before the first commit, bit-exactly."""
        self._ledger.revert_all()

    def fingerprint(self) -> str:
        """Identity of the model's present weights (a sampled hash; see `lm.weights.fingerprint`)."""
        return weights.fingerprint(self.model)

    # -- measurements ---------------------------------------------------------------------------------------------

    def perplexity(self, *, verbose: bool = False) -> PerplexityReport | None:
        """Perplexity of the model as it is now; None when `ppl_sentence_num` is 0."""
        return self._measure("perplexity", verbose)

    def score(self, request: EditRequest, prefix: str | None = None) -> RequestScores:
        """All metrics of one request on the model as it is now."""
        return score_request(
            self.model,
            self.tok,
            request,
            prefix=prefix,
            prefix_rephrase=getattr(self.hparams, "if_prefix", False) == "all",
            batch_tokens=self.hparams.batch_tokens,
        )

    # -- EasyEdit's door ------------------------------------------------------------------------------------------

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str | None] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        *,
        subject: str | Sequence[str] | None = None,
        keep_original_weight: bool | None = None,
        sequential_edit: bool | None = None,
        verbose: bool = True,
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """Edit a list of facts one after another and measure each; returns (metrics, model, original weights).

        `keep_original_weight=True` takes every edit back after measuring it; False, the default, keeps them all in the
        model (sequential editing). `sequential_edit` is EasyEdit's name for the opposite; both given must not
        contradict.
        `locality_inputs` / `portability_inputs` are ``{key: {"prompt": […], "ground_truth": […]}}``, one entry per
        prompt.
        The third value holds the weights the edits touched as they were before, empty when they are back already.

        Raises:
            DataError: lists of unequal length or a bad request (found before anything is edited).
            ConfigError: contradicting flags.
        """
        restore = _restore_flag(keep_original_weight, sequential_edit)
        requests = requests_from_columns(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        copy = {} if restore else weights.snapshot(self.model, self.method.weight_names)
        records = []
        before: PerplexityReport | None = None
        for number, request in enumerate(requests):
            show = f"{number + 1}/{len(requests)}" if len(requests) > 1 else ""
            examined = self.examine(request, ppl_before=before, verbose=verbose, label=show)
            if not restore:
                self.commit(examined.result)
            before = examined.ppl_before if restore else examined.ppl_after
            records.append(examined.record)
        return records, self.model, copy

    def batch_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        ground_truth: Sequence[str | None] | None = None,
        rephrase_prompts: Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        *,
        subject: Sequence[str] | None = None,
        keep_original_weight: bool = False,
        verbose: bool = True,
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """Edit all facts as one edit (MEMIT: jointly), measure each with all of them in; arguments and values as
        `edit`'s."""
        requests = requests_from_columns(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        prefix = self._test_prefix()
        before = [self.score(request, prefix) for request in requests]
        ppl_before = self._measure("perplexity before", verbose)
        started = time.perf_counter()
        result = self.compute(requests, verbose=verbose)
        seconds = (time.perf_counter() - started) / len(requests)
        with self.applied(result):
            after = [self.score(request, prefix) for request in requests]
            ppl_after = self._measure("perplexity after", verbose)
        place_of = {made.place: place for place, made in enumerate(result.requests)}
        collapse = self._judge(ppl_before, ppl_after)
        records = []
        for request, old, new in zip(requests, before, after, strict=True):
            measured = Measured(old, new, ppl_before, ppl_after, seconds)
            records.append(self._record(request, result, place_of[request.place], measured, collapse, prefix))
        if keep_original_weight:
            return records, self.model, {}
        copy = weights.snapshot(self.model, self.method.weight_names)
        self.commit(result)
        return records, self.model, copy

    def examine(
        self,
        request: EditRequest,
        *,
        ppl_before: PerplexityReport | None = None,
        verbose: bool = False,
        label: str = "",
    ) -> Examined:
        """Compute one edit, measure the model before and with it, and take it back: the record of one edit.

        `ppl_before` spares measuring the unedited model again when it is known. Nothing stays in the model, also on
        error.
        """
        prefix = self._test_prefix()
        scores_before = self.score(request, prefix)
        if ppl_before is None:
            ppl_before = self._measure(f"{label} perplexity before", verbose)
        started = time.perf_counter()
        result = self.compute(request, verbose=verbose, label=label)
        seconds = time.perf_counter() - started
        with self.applied(result):
            scores_after = self.score(request, prefix)
            ppl_after = self._measure(f"{label} perplexity after", verbose)
        measured = Measured(scores_before, scores_after, ppl_before, ppl_after, seconds)
        collapse = self._judge(ppl_before, ppl_after)
        record = self._record(request, result, 0, measured, collapse, prefix)
        return Examined(record=record, result=result, ppl_before=ppl_before, ppl_after=ppl_after, collapse=collapse)

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

    def _test_prefix(self) -> str | None:
        """One of the contexts that hold text, drawn by the seed, when `if_prefix` asks for it."""
        if not getattr(self.hparams, "if_prefix", False):
            return None
        texts = [context for context in self.method.contexts if context != SLOT]
        if not texts:
            raise ConfigError("if_prefix needs a context with text in it; context_templates has only '{}'")
        return self._prefixes.choice(texts)

    def _judge(self, before: PerplexityReport | None, after: PerplexityReport | None) -> Collapse | None:
        if before is None or after is None:
            return None
        limits = {"threshold": self.hparams.collapse_threshold, "ratio": self.hparams.collapse_ratio}
        return judge(before.mean, after.mean, **limits)


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One edit with what was measured around it."""

    record: dict[str, Any]
    result: EditResult
    ppl_before: PerplexityReport | None
    ppl_after: PerplexityReport | None
    collapse: Collapse | None


def _restore_flag(keep_original_weight: bool | None, sequential_edit: bool | None) -> bool:
    if keep_original_weight is not None and sequential_edit is not None and keep_original_weight == sequential_edit:
        raise ConfigError(
            f"keep_original_weight={keep_original_weight} and sequential_edit={sequential_edit} contradict each other: "
            "restoring after each edit is the opposite of editing in sequence; give one of them"
        )
    if sequential_edit is not None:
        return not sequential_edit
    return bool(keep_original_weight)
