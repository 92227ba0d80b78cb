"""MEMIT, MEMIT-Seq, ENCORE: many facts at once, spread over several layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from easyeditor.lm.architectures import Anatomy
from easyeditor.methods.base import MemoryNeeds
from easyeditor.methods.locate.holding import HoldingMethod
from easyeditor.methods.locate.norm_anchor import NormAnchor
from easyeditor.methods.locate.spread import Adjuster, Spread
from easyeditor.methods.memit.hparams import MEMITHyperParams


class MEMIT(HoldingMethod[MEMITHyperParams]):
    """Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv 2210.07229, algorithm 1):
    dW = R K^T (lambda C + gamma I + K_p K_p^T + K K^T)^-1, gamma and K_p zero in MEMIT itself.

    MEMIT-Seq (arXiv 2605.26670) also holds the keys K_p of earlier edits in place; ENCORE (Gupta et al. 2025, arXiv
    2502.01636) the size of the update as well, and stops the value search once the target is the first choice.
    """

    @classmethod
    def memory(cls, hparams: MEMITHyperParams, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        """C, and C + gamma I with `update_norm_lambda`; the inverse with earlier keys takes their place."""
        needs = super().memory(hparams, parts)
        return replace(needs, matrices=needs.matrices + (hparams.update_norm_lambda > 0))

    adjusters: ClassVar[tuple[type[Adjuster], ...]] = (NormAnchor,)

    @property
    def ridge(self) -> float:
        return self.hparams.update_norm_lambda

    def to_remember(self, spread: Spread) -> Mapping[str, Tensor]:
        kept = self.hparams.earlier_keys
        if kept == "forgotten":
            return {}
        return {**(self.keys_after(spread) if kept == "edited" else spread.keys), **self.own_moments}
