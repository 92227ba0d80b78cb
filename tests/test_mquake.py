"""MQuAKE as published: prompts, aliases, hops; what is asked and what is right by hand; files that are not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build, tokenizer
from script_runs import call, save_tiny

from easyeditor import EditRequest, load_hparams
from easyeditor.base.errors import DataError
from easyeditor.base.shots import read_shots
from easyeditor.commands import evaluate as evaluate_command
from easyeditor.commands import mass_edit
from easyeditor.dataset.formats import parse_all
from easyeditor.evaluate.metric import Answers, Settings, Value
from easyeditor.evaluate.registry import GROUPS, METRICS, evaluate
from easyeditor.lm.generate import Decoding, Generated, generate


def edit(subject: str, prompt: str, question: str, target: str, relation: str) -> dict[str, Any]:
    targets = {"target_new": {"str": target, "id": "Q1"}, "target_true": {"str": "Wales", "id": "Q2"}}
    return {"prompt": prompt, "subject": subject, "question": question, "relation_id": relation, **targets}


def hop(question: str, answer: str, *aliases: str) -> dict[str, Any]:
    return {"question": question, "cloze": "", "answer": answer, "answer_alias": list(aliases)}


RECORD = {
    "case_id": 5,
    "requested_rewrite": [
        edit("Bay", "{} lies in", "Where is Bay?", "Italy", "P1"),
        edit("Italy", "The head of {} is", "Who leads Italy?", "Ann", "P2"),
    ],
    "questions": ["Who leads Bay's land?", "Bay's land is led by?", "Bay's leader?"],
    **{"answer": "Eve", "answer_alias": [], "new_answer": "Ann", "new_answer_alias": ["Annie", "", None]},
    "new_single_hops": [hop("Where is Bay?", "Italy", "Italia"), hop("Who leads Italy?", "Ann", "Annie")],
    "orig": {"new_triples": [["Q3", "P1", "Q4"], ["Q4", "P2", "Q5"]]},
}
FILES = {
    "multihop-prompts.txt": "Q: a? A: b\nQ: c? A: d\n\n",
    "multihop-cot-prompts.txt": "Question: a?\nThoughts: x.\nAnswer: b\n",
    "rel-prompts.json": json.dumps({"P1": "Q: e? A: f\n", "P2": "Q: g? A: h"}),
}
PLAIN = [f"Q: a? A: b\nQ: c? A: d\nQ: {question} A:" for question in RECORD["questions"]]
THINK = [f"Question: a?\nThoughts: x.\nAnswer: b\n\nQuestion: {q}\nThoughts:" for q in RECORD["questions"]]
WHERE, WHO = "Q: e? A: f\nQ: Where is Bay? A:", "Q: g? A: h\nQ: Who leads Italy? A:"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def requests(**changes: Any) -> list[EditRequest]:
    return parse_all({**RECORD, **changes}, "here")


# The record


def test_each_edit_has_its_question_and_the_last_the_rest() -> None:
    first, last = requests()
    assert first.multi_hop is not None and last.multi_hop is not None  # noqa: PT018
    assert (first.multi_hop.edit.question, first.multi_hop.edit.answers) == ("Where is Bay?", ("Italy", "Italia"))  # type: ignore[union-attr]
    assert (first.multi_hop.questions, first.multi_hop.answers, first.multi_hop.hops) == ((), (), ())
    assert last.multi_hop.questions == tuple(RECORD["questions"])
    assert last.multi_hop.answers == ("Ann", "Annie")  # what is no text is no alias
    assert [(h.question, h.answers, h.relation) for h in last.multi_hop.hops] == [
        ("Where is Bay?", ("Italy", "Italia"), "P1"),
        ("Who leads Italy?", ("Ann", "Annie"), "P2"),
    ]
    for request in (first, last):
        assert EditRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
        assert parse_all(request.to_json(), "again")[0].multi_hop == request.multi_hop


@pytest.mark.parametrize(
    ("changes", "relations"),
    [
        ({"orig": {}}, ["", ""]),
        ({"orig": {"new_triples": [["Q3", "P1", "Q4"]]}}, ["", ""]),  # of another length: nobody knows which
        ({"new_single_hops": [hop("Where is Bay?", "Italy"), hop("Who?", "")]}, []),  # a hop without an answer
        ({"new_single_hops": None}, []),
    ],
)
def test_a_record_that_lacks_something_is_read_without_it(changes: dict[str, Any], relations: list[str]) -> None:
    last = requests(**changes)[-1]
    assert last.multi_hop is not None
    assert [one.relation for one in last.multi_hop.hops] == relations
    assert last.multi_hop.answers == ("Ann", "Annie")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", "multi_hop must have 'edit', 'questions', 'answers', 'hops'"),
        ({"hops": 3}, "multi_hop must have 'edit', 'questions', 'answers', 'hops'"),
        ({"hops": ["x"]}, "multi_hop.hops must have 'question', 'answers' and 'relation'"),
        ({"edit": {"question": "a?", "answers": []}}, "multi_hop.edit must have a question and at least one answer"),
        ({"edit": {"question": ["a?", "b?"], "answers": "c"}}, "multi_hop.edit must have a question and at least one"),
        ({"questions": ["a?"]}, "multi_hop: 1 questions have no answers"),
        ({"questions": [3], "answers": ["b"]}, "multi_hop.questions must be non-empty texts"),
    ],
)
def test_a_wrong_multi_hop_is_refused_in_one_line(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        parse_all({"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy", "multi_hop": value}, "record 1")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("record 1: ")


# What is asked, and what is right


@pytest.mark.parametrize(
    ("name", "prompts", "texts", "wanted"),
    [
        ("mquake_edit", [WHO], [" Annie."], 1),
        ("mquake_edit", [WHO], [" Ann Lee"], 0),
        ("mquake_hop", [WHERE, WHO], [" ITALIA", " Eve"], 0.5),
        ("mquake_instance", [WHERE, WHO], [" Italia", " Ann"], 1),
        ("mquake_instance", [WHERE, WHO], [" Italia", ""], 0),
        ("mquake_multi_hop", PLAIN, [" Eve", " Bob", " the Ann"], 1),
        ("mquake_multi_hop", PLAIN, [" Eve", " Bob", " It is Ann"], 0),
        ("mquake_multi_hop_cot", THINK, [" Ann", " Ann.\nAnswer: Eve", " Bay is in Italy.\nAnswer: Annie\nok"], 1),
        ("mquake_multi_hop_cot", THINK, [" Ann", " x.\nAnswer: Eve\nAnswer: Ann", ""], 0),
    ],
)
def test_metrics_by_hand(place: Path, name: str, prompts: list[str], texts: list[str], wanted: float) -> None:
    request, metric = requests()[-1], METRICS[name]
    settings = Settings(shots=read_shots(str(place)), max_new_tokens=3, stops=("period",))  # the protocol's own count
    asks = metric.asks(request, settings)
    cot = (
        Decoding(tokens=200, stops=("paragraph",)) if name.endswith("cot") else Decoding(tokens=50, stops=("newline",))
    )
    assert asks == [(prompt, cot) for prompt in prompts]
    made = {a: Generated(text=t, whole=a[0] + t, stop="newline", tokens=2) for a, t in zip(asks, texts, strict=True)}
    found = metric.value(request, Answers(settings=settings, generated=made))  # type: ignore[misc]
    assert found.value == wanted
    assert [one["text"] for one in found.details["generated"]] == texts
    assert all(one["prompt"] in prompt for one, prompt in zip(found.details["generated"], prompts, strict=True))


def test_what_cannot_be_had_is_null_with_its_reason(place: Path) -> None:
    """No files; no demonstrations for a relation; a record of another kind; an edit that is not its record's last."""

    def reasons(request: EditRequest, settings: Settings) -> set[str | None]:
        row = evaluate(build("llama"), tokenizer(), [request], ["mquake"], settings=settings).rows[0]
        assert all(value.value is None for value in row.values() if value.reason)
        return {value.reason for value in row.values()} - {None}

    (first, last), given = requests(), Settings(shots=read_shots(str(place)))
    other = EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
    assert reasons(last, Settings()) == {"needs MQuAKE's prompt files (mquake_prompts, --mquake-prompts)"}
    assert {str(reason).partition("(")[0].strip() for reason in reasons(other, given)} == {
        "the record has no question about the edit",
        "the record has no single hops",
        "the record has no questions of several steps",
    }
    assert len(reasons(first, given)) == 2  # its own question is asked
    assert last.multi_hop is not None
    strange = replace(last, multi_hop=replace(last.multi_hop, hops=(replace(last.multi_hop.hops[0], relation="P9"),)))
    found = METRICS["mquake_hop"].value(strange, Answers(settings=given))  # type: ignore[misc]
    assert found == Value(value=None, reason="the prompt files have no demonstrations for a relation of the record")


