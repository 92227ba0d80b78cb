"""Before any work: no place that is to be written is, contains or lies in what is read, or in another such place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from easyeditor.errors import OutputError
from easyeditor.files import check_free, check_place
from easyeditor.lm import embedded

Places = Mapping[str, str | Path | None]
"""Flag -> place; None: not given."""


def check_outputs(
    *,
    files: Places | None = None,
    folders: Places | None = None,
    shared: Places | None = None,
    reads: Mapping[str, Any] | None = None,
) -> None:
    """Check all that will be written against all that will be read, both by flag.

    Args:
        files: written whole, in place of nothing or of a file.
        folders: made new: absent or empty.
        shared: folders that others look after too (a run's, a report's, statistics): only their place is checked.
        reads: files, folders, lists of them, names of models; what is no place on this machine is left out.

    Raises:
        OutputError: names the two places that touch, or the one that cannot be written.
    """
    for place in _given(files).values():
        check_place(place)
    for place in _given(folders).values():
        check_free(place)
    targets = {**_given(files), **_given(folders), **_given(shared)}
    read = [(flag, place) for flag, value in (reads or {}).items() for place in _read(value)]
    for number, (flag, place) in enumerate(targets.items()):
        for other, its in [*read, *list(targets.items())[number + 1 :]]:
            if relation := _relation(_resolved(place), _resolved(its)):
                raise OutputError(f"{flag} {place} {relation} {other} {its}; choose a place of its own")


def _relation(place: Path, other: Path) -> str | None:
    if place == other:
        return "is the place of"
    if place.is_relative_to(other):
        return "lies in"
    return "contains" if other.is_relative_to(place) else None


def _given(places: Places | None) -> dict[str, Path]:
    return {flag: Path(place) for flag, place in (places or {}).items() if place is not None}


def _read(value: Any) -> Iterator[Path]:
    """The places behind what a flag names: a file or folder that is there, an embedded model's folder."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _read(item)
    elif isinstance(value, (str, Path)) and str(value):
        if (known := embedded.find(str(value))) is not None:
            yield known.folder
        elif _resolved(Path(value)).exists():
            yield Path(value)


def _resolved(place: Path) -> Path:
    try:
        return place.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL in the name
        raise OutputError(f"{place}: is no place for a file ({error})") from error
