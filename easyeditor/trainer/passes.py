"""One training step's forwards: edit, post-edit and locality; plain, and sharing all that an edit cannot change.

Axes: B rows, T tokens, S scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import Passage, StopForward, selected_head, stopping, tapped, watched
from easyeditor.lm.loading import input_device
from easyeditor.lm.replay import resumed
from easyeditor.lm.tokens import model_inputs
from easyeditor.methods.mend.hypernet import Hypernetwork
from easyeditor.methods.mend.passes import Batch, Line, nll, read_factors, scored_logits
from easyeditor.trainer.patched import PatchedBlocks


@dataclass(frozen=True)
class Task:
    """What one step edits (`edit`), what must hold after it (`outer`), and what must stay (`locality`)."""

    edit: tuple[Line, ...]
    outer: tuple[Line, ...]
    locality: tuple[Line, ...]


@dataclass(frozen=True)
class Outcome:
    """The losses of one step, differentiable in the hypernetwork, and what they mean for a user."""

    edit_loss: Tensor
    """Mean NLL of the new answers after the edit, nats per token."""
    locality_loss: Tensor
    """Mean KL(before || after) at the locality answers' positions, nats."""
    accuracy: tuple[float, ...]
    """Share of right tokens of each outer line after the edit."""
    locality_drawdown: float | None
    """Share of locality positions whose first choice the edit changed; None without any."""


class Passes(Protocol):
    """How a step is computed."""

    def __call__(self, task: Task) -> Outcome:
        """Compute the edit of `task` and its losses."""
        ...


class PlainPasses:
    """The plain way, and the oracle: four full forwards, all positions through the head, nothing kept."""

    def __init__(self, parts: Anatomy, hypernet: Hypernetwork) -> None:
        self._parts, self._hypernet = parts, hypernet
        self._patched = PatchedBlocks(parts, hypernet.weights)

    def __call__(self, task: Task) -> Outcome:
        device = input_device(self._parts.model)
        edit = Batch.of(task.edit, device, mean=False)
        outer = Batch.of(task.outer, device, mean=True)
        locality = Batch.of(task.locality, device, mean=True) if task.locality else None
        return self.run(edit, outer, locality)

    def run(self, edit: Batch, outer: Batch, locality: Batch | None) -> Outcome:
        """The same for rows made elsewhere."""
        before_SV = None
        if locality is not None:
            with torch.no_grad():
                before_SV = self._logits(locality)
        factors, _ = read_factors(self._parts, self._hypernet.weights, edit, whole=True)
        with self._patched.carrying(self._hypernet.updates(factors)):
            outer_SV = self._logits(outer)
            after_SV = None if locality is None else self._logits(locality)
        return outcome(outer, outer_SV, locality, before_SV, after_SV)

    def _logits(self, batch: Batch) -> Tensor:
        return scored_logits(self._parts, batch, whole=True)


