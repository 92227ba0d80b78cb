"""Standard streams that are closed, full or a broken pipe: the work is done, one line says it where one can be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from kill_kinds import furnish, picture
from script_runs import awaited, call, forked

GONE = {"closed": "Bad file descriptor", "full": "No space left on device", "pipe": "Broken pipe"}
SCRIPTS = ["single_case_edit", "mass_edit", "pretrain_mend", "ppl"]
PARTS = ["analysis", "convert", "dataset", "evaluate", "export", "report", "stats", "survey", "tune"]
COMMANDS = [f"easyeditor.commands.{part}" for part in (*SCRIPTS, *PARTS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = furnish(tmp_path_factory.mktemp("streams"))
    (folder / "own.txt").write_text("One sentence.\n", encoding="utf-8")
    return folder


def gone(ways: dict[int, str]) -> Callable[[], None]:
    """What leaves a process without these of its standard streams, as a shell starts it."""

    def make() -> None:
        for number, way in ways.items():
            if way == "closed":
                os.close(number)
            else:
                reader, writer = os.pipe() if way == "pipe" else (None, os.open("/dev/full", os.O_WRONLY))
                os.dup2(writer, number)
                for end in {reader, writer} - {None}:
                    os.close(end)
            stream = None if way == "closed" else open(number, "w", closefd=False)  # noqa: SIM115
            setattr(sys, ("stdin", "stdout", "stderr")[number], stream)

    return make


@pytest.mark.parametrize("way", GONE)
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_cannot_be_written_is_said_in_one_line(command: str, way: str, place: Path, tmp_path: Path) -> None:
    flags = ["--help"]
    if command.endswith(".ppl"):
        flags = ["--json", "--device", "cpu", "--model", f"{place}/llama", "--data", f"{place}/own.txt"]
    code = awaited(forked(import_module(command), flags, first=gone({1: way}), err=tmp_path / "err"))
    last = (tmp_path / "err").read_text().splitlines()[-1]
    assert code == 2, last
    assert last == f"error: standard output: cannot be written ({GONE[way]}); files are whole, what was printed is not"


@pytest.mark.parametrize("way", GONE)
@pytest.mark.parametrize("streams", [(2,), (0, 1, 2)])
def test_messages_that_cannot_be_written_cost_nothing(
    way: str, streams: tuple[int, ...], place: Path, tmp_path: Path
) -> None:
    mass, run = import_module("mass_edit"), tmp_path / "run"
    first = gone(dict.fromkeys(streams, way) | ({0: "closed"} if 0 in streams else {}))
    assert awaited(forked(mass, ["--no-such-flag"], first=first)) == 2
    flags = ["--hparams", f"{place}/rome.yaml", "--data", f"{place}/data.json", "--output", str(run)]
    assert awaited(forked(mass, flags, first=first)) == (2 if 1 in streams else 0)
    found = picture(run)
    assert len(found["results.jsonl"]) == 4
    assert found["summary.json"]["complete"]


@pytest.mark.parametrize("command", ["{} --help >&-", "{} --list >/dev/full", "{} --no-flag 2>/dev/full", "{} <&- >&-"])
def test_in_a_shell_nothing_else_is_said(command: str) -> None:
    run = command.format(f"{sys.executable} -m easyeditor.evaluate")
    ran = subprocess.run(["bash", "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == ("2>" not in command)


@pytest.mark.parametrize("size", ["0", "1", "99999999999", "²"])
def test_a_width_that_is_none_is_no_width(
    size: str, place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", size)
    monkeypatch.setenv("LINES", size)
    files = ["--hparams", place / "rome.yaml", "--data", place / "data.json"]
    ran = call(import_module("mass_edit"), [*files, "--limit", "1", "--output", tmp_path / "r"], monkeypatch, capsys)
    assert ran.code == 0
    assert 20 < max(map(len, ran.out.splitlines())) < 400
