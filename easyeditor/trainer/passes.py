"""One training step's forwards: edit, post-edit and locality; plain, and sharing all that an edit cannot change.

Axes: B rows, T tokens, S scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from easyeditor.base.process import look
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import (
    Passage,
    StopForward,
    captured,
    replaced,
    resumed,
    selected_head,
    stopping,
    tapped,
    watched,
)
from easyeditor.lm.loading import input_device
from easyeditor.lm.prefixes import unmasked
from easyeditor.lm.scored import Batch, Line, nll, row_sums, scored_logits
from easyeditor.methods.mend.hypernet import EditedWeight, Factors, Hypernetwork, nonzero_rows
from easyeditor.methods.mend.passes import read_factors


@dataclass(frozen=True)
class Pool:
    """All texts of one request: the edit first, then what else must give the new answer, then locality.

    They are always run together, so that the numbers kept for a text do not depend on what a step happened to need.
    """

    key: tuple[str, int]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Draw:
    """What one step takes from a pool: numbers of its lines."""

    pool: Pool
    outer: tuple[int, ...]
    locality: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """One step: the requests edited together, what must hold after the edit (`outer`), what must stay (`locality`)."""

    draws: tuple[Draw, ...]

    @property
    def edit(self) -> list[Line]:
        """The lines that are edited."""
        return [draw.pool.lines[0] for draw in self.draws]

    @property
    def outer(self) -> list[Line]:
        """The lines that must give the new answer."""
        return [draw.pool.lines[i] for draw in self.draws for i in draw.outer]

    @property
    def locality(self) -> list[Line]:
        """The lines whose answers must stay."""
        return [draw.pool.lines[i] for draw in self.draws for i in draw.locality]


@dataclass(frozen=True)
class StepResult:
    """The losses of one step, differentiable in the hypernetwork, and what they mean for a user."""

    edit_loss: Tensor
    """Mean NLL of the new answers after the edit, nats per token."""
    locality_loss: Tensor
    """Mean KL(before || after) at the locality answers' positions, nats."""
    accuracy: Tensor
    """Share of right tokens after the edit, mean over the outer lines."""
    locality_drawdown: Tensor | None
    """Share of locality positions whose first choice the edit changed; None without any."""


class PlainPasses:
    """The plain way, and the oracle: four full forwards, all positions through the head, nothing kept."""

    def __init__(self, parts: Anatomy, hypernet: Hypernetwork) -> None:
        self._parts, self._hypernet = parts, hypernet
        self._patched = PatchedBlocks(parts, hypernet.weights)

    def __call__(self, tasks: Sequence[Task]) -> list[StepResult]:
        """One task after another."""
        device = input_device(self._parts.model)
        outcomes = []
        for task in tasks:
            look()
            locality = Batch.of(task.locality, device, mean=True) if task.locality else None
            edit, outer = Batch.of(task.edit, device, mean=False), Batch.of(task.outer, device, mean=True)
            outcomes.append(self.run(edit, outer, locality))
        return outcomes

    def run(self, edit: Batch, outer: Batch, locality: Batch | None) -> StepResult:
        """The same for rows made elsewhere."""
        logits = functools.partial(scored_logits, self._parts.model, whole=True)
        with torch.no_grad():
            before_SV = None if locality is None else logits(locality)
        factors, _ = read_factors(self._parts, self._hypernet.weights, edit, whole=True)
        with self._patched.carrying(self._hypernet.updates(nonzero_rows(factors))):
            outer_SV = logits(outer)
            after_SV = None if locality is None else logits(locality)
        return outcome(outer, outer_SV, locality, before_SV, after_SV)