def test_a_models_own_texts_are_judged_whatever_else_is_in_the_batch(place: Path) -> None:
    """Two records together and alone; the texts are those of plain generation."""
    lm, tok = build("llama", max_position_embeddings=1024), tokenizer()
    settings = Settings(shots=read_shots(str(place)))
    listed = [*requests(), *requests(case_id=6, questions=["Who?"])]
    together = evaluate(lm, tok, listed, ["mquake"], settings=settings)
    for n, request in enumerate(listed):
        assert evaluate(lm, tok, [request], ["mquake"], settings=settings).row(0) == together.row(n)
    texts = generate(lm, tok, THINK, Decoding(tokens=200, stops=("paragraph",)))
    found = together.rows[1]["mquake_multi_hop_cot"]
    assert [one["text"] for one in found.details["generated"]] == [one.text for one in texts]
    assert {name for name, value in together.rows[1].items() if value.value is not None} == {
        metric.name for metric in GROUPS["mquake"]
    }


# Files and commands


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("multihop-prompts.txt", None, "no such file; mquake_prompts is a folder of MQuAKE's prompt files"),
        ("multihop-cot-prompts.txt", " \n", "is empty; it must hold questions with their answers"),
        ("multihop-prompts.txt", "<!DOCTYPE html>", "it is an HTML page"),
        ("rel-prompts.json", None, "no such file"),
        ("rel-prompts.json", "[", "not readable as JSON"),
        ("rel-prompts.json", '["a"]', "must be an object of texts"),
        ("rel-prompts.json", '{"P1": 3}', "must be an object of texts"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(
    place: Path,
    name: str,
    text: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before a model is loaded, by a dry run and by the evaluation too."""
    monkeypatch.chdir(place)
    (place / name).unlink()
    if text is not None:
        (place / name).write_text(text, encoding="utf-8")
    Path("two.json").write_text(json.dumps([RECORD]), encoding="utf-8")
    Path("ice.yaml").write_text(yaml.safe_dump({"alg_name": "ICE", "model_name": "none", "mquake_prompts": "."}))
    for command, flags in (
        (mass_edit, ["--hparams", "ice.yaml", "--data", "two.json", "--dry-run"]),
        (evaluate_command, ["--model", "none", "--data", "two.json", "--metrics", "mquake", "--mquake-prompts", "."]),
    ):
        ran = call(command, flags, monkeypatch, capsys)
        assert ran.code == 2, ran.out
        (line,) = [one for one in ran.err.splitlines() if one.startswith("error: ")]
        assert name in line
        assert said in line
    with pytest.raises(DataError, match=name):
        load_hparams({"alg_name": "ICE", "model_name": "none", "mquake_prompts": str(place)}).check_files()


def test_a_run_measures_it_and_goes_on_with_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All edits of a record are in the model when its questions are asked; a run that was cut goes on the same."""
    monkeypatch.chdir(place)
    save_tiny(place / "llama")
    (place / "shots").mkdir()
    for name in FILES:
        shutil.move(name, place / "shots" / name)
    Path("two.json").write_text(json.dumps([RECORD, {**RECORD, "case_id": 6}]), encoding="utf-8")
    layer = {"layers": [1], "num_steps": 1, "lr": 1e-3, "ppl_sentence_num": 0, "device": "cpu"}
    Path("ft.yaml").write_text(yaml.safe_dump({"alg_name": "FT", "model_name": "llama", **layer}), encoding="utf-8")
    names = ["mquake_edit", "mquake_instance", "mquake_multi_hop"]
    flags = ["--hparams", "ft.yaml", "--data", "two.json", "--limit", 1, "--mode", "batch", "--batch-size", 2]
    flags += ["--metrics", ",".join(names), "--set", "mquake_prompts=shots", "--output", "run"]
    ran = call(mass_edit, flags, monkeypatch, capsys)
    assert ran.code == 0, ran.err
    assert all(name in ran.out for name in names)
    shutil.copytree("run", "again")
    whole = Path("run/results.jsonl").read_bytes().splitlines(keepends=True)
    Path("again/results.jsonl").write_bytes(b"".join(whole[:1]))
    ran = call(mass_edit, ["--resume", "again"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    found = [
        [
            line["metrics"]
            for line in map(json.loads, Path(folder, "results.jsonl").read_text().splitlines())
            if "metrics" in line
        ]
        for folder in ("run", "again")
    ]
    assert found[0] == found[1]
    assert set(names) <= json.loads(Path("run/summary.json").read_text())["metrics"].keys()
