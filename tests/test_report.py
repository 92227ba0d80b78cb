"""The report on made-up runs: numbers by hand, escapes, honest figures, killed runs, bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from fake_runs import edit_line, evaluation, screen_lines, sequential_lines, single_lines, training_lines, write_run
from test_outputs import content

from easyeditor.base.errors import DataError, OutputError
from easyeditor.commands import cli
from easyeditor.commands import report as script
from easyeditor.drawing import canvas
from easyeditor.drawing.page import LONGEST
from easyeditor.drawing.render import latex_escaped, to_csv, to_latex
from easyeditor.report import build, curves, run_table, scatter, tables
from easyeditor.report.headline import headline
from easyeditor.results.cause import cause
from easyeditor.results.lines import EditLine, FailureLine, Guard, Retention
from easyeditor.results.run import load_run, load_runs
from easyeditor.values.collapse import prediction_quality

INF = math.inf
HARD = {"denominator": -0.05, "rewrite": [0.0], "rephrase": None, "locality": [0.0, 0.5]}


def six_edits() -> list[dict[str, Any]]:
    """Two collapsed (one not finite), three normal, one not measured."""
    return [
        edit_line(0, ppl=2000.0, numerator=10.0, subject="Bay", **HARD),
        edit_line(1, ppl=INF, numerator=20.0, subject="<script>alert(1)</script>", **{**HARD, "denominator": 0.15}),
        edit_line(2, ppl=95.0, denominator=8.0, numerator=30.0, rewrite=[1.0], rephrase=[1.0, 0.5]),
        edit_line(3, ppl=100.0, denominator=-10.0, numerator=33.0, rewrite=[0.5], rephrase=[0.0]),
        edit_line(4, ppl=93.0, denominator=1.5, numerator=36.0, rewrite=[1.0], rephrase=None, locality=[]),
        edit_line(5, ppl=None, denominator=9.0),
    ]


def run_script(monkeypatch: pytest.MonkeyPatch, *args: Any) -> Any:
    """Exit code of `python -m easyeditor.report ARGS`."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.run(script.main)
    return ended.value.code


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as source:
        return list(csv.DictReader(source))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of six single edits with a screen before them."""
    lines = six_edits()
    run = write_run(tmp_path_factory.mktemp("runs") / "six", [*screen_lines(lines), *lines])
    build.write_report(build.make_report(load_runs([run])), run / "report")
    return run / "report"


# Numbers


def test_the_papers_table_equals_the_hand_computed(written: Path) -> None:
    rows = {row["edits"]: row for row in read_csv(written / "tables" / "collapse.csv")}
    assert list(rows) == ["collapsed", "normal", "all", "perplexity not measured"]
    collapsed, normal = rows["collapsed"], rows["normal"]
    numbers = ("count", "numerator", "|denominator|", "efficacy", "locality")
    assert [float(collapsed[key]) for key in numbers] == pytest.approx([2, 15.0, 0.1, 0.0, 0.25])
    assert collapsed["max perplexity"] == "inf"
    assert collapsed["generalization"] == ""  # none of the two has a paraphrase
    assert [float(normal[key]) for key in numbers] == pytest.approx([3, 33.0, 19.5 / 3, 2.5 / 3, 0.75])
    assert float(normal["max perplexity"]) == 100.0
    assert float(normal["generalization"]) == pytest.approx((0.75 + 0.0) / 2)
    assert rows["perplexity not measured"]["max perplexity"] == ""
    assert rows["all"]["count"] == "5"


def test_predictions_are_scored_over_edits_that_were_judged(written: Path) -> None:
    screen, own = read_csv(written / "tables" / "prediction.csv")
    for row, predicted in ((screen, 3), (own, 2)):  # the screen's border was 2
        assert [int(row[key]) for key in ("edits", "predicted", "collapsed", "both")] == [5, predicted, 2, 2]
        assert float(row["precision"]) == pytest.approx(2 / predicted)
        assert float(row["recall"]) == 1.0


def test_no_prediction_has_no_precision() -> None:
    none, wrong = prediction_quality([(False, True), (False, False)]), prediction_quality([(True, False)])
    assert (none.pairs, none.predicted, none.happened, none.both, none.precision, none.recall) == (2, 0, 1, 0, None, 0)
    assert (wrong.predicted, wrong.both, wrong.precision, wrong.recall) == (1, 0, 0, None)


def test_the_threshold_of_the_screen_is_the_runs_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", six_edits())
    (folder / "config.json").write_text('{"hparams": {"model_name": "m"}, "run": {"screen_threshold": 0.1}}')
    run = load_run(folder)
    assert run.model == "m"
    (row,) = tables.prediction_table([run]).rows
    assert row[1:6] == ("own |denominator| < 0.1", 5, 1, 2, 1)


def test_time_splits_and_keeps_the_rest(written: Path) -> None:
    rows = {row["part"]: row for row in read_csv(written / "tables" / "time.csv")}
    assert {part: float(row["sum"]) for part, row in rows.items()} == {
        "edit": 72.0, "metrics": 6.0, "perplexity": 36.0, "other": 6.0, "total": 120.0,
    }  # fmt: skip
    assert [float(rows[part]["share"]) for part in ("edit", "perplexity")] == pytest.approx([0.6, 0.3])


def test_collapsed_edits_come_worst_first_with_their_cause(written: Path) -> None:
    worst, second = read_csv(written / "tables" / "collapsed.csv")
    assert (worst["subject"], worst["perplexity"]) == ("<script>alert(1)</script>", "inf")
    assert second["cause"].startswith(
        "the denominator at layer 5 is -0.05 (a collapse is predicted below 1): the key of the"
    )


def test_a_collapse_with_an_ordinary_denominator_is_not_blamed_on_the_keys(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", [edit_line(0, ppl=5000.0, denominator=7.5)]))
    said = "the denominator is ordinary (7.5), so the keys are not the cause; the value grew 4-fold"
    assert cause(run.edits[0].record) == said


def test_of_several_layers_the_smallest_denominator_counts(tmp_path: Path) -> None:
    line = edit_line(0)
    numbers = line["trace"]["5"]
    line["trace"] = {
        "3": {**numbers, "numerator_norm": 1.0, "denominator": 5.0},
        "4": {**numbers, "numerator_norm": 2.0, "denominator": -0.5},
    }
    (edit,) = load_run(write_run(tmp_path / "run", [line])).edits
    assert (edit.record.decisive_layer or [None])[0] == 4
    assert (edit.record.denominator, edit.record.numerator) == (-0.5, 2.0)


# Methods and runs of other kinds


def test_a_method_without_denominator_or_trace(tmp_path: Path) -> None:
    lines = [edit_line(0, denominator=None), edit_line(1, ppl=4000.0)]
    lines[1]["trace"] = {}
    run = load_run(write_run(tmp_path / "run", lines))
    assert scatter.denominator_figure(run, "d") is None
    assert cause(run.edits[1].record) == "the method has no denominator; look at the size of the update"


def test_a_single_case_edit_is_a_run_of_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "results.jsonl").unlink()
    record = {k: v for k, v in edit_line(7).items() if k not in ("kind", "index", "step", "mode", "seconds", "guard")}
    (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    run = load_run(folder)
    assert (len(run.edits), run.mode, run.finished, run.notes) == (1, "single", True, ())
    assert run.edits[0].seconds == {"edit": 12.0}
    assert run.label == "ROME / smollm2-135m / facts"
    named = {"source": "data/hard/smollm2-135m.json"}
    assert replace(run, manifest={"data": named}).data == "hard/smollm2-135m"  # else the model's name came twice


def test_the_command_can_be_pasted(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", [edit_line(0)]))
    assert run_table.command_line(run) == "python mass_edit.py --data 'data/facts 1.json'"


def test_only_screened(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", screen_lines(six_edits())))
    report = build.make_report([run])
    assert (run.mode, report.figures) == ("screen", ())
    rows = next(table for table in report.tables if table.name == "screen").rows
    assert [row[3] for row in rows] == [-0.05, 0.15, 1.5, 8.0, 9.0, -10.0]


# Killed and sharded runs


def test_a_torn_last_line_is_dropped_and_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", six_edits(), ended=False)
    whole = (folder / "results.jsonl").read_bytes()
    for cut in (1, 3, 400, len(whole) - whole.rindex(b"\n", 0, -1) - 2):
        (folder / "results.jsonl").write_bytes(whole[:-cut])
        run = load_run(folder)
        assert len(run.edits) == 5
        assert not run.finished
        assert any("line 6: not JSON" in note and "torn" in note for note in run.notes)
        assert any("no summary.json" in note for note in run.notes)


def test_a_character_cut_in_two_is_a_torn_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [edit_line(0), edit_line(1, subject="🦋")])
    whole = (folder / "results.jsonl").read_bytes()
    (folder / "results.jsonl").write_bytes(whole[: whole.index("🦋".encode()) + 2])
    run = load_run(folder)
    assert len(run.edits) == 1
    assert "line 2" in run.notes[0]


def test_journals_of_ranks_are_read_and_repeats_counted_once(tmp_path: Path) -> None:
    lines = six_edits()
    folder = write_run(tmp_path / "run", lines[:2])
    write_run(folder, lines[1:4], name="results.rank0.jsonl")
    write_run(folder, lines[4:], name="results.rank10.jsonl")
    run = load_run(folder)
    assert [edit.index for edit in run.edits] == [0, 1, 2, 3, 4, 5]
    assert "1 edits are recorded more than once; the first record counts" in run.notes


def test_requests_without_an_edit_and_unknown_lines_are_noted(tmp_path: Path) -> None:
    failed = FailureLine(index=3, step=4, case_id="c", prompt="p", mode="single", error="NaN\n!").to_json()
    run = load_run(write_run(tmp_path / "run", [edit_line(0), failed, {"kind": "new"}]))
    assert any("1 requests could not be edited; the first is #3 (c): NaN !" in note for note in run.notes)
    assert any("1 lines of kind 'new' are not known" in note for note in run.notes)


def test_text_and_constants_that_are_not_finite(tmp_path: Path) -> None:
    lines = [edit_line(i) for i in range(3)]
    for line, value in zip(lines, ("inf", "NaN", math.nan), strict=True):
        line["post"]["ppl"] = value
        line["collapse"].update(collapsed=True, finite=False)
    run = load_run(write_run(tmp_path / "run", lines))
    assert [edit.record.post.ppl for edit in run.edits] == [INF, INF, INF]


# Sequences


def test_the_curve_starts_unedited_and_leaves_out_what_was_taken_back(tmp_path: Path) -> None:
    redone = EditLine.from_json(edit_line(2, ppl=94.0)).record
    lines = [
        edit_line(0, ppl=93.0, mode="sequential"),
        edit_line(1, ppl=9000.0, mode="sequential", guard=Guard(action="revert", kept=False)),
        edit_line(2, ppl=8000.0, mode="sequential", guard=Guard(action="remedy", kept=True, record=redone)),
        edit_line(3, ppl=7000.0, mode="sequential", guard=Guard(action="keep", kept=True)),
        evaluation(5, INF, True),
    ]
    run = load_run(write_run(tmp_path / "run", lines))
    assert curves.curve(run) == ([0, 1, 3, 4, 5], [92.9, 93.0, 94.0, 7000.0, INF])
    said = [edit.guard.words for edit in run.edits if edit.guard is not None]
    assert said == ["revert: taken back", "remedy: done again, kept", "keep"]
    figure = curves.sequential_figure([run], "s")
    assert figure is not None
    assert "1 edit that the guard took back left out" in figure.caption


def test_a_batch_is_one_point_of_the_curve(tmp_path: Path) -> None:
    lines = [edit_line(i, ppl=100.0 + i // 2, before=92.9 + i // 2, mode="batch") for i in range(5)]
    run = load_run(write_run(tmp_path / "run", lines))
    assert curves.curve(run) == ([0, 2, 4, 5], [92.9, 100.0, 101.0, 102.0])


def test_the_retention_grid_has_a_row_for_each_edit_in_the_order_made(tmp_path: Path) -> None:
    def row(index: int, value: float | None) -> Retention:
        return Retention(index=index, case_id="c", rewrite_acc=value, rephrase_acc=None, locality_acc=0.5)

    lines = [edit_line(9, mode="sequential", step=1), edit_line(4, mode="sequential", step=2)]
    lines.append(evaluation(1, 90.0, False, [row(9, 1.0)]))
    both = [row(9, 0.0), row(4, 0.5)]
    lines.append(evaluation(2, 91.0, None, both))
    run = load_run(write_run(tmp_path / "run", lines))
    np.testing.assert_array_equal(curves.retention_grid(run), [[1.0, 0.0], [np.nan, 0.5]])
    assert tables.retention_table([run]).rows[1][1:] == (2, 91.0, "", 0.25, None, 0.5)


def test_a_large_grid_is_averaged_not_sampled() -> None:
    grid = np.arange(3 * curves.ROWS, dtype=float)[:, None] * np.ones((1, 2))
    grid[2, 0] = np.nan
    cells, rows, columns = curves._grouped(grid)
    assert (cells.shape, rows, columns) == ((curves.ROWS, 2), 3, 1)
    assert cells[0].tolist() == [0.5, 1.0]
    assert cells[-1, 1] == 3 * curves.ROWS - 2


def test_several_runs_share_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    hard = write_run(tmp_path / "hard", sequential_lines(12, every=4, blow_up=4), data="hard")
    mend = write_run(tmp_path / "mend", training_lines(60, nan_at=30), name="log.jsonl")
    out = tmp_path / "out"
    assert run_script(monkeypatch, hard, mend, "--output", out, "--label", "ROME $hard$", "_x") == 0
    names = {path.name for path in (out / "figures").iterdir()}
    stems = ("sequential", "perplexity-1", "denominator-1", "retention-map-1", "training-2")
    assert names == {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert {row["run"] for row in read_csv(out / "tables" / "collapse.csv")} == {"ROME $hard$"}
    assert "report: " in capsys.readouterr().out


# Figures


def test_a_training_curve_marks_what_is_not_finite(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "mend", training_lines(60, nan_at=30), name="log.jsonl"))
    figure = curves.training_figure(run, "t")
    assert figure is not None
    assert "1 value not finite: crosses at the top edge" in figure.caption


def test_what_is_not_finite_stands_in_the_band_and_ticks_end_below_it() -> None:
    with canvas.styled():
        axes = canvas.new_figure().subplots()
        scale = canvas.log_scale(axes, [90.0, INF, 5e4], [1000.0, None])
        assert scale.place([90.0, INF]) == [90.0, scale.above]
        assert 5e4 < scale.band < scale.above < scale.top == axes.get_ylim()[1]
        assert max(axes.get_yticks()) <= scale.band
        assert max(axes.get_yticks(minor=True)) <= scale.band


def test_labels_hide_neither_each_other_nor_points_nor_leave_the_frame() -> None:
    with canvas.styled():
        figure = canvas.new_figure()
        axes = figure.subplots()
        points = [(float(i % 10), float(i // 10), f"subject number {i}") for i in range(60)]
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points])
        placed = canvas.label_points(axes, points, [], 12)
        assert 5 < placed == len(axes.texts) <= 12
        frame = axes.get_window_extent()
        boxes = [text.get_window_extent() if not text.arrow_patch else _box(text) for text in axes.texts]
        dots = axes.transData.transform([(x, y) for x, y, _ in points])
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])
            assert not any(box.contains(*dot) for dot in dots)
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1


def _box(note: Any) -> Any:
    """The box of an annotation's text without its line."""
    from matplotlib.text import Text

    note.update_positions(note.figure.canvas.get_renderer())
    return Text.get_window_extent(note, note.figure.canvas.get_renderer())


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("A$AP\n and\tCo", r"A\$AP and Co"),
        ("北京 🦋 Москва", "▯▯ ▯ Москва"),
        ("العربية", "▯▯▯▯▯▯▯"),
        ("bell\x07", "bell▯"),
        ("x" * 40, "x" * 27 + "…"),
    ],
)
def test_labels_hold_only_what_the_font_can_draw(text: str, drawn: str) -> None:
    assert canvas.drawable(text) == drawn


