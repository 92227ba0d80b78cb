"""python -m easyeditor.survey on tiny models: plans, cells, what is skipped, shared out, repeated, and the page."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from fake_runs import edit, evaluation, write_run
from script_runs import Ran, call, save_tiny, write_yaml

from easyeditor.base.errors import ConfigError, NumericalError
from easyeditor.base.locks import lock_of, locked
from easyeditor.commands import mass_edit
from easyeditor.commands import survey as survey
from easyeditor.drawing.render import to_csv, to_latex
from easyeditor.drawing.table import Table
from easyeditor.methods.rome.method import ROME
from easyeditor.methods.table import METHODS
from easyeditor.results.lines import Retention
from easyeditor.results.run import load_run
from easyeditor.runs.ranks import Rank
from easyeditor.survey import cells as cells_file
from easyeditor.survey import running
from easyeditor.survey.cells import Cell, cells_of
from easyeditor.survey.page import COLUMNS, first_beyond
from easyeditor.survey.plan import read_plan
from easyeditor.survey.quality import Measured, measured, pairs_table, quality_of, score_of
from easyeditor.values.estimates import Estimate

QUICK: dict[str, Any] = {"v_num_grad_steps": 3, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 2}
FT = {"alg_name": "FT", "device": "cpu", "layers": [1], "num_steps": 2, "lr": 1e-3, "ppl_sentence_num": 2}


def records(count: int) -> list[dict[str, Any]]:
    """CounterFact's full format: ES, PS and NS can be had."""
    return [
        {
            "case_id": n,
            "requested_rewrite": {
                "prompt": "{}, which is located in", "subject": subject,
                "target_new": {"str": "Italy"}, "target_true": {"str": "Spain"},
            },
            "paraphrase_prompts": [f"Where is {subject}? In"],
            "neighborhood_prompts": ["The sea is in", "Bay is in"],
        }
        for n, subject in enumerate(["Roland", "Berlin", "Oslo", "Bonn", "Rome"][:count])
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `hparams/ROME` and `hparams/FT`, four requests, and a plan of three methods."""
    root = tmp_path_factory.mktemp("survey")
    model = save_tiny(root / "llama")
    for name in ("ROME", "FT"):
        (root / "hparams" / name).mkdir(parents=True)
    write_yaml(root / "hparams/ROME/tiny.yaml", model, **QUICK)
    (root / "hparams/FT/tiny.yaml").write_text(yaml.safe_dump({**FT, "model_name": str(model)}), encoding="utf-8")
    (root / "four.json").write_text(json.dumps(records(4)), encoding="utf-8")
    return root


def plan_of(place: Path, **changes: Any) -> dict[str, Any]:
    data = str(place / "four.json")
    crome = {"name": "C-ROME", "hparams": "ROME", "set": ["if_c_rome=true"]}
    return {
        "name": "A tiny survey <b>",
        "output": "out",
        "hparams": str(place / "hparams"),
        "groups": [
            {"name": "batches", "model": "tiny", "methods": ["FT"],
             "run": {"data": data, "mode": "batch", "batch_size": 2, "eval_every": 2, "metrics": ["S"]}},
            {"name": "one-by-one", "model": "tiny", "methods": ["ROME", crome], "run": {"data": data, "limit": 2}},
        ],
        "expected": [{"group": "batches", "method": "FT", "source": "nowhere", "values": {"ES": 0.5, "GE": 6.0}}],
        **changes,
    }  # fmt: skip


@pytest.fixture
def go(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """go(*flags, **changes): the survey on a plan with `changes`, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, **changes: Any) -> Ran:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan_of(place, **changes)), encoding="utf-8")
        return call(survey, ["plan.yaml", *flags], monkeypatch, capsys)

    return run


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan, run once: a folder with `plan.yaml` and `out/`."""
    root = tmp_path_factory.mktemp("finished")
    (root / "plan.yaml").write_text(yaml.safe_dump(plan_of(place)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        cells = cells_of(read_plan(Path("plan.yaml")), Path("out"))
        running.run_cells(cells, Rank(), show=False)
    assert all((root / cell.folder / "summary.json").exists() for cell in cells)
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished survey, in `tmp_path`."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


FOLDERS = ("batches/FT-seed0", "one-by-one/ROME-seed0", "one-by-one/C-ROME-seed0")


# From a plan to a page


def test_a_survey_ends_in_a_page(go: Any, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run_cell", lambda *_: pytest.fail("a cell that is done was run again"))
    before = {folder: (copied / folder / "results.jsonl").read_bytes() for folder in FOLDERS}
    ran = go()
    assert ran.code == 0, ran.err
    assert before == {folder: (copied / folder / "results.jsonl").read_bytes() for folder in FOLDERS}
    page = (copied / "page/index.html").read_text(encoding="utf-8")
    assert "A tiny survey &lt;b&gt;" in page
    assert "src=" not in page.replace('src="data:image/svg+xml;base64', "")
    for title in ("All cells", "Published values next to ours", "Efficacy of all edits so far", "What quality costs"):
        assert title in page
    assert sorted(path.stem for path in (copied / "page/figures").glob("*.svg")) == [
        *("cost", "efficacy", "perplexity", "watched"),
    ]
    rows = list(csv.DictReader((copied / "page/tables/survey.csv").open(encoding="utf-8")))
    assert [row["method"] for row in rows] == ["FT", "ROME", "C-ROME"]
    assert [row["state"] for row in rows] == ["done"] * 3
    for row in rows:
        assert float(row["efficacy low"]) <= float(row["efficacy"]) <= float(row["efficacy high"])
        assert float(row["perplexity"]) > 1
        assert float(row["seconds an edit"]) > 0
    assert (rows[0]["S"] != "", rows[1]["S"]) == (True, "")
    assert rows[0]["first beyond threshold"] == "none"
    assert rows[1]["first beyond threshold"] == "0 of 2 alone"
    run = load_run(copied / FOLDERS[0])
    assert float(rows[0]["efficacy"]) == pytest.approx(run.evaluations[-1].means()["rewrite_acc"])
    expected = list(csv.DictReader((copied / "page/tables/expected.csv").open(encoding="utf-8")))
    assert [(row["metric"], row["published"], row["ours"] != "") for row in expected] == [
        ("ES", "0.5", True),
        ("GE", "6.0", False),
    ]
    assert "\\begin{tabular}" in (copied / "page/tables/survey.tex").read_text(encoding="utf-8")


def test_one_cell_is_repeated_by_the_command_on_the_page(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for cell in cells_of(read_plan(finished / "plan.yaml"), Path("out")):
        words = shlex.split(cell.command)
        assert words[:2] == ["python", "mass_edit.py"]
        said = call(mass_edit, [*words[2:], "--dry-run"], monkeypatch, capsys)
        assert said.code == 0, said.err
        begun = json.loads((finished / cell.folder / "config.json").read_text(encoding="utf-8"))
        assert {key: said.json[key] for key in ("hparams", "run")} == begun


def test_seeds_are_cells_of_their_own_with_contexts_of_their_own(place: Path, tmp_path: Path) -> None:
    plan = plan_of(place)
    plan["groups"][0]["seeds"] = [0, 7]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    first, second, *_ = cells_of(read_plan(tmp_path / "plan.yaml"), tmp_path / "out")
    assert (first.name, second.name) == ("batches/FT-seed0", "batches/FT-seed7")
    assert (second.what.hparams.seed, second.what.settings.seed) == (7, 7)
    assert "--set seed=7" in second.command
    assert "--seed 7" in second.command


def test_the_cells_are_dealt_out_by_rank(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cells = cells_of(read_plan(finished / "plan.yaml"), Path("out"))
    ran: dict[int, list[str]] = {0: [], 1: []}
    for rank in (1, 0):  # the first waits for the others

        def run_cell(cell: Cell, show: bool, rank: int = rank) -> None:
            ran[rank].append(cell.name)
            shutil.copytree(finished / cell.folder, cell.folder)

        monkeypatch.setattr(running, "run_cell", run_cell)
        running.run_cells(cells, Rank(rank=rank, world=2, local=rank), show=False)
    assert ran == {0: [cells[0].name, cells[2].name], 1: [cells[1].name]}


@pytest.mark.parametrize("device", ["0", "cuda:0"])
def test_a_cell_of_a_gpu_run_takes_its_process_s_gpu(device: str, place: Path, tmp_path: Path) -> None:
    plan = plan_of(place)
    plan["groups"][0]["set"] = [f"device={device}"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    made = cells_of(read_plan(tmp_path / "plan.yaml"), tmp_path / "out", Rank(rank=3, world=4, local=3))
    assert [cell.what.hparams.device for cell in made] == [3, "cpu", "cpu"]


def test_a_killed_survey_goes_on_to_the_same_bits(
    finished: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in FOLDERS[:1]:
        shutil.copytree(finished / "out" / folder, tmp_path / "out" / folder)
        whole = (tmp_path / "out" / folder / "results.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "out" / folder / "results.jsonl").write_bytes(b"".join(whole[:3]) + whole[3][:20])
        (tmp_path / "out" / folder / "summary.json").unlink()
    cells = cells_of(read_plan(finished / "plan.yaml"), Path("out"))
    assert [cell.done for cell in cells] == [False, False, False]
    running.run_cells(cells[:1], Rank(), show=False)
    for name in ("watched", "post", "delta", "retention"):
        then, now = (
            [line.get(name) for line in map(json.loads, (root / FOLDERS[0] / "results.jsonl").read_text().splitlines())]
            for root in (finished / "out", tmp_path / "out")
        )
        assert then == now


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda: ConfigError("no statistics\nhere"), "no statistics here"),
        (lambda: torch.empty(2**50), "DefaultCPUAllocator"),
        (MemoryError, "MemoryError"),
    ],
)
def test_a_cell_that_fails_is_named_and_the_others_go_on(
    fail: Callable[[], Any], said: str, go: Any, copied: Path, monkeypatch: Any
) -> None:
    shutil.rmtree(copied / FOLDERS[1])
    with monkeypatch.context() as patch:

        def prepare(*args: Any, **kwargs: Any) -> None:
            raise fail()

        patch.setattr(ROME, "prepare", prepare)
        ran = go()
    assert ran.code == 2
    last = ran.err.splitlines()[-1]
    assert last.startswith("error: 1 of 3 cells could not be run; the first is one-by-one/ROME-seed0, failed: ")
    assert said in last
    assert "one-by-one/ROME-seed0: failed" in (copied / "page/index.html").read_text(encoding="utf-8")
    assert go().code == 0  # mended: the failure is forgotten
    assert "could not" not in (copied / "page/index.html").read_text(encoding="utf-8")


def test_the_page_is_made_of_what_is_there(go: Any, copied: Path) -> None:
    shutil.rmtree(copied / FOLDERS[1])
    ran = go("--page")
    assert ran.code == 0, ran.err
    assert not (copied / FOLDERS[1]).exists()
    assert "2 of 3 cells are done." in (copied / "page/index.html").read_text(encoding="utf-8")
    rows = list(csv.DictReader((copied / "page/tables/survey.csv").open(encoding="utf-8")))
    assert (rows[1]["state"], rows[1]["efficacy"], rows[1]["edits"]) == ("not begun", "", "0")


def test_dry_run_estimates_from_edits_made(go: Any, copied: Path) -> None:
    shutil.rmtree(copied / FOLDERS[2])
    lines = (copied / FOLDERS[0] / "results.jsonl").read_bytes().splitlines(keepends=True)
    (copied / FOLDERS[0] / "results.jsonl").write_bytes(b"".join(lines[:2]))
    (copied / FOLDERS[0] / "summary.json").unlink()
    before = sorted(copied.rglob("*"))
    ran = go("--dry-run")
    assert ran.code == 0, ran.err
    first, second, third, total, *_ = ran.out.splitlines()
    assert "batch, 4 requests; 2 of 4; about 0:00:0" in first
    assert "single, 2 requests; done; nothing to do" in second
    assert "single, 2 requests; not begun; time unknown" in third
    assert total.startswith("3 cells: about 0:00:0")
    assert sorted(copied.rglob("*")) == before


def test_a_dry_run_of_many_cells_reads_each_file_once(
    go: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    for name in ("load_hparams", "read_dataset"):
        whole = getattr(cells_file, name)
        monkeypatch.setattr(cells_file, name, lambda *a, whole=whole, **k: read.append(a) or whole(*a, **k))
    run = {"data": str(place / "four.json")}
    group = {"name": "many", "model": "tiny", "methods": ["ROME", "FT"], "run": run, "seeds": list(range(1000))}
    began = time.process_time()
    ran = go("--dry-run", groups=[group], expected=[])
    assert (ran.code, ran.out.splitlines()[-2][:11]) == (0, "2000 cells:")
    assert len(read) == 4  # ROME needs a subject in the prompt, FT does not
    assert time.process_time() - began < 20  # it took a hundred


def test_dry_run_of_a_fresh_plan_estimates_from_the_tables_that_are_kept(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same method on the same model, in the same group where a table has it; the line names the table."""
    monkeypatch.setattr(cells_file, "TABLES", tmp_path / "tables")
    (tmp_path / "tables").mkdir()
    head = "group,method,seed,edits,seconds an edit\n"
    rows = {
        "tiny.csv": "batches,FT,0,4,60\nelsewhere,FT,0,4,1\nelsewhere,ROME,0,2,10\nelsewhere,C-ROME,0,0,\n",
        "tiny-300.csv": "elsewhere,ROME,0,9,30\n",
        "tiny-xl.csv": "one-by-one,C-ROME,0,9,30\n",
    }
    for name, text in rows.items():
        (tmp_path / "tables" / name).write_text(head + text, encoding="utf-8")
    (tmp_path / "tables" / "tiny-watched.csv").write_text("run,weight growth\nROME,1.0\n", encoding="utf-8")
    ran = go("--dry-run")
    assert ran.code == 0, ran.err
    first, second, third, total, *_ = ran.out.splitlines()
    assert first.endswith("batch, 4 requests; not begun; about 0:04:00, by tiny.csv")
    assert second.endswith("single, 2 requests; not begun; about 0:00:40, by tiny-300.csv, tiny.csv")
    assert third.endswith("single, 2 requests; not begun; time unknown")
    assert total == "3 cells: about 0:04:40 for 2 of them"
    assert ran.out.splitlines()[-1].startswith(f"By a table of {tmp_path / 'tables'}: ")


