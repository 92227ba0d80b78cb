"""What is written never costs what was there: private scratch, nothing half-made, no target on an input or another."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build, tokenizer
from script_runs import Ran, awaited, call, forked, save_tiny, write_yaml
from test_mend_training import WEIGHTS

from easyeditor.base.errors import ModelError, OutputError
from easyeditor.base.files import sweep, whole_file, write_json, write_tensors, write_text
from easyeditor.base.locks import lock_of, locked
from easyeditor.commands import analysis as analysis
from easyeditor.commands import cli, mass_edit, ppl, pretrain_mend, single_case_edit
from easyeditor.commands import convert as convert
from easyeditor.commands import evaluate as evaluate
from easyeditor.commands import export as export
from easyeditor.commands import report as report
from easyeditor.commands import stats as stats
from easyeditor.commands import survey as survey
from easyeditor.commands import tune as tune
from easyeditor.commands.outputs import KINDS
from easyeditor.lm.loading import save

COMMANDS = (stats, tune, survey, report, export, evaluate, convert)

MEND = {"alg_name": "MEND", "device": "cpu", "inner_params": WEIGHTS, "rank": 8, "edit_lr": -0.02, "max_iters": 2}
WRITERS = [
    pytest.param(lambda place: write_text(place, "x"), id="text"),
    pytest.param(lambda place: write_tensors(place, {"a": torch.ones(1)}), id="tensors"),
    pytest.param(lambda place: save(build("llama"), tokenizer(), place), id="model"),
]


def content(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes by its place below `root`; None for a folder."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


# Scratch


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("theirs", ["new.part", "new.part/mine", "new.tmp"])
def test_a_neighbour_with_a_likely_name_stays(tmp_path: Path, theirs: str, write: Callable[[Path], None]) -> None:
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("mine")
    before = content(tmp_path)
    write(tmp_path / "new")
    assert {name: value for name, value in content(tmp_path).items() if name.split("/")[0] != "new"} == before


STOPS = [(KeyboardInterrupt(), KeyboardInterrupt), (TypeError("x"), TypeError), (OSError("full"), OutputError)]


@pytest.mark.parametrize(("stop", "seen"), STOPS)
def test_whatever_ends_a_write_leaves_nothing(tmp_path: Path, stop: BaseException, seen: type[BaseException]) -> None:
    def write() -> None:
        with whole_file(tmp_path / "new") as part:
            part.write_text("half")
            raise stop

    with pytest.raises(seen):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_not_unicode_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "new", {"key": "\ud800"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stop", "seen"), STOPS)
def test_whatever_ends_the_saving_of_a_model_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, seen: type[BaseException]
) -> None:
    tok = tokenizer()

    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr(tok, "save_pretrained", fail)
    with pytest.raises(seen):
        save(build("llama"), tok, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_tensors_are_saved_leaves_nothing_that_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Any, file: Path, *__: Any) -> None:
        (file.parent / ".tmpA1b2C3").write_text("half")  # as safetensors does, in the folder of its target
        os._exit(9)

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    if not (child := os.fork()):
        write_tensors(tmp_path / "new", {"a": torch.ones(1)})
    assert awaited(child) == 9
    assert len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_saved_model_is_as_readable_as_other_files(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/file").write_text("x")
        save(build("llama"), tokenizer(), tmp_path / "new")
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "new").iterdir()} == {(tmp_path / "folder/file").stat().st_mode}


# Places


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model `m`, `h.yaml`, `data.json`, `request.json`, `two.txt`, an edit `saved`, a finished run `run`."""
    root = tmp_path_factory.mktemp("source")
    save_tiny(root / "m")
    quick = {"v_num_grad_steps": 2, "ppl_sentence_num": 2, "context_templates": ["{}"]}
    write_yaml(root / "h.yaml", "./m", **quick)
    record = {"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}
    (root / "request.json").write_text(json.dumps(record))
    (root / "data.json").write_text(json.dumps([record, {**record, "target_new": "Rome"}]))
    (root / "two.txt").write_text("The first sentence.\nAnd the second.\n")
    (root / "corpus.txt").write_text("The sea is blue.\n")
    (root / "mend.yaml").write_text(yaml.safe_dump({"alg_name": "MEND", "model_name": "./m", "device": "cpu"}))
    (root / "site").mkdir()
    (root / "site/index.html").write_text("<html>my own page</html>")
    old = os.getcwd()
    os.chdir(root)
    try:
        flags = ["--hparams", "h.yaml", "--data", "data.json", "--mode", "sequential", "--output", "run"]
        assert awaited(forked(mass_edit, flags)) == 0
    finally:
        os.chdir(old)
    shutil.copytree(root / "run/deltas/000001", root / "saved")
    return root


Script = Callable[..., Ran]


@pytest.fixture
def script(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """script(main's module, *flags) -> Ran, in a copy of `source`; a model that is loaded fails the test."""
    shutil.copytree(source, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the places were refused")

    monkeypatch.setattr("easyeditor.editing.measuring.load", refuse)
    monkeypatch.setattr("easyeditor.trainer.editor.load", refuse)
    monkeypatch.setattr("easyeditor.lm.loading.load", refuse)  # last: what is imported meanwhile keeps the true one
    return lambda module, *flags: call(module, list(flags), monkeypatch, capsys)


EDIT, MASS = ["--hparams", "h.yaml", "--request", "request.json"], ["--hparams", "h.yaml", "--data", "data.json"]
EVALUATE = ["--model", "./m", "--edit", "saved"]
CONVERT = ["convert", "--archive", "two.txt", "--hparams", "mend.yaml"]
TRAIN = ["--hparams", "mend-training.yaml", "--train", "data.json"]
COLLECT = [*MASS, "--collect-collapsed"]
SEARCHES = ["--set", "targets_dir=m"]
PPL, TUNE = ["--model", "./m"], ["--model", "./m", "--output", "new.yaml"]
PROTECT = ["protection", "--hparams", "h.yaml", "--collapse"]
TRACE = ["trace", "--hparams", "h.yaml", "--facts"]


@pytest.mark.parametrize(
    ("module", "flags", "parts"),
    [
        # a target is an input
        (ppl, ["--model", "./m", "--data", "two.txt", "--output", "two.txt"], ["--output", "--data"]),
        (ppl, ["--model", "./m", "--data", "two.txt", "--output", "./m/../two.txt"], ["--output", "--data"]),
        (ppl, ["--model", "./m", "--data", "two.txt", "--output", "link.txt"], ["--output", "--data"]),
        (mass_edit, [*COLLECT, "data.json"], ["--collect-collapsed", "data"]),
        (mass_edit, [*COLLECT, "h.yaml"], ["--collect-collapsed", "--hparams"]),
        (mass_edit, ["--union", "data.json", "--collect-collapsed", "data.json"], ["--union"]),
        (evaluate, [*EVALUATE, "--data", "data.json", "--output", "data.json"], ["--output", "--data"]),
        (mass_edit, [*COLLECT, "hard.json"], ["--collect-collapsed", "--data"]),
        (mass_edit, [*COLLECT, "DATA.json"], ["--collect-collapsed", "--data"]),
        (mass_edit, [*COLLECT, "s.json", "--sample", "s.json"], ["--collect-collapsed", "--sample"]),
        (mass_edit, [*COLLECT, "s.json", "--sample", "s.json:own"], ["--collect-collapsed", "--sample"]),
        (analysis, [*PROTECT, "data.json", "--kept", "data.json"], ["--kept", "--collapse"]),
        (analysis, [*TRACE, "data.json", "--kept", "data.json"], ["--kept", "--facts"]),
        (tune, [*TUNE, "--start", "h.yaml", "--kept", "h.yaml"], ["--kept", "--start"]),
        # a target lies in an input
        (analysis, [*PROTECT, "data.json", "--kept", "m/new.jsonl"], ["--kept", "model_name"]),
        (single_case_edit, [*EDIT, *SEARCHES, "--save-edit", "m/e"], ["--save-edit", "model_name"]),
        (single_case_edit, [*EDIT, "--set", "targets_dir=site", "--save-edit", "site/e"], ["targets_dir"]),
        (analysis, ["keys", "--hparams", "h.yaml", "--values", "m"], ["--values", "model_name"]),
        *(  # a folder that the YAML names is written as well
            (mass_edit, [*MASS, "--output", "new", "--set", f"targets_dir={place}"], [place, other])
            for place, other in (
                ("m", "model_name"),
                ("m/new", "model_name"),
                ("data.json", "--data"),
                ("new", "--output"),
                ("new/searches", "--output"),
                ("two.txt", "not a folder"),
            )
        ),
        (single_case_edit, [*EDIT, "--save-edit", "new", "--set", "targets_dir=new"], ["--save-edit", "targets_dir"]),
        (single_case_edit, [*EDIT, "--set", "save_keys=true", "save_keys_path=m"], ["save_keys_path", "model_name"]),
        (ppl, ["--model", "./m", "--edit", "saved", "--output", "saved/edit.json"], ["--edit"]),
        (ppl, ["--model", "./m", "--output", "m/config.json"], ["--model"]),
        (ppl, ["--model", "./m", "--output", "m/new.json"], ["--model"]),
        (single_case_edit, [*EDIT, "--save-model", "m/edited"], ["--save-model", "model_name"]),
        (single_case_edit, [*EDIT, "--save-edit", "m/new/edit"], ["--save-edit", "model_name"]),
        (single_case_edit, [*EDIT, "--output", "m/run"], ["--output", "model_name"]),
        (mass_edit, [*MASS, "--output", "m/run"], ["--output", "model_name"]),
        (evaluate, [*EVALUATE, "--output", "saved/scores.json"], ["--edit"]),
        (report, ["run", "--output", "run/deltas/000001/report"], ["lies in"]),
        (analysis, ["diagnose", "run", "--output", "run/diagnosed"], ["--output", "lies in"]),
        (stats, ["--model", "./m", "--layers", "1", "--corpus", "corpus.txt", "--output", "."], ["--output"]),
        (convert, [*CONVERT, "--output", "m/archive"], ["--output", "model_name"]),
        # a target is in another target
        (single_case_edit, [*EDIT, "--save-edit", "new", "--save-model", "new"], ["--save-edit", "--save-model"]),
        (single_case_edit, [*EDIT, "--save-edit", "new/edit", "--save-model", "new"], ["--save-edit", "--save-model"]),
        (single_case_edit, [*EDIT, "--save-adapter", "new/a", "--save-model", "new"], ["--save-adapter"]),
        (single_case_edit, [*EDIT, "--output", "run2", "--save-model", "run2/m"], ["--output", "--save-model"]),
        (single_case_edit, [*EDIT, "--output", "new/run", "--save-edit", "new"], ["--output", "--save-edit"]),
        (mass_edit, [*COLLECT, "run2/results.jsonl", "--output", "run2"], ["--collect-collapsed", "--output"]),
        (mass_edit, [*COLLECT, "run2/config.json", "--output", "run2"], ["--collect-collapsed", "--output"]),
        (mass_edit, ["--resume", "run", "--collect-collapsed", "run/results.jsonl"], ["--collect-collapsed"]),
        # a target holds something that is not its kind
        (single_case_edit, [*EDIT, "--output", "m"], ["--output m", "model_name"]),
        (single_case_edit, [*EDIT, "--output", "saved"], ["saved: ", "empty"]),
        (mass_edit, [*MASS, "--output", "saved"], ["saved: ", "empty"]),
        (analysis, ["keys", "--hparams", "h.yaml", "--output", "saved"], ["saved: ", "empty"]),
        (report, ["run", "--output", "site"], ["site", "index.html"]),
        (ppl, [*PPL, "--output", "two.txt"], ["two.txt: ", "not what this command writes"]),
        (ppl, [*PPL, "--output", "data.json"], ["data.json: ", "not what this command writes"]),
        (evaluate, [*EVALUATE, "--output", "picture"], ["picture: ", "not what this command writes"]),
        (mass_edit, [*COLLECT, "s.json"], ["s.json: ", "not what this command writes"]),
        (tune, ["--model", "./m", "--output", "h.yaml"], ["h.yaml: ", "is there already"]),
        *((tune, [*TUNE, "--kept", kept], [f"--kept {kept}"]) for kept in ("two.txt", "s.json", "run/results.jsonl")),
        *((analysis, [*TRACE, "data.json", "--kept", kept], [kept]) for kept in ("two.txt", "picture", "one.json")),
        *((analysis, [*PROTECT, "data.json", "--kept", kept], [kept]) for kept in ("s.json", "trace.jsonl", "m")),
        # a target is a link, or no name
        (single_case_edit, [*EDIT, "--save-model", "nowhere"], ["nowhere: "]),
        (single_case_edit, [*EDIT, "--output", "nowhere"], ["nowhere: "]),
        (single_case_edit, [*EDIT, "--save-model", "link-empty"], ["link-empty: "]),
        (mass_edit, [*MASS, "--case-files", "link-empty"], ["link-empty: "]),
        (mass_edit, [*COLLECT, "nowhere"], ["nowhere: "]),
        (ppl, [*PPL, "--output", "circle/x.json"], ["circle"]),
        (single_case_edit, [*EDIT, "--save-model", "x" * 300], ["File name too long"]),
        (pretrain_mend, [*TRAIN, "--output", "saved"], ["saved: "]),
        (pretrain_mend, [*TRAIN, "--output", "saved", "--resume"], ["saved: "]),
        (pretrain_mend, [*TRAIN, "--output", "m/mend"], ["--output", "model_name"]),
    ],
)
def test_a_place_that_would_cost_something_is_refused_before_the_work(
    module: Any, flags: list[str], parts: list[str], script: Script
) -> None:
    for link, to in (("link.txt", "two.txt"), ("nowhere", "gone"), ("circle", "circle"), ("link-empty", "empty")):
        Path(link).symlink_to(to)
    Path("empty").mkdir()
    os.link("data.json", "hard.json")
    Path("s.json").write_text('{"own": [0]}')
    Path("one.json").write_text('{"kind": "trace", "case": 1}')  # no end of line
    Path("trace.jsonl").write_text('{"kind": "journal", "of": "trace"}\n')
    Path("picture").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    Path("mend-training.yaml").write_text(yaml.safe_dump({**MEND, "model_name": "./m"}))
    before = content(Path())
    ran = script(module, *flags)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert [part for part in parts if part not in ran.err.splitlines()[-1]] == [], ran.err
    assert content(Path()) == before


@pytest.mark.parametrize(
    ("module", "flags", "target"),
    [
        *(
            (single_case_edit, [*EDIT, flag, "new"], "new")
            for flag in ("--save-edit", "--save-model", "--save-adapter")
        ),
        (single_case_edit, [*EDIT, "--save-edit", "site/../new"], "new"),
        (single_case_edit, [*EDIT, "--save-edit", "new/x"], "new"),
        (single_case_edit, [*EDIT, "--save-model", "new/deep/x"], "new"),
        (single_case_edit, [*EDIT, "--output", "new"], "new"),
        (mass_edit, [*MASS, "--output", "new/x"], "new"),
        (mass_edit, [*MASS, "--set", "targets_dir=new/x"], "new"),
        (ppl, [*PPL, "--output", "new/x.json"], "new"),
        (single_case_edit, [*EDIT, "--output", "new"], "new/.lock"),
        (analysis, ["keys", "--hparams", "h.yaml", "--output", "new"], "new/.lock"),
        (mass_edit, [*COLLECT, "new"], "new"),
        (mass_edit, ["--union", "data.json", "--collect-collapsed", "new"], "new"),
        (mass_edit, [*MASS, "--case-files", "deep/new"], "deep/new"),
        (ppl, [*PPL, "--output", "new"], "new"),
        (evaluate, [*EVALUATE, "--output", "new"], "new"),
        (export, ["saved", "--to", "adapter", "--output", "new"], "new"),
        (report, ["run"], "run/report"),
        (report, ["run", "--output", "site"], "site"),  # begun: without a page it looks like somebody's folder
        (convert, [*CONVERT, "--output", "new"], "new"),
        (tune, [*TUNE, "--kept", "new"], "new"),
        (tune, TUNE, "new.yaml"),
        (analysis, [*TRACE, "data.json", "--kept", "new"], "new"),
    ],
)
def test_what_another_process_writes_is_refused_before_the_work(
    module: Any, flags: list[str], target: str, script: Script
) -> None:
    lock = Path(target).absolute() if target.endswith(".lock") else lock_of(Path(target).absolute())
    with locked(lock, "x"):
        before = content(Path())
        ran = script(module, *flags)
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert f"process {os.getpid()} on" in ran.err.splitlines()[-1]
        assert content(Path()) == before


NO_PLACES = {
    *("set", "metrics", "device", "dtype", "together", "label", "method", "base_name"),
    *("prompt", "subject", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    *("tasks", "endpoint", "endpoint_model", "chat_template_kwargs"),
}


def test_every_flag_that_can_name_a_place_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag that takes a text is declared, or is known to name no place."""
    parsers: dict[str, Any] = {}
    for script in (ppl, mass_edit, single_case_edit, pretrain_mend, *COMMANDS):

        def keep(parser: Any, name: str = script.__name__) -> None:
            parsers[name] = parser
            raise InterruptedError

        monkeypatch.setattr(cli.Parser, "parse_args", keep)
        with pytest.raises(InterruptedError):
            script.arguments()
    for name, module in analysis.EXPERIMENTS.items():
        parsers[name] = cli.parser("")
        importlib.import_module(f"easyeditor.experiments.{module}").add_flags(parsers[name])
    for name, parser in parsers.items():
        declared = dict(parser.get_default("places").values())
        texts = {a.dest for a in parser._actions if a.type in (None, Path) and a.nargs != 0 and not a.choices}
        assert texts - NO_PLACES == declared.keys(), name
        assert {*declared.values()} - {""} <= KINDS.keys(), name


@pytest.mark.parametrize("made", ["new/deep/run", "results"])
def test_a_run_that_fails_leaves_no_folder(made: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ModelError("not loadable")

    monkeypatch.setattr("easyeditor.editing.measuring.load", broken)
    before = content(Path())
    place = [] if made == "results" else ["--output", made]
    for module, flags in ((single_case_edit, EDIT), (mass_edit, MASS), (analysis, ["keys", "--hparams", "h.yaml"])):
        assert script(module, *flags, *place).code == 2
        assert content(Path()) == before


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([*COLLECT, "new.json", "--set", "ppl_sentence_num=0"], "ppl_sentence_num"),
        ([*MASS, "--screen", "--screen-threshold", "inf"], "screen_threshold"),
        ([*MASS, "--screen", "--screen-threshold", "nan"], "screen_threshold"),
    ],
)
def test_what_cannot_end_well_is_not_begun(flags: list[str], part: str, script: Script) -> None:
    before = content(Path())
    ran = script(mass_edit, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert part in ran.err
    assert content(Path()) == before