class SharedPasses:
    """The fast way, with the plain way's numbers.

    What no edit changes is computed once per request and kept across steps and epochs: what the first edited block is
    given, the factors of the edit's gradient, what the unedited model says about locality. After the edit, outer and
    locality rows are one forward from the first edited block on; only scored positions reach the head, those of all
    tasks of an update together.
    """

    def __init__(self, parts: Anatomy, hypernet: Hypernetwork, *, cache_bytes: int) -> None:
        self._parts, self._hypernet = parts, hypernet
        self._patched = PatchedBlocks(parts, hypernet.weights)
        self._start = min(weight.layer for weight in hypernet.weights)
        self._device = input_device(parts.model)
        self._head = parts.model.get_output_embeddings()
        self._limit, self._bytes = cache_bytes, 0
        self._kept: dict[tuple[str, int], _Known] = {}  # the latest used last
        self._tuple_output = False  # known after the first forward

    def __call__(self, tasks: Sequence[Task]) -> list[StepResult]:
        """All tasks, their head rows together."""
        look()
        kept = [[self._known(draw.pool) for draw in task.draws] for task in tasks]
        before = [
            known.head[i]
            for task, knowns in zip(tasks, kept, strict=True)
            for draw, known in zip(task.draws, knowns, strict=True)
            for i in draw.locality
        ]
        inputs: list[Tensor] = []

        def stop(last_1SD: Tensor) -> None:
            inputs.append(last_1SD)
            raise StopForward

        for task, knowns in zip(tasks[:-1], kept[:-1], strict=True):
            with stopping():
                self._edited(task, knowns, stop)

        def joined(last_1SD: Tensor) -> Tensor:
            inputs.append(last_1SD)
            return torch.cat([*inputs, *(states.unsqueeze(0) for states in before)], dim=1)

        logits_SV = self._edited(tasks[-1], kept[-1], joined)
        after = torch.split(logits_SV, [states.shape[1] for states in inputs] + [sum(map(len, before))])
        return self._outcomes(tasks, after[:-1], after[-1].detach())

    def _edited(self, task: Task, knowns: Sequence[_Known], at_head: Callable[[Tensor], Tensor | None]) -> Tensor:
        """The forward of a task's outer and locality rows on the edited model; `at_head` sees what goes to the head."""
        factors = {
            weight.name: Factors(
                torch.cat([known.factors[weight.name].x_NK for known in knowns]),
                torch.cat([known.factors[weight.name].delta_ND for known in knowns]),
            )
            for weight in self._hypernet.weights
        }
        batch = Batch.of([*task.outer, *task.locality], self._device, mean=False)
        pairs = list(zip(task.draws, knowns, strict=True))
        hidden = [known.hidden[i] for draw, known in pairs for i in draw.outer]
        hidden += [known.hidden[i] for draw, known in pairs for i in draw.locality]
        with ExitStack() as stack:
            stack.enter_context(self._patched.carrying(self._hypernet.updates(factors)))
            stack.enter_context(self._resumed(hidden))
            stack.enter_context(selected_head(self._parts.model, batch.rows_N, batch.positions_N))
            stack.enter_context(tapped(self._head, on_input=at_head))
            logits_1SV: Tensor = self._parts.model(**self._unmasked(batch), use_cache=False).logits
        return logits_1SV[0]

    def _outcomes(self, tasks: Sequence[Task], after: Sequence[Tensor], before_SV: Tensor) -> list[StepResult]:
        outcomes, place = [], 0
        for task, logits_SV in zip(tasks, after, strict=True):
            outer = Batch.of(task.outer, self._device, mean=True)
            locality = Batch.of(task.locality, self._device, mean=True) if task.locality else None
            count = len(outer.labels_N)
            end = place + len(logits_SV) - count
            outcomes.append(outcome(outer, logits_SV[:count], locality, before_SV[place:end], logits_SV[count:]))
            place = end
        return outcomes

    def _resumed(self, hidden: Sequence[Tensor]) -> AbstractContextManager[None]:
        padded_BTD = torch.nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
        return resumed(self._parts.blocks, self._start, Passage(padded_BTD, self._tuple_output))

    def _known(self, pool: Pool) -> _Known:
        """What no edit changes about a pool, computed if it is not kept; the least recently used make way for it."""
        known = self._kept.pop(pool.key, None)
        if known is None:
            known = self._computed(pool)
            self._bytes += known.nbytes
        self._kept[pool.key] = known
        while self._bytes > self._limit:
            self._bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return known

    def _computed(self, pool: Pool) -> _Known:
        batch = Batch.of(pool.lines, self._device, mean=False)
        with (
            torch.no_grad(),
            watched(self._parts.block(self._start)) as passages,
            selected_head(self._parts.model, batch.rows_N, batch.positions_N),
            captured(self._head, stop=True) as head_input,
        ):
            self._parts.model(**self._unmasked(batch), use_cache=False)
        self._tuple_output = passages[0].tuple_output
        hidden = [passages[0].hidden_BTD[row, : len(x.ids)].clone() for row, x in enumerate(pool.lines)]
        head = [part.clone() for part in torch.split(head_input.given[0], [len(x.labels) for x in pool.lines])]
        with self._resumed(hidden[:1]):
            edit = Batch.of(pool.lines[:1], self._device, mean=False)
            edit = dataclasses.replace(edit, inputs=self._unmasked(edit))
            raw, _ = read_factors(self._parts, self._hypernet.weights, edit)
        return _Known(hidden, head, nonzero_rows(raw))

    def _unmasked(self, batch: Batch) -> dict[str, Any]:
        return unmasked(batch.inputs, len(self._parts.blocks))


