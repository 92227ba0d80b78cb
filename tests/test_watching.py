"""What is watched along a sequence, the forecast, and the way back from a collapse."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, states
from fake_runs import edit, write_run
from safetensors.torch import save_file
from script_runs import LOUD

from easyeditor.base.errors import DataError
from easyeditor.base.files import to_json
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.lm.spectrum import frobenius, leading_rows, turned
from easyeditor.methods.registry import load_hparams
from easyeditor.report.build import make_report
from easyeditor.report.watched import values_over_anchor
from easyeditor.results.forecast import FAR, forecast, hindsight, points_of
from easyeditor.results.lines import EditLine, Guard
from easyeditor.results.run import Run, load_run
from easyeditor.results.watched import Watched
from easyeditor.runs.sequence import delta_folder
from easyeditor.runs.watching import KEYS, Keys, saved_keys
from easyeditor.values import collapse
from easyeditor.values.edit import EditResult

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def edits_of(run: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in read if line["kind"] == "edit"]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in lines]
    for line in found:
        if line["guard"] is not None:
            line["guard"].pop("seconds", None)
    return found


# Numbers of a weight


def test_the_leading_subspace_is_that_of_the_whole_decomposition() -> None:
    torch.manual_seed(0)
    sizes = torch.cat([torch.linspace(90, 50, 8), torch.linspace(5, 1, 24)])
    left, right = torch.linalg.qr(torch.randn(32, 32)).Q, torch.linalg.qr(torch.randn(48, 32)).Q
    weight = left @ torch.diag(sizes) @ right.T
    basis = leading_rows(weight)
    assert basis is not None
    # the tail is at most 1/10 of the rest, and two passes and the start shrink it by its fifth power
    assert turned(left[:, :8], basis) < 1e-6
    assert turned(basis, leading_rows(weight.clone())) < 1e-6
    moved = weight + 80 * torch.outer(left[:, 20], right[:, 20])  # a ninth direction takes the place of the eighth
    assert turned(basis, leading_rows(moved)) == pytest.approx(1 / 8, abs=1e-3)
    assert frobenius(weight) == pytest.approx(float(sizes.double().square().sum().sqrt()), rel=1e-6)


def test_a_weight_that_is_not_finite_has_no_subspace() -> None:
    weight = torch.ones(4, 6)
    weight[1, 2] = math.nan
    assert leading_rows(weight) is None
    assert math.isnan(turned(leading_rows(torch.ones(4, 6)), leading_rows(weight)))


def test_the_nearest_key_is_the_largest_cosine_to_any_that_stands() -> None:
    torch.manual_seed(1)
    steps = [torch.randn(n, 12) for n in (3, 70, 1, 40)]
    keys = Keys()
    assert keys.nearest(steps[0]) is None
    for number, new in enumerate(steps):
        if number:
            earlier = torch.cat(steps[:number])
            wanted = torch.nn.functional.cosine_similarity(new[:, None], earlier[None], dim=2).abs().max()
            assert keys.nearest(new) == pytest.approx(float(wanted), rel=1e-5)
        keys.add(new)
    keys.add(None)  # an edit whose keys are not known: nothing can be said any more
    assert keys.nearest(steps[0]) is None


# The lines of a run


def test_every_step_of_a_sequence_is_watched(mass: Any, place: Path, tmp_path: Path) -> None:
    assert mass("--mode", "sequential", "--output", "run").code == 0
    editor = BaseEditor(load_hparams(place / "rome.yaml"))
    first = states(editor.model)[WEIGHT]
    keys: list[torch.Tensor] = []
    for line in edits_of(tmp_path / "run"):
        seen, at = line["watched"], delta_folder(tmp_path / "run", line["index"])
        editor.commit(EditResult.load(at))
        now = editor.model.get_parameter(WEIGHT).detach()
        assert seen["growth"] == {WEIGHT: pytest.approx(float(now.norm() / first.norm()), rel=1e-5)}
        assert seen["drift"][WEIGHT] == pytest.approx(turned(leading_rows(first), leading_rows(now)), abs=1e-9)
        assert 0 < seen["drift"][WEIGHT] < 1
        (own,) = saved_keys(at)
        cosines = [float(torch.nn.functional.cosine_similarity(own, key, dim=0).abs()) for key in keys]
        assert seen["key_cosine"] == (pytest.approx(max(cosines), rel=1e-5) if cosines else None)
        assert seen["anchor"] is None
        keys.append(own)


def test_mode_single_watches_nothing(mass: Any, tmp_path: Path) -> None:
    assert mass("--output", "run", "--limit", 1).code == 0
    assert "watched" not in edits_of(tmp_path / "run")[0]


@pytest.mark.parametrize("kept", [1, 3])
def test_keys_survive_a_resume_bit_for_bit(kept: int, mass: Any, tmp_path: Path) -> None:
    assert mass("--mode", "sequential", "--output", "whole").code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    whole = (tmp_path / "whole/results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut/results.jsonl").write_bytes(b"".join(whole[:kept]))
    for n in range(kept, 5):
        shutil.rmtree(delta_folder(tmp_path / "cut", n))
    assert mass("--resume", "cut", fresh=False).code == 0
    assert [x["watched"] for x in edits_of(tmp_path / "cut")] == [x["watched"] for x in edits_of(tmp_path / "whole")]


def test_a_run_from_before_keys_were_saved_goes_on_and_says_nothing_of_them(mass: Any, tmp_path: Path) -> None:
    assert mass("--mode", "sequential", "--output", "run").code == 0
    whole = (tmp_path / "run/results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/results.jsonl").write_bytes(b"".join(whole[:2]))
    for n in range(2):
        (delta_folder(tmp_path / "run", n) / KEYS).unlink()
    assert mass("--resume", "run", fresh=False).code == 0
    assert [x["watched"]["key_cosine"] for x in edits_of(tmp_path / "run")[2:]] == [None] * 3


def test_damaged_keys_are_refused_in_one_line(mass: Any, tmp_path: Path) -> None:
    assert mass("--mode", "sequential", "--output", "run", "--limit", 2).code == 0
    (delta_folder(tmp_path / "run", 0) / KEYS).write_bytes(b"not a tensor")
    ran = mass("--resume", "run", fresh=False)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert "not readable keys of an edit" in ran.err
    with pytest.raises(DataError, match=r"not readable keys"):
        saved_keys(delta_folder(tmp_path / "run", 0))


def test_the_anchor_is_read_from_the_trace() -> None:
    line = edit(0)
    (layer, numbers), *_ = line.record.trace.items()
    noted = replace(numbers, notes={"norm_anchor": 2.0, "value_norm": 5.0, "dropped": 1.0})
    result = EditResult(method="NAS", requests=(), deltas=(), traces=({layer: noted},))  # type: ignore[dict-item]
    from easyeditor.runs.watching import over_anchor

    assert over_anchor(result) == 2.5


def test_values_are_compared_with_the_anchor_or_the_first_step(tmp_path: Path) -> None:
    """Two batches of two; without an anchor the first batch's mean takes its place, and no values are no number."""

    def run(name: str, norms: list[float | None], anchors: tuple[float | None, float | None] = (None, None)) -> Run:
        lines = []
        for n, norm in enumerate(norms):
            line = edit(n, mode="batch", step=n // 2 * 2 + 2)
            trace = {at: replace(own, value_norm_after=norm) for at, own in line.record.trace.items()}
            seen = Watched(growth={"w": 1.0}, anchor=anchors[n // 2]) if n % 2 else None
            line = replace(line, record=replace(line.record, trace=trace), watched=seen)
            lines.append(json.loads(to_json(line.to_json())))
        return load_run(write_run(tmp_path / name, lines))

    assert values_over_anchor(run("plain", [2.0, 4.0, 3.0, 9.0])) == {2: 4 / 3, 4: 3.0}
    assert values_over_anchor(run("nas", [2.0, 4.0, 3.0, 9.0], (1.5, 2.5))) == {2: 1.5, 4: 2.5}
    assert values_over_anchor(run("ft", [None] * 4)) == {2: None, 4: None}


def test_a_line_says_what_is_watched_where_something_is() -> None:
    line = edit(0, mode="sequential")
    raw = json.loads(to_json(line.to_json()))
    assert "watched" not in raw
    assert EditLine.from_json(raw).watched is None
    seen = Watched(growth={"w": 1.5}, drift={"w": math.nan}, key_cosine=0.5)
    back = EditLine.from_json(json.loads(to_json(replace(line, watched=seen).to_json()))).watched
    assert back is not None
    assert (back.growth, back.key_cosine, back.anchor) == ({"w": 1.5}, 0.5, None)
    assert math.isnan(back.drift["w"])


# Rollback


@pytest.mark.usefixtures("touchy")
@pytest.mark.parametrize("stop", [False, True])
def test_rollback_goes_back_to_the_last_step_that_stood(stop: bool, mass: Any, tmp_path: Path) -> None:
    flags = ["--mode", "sequential", "--on-collapse", "rollback", *(["--stop-on-collapse"] if stop else [])]
    ran = mass(*flags, "--output", "run", *LOUD)
    assert ran.code == 0, ran.err
    found, stood, before = edits_of(tmp_path / "run"), 0, None
    assert any(line["guard"] is not None for line in found)
    for line in found:
        assert (line["just_before"] or line["pre"])["ppl"] == pytest.approx(before or line["pre"]["ppl"])
        if line["collapse"]["collapsed"]:
            assert line["guard"] == {"action": "rollback", "kept": False, "back_to": stood}
            assert not delta_folder(tmp_path / "run", line["index"]).exists()
        else:
            stood, before = line["step"], line["post"]["ppl"]
    ends_at_collapse = found[-1]["collapse"]["collapsed"]
    assert not stop or (ends_at_collapse and sum(line["collapse"]["collapsed"] for line in found) == 1)
    assert stop or len(found) == 5
    again = mass("--resume", "run", fresh=False)
    assert again.code == 0
    assert edits_of(tmp_path / "run") == found


@pytest.mark.usefixtures("touchy")
def test_rollback_resumed_after_every_line_gives_the_same_bits(mass: Any, tmp_path: Path) -> None:
    assert mass("--mode", "sequential", "--on-collapse", "rollback", "--output", "whole", *LOUD).code == 0
    whole = (tmp_path / "whole/results.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (1, 2, 4):
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut{kept}")
        (tmp_path / f"cut{kept}/results.jsonl").write_bytes(b"".join(whole[:kept]))
        assert mass("--resume", f"cut{kept}", fresh=False).code == 0
        assert timeless(edits_of(tmp_path / f"cut{kept}")) == timeless(edits_of(tmp_path / "whole"))


def test_a_batch_is_rolled_back_whole(mass: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three batches collapses: every batch is judged once, and then the evaluation after it."""
    values = {"alg_name": "FT", "model_name": str(place / "llama"), "device": "cpu", "layers": [1], "num_steps": 2}
    (tmp_path / "ft.yaml").write_text(json.dumps({**values, "lr": 1e-3, "ppl_sentence_num": 2}), encoding="utf-8")
    usual, calls = collapse.verdict, iter(range(1, 100))
    monkeypatch.setattr(collapse, "verdict", lambda *a, **k: replace(usual(*a, **k), collapsed=next(calls) == 3))
    flags = ["--hparams", "ft.yaml", "--mode", "batch", "--batch-size", 2, "--on-collapse", "rollback"]
    assert mass(*flags, "--eval-every", 2, "--output", "run").code == 0
    found = edits_of(tmp_path / "run")
    back = {"action": "rollback", "kept": False, "back_to": 2}
    assert [line["guard"] for line in found] == [None, None, back, back, None]
    assert ["watched" in line for line in found] == [False, True, False, True, True]
    assert found[3]["watched"]["growth"] == found[1]["watched"]["growth"]  # the weights are those of the first batch
    run = load_run(tmp_path / "run")
    assert [[row.index for row in seen.retention] for seen in run.evaluations] == [[0, 1], [0, 1], [0, 1, 4]]
    assert found[4]["just_before"]["ppl"] == found[1]["post"]["ppl"]


def test_rollback_belongs_to_sequences(mass: Any) -> None:
    ran = mass("--on-collapse", "rollback")
    assert ran.code == 2
    assert "on_collapse rollback with mode single" in ran.err


def test_a_rollback_in_words() -> None:
    assert Guard(action="rollback", kept=False, back_to=12).words == "rollback: taken back to step 12"


# Forecast


def sequence(kind: str, seed: int, count: int = 80) -> list[tuple[int, float]]:
    """A synthetic sequence of batches of 5, from perplexity 90 to the first point above 1000 or the end."""
    rng = random.Random(seed)
    rate, points = rng.uniform(0.02, 0.12), [(0, 90.0)]
    for i in range(1, count):
        rise = {
            "steady": rate * i,
            "flat": 0.0,
            "speeding up": rate * i * i / 25,
            "levelling off": 1.6 * (1 - math.exp(-i / 15)),
            "jump": 4.0 * (i >= 40),
        }[kind]
        points.append((5 * i, 90 * math.exp(rise + rng.gauss(0, 0.03))))
        if points[-1][1] > 1000:
            break
    return points


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("steady", 0.95, 1.0), ("speeding up", 0.8, 1.0), ("levelling off", 0.0, 0.0)],
)
def test_how_often_a_forecast_was_right(kind: str, least: float, most: float) -> None:
    """docs/runs.md states these shares: the rule is right on steady rises, and wrong where a rise levels off."""
    counts = [hindsight(sequence(kind, seed), 1000) for seed in range(100)]
    right, made = (sum(column) for column in zip(*counts, strict=True))
    assert made > 500
    assert least <= right / made <= most


def test_the_table_of_forecasts_of_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that rises by 5 % an edit crosses twice its beginning at edit 15; every forecast on the way says so."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import forecast as script

    runs = {"rises": [(n, 100 * 1.05**n) for n in range(40)], "stays": [(n, 100.0) for n in range(40)]}
    monkeypatch.setattr("easyeditor.results.run.load_run", lambda name: SimpleNamespace(label=name, edits=runs[name]))
    monkeypatch.setattr("easyeditor.results.forecast.points_of", lambda edits: edits)
    assert script.table(["rises", "stays"], [2, 50])[2:] == [
        "| rises | 100.0 → 670.5 in 39 | 2 × | 15 | 11 | 11 (100%) | 1.00 |",
        "| rises | 100.0 → 670.5 in 39 | 50 × | — | 0 |  |  |",
        "| stays | 100.0 → 100.0 in 39 | 2 × | — | 0 |  |  |",
        "| stays | 100.0 → 100.0 in 39 | 50 × | — | 0 |  |  |",
        "| all |  | 2 × |  | 11 | 11 (100%) | 1.00 |",
        "| all |  | 50 × |  | 0 |  |  |",
        "| all |  |  |  | 11 | 11 (100%) | 1.00 |",
    ]


@pytest.mark.parametrize("kind", ["flat", "jump"])
def test_no_crossing_is_predicted_where_nothing_rises(kind: str) -> None:
    assert sum(hindsight(sequence(kind, seed), 1000)[1] for seed in range(100)) == 0


def test_the_forecast_in_words() -> None:
    steady = [(n, 100 * math.exp(0.1 * n)) for n in range(11)]
    told = forecast(steady, 1000)
    assert told is not None
    assert told.near == math.ceil(math.log(10) / 0.1)
    assert told.words.startswith("At this rate the threshold of 1,000 is crossed near edit 24 ")
    slow = forecast([(n, 100 * math.exp(0.001 * n)) for n in range(11)], 1000)
    assert slow is not None
    assert f"is not crossed before edit {10 * FAR}" in slow.words
    crossed = forecast([*steady, (11, 5000.0), (12, 90.0)], 1000)
    assert crossed is not None
    assert crossed.words == "Perplexity crossed the threshold of 1,000 at edit 11."
    lost = forecast([*steady[:3], (3, math.inf)], 1000)
    assert lost is not None
    assert lost.crossed == 3
    few = forecast(steady[:3], 1000)
    assert few is not None
    assert few.words.startswith("Too few measurements after 2 edits")
    flat = forecast([(n, 100.0) for n in range(9)], 1000)
    assert flat is not None
    assert "does not rise" in flat.words
    assert forecast([(0, 93.0)], 1000) is None
    assert forecast([], 1000) is None


def test_summary_report_and_terminal_say_it(mass: Any, tmp_path: Path) -> None:
    ran = mass("--mode", "sequential", "--output", "run")
    run = load_run(tmp_path / "run")
    points = points_of(run.edits)
    assert [made for made, _ in points] == [0, 1, 2, 3, 4, 5]
    told = forecast(points, run.threshold or 0)
    assert told is not None
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    assert summary["forecast"]["words"] == told.words
    assert " ".join(told.words.split()[:6]) in " ".join(ran.out.split())
    report = make_report([run])
    (table,) = [table for table in report.tables if table.name == "watched"]
    assert told.words in table.rows[0]
    assert "watched" in [figure.name for figure in report.figures]


def test_a_run_without_watched_numbers_has_neither_table_nor_figure(tmp_path: Path) -> None:
    lines = [json.loads(to_json(edit(n, mode="sequential").to_json())) for n in range(3)]
    report = make_report([load_run(write_run(tmp_path / "old", lines))])
    assert "watched" not in [x.name for x in (*report.tables, *report.figures)]


def test_keys_of_another_model_are_refused_in_one_line(mass: Any, tmp_path: Path) -> None:
    assert mass("--mode", "sequential", "--output", "run", "--limit", 3).code == 0
    whole = (tmp_path / "run/results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/results.jsonl").write_bytes(b"".join(whole[:1]))
    save_file({"keys": torch.ones(1, 7)}, delta_folder(tmp_path / "run", 0) / KEYS)
    ran = mass("--resume", "run", fresh=False)
    assert ran.code == 2
    assert "keys of width 7" in ran.err.splitlines()[-1]
