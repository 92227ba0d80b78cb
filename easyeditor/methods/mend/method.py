"""MEND: the gradient of one fact, turned into an edit by a trained hypernetwork.

Axes: N tokens, K width of a layer's input, D width of its output, r rank of an update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import NumericalError
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import Anatomy, longest
from easyeditor.lm.budget import Budget
from easyeditor.lm.factors import FACTORS_COST, edited_losses
from easyeditor.lm.loading import input_device
from easyeditor.lm.scored import Batch, Line, line
from easyeditor.lm.tokens import check_length, whole
from easyeditor.lm.weights import frozen
from easyeditor.methods.base import MemoryNeeds
from easyeditor.methods.gradient import GradientMethod
from easyeditor.methods.mend.archive import read_archive
from easyeditor.methods.mend.hparams import MENDHyperParams, MENDTrainingHparams
from easyeditor.methods.mend.hypernet import EditedWeight, Factors, Hypernetwork, edited_weights, nonzero_rows
from easyeditor.methods.mend.network import NetworkSpec
from easyeditor.methods.mend.passes import read_factors
from easyeditor.values.edit import EditRequest, EditResult, LayerTrace, WeightDelta


@dataclass
class Part:
    """What one request contributes to one weight: the update left @ right."""

    weight: EditedWeight
    left: Tensor
    right: Tensor


@dataclass
class Edit:
    """One request's parts and its NLL before the edit."""

    loss: float
    parts: list[Part] = field(default_factory=list)


class MEND(GradientMethod[MENDHyperParams]):
    """Model Editor Networks with Gradient Decomposition (Mitchell et al. 2022, arXiv 2110.11309).

    For each edited weight the gradient of the target's NLL is a sum over tokens of delta x^T. The hypernetwork maps
    (x, delta) to (x~, delta~); the edit is lr * sum of delta~ x~^T, lr learned for each weight. An edit of several
    requests is the sum of their single edits.
    """

    gradient_cost: ClassVar[int] = FACTORS_COST

    @classmethod
    def memory(cls, hparams: MENDHyperParams, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        """The hypernetwork; with `training` also gradient, Adam's moments and what is kept of the requests."""
        weights = edited_weights(parts, hparams.inner_params or [])
        with torch.device("meta"):
            network = Hypernetwork(NetworkSpec.of(hparams), weights, edit_lr=0.0, generator=torch.Generator())
        size = 4 * sum(p.numel() for p in network.parameters())
        if isinstance(hparams, MENDTrainingHparams) and training:
            size = 4 * size + hparams.cache_mb * 2**20
        return MemoryNeeds(network=size)

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: MENDHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self.hypernet = read_archive(hparams.archive, self.parts, inner_params=hparams.inner_params)
        self._budget = Budget(max(1, self.batch_tokens // self.gradient_cost))

    @property
    def layers(self) -> list[int]:
        return sorted({weight.layer for weight in self.hypernet.weights})

    @property
    def weight_names(self) -> list[str]:
        return [weight.name for weight in self.hypernet.weights]

    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """Low-rank deltas, one for each edited weight.

        Raises:
            DataError: a request too long for the model. NumericalError: a non-finite update.
        """
        started = time.perf_counter()
        lines = [self._line(request) for request in requests]
        edits: list[Edit] = []
        with frozen(self.model):
            made: dict[int, Edit] = {}

            def edit(batch: list[int]) -> None:
                made.update(zip(batch, self._edits([lines[i] for i in batch]), strict=True))
                if progress is not None:
                    progress(len(made), len(lines), "")

            self._budget.each([len(x.ids) for x in lines], edit)
            edits = [made[i] for i in range(len(lines))]
            deltas = tuple(self._delta(weight, edits) for weight in self.hypernet.weights)
            after = edited_losses(self.model, lines, deltas, self._budget)
        traces = [_traces(edit, loss) for edit, loss in zip(edits, after, strict=True)]
        return self.result(requests, deltas, traces, time.perf_counter() - started)

    def _line(self, request: EditRequest) -> Line:
        made = line(self.tok, request.prompt, request.target_new, self.prompting)
        check_length([made.ids], longest(self.model, self.hparams.max_length), lambda _: whole(request))
        return made

    def _edits(self, lines: Sequence[Line]) -> list[Edit]:
        """The single edits of some requests; rows do not touch each other, so each gets the gradient of its own NLL."""
        factors, losses_B = read_factors(self.parts, self.hypernet.weights, Batch.of(lines, input_device(self.model)))
        rows = nonzero_rows(
            {
                (row, name): Factors(f.x_NK[row], f.delta_ND[row])
                for row in range(len(lines))
                for name, f in factors.items()
            }
        )
        edits = [Edit(loss) for loss in losses_B.tolist()]
        with torch.no_grad():
            for row, edit in enumerate(edits):
                made = self.hypernet.updates({name: rows[row, name] for name in factors})
                for weight in self.hypernet.weights:
                    left, right = made[weight.name]
                    edit.parts.append(Part(weight, left * self.hparams.lr_scale, right))
            _check_finite([part for edit in edits for part in edit.parts])
        return edits

    def _delta(self, weight: EditedWeight, edits: Sequence[Edit]) -> WeightDelta:
        """All requests' updates of one weight; as one matrix where the factors would be larger than it."""
        mine = [part for edit in edits for part in edit.parts if part.weight == weight]
        dtype = torch.promote_types(self.model.get_parameter(weight.name).dtype, torch.float32)
        left = torch.cat([part.left for part in mine], dim=1).to(dtype)
        right = torch.cat([part.right for part in mine], dim=0).to(dtype)
        return WeightDelta.of(weight.name, left, right, transposed=False, contiguous=True, smaller=True)


def _check_finite(parts: Sequence[Part]) -> None:
    finite = torch.stack([part.left.isfinite().all() & part.right.isfinite().all() for part in parts]).tolist()
    for part, fine in zip(parts, finite, strict=True):
        if not fine:
            raise NumericalError(f"the update of {part.weight.name} is not finite; nothing was written")


def _traces(edit: Edit, loss_after: float) -> Mapping[int, LayerTrace]:
    layers = sorted({part.weight.layer for part in edit.parts})
    return {
        layer: _trace([part for part in edit.parts if part.weight.layer == layer], edit.loss, loss_after)
        for layer in layers
    }


def _trace(parts: Sequence[Part], before: float, after: float) -> LayerTrace:
    """The size of the update over the weights of one layer, and the request's NLL before and after the whole edit."""
    size = math.sqrt(math.fsum(WeightDelta(name=p.weight.name, left=p.left, right=p.right).norm() ** 2 for p in parts))
    return LayerTrace.without_keys(before=before, after=after, steps=1, delta_norm=size)