def outcome(
    outer: Batch, outer_SV: Tensor, locality: Batch | None, before_SV: Tensor | None, after_SV: Tensor | None
) -> StepResult:
    """Losses and accuracies from the logits at the scored positions; the host waits for none of them."""
    said_N = (outer_SV.detach().argmax(1) == outer.labels_N.to(outer_SV.device)).double()
    rows_N, rows = outer.rows_N.to(said_N.device), len(outer.inputs["input_ids"])
    accuracy = (row_sums(said_N, rows_N, rows) / row_sums(torch.ones_like(said_N), rows_N, rows)).mean()
    edit_loss = nll(outer_SV, outer).sum()
    if locality is None or before_SV is None or after_SV is None:
        return StepResult(edit_loss, edit_loss.new_zeros(()), accuracy, None)
    kl_S = divergence(before_SV, after_SV)
    changed = (before_SV.argmax(1) != after_SV.detach().argmax(1)).double().mean()
    return StepResult(edit_loss, (kl_S * locality.weights_N.to(kl_S)).sum(), accuracy, changed)


def divergence(before_SV: Tensor, after_SV: Tensor) -> Tensor:
    """KL(before || after) at each position (S), in nats."""
    wide = torch.promote_types(before_SV.dtype, torch.float32)
    before, after = before_SV.to(wide).log_softmax(1), after_SV.to(wide).log_softmax(1)
    return (before.exp() * (before - after)).sum(1)


class PatchedBlocks:
    """The edited blocks as functions of their weights (`torch.func.functional_call`); every step runs them with others.

    What is called is a block's own forward: hooks of the block, accelerate's for one, have run by then.
    """

    def __init__(self, parts: Anatomy, weights: Sequence[EditedWeight]) -> None:
        self._parts = parts
        self._blocks = {layer: _OwnForward(parts.block(layer)) for layer in sorted({w.layer for w in weights})}

    @contextmanager
    def carrying(self, updates: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside the block the model runs with weight + left @ right, differentiably; no parameter is written."""
        with ExitStack() as undo:
            for layer, own in self._blocks.items():
                prefix = self._parts.architecture.block.format(layer)
                names = [name for name in updates if name.startswith(f"{prefix}.")]
                changed = {}
                for name in names:
                    weight = self._parts.model.get_parameter(name)
                    left, right = (factor.to(weight) for factor in updates[name])
                    changed[f"block{name.removeprefix(prefix)}"] = torch.addmm(weight, left, right)
                undo.enter_context(replaced(own.block, functools.partial(_called, own, changed)))
            yield


class _OwnForward(nn.Module):
    """A block's forward as a module that has the block's parameters."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self._own = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's forward gives."""
        return self._own(*args, **kwargs)


def _called(own: _OwnForward, changed: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The block with `changed` in the place of the parameters of these names."""
    return torch.func.functional_call(own, dict(changed), args, kwargs)


@dataclass(frozen=True)
class _Known:
    """What no edit changes about a pool: each line's states at the first edited block (T, D) and, at its scored
    positions, at the head (S, D); the factors of the edit's gradient."""

    hidden: list[Tensor]
    head: list[Tensor]
    factors: dict[str, Factors]

    @property
    def nbytes(self) -> int:
        pairs = [tensor for pair in self.factors.values() for tensor in (pair.x_NK, pair.delta_ND)]
        return sum(tensor.nbytes for tensor in (*self.hidden, *self.head, *pairs))
