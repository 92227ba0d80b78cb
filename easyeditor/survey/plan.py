"""A survey's plan: methods x model x data x mode x seeds, from YAML, typed and checked like every other."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import check_seed_size, typed
from easyeditor.base.plain_yaml import read_yaml, yaml_path
from easyeditor.runs.settings import RunSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """One method of a group; in the YAML a name alone, or these keys."""

    name: str
    """What it is called in tables and folders."""
    hparams: str | None = None
    """Its YAML: a file, or a folder of `hparams/` that holds `<model>.yaml`; by default the folder of its name."""
    set: list[str] = field(default_factory=list)
    """Settings over the YAML, as `--set` takes them."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Methods that are run alike, so that their numbers may be compared."""

    name: str
    """Its folder, and what it is called in tables."""
    model: str
    """Name of the YAML in each method's folder, such as `smollm2-135m`."""
    methods: list[Any]
    """Names, or mappings with `name`, `hparams`, `set`."""
    run: dict[str, Any]
    """Settings of mass_edit.py (`data`, `mode`, `batch_size`, …) but for `seed`."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """A cell for each: of the contexts, and of the shuffle if there is one."""
    set: list[str] = field(default_factory=list)
    """Settings over the YAML of every method."""

    @property
    def choices(self) -> tuple[MethodChoice, ...]:
        """The methods, typed (`read_plan` has checked them)."""
        return tuple(_choice(item, self.name) for item in self.methods)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Published values, printed next to ours."""

    group: str
    method: str
    source: str
    """Where they are published."""
    values: dict[str, float]
    """Metric -> value: `rewrite_acc`, `rephrase_acc`, `locality_acc` or a metric of the registry, in its unit."""


@dataclass(frozen=True, kw_only=True)
class SurveyPlan:
    """The whole plan."""

    name: str
    """Title of the page."""
    output: str
    """Folder of the survey: `<group>/<method>-seed<seed>/` for each cell, and the page."""
    groups: list[Any]
    """See `Group`."""
    expected: list[Any] = field(default_factory=list)
    """See `Expected`."""
    hparams: str = "hparams"
    """Folder with a folder for each method."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A plan that was read: its parts typed, its names without clashes."""

    plan: SurveyPlan
    groups: tuple[Group, ...]
    expected: tuple[Expected, ...]


def read_plan(path: Path) -> Survey:
    """Read a plan. Raises ConfigError, one line: what, where, what is allowed."""
    path = yaml_path(path)
    where = str(path)
    top = typed(SurveyPlan, read_yaml(path), where)
    groups = tuple(typed(Group, item, f"{where}: group {n}") for n, item in enumerate(top.groups, 1))
    expected = tuple(typed(Expected, item, f"{where}: expected {n}") for n, item in enumerate(top.expected, 1))
    if not groups:
        raise ConfigError(f"{where}: groups is empty; give at least one")
    _unique([group.name for group in groups], f"{where}: group")
    for group in groups:
        _check_group(group, f"{where}: group {group.name}")
    known = {(group.name, choice.name) for group in groups for choice in group.choices}
    for item in expected:
        if (item.group, item.method) not in known:
            raise ConfigError(f"{where}: expected names {item.method!r} in group {item.group!r}, which the plan lacks")
    return Survey(plan=top, groups=groups, expected=expected)


def _check_group(group: Group, where: str) -> None:
    if not group.methods:
        raise ConfigError(f"{where}: methods is empty; give at least one")
    if not group.seeds:
        raise ConfigError(f"{where}: seeds is empty; give at least one")
    if "seed" in group.run:
        raise ConfigError(f"{where}: run has a seed; write seeds: [{group.run['seed']}] next to run")
    for seed in group.seeds:
        check_seed_size(seed, where)
    _unique([choice.name for choice in group.choices], f"{where}: method")
    _unique([str(seed) for seed in group.seeds], f"{where}: seed")
    RunSettings.from_dict(group.run, f"{where}: run")


def _unique(names: list[str], what: str) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ConfigError(f"{what} {name!r} is there {times} times; each needs a name of its own")
        if not NAME.fullmatch(name) and not name.lstrip("-").isdigit():
            raise ConfigError(f"{what} {name!r} cannot name a folder; allowed: letters, digits, '.', '_', '-'")


def _choice(item: Any, where: str) -> MethodChoice:
    return typed(MethodChoice, {"name": item} if isinstance(item, str) else item, f"group {where}: methods")
