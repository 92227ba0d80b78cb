"""What kill -9 leaves half-written goes at the next start of the same output, and nothing else does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from script_runs import awaited, call
from test_locks import forked, waiting
from test_mend_training import records
from test_mend_training import write_yaml as write_training

from easyeditor.base.files import to_json, whole_folder
from easyeditor.commands import pretrain_mend

OURS = [".part-0123456789abcdef", ".part-fedcba9876543210"]
OTHERS = [".part-", ".part-notes", ".part-0123456789abcdef0", ".part-0123456789ABCDEF", "part-0123456789abcdef"]


def leave(folder: Path, names: list[str]) -> list[Path]:
    """Files of these names, and a folder in place of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names[:-1]:
        (folder / name).write_text("half")
    (folder / names[-1]).mkdir()
    (folder / names[-1] / "file").write_text("half")
    return [folder / name for name in names]


def test_a_resumed_run_takes_them_away(mass: Any, tmp_path: Path) -> None:
    assert mass("--output", "run", "--mode", "sequential", "--limit", "2").code == 0
    run = tmp_path / "run"
    gone = [*leave(run, OURS), *leave(run / "deltas", OURS), *leave(run / "deltas/000001", OURS)]
    kept = [*leave(run, OTHERS), *leave(tmp_path, OURS), *leave(run / "report", OURS)]
    assert mass("--resume", "run", fresh=False).code == 0
    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_a_link_of_that_name_goes_and_what_it_leads_to_stays(mass: Any, tmp_path: Path) -> None:
    assert mass("--output", "run", "--limit", "1").code == 0
    (mine,) = leave(tmp_path / "mine", ["folder"])
    (tmp_path / "run" / OURS[0]).symlink_to(mine)
    assert mass("--resume", "run", fresh=False).code == 0
    assert not (tmp_path / "run" / OURS[0]).is_symlink()
    assert (mine / "file").exists()


def test_a_new_run_in_a_folder_that_has_nothing_else(mass: Any, tmp_path: Path) -> None:
    gone = leave(tmp_path / "run", OURS)
    assert mass("--output", "run", "--limit", "1").code == 0
    assert [path for path in gone if path.exists()] == []


def test_a_training_takes_them_away(place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_training(tmp_path / "mend.yaml", place / "llama")
    (tmp_path / "facts.json").write_text(to_json(records()))
    flags = ["--hparams", "mend.yaml", "--train", "facts.json", "--val", "facts.json", "--output", "trained"]
    assert call(pretrain_mend, flags, monkeypatch, capsys).code == 0
    gone, kept = leave(tmp_path / "trained", OURS), leave(tmp_path / "trained", OTHERS)
    assert call(pretrain_mend, [*flags, "--resume"], monkeypatch, capsys).code == 0
    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_a_run_that_is_refused_takes_nothing_away(mass: Any, tmp_path: Path) -> None:
    kept = [*leave(tmp_path / "mine", OURS), *leave(tmp_path / "mine", ["file", "folder"])]
    assert mass("--output", "mine").code == 2
    assert mass("--resume", "mine", fresh=False).code == 2
    assert [path for path in kept if not path.exists()] == []


def half_written(target: Path, told: Path) -> None:
    """Begin a folder, say so, and wait to be killed."""
    with whole_folder(target) as part:
        (part / "model.safetensors").write_text("half")
        told.touch()
        signal.pause()


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(".part-*"))


def aged(path: Path) -> None:
    """As if it had been left an hour ago."""
    os.utime(path, (time.time() - 3600, time.time() - 3600))


def test_a_checkpoint_that_was_cut_short_is_begun_anew_without_its_rest(tmp_path: Path) -> None:
    child = forked(lambda: half_written(tmp_path / "edited", tmp_path / "told"))
    waiting((tmp_path / "told").exists, child)
    (part,) = parts(tmp_path)
    aged(part)
    with whole_folder(tmp_path / "edited") as own:  # another process is at work on it: its part stays
        (own / "file").write_text("whole")
    assert (part / "model.safetensors").exists()
    os.kill(child, signal.SIGKILL)
    assert awaited(child) == -signal.SIGKILL
    (others,) = [path for path in leave(tmp_path / "x", ["y", OURS[0]]) if path.is_dir()]
    others.rename(tmp_path / OURS[0])
    aged(part)
    aged(tmp_path / OURS[0])
    with whole_folder(tmp_path / "other") as own:
        (own / "file").write_text("whole")
    assert parts(tmp_path) == sorted([part, tmp_path / OURS[0]])  # of another output
    (tmp_path / "edited/file").unlink()
    with whole_folder(tmp_path / "edited") as own:
        (own / "file").write_text("whole again")
    assert parts(tmp_path) == [tmp_path / OURS[0]]
    assert (tmp_path / "edited/file").read_text() == "whole again"


@pytest.mark.parametrize("fresh", [True, False])
def test_one_that_has_just_begun_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    """Between making its folder and claiming it a process has nothing but the time to show that it lives."""
    child = forked(lambda: half_written(tmp_path / "edited", tmp_path / "told"))
    waiting((tmp_path / "told").exists, child)
    os.kill(child, signal.SIGKILL)
    awaited(child)
    (part,) = parts(tmp_path)
    if not fresh:
        aged(part)
    with whole_folder(tmp_path / "edited") as own:
        (own / "file").write_text("whole")
    assert part.exists() == fresh
