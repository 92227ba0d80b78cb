"""A run folder, read: configuration, manifest, and the typed lines of any run, finished or killed."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.base.files import discard, read_json, write_bytes
from easyeditor.results.journal import read_raw
from easyeditor.results.lines import (
    EditLine,
    EvaluationLine,
    FailureLine,
    Line,
    RunLine,
    ScreenLine,
    TrainingLine,
    checked,
    line_of,
)
from easyeditor.values.collapse import SMALL_DENOMINATOR
from easyeditor.values.record import EditRecord

CONFIG, MANIFEST, SUMMARY, RESULT = "config.json", "manifest.json", "summary.json", "result.json"
RESULTS, RANKS, TRAINING = "results.jsonl", "results.rank*.jsonl", "log.jsonl"
"""Journals: of a mass edit, of its processes while it runs, of a training."""
NEEDS = f"it needs {RESULTS} (mass_edit.py), {RESULT} (single_case_edit.py) or {TRAINING} (pretrain_mend.py)"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, read. `notes` say what was left out or is missing; `label` names it in tables and figures.

    The edits are as `EditRecord.without_details` leaves them, in the order made; in mode single in that of the dataset.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    finished: bool
    edits: tuple[EditLine, ...] = ()
    evaluations: tuple[EvaluationLine, ...] = ()
    screened: tuple[ScreenLine, ...] = ()
    training: tuple[TrainingLine, ...] = ()
    failed: tuple[FailureLine, ...] = ()
    notes: tuple[str, ...] = ()

    def setting(self, name: str) -> Any:
        """A value of config.json, at its top or one level below; None if it is not there."""
        below = (branch for branch in self.config.values() if isinstance(branch, Mapping))
        return next((found[name] for found in (self.config, *below) if name in found), None)

    @property
    def hparams(self) -> Mapping[str, Any]:
        """The hyper-parameters as config.json has them."""
        found = self.config.get("hparams", self.config)
        return found if isinstance(found, Mapping) else {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a mass edit was asked to do, as config.json has it."""
        found = self.config.get("run", {})
        return found if isinstance(found, Mapping) else {}

    @property
    def mode(self) -> str:
        """single, sequential, batch, screen or training."""
        if self.edits:
            return self.edits[0].mode
        return "training" if self.training else "screen" if self.screened else str(self.setting("mode") or "?")

    @property
    def method(self) -> str:
        """The method's title as the records have it (C-ROME, not ROME with a flag)."""
        if self.edits:
            return self.edits[0].record.method
        return str(self.manifest.get("method") or self.setting("alg_name") or self.setting("alg") or "?")

    @property
    def model(self) -> str:
        """The model's name without the folders before it."""
        return str(self.setting("model_name") or "?").rstrip("/").rsplit("/", 1)[-1]

    @property
    def data(self) -> str:
        """The dataset's file name without its ending, behind its folder's where it has the model's name
        (`hard/smollm2-135m`); empty for a run of one request."""
        *_, folder, name = "", *re.sub(r"\.jsonl?$", "", self.data_path.rstrip("/")).split("/")
        return f"{folder}/{name}" if name == self.model and folder else name

    @property
    def data_path(self) -> str:
        """The dataset as the manifest names it."""
        data = self.manifest.get("data")
        return str(data.get("source", "")) if isinstance(data, Mapping) else ""

    @property
    def data_sha256(self) -> str:
        """The dataset's hash as the manifest has it, or nothing."""
        data = self.manifest.get("data")
        return str(data.get("sha256", "")) if isinstance(data, Mapping) else ""

    @property
    def base(self) -> float | None:
        """Perplexity of the unedited model: before every single edit, before the first of a sequence."""
        return self.edits[0].record.pre.ppl if self.edits else None

    @property
    def bos(self) -> bool:
        """Did the perplexity sentences begin with BOS?"""
        return any(edit.kept_record.bos for edit in self.edits[:1])

    @property
    def screen_threshold(self) -> float:
        """The |denominator| below which a collapse is predicted: the run's own, else the usual one."""
        found = self.setting("screen_threshold")
        return float(found) if isinstance(found, (int, float)) else SMALL_DENOMINATOR

    @property
    def threshold(self) -> float | None:
        """The limit of collapse, as the first judged edit has it."""
        return next((edit.record.collapse.limit for edit in self.edits if edit.record.collapse is not None), None)


def load_runs(folders: Sequence[Path], labels: Sequence[str] = ()) -> list[Run]:
    """All runs, with labels that differ.

    Raises:
        DataError: one is missing, no run, empty or damaged; or the same folder is given twice.
    """
    twice = [str(path) for path, times in Counter(os.path.realpath(folder) for folder in folders).items() if times > 1]
    if twice:
        raise DataError(f"{twice[0]}: given twice; name each run once")
    runs = [load_run(folder) for folder in folders]
    if labels:
        return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    count = Counter(run.label for run in runs)
    return [
        replace(r, label=f"{r.label} ({Path(os.path.realpath(r.folder)).name})") if count[r.label] > 1 else r
        for r in runs
    ]


