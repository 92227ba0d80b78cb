"""Progress: a bar on a terminal; in a log file plain lines, few of them."""

from __future__ import annotations

import io
import json
import os
import pty
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT

from easyeditor.base import progress
from easyeditor.base.process import OBEYED
from easyeditor.base.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_ten_seconds_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress_bar("edits ", True, initial=20) as show:
        assert show is not None
        for done in range(21, 51):
            clock[0] += 1.0
            show(done, 50, f"edit {done}")
    assert capsys.readouterr().err.splitlines() == [
        "edits: 30/50, 10 s, about 20 s left, edit 30",
        "edits: 40/50, 20 s, about 10 s left, edit 40",
        "edits: 50/50, 30 s, edit 50",
    ]


def test_what_is_short_is_one_line_and_what_stops_early_is_whole(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress_bar("search", True) as show:
        assert show is not None
        for done in range(1, 4):
            show(done, 25, "")
    with progress_bar("nothing to do", True), progress_bar("hidden", False) as none:
        assert none is None
    with pytest.raises(KeyboardInterrupt):
        _cut_short()
    assert capsys.readouterr().err == "search: 3/3, 0 s\ncut: 7/25, 0 s, about 0 s left\n"


def _cut_short() -> None:
    with progress_bar("cut", True) as show:
        assert show is not None
        show(7, 25, "")
        raise KeyboardInterrupt


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("edits", True) as show:
        assert show is not None
        for done in range(1, 4):
            show(done, 3, "")
    assert "100%" in terminal.getvalue()
    assert "\r" in terminal.getvalue()


HARMFUL = "a\x1b[31mb\x9bc\u202ed\x07e\rf\u200fg\x7f"
SCRIPT = f"""
import logging
from rich.table import Table
from easyeditor.commands import cli
from easyeditor.base.errors import ConfigError
from easyeditor.base.files import to_json
from easyeditor.base.process import terminal
from easyeditor.base.progress import progress_bar
DATA = {HARMFUL!r}

def main():
    print(to_json([DATA]))
    print("printed", DATA)
    logging.getLogger("x").warning("logged %s", DATA)
    table = Table(title=DATA)
    table.add_column(DATA)
    table.add_row(DATA)
    terminal(200).print(table)
    terminal(200).print(DATA, markup=False, style="bold")
    with progress_bar(DATA, True) as show:
        show(1, 2, DATA)
    raise ConfigError(DATA)

cli.run(main)
"""


def test_what_data_holds_is_shown_and_not_obeyed() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, cwd=ROOT)
    assert ran.returncode == 2
    out, err = ran.stdout.decode(), ran.stderr.decode()
    assert not OBEYED.search(out + err)
    assert json.loads(out.splitlines()[0]) == [HARMFUL]
    assert err.splitlines()[-1].startswith("error: a\\u001b[31mb\\u009bc\\u202ed")


def test_a_terminal_gets_our_styles_and_not_those_of_data() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    ran = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    said = b""
    with suppress(OSError):  # how the end of a terminal reads
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    assert ran.wait() == 2
    text = said.decode()
    assert "\x1b[1m" in text
    assert "\x1b[31m" not in text
    assert set(OBEYED.findall(text)) == {"\x1b", "\r"}


def test_an_installation_counts_what_arrives_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pip writes what it fetches to a folder of its own, and over https a second time to a file for its cache."""
    install = runpy.run_path(str(ROOT / "tools/install.py"))
    told = install["Told"]()
    (tmp_path / "pip-unpack-x").mkdir()
    for size, said in ((0, "waiting for the package index"), (3_000_000, "3 MB fetched")):
        for name in ("pip-unpack-x/torch.whl", "tmpx"):
            (tmp_path / name).write_bytes(b"0" * size)
        told._last -= install["EVERY_SECONDS"]
        told.beat(tmp_path, tmp_path)
        assert said in capsys.readouterr().out
