"""What an editor works with: model, tokenizer and hyper-parameters, and the method, ledger and probe made from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import HyperParams
from easyeditor.dataset.sentences import Sentences, load_sentences
from easyeditor.evaluate.perplexity import PerplexityProbe, PerplexityReport
from easyeditor.evaluate.registry import chosen, judge_for
from easyeditor.lm.checks import check_modes
from easyeditor.lm.ledger import Ledger
from easyeditor.lm.loading import load
from easyeditor.methods.base import EditMethod
from easyeditor.methods.registry import method_class

LOADED_BY = ("model_name", "device", "dtype", "fp16", "model_parallel")
"""Hyper-parameters that say which model is loaded and how."""


class Bound:
    """A model, a tokenizer and hyper-parameters. Each may be assigned (hyper-parameters also key by key): the editor
    then works as one that was made new from them. Committed edits stay in the old model and are forgotten."""

    hparams: HyperParams

    def __init__(self, hparams: HyperParams, sentences: Sentences | None, metrics: Sequence[str]) -> None:
        if not isinstance(hparams, HyperParams):
            raise ConfigError(
                f"{type(self).__name__} needs hyper-parameters such as ROMEHyperParams, found {type(hparams).__name__}"
            )
        check_modes()
        self.hparams = hparams.checked()
        self.hparams.check_files()
        self.metrics = metrics  # a judge's bad address is refused before anything is loaded
        name, *how = LOADED_BY
        options = {key: getattr(self.hparams, key) for key in how}
        self._model, self._tok = load(getattr(self.hparams, name), **options)
        number = self.hparams.ppl_sentence_num
        self.sentences = load_sentences(number) if sentences is None and number else sentences
        self._bind()

    def _bind(self) -> None:
        """Make the method, and forget what was made of another model, tokenizer or hyper-parameters."""
        self._committed = Ledger(self._model)
        self._probe: PerplexityProbe | None = None
        self._base: PerplexityReport | None = None  # of the model before the first commit, once it was needed
        self._base_was_high = False
        self._said: set[str] = set()
        self._prefixes = random.Random(self.hparams.seed)
        self._method: EditMethod[Any] = method_class(self.hparams.alg_name)(self._model, self._tok, self.hparams)
        self._bound = self._model, self._tok, self.hparams.checked()

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
        if self._model is not self._bound[0] or self._tok is not self._bound[1]:
            self._model, self._tok = load((self._model, self._tok))
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
    def model(self) -> PreTrainedModel:
        """The model that is edited and measured."""
        return self._model

    @model.setter
    def model(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def tok(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._tok

    @tok.setter
    def tok(self, tok: PreTrainedTokenizerBase) -> None:
        self._tok = tok

    @property
    def sentences(self) -> Sentences | None:
        """The perplexity set; None measures no perplexity."""
        return self._sentences

    @sentences.setter
    def sentences(self, sentences: Sentences | None) -> None:
        self._sentences, self._probe, self._base = sentences, None, None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the registry's metrics that are measured around every edit."""
        return self._metrics

    @metrics.setter
    def metrics(self, names: Sequence[str]) -> None:
        self._metrics = tuple(metric.name for metric in chosen(names)) if names else ()
        judge_for(self._metrics)
