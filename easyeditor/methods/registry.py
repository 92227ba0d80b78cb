"""The one table of methods. A new method is one row: name, module of its hyper-parameters, module of its code."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from easyeditor.errors import ConfigError
from easyeditor.hparams import HyperParams, read_yaml, yaml_path

if TYPE_CHECKING:
    from easyeditor.methods.base import EditMethod


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """Where a method lives; imported when it is asked for, so that reading a YAML loads no torch."""

    hparams: str
    method: str
    paper: str


METHODS: dict[str, MethodRow] = {
    "ROME": MethodRow(
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="https://arxiv.org/abs/2202.05262; C-ROME: https://arxiv.org/abs/2406.11263",
    ),
    "MEMIT": MethodRow(
        hparams="easyeditor.methods.memit.hparams:MEMITHyperParams",
        method="easyeditor.methods.memit.method:MEMIT",
        paper="https://arxiv.org/abs/2210.07229",
    ),
    "MEND": MethodRow(
        hparams="easyeditor.methods.mend.hparams:MENDHyperParams",
        method="easyeditor.methods.mend.method:MEND",
        paper="https://arxiv.org/abs/2110.11309",
    ),
    "FT": MethodRow(
        hparams="easyeditor.methods.ft.hparams:FTHyperParams",
        method="easyeditor.methods.ft.method:FT",
        paper="FT-L: https://arxiv.org/abs/2012.00363",
    ),
}


def hparams_class(alg_name: str) -> type[HyperParams]:
    """The hyper-parameter class of a method. Raises ConfigError listing the methods."""
    return _load(_row(alg_name).hparams)


def method_class(alg_name: str) -> type[EditMethod[Any]]:
    """The class of a method. Raises ConfigError listing the methods."""
    return _load(_row(alg_name).method)


def load_hparams(name: str) -> HyperParams:
    """Read a YAML file of any method: `alg_name` says which."""
    path = yaml_path(name)
    values = read_yaml(path)
    alg_name = values.get("alg_name")
    if not isinstance(alg_name, str) or alg_name not in METHODS:
        raise ConfigError(f"{path}: alg_name is {alg_name!r}; allowed: {', '.join(METHODS)}")
    return hparams_class(alg_name).from_dict(values, where=str(path))


def _row(alg_name: str) -> MethodRow:
    if alg_name not in METHODS:
        raise ConfigError(f"method {alg_name!r} is not known; there are: {', '.join(METHODS)}")
    return METHODS[alg_name]


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
