"""The cells of a survey: each an ordinary run, its folder, its state, the command that makes it alone."""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError, EasyEditorError
from easyeditor.base.files import check_place
from easyeditor.base.hparams import HyperParams
from easyeditor.base.paths import SHIPPED
from easyeditor.base.plain_yaml import ENDINGS, yaml_path
from easyeditor.dataset.reader import Dataset, read_dataset
from easyeditor.methods.registry import load_hparams
from easyeditor.results.folder import check_run
from easyeditor.results.lines import EditLine, checked
from easyeditor.results.run import CONFIG, SUMMARY, read_object, run_lines
from easyeditor.runs.mass import check_same
from easyeditor.runs.planning import Plan, plan
from easyeditor.runs.ranks import Rank, placed
from easyeditor.runs.settings import RunSettings
from easyeditor.survey.plan import Group, MethodChoice, Survey
from easyeditor.values.plain import flag, integer, mean

MEMORY = "memory.json"  # of a cell: the most memory its run took
TABLES = SHIPPED / "data" / "survey"  # of surveys that were run
FAILURES = "failed"  # folder of a survey: why a cell could not be run
PAGE = "page"  # folder of a survey: its page


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the survey."""

    group: str
    method: str
    seed: int
    yaml: str
    sets: tuple[str, ...]
    what: Plan
    output: Path

    @property
    def name(self) -> str:
        """Group, method and seed, as its folder has them."""
        return f"{self.group}/{self.method}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.output / self.name

    @property
    def failure(self) -> Path:
        """The file that says why it could not be run."""
        return self.output / FAILURES / (self.name.replace("/", "--") + ".json")

    @property
    def size(self) -> int:
        """Requests it edits."""
        return len(self.what.requests)

    @property
    def done(self) -> bool:
        """Has it come to its end: all requests, or the collapse that stops it?"""
        if not (self.folder / SUMMARY).is_file():
            return False
        complete, acted = checked(_ending, read_object(path := self.folder / SUMMARY), str(path), "a run's summary")
        stopped = self.what.settings.stop_on_collapse and ("keep" in acted or "rollback" in acted)
        return bool(complete or stopped)

    @property
    def peak(self) -> int | None:
        """The most memory its run took, in bytes; None where it was not measured. Raises DataError: a damaged file."""
        path = self.folder / MEMORY
        return checked(_bytes, read_object(path), str(path), "the memory of a run") if path.exists() else None

    @property
    def command(self) -> str:
        """The command line that makes this run alone."""
        words = ["mass_edit.py", "--hparams", self.yaml]
        words += ["--set", *self.sets] if self.sets else []
        for f in dataclasses.fields(RunSettings):
            value = getattr(self.what.settings, f.name)
            plain = f.default if f.default is not dataclasses.MISSING else [] if f.name == "metrics" else None
            if value == plain:
                continue
            flag = f"--{f.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
        return "python " + shlex.join([*words, "--output", str(self.folder)])


def cells_of(survey: Survey, output: Path, rank: Rank | None = None) -> list[Cell]:
    """All cells, in the plan's order, each read and checked; under torchrun with this process's GPU.

    Raises:
        ConfigError, DataError: a YAML, a dataset, a pair of method and mode that cannot be run; the cell is named.
    """
    made = []
    read = functools.cache(load_hparams), functools.cache(read_dataset)  # each file once, however many cells have it
    for group in survey.groups:
        for choice in group.choices:
            for seed in group.seeds:
                try:
                    made.append(_cell(survey.plan.hparams, group, choice, seed, output, rank or Rank(), read))
                except EasyEditorError as error:
                    raise type(error)(f"{group.name}/{choice.name}: {error}") from error
    known: dict[str, Cell] = {}
    for cell in made:
        if cell.group.casefold() in (FAILURES, PAGE):
            raise ConfigError(f"group {cell.group!r}: a survey has a folder of that name; choose another")
        if (other := known.setdefault(cell.failure.name.casefold(), cell)) is not cell:
            raise ConfigError(f"{other.name} and {cell.name} would share {cell.failure}; name a group or method anew")
    return made


def _cell(
    root: str,
    group: Group,
    choice: MethodChoice,
    seed: int,
    output: Path,
    rank: Rank,
    read: tuple[Callable[..., HyperParams], Callable[..., Dataset]],
) -> Cell:
    named = choice.hparams or choice.name
    is_file = named.endswith(ENDINGS)
    yaml = yaml_path(named if is_file else Path(root) / named / group.model)
    sets = (*group.set, *choice.set, *([f"seed={seed}"] if seed else []))
    hparams = read[0](yaml, (*group.set, *choice.set))
    hparams = placed(dataclasses.replace(hparams, seed=seed) if seed else hparams, rank)
    settings = RunSettings.from_dict({**group.run, "seed": seed}, f"group {group.name}: run")
    what = plan(hparams, settings, read[1])
    cell = Cell(group=group.name, method=choice.name, seed=seed, yaml=str(yaml), sets=sets, what=what, output=output)
    if (cell.folder / CONFIG).exists():
        check_same(cell.folder, what)
    else:
        check_run(cell.folder)
    check_place(cell.failure)
    return cell


@dataclass(frozen=True, kw_only=True)
class CellProgress:
    """How far a cell is, and what its edits cost so far: `seconds` an edit with its measurements, None before any."""

    cell: Cell
    made: int
    seconds: float | None

    @property
    def state(self) -> str:
        """done, not begun, or how many are made."""
        if self.cell.done:
            return "done"
        if self.cell.failure.exists():
            return f"failed: {read_object(self.cell.failure).get('error')}"
        return f"{self.made:,} of {self.cell.size:,}" if self.made else "not begun"


def progress_of(cells: Sequence[Cell]) -> list[CellProgress]:
    """Every cell's progress, read from its journal."""
    found = []
    for cell in cells:
        lines = list(run_lines(cell.folder)) if (cell.folder / CONFIG).exists() else []
        edits = [line for line in lines if isinstance(line, EditLine)]
        made = len({line.index for line in lines if line.index >= 0})
        found.append(CellProgress(cell=cell, made=made, seconds=mean(edit.seconds["total"] for edit in edits)))
    return found


