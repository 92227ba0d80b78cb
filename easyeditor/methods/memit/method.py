"""MEMIT: many facts at once, spread over several layers. Axes: N requests, K key width, D model width."""

from __future__ import annotations

from torch import Tensor

from easyeditor.methods.locate.spread import SpreadMethod
from easyeditor.methods.locate.updates import spread_update
from easyeditor.methods.memit.hparams import MEMITHyperParams


class MEMIT(SpreadMethod[MEMITHyperParams]):
    """Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv 2210.07229, algorithm 1)."""

    def solve(self, layer: int, keys_KN: Tensor, residual_DN: Tensor) -> tuple[Tensor, Tensor]:
        """dW = R K^T (lambda C + K K^T)^-1."""
        held_KK = self.preserved(layer)
        assert held_KK is not None  # MEMIT's hyper-parameters demand statistics
        adjusted_KN = spread_update(keys_KN, self.hparams.mom2_update_weight * held_KK)
        return residual_DN, adjusted_KN.T
