"""Measurements of the model as it is: scores, the chosen metrics, perplexity, and the verdict on a change of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from easyeditor.base.errors import ConfigError
from easyeditor.base.progress import progress_bar
from easyeditor.editing.bound import Bound
from easyeditor.evaluate.examined import State
from easyeditor.evaluate.many import measure_many
from easyeditor.evaluate.metric import Settings
from easyeditor.evaluate.perplexity import PerplexityProbe, PerplexityReport, begins_with_bos
from easyeditor.evaluate.registry import Evaluation, chosen, judge_for, measure
from easyeditor.lm.checks import check_modes
from easyeditor.lm.many import why_alone
from easyeditor.lm.precision import products
from easyeditor.lm.tokens import SLOT
from easyeditor.values import collapse
from easyeditor.values.collapse import Collapse
from easyeditor.values.edit import EditRequest, EditResult
from easyeditor.values.record import Side

LOG = logging.getLogger(__name__)


class Measuring(Bound):
    """The part of the editor that measures; nothing here changes the model."""

    def perplexity(self, *, verbose: bool = False) -> PerplexityReport | None:
        """Perplexity of the model as it is now; None when `ppl_sentence_num` is 0."""
        return self._measure("perplexity", verbose)

    def score(self, request: EditRequest, prefix: str | None = None) -> Side:
        """What a record says of one request, on the model as it is now; `Side.agreement` of two is locality."""
        return self.measure([request], [prefix], metrics=False).side(0)

    def measure(
        self,
        requests: Sequence[EditRequest],
        prefixes: Sequence[str | None],
        *,
        metrics: bool = True,
        before: Evaluation | None = None,
    ) -> Evaluation:
        """What records say of the requests on the model as it is, and with `metrics` the chosen ones; every prompt is
        asked once, all batched together. `before` is what this gave on the unedited model, which some metrics compare
        with."""
        settings = [self._settings(request, prefix) for request, prefix in zip(requests, prefixes, strict=True)]
        asked = chosen(self.metrics) if self.metrics and metrics else []
        with self._products():
            return measure(self.model, self.tok, requests, asked, settings, record=True, before=before)

    def measure_many(
        self, edits: Sequence[tuple[EditRequest, EditResult, str | None, Evaluation]]
    ) -> list[State | None]:
        """The state of the model with each of these edits, measured in forwards that they share: its one request, the
        edit, a test prefix, and what `measure` gave without it. None for an edit that has to be measured alone, as all
        have with `replay: false`."""
        why = [why_alone(self.method.parts, result.deltas) for _, result, _, _ in edits]
        for reason in dict.fromkeys(why):
            if reason is not None and reason not in self._said:
                self._said.add(reason)
                LOG.warning("edits are measured one at a time where %s", reason)
        fit = [n for n, reason in enumerate(why) if reason is None and self.hparams.replay]
        if len(fit) < 2:
            return [None] * len(edits)
        own = [(r, result, self._settings(r, prefix), before) for r, result, prefix, before in (edits[n] for n in fit)]
        asked = chosen(self.metrics) if self.metrics else []
        with self._products():
            states = measure_many(self.method.parts, self.tok, own, asked, self._perplexity_probe())
        found = dict(zip(fit, states, strict=True))
        return [found.get(n) for n in range(len(edits))]

    def _products(self) -> AbstractContextManager[None]:
        check_modes()
        return products(self.hparams.matmul, self.hparams.cpu_products)

    def _settings(self, request: EditRequest, prefix: str | None) -> Settings:
        return Settings(
            prefix=prefix,
            prefix_rephrase=self.method.prefixes == "all",
            seed=self.hparams.seed,
            idf_texts=request.reference_texts,
            budget=self.method.budget,
            prompting=self.method.scoring,
            judge=judge_for(self.metrics),
        )

    @property
    def compares(self) -> bool:
        """Does a chosen metric compare with the unedited model?"""
        return any(metric.needs_before for metric in (chosen(self.metrics) if self.metrics else ()))

    def _measure(self, title: str, verbose: bool) -> PerplexityReport | None:
        probe = self._perplexity_probe()
        if probe is None:
            return None
        with progress_bar(title, verbose) as show, self._products():
            return probe.measure(None if show is None else lambda done, of: show(done, of, ""))

    def _perplexity_probe(self) -> PerplexityProbe | None:
        method = self.method  # first: it follows a model that was assigned
        if self._probe is None and self.sentences is not None:
            self._probe = PerplexityProbe(
                self.model,
                self.tok,
                self.sentences.texts,
                parts=method.parts,
                resume_layer=min(method.layers),
                fast=bool(self.hparams.replay),
                batch_size=self.hparams.ppl_batch_size,
                longest=self.hparams.longest_text,
                batch_tokens=method.batch_tokens,
                add_start_token=begins_with_bos(self.tok, self.hparams.ppl_bos),
            )
        return self._probe

    def test_prefix(self, draw: int | None = None) -> str | None:
        """One of the contexts that hold text, drawn by the seed, when the method asks for it.

        Draws follow each other; with `draw`, a number of the caller's, the seed and that number alone decide.
        """
        if not self.method.prefixes:
            return None
        texts = [context for context in self.method.contexts if context != SLOT]
        if not texts:
            raise ConfigError("if_prefix needs a context with text in it; context_templates has only '{}'")
        source = self._prefixes if draw is None else random.Random(f"{self.hparams.seed} {draw}")
        return source.choice(texts)

    def verdict(
        self,
        before: PerplexityReport | None,
        after: PerplexityReport | None,
        just_before: PerplexityReport | None = None,
    ) -> Collapse | None:
        """The verdict on a change of perplexity since the original model; None when it was not measured.

        `just_before` is that of the model the edit was made on, where edits were in it already; it is recorded only.
        """
        if before is None or after is None:
            return None
        self._warn_if_high(before)
        limits = {"threshold": self.hparams.collapse_threshold, "ratio": self.hparams.collapse_ratio}
        found = collapse.verdict(before.mean, after.mean, **limits)
        return found if just_before is None else replace(found, ppl_just_before=just_before.mean)

    def _warn_if_high(self, base: PerplexityReport) -> None:
        """Once, where the unedited model is above the collapse threshold already: only the ratio tells then."""
        if base.mean <= self.hparams.collapse_threshold or self._base_was_high:
            return
        self._base_was_high = True
        LOG.warning(
            "the unedited model's perplexity is %s, above collapse_threshold (%s): these sentences are foreign to it, "
            "and the verdict goes by the ratio alone (collapse_ratio %s: above %s); better: %s",
            f"{base.mean:,.0f}",
            f"{self.hparams.collapse_threshold:,g}",
            f"{self.hparams.collapse_ratio:g}",
            f"{self.hparams.collapse_ratio * base.mean:,.0f}",
            "other sentences" if base.bos else "ppl_bos: auto, or other sentences",
        )
