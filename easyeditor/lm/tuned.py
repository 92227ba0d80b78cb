"""Logits as a function of some weights: the plain forward, and one that starts at the first trained block.

Axes: B rows, T tokens of the longest row, N scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import Passage, captured, resumed, selected_head, watched
from easyeditor.lm.loading import input_device
from easyeditor.lm.prefixes import unmasked
from easyeditor.lm.tokens import Row, model_inputs
from easyeditor.lm.weights import called_with


class TunedForward:
    """Logits (N, V) at the scored positions of fixed rows, with given weights in the place of the model's own.

    With `replay`, what lies below block `first` runs once, when this is made, and only scored positions reach the
    output head; `first` is the lowest block whose weights may be given. Without it, every call is a whole, plain
    forward: the oracle, and the way for architectures without a replay flag.
    """

    def __init__(self, parts: Anatomy, rows: Sequence[Row], *, first: int, replay: bool) -> None:
        self._model, self._blocks, self._first = parts.model, parts.blocks, first
        self._inputs = model_inputs([row.ids for row in rows], input_device(parts.model))
        pairs = [(i, p) for i, row in enumerate(rows) for p in row.scored]
        head = parts.model.get_output_embeddings().weight.device
        self._rows_N = torch.tensor([i for i, _ in pairs]).to(head, non_blocking=True)
        self._positions_N = torch.tensor([p for _, p in pairs]).to(head, non_blocking=True)
        self._passage = self._record() if replay and parts.architecture.replay else None

    def __call__(self, copies: Mapping[str, Tensor]) -> Tensor:
        if self._passage is None:
            logits_BTV: Tensor = called_with(self._model, copies, **self._inputs, use_cache=False).logits
            return logits_BTV[self._rows_N.to(logits_BTV.device), self._positions_N.to(logits_BTV.device)]
        with (
            resumed(self._blocks, self._first, self._passage),
            selected_head(self._model, self._rows_N, self._positions_N),
        ):
            inputs = unmasked(self._inputs, len(self._blocks))
            logits_1NV: Tensor = called_with(self._model, copies, **inputs, use_cache=False).logits
        return logits_1NV[0]

    @torch.no_grad()
    def _record(self) -> Passage:
        """What block `first` is given: no trained weight lies below it."""
        block = self._blocks[self._first]
        with watched(block) as passages, captured(block, stop=True):
            self._model(**unmasked(self._inputs, len(self._blocks)), use_cache=False)
        return passages[0]
