"""Where exported edits come from: folders of --save-edit, and runs of mass_edit.py whose edits stayed in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.base.files import read_json
from easyeditor.lm import embedded
from easyeditor.results.lines import EditLine, checked
from easyeditor.results.run import RESULT, Run, journals, load_run
from easyeditor.results.shown import ppl_name, shown_ppl, shown_share
from easyeditor.runs.planning import batch_of
from easyeditor.runs.sequence import saved_edit
from easyeditor.values.collapse import Collapse
from easyeditor.values.edit import EditResult
from easyeditor.values.plain import mean
from easyeditor.values.record import EditRecord


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured: (name, before, after) as a reader sees them, the verdict in words, and what it is of."""

    what: str
    rows: tuple[tuple[str, str, str], ...]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Edits of one folder, in order, computed on one model; `hparams` are those of its run. A run's edits come without
    what later edits would have to know."""

    edits: tuple[EditResult, ...]
    hparams: Mapping[str, Any]
    fingerprint: str | None
    measured: Measured | None

    @property
    def model_name(self) -> str | None:
        """The model the edits were made on, as the YAML named it; None for a pair that Python had loaded."""
        name = self.hparams.get("model_name")
        return name if isinstance(name, str) and not name.startswith("<loaded ") else None


def read_source(folder: Path) -> Source:
    """The edits of one folder.

    Raises:
        DataError: neither a saved edit nor a run whose edits stay; one that is damaged; or edits that change no weight.
    """
    if (folder / "edit.safetensors").exists():
        source = _saved(folder)
    elif folder.is_dir() and journals(folder):
        source = _of_run(folder)
    elif (folder / RESULT).exists():
        raise DataError(f"{folder}: a run of one edit, which is not kept in it; give the folder of its --save-edit")
    else:
        raise DataError(
            f"{folder}: no edit is here; give a folder of single_case_edit.py --save-edit, or a run of mass_edit.py "
            "with mode sequential or batch"
        )
    for edit in source.edits:
        edit.check_weights(str(folder), "export")
    return source


def hub_name(model_name: str) -> str:
    """What a card calls the base: a hub name as it is, of a folder its own name."""
    if (known := embedded.find(model_name)) is not None:
        return known.hub_name
    return Path(model_name).resolve().name if Path(model_name).exists() else model_name


def place_of(model_name: str) -> str:
    """Where a library finds the base: a folder of this machine by its whole path, a hub name as it is."""
    if (known := embedded.find(model_name)) is not None:
        return str(known.folder)
    return str(Path(model_name).resolve()) if Path(model_name).exists() else model_name


def of_record(record: EditRecord) -> Measured:
    """The table and the verdict of one edit."""
    behind = "" if record.test_prefix is None else f", its prompt behind the prefix {record.test_prefix!r}"
    rows = [_row(name, before, after) for name, (before, after) in record.values().items()]
    for key, answer in (("target_new", record.request.target_new), ("ground_truth", record.request.ground_truth)):
        if answer is not None:
            pair = record.probabilities[key]
            rows.append(_row(f"P({answer})", pair["before"], pair["after"]))
    if record.collapse is not None:
        rows.append((ppl_name(record.bos), shown_ppl(record.collapse.ppl_before), shown_ppl(record.collapse.ppl_after)))
    return Measured(what=f"this edit alone{behind}", rows=tuple(rows), verdict=_verdict(record.collapse))


def _saved(folder: Path) -> Source:
    edit = EditResult.load(folder)
    record = folder / RESULT
    measured = None
    if record.exists():
        what = "a whole edit record"
        measured = checked(lambda raw: of_record(EditRecord.from_json(raw)), read_json(record), str(record), what)
    return Source(edits=(edit,), hparams=edit.hparams, fingerprint=edit.model_fingerprint, measured=measured)


def _of_run(folder: Path) -> Source:
    run = load_run(folder)
    if run.mode not in ("sequential", "batch"):
        raise DataError(
            f"{folder}: a run of mode {run.mode}, whose edits were taken back and are not kept; mode sequential or "
            "batch keeps them, and single_case_edit.py --save-edit one"
        )
    first_of = batch_of(folder, run.manifest)
    steps: dict[int, list[EditLine]] = {}
    for line in run.edits:
        steps.setdefault(first_of(line.index), []).append(line)
    kept = {first: lines for first, lines in sorted(steps.items()) if any(line.kept for line in lines)}
    if not kept:
        raise DataError(f"{folder}: no edit of this run was kept, so there is nothing to export")
    edits = tuple(replace(saved_edit(folder, first, lines), memory={}) for first, lines in kept.items())
    found = run.manifest.get("model_fingerprint")
    return Source(
        edits=edits,
        hparams=run.hparams,
        fingerprint=found if isinstance(found, str) else None,
        measured=_of_sequence(run, [line for lines in kept.values() for line in lines if line.kept]),
    )


def _of_sequence(run: Run, lines: Sequence[EditLine]) -> Measured | None:
    """All edits at the last evaluation of a run, against the original model; None before its first."""
    if not run.evaluations:
        return None
    last = run.evaluations[-1]
    before = [line.kept_record.values() for line in lines]
    rows = [
        _row(name, mean(row[name][0] for row in before if name in row), after) for name, after in last.means().items()
    ]
    rows.append((ppl_name(run.bos), shown_ppl(run.base), shown_ppl(last.ppl)))
    verdict = "Perplexity was not measured, so there is no verdict on collapse."
    if last.collapsed is not None:
        change = f"perplexity {shown_ppl(run.base)} → {shown_ppl(last.ppl)}, threshold {shown_ppl(run.threshold)}"
        verdict = f"{'Collapsed' if last.collapsed else 'No collapse'} ({change})."
    what = f"{len(last.retention)} edits together, after {last.after} requests of the run (means)"
    return Measured(what=what, rows=tuple(rows), verdict=verdict)


def _verdict(collapse: Collapse | None) -> str:
    if collapse is None:
        return "Perplexity was not measured, so there is no verdict on collapse."
    change = f"perplexity {shown_ppl(collapse.ppl_before)} → {shown_ppl(collapse.ppl_after)}"
    return f"{'Collapsed' if collapse.collapsed else 'No collapse'} ({change}, threshold {shown_ppl(collapse.limit)})."


def _row(name: str, before: float | None, after: float | None) -> tuple[str, str, str]:
    return name, shown_share(before), shown_share(after)
