"""YAML and JSON to plain values: what every configuration and override is read through."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import yaml

from easyeditor.base.errors import ConfigError
from easyeditor.base.files import check_value, parse_unchecked
from easyeditor.base.paths import SHIPPED
from easyeditor.base.reading import read_text

LOG = logging.getLogger(__name__)

ENDINGS = (".yaml", ".yml", ".json")
"""How a configuration's name ends; `.yaml` where it has none of these."""

MAX_YAML = 200_000  # characters; the longest shipped file has under 3,000
# What building a YAML document can raise: its own errors, values it cannot make, nesting without end.
_ERRORS = (yaml.YAMLError, ValueError, TypeError, RecursionError)


def yaml_path(name: str | Path) -> Path:
    """The file a user means by `hparams/ROME/qwen2.5-7b`: `.yaml` appended unless it has one of `ENDINGS`."""
    text = str(name)
    path = Path(text if text.endswith(ENDINGS) else text + ".yaml")
    places = (path, SHIPPED / path, SHIPPED / "hparams" / path)
    return next((place for place in places if place.is_file()), path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a mapping in YAML, or in JSON by the file's ending; a key given twice is a warning where its values agree,
    else an error."""
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file{_neighbours(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that cannot be one
        raise ConfigError(f"{path}: not a readable UTF-8 text file ({_one_line(error)})") from error
    try:
        values, repeated = parse_plain_json(text) if kind == "JSON" else parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid {kind} ({_one_line(error)})") from error
    for note in repeated:
        LOG.warning("%s: %s", path, note)
    if values is None:
        raise ConfigError(f"{path}: the file is empty; see hparams/ for examples")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def parse_plain_json(text: str) -> tuple[Any, list[str]]:
    """As `parse_yaml`, of a JSON text. Raises ValueError."""
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and (type(value), value) != (type(seen[key]), seen[key]):
                raise ValueError(f"duplicate key {key!r}, again with another value")
            if key in seen:
                repeated.append(f"key {key!r} again, with the same value")
            seen[key] = value
        return seen

    _check_length(text)
    values = parse_unchecked(text, once) if text.strip() else None
    check_value(values)
    return values, repeated


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Plain values (texts, dates among them, numbers, booleans, null, lists, mappings), and notes on keys that say
    the same twice.

    Raises:
        ValueError: not YAML, two values for a key, an alias, any other type, endless; what `check_value` refuses.
    """
    _check_length(text)
    try:
        loader = _PlainLoader(text)
        values = loader.get_single_data()
        check_value(values)
    except _ERRORS as error:
        raise ValueError(" ".join(str(error).split())) from error
    return values, loader.repeated


def _check_length(text: str) -> None:
    if len(text) > MAX_YAML:
        raise ValueError(f"it has {len(text)} characters; a configuration has at most {MAX_YAML}")


def _neighbours(path: Path) -> str:
    there = [p.name for ending in ENDINGS for p in path.parent.glob(f"*{ending}")]
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.3)
    return f"; in {path.parent} there are: {', '.join(near)}" if near else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key with two values (and notes in `repeated` those that say the same twice), aliases,
    and types that JSON has not; dates are texts."""

    yaml_constructors = {  # noqa: RUF012 - PyYAML's own name
        **{
            f"tag:yaml.org,2002:{kind}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]
            for kind in ("null", "bool", "int", "float", "seq", "map", "str")
        },
        "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
        None: yaml.SafeLoader.construct_undefined,
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a loop, or a bomb: few of them make billions of values
            raise yaml.composer.ComposerError(None, None, "an alias: write the value out in its place")
        return super().compose_node(parent, index)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain text", key_node.start_mark)
            value = self.construct_object(value_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                if (type(value), value) != (type(seen[key]), seen[key]):
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key {key!r}, again in line {line} with another value"
                    )
                self.repeated.append(f"key {key!r} again in line {line}, with the same value")
            seen[key] = value
        return super().construct_mapping(node, deep)
