"""One process at a time: on a run, a training, a first fetch. A lock says who holds it and goes with its process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, rome_hparams, tokenizer
from script_runs import QUICK, Ran, awaited, call, record_of, save_tiny, write_yaml
from test_mend_training import records
from test_mend_training import write_yaml as write_training
from test_outputs import content

from easyeditor.base.errors import OutputError
from easyeditor.base.locks import locked
from easyeditor.commands import mass_edit, pretrain_mend
from easyeditor.commands import stats as stats
from easyeditor.lm import embedded
from easyeditor.methods.rome.method import ROME
from easyeditor.stats.corpus import Corpus

HOLDER = f"process {os.getpid()} on {socket.gethostname()}"


def visible(root: Path) -> dict[str, bytes | None]:
    return {place: kept for place, kept in content(root).items() if ".lock" not in place}


def waiting(until: Callable[[], bool], child: int) -> None:
    """Wait until the child has done something; it ending first fails the test."""
    while not until():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended"
        time.sleep(0.001)


def forked(work: Callable[[], object]) -> int:
    """A child process that does `work` and exits with 0, or 1 for an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def hold(path: Path, told: Path) -> None:
    """Take the lock, say so, keep it until killed."""
    with locked(path, "x"):
        told.touch()
        signal.pause()


# The lock


