"""A mass edit from settings to summary: make or take up the run folder, do what is not recorded, sum up."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import discard, plain, read_json, to_json, write_json
from easyeditor.base.hparams import HyperParams
from easyeditor.base.locks import LOCK, locked, working
from easyeditor.base.progress import progress_bar
from easyeditor.dataset.probes import probes_of
from easyeditor.editing.editor import Editor
from easyeditor.methods.registry import hparams_class
from easyeditor.results.folder import environment, run_folder
from easyeditor.results.journal import Journal
from easyeditor.results.lines import EditLine, EvaluationLine, RunLine
from easyeditor.results.run import CONFIG, MANIFEST, SUMMARY, merge, run_lines
from easyeditor.runs.manifest import read_manifest
from easyeditor.runs.planning import Plan
from easyeditor.runs.ranks import Rank, wait_for, wait_for_all
from easyeditor.runs.sequence import DELTAS, run_sequence
from easyeditor.runs.settings import TYPED, RunSettings
from easyeditor.runs.single import run_screen, run_single
from easyeditor.runs.summary import summarise
from easyeditor.runs.work import Watch, Work, fitting, planned_lines

LOG = logging.getLogger(__name__)

MAY_DIFFER = ("run.skip_bad", "hparams.device")
"""What a resumed run may do differently: where it computes, and whether bad records stop it."""


def check_world(settings: RunSettings, rank: Rank, place: str | None) -> None:
    """Raise ConfigError unless this run can be shared out over the processes torchrun started."""
    if rank.world == 1:
        return
    if settings.mode != "single":
        raise ConfigError(
            f"mode {settings.mode} with {rank.world} processes: every edit builds on those before it, so it takes one "
            "process; only mode single is shared out"
        )
    if place is None:
        raise ConfigError(f"{rank.world} processes write to one run folder: name it with --output (or --resume)")


def stored(folder: Path) -> tuple[HyperParams, RunSettings]:
    """Hyper-parameters and settings of a run that was begun. Raises ConfigError: not a run, or its config damaged."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder}: not a run of mass_edit.py (no {CONFIG} in it); start one with --output {folder}")
    try:
        raw = read_json(path)
        hparams = hparams_class(raw["hparams"]["alg_name"]).from_dict(raw["hparams"], where=str(path))
        settings = RunSettings.from_dict(raw["run"], str(path))
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: not a run of mass_edit.py ({path}: {type(error).__name__}: {error})") from error
    return hparams, settings


def check_same(folder: Path, now: Plan) -> None:
    """Raise ConfigError, naming what differs, unless `now` is what the run in `folder` was begun with."""
    hparams, settings = stored(folder)  # keys that came later have their defaults
    then, wanted = _flat({"hparams": hparams.to_dict(), "run": settings.to_dict()}), _flat(now.config())
    differing = [
        f"{key.partition('.')[2]} was {then.get(key)!r}, now {wanted.get(key)!r}"
        for key in sorted(then.keys() | wanted.keys())
        if then.get(key) != wanted.get(key) and key not in MAY_DIFFER
    ]
    manifest = folder / MANIFEST
    if not differing and manifest.exists():
        before = read_manifest(manifest)
        if before["data"]["sha256"] != now.dataset.sha256:
            differing.append(f"{now.settings.data} has other content (sha256 {now.dataset.sha256[:12]}…)")
        elif before["config_sha256"] != _sha256(read_json(folder / CONFIG)):
            differing.append(f"{CONFIG} was changed after the run began")
        elif before["selected"] != (count := len(now.requests)):
            differing.append(f"{now.settings.data} gave {before['selected']} requests, now {count}")
    if differing:
        raise ConfigError(
            f"{folder}: cannot go on, the run was begun otherwise: {'; '.join(differing)}; give --resume alone, or "
            "start a new run"
        )


def begin(folder: Path, what: Plan) -> None:
    """Write `config.json`: from now on the folder is a run that can be resumed."""
    write_json(folder / CONFIG, what.config())


@contextmanager
def begun(output: str | None, what: Plan) -> Iterator[Path]:
    """A new run folder that is begun; if the block fails before the manifest is written (no such model), it goes;
    one that was interrupted stays."""
    name = f"{'typed' if what.settings.data == TYPED else 'mass'}-{what.hparams.alg_name.lower()}-{what.settings.mode}"
    with run_folder(output, name) as folder:
        begin(folder, what)
        try:
            yield folder
        except Exception:
            if not (folder / MANIFEST).exists():
                discard(folder / CONFIG)
            raise


@contextmanager
def taken_up(folder: Path, rank: Rank) -> Iterator[Path]:
    """A run that was begun, held by this process: one for each rank.

    Raises:
        OutputError: another process is at work in it.
    """
    own = working(folder, parts=DELTAS) if rank.first else locked(folder / f"{LOCK}-{rank.rank}", str(folder))
    with own:
        yield folder


