"""Hyper-parameters shared by MEMIT and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from easyeditor.base.hparams import require
from easyeditor.methods.locate.hparams import LocateHyperParams


@dataclass(kw_only=True)
class SpreadHyperParams(LocateHyperParams):
    """Many facts at once, spread over several layers."""

    mom2_update_weight: float
    """Weight λ of the second moment against the new keys: larger keeps old knowledge more, and changes less. 0
    leaves it out, where `held_short_weight` or `held_prompts` holds something in its place."""
    held_own_templates: int = 0
    """Other names put into each request's own prompt in its subject's place, whose keys an edit then holds in place
    (docs/methods.md); 0: none."""
    held_names: str | None = None
    """JSON file of these names: a list, or an object from a prompt with {} in the subject's place to the names of that
    kind; prompts that it lacks take names of all kinds. null: data/names.json."""
    held_prompts: str | None = None
    """JSON file, a list of prompts whose keys are held in place."""
    held_prompt_weight: float = 0.0
    """Weight of the second moment of the keys of `held_prompts`, and of that of the own templates."""
    held_short_weight: float = 0.0
    """Weight of the second moment of the keys of short sentences (data/texts.txt)."""
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

    @property
    def scale(self) -> float:
        """What the other weights are divided by where C has weight 1: λ, or 1 without C."""
        return self.mom2_update_weight or 1.0

    def reads(self) -> dict[str, Any]:
        return {**super().reads(), "held_names": self.held_names, "held_prompts": self.held_prompts}

    def validate(self, where: str) -> None:
        super().validate(where)
        self._check_held(where)
        self.need_positive(where, "batch_size", allowed="1 or more, or null")
        self.need(where, ["mom2_adjustment"], bool, f"true: {self.alg_name} needs statistics")
        require(self.layers == sorted(self.layers), where, "layers", self.layers, "layers in ascending order")
        self.need_positive(where, "norm_anchor_value", allowed="a number above 0, or null")
        self.need_positive(where, "nas_restart", allowed="1 or more")
        require(0 < self.nas_quantile <= 1, where, "nas_quantile", self.nas_quantile, "above 0, at most 1")

    def _check_held(self, where: str) -> None:
        weights = "mom2_update_weight", "held_short_weight", "held_prompt_weight", "held_own_templates"
        self.need_nonnegative(where, *weights)
        shown = self.held_own_templates > 0 or self.held_prompts is not None
        fits, allowed = (
            (self.held_prompt_weight > 0) == shown,
            "above 0 with held_own_templates or held_prompts, else 0",
        )
        require(fits, where, "held_prompt_weight", self.held_prompt_weight, allowed)
        fits = self.held_names is None or self.held_own_templates > 0
        require(fits, where, "held_names", self.held_names, "null, unless held_own_templates is above 0")
        fits = self.mom2_update_weight > 0 or self.held_short_weight > 0 or self.held_prompts is not None
        allowed = "a number above 0; 0 only with held_short_weight or held_prompts"
        if self.protect_first_tokens:
            fits, allowed = self.mom2_update_weight > 0, "a number above 0 with protect_first_tokens"
        require(fits, where, "mom2_update_weight", self.mom2_update_weight, allowed)