def test_the_kept_tables_know_every_method_on_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = read_plan(Path("hparams/survey/smollm2-135m-300.yaml"))
    for cell in cells_of(plan, Path("nowhere")):
        seconds, tables = cells_file.recorded(cell) or (0.0, [])
        assert seconds > 300 * 0.05
        assert {*tables} <= {"smollm2-135m.csv", "smollm2-135m-300.csv"}


# Refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nmae": "x"}, "unknown key 'nmae' for SurveyPlan; did you mean 'name'?"),
        ({"groups": []}, "groups is empty"),
        ({"groups": "all"}, "groups is 'all'"),
        ({"groups": [3]}, "group 1: expected `key: value` lines, found 3"),
        ({"groups": [{"name": "g"}]}, "group 1: key 'model' is missing"),
        ({"name": 3}, "name is 3"),
        ({"expected": [{"group": "g", "method": "FT", "source": "s", "values": {}}]}, "which the plan lacks"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(change: dict[str, Any], said: str, go: Any) -> None:
    ran = go(**change)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert said in ran.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({"name": name}, "a survey has a folder of that name") for name in ("page", "failed", "Failed")),
        ({"methods": ["FT", "FT"]}, "method 'FT' is there 2 times"),
        ({"methods": ["MEMMIT"]}, "batches/MEMMIT: "),
        ({"methods": [{"name": "F/T", "hparams": "FT"}]}, "cannot name a folder"),
        ({"methods": [{"nam": "FT"}]}, "unknown key 'nam' for MethodChoice"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["ROME"]}, "batches/ROME: mode batch with ROME"),
        ({"seeds": ["one"]}, "seeds is ['one']"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, "seed '1' is there 2 times"),
        ({"set": ["lr=fast"]}, "with --set: lr is 'fast'"),
        ({"run": {"mode": "batch"}}, "key 'data' is missing"),
        ({"run": {"data": "no.json", "mode": "batch", "batch_size": 2}}, "no.json"),
        ({"run": {"data": "x", "mode": "batched"}}, "mode is 'batched'"),
        ({"run": {"data": "x", "batch_sise": 2}}, "unknown key 'batch_sise' for RunSettings"),
        ({"run": {"data": "x", "seed": 3}}, "write seeds: [3]"),
    ],
)
def test_a_wrong_group_is_refused_in_one_line(change: dict[str, Any], said: str, go: Any, place: Path) -> None:
    plan = plan_of(place)
    plan["groups"][0] |= change
    ran = go("--dry-run", groups=plan["groups"], expected=[])
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert said in ran.err


