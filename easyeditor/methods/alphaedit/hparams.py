"""Hyper-parameters of AlphaEdit, NAS and SPHERE: every key of the upstream files, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyeditor.base.hparams import require
from easyeditor.methods.locate.spread_hparams import SpreadHyperParams


@dataclass(kw_only=True)
class AlphaEditHyperParams(SpreadHyperParams):
    """AlphaEdit (Fang et al. 2024)."""

    alg_name: str = "AlphaEdit"
    mom2_update_weight: float = 15000.0
    """Read for compatibility; AlphaEdit's equation has no λ. 0 leaves C out of the sum whose null space is taken."""
    nullspace_threshold: float = 2e-2
    """Singular values of C below this span the null space in which an update may move."""
    nullspace_scale: Literal["absolute", "relative"] = "absolute"
    """Is the threshold a number, as published, or a multiple of C's largest singular value, which means the same for
    every model?"""
    L2: float = 10.0
    """Weight of ‖ΔW‖² in what an edit minimises."""

    @property
    def scale(self) -> float:
        """C has weight 1, as have the other weights."""
        return 1.0

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_positive(where, "nullspace_threshold", allowed="above 0")
        self.need_positive(where, "L2")
        allowed = "0: a null space is made once, not for every edit"
        require(self.held_own_templates == 0, where, "held_own_templates", self.held_own_templates, allowed)
