"""Hyper-parameters shared by MEMIT and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyeditor.base.hparams import require
from easyeditor.methods.locate.hparams import LocateHyperParams


@dataclass(kw_only=True)
class SpreadHyperParams(LocateHyperParams):
    """Many facts at once, spread over several layers."""

    mom2_update_weight: float
    """Weight λ of the second moment against the new keys: larger keeps old knowledge more, and changes less."""
    batch_size: int | None = None
    """Facts in one edit of `batch_edit`; null: all of them."""
    layer_selection: Literal["all"] = "all"
    """Upstream's key; only `all` exists."""
    norm_anchor: bool = False
    """NAS: give every target the norm of an ordinary edit's (Norm Anchors Make Model Edits Last, arXiv 2602.02543)."""
    norm_anchor_value: float | None = None
    """The anchor m, ‖v*‖; null measures it once, on the unedited model."""
    nas_restart: int = 1000
    """Facts of `data/facts.json` (drawn by `seed`) the anchor is measured on."""
    nas_quantile: float = 0.95
    """Share of the measured norms, smallest first, whose mean is the anchor."""

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_positive(where, "mom2_update_weight")
        self.need_positive(where, "batch_size", allowed="1 or more, or null")
        self.need(where, ["mom2_adjustment"], bool, f"true: {self.alg_name} needs statistics")
        require(self.layers == sorted(self.layers), where, "layers", self.layers, "layers in ascending order")
        self.need_positive(where, "norm_anchor_value", allowed="a number above 0, or null")
        self.need_positive(where, "nas_restart", allowed="1 or more")
        require(0 < self.nas_quantile <= 1, where, "nas_quantile", self.nas_quantile, "above 0, at most 1")
