"""single_case_edit.py --interactive: requests from a pipe, kept or taken back; the run it leaves; bad lines."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, rome_hparams, same, states
from script_runs import Ran, call, save_tiny, write_yaml

import easyeditor.commands.report as report_main
from easyeditor import BaseEditor
from easyeditor.base.errors import DataError, OutputError
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.commands.interactive import reader
from easyeditor.dataset.sentences import load_sentences
from easyeditor.methods.registry import load_hparams
from easyeditor.results.journal import Journal
from easyeditor.results.lines import EditLine
from easyeditor.results.run import load_run
from easyeditor.runs.sequence import delta_folder
from easyeditor.runs.session import session, typed_settings
from easyeditor.values.edit import EditRequest, EditResult

FRANCE, SPAIN, ITALY = "The capital of [France] is => the", "[Spain] lies in => a", "[Italy] lies in => a"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a YAML whose edits take."""
    folder = tmp_path_factory.mktemp("typed")
    changes = {"ppl_sentence_num": 2, "v_num_grad_steps": 15, "clamp_norm_factor": 40.0, "layers": [3], "v_lr": 2.0}
    changes |= {"fact_token": "last"}  # what the head is given: tiny models take such an edit
    write_yaml(folder / "h.yaml", save_tiny(folder / "m"), **changes)
    return folder


@pytest.fixture
def typed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """typed(lines, *flags): a session in a new folder, its lines from a pipe."""

    def go(lines: list[str | bytes], *flags: str) -> Ran:
        raw = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        monkeypatch.chdir(tmp_path)
        flags = flags or ("--hparams", str(place / "h.yaml"), "--output", "run")
        return call(single_case_edit, ["--interactive", *flags], monkeypatch, capsys)

    return go


def edits(run: Path) -> list[EditLine]:
    return list(load_run(run).edits)


def test_a_session_from_a_pipe(typed: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    lines = [
        FRANCE,
        "?The capital",
        "perhaps",
        "",
        "Spain lies in",
        "Spain",
        "a",
        "n",
        ":list",
        "? The",
        ":quit",
        "x",
    ]
    ran = typed(lines)
    assert ran.code == 0, ran.err
    assert "keep it? [Y/n, or ? TEXT to ask the edited model] ?The capital\nThe capital" in ran.out
    assert "y keeps it, n takes it back" in ran.out
    assert "kept; 1 edit in the model" in ran.out
    assert "subject> Spain\nnew answer> a" in ran.out
    assert "taken back: the weights are as before it" in ran.out
    assert "  1  kept        The capital of France is → the  (rewrite 1.000, perplexity" in ran.out
    assert "  2  taken back  Spain lies in → a" in ran.out
    assert ran.out.endswith("go on with single_case_edit.py --interactive --resume run\n")
    assert "1 of 2 edits kept: run" in ran.out
    first, second = edits(tmp_path / "run")
    assert (first.kept, first.saved_sha256, first.step) == (
        True,
        EditResult.load(delta_folder(tmp_path / "run", 0)).sha256(),
        1,
    )
    assert (second.kept, second.saved_sha256, second.request.case_id) == (False, None, "typed-2")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["complete"], summary["counts"]["edits"], summary["mode"]) == (True, 2, "sequential")
    report = call(report_main, ["run", "--output", "page"], monkeypatch, capsys)
    assert report.code == 0, report.err
    assert (tmp_path / "page").exists()


def test_the_last_line_may_be_missing(typed: Any, tmp_path: Path) -> None:
    ran = typed([FRANCE])  # the input ends where it is asked whether to keep
    assert ran.code == 0, ran.err
    assert "0 of 1 edits kept: run" in ran.out
    assert [line.kept for line in edits(tmp_path / "run")] == [False]


