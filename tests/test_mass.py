"""mass_edit.py on tiny models, in this process: what each mode does, records, resumes, refuses."""

from __future__ import annotations

import io
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build, rome_hparams, same, states, tokenizer
from rich.console import Console
from script_runs import LOUD, QUICK, SUBJECTS, record_of

from easyeditor import BaseEditor, EditRequest, EditResult
from easyeditor.base import endpoint
from easyeditor.base.errors import NumericalError
from easyeditor.dataset.reader import read_dataset
from easyeditor.evaluate import registry
from easyeditor.evaluate.judge import URL
from easyeditor.evaluate.scoring import score
from easyeditor.experiments.tools.replayed import ReplayedRun
from easyeditor.export.sources import read_source
from easyeditor.methods.rome.method import ROME
from easyeditor.report.terminal import print_summary
from easyeditor.results.journal import Journal
from easyeditor.results.run import load_run
from easyeditor.runs import single
from easyeditor.runs.sequence import delta_folder
from easyeditor.values.edit import WeightDelta

SPENT = ("time", "seconds")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(value: Any) -> Any:
    """Without what the clock says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in SPENT}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def requests(place: Path) -> list[EditRequest]:
    return list(read_dataset(str(place / "five.json")).requests)


def fresh_editor(place: Path, **changes: Any) -> BaseEditor:
    return BaseEditor(rome_hparams((build("llama"), tokenizer()), **{**QUICK, **changes}))


def close(a: Any, b: Any, rel: float = 1e-4) -> bool:
    """Equal, numbers up to `rel`."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], rel) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y, rel) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=rel, abs_tol=1e-5)
    return bool(a == b)


# single