def test_what_two_cells_or_two_surveys_would_share_is_refused(go: Any, copied: Path, place: Path) -> None:
    groups = [
        {**plan_of(place)["groups"][0], "name": name, "methods": [{"name": method, "hparams": "FT"}]}
        for name, method in (("a--b", "c"), ("a", "b--c"))
    ]
    ran = go("--dry-run", groups=groups, expected=[])
    assert (ran.code, "a--b/c-seed0 and a/b--c-seed0 would share" in ran.err) == (2, True)
    (copied / FOLDERS[1] / "config.json").unlink()  # the folder of a cell has something else in it
    ran = go("--dry-run")
    assert (ran.code, "one-by-one/ROME-seed0: is there already" in ran.err) == (2, True)
    for flags, lock in (((), copied / ".lock"), (("--page",), lock_of(copied / "page"))):
        shutil.rmtree(copied / FOLDERS[1], ignore_errors=True)
        with locked(lock, "x"):
            ran = go(*flags)
        assert (ran.code, f"process {os.getpid()} on" in ran.err) == (2, True)
        assert not (copied / "failed").exists()


def test_a_cell_begun_otherwise_is_not_gone_on_with(go: Any, copied: Path, place: Path) -> None:
    plan = plan_of(place)
    plan["groups"][0]["run"]["eval_every"] = 4
    ran = go(groups=plan["groups"])
    assert ran.code == 2
    assert "batches/FT: " in ran.err
    assert "eval_every was 2, now 4" in ran.err
    assert copied.exists()


