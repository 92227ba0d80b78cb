"""From a method's name to its classes and hyper-parameters, by the table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import HyperParams, field_types, parse_settings
from easyeditor.base.plain_yaml import read_yaml, yaml_path
from easyeditor.lm.embedded import model_folder
from easyeditor.methods.table import METHODS, MethodRow

LOG = logging.getLogger(__name__)

EASYEDITS = {"use_chat_template": "chat_template"}
"""EasyEdit's keys of every method -> ours."""
THINKING, TOLD = "enable_thinking", "chat_template_kwargs"  # EasyEdit's key is one of those that our key holds

if TYPE_CHECKING:
    from easyeditor.methods.base import EditMethod
    from easyeditor.values.edit import EditResult


def load_hparams(source: str | Path | Mapping[str, Any], settings: Iterable[str] = ()) -> HyperParams:
    """Hyper-parameters of any method, from a YAML or JSON file or a mapping, with `key=value` texts (`--set`) over
    them; `alg_name` says whose.

    Raises:
        ConfigError: an unknown method, a file for training, and whatever `HyperParams.from_dict` refuses.
    """
    settings = list(settings)
    if isinstance(source, Mapping):
        where, values = "hparams", dict(source)
    else:
        path = yaml_path(source)
        where, values = str(path), read_values(path)
    alg_name = parse_settings(settings).get("alg_name", values.get("alg_name"))
    name = canonical(alg_name)
    if name is None:
        raise ConfigError(f"{where}: alg_name is {alg_name!r}; allowed: {', '.join(METHODS)}; --set alg_name=NAME")
    cls = hparams_class(name)
    made = cls.merged(values, settings)
    if METHODS[name].training and _for_training(METHODS[name], made, where):
        raise ConfigError(
            f"{where}: a file for training {name}, not for edits: python pretrain_mend.py --hparams {where}; an edit "
            f"takes a file of hparams/{name}/"
        )
    return cls.from_dict(made, told(where, settings))


def _for_training(row: MethodRow, values: Mapping[str, Any], where: str) -> bool:
    """Is it a file of hparams/TRAINING/, by its folder or by a key that only training has?"""
    return "TRAINING" in Path(where).parts or bool(
        values.keys() & (field_types(_load(row.training)).keys() - field_types(_load(row.hparams)).keys())
    )


def told(where: str, settings: Iterable[str]) -> str:
    """Where a wrong value may come from, for a message."""
    return f"{where} with --set" if any(settings) else where


def read_values(path: Path) -> dict[str, Any]:
    """A file's values. What JSON files leave to their place is added: `alg_name` is the folder's name, `model_name` the
    file's, where that is a model here (the ROME repository writes ORG_NAME for ORG/NAME)."""
    values = read_yaml(path)
    if path.suffix != ".json":
        return values
    if (name := canonical(path.absolute().parent.name)) is not None:
        values.setdefault("alg_name", name)
    names = (path.stem, path.stem.replace("_", "/", 1), f"./hugging_cache/{path.stem}")
    here = next((name for name in names if model_folder(name) is not None), None)
    if here is not None:
        values.setdefault("model_name", here)
    return values


def hparams_class(alg_name: str) -> type[HyperParams]:
    """The hyper-parameter class of a method. Raises ConfigError listing the methods."""
    return _load(row_of(alg_name).hparams)


def method_class(alg_name: str) -> type[EditMethod[Any]]:
    """The class of a method. Raises ConfigError listing the methods."""
    return _load(row_of(alg_name).method)


def method_of(edit: EditResult, pair: Any) -> EditMethod[Any]:
    """The method of a saved edit on a loaded (model, tokenizer). Raises ConfigError: damaged hyper-parameters."""
    hparams, (model, tok) = load_hparams({**edit.hparams, "model_name": pair}), pair
    return method_class(hparams.alg_name)(model, tok, hparams)


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
    only other methods or the field's files have (which are named in a warning).

    Raises:
        ConfigError: a method whose hyper-parameters are another class's, or a value against the preset.
    """
    alg_name = values.get("alg_name", getattr(cls, "alg_name", None))
    name = canonical(alg_name)
    if name is None or not issubclass(cls, hparams_class(name)):
        own = ", ".join(repr(name) for name in METHODS if issubclass(cls, hparams_class(name)))
        raise ConfigError(f"{where}: alg_name is {alg_name!r}; allowed: one of {own}")
    row = METHODS[name]
    names = {**EASYEDITS, **row.renamed}
    for key, ours in names.items():
        if key in values and ours in values:
            raise ConfigError(f"{where}: {key} and {ours} are the same setting; give one")
    values = _told({names.get(key, key): value for key, value in values.items()}, where)
    for key, meant in row.preset.items():
        if key in values and values[key] != meant:
            raise ConfigError(
                f"{where}: {key} is {values[key]!r}; allowed: {meant!r}, which alg_name {name} stands for"
            )
    unknown = [key for key in values if key not in field_types(cls)]
    others = _known_keys() if unknown else frozenset()
    unused = [key for key in unknown if key in others]
    if unused:
        LOG.warning("%s: read and not used: %s", where, ", ".join(unused))
    used = {key: value for key, value in values.items() if key not in unused}
    return {**row.defaults, **used, **row.preset, "alg_name": name}


def renamed(
    cls: type[HyperParams], values: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`given` settings under our keys, and `values` without what they replace under another key."""
    names = dict(EASYEDITS)
    for name, row in METHODS.items():
        names |= row.renamed if issubclass(cls, hparams_class(name)) else {}
    given = {names.get(key, key): value for key, value in given.items()}
    if THINKING in given:
        told = given.get(TOLD, values.get(TOLD)) or {}
        given = {**given, TOLD: {**told, THINKING: given[THINKING]}}
        del given[THINKING]
    kept = {key: value for key, value in values.items() if names.get(key) not in given}
    if THINKING in (given.get(TOLD) or {}):
        kept.pop(THINKING, None)
    return kept, given


def _told(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with EasyEdit's `enable_thinking` among what the chat template is told."""
    key, told = THINKING, values.get(TOLD, {})
    if key not in values or not isinstance(told, Mapping):
        return values
    if key in told:
        raise ConfigError(f"{where}: {key} and chat_template_kwargs.{key} are the same setting; give one")
    return {k: v for k, v in values.items() if k != key} | {TOLD: {key: values[key], **told}}


def _known_keys() -> frozenset[str]:
    """Every key of some method here, or of the field's files."""
    return frozenset(key for row in METHODS.values() for key in (*row.unused, *field_types(_load(row.hparams))))


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
