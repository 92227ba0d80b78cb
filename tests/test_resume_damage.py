"""A run folder damaged between two runs: one line that says what, exit 2, and nothing on disk is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from script_runs import QUICK, Ran, awaited, call, forked, record_of, save_tiny, write_yaml
from test_outputs import content

from easyeditor.base.errors import OutputError
from easyeditor.base.files import to_json
from easyeditor.commands import mass_edit
from easyeditor.results.journal import Journal
from easyeditor.runs import sequence


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


def of_another_request(delta: Path) -> None:
    raw = json.loads((delta / "edit.json").read_text())
    raw["requests"][0]["target_new"] += "s"
    (delta / "edit.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", ["run", "batch"])
@pytest.mark.parametrize("spoil", [of_another_request, swapped, flipped, emptied, no_list, renamed, shutil.rmtree])
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


Lines = list[dict[str, Any]]


def asked_otherwise(lines: Lines) -> None:
    lines[1]["requested_rewrite"]["target_new"] = "Bergen"


def exchanged(lines: Lines) -> None:
    for line, index in zip(lines, (1, 0), strict=True):
        line |= {"index": index, "step": index + 1}


def of_other_texts(lines: Lines) -> None:
    lines[0]["requested_rewrite"]["rephrase_prompt"] = ["Another one"]


def in_another_mode(lines: Lines) -> None:
    lines[1]["mode"] = "single"


def at_another_step(lines: Lines) -> None:
    lines[1]["step"] = 7


def screened(lines: Lines) -> None:
    lines[1] = {"kind": "screen", "index": 1, "case_id": lines[1]["case_id"], "subject": "Oslo", "prompt": "Oslo is in"}
    lines[1] |= {"denominator": 1.0, "prediction": False}


def failed_elsewhere(lines: Lines) -> None:
    lines[1] = {
        "kind": "failed",
        "index": 1,
        "step": 2,
        "case_id": 1,
        "prompt": "x",
        "mode": "sequential",
        "error": "x",
    }


def evaluated_of_another_case(lines: Lines) -> None:
    row = {"index": 0, "case_id": "none", "rewrite_acc": 1, "rephrase_acc": 1, "locality_acc": 1}
    lines[1] = {"kind": "evaluation", "index": 0, "after": 1, "ppl": 1.0, "collapsed": False, "retention": [row]}


def beyond_the_end(lines: Lines) -> None:
    lines[1] |= {"index": 9, "step": 10}


def twice_and_different(lines: Lines) -> None:
    lines[1] = {**lines[0], "saved_sha256": "0"}


@pytest.mark.parametrize("name", ["run", "batch"])
@pytest.mark.parametrize(
    "spoil",
    [
        asked_otherwise,
        exchanged,
        of_other_texts,
        in_another_mode,
        at_another_step,
        screened,
        failed_elsewhere,
        evaluated_of_another_case,
        beyond_the_end,
        twice_and_different,
    ],
)
def test_a_line_that_this_run_has_not_written(
    name: str, spoil: Callable[[Lines], None], resume: Resume, tmp_path: Path
) -> None:
    journal = tmp_path / name / "results.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    spoil(lines)
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(resume(name), f"{name}/results.jsonl, line {1 if spoil in (exchanged, of_other_texts) else 2}")


def test_a_screen_line_in_a_single_run(source: Path, tmp_path: Path, resume: Resume) -> None:
    config, journal = tmp_path / "run/config.json", tmp_path / "run/results.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    screened(lines)
    journal.write_text(json.dumps(lines[1]) + "\n")
    raw = json.loads(config.read_text())
    raw["run"]["mode"] = "single"
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    manifest["config_sha256"] = sha256(to_json(raw).encode()).hexdigest()
    config.write_text(json.dumps(raw))
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    refused(resume("run"), "results.jsonl, line 1", "a line of kind 'screen', and the run is not a screen")


def test_an_equal_line_again_is_taken_once(resume: Resume, tmp_path: Path) -> None:
    journal = tmp_path / "run/results.jsonl"
    first = journal.read_text().splitlines(keepends=True)[0]
    journal.write_text(first + first)
    assert resume("run").code == 0


@pytest.mark.parametrize("harm", ["removed", "replaced", "emptied", "appended"])
def test_a_journal_that_is_changed_under_its_writer(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Journal(path) as journal:
        journal.append({"kind": "a"})
        journal.append({"kind": "b"})
        if harm in ("removed", "replaced"):
            path.unlink()
        if harm != "removed":
            path.write_text({"replaced": path.name, "emptied": "", "appended": '{"kind": "a"}\n' * 3}[harm])
        for change in (journal.check, lambda: journal.append({"kind": "c"})):
            with pytest.raises(OutputError, match=r"results.jsonl: was removed, replaced or changed"):
                change()


def test_a_run_whose_journal_is_removed_ends(resume: Resume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = sequence.evaluate
    monkeypatch.setattr(
        sequence, "evaluate", lambda *given: (evaluate(*given), (tmp_path / "run/results.jsonl").unlink())
    )
    refused(resume("run"), "results.jsonl: was removed")
    assert not (tmp_path / "run/summary.json").exists()
