"""Hyper-parameters that methods share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from easyeditor.hparams import HyperParams, require
from easyeditor.methods.registry import canonical, completed
from easyeditor.methods.table import METHODS

M = TypeVar("M", bound="MethodHyperParams")


@dataclass(kw_only=True)
class MethodHyperParams(HyperParams):
    """Hyper-parameters of a method in the table; its row may preset some (C-ROME is ROME with `if_c_rome: true`)."""

    @classmethod
    def from_dict(cls: type[M], values: Mapping[str, Any], where: str = "hparams") -> M:
        return super().from_dict(completed(cls, values, where), where)

    def override(self: M, settings: Iterable[str]) -> M:
        listed = list(settings)
        name = next((canonical(s.partition("=")[2].strip()) for s in listed if s.partition("=")[0] == "alg_name"), None)
        row = METHODS[name or self.alg_name]
        implied = {**row.defaults, **row.preset} if name not in (None, self.alg_name) else {}
        return super().override([*(f"{key}={value}" for key, value in implied.items()), *listed])


@dataclass(kw_only=True)
class LayerHyperParams(MethodHyperParams):
    """Which modules a method changes: the keys every upstream YAML of such a method has."""

    layers: list[int]
    """Layers edited."""
    rewrite_module_tmp: str | None = None
    """Module whose weight changes, {} for the layer; by default known from the model's type."""
    layer_module_tmp: str | None = None
    """Decoder block, {} for the layer; by default known from the model's type."""
    mlp_module_tmp: str | None = None
    """MLP module, {} for the layer; by default known from the model's type."""
    attn_module_tmp: str | None = None
    """Attention module; read for compatibility, not used."""
    ln_f_module: str | None = None
    """Final norm; read for compatibility: the model's own forward is used."""
    lm_head_module: str | None = None
    """Output head; read for compatibility: the model knows its head, tied or renamed."""

    def validate(self, where: str) -> None:
        super().validate(where)
        require(len(self.layers) > 0, where, "layers", self.layers, "a list of at least one layer")
        require(min(self.layers) >= 0, where, "layers", self.layers, "layer numbers from 0")
        require(len(set(self.layers)) == len(self.layers), where, "layers", self.layers, "each layer once")
        for key in ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp"):
            value = getattr(self, key)
            require(value is None or value.count("{}") == 1, where, key, value, "a module path with one {}")
