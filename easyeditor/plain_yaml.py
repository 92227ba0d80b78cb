"""YAML to the values JSON has: what every configuration and override is read through."""

from __future__ import annotations

from typing import Any

import yaml

from easyeditor.files import check_value

MAX_YAML = 200_000  # characters; the longest shipped file has under 3,000
# What building a YAML document can raise: its own errors, values it cannot make, nesting without end.
_ERRORS = (yaml.YAMLError, ValueError, TypeError, RecursionError)


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Plain values (texts, dates among them, numbers, booleans, null, lists, mappings), and notes on keys that say
    the same twice.

    Raises:
        ValueError: not YAML, two values for a key, an alias, any other type, endless; what `check_value` refuses.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"it has {len(text)} characters; a configuration has at most {MAX_YAML}")
    try:
        loader = _PlainLoader(text)
        values = loader.get_single_data()
        check_value(values)
    except _ERRORS as error:
        raise ValueError(" ".join(str(error).split())) from error
    return values, loader.repeated


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
        if self.check_event(yaml.AliasEvent):  # a loop, or a bomb: few of them stand for billions of values
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
