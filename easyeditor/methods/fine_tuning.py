"""What fine-tuning methods share: Adam on the targets' NLL, each value kept within a distance of where it began.

Axes: N scored positions, L labels, B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import NumericalError
from easyeditor.base.process import look
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import Anatomy, max_positions
from easyeditor.lm.prompting import PLAIN, Prompting
from easyeditor.lm.scored import row_sums
from easyeditor.lm.tokens import Row, check_length, encode, target_ids, whole
from easyeditor.lm.tuned import TunedForward
from easyeditor.methods.base import MemoryNeeds
from easyeditor.methods.gradient import GradientMethod
from easyeditor.methods.hparams import ModuleHyperParams
from easyeditor.values.edit import EditRequest, LayerTrace

G = TypeVar("G", bound=ModuleHyperParams)

DONE_LOSS = 0.01  # a batch below this takes no step, an epoch below this ends the training (EasyEdit's published code)
BYTES_TRAINED = 20  # of a trained number, in float32: its value, its start, its gradient, Adam's two moments

Labels = tuple[tuple[int, ...], ...]
"""Of one row: for each scored position the ids scored there."""
Watch = Callable[[int, int, float], None]
"""Called after each epoch with (epoch, most epochs, mean loss)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one optimiser step: their logits (N, V) as a function of the trained weights, and each row's labels."""

    forward: Callable[[Mapping[str, Tensor]], Tensor]
    labels: tuple[Labels, ...]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings: most epochs, Adam's step and decay, the L-infinity bound (None: off)."""

    num_steps: int
    lr: float
    weight_decay: float
    bound: float | None


def fine_tune(
    copies: Mapping[str, Tensor],
    batches: Sequence[Batch] | Callable[[int], Iterable[Batch]],
    training: Training,
    watch: Watch | None = None,
) -> list[list[float]]:
    """Train `copies` in place; returns the loss of every row (nats) in every epoch, measured before its batch's step.

    `batches` are those of every epoch, or give those of epoch 1, 2, …; losses are in the order of their rows.

    A row's loss is the mean over its labels of -log p(label). A batch whose mean loss is below 0.01 takes no step, and
    training ends with the first epoch whose mean over rows is below that. After each batch every value is clamped to
    within `bound` of where it began (FT-L; Zhu et al. 2020, arXiv 2012.00363; ROME's section 3.3 baseline).

    Raises:
        NumericalError: a loss is not finite.
    """
    start = {name: copy.detach().clone() for name, copy in copies.items()}
    optimiser = torch.optim.Adam(list(copies.values()), lr=training.lr, weight_decay=training.weight_decay)
    epochs: list[list[float]] = []
    with torch.enable_grad():
        for epoch in range(1, training.num_steps + 1):
            losses: list[float] = []
            for batch in batches(epoch) if callable(batches) else batches:
                look()
                optimiser.zero_grad()
                loss_B = row_losses(batch.forward(copies), batch.labels)
                found = loss_B.tolist()
                losses += found
                if not all(map(math.isfinite, found)):
                    raise NumericalError(f"fine-tuning's loss is not finite in pass {epoch}; nothing was changed")
                if math.fsum(found) / len(found) >= DONE_LOSS:
                    torch.autograd.backward(loss_B.mean())
                    optimiser.step()
                _hold(copies, start, training.bound)
            epochs.append(losses)
            loss = sum(losses) / len(losses)
            if watch is not None:
                watch(epoch, training.num_steps, loss)
            if loss < DONE_LOSS:
                break
    return epochs


def training_row(
    tok: PreTrainedTokenizerBase, request: EditRequest, objective: str, prompting: Prompting = PLAIN
) -> tuple[Row, Labels]:
    """A request's tokens with the positions that are scored, and the target ids scored at each.

    Raises:
        DataError: the target has no tokens.
    """
    prompt = encode(tok, request.prompt, prompting)
    target = target_ids(tok, request.prompt, request.target_new, prompting)
    last = len(prompt) - 1
    if objective == "prompt_last":
        return Row(ids=tuple(prompt), lookup=last, scored=(last,)), (tuple(target),)
    ids = (*prompt, *target[:-1])
    return Row(ids=ids, lookup=last, scored=tuple(range(last, len(ids)))), tuple((label,) for label in target)


class FineTuning(GradientMethod[G], Generic[G]):
    """A method that trains something of the model on the requests."""

    @classmethod
    def memory(cls, hparams: G, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        return MemoryNeeds(of_edited=BYTES_TRAINED)

    def training_rows(self, requests: Sequence[EditRequest], objective: str) -> list[tuple[Row, Labels]]:
        """`training_row` of every request. Raises DataError for one longer than the model's positions."""
        made = [training_row(self.tok, request, objective, self.prompting) for request in requests]
        check_length([row.ids for row, _ in made], max_positions(self.model), lambda i: whole(requests[i]))
        return made

    def batch(self, made: Sequence[tuple[Row, Labels]], *, in_place: bool = False) -> Batch:
        """One optimiser step's rows; `in_place`: what is trained is in the model already."""
        rows = [row for row, _ in made]
        forward = TunedForward(self.parts, rows, first=min(self.layers), replay=bool(self.hparams.replay))
        given = (lambda _: forward({})) if in_place else forward
        return Batch(forward=given, labels=tuple(labels for _, labels in made))

    def trained_trace(self, norms: Mapping[str, float], losses: Sequence[float]) -> dict[int, LayerTrace]:
        """`trace` of a request with its loss in every epoch."""
        return self.trace(norms, before=losses[0], after=losses[-1], steps=len(losses), losses=losses)


def watching(progress: Progress | None) -> Watch | None:
    """The epochs as progress."""
    return progress and (lambda epoch, epochs, loss: progress(epoch, epochs, f"loss {loss:.3f}"))


def row_losses(logits_NV: Tensor, labels: Sequence[Labels]) -> Tensor:
    """Mean -log p(label) of each row (B,), in nats; positions follow each other row by row."""
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logs_NV = wide.log_softmax(dim=1)
    index: list[tuple[int, int, int]] = []
    place = 0
    for row, positions in enumerate(labels):
        for ids in positions:
            index += [(place, label, row) for label in ids]
            place += 1
    at_L, labels_L, row_L = torch.tensor(index).to(logs_NV.device, non_blocking=True).T
    counts_B = torch.tensor([sum(map(len, positions)) for positions in labels]).to(logs_NV, non_blocking=True)
    return row_sums(-logs_NV[at_L, labels_L], row_L, len(labels)) / counts_B


@torch.no_grad()
def _hold(copies: Mapping[str, Tensor], start: Mapping[str, Tensor], bound: float | None) -> None:
    if bound is not None:
        for name, copy in copies.items():
            copy.copy_(torch.clamp(copy, min=start[name] - bound, max=start[name] + bound))