def load_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        DataError: it is missing, not a run, holds no record, or a file in it is damaged (file and line are named).
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a run folder")
    paths, single = journals(folder), folder / RESULT
    if not paths and not single.is_file():
        raise DataError(f"{folder}: not a run folder; {NEEDS}")
    notes: list[str] = []
    config, manifest = (_described(folder / name, notes) for name in (CONFIG, MANIFEST))
    lines = [_lean(line) for line in recorded(folder, notes)] if paths else [_one_edit(single)]
    if not lines:
        raise DataError(f"{paths[0]}: holds no whole record yet; nothing to report")
    training = [line for line in lines if isinstance(line, TrainingLine)]
    run = Run(
        folder=folder,
        label="",
        config=config,
        manifest=manifest,
        finished=not paths or bool(training) or _complete(folder / SUMMARY, notes),
        edits=_in_order([line for line in lines if isinstance(line, EditLine)]),
        evaluations=_sorted([line for line in lines if isinstance(line, EvaluationLine)]),
        screened=_sorted([line for line in lines if isinstance(line, ScreenLine)]),
        failed=_sorted([line for line in lines if isinstance(line, FailureLine)]),
        training=tuple(sorted(training, key=lambda line: line.step)),
    )
    if run.failed:
        first = run.failed[0]
        which = f"#{first.index} ({first.case_id}): {' '.join(first.error.split())}"
        notes.append(f"{folder}: {len(run.failed)} requests could not be edited; the first is {which}")
    label = " / ".join(part for part in (run.method, run.model, run.data) if part)
    return replace(run, label=label, notes=tuple(notes))


def journals(folder: Path) -> list[Path]:
    """The journals in a run folder: the merged one, the ranks', a training's."""
    ranks = sorted(folder.glob(RANKS), key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])
    return [path for path in (folder / RESULTS, *ranks, folder / TRAINING) if path.exists()]


def recorded(folder: Path, notes: list[str] | None = None) -> Iterator[Line]:
    """Every line recorded by any process, each once.

    Raises:
        DataError: a damaged line, or two different records of one thing (file and line are named).
    """
    for _, _, line in _lines(folder, [] if notes is None else notes):
        if line is not None:
            yield line


def placed_lines(folder: Path) -> Iterator[tuple[str, RunLine]]:
    """`run_lines`, each with the file and the number it has there."""
    for where, _, line in _lines(folder, []):
        if line is not None and not isinstance(line, TrainingLine):
            yield where, line


def run_lines(folder: Path) -> Iterator[RunLine]:
    """`recorded` of a mass edit."""
    return (line for line in recorded(folder) if not isinstance(line, TrainingLine))


def merge(folder: Path) -> None:
    """Put all ranks' lines into `results.jsonl`, in the order of the dataset, and remove the ranks' journals.

    Killed at any moment it can be done again: the merged file is whole before a rank's goes.
    """
    ranks = sorted(folder.glob(RANKS))
    if not ranks:
        return
    placed = [(getattr(line, "index", -1), raw) for _, raw, line in _lines(folder, [])]
    write_bytes(folder / RESULTS, b"".join(raw for _, raw in sorted(placed, key=lambda item: item[0])))
    for path in ranks:
        discard(path)


def _lines(folder: Path, notes: list[str]) -> Iterator[tuple[str, bytes, Line | None]]:
    """Each line's place, bytes and value, equal repeats left out; None for a kind that is not known, which is noted.

    Raises:
        DataError: a damaged line, or two different records of one thing.
    """
    seen: dict[tuple[str, int], tuple[str, bytes]] = {}
    repeats, unknown = 0, Counter[str]()
    for path in journals(folder):
        for number, raw, value in read_raw(path, notes):
            where = f"{path}, line {number}"
            line = line_of(value, where)
            if line is None:
                unknown[str(value["kind"])] += 1
            elif not isinstance(line, TrainingLine):
                kind, index = about = _about(line)
                digest = hashlib.sha256(raw.strip()).digest()
                before, same = seen.setdefault(about, (where, digest))
                if same != digest:
                    raise DataError(f"{where}: another record of {kind} #{index} than {before}; remove the wrong one")
                if before != where:
                    repeats += 1
                    continue
            yield where, raw, line
    notes += [f"{folder}: {n} lines of kind {kind!r} are not known and left out" for kind, n in unknown.items()]
    if repeats:
        notes.append(f"{repeats} edits are recorded more than once; the first record counts")


def _about(line: RunLine) -> tuple[str, int]:
    """What a line is about: two lines about one thing would be work done twice."""
    kind = "evaluation" if isinstance(line, EvaluationLine) else "screen" if isinstance(line, ScreenLine) else "edit"
    return kind, line.index


def _lean(line: Line) -> Line:
    return line.without_details() if isinstance(line, EditLine) else line


def _sorted(lines: list[Any]) -> tuple[Any, ...]:
    return tuple(sorted(lines, key=lambda line: line.index))


def _in_order(edits: Sequence[EditLine]) -> tuple[EditLine, ...]:
    modes = sorted({edit.mode for edit in edits})
    if len(modes) > 1:
        raise DataError(f"one journal holds edits of several modes ({', '.join(modes)}); it is not one run")
    return tuple(sorted(edits, key=lambda e: (0 if e.mode == "single" else e.step, e.index)))


def _complete(path: Path, notes: list[str]) -> bool:
    """Whether a mass edit came to its end, by its summary."""
    if not path.is_file():
        notes.append(f"{path.parent}: no {SUMMARY}, so the run has not ended; this is what is recorded so far")
        return False
    summary = read_json(path)
    if isinstance(summary, dict) and summary.get("complete", True) is False:
        notes.append(f"{path.parent}: stopped before its last request ({SUMMARY})")
        return False
    return True


def _described(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.exists():
        notes.append(f"{path}: is missing, so the report cannot say all of what was run")
        return {}
    return read_object(path)


def read_object(path: Path) -> Mapping[str, Any]:
    """A JSON file that holds an object. Raises DataError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _one_edit(path: Path) -> EditLine:
    record: EditRecord = checked(EditRecord.from_json, read_object(path), str(path), "a whole edit record")
    return EditLine(record=record, index=0, step=1, mode="single", seconds={"edit": record.time}).without_details()
