"""A run folder damaged between two runs: one line that says what, exit 2, and nothing on disk is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from script_runs import QUICK, Ran, awaited, call, forked, record_of, save_tiny, write_yaml
from test_outputs import content

import mass_edit


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three requests done in sequence (`run`), and in batches of two with FT (`batch`)."""
    root = tmp_path_factory.mktemp("runs")
    write_yaml(root / "rome.yaml", save_tiny(root / "llama"), **QUICK)
    ft = {"alg_name": "FT", "model_name": str(root / "llama"), "device": "cpu", "layers": [1], "num_steps": 2}
    ft |= {"lr": 0.01, "weight_decay": 0, "norm_constraint": 0.1, "ppl_sentence_num": 2}
    (root / "ft.yaml").write_text(json.dumps({**ft, "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight"}))
    (root / "data.json").write_text(json.dumps([record_of(s) for s in ("Bay", "Oslo", "Rome")]))
    for name, method, mode in (("run", "rome", ["sequential"]), ("batch", "ft", ["batch", "--batch-size", "2"])):
        flags = ["--hparams", root / f"{method}.yaml", "--data", root / "data.json", "--output", root / name]
        assert awaited(forked(mass_edit, [*map(str, flags), "--mode", *mode])) == 0
    return root


Resume = Callable[..., Ran]


@pytest.fixture
def resume(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Resume:
    """resume(name) -> Ran: go on with a copy of that run in `tmp_path`; its last lines are not there yet."""
    for name in ("run", "batch"):
        shutil.copytree(source / name, tmp_path / name)
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / name / "results.jsonl").write_text("".join(lines[:2]))
        (tmp_path / name / "summary.json").unlink()
    monkeypatch.chdir(tmp_path)
    return lambda name: call(mass_edit, ["--resume", name, "--json"], monkeypatch, capsys)


def refused(ran: Ran, *parts: str) -> None:
    """One line, holding all `parts`, and exit 2."""
    assert (ran.code, ran.out) == (2, ""), ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("error: "), ran.err
    assert "Traceback" not in ran.err
    assert [part for part in parts if part not in last] == [], last


def swapped(delta: Path) -> None:
    other = delta.with_name("000002" if delta.parent.parent.name == "run" else "000003")
    shutil.rmtree(delta)
    shutil.copytree(other, delta)


def flipped(delta: Path) -> None:
    tensors = load_file(delta / "edit.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] *= -1
    save_file(tensors, delta / "edit.safetensors")


def emptied(delta: Path) -> None:
    raw = json.loads((delta / "edit.json").read_text())
    (delta / "edit.json").write_text(json.dumps({**raw, "deltas": []}))


def no_list(delta: Path) -> None:
    raw = json.loads((delta / "edit.json").read_text())
    (delta / "edit.json").write_text(json.dumps({**raw, "deltas": {}}))


def renamed(delta: Path) -> None:
    text = (delta / "edit.json").read_text()
    (delta / "edit.json").write_text(text.replace("layers.1.mlp.down", "layers.2.mlp.down"))


@pytest.mark.parametrize("name", ["run", "batch"])
@pytest.mark.parametrize("spoil", [swapped, flipped, emptied, no_list, renamed, shutil.rmtree])
def test_a_saved_edit_that_is_not_what_was_recorded(
    name: str, spoil: Callable[[Path], None], resume: Resume, tmp_path: Path
) -> None:
    spoil(tmp_path / name / "deltas/000001")
    before = content(tmp_path)
    refused(resume(name), f"{name}/deltas/000001")
    assert {place: kept for place, kept in content(tmp_path).items() if ".lock" not in place} == before


@pytest.mark.parametrize("name", ["run", "batch"])
def test_an_untouched_run_goes_on(name: str, resume: Resume, source: Path, tmp_path: Path) -> None:
    assert resume(name).code == 0
    for saved in sorted((source / name).glob("deltas/*/edit.safetensors")):
        assert saved.read_bytes() == (tmp_path / saved.relative_to(source)).read_bytes()


def test_a_line_of_a_run_begun_before_digests_is_taken(resume: Resume, tmp_path: Path) -> None:
    journal = tmp_path / "run/results.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line.pop("saved_sha256", None)
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert resume("run").code == 0


@pytest.mark.parametrize("field", ["rephrase_prompt", "locality_prompt"])
def test_skip_bad_leaves_out_a_request_whose_probe_is_too_long(
    field: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [record_of("Bay"), {**record_of("Oslo"), field: "word " * 400}, record_of("Rome")]
    (tmp_path / "data.json").write_text(json.dumps(data))
    flags = ["--hparams", str(source / "rome.yaml"), "--data", str(tmp_path / "data.json"), "--output"]
    refused(call(mass_edit, [*flags, str(tmp_path / "a")], monkeypatch, capsys), "record 1", "--skip-bad")
    assert call(mass_edit, [*flags, str(tmp_path / "b"), "--skip-bad"], monkeypatch, capsys).code == 0
    lines = [json.loads(line) for line in (tmp_path / "b/results.jsonl").read_text().splitlines()]
    assert sorted((line["index"], line["kind"]) for line in lines) == [(0, "edit"), (1, "failed"), (2, "edit")]