def execute(
    folder: Path, what: Plan, make_editor: Callable[[HyperParams], Editor], rank: Rank, show: bool
) -> dict[str, Any] | None:
    """Do everything of the run that is not recorded; the first rank returns the summary (and writes it).

    Raises:
        ConfigError: another model than the run's, or a guard the method has no remedy for. DataError, OutputError.
    """
    settings = what.settings
    if rank.first:
        LOG.info(what.dataset.said(what.requests))
    editor = make_editor(what.hparams)
    if settings.on_collapse == "remedy" and editor.method.remedy is None:
        raise ConfigError(f"on_collapse remedy: {editor.method.title} has no remedy that is not on already")
    if not rank.first:  # the first rank makes contexts, statistics and the manifest; the others take them
        wait_for(folder / MANIFEST)
    together = settle_model(folder, what, editor, rank)
    sequence = settings.mode != "single"
    done: dict[int, RunLine] = {}
    evaluated: set[int] = set()
    for line in planned_lines(folder, settings, what.requests):
        if isinstance(line, EvaluationLine):
            evaluated.add(line.after)
        else:
            done[line.index] = _brief(line, sequence)
    numbers = what.share(rank)
    mine = [n for n in numbers if n in done]
    if not rank.first and len(mine) == len(numbers):
        return None  # and no journal is opened: the first rank may have put all together already
    title = f"{'screening' if settings.screen else settings.mode} {editor.method.title}"
    with (
        Journal(folder / rank.journal) as journal,
        progress_bar(title, show and rank.first, initial=len(mine)) as bar,
    ):
        watch = Watch(bar, len(numbers))
        for n in mine:
            watch.seen(done[n])
        work = Work(
            editor=editor,
            settings=settings,
            together=together,
            requests=what.requests,
            numbers=numbers,
            starts=what.starts,
            journal=journal,
            folder=folder,
            done=done,
            evaluated=evaluated,
            watch=watch,
        )
        work = replace(work, numbers=fitting(work))
        (run_screen if settings.screen else run_sequence if sequence else run_single)(work)
        if rank.first:  # who else writes is not awaited yet, and puts nothing together
            journal.check()
    if not rank.first:
        return None
    if rank.world > 1:
        wait_for_all(folder, len(what.requests))
    return finish(folder)


def finish(folder: Path) -> dict[str, Any]:
    """Merge the ranks' journals, sum up, write `summary.json`."""
    merge(folder)
    summary = summarise(folder)
    write_json(folder / SUMMARY, summary)
    return summary


def settle_model(folder: Path, what: Plan, editor: Editor, rank: Rank) -> int:
    """Contexts and statistics on the unedited model, the same for all ranks and resumptions; the manifest when new.
    Returns how many edits are computed together, the same for all, too."""
    path = folder / MANIFEST
    if path.exists():
        before = read_manifest(path)
        if before["model_fingerprint"] != editor.fingerprint():
            raise ConfigError(f"{folder}: was begun with other weights than {what.hparams.model_name} has now")
        if _texts(before["sentences"]) != _texts(None if editor.sentences is None else editor.sentences.to_json()):
            raise ConfigError(f"{folder}: was begun with other perplexity sentences than are found now")
        editor.method.use_contexts(before["context_templates"])
        editor.method.prepare()
        return int(before["together"] if what.settings.together == "auto" else what.settings.together)
    if next(run_lines(folder), None) is not None:
        raise ConfigError(f"{folder}: not a whole run ({MANIFEST} is missing, but there are results)")
    editor.method.prepare()
    config, together = what.config(), what.settings.together
    if together == "auto":
        together = editor.method.together(what.requests)
    manifest = {
        **environment(),
        "data": what.dataset.to_json(),
        "selected": len(what.requests),
        "records": len(what.records),
        "batches": list(what.starts) if what.settings.mode == "batch" else None,
        "probes": probes_of(what.requests),
        "method": editor.method.title,
        "model_fingerprint": editor.fingerprint(),
        "context_templates": list(editor.method.contexts),
        "seed": what.hparams.seed,
        "together": together,
        "sentences": None if editor.sentences is None else editor.sentences.to_json(),
        "world_size": rank.world,
        "config_sha256": _sha256(config),
    }
    write_json(path, manifest)
    return together


def _texts(sentences: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """What identifies a perplexity set, wherever its file lies."""
    return None if sentences is None else (sentences["sha256"], sentences["sentences"])


def _brief(line: RunLine, sequence: bool) -> RunLine:
    """What is needed of a recorded line to go on: little, so that thousands fit."""
    return line.without_details(outputs=sequence) if isinstance(line, EditLine) else line


def _sha256(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key` -> value, as JSON reads it back."""
    parts = ("hparams", "run")
    return {f"{part}.{key}": value for part in parts for key, value in plain(config.get(part, {})).items()}
