"""Hyper-parameters that methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from easyeditor.base.hparams import HyperParams, parse_settings, require
from easyeditor.base.plain_yaml import yaml_path
from easyeditor.methods.registry import canonical, completed, read_values, renamed, told
from easyeditor.methods.table import METHODS

M = TypeVar("M", bound="MethodHyperParams")


@dataclass(kw_only=True)
class MethodHyperParams(HyperParams):
    """Hyper-parameters of a method in the table; its row may preset some (C-ROME is ROME with `if_c_rome: true`)."""

    @classmethod
    def from_hparams(cls: type[M], name: str | Path, settings: Iterable[str] = ()) -> M:
        """Read one file, YAML or JSON, with `key=value` texts over it; `.yaml` is appended unless the name has an
        ending.

        Raises:
            ConfigError: missing, empty or binary file; unknown or missing key, one with two values; wrong type.
        """
        path = yaml_path(name)
        return cls.from_dict(cls.merged(read_values(path), settings), told(str(path), settings))

    @classmethod
    def from_dict(cls: type[M], values: Mapping[str, Any], where: str = "hparams") -> M:
        return super().from_dict(completed(cls, values, where), where)

    def need(self, where: str, keys: Iterable[str], fits: Callable[[Any], bool], allowed: str) -> None:
        """`require` of several keys; null is right wherever a key's type has it."""
        for key in keys:
            value = getattr(self, key)
            require(value is None or fits(value), where, key, value, allowed)

    def need_positive(self, where: str, *keys: str, allowed: str = "a number above 0") -> None:
        """`need` of numbers above 0."""
        self.need(where, keys, lambda value: value > 0, allowed)

    def need_nonnegative(self, where: str, *keys: str) -> None:
        """`need` of numbers from 0 on."""
        self.need(where, keys, lambda value: value >= 0, "0 or more")

    @classmethod
    def merged(cls, values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
        values, given = renamed(cls, values, parse_settings(settings))
        made = cls.updated(values, given)
        before, now = canonical(values.get("alg_name")), canonical(made.get("alg_name"))
        if before is None or now is None or now == before:
            return made
        row = METHODS[now]
        return {**values, **row.defaults, **row.preset, **given}


@dataclass(kw_only=True)
class ModuleHyperParams(MethodHyperParams):
    """Where a model keeps its parts: the keys every upstream YAML of ROME's kind has."""

    rewrite_module_tmp: str | None = None
    """Last projection of the MLP, {} for the layer; by default known from the model's type, or found."""
    layer_module_tmp: str | None = None
    """Decoder block, {} for the layer; by default known from the model's type, or found."""
    mlp_module_tmp: str | None = None
    """MLP module, {} for the layer; by default known from the model's type, or found."""
    attn_module_tmp: str | None = None
    """Attention module; read for compatibility, not used."""
    ln_f_module: str | None = None
    """Final norm; read for compatibility: the model's own forward is used."""
    lm_head_module: str | None = None
    """Output head; read for compatibility: the model knows its head, tied or renamed."""

    @property
    def templates(self) -> dict[str, str | None]:
        """The three names as `lm.architectures.anatomy` takes them."""
        rewrite = self.rewrite_module_tmp and self.rewrite_module_tmp.removesuffix(".weight")
        return {"block": self.layer_module_tmp, "mlp": self.mlp_module_tmp, "rewrite": rewrite}

    def validate(self, where: str) -> None:
        super().validate(where)
        for key in ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp"):
            value = getattr(self, key)
            require(value is None or value.count("{}") == 1, where, key, value, "a module path with one {}")


@dataclass(kw_only=True)
class LayerHyperParams(ModuleHyperParams):
    """Which layers a method changes."""

    layers: list[int]
    """Layers edited."""

    def validate(self, where: str) -> None:
        super().validate(where)
        require(len(self.layers) > 0, where, "layers", self.layers, "a list of at least one layer")
        require(min(self.layers) >= 0, where, "layers", self.layers, "layer numbers from 0")
        require(len(set(self.layers)) == len(self.layers), where, "layers", self.layers, "each layer once")
