"""SIGTERM and SIGINT end a run cleanly: exit code 143 or 130, one line, and a run that can be gone on with."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from crash_points import ends, spread
from kill_kinds import furnish, harm, picture
from script_runs import awaited, forked
from test_kills import Kind, kind  # noqa: F401 - a fixture

import mass_edit
import ppl
import pretrain_mend
import single_case_edit
from easyeditor.stats import __main__ as stats

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
        flags = list(map(str, script_flags(place, tmp_path / script.__name__)[script]))
        assert awaited(forked(script, flags, err=tmp_path / "err")) == 143
        last = (tmp_path / "err").read_text().splitlines()[-1]
        assert last.startswith("interrupted"), last
        assert how in last