def test_metrics_of_the_registry_are_measured_around_every_edit(mass: Any, tmp_path: Path) -> None:
    names = ["ES", "PS", "gen_rewrite_em", "zsre_specificity"]
    ran = mass("--output", "run", "--limit", 2, "--metrics", *names, "--json")
    assert ran.code == 0, ran.err
    for line in lines(tmp_path / "run"):
        assert set(line["metrics"]) == {"before", "after"}
        for state, side in (("before", "pre"), ("after", "post")):
            assert set(line["metrics"][state]) == set(names)
            assert isinstance(line["metrics"][state]["gen_rewrite_em"]["details"], dict), side
        assert line["metrics"]["after"]["ES"]["value"] is None  # the record has no ground truth to compare with
        assert line["metrics"]["after"]["ES"]["reason"]
    summary = json.loads(ran.out)
    found = [line["metrics"]["after"]["gen_rewrite_em"]["value"] for line in lines(tmp_path / "run")]
    assert summary["metrics"]["gen_rewrite_em"]["after"] == pytest.approx(sum(found) / 2)
    assert summary["metrics"]["gen_rewrite_em"]["edits"] == 2
    assert "ES" not in summary["metrics"]


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_every_prompt_is_scored_once_on_every_state_of_the_model(
    mode: str, mass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unedited model in groups, the edited one with each edit, whatever metrics ask for."""
    asked: list[list[tuple[str, str]]] = []

    def counted(model: Any, tok: Any, pairs: Any, **options: Any) -> Any:
        asked.append(list(pairs))
        return score(model, tok, pairs, **options)

    monkeypatch.setattr(registry, "score", counted)
    ran = mass("--output", "run", "--mode", mode, "--metrics", "easyedit", "counterfact", "zsre")
    assert ran.code == 0, ran.err
    assert all(len(set(pairs)) == len(pairs) for pairs in asked)
    rewrites = [sum(prompt == f"{s}, which is located in" for pairs in asked for prompt, _ in pairs) for s in SUBJECTS]
    # before and after; in a sequence also just before (but for the first), and at the end on both models
    assert rewrites == ([2] * 5 if mode == "single" else [4, *[5] * 4])


def test_single_gives_the_records_of_one_edit_at_a_time(mass: Any, place: Path, tmp_path: Path) -> None:
    ran = mass("--output", "run", "--together", "3")
    assert ran.code == 0, ran.err
    found = lines(tmp_path / "run")
    assert [(line["kind"], line["index"], line["step"], line["mode"]) for line in found] == [
        ("edit", i, i + 1, "single") for i in range(5)
    ]
    wanted = {"kind", "index", "step", "mode", "seconds", "guard", "delta", "saved_sha256"}
    for line, request in zip(found, requests(place), strict=True):
        alone = json.loads(json.dumps(fresh_editor(place).examine(request).record.to_json()))
        assert close(timeless({key: line[key] for key in alone}), timeless(alone))
        assert set(line) - set(alone) == wanted
        assert line["delta"] == {
            "model.layers.1.mlp.down_proj.weight": pytest.approx(line["trace"]["1"]["delta_norm"], rel=1e-5)
        }
        spent = line["seconds"]
        assert spent["total"] == pytest.approx(spent["edit"] + spent["metrics"] + spent["perplexity"])
        assert min(spent["edit"], spent["metrics"], spent["perplexity"]) > 0


def test_a_run_folder_says_what_was_done(
    mass: Any, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ran = mass("--output", "run", "--limit", "2", "--start", "1", "--set", "v_lr=0.25")
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "manifest.json", "results.jsonl", "summary.json"]
    config, manifest, summary = (json.loads((run / f"{n}.json").read_text()) for n in ("config", "manifest", "summary"))
    assert config["hparams"]["v_lr"] == 0.25
    assert config["run"] | {"mode": "single", "start": 1, "limit": 2} == config["run"]
    assert manifest["data"] | {"format": "flat", "requests": 5, "bad": []} == manifest["data"]
    assert manifest["data"]["sha256"] == read_dataset(str(place / "five.json")).sha256
    assert manifest["context_templates"] == QUICK["context_templates"]
    assert {"model_fingerprint", "seed", "sentences", "packages", "command", "selected"} <= manifest.keys()
    asked = {kind: dict.fromkeys(getattr(requests(place)[1], kind), 2) for kind in ("locality", "portability")}
    assert manifest["probes"] == {"rephrase": 2, **asked}
    assert "five.json: 2 of 5 requests (flat); probes: rephrase 2" in caplog.text
    assert [line["requested_rewrite"]["subject"] for line in lines(run)] == SUBJECTS[1:3]
    assert summary["complete"]
    for said in ("2 edits of 2 requests", "rewrite_acc", "s an edit", "metrics", "screen (", "run: run"):
        assert said in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80  # fits a terminal


def test_the_model_is_bit_equal_after_a_run_and_edits_are_measured_once(
    mass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"measured": 0}
    begun, measured = BaseEditor.__init__, BaseEditor.perplexity

    def init(self: BaseEditor, hparams: Any, **options: Any) -> None:
        begun(self, hparams, **options)
        seen.update(editor=self, before=states(self.model))

    def measure(self: BaseEditor, **options: Any) -> Any:
        seen["measured"] += 1
        return measured(self, **options)

    monkeypatch.setattr(BaseEditor, "__init__", init)
    monkeypatch.setattr(BaseEditor, "perplexity", measure)
    assert mass("--output", "run").code == 0
    assert same(seen["editor"].model, seen["before"])
    assert seen["measured"] == 1 + 5  # the base once


@pytest.mark.parametrize("changes", [{}, {"if_c_rome": True}, {"replay": False}, {"layers": [0, 2]}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_edits_computed_together_are_those_of_one_at_a_time(
    kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = {"llama": 6.2, "gpt2": 5.0}[kind]  # rows leave
    monkeypatch.setattr("easyeditor.methods.locate.value_search.STOP_LOSS", stop)
    hparams = rome_hparams(
        (build(kind), tokenizer()), **{**QUICK, "ppl_sentence_num": 0, "v_num_grad_steps": 6, **changes}
    )
    editor = BaseEditor(hparams)
    before = states(editor.model)
    made = [
        EditRequest.make(**{k: v for k, v in record_of(s).items() if k == "prompt" or "_" not in k}, target_new=t)
        for s, t in zip(SUBJECTS, ("Italy", "the", "a", "Spain and Wales", "in"), strict=True)
    ]
    together = editor.compute_each(made)
    assert same(editor.model, before)
    for request, result in zip(made, together, strict=True):
        alone = editor.compute(request)
        assert result.requests == alone.requests
        for ours, theirs in zip(result.deltas, alone.deltas, strict=True):
            apart = (ours.dense() - theirs.dense()).norm()  # a search that stops at once changes nothing: both are 0
            assert apart <= 1e-4 * theirs.dense().norm()
            assert ours.norm() == pytest.approx(float(theirs.dense().double().norm()), rel=1e-4)
        for layer, trace in alone.trace.items():
            assert result.trace[layer].steps == trace.steps
            assert result.trace[layer].denominator == pytest.approx(trace.denominator, rel=1e-4)
    steps = [r.trace[hparams.layers[-1]].steps for r in together]
    assert len(set(steps)) > 1, f"no row left before another ({steps}): the test tests nothing"


def test_a_failing_edit_is_recorded_and_the_rest_goes_on(
    mass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = BaseEditor.compute_each

    def compute_each(self: BaseEditor, listed: Any, progress: Any = None) -> Any:
        if any(r.subject == "Berlin" for r in listed):
            raise NumericalError("not finite")
        return found(self, listed, progress)

    monkeypatch.setattr(BaseEditor, "compute_each", compute_each)
    ran = mass("--output", "run")
    assert ran.code == 0
    assert "record 2 (case 2) has no edit: not finite" in caplog.text
    assert "4 edits of 5 requests, 1 failed" in ran.out
    failed = [line for line in lines(tmp_path / "run") if line["kind"] == "failed"]
    assert [(line["index"], line["case_id"], line["error"]) for line in failed] == [
        (2, 2, "NumericalError: not finite")
    ]
    assert mass("--resume", "run", fresh=False).code == 0
    assert len(lines(tmp_path / "run")) == 5


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_judge_that_does_not_answer_is_no_bad_record(
    mode: str, mass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "WAITS_S", ())
    monkeypatch.setenv(URL, "http://127.0.0.1:9/v1")  # nobody listens there
    ran = mass("--mode", mode, "--limit", 2, "--metrics", "wild_judge", "--skip-bad", "--output", "run")
    assert (ran.code, "no answer" in ran.err, "skip-bad" in ran.err) == (2, True, False)
    found = tmp_path / "run/results.jsonl"
    assert not found.exists() or lines(tmp_path / "run") == []


def test_perplexity_before_is_said_where_the_first_request_has_no_edit(mass: Any, place: Path, tmp_path: Path) -> None:
    long = [{**record_of("Oslo"), "prompt": "Oslo is " + "far " * 200}, record_of("Bay")]
    (tmp_path / "long.json").write_text(json.dumps(long), encoding="utf-8")
    for mode in ("single", "sequential"):
        ran = mass("--data", "long.json", "--skip-bad", "--mode", mode, "--output", mode, "--json")
        assert ran.code == 0, ran.err
        (edit,) = [line for line in lines(tmp_path / mode) if line["kind"] == "edit"]
        assert ran.json["ppl"]["before"] == edit["pre"]["ppl"]
        assert load_run(tmp_path / mode).base == edit["pre"]["ppl"]


def test_a_request_too_long_for_the_model_stops_the_run_or_is_left_out(mass: Any, tmp_path: Path) -> None:
    long = [record_of("Bay"), {**record_of("Oslo"), "prompt": "Oslo is " + "far " * 200}, record_of("Roland")]
    (tmp_path / "long.json").write_text(json.dumps(long), encoding="utf-8")
    ran = mass("--data", "long.json", "--output", "run")
    assert ran.code == 2
    assert "error: record 1 of the selection:" in ran.err
    assert "--skip-bad" in ran.err
    ran = mass("--resume", "run", "--skip-bad", fresh=False)
    assert ran.code == 0
    assert [line["kind"] for line in sorted(lines(tmp_path / "run"), key=lambda x: x["index"])] == [
        "edit",
        "failed",
        "edit",
    ]


def test_registry_metrics_of_a_sequence_are_measured_on_the_original_before(mass: Any, tmp_path: Path) -> None:
    flags = ["--mode", "sequential", "--metrics", "locality_acc", "rewrite_acc", *LOUD]
    assert mass(*flags, "--output", "run").code == 0
    assert mass("--metrics", "locality_acc", "rewrite_acc", *LOUD, "--output", "single").code == 0
    found = [line for line in lines(tmp_path / "run") if line["kind"] == "edit"]
    for line, alone in zip(found, lines(tmp_path / "single"), strict=True):
        assert line["metrics"]["before"] == alone["metrics"]["before"]
        kept = line["post"]["locality"]["neighborhood_acc"]
        assert line["metrics"]["after"]["locality_acc"]["value"] == pytest.approx(sum(kept) / len(kept))
    assert found[-1]["just_before"]["locality"]["neighborhood_acc"] != [1.0]


# screen


def test_the_screen_gives_the_denominators_of_the_edits(
    mass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mass("--output", "edits", "--set", "ppl_sentence_num=0").code == 0
    monkeypatch.setattr("easyeditor.methods.locate.method.search_values", _never)
    monkeypatch.setattr("easyeditor.methods.locate.method.search_values", _never)
    ran = mass("--output", "screen", "--screen", "--screen-threshold", "1.5")
    assert ran.code == 0, ran.err
    screened = lines(tmp_path / "screen")
    for line, edit in zip(screened, lines(tmp_path / "edits"), strict=True):
        assert line["denominator"] == pytest.approx(edit["trace"]["1"]["denominator"], rel=1e-4)
        assert line["prediction"] == (abs(line["denominator"]) < 1.5)
    keys = {"kind", "index", "case_id", "subject", "prompt", "denominator", "prediction"}
    assert all(set(line) == keys for line in screened)
    lowest = json.loads((tmp_path / "screen/summary.json").read_text())["screen"]["lowest"]
    assert [s["denominator"] for s in lowest] == sorted((x["denominator"] for x in screened), key=abs)
    assert "predicted to collapse (|denominator| < 1.5)" in ran.out


def test_a_screen_that_goes_on_has_the_batches_it_was_begun_with(
    mass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, screen = [], ROME.screen
    monkeypatch.setattr(single, "SCREENED_TOGETHER", 2)
    monkeypatch.setattr(ROME, "screen", lambda self, batch: asked.append(len(batch)) or screen(self, batch))
    assert mass("--output", "run", "--screen").code == 0
    whole = (tmp_path / "run/results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/results.jsonl").write_bytes(b"".join(whole[:3]))
    assert mass("--resume", "run", fresh=False).code == 0
    assert asked == [2, 2, 1, 2, 1]
    assert (tmp_path / "run/results.jsonl").read_bytes().splitlines(keepends=True) == whole


def _never(*_: Any, **__: Any) -> Any:
    pytest.fail("a screen searches no value")


# sequential, batch


def test_sequential_keeps_edits_and_evaluates_all_so_far(mass: Any, place: Path, tmp_path: Path) -> None:
    ran = mass("--mode", "sequential", "--eval-every", "2", "--output", "run")
    assert ran.code == 0, ran.err
    found = lines(tmp_path / "run")
    assert [(x["kind"], x["index"]) for x in found] == [
        *(("edit", 0), ("edit", 1), ("evaluation", 1), ("edit", 2), ("edit", 3), ("evaluation", 3)),
        *(("edit", 4), ("evaluation", 4)),
    ]
    editor, untouched = fresh_editor(place), fresh_editor(place)
    base, before = editor.perplexity(), None
    for request, line in zip(requests(place), (x for x in found if x["kind"] == "edit"), strict=True):
        examined = editor.examine(request, ppl_before=before)
        editor.commit(examined.result)
        before = examined.ppl_after
        assert close(timeless(line["post"]), timeless(json.loads(json.dumps(examined.record.post.to_json()))), rel=1e-6)
        assert line["collapse"]["ppl_before"] == pytest.approx(base.mean)  # the verdict is against the unedited model
        wanted = json.loads(json.dumps(examined.record.to_json()))
        for part in ("pre", "just_before"):
            assert close(timeless(line[part]), timeless(wanted[part]), rel=1e-6)
        original = json.loads(json.dumps(untouched.score(request).to_json()))
        del original["ppl"], original["probabilities"]
        assert close({key: line["pre"][key] for key in original}, original, rel=1e-6)
        saved = EditResult.load(delta_folder(tmp_path / "run", line["index"]))
        assert torch.equal(saved.deltas[0].dense(), examined.result.deltas[0].dense())
    last = found[-1]
    assert (last["after"], last["ppl"]) == (5, pytest.approx(before.mean))
    assert [r["index"] for r in last["retention"]] == [0, 1, 2, 3, 4]
    for r, request in zip(last["retention"], requests(place), strict=True):
        now = editor.score(request)
        assert r["rewrite_acc"] == now.rewrite[0]
        line = next(x for x in found if x["kind"] == "edit" and x["index"] == r["index"])
        answer = now.outputs["neighborhood"][0]
        for key, part in (("locality_acc", "pre"), ("locality_just_before_acc", "just_before")):
            said = (line[part] or line["pre"])["locality"]["neighborhood_output"][0]
            assert r[key] == pytest.approx(sum(a == b for a, b in zip(said, answer, strict=True)) / len(answer))
    assert "after 5 edits: perplexity" in ran.out


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize("recorded", [0, 2, 3])
def test_resumed_after_any_line_the_records_are_the_same(
    mode: str, recorded: int, mass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--mode", mode, *(["--eval-every", "2"] if mode == "sequential" else []), "--together", "2"]
    assert mass(*flags, "--output", "whole").code == 0
    written = Journal.append

    def append(self: Journal, line: Any) -> None:
        if self.path.read_bytes().count(b"\n") == recorded:
            self._file.write(b'{"kind": "edit", "ind')  # a line half written when the machine stops
            raise KeyboardInterrupt
        written(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        ran = mass(*flags, "--output", "cut")
    assert ran.code == 130
    assert "go on with --resume cut" in ran.err
    assert "Traceback" not in ran.err
    assert mass("--resume", "cut", fresh=False).code == 0
    assert timeless(lines(tmp_path / "cut")) == timeless(lines(tmp_path / "whole"))
    for saved in sorted((tmp_path / "whole").glob("deltas/*/edit.safetensors")):
        assert saved.read_bytes() == (tmp_path / "cut" / saved.relative_to(tmp_path / "whole")).read_bytes()


def test_a_finished_run_resumed_does_nothing_twice(mass: Any, tmp_path: Path) -> None:
    assert mass("--output", "run", "--set", "ppl_sentence_num=0").code == 0
    before = (tmp_path / "run/results.jsonl").read_bytes()
    ran = mass("--resume", "run", "--json", fresh=False)
    assert ran.code == 0
    assert ran.json["counts"]["edits"] == 5
    assert (tmp_path / "run/results.jsonl").read_bytes() == before


@pytest.mark.usefixtures("touchy")
def test_stop_on_collapse(mass: Any, tmp_path: Path) -> None:
    flags = ["--mode", "sequential", "--stop-on-collapse", "--output", "run", "--fail-on-collapse"]
    ran = mass(*flags, *LOUD)
    edits = [line for line in lines(tmp_path / "run") if line["kind"] == "edit"]
    assert ran.code == 3
    assert [x["collapse"]["collapsed"] for x in edits] == [False] * (len(edits) - 1) + [True]
    assert len(edits) < 5
    assert lines(tmp_path / "run")[-1] | {"kind": "evaluation", "collapsed": True} == lines(tmp_path / "run")[-1]
    assert mass("--resume", "run", fresh=False).code == 0
    assert len([x for x in lines(tmp_path / "run") if x["kind"] == "edit"]) == len(edits)


# The guard: no tiny edit collapses a tiny model, so here a collapse is any change of perplexity by 8 percent


@pytest.mark.usefixtures("touchy")
@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize("policy", ["keep", "revert", "remedy"])
def test_the_guard(policy: str, mode: str, mass: Any, place: Path, tmp_path: Path) -> None:
    ran = mass("--mode", mode, "--on-collapse", policy, "--output", "run", *LOUD)
    assert ran.code == 0, ran.err
    edits = [line for line in lines(tmp_path / "run") if line["kind"] == "edit"]
    hit = [line for line in edits if line["collapse"]["collapsed"]]
    assert hit
    assert all((line["guard"] is None) != line["collapse"]["collapsed"] for line in edits)
    assert {line["guard"]["action"] for line in hit} == {policy}
    for line in hit:
        guard = line["guard"]
        if policy == "remedy":
            assert guard["settings"] == "if_c_rome=true if_prefix=true"
            assert guard["kept"] != guard["record"]["collapse"]["collapsed"]
            assert (guard["record"]["method"], line["method"]) == ("C-ROME", "ROME")
            assert guard["record"]["test_prefix"] == "You. {}"
        else:
            assert guard["kept"] == (policy == "keep")
    assert f"guard (on_collapse: {policy}): {policy} {len(hit)}" in ran.out
    if mode == "sequential":
        kept = {line["index"] for line in edits if line["guard"] is None or line["guard"]["kept"]}
        assert {int(p.name) - 1 for p in (tmp_path / "run/deltas").iterdir()} == kept
        assert [r["index"] for r in lines(tmp_path / "run")[-1]["retention"]] == sorted(kept)
        for line, after in pairwise(edits):  # the next edit starts from what stands
            guard = line["guard"] or {"kept": True}
            stood = guard.get("record", line)["post"] if guard["kept"] else line["just_before"] or line["pre"]
            assert (after["just_before"] or after["pre"])["ppl"] == pytest.approx(stood["ppl"])
            assert after["pre"]["ppl"] == edits[0]["pre"]["ppl"]


@pytest.mark.usefixtures("touchy")
def test_a_redone_edit_is_that_of_the_remedy_and_survives_a_resume(mass: Any, place: Path, tmp_path: Path) -> None:
    flags = ["--mode", "sequential", "--on-collapse", "remedy", *LOUD]
    assert mass(*flags, "--output", "whole").code == 0
    whole = (tmp_path / "whole/results.jsonl").read_bytes().splitlines(keepends=True)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    (again / "results.jsonl").write_bytes(b"".join(whole[:4]))
    assert mass("--resume", "again", fresh=False).code == 0
    assert timeless(lines(again)) == timeless(lines(tmp_path / "whole"))
    first = lines(tmp_path / "whole")[0]
    editor = fresh_editor(place, if_c_rome=True, v_num_grad_steps=8, clamp_norm_factor=100, v_lr=5)
    redone = editor.compute(requests(place)[0]).trace[1]
    assert first["guard"]["record"]["trace"]["1"]["delta_norm"] == pytest.approx(redone.delta_norm, rel=1e-4)


# batch


def test_batches_in_sequence_and_resumed_between_and_inside_them(mass: Any, memit: Path, tmp_path: Path) -> None:
    flags = ["--hparams", memit, "--mode", "batch", "--batch-size", "2", "--eval-every", "4"]
    ran = mass(*flags, "--output", "whole")
    assert ran.code == 0, ran.err
    found = lines(tmp_path / "whole")
    assert [(x["kind"], x["index"]) for x in found] == [
        *(("edit", 0), ("edit", 1), ("edit", 2), ("edit", 3), ("evaluation", 3), ("edit", 4), ("evaluation", 4)),
    ]
    assert found[0]["post"]["ppl"] == found[1]["post"]["ppl"] == found[2]["just_before"]["ppl"]
    assert found[0]["pre"]["ppl"] == found[2]["pre"]["ppl"]
    assert sorted(p.name for p in (tmp_path / "whole/deltas").iterdir()) == ["000001", "000003", "000005"]
    raw = (tmp_path / "whole/results.jsonl").read_bytes().splitlines(keepends=True)
    assert mass(*flags, "--output", "cut").code == 0
    for kept in (3, 4):
        (tmp_path / "cut/results.jsonl").write_bytes(b"".join(raw[:kept]) + raw[kept][:40])
        assert mass("--resume", "cut", fresh=False).code == 0
        assert timeless(lines(tmp_path / "cut")) == timeless(found)


def test_a_batch_leaves_out_what_contradicts_it(mass: Any, memit: Path, place: Path, tmp_path: Path) -> None:
    """The later of two records is left out before a model is loaded, its batch is not; every reader of the run knows
    its batches, which are not all of one size."""
    answers = {"target_new_str": "Rome", "target_true_str": "I"}
    edits = [{"prompt": record_of(s)["prompt"], "subject": s, **answers} for s in SUBJECTS[:3]]
    held = (edits[:2], [{**edits[0], "target_new_str": "Spain"}], edits[2:], edits[:2])
    asked = [{"requested_rewrite": own, "questions": ["The sea is"], "new_answer": "blue"} for own in held]
    (tmp_path / "data.json").write_text(json.dumps(asked), encoding="utf-8")
    flags = ["--hparams", memit, "--data", tmp_path / "data.json", "--mode", "batch", "--batch-size", "4"]
    for dry in ([], ["--dry-run"]):
        ran = mass(*flags, *dry, "--output", "none")
        assert (ran.code, "record 1: requests" in ran.err, (tmp_path / "none").exists()) == (2, True, False)
    ran = mass(*flags, "--skip-bad", "--output", "run", "--case-files", "cases")
    assert ran.code == 0, ran.err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert [bad["record"] for bad in manifest["data"]["bad"]] == [1]
    assert (manifest["selected"], manifest["records"], manifest["batches"]) == (5, 3, [0, 3])
    found = lines(tmp_path / "run")
    assert [line["index"] for line in found if line["kind"] == "edit"] == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "run/deltas").iterdir()) == ["000001", "000004"]
    grouped = [
        json.loads(path.read_text())["grouped_case_ids"] for path in sorted((tmp_path / "cases").glob("*case_*"))
    ]
    assert sorted(grouped) == [[0, 1, 2]] * 3 + [[3, 4]] * 2
    assert [len(edit.requests) for edit in read_source(tmp_path / "run").edits] == [3, 2]
    assert len([deltas for _, deltas in ReplayedRun.read(tmp_path / "run").updates(fresh_editor(place), 5)]) == 5
    raw = (tmp_path / "run/results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/results.jsonl").write_bytes(b"".join(raw[:4]))
    assert mass("--resume", "run", fresh=False).code == 0
    assert timeless(lines(tmp_path / "run")) == timeless(found)


def test_the_size_of_a_batch_s_update_is_computed_once(
    mass: Any, memit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs a product of the rank squared, and is the same for all requests of the batch."""
    asked: list[str] = []
    plain = WeightDelta.norm

    def counted(delta: WeightDelta) -> float:
        asked.append(delta.name)
        return plain(delta)

    monkeypatch.setattr(WeightDelta, "norm", counted)
    ran = mass("--hparams", memit, "--mode", "batch", "--batch-size", "5", "--output", "run")
    assert ran.code == 0, ran.err
    edits = [line for line in lines(tmp_path / "run") if line["kind"] == "edit"]
    assert len(edits) == 5
    assert sorted(asked) == sorted(edits[0]["delta"])
    assert all(line["delta"] == edits[0]["delta"] for line in edits)


@pytest.mark.parametrize("alg_name", ["MEMIT", "FT"])
def test_of_a_batch_only_what_does_not_fit_the_model_is_left_out(
    alg_name: str, mass: Any, memit: Path, place: Path, tmp_path: Path
) -> None:
    ft = {"alg_name": "FT", "model_name": str(place / "llama"), "device": "cpu", "layers": [1], "ppl_sentence_num": 2}
    yaml = memit if alg_name == "MEMIT" else tmp_path / "ft.yaml"
    (tmp_path / "ft.yaml").write_text(json.dumps({**ft, "num_steps": 2, "lr": 1e-3}))
    far = {"locality_prompt": "far " * 200}  # edited without harm, and too long to be measured
    long = [record_of(s) for s in SUBJECTS[:2]] + [{**record_of("Rome"), **far}, *map(record_of, SUBJECTS[2:])]
    (tmp_path / "long.json").write_text(json.dumps(long), encoding="utf-8")
    flags = ["--hparams", yaml, "--data", "long.json", "--mode", "batch", "--batch-size", "2", "--output", "run"]
    ran = mass(*flags)
    assert (ran.code, lines(tmp_path / "run")) == (2, [])  # before the first batch is edited
    assert "record 2 of the selection: request 2: locality.neighborhood with its answer has" in ran.err
    assert mass("--resume", "run", "--skip-bad", fresh=False).code == 0
    found = lines(tmp_path / "run")
    assert [(x["kind"], x["index"]) for x in found] == [
        *(("failed", 2), ("edit", 0), ("edit", 1), ("edit", 3), ("edit", 4), ("edit", 5), ("evaluation", 5)),
    ]
    assert sorted(p.name for p in (tmp_path / "run/deltas").iterdir()) == ["000001", "000003", "000005"]
    raw = (tmp_path / "run/results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/results.jsonl").write_bytes(b"".join(raw[:3]))
    assert mass("--resume", "run", "--skip-bad", fresh=False).code == 0
    assert timeless(lines(tmp_path / "run")) == timeless(found)
    assert len(read_source(tmp_path / "run").edits) == 3


# Refusals


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--mode", "both"], "argument --mode: invalid choice: 'both'"),
        (["--mode", "batch", "--batch-size", "2"], "mode batch with ROME: it edits one fact at a time"),
        (["--batch-size", "2"], "batch_size is 2 with mode single"),
        (["--eval-every", "2"], "eval_every is set with mode single"),
        (["--screen", "--mode", "sequential"], "--screen with mode sequential"),
        (["--on-collapse", "revert", "--set", "ppl_sentence_num=0"], "on_collapse revert needs perplexity"),
        (["--on-collapse", "remedy", "--set", "if_c_rome=true"], "on_collapse remedy: C-ROME has no remedy"),
        (["--collect-collapsed", "x.json", "--mode", "sequential"], "--collect-collapsed needs mode single"),
        (["--start", "9"], "start is 9, but"),
        (["--data", "nowhere.json"], "nowhere.json: no such file"),
        (["--resume", "x", "--output", "y"], "--resume and --output were both given"),
        (["--union", "a.json"], "--union needs --collect-collapsed"),
        (["--set", "v_lrr=1"], "unknown key 'v_lrr'"),
        (["--hparams", "nowhere"], "nowhere.yaml: no such file"),
        (
            ["--hparams", str(ROOT / "hparams/MEND/smollm2-135m"), "--set", "archive=/nowhere", "--dry-run"],
            "holds no archive.json",
        ),
    ],
)
def test_refused_in_one_line_before_anything_is_made(flags: list[str], part: str, mass: Any, tmp_path: Path) -> None:
    ran = mass(*flags)
    assert (ran.code, ran.out) == (2, "")
    (line,) = [x for x in ran.err.splitlines() if x.startswith("error:")]
    assert part in line
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.json"] == []


