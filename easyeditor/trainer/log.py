"""A training run's log: one JSON line per interval and per validation, `log.jsonl` beside the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyeditor.errors import DataError, OutputError
from easyeditor.files import to_json, write_text

NAME = "log.jsonl"


def append(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add one line. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / NAME, "a", encoding="utf-8") as sink:
            sink.write(to_json(entry) + "\n")
    except OSError as error:
        raise OutputError(f"{folder / NAME}: cannot be written ({error})") from error


def rewind(folder: Path, step: int) -> None:
    """Drop what was logged after `step`: a resumed run says it again. A half-written last line goes too."""
    path = folder / NAME
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries of a log. Raises DataError."""
    path = folder / NAME
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable training log ({error})") from error


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
