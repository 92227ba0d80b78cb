"""The papers' further experiments: each end to end on a tiny model, their mathematics by hand, and what they refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_scripts import Ran, call, save_tiny, strict, write_yaml

from easyeditor.analysis import __main__ as analysis

COLLAPSE = [
    {"case_id": "c0", "prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"},
    {"case_id": "c1", "prompt": "Music is a", "subject": "Music", "target_new": "house"},
]
NORMAL = [
    {"case_id": "n0", "prompt": "They all went to Rome", "subject": "Rome", "target_new": "the"},
    {"case_id": "n1", "prompt": "The river in Spain was", "subject": "Spain", "target_new": "red"},
]
PROBES = {"rephrase_prompt": "One finds it in", "locality_prompt": "The sea is", "locality_ground_truth": "blue"}


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny checkpoints, their YAML files, and the two sets."""
    root = tmp_path_factory.mktemp("analysis")
    for kind in ("llama", "gpt2"):
        few = {"v_num_grad_steps": 3, "ppl_sentence_num": 4, "context_templates": ["{}", "You. {}", "I think so. {}"]}
        write_yaml(root / f"{kind}.yaml", save_tiny(root / kind, kind), **few)
    (root / "collapse.json").write_text(json.dumps([{**record, **PROBES} for record in COLLAPSE]))
    (root / "normal.json").write_text(json.dumps([{**record, **PROBES} for record in NORMAL]))
    return root


@pytest.fixture
def run(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """run(name, *flags) -> Ran: an experiment on tiny llama (`kind=`) into `run/`."""
    monkeypatch.chdir(tmp_path)

    def go(name: str, *flags: Any, kind: str = "llama", sets: tuple[str, ...] = ("collapse", "normal")) -> Ran:
        given = [part for one in sets for part in (f"--{one}", tiny_runs / f"{one}.json")]
        args = [name, "--hparams", tiny_runs / f"{kind}.yaml", *given, "--output", "run", *flags]
        return call(analysis, args, monkeypatch, capsys)

    return go


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as source:
        return list(csv.DictReader(source))


def whole(folder: Path, *figures: str) -> Any:
    """Check what every run folder holds, and return its result."""
    for name in ("config.json", "manifest.json", "table.csv"):
        assert (folder / name).exists(), name
    for name in figures:
        assert (folder / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert "<svg" in (folder / f"{name}.svg").read_text()
    assert not list(folder.rglob("*.part"))
    result = strict((folder / "result.json").read_text())
    assert all(finding["because"] for finding in result["findings"])
    return result


def test_keys(run: Any, tmp_path: Path) -> None:
    ran = run("keys")
    assert ran.code == 0, ran.err


def test_first_token(run: Any, tmp_path: Path) -> None:
    ran = run("first-token")
    assert ran.code == 0, ran.err


def test_position_swap(run: Any, tmp_path: Path) -> None:
    ran = run("position-swap", sets=("collapse",))
    assert ran.code == 0, ran.err


def test_update_norms(run: Any, tmp_path: Path) -> None:
    ran = run("update-norms")
    assert ran.code == 0, ran.err
    whole(tmp_path / "run", "update_norms", "heat_map")


def test_sweep(run: Any, tmp_path: Path) -> None:
    ran = run("update-norms", "--sweep", "--layers", 0, 2)
    assert ran.code == 0, ran.err


def test_prefix(run: Any, tmp_path: Path) -> None:
    ran = run("prefix-test")
    assert ran.code == 0, ran.err
