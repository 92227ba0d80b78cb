"""pip with a sign of life: what is fetched and how much so far, then how far the installation is.

    .venv/bin/python tools/install.py -r requirements.txt

Plain lines, one at most every 10 seconds besides the names of large files; pip's own output only when it fails. Needs
nothing but Python and pip: it runs before anything is installed. Exit code: pip's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

EVERY_SECONDS = 10.0
LARGE_MB = 20.0
_FETCHED = re.compile(r"^\s*(Downloading|Using cached) (\S+\.(?:whl|tar\.gz|zip)) \(([\d.]+) (kB|MB|GB)\)")
_MEGA = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}


class Told:
    """Lines with the seconds since the start; knows when the last one was."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.installing = 0

    def say(self, text: str) -> None:
        """One line, now."""
        self._last = time.monotonic()
        print(f"   {self._last - self._started:4.0f} s  {text}", flush=True)

    def beat(self, scratch: Path, packages: Path) -> None:
        """A line if nothing was said for a while: megabytes on disk."""
        if time.monotonic() - self._last < EVERY_SECONDS:
            return
        if self.installing:
            self.say(f"installing {self.installing} packages: {_megabytes(packages):,.0f} MB on disk")
        else:
            fetched = sum(
                _megabytes(folder) for folder in scratch.iterdir() if folder.is_dir()
            )  # files: cache's copies
            self.say(f"{fetched:,.0f} MB fetched" if fetched >= 0.5 else "waiting for the package index")


def main(arguments: list[str]) -> int:
    """Install into this interpreter's environment what `pip install` is to be told."""
    with tempfile.TemporaryDirectory(prefix="install-") as scratch:
        command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check"]
        pip = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": scratch, "PIP_ROOT_USER_ACTION": "ignore", "NO_COLOR": "1"},
        )
        told, done = Told(), threading.Event()
        watch = threading.Thread(target=_watch, args=(told, done, Path(scratch)), daemon=True)
        watch.start()
        lines = _follow(pip, told)
        done.set()
        watch.join()
    if pip.returncode != 0:
        wrong = [line for line in lines if line.startswith("ERROR")] or lines[-15:]
        print("\n".join(wrong), file=sys.stderr)
    return pip.returncode


def _follow(pip: subprocess.Popen[str], told: Told) -> list[str]:
    """Read pip's output to its end; say what matters of it; return it all."""
    lines = []
    assert pip.stdout is not None
    for line in pip.stdout:
        lines.append(line.rstrip())
        found = _FETCHED.match(line)
        if found and (size := float(found[3]) * _MEGA[found[4]]) >= LARGE_MB:
            told.say(f"{found[1].lower()} {'-'.join(found[2].split('-')[:2])} ({size:,.0f} MB)")
        elif line.startswith("Installing collected packages:"):
            told.installing = line.count(",") + 1
            told.say(f"installing {told.installing} packages")
    pip.wait()
    if pip.returncode == 0:
        told.say("installed")
    return lines


def _watch(told: Told, done: threading.Event, scratch: Path) -> None:
    packages = Path(sysconfig.get_path("purelib"))
    while not done.wait(1.0):
        told.beat(scratch, packages)


def _megabytes(folder: Path) -> float:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total / 1e6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