@pytest.mark.parametrize("lines", [[], [""], [":quit"], ["? The"], ["[France] is"]])
def test_a_session_without_an_edit_leaves_nothing(typed: Any, place: Path, tmp_path: Path, lines: list[str]) -> None:
    ran = typed(lines, "--hparams", str(place / "h.yaml"))
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "no edit was made, so nothing is kept")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_it_goes_on_where_it_was(typed: Any, place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    first = typed([FRANCE, "y", SPAIN, "y", "? The capital of France is", ":quit"])
    there = [path.read_bytes() for path in sorted((tmp_path / "run/deltas").rglob("*.safetensors"))]
    again = typed([":list", "? The capital of France is", ITALY, "y"], "--resume", "run")
    assert again.code == 0, again.err
    said = [ran.out.split("? The capital of France is\n")[1].splitlines()[0] for ran in (first, again)]
    assert said[0] == said[1]
    assert "  2  kept        Spain lies in → a" in again.out
    assert "3 of 3 edits kept: run" in again.out
    assert [line.request.case_id for line in edits(tmp_path / "run")] == ["typed-1", "typed-2", "typed-3"]
    assert [p.read_bytes() for p in sorted((tmp_path / "run/deltas").rglob("*.safetensors"))[: len(there)]] == there
    other = call(mass_edit, ["--resume", "run"], monkeypatch, capsys)
    assert (other.code, "--interactive --resume" in other.err) == (2, True)
    save_tiny(place / "m", seed=3)
    try:
        changed = typed([":quit"], "--resume", "run")
    finally:
        save_tiny(place / "m")
    assert (changed.code, "was begun with other weights" in changed.err) == (2, True)


def test_a_dry_run_that_goes_on_sees_that_mends_archive_is_missing(typed: Any, tmp_path: Path) -> None:
    typed([FRANCE, "y"])
    path = tmp_path / "run/config.json"
    mend = load_hparams(ROOT / "hparams/MEND/smollm2-135m.yaml").override(["archive=/nowhere"]).to_dict()
    path.write_text(json.dumps({**json.loads(path.read_text()), "hparams": mend}))
    ran = typed([], "--resume", "run", "--dry-run")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "archive: /nowhere holds no archive.json" in ran.err


def test_an_edit_that_was_kept_and_is_not_there_ends_it_in_one_line(typed: Any, tmp_path: Path) -> None:
    typed([FRANCE, "y"])
    (tmp_path / "run/deltas/000001/edit.safetensors").write_bytes(b"x")
    ran = typed([":list"], "--resume", "run")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "not a whole saved edit" in ran.err
    assert len(edits(tmp_path / "run")) == 1
    assert (tmp_path / "run/summary.json").exists()


class Stopped(io.StringIO):
    """Lines, then Ctrl-C."""

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        line = super().readline(size)
        if not line:
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize(
    ("lines", "told"), [([FRANCE, "y", SPAIN], "1 of 1 edits kept: run"), ([], "no edit was made")]
)
def test_ctrl_c_says_what_was_kept(
    place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, lines: list[str], told: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Stopped("".join(f"{line}\n" for line in lines)))
    monkeypatch.chdir(tmp_path)
    flags = ["--interactive", "--hparams", place / "h.yaml", "--output", "run"]
    ran = call(single_case_edit, flags, monkeypatch, capsys)
    assert (ran.code, ran.err.splitlines()[-1].startswith(f"interrupted; {told}")) == (130, True)
    assert (tmp_path / "run/summary.json").exists() == bool(lines)


BAD: list[tuple[str | bytes, str]] = [
    (":foo", "no command ':foo'; there are :list"),
    (":undo", "nothing to take back: no edit is kept"),
    (":check", "nothing to check: no edit is kept"),
    (":export adapter x", "nothing to export: no edit is kept"),
    (":export x", ":export needs adapter or checkpoint, and a folder"),
    ("?", "? needs a text"),
    ("? " + "x" * 100_001, "? needs a text"),
    (b"? \xff\xfe", "? needs a text"),
    ("? " + "the " * 500, "the limit is 128"),
    ("[The] capital of [France] => Rome", "2 subjects are marked"),
    ("[ ] is => Rome", "subject is empty"),
    (b"[Fran\xff] is => Rome", "is not UTF-8 text"),
    ("[" + "x" * 100_001 + "] is => Rome", "of at most 100000 characters"),
    ("[France] is " + "very " * 200 + "=> Rome", "tokens"),
]


def test_bad_lines_are_one_line_each_and_the_session_goes_on(typed: Any, tmp_path: Path) -> None:
    further: list[str | bytes] = ["France is", "Spain", "Rome", "[France] is", "   ", ":list"]  # asked for what lacks
    ran = typed([*[line for line, _ in BAD], *further])
    assert ran.code == 0, ran.err
    wrong = [line for line in ran.out.splitlines() if line.startswith("error: ")]
    assert len(wrong) == len(BAD) + 2
    for (line, part), told in zip(BAD, wrong, strict=False):
        assert part in told, line[:60]
        assert len(told) <= 510
    assert "subject 'Spain' is not in the prompt" in wrong[-2]
    assert "target_new is empty" in wrong[-1]
    assert "no edit yet" in ran.out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--interactive", "--prompt", "a"], "--prompt does not go with --interactive"),
        (["--interactive", "--json"], "--json does not go with --interactive"),
        (["--interactive", "--save-edit", "x"], "--save-edit does not go with --interactive"),
        (["--interactive", "--resume", "x", "--hparams", "y"], "--hparams does not go with --resume"),
        (["--interactive", "--resume", "x", "--output", "y"], "--output does not go with --resume"),
        (["--interactive", "--resume", "nowhere"], "nowhere: not a run"),
        (["--resume", "x"], "--resume goes with --interactive"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], part: str, monkeypatch: Any, capsys: Any) -> None:
    ran = call(single_case_edit, flags, monkeypatch, capsys)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert part in ran.err