class SharedPasses:
    """The fast way, with the plain way's numbers.

    What the blocks below the first edited one give is computed once per text and kept across steps and epochs, and so
    is what the unedited model says about locality; post-edit and locality rows are one forward through the edited
    blocks and those above; only scored positions reach the head.
    """

    def __init__(self, parts: Anatomy, hypernet: Hypernetwork, *, cache_bytes: int) -> None:
        self._parts, self._hypernet = parts, hypernet
        self._patched = PatchedBlocks(parts, hypernet.weights)
        self._start = min(weight.layer for weight in hypernet.weights)
        self._device = input_device(parts.model)
        self._kept = _Cache(cache_bytes)
        self._tuple_output: bool | None = None

    def __call__(self, task: Task) -> Outcome:
        edit = Batch.of(task.edit, self._device, mean=False)
        with self._from_start(task.edit):
            factors, _ = read_factors(self._parts, self._hypernet.weights, edit)
        lines = (*task.outer, *task.locality)
        rest = Batch.of(lines, self._device, mean=False)
        outer = Batch.of(task.outer, self._device, mean=True)
        count = len(outer.labels_N)
        before_SD = self._before(task.locality)

        def joined(selected_1SD: Tensor) -> Tensor:
            return torch.cat([selected_1SD, before_SD.unsqueeze(0)], dim=1)

        head = self._parts.model.get_output_embeddings()
        with ExitStack() as stack:
            stack.enter_context(self._patched.carrying(self._hypernet.updates(factors)))
            stack.enter_context(self._from_start(lines))
            stack.enter_context(selected_head(self._parts.model, rest.rows_N, rest.positions_N))
            stack.enter_context(tapped(head, on_input=joined))
            logits_SV = self._parts.model(**rest.inputs, use_cache=False).logits[0]
        if not task.locality:
            return outcome(outer, logits_SV, None, None, None)
        locality = Batch.of(task.locality, self._device, mean=True)
        end = count + len(locality.labels_N)
        return outcome(outer, logits_SV[:count], locality, logits_SV[end:].detach(), logits_SV[count:end])

    def _from_start(self, lines: Sequence[Line]) -> AbstractContextManager[None]:
        """Forwards start at the first edited block, from the kept hidden states of `lines`."""
        return resumed(self._parts.blocks, self._start, self._passage(lines))

    def _passage(self, lines: Sequence[Line]) -> Passage:
        hidden = [self._hidden(line.ids) for line in lines]
        padded_BTD = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
        assert self._tuple_output is not None
        return Passage(padded_BTD, self._tuple_output)

    def _hidden(self, ids: tuple[int, ...]) -> Tensor:
        """What the first edited block is given for a text (T, D).

        One text at a time, so that the numbers do not depend on what else a step needs.
        """
        found = self._kept.get(ids)
        if found is not None:
            return found
        if self._tuple_output is None:
            with torch.no_grad(), watched(self._parts.block(self._start)) as passages:
                self._parts.model.base_model(**model_inputs([ids], self._device), use_cache=False)
            self._tuple_output = passages[0].tuple_output
        seen: list[Tensor] = []
        with torch.no_grad(), stopping(), tapped(self._parts.block(self._start), on_input=_stop_with(seen)):
            self._parts.model.base_model(**model_inputs([ids], self._device), use_cache=False)
        return self._kept.put(ids, seen[0][0])

    def _before(self, lines: Sequence[Line]) -> Tensor:
        """What the unedited model gives its head at the scored positions of `lines` (S, D)."""
        rows = [self._head_input(line) for line in lines]
        width = self._parts.model.get_output_embeddings().weight.shape[-1]
        return torch.cat(rows) if rows else torch.zeros(0, width, device=self._device, dtype=self._parts.model.dtype)

    def _head_input(self, line: Line) -> Tensor:
        found = self._kept.get(line)
        if found is not None:
            return found
        seen: list[Tensor] = []
        batch = Batch.of([line], self._device, mean=True)
        head = self._parts.model.get_output_embeddings()
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(stopping())
            stack.enter_context(self._from_start([line]))
            stack.enter_context(selected_head(self._parts.model, batch.rows_N, batch.positions_N))
            stack.enter_context(tapped(head, on_input=_stop_with(seen)))
            self._parts.model(**batch.inputs, use_cache=False)
        return self._kept.put(line, seen[0][0])


def outcome(
    outer: Batch, outer_SV: Tensor, locality: Batch | None, before_SV: Tensor | None, after_SV: Tensor | None
) -> Outcome:
    """Losses and accuracies from the logits at the scored positions."""
    said = outer_SV.detach().argmax(1) == outer.labels_N.to(outer_SV.device)
    rows = outer.rows_N.to(said.device)
    shares = [float(said[rows == row].double().mean()) for row in range(len(outer.inputs["input_ids"]))]
    edit_loss = nll(outer_SV, outer).sum()
    if locality is None or before_SV is None or after_SV is None:
        return Outcome(edit_loss, edit_loss.new_zeros(()), tuple(shares), None)
    kl_S = divergence(before_SV, after_SV)
    changed = (before_SV.argmax(1) != after_SV.detach().argmax(1)).double().mean()
    return Outcome(edit_loss, (kl_S * locality.weights_N.to(kl_S)).sum(), tuple(shares), float(changed))


def divergence(before_SV: Tensor, after_SV: Tensor) -> Tensor:
    """KL(before || after) at each position (S), in nats."""
    wide = torch.promote_types(before_SV.dtype, torch.float32)
    before, after = before_SV.to(wide).log_softmax(1), after_SV.to(wide).log_softmax(1)
    return (before.exp() * (before - after)).sum(1)


class _Cache:
    """Tensors by key, the least recently used dropped when they would take more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._kept: OrderedDict[object, Tensor] = OrderedDict()

    def get(self, key: object) -> Tensor | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: object, value: Tensor) -> Tensor:
        value = value.clone()
        self._kept[key] = value
        self._held += value.nbytes
        while self._held > self._limit:
            _, dropped = self._kept.popitem(last=False)
            self._held -= dropped.nbytes
        return value


def _stop_with(seen: list[Tensor]) -> Callable[[Tensor], None]:
    def stop(states: Tensor) -> None:
        seen.append(states.detach())
        raise StopForward

    return stop
