"""What every editing method is: requests in, an EditResult out, computed on an unchanged model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import HyperParams
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import Anatomy, max_positions
from easyeditor.lm.budget import GRADIENT_COST, Budget, tokens_for
from easyeditor.lm.prompting import Prompting
from easyeditor.lm.recall import Recall
from easyeditor.lm.scored import line
from easyeditor.lm.tokens import check_length, whole
from easyeditor.methods.table import METHODS
from easyeditor.values.edit import EditRequest, EditResult, EditTrace, WeightDelta

TOGETHER = 8  # requests of mode single that are computed at once

H = TypeVar("H", bound=HyperParams)


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What a method takes besides the model's weights and its forwards."""

    matrices: int = 0
    """Matrices (K, K) in float64 that live at every edited layer of a sequence, K the width of a key."""
    of_edited: int = 4
    """Bytes for each number of the edited weights: a float32 update; for trained weights more."""
    network: int = 0
    """Bytes of networks of the method's own."""


class EditMethod(ABC, Generic[H]):
    """One editing method bound to a model, a tokenizer and its hyper-parameters.

    State that outlives an edit (sampled contexts, the generator behind them, loaded statistics) lives here and
    nowhere else.
    """

    joint: ClassVar[bool] = True
    """Does `edit` write several requests as one edit? False: one after another, so a batch is a sequence."""
    screens: ClassVar[bool] = False
    """Has the method a denominator that `screen` can compute without editing?"""

    gradient_cost: ClassVar[int] = GRADIENT_COST
    """Memory of a token whose gradients are kept, in tokens of a forward without gradients: a rule."""

    keeps_repeats: ClassVar[bool] = False
    """Does a request count as often as a batch holds it? False: once, with a warning."""

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: H) -> None:
        self.model, self.tok, self.hparams = model, tok, hparams
        self.prompting = Prompting.of(hparams).checked(tok)
        self.generator = torch.Generator().manual_seed(hparams.seed)
        self.parts = self.find_parts()

    @classmethod
    def memory(cls, hparams: H, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        """What a run with these hyper-parameters, or the `training` of what it uses, takes on a model of these parts,
        whose weights need not be there: for `--dry-run`."""
        return MemoryNeeds()

    @abstractmethod
    def find_parts(self) -> Anatomy:
        """The model's parts as the hyper-parameters name them."""

    @property
    def title(self) -> str:
        """The method's name as a reader knows it, variant included; by default its row's."""
        return METHODS[self.hparams.alg_name].title

    @property
    def needs_subject(self) -> bool:
        """Does the method look the subject up in the prompt? By its row."""
        return METHODS[self.hparams.alg_name].needs_subject

    @cached_property
    def batch_tokens(self) -> int:
        """Most tokens in one forward."""
        return tokens_for(self.parts, self.hparams.batch_tokens)

    @cached_property
    def budget(self) -> Budget:
        """`batch_tokens`, less where they did not fit: one for all forwards without gradients, of edits and of what
        measures them, so that none tries again what did not fit."""
        return Budget(self.batch_tokens)

    def check(self, request: EditRequest) -> None:
        """Raise DataError unless the texts of a request that the edit computes with fit the model."""
        row = line(self.tok, request.prompt, request.target_new, self.prompting)
        check_length([row.ids], max_positions(self.model), lambda _: whole(request))

    def together(self, requests: Sequence[EditRequest]) -> int:
        """How many requests mode single computes at once where nobody says it."""
        return TOGETHER

    @property
    @abstractmethod
    def layers(self) -> list[int]:
        """Layers whose weights the method changes."""

    @property
    @abstractmethod
    def weight_names(self) -> list[str]:
        """Parameters the method changes."""

    @property
    def contexts(self) -> tuple[str, ...]:
        """Contexts the method puts before prompts; empty for a method that has none."""
        return ()

    @property
    def prefixes(self) -> bool | Literal["all"]:
        """Is an edit tested with a context before the rewrite prompt (True), and before paraphrases too (`all`)?"""
        return False

    @property
    def scoring(self) -> Prompting:
        """How evaluation asks: as the edit does. A method whose own rule is an EOS after each target (LocFT-BF; LoRA by
        default) is scored as published, on the target alone, so that methods compare."""
        known = METHODS[self.hparams.alg_name].preset.get("target_eos", type(self.hparams).target_eos)
        return replace(self.prompting, eos=self.prompting.eos and not known)

    def use_contexts(self, contexts: Sequence[str]) -> None:
        """Take the contexts of an earlier run in place of generating them; nothing to do for a method without any."""

    def prepare(self) -> None:
        """Make everything that outlives an edit (contexts, statistics) on the model as it is now, before any edit."""

    def committed(self, result: EditResult) -> None:
        """`result` was just committed to the model: what later edits must know of it is in `result.memory`, which is
        saved with the deltas. By default nothing is remembered; `methods.memory.Memory` does the book-keeping."""

    def reverted(self, result: EditResult | None) -> None:
        """`result`, or one with the same deltas, was just taken out of the model; None: all committed edits were."""

    @property
    def recall(self) -> Recall | None:
        """The memory of the edits in force that questions are asked behind; None where there is none."""
        return None

    @contextmanager
    def recalling(self, result: EditResult | None) -> Iterator[None]:
        """`result` in force inside the block, besides the committed edits; None: no edit at all. It matters to edits
        that are looked up: those in the weights are there already.

        Raises:
            ConfigError: an edit of another kind of method.
        """
        self.check_kind(result)
        yield

    def check_kind(self, result: EditResult | None) -> None:
        """Raise ConfigError for an edit that only its own method can put before questions."""
        if result is not None and result.facts:
            raise ConfigError(
                f"this edit of {result.method} is a memory of facts, which {self.title} does not look up; make the "
                f"editor with hyper-parameters of {result.method}"
            )

    def holds(self, result: EditResult) -> bool:
        """Is an edit that is looked up committed here? True of those in the weights, which the ledger knows."""
        return True

    @property
    def remedy(self) -> str | None:
        """Settings (`key=value …`) that prevent a collapse by a small denominator; None when they are on already."""
        return None

    def result(
        self,
        requests: Sequence[EditRequest],
        deltas: Sequence[WeightDelta],
        traces: Sequence[EditTrace],
        seconds: float,
        memory: Mapping[str, Tensor] | None = None,
    ) -> EditResult:
        """The edit as a value: what was computed, under the method's name and contexts; tensors of `memory` whole."""
        return EditResult(
            method=self.hparams.alg_name,
            requests=tuple(requests),
            deltas=tuple(deltas),
            traces=tuple(traces),
            contexts=self.contexts,
            seconds=seconds,
            memory={name: tensor.contiguous() for name, tensor in (memory or {}).items()},
        )

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """Compute the edit for `requests`; the model's weights are bit-equal before and after."""

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[EditResult]:
        """An edit of its own for each request, all on the unchanged model; a method may share work between them."""
        return [self.edit([request], progress) for request in requests]

    def screen(self, requests: Sequence[EditRequest]) -> list[float]:
        """The denominator each request's edit would have (the smallest in size over layers), no edit computed.

        Raises:
            ConfigError: the method has none.
        """
        raise ConfigError(f"{self.title} has no denominator to screen by")

    def remedied(self) -> EditMethod[H] | None:
        """The same method with its `remedy` set, on the same model; None when there is no remedy."""
        if self.remedy is None:
            return None
        other = type(self)(self.model, self.tok, self.hparams.override(self.remedy.split()))
        other.take_over(self)
        other.budget = self.budget
        return other

    def take_over(self, other: EditMethod[Any]) -> None:
        """Share the state of another object of this method on the same model: contexts, statistics, memory."""
