"""Case files: the layout that the ROME and MEMIT repositories' summarize.py reads, with the numbers of our records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import pytest
from script_runs import QUICK, Ran, call, save_tiny, strict, write_yaml
from test_mass import lines

from easyeditor.commands import mass_edit

SIDES = ("pre", "post")
KINDS = {"rewrite": "E", "paraphrase": "P", "neighborhood": "N"}


def counterfact(case_id: int, subject: str) -> dict[str, Any]:
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": "{}, which is located in",
            "subject": subject,
            "target_new": {"str": "Italy"},
            "target_true": {"str": "the north"},
        },
        "paraphrase_prompts": [f"Where is {subject}? In", f"People live in {subject}, in"],
        "neighborhood_prompts": ["The sea lies in", "Lund is a town in", "He came from"],
    }


def zsre(number: int, subject: str) -> dict[str, Any]:
    return {
        "subject": subject,
        "src": f"Where is {subject}?",
        "rephrase": f"In what land lies {subject}?",
        "alt": "Northern Italy",
        "answers": ["Norway"],
        "loc": f"nq question: who wrote book {number}",
        "loc_ans": "an old man",
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    write_yaml(root / "rome.yaml", save_tiny(root / "llama"), **QUICK)
    subjects = ["Bay", "Oslo", "Berlin"]
    for name, records in {
        "cf": [counterfact(number, subject) for number, subject in zip((7, 3, 1201), subjects, strict=True)],
        "zsre": [zsre(number, subject) for number, subject in enumerate(subjects)],
    }.items():
        (root / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return root


@pytest.fixture
def mass(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)

    def go(data: str, *flags: Any) -> Ran:
        begin = ["--hparams", place / "rome.yaml", "--data", place / f"{data}.json"]
        return call(mass_edit, [*begin, *flags], monkeypatch, capsys)

    return go


def cases(folder: Path) -> dict[str, Any]:
    return {path.name: strict(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*case_*.json"))}


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_case_files_hold_what_summarize_reads(mass: Any, tmp_path: Path, mode: str) -> None:
    """What their script makes of the files, as its source does, is what our metrics say."""
    ran = mass("cf", "--mode", mode, "--case-files", "ROME/run_000", "--output", "run", "--metrics", "ES")
    assert ran.code == 0, ran.err
    assert "case files: ROME/run_000" in ran.out
    found = cases(tmp_path / "ROME/run_000")
    assert sorted(found) == ["case_1201.json", "case_3.json", "case_7.json"]
    ours = {line["case_id"]: line for line in lines(tmp_path / "run") if line["kind"] == "edit"}
    for name, case in found.items():
        line = ours[case["case_id"]]
        assert name == f"case_{case['case_id']}.json"
        assert (case["num_edits"], case["grouped_case_ids"], case["time"]) == (1, [case["case_id"]], line["time"])
        rewrite = case["requested_rewrite"]
        assert rewrite["prompt"].format(rewrite["subject"]) == line["requested_rewrite"]["prompt"]
        assert (rewrite["target_new"], rewrite["target_true"]) == ({"str": "Italy"}, {"str": "the north"})
        for side, when in zip(SIDES, ("before", "after"), strict=True):
            metrics = line["metrics"][when]
            assert {key: len(value) for key, value in case[side].items()} == {
                f"{kind}_prompts_{what}": count
                for kind, count in (("rewrite", 1), ("paraphrase", 2), ("neighborhood", 3))
                for what in ("probs", "correct")
            }
            for kind, letter in KINDS.items():
                probs = case[side][f"{kind}_prompts_probs"]
                wanted, other = (
                    ("target_true", "target_new") if kind == "neighborhood" else ("target_new", "target_true")
                )
                assert fmean(x[wanted] < x[other] for x in probs) == pytest.approx(metrics[f"{letter}S"]["value"])
                margin = fmean(math.exp(-x[wanted]) - math.exp(-x[other]) for x in probs)
                assert margin == pytest.approx(metrics[f"{letter}M"]["value"], abs=1e-12)
            assert case[side]["rewrite_prompts_correct"] == [line[side]["rewrite_acc"] == [1]]
            near = metrics["zsre_specificity"]["details"]["each"]
            assert case[side]["neighborhood_prompts_correct"] == [share == 1 for share in near]
    config = strict((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert strict((tmp_path / "ROME/run_000/params.json").read_text(encoding="utf-8")) == config["hparams"]


def summarized(found: dict[str, Any]) -> dict[str, float]:
    """The means of MEMIT's summarize.py over case files: success (in per cent), time (s), S; of its source's kind."""
    sums: dict[str, list[float]] = {"time": [case["time"] for case in found.values()]}
    for case in found.values():
        for side in SIDES:
            for kind in KINDS:
                wanted, other = (
                    ("target_true", "target_new") if kind == "neighborhood" else ("target_new", "target_true")
                )
                right = [x[wanted] < x[other] for x in case[side][f"{kind}_prompts_probs"]]
                sums.setdefault(f"{side}_{kind}_success", []).append(100 * fmean(right))
    means = {name: fmean(values) for name, values in sums.items()}
    for side in SIDES:
        parts = [means[f"{side}_{kind}_success"] for kind in KINDS]
        means[f"{side}_score"] = harmonic_mean(parts)
    return means


def test_a_batch_is_summed_up_as_theirs(mass: Any, memit: Path, tmp_path: Path) -> None:
    """Two batches, the second not full: their groups, the time of a whole batch, numbers after it, and our S."""
    flags = ["--hparams", memit, "--mode", "batch", "--batch-size", "2", "--case-files", "MEMIT/run_000"]
    ran = mass("cf", *flags, "--output", "run")
    assert ran.code == 0, ran.err
    found = {case["case_id"]: case for case in cases(tmp_path / "MEMIT/run_000").values()}
    assert sorted(cases(tmp_path / "MEMIT/run_000")) == [f"2_edits-case_{n}.json" for n in (1201, 3, 7)]
    assert {n: (case["num_edits"], case["grouped_case_ids"]) for n, case in found.items()} == {
        7: (2, [7, 3]),
        3: (2, [7, 3]),
        1201: (2, [1201]),
    }
    edits = {line["case_id"]: line for line in lines(tmp_path / "run") if line["kind"] == "edit"}
    assert found[7]["time"] == found[3]["time"] == pytest.approx(edits[7]["time"] + edits[3]["time"])
    assert found[1201]["time"] == edits[1201]["time"]
    told = summarized({f"case_{n}": case for n, case in found.items()})
    ours = strict((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["metrics"]
    for side, when in zip(SIDES, ("before", "after"), strict=True):
        for kind, letter in KINDS.items():
            assert told[f"{side}_{kind}_success"] == pytest.approx(100 * ours[f"{letter}S"][when])
        assert told[f"{side}_score"] == pytest.approx(100 * ours["S"][when])
    params = strict((tmp_path / "MEMIT/run_000/params.json").read_text(encoding="utf-8"))
    assert (params["alg_name"], params["layers"]) == ("MEMIT", [1, 2])


def test_zsre_counts_by_token_and_is_numbered_by_place(mass: Any, tmp_path: Path) -> None:
    """MEMIT's ZsRE averages over tokens: with one prompt of each kind, the share of right ones."""
    assert mass("zsre", "--case-files", "cases", "--output", "run").code == 0
    found = cases(tmp_path / "cases")
    assert sorted(found) == ["case_0.json", "case_1.json", "case_2.json"]
    for line in lines(tmp_path / "run"):
        post = found[f"case_{line['index']}.json"]["post"]
        assert post["rewrite_prompts_correct"] == line["post"]["rewrite_acc"]
        assert post["paraphrase_prompts_correct"] == line["post"]["rephrase_acc"]
        near = line["metrics"]["after"]["zsre_specificity"]["value"]
        assert post["neighborhood_prompts_correct"] == [pytest.approx(near)]


