"""A run's manifest, read: whole JSON may still be damaged, and a resumed run goes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.results.run import read_object
from easyeditor.values.plain import integer, text

Parse = Callable[[Any], Any]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest as JSON has it. Raises DataError: not readable, or damaged."""
    raw = dict(read_object(path))
    try:
        for key, parse in PARTS.items():
            parse(raw[key])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not the manifest of a run ({type(error).__name__}: {error}); start a new run"
        ) from error
    return raw


def _texts(values: Any) -> None:
    if not isinstance(values, list):
        raise ValueError(f"expected a list of texts, found {values!r}")
    for value in values:
        text(value)


def _data(raw: Any) -> None:
    text(raw["sha256"])
    text(raw["format"])
    len(raw["bad"])


def _count(value: Any) -> None:
    if not integer(value):
        raise ValueError("expected 1 or more, found 0")


PARTS: dict[str, Parse] = {
    "data": _data,
    "selected": integer,
    "method": text,
    "model_fingerprint": text,
    "together": _count,
    "context_templates": _texts,
    "sentences": lambda raw: None if raw is None else text(raw["sha256"]),
    "config_sha256": text,
}
"""What a run needs of it, and what raises where that is of another kind."""