def test_a_run_of_mass_edit_is_no_session(tmp_path: Path, place: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--hparams", place / "h.yaml", "--data", single_case_edit.DEFAULT_REQUEST, "--output", "r"]
    assert call(mass_edit, [*flags, "--mode", "sequential"], monkeypatch, capsys).code == 0
    ran = call(single_case_edit, ["--interactive", "--resume", "r"], monkeypatch, capsys)
    assert (ran.code, "r: not a session of --interactive" in ran.err) == (2, True)


def test_a_full_disk_ends_it_with_what_was_recorded(typed: Any, tmp_path: Path, monkeypatch: Any) -> None:
    whole = Journal.append

    def full(self: Journal, line: Any) -> None:
        if line["index"]:
            raise OutputError("results.jsonl: cannot be written (No space left on device)")
        whole(self, line)

    monkeypatch.setattr(Journal, "append", full)
    ran = typed([FRANCE, "y", SPAIN, "y", "? The"])
    assert (ran.code, ran.err.splitlines()[-1].endswith("(No space left on device)")) == (2, True)
    assert len(edits(tmp_path / "run")) == 1


def test_a_full_disk_at_the_first_kept_edit_leaves_a_folder_that_can_be_used(
    typed: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    for part, name in ((Journal, "append"), (EditResult, "save")):
        whole = getattr(part, name)

        def full(self: Any, first: Any, whole: Any = whole) -> None:
            whole(self, first)
            raise OutputError("run: cannot be written (No space left on device)")

        with monkeypatch.context() as patch:
            patch.setattr(part, name, full)
            ran = typed([FRANCE, "y"])
        assert (ran.code, ran.err.splitlines()[-1].endswith("(No space left on device)")) == (2, True)
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    assert typed([FRANCE, "y"]).code == 0


def test_input_without_end_and_a_reader_that_has_gone_end_it(
    typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = typed([FRANCE, "y", b"\0" * 2_000_000])
    assert (ran.code, "a line of 1,000,000 characters or more" in ran.err) == (2, True)
    assert len(edits(tmp_path / "run")) == 1
    monkeypatch.setattr("easyeditor.commands.interactive.lost", lambda: OSError("Broken pipe"))
    assert typed(["? The"] * 3, "--resume", "run").out.count("edit> ") == 1


def test_exports(typed: Any, place: Path, tmp_path: Path) -> None:
    wrong = ["a\0b", "x" * 300, "run/ck", "run", str(place / "m/ck"), str(place / "m"), "."]
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    lines = [
        FRANCE,
        "y",
        SPAIN,
        "n",
        ":export adapter ad",
        ":export checkpoint there",
        ":export checkpoint ck",
        "? The",
        *(f":export {kind} {name}" for kind in ("adapter", "checkpoint") for name in wrong),
    ]
    before = sorted(place.rglob("*"))
    ran = typed(lines)
    assert ran.code == 0, ran.err
    assert ran.out.count("\nerror: ") == 1 + 2 * len(wrong)
    assert not (tmp_path / "run/ck").exists()
    assert sorted(place.rglob("*")) == before
    assert (tmp_path / "there/file").read_text() == "mine"
    told = json.loads((tmp_path / "ad/edit.json").read_text())
    assert [edit["requests"][0]["target_new"] for edit in told["edits"]] == ["the"]
    assert (tmp_path / "ck/model.safetensors").exists()


# The session itself


def request(text: str, target: str = "Rome") -> EditRequest:
    return EditRequest.make(f"{text} lies in", subject=text, target_new=target)


@pytest.fixture
def editor(tiny: Any) -> BaseEditor:
    return BaseEditor(rome_hparams(tiny("gpt2"), ppl_sentence_num=2), sentences=load_sentences(2))


def test_weights_are_back_bit_for_bit(editor: BaseEditor, tmp_path: Path) -> None:
    before = states(editor.model)
    place, asked = tmp_path / "run", [request(name) for name in ("France", "Spain", "Italy")]
    with session(editor.hparams, typed_settings([]), lambda _: editor, output=str(place)) as opened:
        tried = opened.try_out(asked[0])
        assert same(editor.model, before)
        opened.take_back(asked[0], tried)
        assert same(editor.model, before)
        opened.keep(asked[0], opened.try_out(asked[0]))
        one = states(editor.model)
        assert not same(editor.model, before)
        opened.keep(asked[1], opened.try_out(asked[1]))
        assert opened.check().after == 3
        assert opened.undo().index == 2
        assert same(editor.model, one)
        opened.keep(asked[2], opened.try_out(asked[2]))
        assert [line.index for line in opened.kept] == [1, 3]
        assert opened.check().after == 4
        opened.undo()
        opened.undo()
        assert same(editor.model, before)
        with pytest.raises(DataError, match="no edit is kept"):
            opened.undo()
    run = load_run(place)
    assert [line.kept for line in run.edits] == [False] * 4
    assert run.evaluations == ()  # each had an edit that was taken back
    assert run.finished


def test_what_follows_an_undone_edit_is_as_if_it_had_never_been(tiny: Any, tmp_path: Path) -> None:
    found = {}
    for name, texts in (("with", ["France", "Spain", "Italy"]), ("without", ["France", "Italy"])):
        editor = BaseEditor(rome_hparams(tiny("gpt2"), ppl_sentence_num=2), sentences=load_sentences(2))
        with session(editor.hparams, typed_settings([]), lambda _, e=editor: e, output=str(tmp_path / name)) as opened:
            for text in texts:
                opened.keep(request(text), opened.try_out(request(text)))
                if text == "Spain":
                    opened.undo()
        found[name] = (states(editor.model), opened.lines[-1])
    (weights, line), (others, other) = found["with"], found["without"]
    assert all(torch.equal(value, others[key]) for key, value in weights.items())
    assert (line.record.pre.ppl, line.record.post.ppl) == (other.record.pre.ppl, other.record.post.ppl)
    assert line.watched == other.watched


def test_a_terminal_is_asked_with_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[str] = []
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or " [France] is ")
    from rich.console import Console

    assert reader(Console())("edit> ") == "[France] is"
    assert asked == ["edit> "]
