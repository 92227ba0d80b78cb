"""A model, its method, and measurements: scores, the chosen metrics, perplexity, the verdict on a change of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import HyperParams
from easyeditor.base.progress import progress_bar
from easyeditor.base.shots import read_shots
from easyeditor.dataset.sentences import Sentences, load_sentences
from easyeditor.evaluate.behind import RECALL
from easyeditor.evaluate.examined import State
from easyeditor.evaluate.many import measure_many
from easyeditor.evaluate.metric import Metric, Settings
from easyeditor.evaluate.perplexity import PerplexityProbe, PerplexityReport, begins_with_bos
from easyeditor.evaluate.registry import Evaluation, chosen, judge_for, measure
from easyeditor.lm.checks import check_modes
from easyeditor.lm.ledger import Ledger
from easyeditor.lm.loading import load
from easyeditor.lm.many import why_alone
from easyeditor.lm.precision import products
from easyeditor.lm.recall import Recall
from easyeditor.lm.tokens import SLOT
from easyeditor.lm.weights import version
from easyeditor.methods.base import EditMethod
from easyeditor.methods.registry import method_class
from easyeditor.values import collapse
from easyeditor.values.collapse import Collapse
from easyeditor.values.edit import EditRequest, EditResult
from easyeditor.values.record import Side

LOG = logging.getLogger(__name__)

LOADED_BY = ("model_name", "device", "dtype", "fp16", "model_parallel")
"""Hyper-parameters that say which model is loaded and how."""


class Measuring:
    """A model, a tokenizer and hyper-parameters, and what is measured of them; nothing here changes the model.

    Each may be assigned (hyper-parameters also key by key): the editor then works as one that was made new from them.
    Committed edits stay in the old model and are forgotten.
    """

    model: PreTrainedModel
    """The model that is edited and measured."""
    tok: PreTrainedTokenizerBase
    hparams: HyperParams

    def __init__(
        self, hparams: HyperParams, *, sentences: Sentences | None = None, metrics: Sequence[str] = ()
    ) -> None:
        """`sentences` replaces the perplexity set that `ppl_sentence_num` chooses; `metrics` of the registry are
        measured around every edit besides EasyEdit's."""
        if not isinstance(hparams, HyperParams):
            raise ConfigError(
                f"{type(self).__name__} needs hyper-parameters such as ROMEHyperParams, found {type(hparams).__name__}"
            )
        check_modes()
        self.hparams = hparams.checked()
        self.hparams.check_files()
        self.metrics = metrics  # a judge's bad address is refused before anything is loaded
        name, *how = LOADED_BY
        self.model, self.tok = load(getattr(self.hparams, name), **{key: getattr(self.hparams, key) for key in how})
        number = self.hparams.ppl_sentence_num
        self.sentences = load_sentences(number) if sentences is None and number else sentences
        self._bind()

    def _bind(self) -> None:
        """Make the method, and forget what was made of another model, tokenizer or hyper-parameters."""
        self._committed = Ledger(self.model)
        self._probe: PerplexityProbe | None = None
        self._base: PerplexityReport | None = None  # of the model before the first commit, once it was needed
        self._steady: tuple[object, PerplexityReport] | None = None  # of a version of the weights
        self._warned: set[str] = set()
        self._prefixes = random.Random(self.hparams.seed)
        prompts = self.hparams.mquake_prompts
        self._shots = None if prompts is None else read_shots(prompts)
        self._method: EditMethod[Any] = method_class(self.hparams.alg_name)(self.model, self.tok, self.hparams)
        self._bound = self.model, self.tok, self.hparams.checked()

    @property
    def method(self) -> EditMethod[Any]:
        """The method on the present model, tokenizer and hyper-parameters.

        Raises:
            ConfigError: they do not fit each other; hyper-parameters name another model, or were changed while edits
                are committed.
        """
        self._follow()
        if self.hparams != self._bound[2]:
            self._change(self._bound[2])
        return self._method

    @method.setter
    def method(self, _: object) -> None:
        raise ConfigError("editor.method follows from the hyper-parameters; assign editor.hparams")

    @property
    def _ledger(self) -> Ledger:
        """Edits committed to the present model."""
        self._follow()
        return self._committed

    def _follow(self) -> None:
        """Bind anew where another model or tokenizer was assigned; not at the assignment, since both may come.

        Raises:
            ConfigError: as `check_modes`.
        """
        check_modes()
        if self.model is not self._bound[0] or self.tok is not self._bound[1]:
            self.model, self.tok = load((self.model, self.tok))
            self._bind()

    def _change(self, known: HyperParams) -> None:
        """Take hyper-parameters that were assigned since `known`."""
        new = self.hparams.checked()
        for key in LOADED_BY:
            if getattr(new, key) != getattr(known, key):
                raise ConfigError(
                    f"editor.hparams: {key} is {getattr(new, key)!r} now, and the model is loaded already; make a new "
                    f"editor, or assign editor.model and editor.tok"
                )
        if len(self._committed):
            raise ConfigError("editor.hparams changed while edits are committed; call editor.revert_all() before")
        new.check_files()
        if new.ppl_sentence_num != known.ppl_sentence_num:
            self.sentences = load_sentences(new.ppl_sentence_num) if new.ppl_sentence_num else None
        self.hparams = new
        self._bind()

    @property
    def sentences(self) -> Sentences | None:
        """The perplexity set; None measures no perplexity."""
        return self._sentences

    @sentences.setter
    def sentences(self, sentences: Sentences | None) -> None:
        self._sentences, self._probe, self._base, self._steady = sentences, None, None, None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the registry's metrics that are measured around every edit."""
        return tuple(metric.name for metric in self._metrics)

    @metrics.setter
    def metrics(self, names: Sequence[str]) -> None:
        self._metrics = chosen(names) if names else []
        judge_for(self.metrics)

    @property
    def compares(self) -> bool:
        """Does a chosen metric compare with the unedited model?"""
        return any(metric.needs_before for metric in self._metrics)

    # -- measurements of the model as it is ------------------------------------------------------------------------

    def score(self, request: EditRequest, prefix: str | None = None) -> Side:
        """What a record says of one request; `Side.agreement` of two is locality."""
        return self.measure([request], [prefix], metrics=False).side(0)

    def measure(
        self,
        requests: Sequence[EditRequest],
        prefixes: Sequence[str | None],
        *,
        metrics: bool = True,
        before: Evaluation | None = None,
    ) -> Evaluation:
        """What records say of the requests, and with `metrics` the chosen ones; every prompt is asked once, all batched
        together. `before` is what this gave on the unedited model, which some metrics compare with."""
        settings = [self._settings(request, prefix) for request, prefix in zip(requests, prefixes, strict=True)]
        asked = [*self._metrics, *self._recalled] if metrics else []
        with self._products():
            return measure(self.model, self.tok, requests, asked, settings, record=True, before=before)

    def measure_many(
        self, edits: Sequence[tuple[EditRequest, EditResult, str | None, Evaluation]]
    ) -> list[State | None]:
        """The state of the model with each edit, measured in forwards that they share. An edit comes with its one
        request, a test prefix, and what `measure` gave without it. None for an edit that has to be measured alone, as
        all have with `replay: false`."""
        why = [why_alone(self.method.parts, result.deltas) for _, result, _, _ in edits]
        for reason in dict.fromkeys(why):
            if reason is not None:
                self._warn_once("edits are measured one at a time where %s", reason)
        fit = [n for n, reason in enumerate(why) if reason is None and self.hparams.replay]
        if len(fit) < 2:
            return [None] * len(edits)
        own = [(r, result, self._settings(r, prefix), before) for r, result, prefix, before in (edits[n] for n in fit)]
        with self._products():
            states = measure_many(self.method.parts, self.tok, own, self._metrics, self._perplexity_probe())
        found = dict(zip(fit, states, strict=True))
        return [found.get(n) for n in range(len(edits))]

    def _warn_once(self, message: str, *values: str) -> None:
        if message % values not in self._warned:
            self._warned.add(message % values)
            LOG.warning(message, *values)

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
            recall=self.method.recall,
            shots=self._shots,
        )

    @property
    def _recalled(self) -> list[Metric]:
        """What is measured of a memory besides the chosen metrics."""
        looked_up = isinstance(self.method, Recall)
        return [metric for metric in RECALL if looked_up and metric not in self._metrics]

    def asked(self, text: str) -> str:
        """A text as the model is given it: behind the memory of the edits in force, where they are one."""
        recall = self.method.recall
        return text if recall is None else recall.asked([(text, None)])[0].prompt

    def perplexity(self, *, verbose: bool = False, title: str = "perplexity") -> PerplexityReport | None:
        """Perplexity of the model; None when `ppl_sentence_num` is 0. `verbose` shows progress under `title`."""
        probe = self._perplexity_probe()
        if probe is None:
            return None
        now = version(self.model.parameters()) if not self.method.layers else None
        if now is None or self._steady is None or self._steady[0] != now:  # else no edit has changed the model
            with progress_bar(title, verbose) as show, self._products():
                report = probe.measure(None if show is None else lambda done, of: show(done, of, ""))
            self._steady = now, report
        return self._steady[1]

    def _perplexity_probe(self) -> PerplexityProbe | None:
        method = self.method  # first: it follows a model that was assigned
        if self._probe is None and self.sentences is not None:
            self._probe = PerplexityProbe(
                self.model,
                self.tok,
                self.sentences.texts,
                parts=method.parts,
                resume_layer=min(method.layers, default=None),
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
        threshold, ratio = self.hparams.collapse_threshold, self.hparams.collapse_ratio
        if before.mean > threshold:
            self._warn_once(
                "the unedited model's perplexity is %s, above collapse_threshold (%s): these sentences are foreign to "
                "it, and the verdict goes by the ratio alone (collapse_ratio %s: above %s); better: %s",
                f"{before.mean:,.0f}",
                f"{threshold:,g}",
                f"{ratio:g}",
                f"{ratio * before.mean:,.0f}",
                "other sentences" if before.bos else "ppl_bos: auto, or other sentences",
            )
        found = collapse.verdict(before.mean, after.mean, threshold=threshold, ratio=ratio)
        return found if just_before is None else replace(found, ppl_just_before=just_before.mean)
