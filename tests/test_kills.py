"""Ended at every point where the disk changes, and resumed: nothing lost, nothing doubled, nothing different.

The points are those of an undisturbed run (crash_points.py). `make test` ends runs at some of them, evenly spread over
each kind; `make kills` (KILLS=1000) at every one. docs/reliability.md has the counts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT
from crash_points import End, ends, spread, watch
from kill_kinds import KINDS, Job, furnish, harm, picture
from script_runs import awaited, forked
from test_mass import close, lines, timeless

from easyeditor.commands import mass_edit

EACH = int(os.environ.get("KILLS", "4"))  # kills of each kind; as many as it has places to kill at, if that is fewer

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kind:
    """One kind of run: how many processes, its commands for a folder, and where its folders and logs go."""

    world: int
    jobs: Callable[[Path], list[Job]]
    scratch: Path
    logs: dict[tuple[int, int], Path] = field(default_factory=dict)

    def run(self, root: Path, end: End | None = None) -> int:
        """Begin, or go on with, the run in `root`. How it ended: an exit code, or minus a signal."""
        for number, job in enumerate(self.jobs(root)):
            here = end if end is not None and end.job == number else None
            children = self._start(number, job, root, here)
            code = awaited(children.pop(0 if here is None else here.rank))
            for other in children:
                if code:  # torchrun ends the others when one has died
                    os.kill(other, signal.SIGKILL)
                code = code or awaited(other)
            if code:
                return code
        return 0

    def _start(self, number: int, job: Job, root: Path, end: End | None) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        flags, children = job.now(), []
        for rank in range(self.world):
            self.logs[number, rank] = log = self.scratch / f"points-{number}-{rank}"

            def first(rank: int = rank, log: Path = log) -> None:
                if self.world > 1:
                    who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
                    os.environ.update(who, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                watch(root, log, end if end is not None and end.rank == rank else None)

            children.append(forked(job.script, flags, first=first, typed=job.typed()))
        return children


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("kills"))


@pytest.fixture
def kind(request: pytest.FixtureRequest, place: Path, tmp_path: Path) -> Kind:
    if request.param in ("guard", "several"):  # no tiny edit collapses a tiny model
        request.getfixturevalue("touchy")
    world, jobs = KINDS[request.param]
    return Kind(world, lambda root: jobs(place, root), tmp_path)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_killed_at_any_point_a_resumed_run_equals_an_undisturbed_one(kind: Kind, tmp_path: Path) -> None:
    root = tmp_path / "run"  # every run in one place: some files name it
    root.mkdir()
    assert kind.run(root) == 0
    found, wanted = list(ends(dict(kind.logs))), picture(root)
    chosen = spread(found, EACH)
    for end in chosen:
        shutil.rmtree(root)
        root.mkdir()
        assert kind.run(root, end) == -signal.SIGKILL, end
        assert kind.run(root) == 0, end
        assert harm(wanted, picture(root)) == [], end
    told = f"{len(chosen)} kills, {len(found)} places to kill at: 0 lost, 0 doubled, 0 different"
    print(told)  # noqa: T201 - for `make kills`


def test_a_process_that_has_nothing_left_to_do_leaves_no_journal(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = KINDS["single"][1](place, tmp_path / "run")
    assert awaited(forked(job.script, job.now())) == 0
    before = picture(tmp_path / "run")
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert awaited(forked(job.script, job.now())) == 0
    assert picture(tmp_path / "run") == before


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from easyeditor.results import journal
written = journal.Journal.append
def append(self, line):
    written(self, line)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.append = append
from easyeditor.commands import mass_edit
from easyeditor.commands.cli import run
run(mass_edit.main)
"""


def test_torchrun_starts_again_after_one_of_two_processes_has_died(place: Path, tmp_path: Path) -> None:
    def flags(run: str) -> list[str]:
        return KINDS["single"][1](place, tmp_path / run)[0].flags

    assert awaited(forked(mass_edit, flags("one"))) == 0
    (tmp_path / "dying.py").write_text(DYING.format(root=str(ROOT)), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(tmp_path / "dying.py"), *flags("two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert two.returncode == 0, two.stderr
    assert "exitcode: -9" in two.stderr, "the second process was to die once"
    ours, theirs = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert close(timeless(ours), timeless(theirs))  # shared out, edits are grouped otherwise: the last digits differ
    assert list((tmp_path / "two").glob("results.rank*")) == []
    manifests = [json.loads((tmp_path / run / "manifest.json").read_text()) for run in ("one", "two")]
    assert [m["world_size"] for m in manifests] == [1, 2]
