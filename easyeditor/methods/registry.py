"""From a method's name to its classes and hyper-parameters, by the table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.errors import ConfigError
from easyeditor.hparams import HyperParams, read_yaml, yaml_path
from easyeditor.methods.table import METHODS, MethodRow

LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from easyeditor.methods.base import EditMethod


def load_hparams(source: str | Path | Mapping[str, Any]) -> HyperParams:
    """Hyper-parameters of any method, from a YAML file or a mapping; `alg_name` says whose.

    Raises:
        ConfigError: an unknown method, and whatever `HyperParams.from_dict` refuses.
    """
    if isinstance(source, Mapping):
        where, values = "hparams", dict(source)
    else:
        path = yaml_path(source)
        where, values = str(path), read_yaml(path)
    name = canonical(values.get("alg_name"))
    if name is None:
        raise ConfigError(f"{where}: alg_name is {values.get('alg_name')!r}; allowed: {', '.join(METHODS)}")
    return hparams_class(name).from_dict(values, where=where)


def hparams_class(alg_name: str) -> type[HyperParams]:
    """The hyper-parameter class of a method. Raises ConfigError listing the methods."""
    return _load(row_of(alg_name).hparams)


def method_class(alg_name: str) -> type[EditMethod[Any]]:
    """The class of a method. Raises ConfigError listing the methods."""
    return _load(row_of(alg_name).method)


def row_of(alg_name: str) -> MethodRow:
    """The row of a method. Raises ConfigError listing the methods."""
    name = canonical(alg_name)
    if name is None:
        raise ConfigError(f"method {alg_name!r} is not known; there are: {', '.join(METHODS)}")
    return METHODS[name]


def canonical(alg_name: Any) -> str | None:
    """A method's name as the table has it; None for a name no row has."""
    found = (name for name, row in METHODS.items() if alg_name == name or alg_name in row.spellings)
    return next(found, None) if isinstance(alg_name, str) else None


def completed(cls: type[HyperParams], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` with what their `alg_name` stands for: its spelling, its row's preset and defaults, without keys that
    have no use here (which are named in a warning).

    Raises:
        ConfigError: a method whose hyper-parameters are another class's, or a value against the preset.
    """
    if "alg_name" not in values:
        return dict(values)
    name = canonical(values["alg_name"])
    if name is None or not issubclass(cls, hparams_class(name)):
        own = ", ".join(repr(name) for name in METHODS if issubclass(cls, hparams_class(name)))
        raise ConfigError(f"{where}: alg_name is {values['alg_name']!r}; allowed: one of {own}")
    row = METHODS[name]
    renamed = {"use_chat_template": "chat_template", **row.renamed}  # EasyEdit's
    for key, ours in renamed.items():
        if key in values and ours in values:
            raise ConfigError(f"{where}: {key} and {ours} are the same setting; give one")
    values = _told({renamed.get(key, key): value for key, value in values.items()}, where)
    for key, meant in row.preset.items():
        if key in values and values[key] != meant:
            raise ConfigError(
                f"{where}: {key} is {values[key]!r}; allowed: {meant!r}, which alg_name {name} stands for"
            )
    told = [key for key in row.unused if key in values]
    if told:
        LOG.warning("%s: read and not used: %s", where, ", ".join(told))
    used = {key: value for key, value in values.items() if key not in told}
    return {**row.defaults, **used, **row.preset, "alg_name": name}


def _told(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with EasyEdit's `enable_thinking` among what the chat template is told."""
    key, told = "enable_thinking", values.get("chat_template_kwargs", {})
    if key not in values or not isinstance(told, Mapping):
        return values
    if key in told:
        raise ConfigError(f"{where}: {key} and chat_template_kwargs.{key} are the same setting; give one")
    return {k: v for k, v in values.items() if k != key} | {"chat_template_kwargs": {key: values[key], **told}}


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