def test_a_lock_is_held_once_says_by_whom_and_leaves_nothing(tmp_path: Path) -> None:
    refused = pytest.raises(OutputError, match=f"the run: .*{HOLDER}")
    with locked(tmp_path / ".lock", "the run"), refused, locked(tmp_path / ".lock", "the run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / ".lock", "the run"):
        pass


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    child = forked(lambda: hold(tmp_path / ".lock", tmp_path / "told"))
    waiting((tmp_path / "told").exists, child)
    with pytest.raises(OutputError, match=f"process {child} on"), locked(tmp_path / ".lock", "x"):
        pass
    os.kill(child, signal.SIGKILL)
    assert awaited(child) == -signal.SIGKILL
    with locked(tmp_path / ".lock", "x"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["told"]


# A run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, YAMLs, data."""
    root = tmp_path_factory.mktemp("locks")
    write_yaml(root / "rome.yaml", save_tiny(root / "llama"), **QUICK)
    (root / "data.json").write_text(json.dumps([record_of("Bay"), record_of("Oslo")]))
    write_training(root / "mend.yaml", root / "llama")
    (root / "facts.json").write_text(json.dumps(records()))
    return root


@pytest.fixture
def script(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return lambda module, *flags: call(module, flags, monkeypatch, capsys)


MASS = ["--hparams", "rome.yaml", "--data", "data.json"]


@pytest.mark.parametrize("name", ["run", "new"])
def test_a_second_process_on_a_run_is_refused(name: str, script: Any, tmp_path: Path) -> None:
    assert script(mass_edit, *MASS, "--output", "run").code == 0
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/results.jsonl").write_text(lines[0])
    before = visible(tmp_path)
    flags = ["--resume", "run"] if name == "run" else [*MASS, "--output", "new"]
    Path("new").mkdir(exist_ok=name == "run")
    before = visible(tmp_path)
    with locked(Path(name) / ".lock", "x"):
        ran = script(mass_edit, *flags)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.splitlines()[-1].startswith(f"error: {name}: ")
        assert HOLDER in ran.err.splitlines()[-1]
        assert visible(tmp_path) == before
    assert script(mass_edit, *flags).code == 0
    assert not (tmp_path / name / ".lock").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_of_one_run_hold_a_lock_each(
    rank: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script(mass_edit, *MASS, "--output", "run").code == 0
    other = {"0": ".lock-1", "1": ".lock"}[rank]
    own = {"1": ".lock-1", "0": ".lock"}[rank]
    for key, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(key, value)
    with locked(tmp_path / "run" / other, "x"):
        assert script(mass_edit, "--resume", "run").code == 0
        with locked(tmp_path / "run" / own, "x"):
            assert script(mass_edit, "--resume", "run").code == 2


def test_a_second_collection_is_refused(script: Any, tmp_path: Path) -> None:
    Path("own.txt").write_text("The sea is blue.\n")
    flags = ["--model", "llama", "--layers", "1", "--corpus", "own.txt", "--samples", "1", "--output", "stats"]
    with locked(tmp_path / "stats/llama/own_stats/.collecting.lock", "x"):
        ran = script(stats, *flags)
    assert (ran.code, HOLDER in ran.err.splitlines()[-1]) == (2, True)
    assert script(stats, *flags).code == 0


def test_a_second_training_is_refused(script: Any, tmp_path: Path) -> None:
    flags = ["--hparams", "mend.yaml", "--train", "facts.json", "--val", "facts.json", "--output", "trained"]
    assert script(pretrain_mend, *flags).code == 0
    before = visible(tmp_path)
    with locked(Path("trained/.lock"), "x"):
        ran = script(pretrain_mend, *flags, "--resume")
    assert (ran.code, ran.out) == (2, "")
    assert HOLDER in ran.err.splitlines()[-1]
    assert visible(tmp_path) == before


# A first fetch


def finished(folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("whole")


def test_a_second_first_fetch_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> Path:
        raise AssertionError("fetched twice")

    monkeypatch.setattr(embedded, "obtain_sliced", fetch)
    monkeypatch.setattr("easyeditor.base.locks.LOG.info", lambda *_: (tmp_path / "waits").touch())
    with locked(tmp_path / "cache/.model.lock", "x"):
        child = forked(lambda: embedded.ensure(embedded.MODELS[0], tmp_path / "cache/model"))
        waiting((tmp_path / "waits").exists, child)
        finished(tmp_path / "cache/model")
        kept = (tmp_path / "cache/model").stat().st_ino
    assert awaited(child) == 0
    assert (tmp_path / "cache/model").stat().st_ino == kept
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["model"]


def test_the_excerpt_is_fetched_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyeditor.stats import corpus

    file = tmp_path / "cache/excerpt.jsonl"
    monkeypatch.setattr(corpus, "EXCERPT_FILE", file)
    monkeypatch.setattr("easyeditor.base.locks.LOG.info", lambda *_: (tmp_path / "waits").touch())
    monkeypatch.setattr(corpus, "obtain", lambda *_: pytest.fail("fetched twice"))
    with locked(tmp_path / "cache/.excerpt.jsonl.lock", "x"):
        child = forked(lambda: list(corpus.open_corpus(corpus.EXCERPT).documents))
        waiting((tmp_path / "waits").exists, child)
        file.write_text(json.dumps({"text": "a"}) + "\n")
    assert awaited(child) == 0
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["excerpt.jsonl"]


# Second moments that an edit lacks


def test_second_moments_are_collected_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that lack them (two cells of a survey) one collects, the other waits and reads."""
    from easyeditor.methods.locate import statistics
    from easyeditor.stats import gather

    texts = Corpus(name="own", identity="3", documents=["The sea is blue.", "Rome is in Italy.", "He came home."])
    monkeypatch.setattr(gather, "open_corpus", lambda _: texts)
    changes = {"mom2_adjustment": True, "collect_stats": "auto", "mom2_dataset": "own", "mom2_n_samples": 3}
    hparams = rome_hparams((build("llama"), tokenizer()), **changes, stats_dir=str(tmp_path / "stats"))
    method = ROME(*hparams.model_name, hparams)
    folder = method.statistics.key(1).paths[0].parent
    monkeypatch.setattr("easyeditor.base.locks.LOG.info", lambda *_: (tmp_path / "waits").touch())
    with locked(folder / ".collecting.lock", "x"):
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "gather", lambda *_, **__: pytest.fail("collected twice"))
            child = forked(lambda: method.statistics.moment(1))
        waiting((tmp_path / "waits").exists, child)
        gather.gather(method.parts, method.tok, {1: method.statistics.key(1)})
    assert awaited(child) == 0
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npz"]
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    ROME(*hparams.model_name, hparams).prepare()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_an_edit_collects_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyeditor.stats import gather

    texts = Corpus(name="own", identity="2", documents=["The sea is blue.", "Rome is in Italy."])
    monkeypatch.setattr(gather, "open_corpus", lambda _: texts)
    changes = {"mom2_adjustment": True, "collect_stats": "auto", "mom2_dataset": "own", "mom2_n_samples": 2}
    hparams = rome_hparams((build("llama"), tokenizer()), **changes, stats_dir=str(tmp_path / "stats"))
    method = ROME(*hparams.model_name, hparams)
    method.prepare()
    assert sorted(path.suffix for path in method.statistics.key(1).paths[0].parent.iterdir()) == [".json", ".npz"]


@pytest.mark.parametrize(("identity", "left"), [("2", 2), ("3", 5)], ids=["goes on", "another corpus: anew"])
def test_what_an_edit_had_collected_when_it_was_killed(
    identity: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five windows, killed in the fourth: the three that were written are not collected again."""
    from easyeditor.stats import collect, gather

    documents = ["The sea is blue.", "Rome is in Italy."] * 150
    monkeypatch.setattr(gather, "open_corpus", lambda _: Corpus(name="own", identity="2", documents=documents))
    monkeypatch.setattr(collect, "Pace", lambda pace=collect.Pace: pace(every=1))
    changes = {"mom2_adjustment": True, "collect_stats": "auto", "mom2_dataset": "own", "mom2_n_samples": 300}
    windows: list[None] = []
    plain, most = collect._add_window, 3

    def counted(*args: Any) -> None:
        if len(windows) == most:
            raise KeyboardInterrupt
        windows.append(None)
        plain(*args)

    def method(stats: str) -> ROME:
        hparams = rome_hparams((build("llama"), tokenizer()), **changes, stats_dir=str(tmp_path / stats))
        return ROME(*hparams.model_name, hparams)

    wanted = method("whole").statistics.moment(1).matrix_KK
    monkeypatch.setattr(collect, "_add_window", counted)
    with pytest.raises(KeyboardInterrupt):
        method("cut").prepare()
    windows.clear()
    most = 9
    monkeypatch.setattr(gather, "open_corpus", lambda _: Corpus(name="own", identity=identity, documents=documents))
    again = method("cut")
    assert torch.equal(again.statistics.moment(1).matrix_KK, wanted)
    assert len(windows) == left
    assert sorted(path.suffix for path in again.statistics.key(1).paths[0].parent.iterdir()) == [".json", ".npz"]
