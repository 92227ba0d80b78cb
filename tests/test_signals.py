"""SIGTERM and SIGINT end a run cleanly: exit code 143 or 130, one line, and a run that can be resumed."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_points import ends, spread
from kill_kinds import furnish, harm, picture, plan_of
from script_runs import awaited, forked
from test_kills import Kind, kind  # noqa: F401 - a fixture

from easyeditor.commands import mass_edit, ppl, pretrain_mend, single_case_edit
from easyeditor.commands import stats as stats
from easyeditor.commands import survey as survey
from easyeditor.commands.cli import quiet_transformers
from easyeditor.survey import running

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("signals"))


def script_flags(place: Path, out: Path) -> dict[Any, list[Any]]:
    """Every script with flags of a run that would succeed."""
    facts, rome = place / "facts.json", place / "rome.yaml"
    return {
        single_case_edit: ["--hparams", rome, "--output", out],
        mass_edit: ["--hparams", rome, "--data", place / "data.json", "--output", out],
        pretrain_mend: ["--hparams", place / "mend.yaml", "--train", facts, "--output", out],
        ppl: ["--model", place / "llama", "--output", out / "ppl.json"],
        stats: ["--model", place / "llama", "--layers", 0, "--corpus", place / "own.jsonl", "--output", out],
    }


@pytest.mark.parametrize("signum", CODES, ids=lambda s: s.name)
@pytest.mark.parametrize("script", [single_case_edit, mass_edit, pretrain_mend, ppl, stats], ids=lambda s: s.__name__)
def test_every_script_ends_with_one_line_and_the_signal_s_exit_code(
    script: Any, signum: signal.Signals, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "quiet_transformers", lambda: os.kill(os.getpid(), signum))
    flags = list(map(str, script_flags(place, tmp_path / "out")[script]))
    assert awaited(forked(script, flags, err=tmp_path / "err")) == CODES[signum]
    said = (tmp_path / "err").read_text().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("interrupted")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("signum", CODES, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["single", "sequential", "statistics", "training"], indirect=True)
def test_a_run_that_a_signal_ended_goes_on_to_the_same_end(
    kind: Kind,  # noqa: F811
    signum: signal.Signals,
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    assert kind.run(root) == 0
    wanted = picture(root)
    for end in spread([end for end in ends(dict(kind.logs), signum) if not end.torn], 3):
        shutil.rmtree(root)
        root.mkdir()
        assert kind.run(root, end) == CODES[signum], end
        assert kind.run(root) == 0, end
        assert harm(wanted, picture(root)) == [], end


def test_a_run_says_how_to_go_on_with_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyeditor.results.journal import Journal
    from easyeditor.trainer.editor import EditTrainer

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "append", stop)
    monkeypatch.setattr(EditTrainer, "_steps", stop)
    monkeypatch.setattr("easyeditor.stats.collect._add_window", stop)
    for script, how in (
        (mass_edit, f"go on with --resume {tmp_path / 'mass_edit'}"),
        (pretrain_mend, "go on with --resume"),
        (stats, "go on with --resume"),
    ):
        flags = list(map(str, script_flags(place, tmp_path / script.__name__.rpartition(".")[2])[script]))
        assert awaited(forked(script, flags, err=tmp_path / "err")) == 143
        last = (tmp_path / "err").read_text().splitlines()[-1]
        assert last.startswith("interrupted"), last
        assert how in last


def in_a_collection() -> None:
    """The signal comes while garbage is collected: Python drops what its handler raises."""
    gc.callbacks.append(lambda phase, _: os.kill(os.getpid(), signal.SIGINT) if phase == "start" else None)
    gc.collect()
    gc.callbacks.clear()


def in_a_library() -> None:
    """A library makes an error of its own of what the handler raises."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("the library's own") from error


def swallowed() -> None:
    """Somebody else's code drops what the handler raises."""
    with suppress(BaseException):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("lost", [in_a_collection, in_a_library, swallowed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("script", [single_case_edit, mass_edit, pretrain_mend, ppl, stats], ids=lambda s: s.__name__)
def test_a_signal_whose_exception_is_lost_ends_the_script_all_the_same(
    script: Any, lost: Callable[[], None], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun() -> None:
        quiet_transformers()
        monkeypatch.setattr("torch.nn.Module.__call__", seen)
        lost()

    def seen(*_: Any, **__: Any) -> None:
        os._exit(77)  # the model was asked after the signal

    monkeypatch.setattr(script, "quiet_transformers", begun)
    flags = list(map(str, script_flags(place, tmp_path / "out")[script]))
    assert awaited(forked(script, flags, err=tmp_path / "err")) == 130
    said = (tmp_path / "err").read_text()
    assert said.startswith("interrupted")
    assert said.count("\n") == 1, said


def test_a_cell_in_which_a_signal_was_lost_is_no_failure_and_the_survey_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "run_cell", lambda cell, show: in_a_library() if cell.seed else swallowed())
    for seeds in ("[0, 1]", "[1, 0]"):
        (tmp_path / "plan.yaml").write_text(plan_of(place, tmp_path / "out", seeds=seeds), encoding="utf-8")
        flags = [str(tmp_path / "plan.yaml")]
        assert awaited(forked(survey, flags, err=tmp_path / "err")) == 130
        assert "interrupted; " in (tmp_path / "err").read_text()
        assert not list(tmp_path.glob("out/failed/*.json"))


@pytest.mark.parametrize(("pause", "under", "code"), [(0.0, "", 130), (0.3, "", 128 + 15), (0.3, "torchrun", 130)])
def test_a_second_signal_ends_at_once_unless_it_is_the_same_one(
    pause: float, under: str, code: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:  # while the script takes its leave
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("easyeditor.base.process.AGAIN", 0.2)
    if under:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", under)
    monkeypatch.setattr(ppl, "quiet_transformers", twice)
    flags = list(map(str, script_flags(place, tmp_path / "out")[ppl]))
    assert awaited(forked(ppl, flags, err=tmp_path / "err")) == code
    assert (tmp_path / "err").read_text().startswith("interrupted again" if code == 143 else "interrupted\n")


@pytest.mark.parametrize("fail", [lambda: torch.empty(2**50), lambda: bytearray(2**60)], ids=["torch", "python"])
def test_memory_that_runs_out_is_one_line(
    fail: Callable[[], Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppl, "quiet_transformers", fail)
    flags = list(map(str, script_flags(place, tmp_path / "out")[ppl]))
    assert awaited(forked(ppl, flags, err=tmp_path / "err")) == 2
    assert (tmp_path / "err").read_text().startswith("error: out of memory (")