def estimates(every: Sequence[CellProgress]) -> list[float | None]:
    """Seconds the rest of each cell takes, from edits made: its own, else those of the same method, model and mode.

    None: no such edit is there yet. Loading the model and the evaluations of earlier edits are not in it.
    """
    alike = functools.cache(lambda kind: mean(one.seconds for one in every if one.seconds and _kind(one.cell) == kind))
    known = [alike(_kind(one.cell)) if one.seconds is None else one.seconds for one in every]
    return [
        0.0 if one.cell.done else None if seconds is None else seconds * (one.cell.size - one.made)
        for one, seconds in zip(every, known, strict=True)
    ]


def recorded(cell: Cell) -> tuple[float, list[str]] | None:
    """Seconds a cell takes by the tables of surveys that are kept, and which tables: those of its method on its model
    (the YAML's name), in its group where one has it. Computing edits only; None: no table has the method.
    """
    found: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    model = re.compile(re.escape(Path(cell.yaml).stem) + r"(-\d+)?")  # a table is MODEL.csv, or MODEL-FACTS.csv
    for path in sorted(path for path in TABLES.glob("*.csv") if model.fullmatch(path.stem)):
        with path.open(encoding="utf-8", newline="") as opened:
            for row in csv.DictReader(opened):
                if row.get("method") == cell.method and row.get("seconds an edit"):
                    found[row["group"] == cell.group].append((float(row["seconds an edit"]), path.name))
    rows = found[True] or found[False]
    seconds = mean(seconds for seconds, _ in rows)
    return None if seconds is None else (seconds * cell.size, sorted({table for _, table in rows}))


def _ending(summary: Mapping[str, Any]) -> tuple[bool, list[str]]:
    return flag(summary["complete"]), list(summary["guard"]["actions"].keys())


def _bytes(memory: Mapping[str, Any]) -> int | None:
    return None if memory["bytes"] is None else integer(memory["bytes"])


def _kind(cell: Cell) -> tuple[str, str, str]:
    return cell.yaml, cell.method, cell.what.settings.mode
