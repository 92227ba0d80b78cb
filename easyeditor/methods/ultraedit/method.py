"""UltraEdit: one closed-form step along normalised gradients, no search and no training.

Axes: N answer tokens of all requests, K width of a module's input, D width of its output, W = K + D.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import DataError, NumericalError
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import max_positions
from easyeditor.lm.budget import Budget
from easyeditor.lm.factors import FACTORS_COST, edited_losses, gradient_factors
from easyeditor.lm.loading import input_device
from easyeditor.lm.scored import Batch, Line, line
from easyeditor.lm.tokens import check_length, whole
from easyeditor.lm.weights import frozen
from easyeditor.methods.base import EditMethod
from easyeditor.methods.gradient import EditedWeight, GradientMethod, edited_weights
from easyeditor.methods.memory import Memory
from easyeditor.methods.ultraedit.hparams import UltraEditHyperParams
from easyeditor.methods.ultraedit.step import merged, solved, statistics, targets
from easyeditor.values.edit import EditRequest, EditResult, WeightDelta

LOG = logging.getLogger(__name__)

ALONE = "a single answer token has no deviation to be normalised by; edit several requests at once"


class UltraEdit(GradientMethod[UltraEditHyperParams]):
    """UltraEdit (Gu et al. 2025, arXiv 2505.14679).

    The keys H (N, K) and gradients G (N, D) of every answer token are normalised by their running mean and deviation
    over all edits, this one included; V = -lr |h^|^2 g^, and dW^T = (H^T H + I)^-1 H^T V. The statistics are what it
    remembers; rows are in `step.py`.
    """

    gradient_cost: ClassVar[int] = FACTORS_COST
    keeps_repeats: ClassVar[bool] = True  # a repeat weighs in the means, as in the published code

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: UltraEditHyperParams) -> None:
        super().__init__(model, tok, hparams)
        names = [f"{name.removesuffix('.weight')}.weight" for name in hparams.inner_params]
        self._weights = edited_weights(self.parts, names)
        self._budget = Budget(max(1, self.batch_tokens // self.gradient_cost))
        self._memory: Memory[Mapping[str, Tensor]] = Memory({}, self._with)

    @property
    def layers(self) -> list[int]:
        return sorted({weight.layer for weight in self._weights})

    @property
    def weight_names(self) -> list[str]:
        return [weight.name for weight in self._weights]

    def committed(self, result: EditResult) -> None:
        self._memory.committed(result)

    def reverted(self, result: EditResult | None) -> None:
        self._memory.reverted(result)

    def take_over(self, other: EditMethod[Any]) -> None:
        if isinstance(other, UltraEdit):
            self._memory = other._memory

    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """One low-rank delta per module, for all `requests` at once.

        Raises:
            DataError: a request too long for the model. NumericalError: an update is not finite.
        """
        started = time.perf_counter()
        lines = [line(self.tok, request.prompt, request.target_new, self.prompting) for request in requests]
        check_length([x.ids for x in lines], max_positions(self.model), lambda i: whole(requests[i]))
        with frozen(self.model):
            rows, before = self._rows(lines, progress)
            own = self._statistics(rows, [len(x.labels) for x in lines])
            known = self._with(self._memory.state, own)
            deltas = tuple(self._delta(w, torch.cat(rows[w.module]), known[_memory(w)]) for w in self._weights)
            after = edited_losses(self.model, lines, deltas, self.budget)
        norms = {delta.name: delta.norm() for delta in deltas}
        if not any(norms.values()):
            LOG.warning("%s: the edit changes nothing: %s", self.title, ALONE)
        traces = [self.trace(norms, before=b, after=a, steps=1) for b, a in zip(before, after, strict=True)]
        return self.result(requests, deltas, traces, time.perf_counter() - started, own)

    def _rows(self, lines: Sequence[Line], progress: Progress | None) -> tuple[dict[str, list[Tensor]], list[float]]:
        """By module, of each request, keys and gradients (n, W) of its n answer tokens; and every request's NLL.

        A gradient is that of the mean over the answer tokens of the `together` requests in one group.
        """
        size = self.hparams.together
        shares = [1 / sum(len(x.labels) for x in lines[i - i % size :][:size]) for i in range(len(lines))]
        rows: dict[str, list[Tensor]] = {w.module: [torch.empty(0)] * len(lines) for w in self._weights}
        losses = [math.nan] * len(lines)
        done = 0

        def read(members: list[int]) -> None:
            nonlocal done
            batch = Batch.of([lines[i] for i in members], input_device(self.model))
            weights = [shares[i] for i in members for _ in lines[i].labels]
            weights_N = torch.tensor(weights).to(batch.weights_N.device, non_blocking=True)
            batch = dataclasses.replace(batch, weights_N=weights_N)
            factors, losses_B = gradient_factors(self.model, list(rows), batch)
            lengths = [len(lines[i].labels) for i in members]
            for path, (x_BTK, gradient_BTD) in factors.items():
                at = batch.rows_N.to(x_BTK.device), batch.positions_N.to(x_BTK.device)
                rows_NW = torch.cat([x_BTK[at].double(), gradient_BTD[at].double()], dim=1)
                for i, own_nW in zip(members, torch.split(rows_NW, lengths), strict=True):
                    rows[path][i] = own_nW
            for i, loss, length in zip(members, losses_B.tolist(), lengths, strict=True):
                losses[i] = loss / shares[i] / length
            done += len(members)
            if progress is not None:
                progress(done, len(lines), "")

        self._budget.each([len(x.ids) for x in lines], read)
        return rows, losses

    def _statistics(self, rows: Mapping[str, list[Tensor]], lengths: Sequence[int]) -> dict[str, Tensor]:
        """Statistics of this edit's rows by shape: group after group, modules of one shape together."""
        found: dict[str, Tensor] = {}
        for first in range(0, len(lengths), self.hparams.together):
            for weight in self._weights:
                group_NW = torch.cat(rows[weight.module][first : first + self.hparams.together])
                found = self._with(found, {_memory(weight): statistics(group_NW)})
        return found

    def _with(self, known: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = dict(known)
        for name, weight in {_memory(w): w for w in self._weights if _memory(w) in more}.items():
            wanted, theirs = (3, weight.inputs + weight.outputs), more[name]
            if theirs.shape != wanted:
                raise DataError(f"a saved edit's {name} is {tuple(theirs.shape)}, not {wanted}: another model's")
            theirs = theirs.to(self.model.get_parameter(weight.name).device)
            made[name] = merged(made[name], theirs) if name in made else theirs
        return made

    def _delta(self, weight: EditedWeight, rows_NW: Tensor, known_3W: Tensor) -> WeightDelta:
        keys_NK, gradients_ND = rows_NW[:, : weight.inputs], rows_NW[:, weight.inputs :]
        known_3W = known_3W.to(rows_NW.device)  # modules of one shape may lie on several cards
        left, right = solved(keys_NK, targets(keys_NK, gradients_ND, known_3W, self.hparams.lr))
        name = weight.name
        if not all(bool(part.isfinite().all()) for part in (left, right) if part is not None):
            raise NumericalError(f"the update of {name} is not finite; nothing was written")
        dtype = torch.promote_types(self.model.get_parameter(name).dtype, torch.float32)
        return WeightDelta.of(
            name, left, right, transposed=weight.transposed, dtype=dtype, contiguous=True, smaller=True
        )


def _memory(weight: EditedWeight) -> str:
    """Name of the statistics of a weight's shape, which weights share."""
    return f"norm.{weight.inputs}x{weight.outputs}"
