"""Hyper-parameters that methods editing chosen layers share."""

from __future__ import annotations

from dataclasses import dataclass

from easyeditor.hparams import HyperParams, require


@dataclass(kw_only=True)
class LayerHyperParams(HyperParams):
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