def test_an_unknown_metric_is_refused_before_anything_is_made(mass: Any, tmp_path: Path) -> None:
    ran = mass("--metrics", "rewrite_ac", "--output", "run")
    assert ran.code == 2
    assert "did you mean 'rewrite_acc'?" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_screen_needs_a_denominator(mass: Any, memit: Path) -> None:
    ran = mass("--hparams", memit, "--screen")
    assert (ran.code, ran.err) == (2, "error: --screen with MEMIT: it has no denominator to screen by\n")


def test_data_is_needed(mass: Any) -> None:
    assert "error: --data is missing" in mass(fresh=False).err


@pytest.fixture
def begun(mass: Any, tmp_path: Path) -> Path:
    """A run of one edit."""
    assert mass("--output", "run", "--limit", "1", "--set", "ppl_sentence_num=0").code == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--set", "v_lr=0.1"], "v_lr was 0.5, now 0.1"),
        (["--mode", "sequential"], "mode was 'single', now 'sequential'"),
        (["--limit", "3", "--seed", "4"], "limit was 1, now 3; seed was 0, now 4"),
        (["--dtype", "float64"], "dtype was 'float32', now 'float64'"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(flags: list[str], part: str, mass: Any, begun: Path) -> None:
    before = {p: p.read_bytes() for p in begun.iterdir()}
    ran = mass("--resume", begun, *flags, fresh=False)
    assert ran.code == 2
    assert part in ran.err
    assert {p: p.read_bytes() for p in begun.iterdir()} == before


def test_resume_with_the_same_flags_and_another_device_is_fine(mass: Any, begun: Path, place: Path) -> None:
    given = ["--hparams", place / "rome.yaml", "--set", "ppl_sentence_num=0", "--limit", "1", "--device", "0"]
    assert mass("--resume", begun, *given, fresh=False).code == 0


def test_a_run_is_not_resumed_on_other_data_weights_or_a_changed_config(
    mass: Any, begun: Path, place: Path, tmp_path: Path
) -> None:
    config = (begun / "config.json").read_text()
    (begun / "config.json").write_text(config.replace('"v_lr": 0.5', '"v_lr": 0.7'))
    assert "config.json was changed after the run began" in mass("--resume", begun, fresh=False).err
    (begun / "config.json").write_text(config)
    manifest = (begun / "manifest.json").read_text()
    fingerprint = json.loads(manifest)["model_fingerprint"]
    (begun / "manifest.json").write_text(manifest.replace(fingerprint, "0" * 32))
    assert "was begun with other weights" in mass("--resume", begun, fresh=False).err
    (begun / "manifest.json").write_text(json.dumps({**json.loads(manifest), "selected": 4}))
    assert "five.json gave 4 requests, now 1" in mass("--resume", begun, fresh=False).err
    (begun / "manifest.json").write_text(manifest)
    content = (place / "five.json").read_bytes()
    (place / "five.json").write_bytes(content + b"\n")
    try:
        assert "five.json has other content" in mass("--resume", begun, fresh=False).err
    finally:
        (place / "five.json").write_bytes(content)
    (begun / "manifest.json").unlink()
    assert "not a whole run (manifest.json is missing" in mass("--resume", begun, fresh=False).err


def test_what_is_no_run_is_not_resumed(mass: Any, begun: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: not a run of mass_edit.py (no config.json in it)" in mass("--resume", "empty", fresh=False).err
    for content in ("{", "[]", '{"v_lr": 1}', '{"hparams": {"alg_name": "ROME"}, "run": 5}'):
        (tmp_path / "empty/config.json").write_text(content)
        ran = mass("--resume", "empty", fresh=False)
        assert ran.code == 2
        assert "Traceback" not in ran.err
    assert "already holds a result" in mass("--output", "run").err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (
            ["--mode", "sequential", "--output", "run"],
            "mode sequential with 2 processes: every edit builds on those before it",
        ),
        ([], "2 processes write to one run folder: name it with --output"),
    ],
)
def test_what_cannot_be_shared_out(flags: list[str], part: str, mass: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ran = mass(*flags)
    assert ran.code == 2
    assert part in ran.err


# The rest of the flags


@pytest.mark.usefixtures("touchy")
def test_collapsing_requests_are_collected_and_united(mass: Any, tmp_path: Path) -> None:
    ran = mass("--output", "run", "--collect-collapsed", "hard.json", *LOUD)
    assert ran.code == 0
    hard = json.loads((tmp_path / "hard.json").read_text(encoding="utf-8"))
    collapsed = json.loads((tmp_path / "run/summary.json").read_text())["collapsed"]
    assert sorted(r["case_id"] for r in hard) == sorted(c["case_id"] for c in collapsed) != []
    ran = mass("--union", "hard.json", "hard.json", "--collect-collapsed", "both.json", fresh=False)
    assert (ran.code, ran.out) == (0, f"{len(hard)} requests: both.json\n")
    assert mass("--data", "both.json", "--dry-run").json["data"]["requests"] == len(hard)


def test_dry_run_says_what_would_be_done(mass: Any, tmp_path: Path) -> None:
    ran = mass("--dry-run", "--limit", "3", "--set", "model_name=/nowhere")
    assert ran.code == 0
    assert (ran.json["selected"], ran.json["data"]["format"], ran.json["run"]["limit"]) == (3, "flat", 3)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_a_folder_that_holds_a_run(mass: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    refusal = mass("--dry-run", "--output", "run")
    assert (refusal.code, refusal.out, refusal.err.count("\n")) == (2, "", 1)
    assert "run: already holds a result" in refusal.err


def test_help_is_the_run_book(mass: Any) -> None:
    ran = mass("--help", fresh=False)
    assert ran.code == 0
    for said in ("torchrun --nproc-per-node 4", "--nnodes 2 --node-rank 0", "--resume results/RUN", "--on-collapse"):
        assert said in ran.out


def test_nothing_in_a_mass_edit_names_a_method() -> None:
    for file in (ROOT / "easyeditor/commands/mass_edit.py", *sorted((ROOT / "easyeditor/runs").glob("[!_]*.py"))):
        code = file.read_text(encoding="utf-8").split('"""', 2)[2]
        words = ('"ROME"', '"MEMIT"', '"MEND"', '"FT"', "methods.rome", "methods.memit", "if_c_rome")
        assert [word for word in words if word in code] == [], file


def test_a_summary_fits_a_terminal_and_keeps_its_numbers_whole() -> None:
    item = {
        "case_id": "facts-0143",
        "prompt": "x" * 70,
        "target_new": "language",
        "ppl": 603617.4,
        "denominator": 0.0237,
    }
    empty: dict[str, Any] = {"metrics": {}, "ppl": None, "screen": None, "last_evaluation": None}
    counts = {"edits": 0, "selected": 1, "failed": 0, "bad_records": 0, "collapsed": 1}
    heading = {"method": "ROME", "model": "m", "mode": "single", "data": "d.json", "format": "flat"}
    summary = {**empty, **heading, "counts": counts, "collapsed": [item], "guard": {"actions": {}}}
    sink = io.StringIO()
    print_summary(summary, Console(file=sink, width=60))
    row = next(line for line in sink.getvalue().splitlines() if "facts-0143" in line)
    assert "603,617" in row
    assert "0.0237" in row
    assert "…" in row
    assert len(row) <= 60
