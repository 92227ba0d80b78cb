"""EMMET: ROME's equality constraint for many facts. Axes: N requests, K key width, D model width."""

from __future__ import annotations

from torch import Tensor

from easyeditor.methods.emmet.hparams import EMMETHyperParams
from easyeditor.methods.locate.norm_anchor import AnchoredMethod
from easyeditor.methods.locate.updates import answering


class EMMET(AnchoredMethod[EMMETHyperParams]):
    """Equality-constrained Mass Model Editing in a Transformer (Gupta et al. 2024, arXiv 2403.14236)."""

    def solve(self, layer: int, keys_KN: Tensor, residual_DN: Tensor) -> tuple[Tensor, Tensor]:
        """dW = R (K^T C'^-1 K + mu I)^-1 K^T C'^-1, C' = lambda C + gamma I; mu only for more than one request."""
        h = self.hparams
        several = keys_KN.shape[1] > 1 or h.emmet_lambda_single
        ridge = h.emmet_lambda if several else 0.0
        return residual_DN, answering(keys_KN, self.unedited(layer, keys_KN), ridge).T

    @property
    def size_weight(self) -> float:
        return self.hparams.update_norm_lambda
