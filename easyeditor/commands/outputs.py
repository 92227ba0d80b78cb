"""Before any work: all that a command reads and writes, from its flags, checked once; what it writes is its own."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError, DataError, OutputError
from easyeditor.base.files import check_free, check_parent, check_place, read_json, sweep, sweep_for
from easyeditor.base.locks import check_above, lock_of, locked
from easyeditor.lm import embedded
from easyeditor.results.folder import check_run
from easyeditor.results.journal import KEPT, check_kept

SHARED = ("stats_dir", "targets_dir", "save_keys_path")
"""Hyper-parameters that name folders in which several commands read and write at a time."""
WRITTEN = SHARED[1:]
"""Those in which an edit writes files of its own."""
FOLDERS = ("--model", "--base-model", "model_name", "stats_dir")
"""What is read as a folder, where it is there."""


def _check_replaced(path: Path, ours: Callable[[Any], bool]) -> None:
    check_place(path)
    if path.exists() and path.stat().st_size:
        try:
            known = ours(read_json(path))
        except DataError:
            known = False
        if not known:
            raise OutputError(f"{path}: is there and not what this command writes; choose another, or move it away")


def _check_absent(path: Path) -> None:
    check_place(path)
    if path.exists():
        raise OutputError(f"{path}: is there already; choose another, or move it away")


def _check_folder(path: Path) -> None:
    check_parent(path / "new" if path.is_dir() else path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is there already and not a folder; choose another")


def _check_report(path: Path) -> None:
    from easyeditor.report.build import check_output

    check_output(path)


def _check_survey(path: Path) -> None:
    from easyeditor.survey.cells import PAGE

    _check_folder(path)
    _check_report(path / PAGE)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and "model" in value


def _are_requests(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


KINDS: dict[str, Callable[[Path], None]] = {
    "record": functools.partial(_check_replaced, ours=_is_record),
    "requests": functools.partial(_check_replaced, ours=_are_requests),
    "new file": _check_absent,
    "new folder": check_free,
    "report": _check_report,
    **{f"kept of {of}": functools.partial(check_kept, of=of) for of in KEPT},
    "survey": _check_survey,
    "run": check_run,
    "run to resume": _check_folder,
    **dict.fromkeys(("shared", *WRITTEN), _check_folder),
}
"""What a flag writes -> the check of its place. A flag that gives a hyper-parameter its value is of that key's kind."""
LOCKED_WITHIN = ("survey", "run", "run to resume", "shared", *WRITTEN)
"""Kinds of folders that hold locks of their own."""


@dataclass(frozen=True)
class Places:
    """All that a command reads, as (flag or key, place), and all that it writes, as (flag, place, kind)."""

    reads: tuple[tuple[str, Path], ...]
    writes: tuple[tuple[str, Path, str], ...]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """What is written is this process's inside the block; what a killed one had begun there is removed.

        Raises:
            OutputError: another process is at work on one of them.
        """
        with ExitStack() as stack:
            for _, place, kind in self.writes:
                target = _resolved(place)
                if kind in LOCKED_WITHIN:
                    check_above(target)
                else:
                    stack.enter_context(locked(lock_of(target), str(place)))
                    sweep_for(target)
                    for folder in (place, *place.glob("*/")) if kind == "report" else ():
                        sweep(folder)
                    KINDS[kind](place)  # the process that had it may just have ended
            yield


def checked(
    args: argparse.Namespace,
    reads: Mapping[str, Any] | None = None,
    *,
    writes: Mapping[str, Path] | None = None,
    first: bool = True,
) -> Places:
    """Check all that the flags (`args.places`) and `reads` name; `writes` are places of flags that were not given.
    Processes of torchrun but the `first` write nothing of their own.

    Raises:
        OutputError: names the two places that touch, or the one that cannot be written or would cost what is there.
        ConfigError: a model or a statistics folder that is there and is no folder.
    """
    written, read = [], []
    for flag, (name, kind) in args.places.items():
        value = (writes or {}).get(flag, getattr(args, name))
        if not kind:
            read += [(flag, path) for path in _read(flag, value)]
        elif value is not None:
            written.append((flag, Path(value), kind))
    by_flag = {kind for *_, kind in written}
    for flag, value in (reads or {}).items():
        key = flag.split()[-1]  # a survey names the cell before it
        if key not in WRITTEN:
            read += [(flag, path) for path in _read(flag, value)]
        elif value and key not in by_flag:
            written.append((flag, Path(value), key))
    for number, (flag, place, kind) in enumerate(written):
        others = [(name, path) for name, path in read if not (kind in ("shared", *WRITTEN) and name in SHARED)]
        for other, its in [*others, *((name, path) for name, path, _ in written[number + 1 :])]:
            if kind == "report" and place == its / "report":
                continue  # a run's own
            relation = _relation(place, its)
            if relation and not (flag.split()[-1] in WRITTEN and (relation == "contains" or other in WRITTEN)):
                raise OutputError(f"{flag} {place} {relation} {other} {its}; choose a place of its own")
    for _, place, kind in written if first else ():
        check_above(_resolved(place) / "within")  # first: else another process's files look foreign
        KINDS[kind](place)
    return Places(reads=tuple(read), writes=tuple(written) if first else ())


def _relation(place: Path, other: Path) -> str | None:
    ours, theirs = _resolved(place), _resolved(other)
    if str(ours).casefold() == str(theirs).casefold() or _same_file(ours, theirs):
        return "is the place of"
    if ours.is_relative_to(theirs):
        return "lies in"
    return "contains" if theirs.is_relative_to(ours) else None


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there
        return False


def _read(flag: str, value: Any) -> Iterator[Path]:
    """The places behind what a flag or a key names: a file or folder that is there, a YAML without its ending, the file
    of FILE:NAME, an embedded model's folder. Raises ConfigError: something else is there than a folder."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _read(flag, item)
    elif isinstance(value, (str, Path)) and str(value):
        text = str(value)
        if (known := embedded.find(text)) is not None:
            yield known.folder
        folder = flag.split()[-1] in FOLDERS
        if folder and known is None and os.path.exists(text) and not os.path.isdir(text):
            raise ConfigError(f"{text}: is not a folder, and {flag} must name one")
        names = (text,) if folder else (text, f"{text}.yaml", text.rpartition(":")[0])
        yield from (Path(one) for one in names if one and os.path.exists(one))


def _resolved(place: Path) -> Path:
    try:
        return Path(os.path.realpath(place))
    except ValueError as error:  # a NUL in the name
        raise OutputError(f"{place}: is no place for a file ({error})") from error
