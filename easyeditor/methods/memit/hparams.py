"""Hyper-parameters of MEMIT, MEMIT-Seq and ENCORE: every key of the upstream files, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyeditor.methods.locate.spread_hparams import SpreadHyperParams


@dataclass(kw_only=True)
class MEMITHyperParams(SpreadHyperParams):
    """MEMIT (Meng et al. 2023) and what differs from it by what else it holds in place."""

    alg_name: str = "MEMIT"
    earlier_keys: Literal["forgotten", "edited", "solved"] = "forgotten"
    """Keys of committed edits, held in place by later ones: none (MEMIT), those read on the edited model (MEMIT-Seq),
    or those the edit was solved with (ENCORE)."""
    update_norm_lambda: float = 0.0
    """Weight γ of ‖ΔW‖² in what an edit minimises (ENCORE)."""

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_nonnegative(where, "update_norm_lambda")