def test_a_page_takes_the_place_of_no_other_file(go: Any, copied: Path) -> None:
    (copied / "page").mkdir()
    (copied / "page/notes.txt").write_text("mine", encoding="utf-8")
    ran = go("--page")
    assert ran.code == 2
    assert "holds other files" in ran.err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (f"{FOLDERS[0]}/summary.json", "{}"),
        (f"{FOLDERS[0]}/summary.json", '{"complete": "no", "guard": {"actions": {}}}'),
        (f"{FOLDERS[0]}/memory.json", "[]"),
        (f"{FOLDERS[0]}/memory.json", '{"bytes": "much"}'),
        (f"{FOLDERS[0]}/memory.json", "{"),
    ],
)
def test_a_damaged_file_of_a_cell_is_refused_in_one_line(file: str, text: str, go: Any, copied: Path) -> None:
    (copied / file).write_text(text, encoding="utf-8")
    ran = go("--page")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert file in ran.err


# What the shipped plans ask for


def test_the_shipped_plans_name_every_method_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    own = read_plan(Path("hparams/survey/smollm2-135m.yaml"))
    assert {choice.name for group in own.groups for choice in group.choices} == set(METHODS)
    sizes = {cell.group: cell.size for cell in cells_of(own, tmp_path / "out")}
    assert sizes == {"batches-of-10": 40, "one-after-another": 20, "hard-one-by-one": 6}
    long = read_plan(Path("hparams/survey/smollm2-135m-300.yaml"))
    made = cells_of(long, tmp_path / "out")
    assert {cell.method for cell in made} == {
        cell.method for cell in cells_of(own, tmp_path / "out") if "10" in cell.group
    }
    assert {(cell.size, cell.what.settings.mode, cell.what.settings.batch_size) for cell in made} == {
        (300, "batch", 50)
    }
    for cell in made + cells_of(own, tmp_path / "out"):
        assert cell.what.hparams.model_name == "smollm2-135m"
        assert cell.what.settings.mode in ("batch", "sequential") or cell.group == "hard-one-by-one"
    xl = read_plan(Path("hparams/survey/gpt2-xl.yaml"))
    (group,) = xl.groups
    assert (group.run["limit"], group.run["batch_size"]) == (2000, 100)
    assert all((ROOT / "hparams" / choice.name / "gpt2-xl.yaml").exists() for choice in group.choices)
    assert {item.method for item in xl.expected} <= {choice.name for choice in group.choices}