def test_all_points_of_a_large_run_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "MANY", 50)
    run = load_run(write_run(tmp_path / "run", single_lines(200, hard=0.2, infinite=0.5)))
    drawn: list[int] = []
    original = scatter._points

    def watched(axes: Any, *rest: Any) -> None:
        original(axes, *rest)
        drawn.extend(len(points.get_offsets()) for points in axes.collections)

    monkeypatch.setattr(scatter, "_points", watched)
    with canvas.styled():
        figure = scatter.perplexity_figure(run, "p")
    assert sum(drawn) == 200
    assert figure is not None
    assert b"<image" in figure.svg  # as one bitmap
    assert "200 edited models" in figure.caption


def test_the_same_run_gives_the_same_pictures_and_leaves_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    run = load_run(write_run(tmp_path / "run", six_edits()))
    before = dict(matplotlib.rcParams)
    drawn = []
    for _ in range(2):
        with canvas.styled():
            drawn.append(scatter.perplexity_figure(run, "p"))
    first, second = drawn
    assert first is not None
    assert second is not None
    assert dict(matplotlib.rcParams) == before
    assert first.svg == second.svg
    assert first.png == second.png
    ET.fromstring(first.svg)


# Files


class Page(HTMLParser):
    """What a page refers to and whether its tags are balanced."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_escapes_subjects(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert page.tags.count("img") == 2
    assert page.tags.count("script") == 1  # ours; the subject's is text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"@import|url\(|https?://", text)
    assert "python mass_edit.py --data &#x27;data/facts 1.json&#x27;" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_opens_with_the_verdict_then_figures_then_what_was_run(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    places = [text.index(f'<h2 id="{name}">') for name in ("verdict", "perplexity", "denominator", "summary", "edits")]
    assert places == sorted(places)
    verdict = text[places[0] : places[1]]
    for said in (
        "<strong>COLLAPSED: 2 of 5 edits (40.0%); threshold 1,000.</strong>",
        "Perplexity: unedited 92.9, median after an edit 100.0, worst not finite (&lt;script&gt;alert(1)",
        "Median |denominator|: collapsed 0.1, others 8.",
        "The list of collapsed edits below has the cause of each.",
    ):
        assert said in verdict


def test_the_verdict_of_other_runs(tmp_path: Path) -> None:
    def said(*lines: Any) -> tuple[str, ...]:
        return headline(load_run(write_run(tmp_path / str(len(list(tmp_path.iterdir()))), list(lines))))

    held = said(edit_line(0, ppl=93.0), edit_line(1, ppl=95.0))
    assert held[0] == "No collapse: 2 of 2 edits kept the model below the threshold 1,000."
    assert held[1] == "Perplexity: unedited 92.9, median after an edit 94.0, worst 95.0 (Arthur, #1)."
    assert held[-1] == "Nothing to do."
    assert said(edit_line(0, ppl=math.inf))[1].endswith("worst not finite (Chicago, #0).")
    assert said(edit_line(0, ppl=None)) == (
        "No verdict on collapse: perplexity was not measured (ppl_sentence_num: 0).",
    )
    without = said(edit_line(0, ppl=5000.0, denominator=None))
    assert not any("denominator" in line for line in without[:-1])
    assert without[-1].startswith("Try: ")
    grown = [edit_line(n, ppl=ppl, mode="sequential", step=n + 1) for n, ppl in enumerate((93.0, 5000.0, 9000.0))]
    assert said(*grown)[0] == "COLLAPSED: 2 of 3 edits (66.7%), the first at step 2; threshold 1,000."
    (screened,) = said(*screen_lines([edit_line(0, denominator=0.1), edit_line(1)]))
    assert screened.startswith("1 of 2 screened requests are predicted to collapse the model (|denominator| < ")


def test_long_tables_are_cut_on_the_page_and_whole_in_csv(tmp_path: Path) -> None:
    lines = [edit_line(i, ppl=5000.0, subject="s" * 400 if i == 0 else None) for i in range(LONGEST + 20)]
    run = load_run(write_run(tmp_path / "run", lines))
    table = tables.edits_table([run])
    from easyeditor.drawing.page import html_page

    text = html_page("t", [table], [], [], [])
    assert text.count("<tr>") == LONGEST + 1
    assert f"The first {LONGEST} of {LONGEST + 20} rows; all are in tables/edits.csv" in text
    assert "s" * 300 not in text
    assert "Texts are cut after 300 characters" in text
    assert len(list(csv.reader(to_csv(table).splitlines()))) == LONGEST + 21
    assert "% 320 more rows in edits.csv" in to_latex(table)


def test_latex_escapes(written: Path) -> None:
    assert latex_escaped("50% of A&B_c #1 ~ ^ {x} $5 \\ <b> |k|\n–") == (
        r"50\% of A\&B\_c \#1 \textasciitilde{} \textasciicircum{} \{x\} \$5 \textbackslash{} "
        r"\textless{}b\textgreater{} \textbar{}k\textbar{} --"
    )
    text = (written / "tables" / "collapse.tex").read_text(encoding="utf-8")
    assert r"collapsed & 2 & 15.00 & 0.1 & not finite & 0.00 & -- & 25.00 \\" in text
    assert r"efficacy (\%)" in text


def test_a_second_report_replaces_what_the_first_lists_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    both = [*screen_lines(six_edits()), *six_edits()]
    run, report = write_run(tmp_path / "run", both), tmp_path / "run/report"
    assert run_script(monkeypatch, run) == 0
    mine = [report / "figures/mine.png", report / "figures/screen.png", report / "tables/mine.csv"]
    for path in mine:
        path.write_text("mine")
    assert (report / "tables/screen.csv").exists()
    write_run(run, six_edits())
    assert run_script(monkeypatch, run) == 0
    assert not (report / "tables/screen.csv").exists()
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert "report/index.html" in capsys.readouterr().out
    (report / "tables/screen.csv").write_text("mine")  # in the way of what comes now
    write_run(run, both)
    before = content(report)
    assert run_script(monkeypatch, run) == 2
    assert "tables/screen.csv: is there and not of the last report" in capsys.readouterr().err
    shutil.move(report / "figures", tmp_path / "elsewhere")
    (report / "figures").symlink_to(tmp_path / "elsewhere")
    assert run_script(monkeypatch, run) == 2
    assert "figures: is a link" in capsys.readouterr().err
    (report / "figures").unlink()
    shutil.move(tmp_path / "elsewhere", report / "figures")
    assert content(report) == before


def test_a_report_that_was_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", six_edits())
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.write_report(build.make_report(load_runs([run])), run / "report")
    assert run_script(monkeypatch, run) == 0
    assert list((run / "report/figures").iterdir())


def test_the_report_loads_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", screen_lines(six_edits()))
    code = (
        "import sys; from easyeditor.commands.report import main; main(); import easyeditor.report.scatter;"
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Bad input


def broken(tmp_path: Path, what: str) -> list[Any]:
    """Arguments that cannot work."""
    run = write_run(tmp_path / "run", six_edits())
    journal = run / "results.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines()
    if what == "missing":
        return [tmp_path / "none"]
    if what == "file":
        return [journal]
    if what == "no run":
        (tmp_path / "empty").mkdir()
        return [tmp_path / "empty"]
    if what == "two without output":
        return [run, tmp_path / "other"]
    if what == "twice":
        return [run, run, "--output", tmp_path / "out"]
    if what == "labels":
        return [run, "--label", "a", "b"]
    if what == "other files":
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").touch()
        return [run, "--output", tmp_path / "full"]
    if what == "output is a file":
        return [run, "--output", journal]
    edits = {
        "empty": "", "middle": "\n".join([*lines[:2], '{"kind": "edit", ', *lines[2:]]), "list": "[1]\n" + lines[0],
        "no kind": '{"index": 1}\n' + lines[0], "half": '{"kind": "edit", "index": 1}\n' + lines[0],
        "deep": "[" * 100_000 + "\n" + lines[0],
        "modes": lines[0] + "\n" + lines[1].replace('"mode": "single"', '"mode": "batch"') + "\n",
    }  # fmt: skip
    if what in edits:
        journal.write_text(edits[what], encoding="utf-8")
    elif what == "not text":
        journal.write_bytes(b"\xff\xfe\n" + lines[0].encode())
    else:
        (run / "config.json").write_text(what, encoding="utf-8")
    return [run]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"none: no such folder; give a run folder"),
        ("file", r"results.jsonl: not a folder"),
        ("no run", r"empty: not a run folder; it needs results.jsonl"),
        ("empty", r"results.jsonl: holds no whole record yet"),
        ("middle", r"results.jsonl, line 3: not JSON \(.* at character 19\)"),
        ("list", r"line 1: expected a JSON object, found list"),
        ("no kind", r"line 1: no 'kind' in this line"),
        ("half", r"line 1: not a whole edit record \(KeyError: 'collapse'\)"),
        ("deep", r"line 1: not JSON \(nested too deeply\)"),
        ("not text", r"line 1: not JSON \('utf-8' codec"),
        ("modes", r"edits of several modes \(batch, single\)"),
        ("two without output", r"2 runs need --output DIR"),
        ("twice", r"run: given twice"),
        ("labels", r"--label names 2 runs, and 1 are given"),
        ("other files", r"full: holds other files and no index.html"),
        ("output is a file", r"results.jsonl lies in RUN"),
        ("[]", r"config.json: expected a JSON object, found list"),
        ("{", r"config.json: not readable as JSON"),
    ],
)
def test_bad_input_is_one_line(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run_script(monkeypatch, *broken(tmp_path, what)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_read_only_place_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputError, match=r"cannot be written, because .* is read-only"):
        build.check_output(tmp_path / "report")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = write_run(tmp_path / "run", screen_lines(six_edits()))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run_script(monkeypatch, run) == 2
    assert re.fullmatch(r"error: .*: cannot be written \(No space left on device\)\n", capsys.readouterr().err)
    assert not list(run.rglob("*.part*"))


def test_labels_of_runs_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [edit_line(0)]) for name in ("a", "b")]
    assert [run.label for run in load_runs(folders)] == [f"ROME / smollm2-135m / facts ({name})" for name in "ab"]


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", [{**edit_line(0), "notes": "x" * 10_000_000}, edit_line(1)]))
    assert len(run.edits) == 2
    with pytest.raises(DataError, match="holds no whole record"):
        load_run(write_run(tmp_path / "empty", []))