def test_a_finished_run_gives_them_again_and_one_without_the_metrics_does_not(mass: Any, tmp_path: Path) -> None:
    assert mass("cf", "--case-files", "one", "--output", "run").code == 0
    assert mass("cf", "--resume", "run", "--case-files", "two").code == 0
    assert cases(tmp_path / "one") == cases(tmp_path / "two")
    assert mass("cf", "--output", "plain", "--limit", "1").code == 0
    ran = mass("cf", "--resume", "plain", "--case-files", "three")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--case-files needs the metrics S, EM, PM, NM, zsre_specificity" in ran.err
    assert not Path("three").exists()


def test_what_underflowed_or_is_not_finite(mass: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A probability of 0 is a loss beyond float64's; a case that has none is left out and named."""
    assert mass("cf", "--case-files", "one", "--output", "run").code == 0
    journal = tmp_path / "run/results.jsonl"
    told = lines(tmp_path / "run")
    told[0]["metrics"]["after"]["EM"]["details"]["probabilities"] = [[0.0, 0.5]]
    told[1]["metrics"]["after"]["EM"]["details"]["probabilities"] = [[None, 0.5]]
    journal.write_text("".join(json.dumps(line) + "\n" for line in told), encoding="utf-8")
    ran = mass("cf", "--resume", "run", "--case-files", "two")
    assert ran.code == 0
    found = cases(tmp_path / "two")
    assert sorted(found) == ["case_1201.json", "case_7.json"]
    assert found["case_7.json"]["post"]["rewrite_prompts_probs"] == [
        {"target_new": 745.0, "target_true": -math.log(0.5)}
    ]
    assert "case 3 is not in two: its numbers are not finite" in caplog.text


@pytest.mark.parametrize("damaged", [{}, {"probabilities": [[0.5]]}, {"probabilities": ["a"]}, {"probabilities": 5}])
def test_damaged_metrics_are_one_line(mass: Any, tmp_path: Path, damaged: dict[str, Any]) -> None:
    assert mass("cf", "--case-files", "one", "--output", "run", "--limit", "1").code == 0
    (told,) = lines(tmp_path / "run")
    told["metrics"]["after"]["EM"]["details"] = damaged
    (tmp_path / "run/results.jsonl").write_text(json.dumps(told) + "\n", encoding="utf-8")
    ran = mass("cf", "--resume", "run", "--case-files", "two")
    assert ran.code == 2
    assert "run, edit 0: its metrics are damaged" in ran.err
    assert not Path("two").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--case-files", "full"], "full: is there already and not an empty folder"),
        (["--case-files", "run/cases", "--output", "run"], "--case-files run/cases lies in --output run"),
        (["--case-files", "cases", "--screen"], "--case-files with --screen"),
    ],
)
def test_bad_targets_are_refused_before_the_work(mass: Any, flags: list[str], said: str) -> None:
    Path("full").mkdir()
    Path("full/note.txt").write_text("mine")
    ran = mass("cf", *flags)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert said in ran.err
    assert sorted(path.name for path in Path().rglob("*")) == ["full", "note.txt"]
