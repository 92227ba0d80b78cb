"""Every mode of the scripts on a tiny model, and its run folder read back by report, evaluate and diagnose."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build
from rich.console import Console
from script_runs import Ran, call, save_tiny, strict, write_yaml

from easyeditor.base.errors import NumericalError
from easyeditor.commands import analysis as analysis
from easyeditor.commands import cli, mass_edit, single_case_edit
from easyeditor.commands import evaluate as evaluate
from easyeditor.commands import report as report
from easyeditor.methods.rome.method import ROME
from easyeditor.report.terminal import print_record
from easyeditor.values import collapse
from easyeditor.values.collapse import verdict
from easyeditor.values.record import EditRecord

SUBJECTS = ("Bay", "Roland", "Oslo", "東京")
QUICK = {"v_num_grad_steps": 3, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 2}
MODES: dict[str, tuple[str, ...]] = {
    "single": (),
    "registry": ("--metrics", "ES", "GE", "gen_rewrite_em"),
    "sequential": ("--mode", "sequential", "--eval-every", "2"),
    "measured": ("--mode", "sequential", "--eval-every", "2", "--metrics", "ES", "locality_acc", "gen_rewrite_em"),
    "batch": ("--hparams", "memit.yaml", "--mode", "batch", "--batch-size", "3"),
    "screen": ("--screen",),
    "keep": ("--mode", "sequential"),
    "revert": ("--on-collapse", "revert"),
    "remedy": ("--mode", "sequential", "--on-collapse", "remedy"),
}
GUARDED = ("keep", "revert", "remedy")
EDITED = tuple(mode for mode in MODES if mode != "screen")
SAVED = {"sequential": "000001", "batch": "000004", "keep": "000004"}
"""A saved edit of each run whose edits stay."""


def record_of(subject: str) -> dict[str, Any]:
    return {
        "case_id": f"case-{subject}",
        "prompt": f"{subject}, which is located in",
        "subject": subject,
        "target_new": "Italy",
        "ground_truth": "Spain",
        "rephrase_prompt": f"Where is {subject}? In",
        "locality_prompt": "The sea is",
        "locality_ground_truth": "blue",
        "generation_prompts": [f"{subject} is"],
    }


def _memit(root: Path) -> None:
    """`memit.yaml` and the statistics it asks for."""
    width = build("llama").model.layers[0].mlp.down_proj.in_features
    folder = root / "stats" / "llama" / "own_stats"
    folder.mkdir(parents=True)
    moment = {"mom2.constructor": "x", "mom2.count": 50, "mom2.mom2": 50 * np.eye(width, dtype=np.float32)}
    for layer in (1, 2):
        np.savez(folder / f"model.layers.{layer}.mlp.down_proj_float32_mom2_50.npz", **moment, sample_size=50)
    changes = {"layers": [1, 2], "mom2_adjustment": True, "mom2_update_weight": 10, "mom2_n_samples": 50}
    changes |= {"alg_name": "MEMIT", "stats_dir": str(root / "stats"), "mom2_dataset": "own"}
    write_yaml(root / "memit.yaml", root / "llama", **{**QUICK, **changes})


def _touchy(before: float, after: float, **limits: float) -> collapse.Collapse:
    """No tiny edit collapses a tiny model: here a collapse is any change of perplexity by 6 percent."""
    return replace(verdict(before, after, **limits), collapsed=abs(after / before - 1) > 0.06)


def _ended(script: Any, patch: pytest.MonkeyPatch, *flags: Any) -> Any:
    patch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        cli.run(script.main)
    return ended.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each mode, of single_case_edit.py (`case`), and its saved edit (`edit`)."""
    root = tmp_path_factory.mktemp("read-back")
    write_yaml(root / "rome.yaml", save_tiny(root / "llama"), **QUICK)
    _memit(root)
    (root / "data.json").write_text(json.dumps([record_of(s) for s in SUBJECTS]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for mode, flags in MODES.items():
            patch.setattr(collapse, "verdict", _touchy if mode in GUARDED else verdict)
            begin = ("--hparams", "rome.yaml", "--data", "data.json", "--output", mode, "--json")
            assert _ended(mass_edit, patch, *begin, *flags) == 0, mode
        request = ("--prompt", "Bay is in", "--subject", "Bay", "--target-new", "Italy", "--save-edit", "edit")
        request += ("--ground-truth", "Spain", "--metrics", "ES", "gen_rewrite_em")
        assert _ended(single_case_edit, patch, "--hparams", "rome.yaml", "--output", "case", "--json", *request) == 0
    return root


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_figures: None) -> Path:
    """A copy of `made` to work in."""
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """go(script, *flags) -> Ran, which ended well."""

    def run(script: Any, *flags: Any) -> Ran:
        ran = call(script, list(flags), monkeypatch, capsys)
        assert ran.code == 0, ran.err
        return ran

    return run


def lines(folder: Path, kind: str) -> list[Any]:
    """The run's lines of a kind as they stand in the journal."""
    found = [strict(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line["kind"] == kind]


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """A table of the folder's report."""
    with open(folder / "report" / "tables" / f"{name}.csv", encoding="utf-8", newline="") as source:
        return list(csv.DictReader(source))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("mode", EDITED)
def test_the_report_shows_what_the_run_recorded(mode: str, runs: Path, go: Any) -> None:
    go(report, mode, "--worst", 2)
    assert (runs / mode / "report" / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    edits = lines(runs / mode, "edit")
    rows = table(runs / mode, "edits")
    assert len(rows) == len(edits) == len(SUBJECTS)
    for row, edit in zip(rows, edits, strict=True):
        assert (row["case id"], row["subject"]) == (edit["case_id"], edit["requested_rewrite"]["subject"])
        assert float(row["perplexity"]) == edit["post"]["ppl"]
        assert float(row["perplexity before"]) == edit["pre"]["ppl"]
        assert float(row["efficacy"]) == pytest.approx(mean(edit["post"]["rewrite_acc"]))
        assert float(row["generalization"]) == pytest.approx(mean(edit["post"]["rephrase_acc"]))
        assert float(row["locality"]) == pytest.approx(mean(edit["post"]["locality"]["neighborhood_acc"]))
        assert row["collapsed"] == ("yes" if edit["collapse"]["collapsed"] else "no")
        assert float(row["total time"]) == edit["seconds"]["total"]
        found = [t["denominator"] for t in edit["trace"].values() if t["denominator"] is not None]
        assert (row["denominator"] or None) == (repr(min(found, key=abs)) if found else None)
    evaluations = lines(runs / mode, "evaluation")
    if evaluations:
        retention = table(runs / mode, "retention")
        assert [int(row["after edits"]) for row in retention] == [line["after"] for line in evaluations]
        assert [float(row["perplexity"]) for row in retention] == [line["ppl"] for line in evaluations]


@pytest.mark.parametrize("mode", GUARDED)
def test_the_report_shows_what_the_guard_did(mode: str, runs: Path, go: Any) -> None:
    go(report, mode, "--worst", 2)
    edits = lines(runs / mode, "edit")
    hit = [edit for edit in edits if edit["collapse"]["collapsed"]]
    assert hit
    summary = strict((runs / mode / "summary.json").read_text(encoding="utf-8"))
    assert summary["counts"]["collapsed"] == len(hit) == len(table(runs / mode, "collapsed"))
    said = {row["case id"]: (row["guard"], row["perplexity left by the guard"]) for row in table(runs / mode, "edits")}
    for edit in hit:
        words, left = said[edit["case_id"]]
        assert words.startswith(edit["guard"]["action"])
        assert ("taken back" in words) == (not edit["guard"]["kept"]) == (left == "")
        stood = edit["guard"].get("record", edit)["post"]["ppl"]
        assert left == ("" if not edit["guard"]["kept"] else repr(stood))


def test_the_report_shows_a_screen_and_a_single_edit(runs: Path, go: Any) -> None:
    go(report, "screen")
    screened = sorted(lines(runs / "screen", "screen"), key=lambda line: abs(line["denominator"]))
    assert [float(row["denominator"]) for row in table(runs / "screen", "screen")] == [
        line["denominator"] for line in screened
    ]
    go(report, "case")
    record = strict((runs / "case" / "result.json").read_text(encoding="utf-8"))
    (row,) = table(runs / "case", "edits")
    assert (float(row["perplexity"]), row["subject"]) == (record["post"]["ppl"], "Bay")


@pytest.mark.parametrize("mode", ["registry", "measured"])
def test_the_registrys_metrics_show_everywhere(mode: str, runs: Path, go: Any) -> None:
    go(report, mode, "--worst", 2)
    edits, names = lines(runs / mode, "edit"), ("ES", "gen_rewrite_em")
    summary = strict((runs / mode / "summary.json").read_text(encoding="utf-8"))
    for name in names:
        found = [edit["metrics"]["after"][name]["value"] for edit in edits]
        assert [float(row[name]) for row in table(runs / mode, "edits")] == found
        everyone = next(row for row in table(runs / mode, "collapse") if row["edits"] == "all")
        assert float(everyone[name]) == summary["metrics"][name]["after"] == pytest.approx(mean(found))
    if mode == "measured":
        for line, row in zip(lines(runs / mode, "evaluation"), table(runs / mode, "retention"), strict=True):
            for name in names:
                assert float(row[name]) == pytest.approx(mean([kept["metrics"][name] for kept in line["retention"]]))
            for kept in line["retention"]:  # the registry's locality is the record's
                assert kept["metrics"]["locality_acc"] == pytest.approx(kept["locality_acc"])
        assert set(names) <= summary["last_evaluation"].keys()
        assert "gen_rewrite_em</button>" in (runs / mode / "report" / "index.html").read_text(encoding="utf-8")


def test_a_single_edit_shows_the_metrics_it_was_asked_for(runs: Path) -> None:
    record = EditRecord.from_json(strict((runs / "case" / "result.json").read_text(encoding="utf-8")))
    assert set(record.metrics["after"]) == {"ES", "gen_rewrite_em"}
    sink = io.StringIO()
    print_record(record, Console(file=sink, width=100))
    (row,) = (line for line in sink.getvalue().splitlines() if "gen_rewrite_em" in line)
    assert row.split()[-2].replace(".", "").isdigit()


@pytest.mark.parametrize("mode", [*EDITED, "case"])
def test_diagnose_reads_what_the_run_recorded(mode: str, runs: Path, go: Any) -> None:
    go(analysis, "diagnose", mode, "--output", "found", "--rank", 4)
    rows = strict((runs / "found" / "result.json").read_text(encoding="utf-8"))["tables"]["edits"]
    case = [strict((runs / "case" / "result.json").read_text(encoding="utf-8"))]
    edits = case if mode == "case" else lines(runs / mode, "edit")
    if "--mode" in MODES.get(mode, ()):  # only what stayed in the model has a weight to look at
        edits = [edit for edit in edits if edit["guard"] is None or edit["guard"]["kept"]]
    assert [row["case"] for row in rows] == [edit["case_id"] for edit in edits]
    for row, edit in zip(rows, edits, strict=True):
        found = [abs(t["denominator"]) for t in edit["trace"].values() if t["denominator"] is not None]
        assert row["|denominator|"] == (min(found) if found else None)
        assert (row["perplexity"], row["collapsed"]) == (edit["post"]["ppl"], edit["collapse"]["collapsed"])
        assert row["|W'|/|W|"] != 1


@pytest.mark.parametrize("mode", [*SAVED, "case"])
def test_evaluate_measures_a_saved_edit_as_the_run_did(mode: str, runs: Path, go: Any) -> None:
    place = "edit" if mode == "case" else f"{mode}/deltas/{SAVED[mode]}"
    found = go(evaluate, "--model", "llama", "--device", "cpu", "--edit", place, "--json").json
    wanted = ["Bay"] if mode in ("case", "sequential") else ["東京"]
    assert [request["subject"] for request in found["requests"]] == wanted
    if mode in ("case", "sequential"):  # the first edit stands alone, so its numbers are the run's
        record = (
            strict((runs / "case" / "result.json").read_text()) if mode == "case" else lines(runs / mode, "edit")[0]
        )
        for state, said in (("before", record["pre"]), ("after", record["post"])):
            assert found[state]["summary"]["rewrite_acc"]["mean"] == mean(said["rewrite_acc"])


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_run_in_which_every_edit_failed_is_reported(
    mode: str, runs: Path, go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: Any, **__: Any) -> Any:
        raise NumericalError("the value search's loss is not finite at pass 1; nothing was changed")

    with monkeypatch.context() as patched:
        patched.setattr(ROME, "edit", overflow)
        patched.setattr(ROME, "edit_each", overflow)
        begin = ("--hparams", "rome.yaml", "--data", "data.json", "--output", "failed", "--mode", mode)
        assert _ended(mass_edit, patched, *begin) == 0
    assert len(lines(runs / "failed", "failed")) == len(SUBJECTS)
    assert not lines(runs / "failed", "edit")
    ran = go(report, "failed")
    assert "4" in ran.out
    assert (runs / "failed" / "report" / "index.html").is_file()