# Numbers


def test_the_scores_are_of_the_means() -> None:
    scores = score_of({"ES": [1.0, 1.0], "PS": [0.5, 0.5], "NS": [0.5, 0.5]})
    assert scores is not None
    assert float(scores) == pytest.approx(3 / (1 + 2 + 2))
    assert score_of({"ES": [1.0]}) is None
    quality = quality_of({"rewrite_acc": [1.0], "rephrase_acc": [None], "locality_acc": [0.5]})
    assert quality is not None
    assert float(quality) == pytest.approx(2 / 3)


def test_methods_are_compared_on_the_requests_that_both_have() -> None:
    """B answers what A answers not; C stopped early; another group or seed is not compared."""

    def cell(method: str, values: list[float | None], group: str = "g", seed: int = 0) -> Measured:
        own = {"rewrite_acc": values, "locality_acc": [0.5] * len(values)}
        return Measured(group=group, method=method, seed=seed, places=tuple(range(len(values))), values=own)

    cells = [cell("A", [0.0] * 6), cell("B", [1.0] * 6), cell("C", [0.0, 1.0]), cell("A", [0.0], seed=1)]
    table = pairs_table([*cells, cell("D", [1.0] * 6, group="h")], COLUMNS)
    heads = ["group", "seed", "method", "less", "requests", "efficacy", "locality", "told apart by"]
    assert [column.title for column in table.columns] == heads
    rows = {(row[2], row[3]): row[4:] for row in table.rows}
    assert rows.keys() == {("A", "B"), ("A", "C"), ("B", "C")}
    assert rows["A", "B"][::3] == (6, "efficacy")
    assert rows["A", "C"][::3] == (2, "≈")
    assert [float(rows[pair][1]) for pair in rows] == [-1.0, -0.5, 0.5]
    assert pairs_table([], COLUMNS).rows == ()


