"""A mass edit killed again and again, and shared out over processes: the records equal those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from script_runs import awaited, ended, forked, save_tiny, write_yaml
from test_mass import QUICK, close, lines, record_of, timeless

import mass_edit

SUBJECTS = [f"{name}{i}" for i in range(3) for name in ("Bay", "Roland", "Berlin", "Oslo", "Cork", "Rome")]
KILLS = 10


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, its YAML and 18 requests."""
    write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), **QUICK)
    (tmp_path / "data.json").write_text(json.dumps([record_of(s) for s in SUBJECTS]), encoding="utf-8")
    return tmp_path


def begin(place: Path, output: Path, *flags: str) -> list[str]:
    return ["--hparams", str(place / "rome.yaml"), "--data", str(place / "data.json"), "--output", str(output), *flags]


def written(run: Path) -> int:
    path = run / "results.jsonl"
    return path.stat().st_size if path.exists() else -1


def run_killed(run: Path, flags: list[str], source: random.Random) -> int:
    """Start, kill with SIGKILL at a random point (before, while or after something is written), resume; how often."""
    kills = 0
    for _ in range(200):
        child = forked(mass_edit, ["--resume", str(run)] if (run / "config.json").exists() else flags)
        if kills == KILLS:
            assert awaited(child) == 0
            return kills
        before, waits_for = written(run), source.choice([0, 1, 1, 2])
        while waits_for and (code := ended(child)) is None:
            if written(run) != before:
                before, waits_for = written(run), waits_for - 1
            time.sleep(0.0005)
        if waits_for:
            assert code == 0
            return kills
        time.sleep(source.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        kills += awaited(child) == -signal.SIGKILL
    pytest.fail("killed too often")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--mode", "single", "--together", "4"], ["--mode", "sequential", "--eval-every", "4"]],
    ids=lambda f: f[1],
)
def test_killed_ten_times_the_records_are_those_of_an_undisturbed_run(flags: list[str], place: Path) -> None:
    assert awaited(forked(mass_edit, begin(place, place / "whole", *flags))) == 0
    kills = run_killed(place / "killed", begin(place, place / "killed", *flags), random.Random(4))
    assert kills == KILLS, f"the run ended after {kills} kills"
    whole, killed = lines(place / "whole"), lines(place / "killed")
    assert [(x["kind"], x["index"]) for x in killed] == [(x["kind"], x["index"]) for x in whole]
    assert timeless(killed) == timeless(whole)
    for saved in sorted((place / "whole").glob("deltas/*/edit.safetensors")):
        assert saved.read_bytes() == (place / "killed" / saved.relative_to(place / "whole")).read_bytes()
    summaries = [json.loads((place / run / "summary.json").read_text()) for run in ("whole", "killed")]
    assert summaries[0]["counts"] == summaries[1]["counts"]


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from easyeditor.runs import journal
written = journal.Journal.append
def append(self, line):
    written(self, line)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and line["index"] >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.append = append
import mass_edit
from easyeditor.cli import run
run(mass_edit.main)
"""


@pytest.mark.slow
def test_two_processes_of_which_one_dies_equal_one(place: Path) -> None:
    assert awaited(forked(mass_edit, begin(place, place / "one", "--limit", "10"))) == 0
    (place / "dying.py").write_text(DYING.format(root=str(ROOT)), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29547"]
    command = [*torchrun, "--max-restarts", "1", str(place / "dying.py"), *begin(place, place / "two", "--limit", "10")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert two.returncode == 0, two.stderr
    assert "exitcode: -9" in two.stderr, "the second process was to die once"
    ours, theirs = lines(place / "two"), lines(place / "one")
    assert [x["index"] for x in ours] == list(range(10))
    assert close(timeless(ours), timeless(theirs))  # shared out, edits are grouped otherwise: the last digits differ
    assert list((place / "two").glob("results.rank*")) == []
    manifests: list[Any] = [json.loads((place / run / "manifest.json").read_text()) for run in ("one", "two")]
    assert [m["world_size"] for m in manifests] == [1, 2]
