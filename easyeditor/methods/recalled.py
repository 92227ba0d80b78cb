"""What methods share whose edits are looked up when the model is asked: nothing is written into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.discover import anatomy
from easyeditor.lm.recall import Recall
from easyeditor.methods.base import EditMethod
from easyeditor.methods.hparams import ModuleHyperParams
from easyeditor.values.edit import EditRequest, EditResult

R = TypeVar("R", bound=ModuleHyperParams)


class Recalled(EditMethod[R], Recall, Generic[R]):
    """A method whose edits are a memory: those committed, and one that is applied, are in force."""

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: R) -> None:
        super().__init__(model, tok, hparams)
        self._in_force: list[EditResult] = []

    def find_parts(self) -> Anatomy:
        return anatomy(self.model, **self.hparams.templates)

    @property
    def layers(self) -> list[int]:
        return []

    @property
    def weight_names(self) -> list[str]:
        return []

    @property
    def recall(self) -> Recall | None:
        return self if self._in_force else None

    @property
    def facts(self) -> list[tuple[EditRequest, str]]:
        """Requests in force with their facts, the latest last; of two about one fact the later."""
        found: dict[tuple[str, int, str], tuple[EditRequest, str]] = {}
        for result in self._in_force:
            for request, fact in zip(result.requests, result.facts, strict=False):  # an edit of weights has none
                found.pop(request.place, None)
                found[request.place] = request, fact
        return list(found.values())

    def check_kind(self, result: EditResult | None) -> None:
        """Facts of any such method: it is the one that asks who looks them up."""

    @contextmanager
    def recalling(self, result: EditResult | None) -> Iterator[None]:
        kept = self._in_force
        self._in_force = [] if result is None else [*kept, result]
        try:
            yield
        finally:
            self._in_force = kept

    def committed(self, result: EditResult) -> None:
        self._in_force = [*self._in_force, result]

    def reverted(self, result: EditResult | None) -> None:
        place = None if result is None else self._place(result)
        self._in_force = [] if place is None else [r for n, r in enumerate(self._in_force) if n != place]

    def holds(self, result: EditResult) -> bool:
        return self._place(result) is not None

    def _place(self, result: EditResult) -> int | None:
        """Where the last edit equal to this one is."""
        ours = result.sha256()
        found = [n for n, held in enumerate(self._in_force) if held.sha256() == ours]
        return max(found, default=None)
