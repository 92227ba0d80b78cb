"""Run folders, read for the report: configuration, manifest and journal of any run, finished or killed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from easyeditor.errors import DataError
from easyeditor.files import read_json
from easyeditor.report.journal import (
    Edit,
    Evaluation,
    Failed,
    Screened,
    TrainingStep,
    parse_line,
    read_lines,
)
from easyeditor.report.verdict import TYPICAL_DENOMINATOR

JOURNALS = ("results.jsonl", "results.rank*.jsonl", "log.jsonl")
NEEDS = "it needs results.jsonl (mass_edit.py), result.json (single_case_edit.py) or log.jsonl (pretrain_mend.py)"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as the report sees it. `notes` say what was left out or is missing; `label` names it in figures."""

    folder: Path
    label: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    finished: bool
    edits: tuple[Edit, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    screened: tuple[Screened, ...] = ()
    training: tuple[TrainingStep, ...] = ()
    failed: tuple[Failed, ...] = ()
    notes: tuple[str, ...] = ()

    def setting(self, name: str) -> Any:
        """A value of config.json, at its top or one level below; None if it is not there."""
        return _find(self.config, name)

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
            return self.edits[0].method
        return str(self.manifest.get("method") or self.setting("alg_name") or self.setting("alg") or "?")

    @property
    def model(self) -> str:
        """The model's name without the folders before it."""
        return str(self.setting("model_name") or "?").rstrip("/").rsplit("/", 1)[-1]

    @property
    def data(self) -> str:
        """The dataset's file name without its ending; empty for a run of one request."""
        path = self.data_path
        return re.sub(r"\.jsonl?$", "", path.rstrip("/").rsplit("/", 1)[-1])

    @property
    def data_path(self) -> str:
        """The dataset as the manifest names it."""
        data = self.manifest.get("data")
        if isinstance(data, Mapping):
            data = data.get("path") or data.get("source") or data.get("name")
        return str(data or self.manifest.get("data_path") or "")

    @property
    def data_sha256(self) -> str:
        """The dataset's hash as the manifest has it, or nothing."""
        data = self.manifest.get("data")
        inside = data.get("sha256") if isinstance(data, Mapping) else None
        return str(inside or self.manifest.get("data_sha256") or "")

    @property
    def base(self) -> float | None:
        """Perplexity of the unedited model: before every single edit, before the first of a sequence."""
        if not self.edits or (self.mode != "single" and self.edits[0].step != 1):
            return None
        return self.edits[0].ppl_before

    @property
    def screen_threshold(self) -> float:
        """The |denominator| below which a collapse is foretold: the run's own, else the typical one."""
        found = self.setting("screen_threshold")
        return float(found) if isinstance(found, (int, float)) else TYPICAL_DENOMINATOR

    @property
    def threshold(self) -> float | None:
        """The limit of collapse, as the first judged edit has it."""
        return next((edit.limit for edit in self.edits if edit.limit is not None), None)


def load_runs(folders: Sequence[Path], labels: Sequence[str] = ()) -> list[Run]:
    """All runs, with labels that differ.

    Raises:
        DataError: one is missing, no run, empty or damaged; or the same folder is given twice.
    """
    twice = [str(path) for path, times in Counter(folder.resolve() for folder in folders).items() if times > 1]
    if twice:
        raise DataError(f"{twice[0]}: given twice; name each run once")
    runs = [load_run(folder) for folder in folders]
    if labels:
        return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    count = Counter(run.label for run in runs)
    return [replace(r, label=f"{r.label} ({r.folder.resolve().name})") if count[r.label] > 1 else r for r in runs]


def load_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        DataError: it is missing, not a run, holds no record, or a file in it is damaged (file and line are named).
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a run folder")
    journals = [path for pattern in JOURNALS for path in sorted(folder.glob(pattern), key=_natural)]
    single = folder / "result.json"
    if not journals and not single.is_file():
        raise DataError(f"{folder}: not a run folder; {NEEDS}")
    notes: list[str] = []
    config, manifest = (_described(folder / name, notes) for name in ("config.json", "manifest.json"))
    lines = _one_edit(single) if not journals else _journal(journals, notes)
    edits = _once((line for line in lines if isinstance(line, Edit)), notes)
    evaluations = {line.after: line for line in lines if isinstance(line, Evaluation)}
    screened = {line.index: line for line in lines if isinstance(line, Screened)}
    training = [line for line in lines if isinstance(line, TrainingStep)]
    failed = {line.index: line for line in lines if isinstance(line, Failed)}
    if not lines:
        raise DataError(f"{journals[0] if journals else single}: holds no whole record yet; nothing to report")
    if failed:
        first = failed[min(failed)]
        which = f"#{first.index} ({first.case_id}): {first.error}"
        notes.append(f"{folder}: {len(failed)} requests could not be edited; the first is {which}")
    finished = not journals or bool(training) or _complete(folder / "summary.json", notes)
    run = Run(
        folder=folder,
        label="",
        config=config,
        manifest=manifest,
        finished=finished,
        edits=tuple(edits),
        evaluations=tuple(evaluations[after] for after in sorted(evaluations)),
        screened=tuple(screened[index] for index in sorted(screened)),
        failed=tuple(failed[index] for index in sorted(failed)),
        training=tuple(sorted(training, key=lambda line: line.step)),
        notes=tuple(notes),
    )
    return replace(run, label=" / ".join(part for part in (run.method, run.model, run.data) if part))


def _complete(path: Path, notes: list[str]) -> bool:
    """Whether a mass edit came to its end, by its summary."""
    if not path.is_file():
        notes.append(f"{path.parent}: no summary.json, so the run has not ended; this is what is recorded so far")
        return False
    summary = read_json(path)
    if isinstance(summary, dict) and summary.get("complete", True) is False:
        notes.append(f"{path.parent}: stopped before its last request (summary.json)")
        return False
    return True


def _described(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.exists():
        notes.append(f"{path}: is missing, so the report cannot say all of what was run")
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _one_edit(path: Path) -> list[Any]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return [parse_line({**raw, "kind": "edit"}, str(path))]


def _journal(paths: Sequence[Path], notes: list[str]) -> list[Any]:
    """Typed lines of all journals; kinds the report does not know are counted and noted."""
    found, unknown = [], Counter[str]()
    for path in paths:
        for where, raw in read_lines(path, notes):
            line = parse_line(raw, where)
            if line is None:
                unknown[str(raw["kind"])] += 1
            else:
                found.append(line)
    notes += [f"{paths[0].parent}: {n} lines of kind {kind!r} are not for the report" for kind, n in unknown.items()]
    return found


def _once(edits: Iterable[Edit], notes: list[str]) -> list[Edit]:
    """Each place of the dataset once, in the order of the edits (single: of the dataset); repeats are noted."""
    first: dict[int, Edit] = {}
    repeats = 0
    for edit in edits:
        repeats += edit.index in first
        first.setdefault(edit.index, edit)
    if repeats:
        notes.append(f"{repeats} edits are recorded more than once; the first record counts")
    modes = sorted({edit.mode for edit in first.values()})
    if len(modes) > 1:
        raise DataError(f"one journal holds edits of several modes ({', '.join(modes)}); it is not one run")
    return sorted(first.values(), key=lambda e: (0 if e.mode == "single" else e.step, e.index))


def _natural(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _find(tree: Mapping[str, Any], name: str) -> Any:
    if name in tree:
        return tree[name]
    below = (branch for branch in tree.values() if isinstance(branch, Mapping))
    return next((branch[name] for branch in below if name in branch), None)
