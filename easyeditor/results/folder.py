"""A run folder: everything needed to know what was done and do it again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from easyeditor.base.errors import OutputError
from easyeditor.base.files import check_new, make_folder, write_json
from easyeditor.base.locks import working
from easyeditor.base.paths import CHECKOUT
from easyeditor.results.run import CONFIG, RESULT

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "accelerate")


@contextmanager
def run_folder(output: str | None, name: str) -> Iterator[Path]:
    """The run's folder, held by this process: `output` as given, or a new `results/<name>-<time>`. Never overwrites a
    run.

    If the block fails before anything is written, the empty folders made for it go again.

    Raises:
        OutputError: the folder cannot be made, or holds something already.
    """
    made: list[Path] = []
    folder = _new_folder(output, name, made)
    try:
        with working(folder):
            check_run(folder)  # another process may have been quicker
            yield folder
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


def check_run(folder: Path) -> None:
    """Raise OutputError if `folder` cannot be a new run's: a run is there, or something else is."""
    try:
        if not any((folder / name).exists() for name in (CONFIG, RESULT)):
            return check_new(folder)
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder}: cannot be the run folder ({error})") from error
    raise OutputError(f"{folder}: already holds a result; choose another --output")


def _new_folder(output: str | None, name: str, made: list[Path]) -> Path:
    """Make it; those that were not there are added to `made`, deepest first."""
    try:
        if output is not None:
            folder = Path(output)
            check_run(folder)
            made += make_folder(folder)
            return folder
        above = make_folder(Path("results"))
        stamp = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:80].strip('.')}-{datetime.now():%Y%m%d-%H%M%S}"
        for attempt in range(1000):
            folder = Path("results") / (stamp + (f"-{attempt}" if attempt else ""))
            try:
                folder.mkdir()
                made += [folder, *above]
                return folder
            except FileExistsError:
                if not folder.is_dir():
                    raise
    except (OSError, ValueError) as error:
        raise OutputError(f"{output or 'results'}: cannot make the run folder ({error})") from error
    raise OutputError(f"results: a thousand runs named {name} within one second")


def write_run(folder: Path, *, config: dict[str, Any], manifest: dict[str, Any], result: dict[str, Any]) -> None:
    """Write `config.json` (resolved hyper-parameters), `manifest.json` (environment, hashes, seeds, contexts),
    `result.json` last."""
    write_json(folder / "config.json", config)
    write_json(folder / "manifest.json", {**environment(), **manifest})
    write_json(folder / "result.json", result)


def environment() -> dict[str, Any]:
    """Versions, machine and command line."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    if CHECKOUT is None:
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
        )
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