def test_values_are_of_the_last_evaluation_or_of_single_edits(tmp_path: Path) -> None:
    rows = [
        [Retention(index=0, case_id=0, rewrite_acc=1.0, rephrase_acc=None, locality_acc=0.5, metrics={"ES": 1.0})],
        [Retention(index=0, case_id=0, rewrite_acc=0.0, rephrase_acc=None, locality_acc=0.25, metrics={"ES": 0.0})],
    ]
    lines = [json.loads(json.dumps(edit(n, mode="sequential", ppl=ppl).to_json())) for n, ppl in ((0, 95.0), (1, 5e3))]
    sequence = load_run(
        write_run(tmp_path / "a", [*lines, evaluation(1, 95.0, False, rows[0]), evaluation(2, 5e3, True, rows[1])])
    )
    assert measured(sequence).places == (0,)
    assert measured(sequence).values == {
        "rewrite_acc": [0.0],
        "rephrase_acc": [None],
        "locality_acc": [0.25],
        "ES": [0.0],
    }
    assert first_beyond(sequence) == "2"
    single = load_run(write_run(tmp_path / "b", [json.loads(json.dumps(edit(n).to_json())) for n in range(2)]))
    assert measured(single).values["rewrite_acc"] == [1.0, 1.0]
    assert first_beyond(single) == "0 of 2 alone"
    assert first_beyond(None) is None


def test_an_estimate_in_a_table() -> None:
    rows = (("A", Estimate(0.5, 0.25, 0.75)), ("B", None))
    table = Table.of("t", "T", ("method", ("efficacy", "percent")), rows)
    assert to_csv(table) == "method,efficacy,efficacy low,efficacy high\nA,0.5,0.25,0.75\nB,,,\n"
    assert "50.00 [25.00, 75.00]" in to_latex(table)
    unknown = replace(table, rows=(("A", Estimate(0.5)),))
    assert to_csv(unknown).splitlines()[1] == "A,0.5,,"
    assert "50.00 " in to_latex(unknown)


def test_memory_is_that_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    if not running.restart_peak():
        pytest.skip("this machine has no peak of memory to start anew")
    before = running.peak_bytes()
    held = torch.ones(32 * 2**20)  # 128 MiB, written
    after = running.peak_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 100 * 2**20
    assert float(held[0]) == 1.0


def test_memory_is_that_of_all_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begun.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda card: 10**card)
    assert running.restart_peak()
    assert (begun, running.peak_bytes()) == ([0, 1, 2], 111)


def test_a_numerical_error_inside_a_run_is_the_run_s_own_matter(go: Any, copied: Path, monkeypatch: Any) -> None:
    shutil.rmtree(copied / FOLDERS[1])

    def fail(*args: Any, **kwargs: Any) -> None:
        raise NumericalError("not finite")

    monkeypatch.setattr(ROME, "edit", fail)
    monkeypatch.setattr(ROME, "edit_each", fail)
    assert go().code == 0
    rows = list(csv.DictReader((copied / "page/tables/survey.csv").open(encoding="utf-8")))
    assert (rows[1]["state"], rows[1]["efficacy"]) == ("done", "")
