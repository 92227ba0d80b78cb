"""What every editing method is: requests in, an EditResult out, computed on an unchanged model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.hparams import HyperParams
from easyeditor.lm.architectures import Anatomy
from easyeditor.progress import Progress
from easyeditor.records import EditRequest, EditResult

H = TypeVar("H", bound=HyperParams)


class EditMethod(ABC, Generic[H]):
    """One editing method bound to a model, a tokenizer and its hyper-parameters.

    State that outlives an edit (sampled contexts, the generator behind them, loaded statistics) lives here and
    nowhere else.
    """

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: H) -> None:
        self.model, self.tok, self.hparams = model, tok, hparams
        self.generator = torch.Generator().manual_seed(hparams.seed)
        self.parts = self.find_parts()

    @abstractmethod
    def find_parts(self) -> Anatomy:
        """The model's parts as the hyper-parameters name them."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The method's name as a reader knows it, variant included."""

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
    def remedy(self) -> str | None:
        """Settings (`key=value …`) that prevent a collapse caused by a small denominator; None when they are on
        already."""
        return None

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """Compute the edit for `requests`; the model's weights are bit-equal before and after."""
