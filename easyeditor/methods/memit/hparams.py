"""MEMIT's hyper-parameters: every key of the upstream YAML files, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyeditor.hparams import require
from easyeditor.methods.locate.hparams import LocateHyperParams


@dataclass(kw_only=True)
class MEMITHyperParams(LocateHyperParams):
    """MEMIT (Meng et al. 2023)."""

    alg_name: str = "MEMIT"
    mom2_update_weight: float
    """Weight λ of the second moment against the new keys: larger keeps old knowledge more, and changes less."""
    batch_size: int | None = None
    """Facts in one edit of `batch_edit`; null: all of them."""
    layer_selection: Literal["all"] = "all"
    """Upstream's key; only `all` exists."""

    def validate(self, where: str) -> None:
        super().validate(where)
        require(self.mom2_update_weight > 0, where, "mom2_update_weight", self.mom2_update_weight, "a number above 0")
        require(
            self.batch_size is None or self.batch_size > 0, where, "batch_size", self.batch_size, "1 or more, or null"
        )
        require(self.mom2_adjustment, where, "mom2_adjustment", self.mom2_adjustment, "true: MEMIT needs statistics")
        require(self.layers == sorted(self.layers), where, "layers", self.layers, "layers in ascending order")
