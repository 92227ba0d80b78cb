"""EMMET: ROME's equality constraint for many facts. Axes: N requests, K key width, D model width."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from easyeditor.lm.architectures import Anatomy
from easyeditor.methods.base import MemoryNeeds
from easyeditor.methods.emmet.hparams import EMMETHyperParams
from easyeditor.methods.locate.holding import HoldingMethod
from easyeditor.methods.locate.norm_anchor import NormAnchor
from easyeditor.methods.locate.spread import Adjuster
from easyeditor.methods.locate.updates import answering


class EMMET(HoldingMethod[EMMETHyperParams]):
    """Equality-constrained Mass Model Editing in a Transformer (Gupta et al. 2024, arXiv 2403.14236)."""

    @classmethod
    def memory(cls, hparams: EMMETHyperParams, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        """C, and C + gamma I with `update_norm_lambda`; the inverse with earlier keys takes their place."""
        needs = super().memory(hparams, parts)
        return replace(needs, matrices=needs.matrices + (hparams.update_norm_lambda > 0))

    adjusters: ClassVar[tuple[type[Adjuster], ...]] = (NormAnchor,)

    @property
    def ridge(self) -> float:
        return self.hparams.update_norm_lambda

    def solve(self, layer: int, keys_KN: Tensor, residual_DN: Tensor) -> tuple[Tensor, Tensor]:
        """dW = R (K^T C'^-1 K + mu I)^-1 K^T C'^-1, C' = lambda C + gamma I; mu only for more than one request."""
        several = keys_KN.shape[1] > 1 or self.hparams.emmet_lambda_single
        ridge = self.hparams.emmet_lambda if several else 0.0
        return residual_DN, answering(keys_KN, self.whitened(layer, keys_KN), ridge).T
