"""The datasets of the field, by records of their layout: what becomes of each field; samples; files on the hub."""

from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from easyeditor.base.errors import DataError
from easyeditor.commands.dataset import main
from easyeditor.dataset.columns import requests_from_columns
from easyeditor.dataset.formats import parse, parse_all, read_request
from easyeditor.dataset.reader import read_dataset, read_sample
from easyeditor.values.request import Probe

BAY = {"subject": "Bay", "prompt": "The country of Bay is", "target_new": "Italy"}
WIKI = {  # KnowEdit's wiki_recent: lists of probes, each with lists of answers, each a list of names
    **BAY,
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Bay in Asia?", "ground_truth": [["no"], ["false"]]}],
        "Reasoning": [
            {"prompt": "The capital of Bay's country is", "ground_truth": [["Rome", "Roma"]]},
            {"prompt": "The king of Bay's country is", "ground_truth": [[]]},
        ],
        "Subject_Aliasing": [],
    },
    "locality": {"Relation_Specificity": [{"prompt": "Bay is a", "ground_truth": [["city"]]}]},
}
WIKI_COUNTERFACT = {  # answers as plain texts, and two kinds of locality
    **{**BAY, "ground_truth": "Wales"},
    "portability": {"Subject_Aliasing": [{"prompt": "The country of the Bay is", "ground_truth": "Italy"}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "Bay is a", "ground_truth": "city"}],
        "Forgetfulness": [{"prompt": "The country of Bay, which is not Italy, is", "ground_truth": "Wales"}],
    },
}
KNOWEDIT_ZSRE = {
    **{**BAY, "prompt": "Where is Bay?", "ground_truth": ["Wales"], "rephrase_prompt": "Bay is where?"},
    "cond": "Wales >> Italy || Where is Bay?",
    "locality": {"Relation_Specificity": [{"prompt": "Bay is a", "ground_truth": ["city"]}]},
    "portability": {"Reasoning": [{"prompt": "What do they speak in Bay?", "ground_truth": "Italian"}]},
}
WIKIBIO = {
    **{"text": "This is a passage about bay. Bay was a poet.", "labels": "He wrote of the sea.", "concept": "bay"},
    "locality": {"Relation_Specificity": [{"prompt": "bay worked as", "ground_truth": ["poet"]}]},
}
WIKIBIGEDIT = {
    **{"tag": "new", "subject": "Bay", "update": "Where is Bay?", "ans": "Italy", "rephrase": "Bay is where?"},
    **{"personas": "Ahoy, where be Bay?", "mhop": "What do they speak in Bay?", "mhop_ans": "Italian"},
    **{"loc": "a b", "loc_ans": "c"},
}
QAEDIT = {
    **{"id": 1104, "source": "NQ", "prompt": "Where is Bay?", "target": "Italy", "subject": "Bay"},
    **{"rephrase": "Bay is where?", "locality": [{"loc": "a b", "loc_ans": "c"}]},
}
EDIT = {
    **{"prompt": "{} is a citizen of", "subject": "Bay", "relation_id": "P27", "question": "Whose citizen is Bay?"},
    **{"target_new": {"str": "Italy", "id": "Q38"}, "target_true": {"str": "Wales", "id": "Q25"}},
}
SECOND = {
    **{"prompt": "The capital of {} is", "subject": "Italy", "relation_id": "P36", "question": "What is its capital?"},
    **{"target_new": {"str": "Oslo", "id": "Q585"}, "target_true": {"str": "Rome", "id": "Q220"}},
}
MQUAKE = {
    **{"case_id": 5, "requested_rewrite": [EDIT], "questions": ["What is the capital of Bay's country?", "And where?"]},
    **{"answer": "Cardiff", "answer_alias": [], "new_answer": "Rome", "new_answer_alias": ["Roma"], "single_hops": []},
}


def remastered(edit: dict[str, Any]) -> dict[str, Any]:
    """An edit as the Remastered files have it: the targets are no objects."""
    flat = {f"{key}_{part}": edit[key][part] for key in ("target_new", "target_true") for part in ("str", "id")}
    return {**{key: value for key, value in edit.items() if not key.startswith("target")}, **flat}


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def probe(*pairs: tuple[str, str]) -> Probe:
    return Probe(prompts=tuple(p for p, _ in pairs), answers=tuple(a for _, a in pairs))


def test_knowedit_s_lists_become_probes_with_the_first_of_their_answers() -> None:
    request = parse(WIKI, "here")
    assert request.portability == {
        "Logical_Generalization": probe(("Is Bay in Asia?", "no")),
        "Reasoning": probe(("The capital of Bay's country is", "Rome")),
    }
    assert request.locality == {"Relation_Specificity": probe(("Bay is a", "city"))}
    assert (request.ground_truth, request.rephrase_prompts) == (None, ())


def test_knowedit_s_other_layouts(tmp_path: Path) -> None:
    counterfact, zsre, bio = (parse(record, "here") for record in (WIKI_COUNTERFACT, KNOWEDIT_ZSRE, WIKIBIO))
    assert set(counterfact.locality) == {"Relation_Specificity", "Forgetfulness"}
    assert counterfact.portability == {"Subject_Aliasing": probe(("The country of the Bay is", "Italy"))}
    assert (zsre.ground_truth, zsre.rephrase_prompts) == ("Wales", ("Bay is where?",))
    assert zsre.portability == {"Reasoning": probe(("What do they speak in Bay?", "Italian"))}
    assert (bio.prompt, bio.subject, bio.target_new) == (WIKIBIO["text"], "bay", WIKIBIO["labels"])
    assert bio.subject_start == WIKIBIO["text"].index("bay.")
    assert bio.locality == {"Relation_Specificity": probe(("bay worked as", "poet"))}
    for name, record in (("flat", WIKI), ("flat", KNOWEDIT_ZSRE), ("wikibio", WIKIBIO)):
        found = read_dataset(write(tmp_path / "a.json", [record, record]))
        assert (found.format, [r.case_id for r in found.requests]) == (name, [0, 1])


@pytest.mark.parametrize("layout", [lambda edit: edit, remastered], ids=["original", "remastered"])
def test_mquake_with_one_edit_asks_its_questions_of_it(layout: Any) -> None:
    request = parse({**MQUAKE, "requested_rewrite": [layout(EDIT)]}, "here")
    assert (request.prompt, request.target_new, request.ground_truth) == ("Bay is a citizen of", "Italy", "Wales")
    assert (request.case_id, request.rephrase_prompts) == (5, ("Whose citizen is Bay?",))
    asked = [(question, "Rome") for question in MQUAKE["questions"]]
    assert request.portability == {"multi_hop": probe(*asked)}


def test_mquake_with_several_edits_asks_after_the_last(tmp_path: Path) -> None:
    record = {**MQUAKE, "requested_rewrite": [EDIT, SECOND], "new_answer": "Oslo"}
    first, last = parse_all(record, "here")
    assert (first.case_id, last.case_id) == ("5-1", "5-2")
    assert (first.portability, list(last.portability)) == ({}, ["multi_hop_2_edits"])
    assert set(last.portability["multi_hop_2_edits"].answers) == {"Oslo"}
    with pytest.raises(DataError, match="here: holds 2 edits; only a dataset"):
        parse(record, "here")
    found = read_dataset(write(tmp_path / "a.json", [record, {**MQUAKE, "case_id": 6}]))
    assert (found.format, [r.case_id for r in found.requests]) == ("mquake", ["5-1", "5-2", 6])
    with pytest.raises(DataError, match="record 0: requested_rewrite is empty"):
        read_dataset(write(tmp_path / "a.json", [{**MQUAKE, "requested_rewrite": []}]))


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({**WIKI, "portability": [1]}, "portability must be a mapping of names to prompts and answers, found list"),
        ({**WIKI, "locality": {"a": [{"prompt": "b"}]}}, "locality.a must have 'prompt' and 'ground_truth', found"),
        ({**WIKI, "locality": {"a": [5]}}, "locality.a must have 'prompt' and 'ground_truth', found 5"),
        ({**WIKI, "locality": {"a": {"prompt": ["b", "c"], "ground_truth": ["d"]}}}, "2 prompts but 1 ground truths"),
        ({**WIKIBIO, "labels": []}, "target_new must be text, found NoneType"),
        ({**WIKIBIGEDIT, "mhop_ans": {"a": "b"}}, "portability.mhop"),
        ({**QAEDIT, "locality": [{"loc": "a"}]}, "locality must have 'prompt' and 'ground_truth', found {'loc': 'a'}"),
        ({**MQUAKE, "requested_rewrite": [{"prompt": "a"}]}, "malformed mquake record"),
        ({**MQUAKE, "requested_rewrite": 5}, "malformed mquake record"),
        ({**MQUAKE, "questions": None}, "malformed mquake record"),
    ],
)
def test_a_record_that_is_not_of_its_layout_is_one_line(record: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{part}") as caught:
        parse_all(record, "here")
    assert "\n" not in str(caught.value)


# Layouts of the field, and variants of them


ASKED, NEAR = {"one_hop": probe(("Bay is a", "city"))}, {"neighborhood": probe(("a b", "c"))}
WHERE, SAME = {"prompt": "Where is Bay?", "subject": "Bay"}, "Bay is where?"
HALLU = {
    **{"topic": "city", "subject": "Bay", "relation": "country", "object": "Italy", "question": "Where is Bay?"},
    **{"paraphrased_question": "Bay is where?", "locality_question": "How large is Bay?"},
    **{"multiple_choice_with_letters": "A. Italy  B. Wales", "multiple_choice_labels": "A"},
    **{"yes_question": "Is Bay in Italy?", "reversed_relation_question": "What is in Italy?"},
    **{"question_2hop": "What do they speak in Bay?", "answer_2hop": "Italian", "question_3hop": "", "answer_3hop": ""},
}


PROBED: dict[str, tuple[dict[str, Any], str | None, Any, Any]] = {
    "zsre with portability": (  # EasyEdit's zsre_mend_eval_portability_gpt4.json
        {
            **{"src": "Where is Bay?", "alt": "Italy", "subject": "Bay", "rephrase": SAME, "loc_ans": "c"},
            **{"pred": "", "answers": ["Wales"], "cond": "Wales >> Italy || Where is Bay?"},
            **{"loc": "nq question: a b", "portability": {"New Question": "Bay is a", "New Answer": "city"}},
        },
        *(SAME, NEAR, ASKED),
    ),
    "cknowedit": (
        {
            **{**WHERE, "target_old": "Wales", "target_new": "Italy", "rephrase": [SAME, ""]},
            "portability": [{"prompt": "Bay is a", "answer": "city"}],
            "locality": [{"prompt": "a b", "answer": "c"}, {}, {"prompt": "d", "answer": ""}],
        },
        *(SAME, NEAR, ASKED),
    ),
    "hallueditbench": (
        HALLU,
        *(SAME, {}),
        {
            "yes": probe(("Is Bay in Italy?", "Yes")),
            "reversed_relation": probe(("What is in Italy?", "Bay")),
            "2hop": probe(("What do they speak in Bay?", "Italian")),
            "multiple_choice": probe(("Where is Bay? A. Italy  B. Wales", "A")),
        },
    ),
    "wikibigedit": (
        WIKIBIGEDIT,
        *(SAME, NEAR),
        {
            "personas": probe(("Ahoy, where be Bay?", "Italy")),
            "mhop": probe(("What do they speak in Bay?", "Italian")),
        },
    ),
    "wikibigedit, as pandas writes it": (
        {
            **{"subject": "Bay", "update": "Where is Bay?", "ans": "Italy", "mhop": None, "loc": ""},
            **{"personas": float("nan"), "rephrase": float("nan")},
        },
        *(None, {}, {}),
    ),
    "qaedit": (QAEDIT, SAME, NEAR, {}),
    "qaedit, not rephrased": ({**QAEDIT, "rephrase": ""}, None, NEAR, {}),
    "ultraedit": (
        {"src": "Where is Bay?", "ans": "Italy", "subject": "Bay", "loc": "a b", "loc_ans": ["c", "d"]},
        *(None, NEAR, {}),
    ),
    "ultraeditbench": (
        {**WHERE, "ans": "Italy", "loc": "a b", "loc_ans": "c", "rephrase_prompt": SAME},
        SAME,
        NEAR,
        {},
    ),
    "fever": (
        {**WHERE, "alt": "Italy", "equiv_prompt": [SAME], "unrel_prompt": "a b", "unrel_ans": "c"},
        SAME,
        NEAR,
        {},
    ),
    "wise's temporal": (
        {**WHERE, "target_new": "Italy", "ood_rephrase": SAME, "locality_prompt": "a b", "locality_ground_truth": "c"},
        *(SAME, NEAR, {}),
    ),
    "rome's notebook": (  # and probes of other layouts in a flat record
        {
            **{"prompt": ["Where is {}?"], "subject": ["Bay"], "target_new": {"str": "Italy"}},
            **{"target_true": {"str": "Wales"}, "loc": "a b", "loc_ans": 7, "rephrased_prompt": SAME},
            "portability": {"prompt": ["Bay is a", "e"], "ground_truth": [["city", "town"], None]},
        },
        *(SAME, {"neighborhood": probe(("a b", "7"))}, ASKED),
    ),
    "unke": (
        {
            **{"question": "Where is Bay?", "answer": ["", "Italy"], "subject": "Bay", "locality": float("nan")},
            **{"para_question": SAME, "sub_question": ["Bay is a"], "sub_answer": ["city"]},
            "locality_inputs": {"near": {"prompt": "a b", "ground_truth": [["c"]]}, "far": None},
        },
        *(SAME, {"near": NEAR["neighborhood"]}, {"sub_question": ASKED["one_hop"]}),
    ),
    "leme": (
        {
            **{**WHERE, "target_new": "Italy", "locality": "a b", "locality_ans": "c"},
            **{"portability": "Bay is a", "portability_ans": "city"},
        },
        *(None, NEAR, ASKED),
    ),
}


@pytest.mark.parametrize("name", PROBED)
def test_probes_under_every_name(name: str) -> None:
    record, rephrase, locality, portability = PROBED[name]
    request = parse(record, "here", 9)
    assert (request.prompt, request.subject, request.target_new) == ("Where is Bay?", "Bay", "Italy")
    truth = "Wales" if {"target_old", "target_true", "answers"} & record.keys() else None
    assert (request.case_id, request.ground_truth) == (record.get("id", 9), truth)
    assert request.rephrase_prompts == (() if rephrase is None else (rephrase,))
    assert (request.locality, request.portability) == (locality, portability)


def test_what_akew_and_cknowedit_add_is_read_or_named(tmp_path: Path) -> None:
    edit = {**EDIT, "question": "Whose citizen is Bay?", "fact_new_uns": "Bay lives in Italy."}
    akew = {"requested_rewrite": edit, "paraphrase_prompts": ["Bay holds a passport of"]}
    found = read_dataset(write(tmp_path / "a.json", [akew, {**akew, "requested_rewrite": [edit, SECOND]}]))
    assert found.requests[0].rephrase_prompts == ("Bay holds a passport of", "Whose citizen is Bay?")
    assert found.requests[1].rephrase_prompts == ("Whose citizen is Bay?",)
    assert (len(found.requests), found.requests[2].portability) == (3, {})
    assert "requested_rewrite.fact_new_uns" in found.unread
    lists = {f"{kind}_{part}": ["b"] for kind in ("locality", "portability") for part in ("prompt", "answer")}
    (request,) = read_dataset(write(tmp_path / "b.json", [{**flat("Bay"), **lists}])).requests
    twice = probe(("b", "b"))
    assert (request.locality, request.portability) == ({"neighborhood": twice}, {"one_hop": twice})


@pytest.mark.parametrize("nothing", ["", " ", None, float("nan"), [], [""], [[]], [None]])
def test_a_probe_without_an_answer_is_left_out_and_counted(
    nothing: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    near = {"a": {"prompt": ["b", "c"], "ground_truth": [nothing, "d"]}}
    cases = {
        "rephrase 1, locality a 1": {**flat("Bay"), "locality": near, "rephrase_prompt": ["e", ""]},
        "portability a 1": {**flat("Bay"), "portability": {"a": [{"prompt": "b", "ground_truth": nothing}]}},
        "locality neighborhood 1": {**flat("Bay"), "locality_prompt": "b", "locality_ground_truth": nothing},
        "locality neighborhood 1 ": {
            "src": "Bay is in",
            "alt": "Italy",
            "subject": "Bay",
            "loc": "b",
            "loc_ans": nothing,
        },
        "portability mhop 1": {**WIKIBIGEDIT, "mhop_ans": nothing},
        "locality neighborhood 1  ": {**QAEDIT, "locality": [{"loc": "b", "loc_ans": nothing}]},
        "locality a 1": {**WIKIBIO, "locality": {"a": [{"prompt": "b", "ground_truth": nothing}]}},
    }
    for names, record in cases.items():
        caplog.clear()
        found = read_dataset(write(tmp_path / "a.json", [record]))
        (line,) = caplog.messages
        assert line.endswith(f": probes left out, for they have no answer: {names.strip()}")
        assert sum(found.to_json()["left_out"].values()) == names.count("1")
    assert parse(cases["rephrase 1, locality a 1"], "here").locality == {"a": probe(("c", "d"))}
    caplog.clear()
    near = {"a": {"prompt": ["b"], "ground_truth": [nothing]}}
    (request,) = requests_from_columns("Bay is in", "Italy", None, None, near, None, "Bay")
    assert request.locality == {}
    assert caplog.messages == ["edit(): probes left out, for they have no answer: locality a 1"]


def test_one_request_says_what_of_it_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    near = {"near": {"prompt": "a", "ground_truth": ""}}
    path = Path(write(tmp_path / "r.json", {**flat("Bay"), "rephrase_promt": "Bay?", "locality": near}))
    assert read_request(path).rephrase_prompts == ()
    (line,) = caplog.messages
    assert line.endswith(
        "r.json: fields not read: rephrase_promt; probes left out, for they have no answer: locality near 1"
    )


@pytest.mark.parametrize("name", ["columns", "indexed", "by name", "wrapped", "csv", "tsv", "parquet"])
def test_other_ways_to_write_the_records(name: str, tmp_path: Path) -> None:
    records = [{**flat(city), "note": "a, b"} for city in ("Bay", "Rome")]
    columns = {key: [record[key] for record in records] for key in records[0]}
    whole = {
        "columns": columns,
        "indexed": {key: dict(enumerate(column)) for key, column in columns.items()},
        "by name": dict(enumerate(records)),
        "wrapped": {"data": records},
    }
    path = tmp_path / f"a.{name if name not in whole else 'json'}"
    if name in whole:
        write(path, whole[name])
    elif name == "parquet":
        datasets.Dataset.from_list(records).to_parquet(str(path))
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as sink:
            writer = csv.DictWriter(sink, list(columns), delimiter="," if name == "csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    found = read_dataset(str(path))
    assert [(r.subject, r.target_new, r.case_id) for r in found.requests] == [("Bay", "Italy", 0), ("Rome", "Italy", 1)]
    assert found.unread == ("note",)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("a.csv", "prompt,subject,target_new\nBay is in,Bay,Italy,more\n", "record 0: line 2 has more cells than the"),
        ("a.csv", 'prompt,subject,target_new\nBay is in,"Bay,Italy\n', "record 0: not CSV after line 1"),
        ("a.csv", "prompt,subject,target_new\nBay is in,,Italy\n", "record 0: request 0: subject is empty"),
        ("a.csv", "a,b\n1,2\n", r"record 0: record with fields \['a', 'b'\] is of no known format"),
        ("a.parquet", "PAR1", "not readable as Parquet"),
        ("a.json", "<!DOCTYPE html><html>", "it is an HTML page"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid", "this is a Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_data_is_refused(file: str, content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=part) as caught:
        read_dataset(str(tmp_path / file))
    assert "\n" not in str(caught.value)


# Subjects that are not in their prompt


def absent(number: int) -> dict[str, Any]:
    return {"case_id": f"c{number}", "src": "Which line is it?", "alt": "Italy", "subject": f"D&RGW {number}"}


def test_absent_subjects_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = {"src": "Where is Bay?", "alt": "Italy", "subject": "Bay"}
    path = write(tmp_path / "zsre.json", [there, absent(463), there, absent(7)])
    told = r"zsre\.json: 2 records have no place for their subject in their prompt; the first: record 1: request 'c463'"
    with pytest.raises(DataError, match=rf"{told}.*'D&RGW 463' is not in the prompt.*--skip-bad leaves such"):
        read_dataset(path)
    with caplog.at_level(logging.WARNING):
        found = read_dataset(path, skip_bad=True)
    assert ([r.case_id for r in found.requests], [b.number for b in found.bad]) == ([0, 2], [1, 3])
    (line,) = caplog.messages
    assert "2 records have no place" in line
    assert line.endswith("; left out")
    with pytest.raises(DataError, match=r"1 record has no place for its subject in its prompt: record 1: request 'c7'"):
        read_dataset(write(tmp_path / "one.json", [there, absent(7)]))


def test_other_bad_records_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = {"src": "Where is Bay?", "alt": "Italy", "subject": "Bay"}
    path = write(tmp_path / "zsre.json", [there, {**there, "alt": ""}, {**there, "alt": True}])
    with caplog.at_level(logging.WARNING):
        assert len(read_dataset(path, skip_bad=True).requests) == 1
    (line,) = caplog.messages
    assert "bad records left out: 2; the first: record 1: " in line
    with pytest.raises(DataError, match="record 1: a record must be a JSON object"):
        read_dataset(write(tmp_path / "a.json", [absent(1), 5, absent(2)]))


# Samples


def flat(subject: str) -> dict[str, Any]:
    return {"prompt": f"{subject} is in", "subject": subject, "target_new": "Italy"}


def test_a_sample_takes_its_records_in_its_order(tmp_path: Path) -> None:
    data = write(tmp_path / "a.json", [flat("A"), flat("B"), {"bad": 1}, flat("C")])
    by_name = write(tmp_path / "by_name.json", {"0": [3, 0], "1": [1]})
    assert read_sample(write(tmp_path / "plain.json", [1])) == [1]
    found = read_dataset(data, sample=by_name)
    assert [(r.case_id, r.subject) for r in found.requests] == [(3, "C"), (0, "A")]
    assert [r.subject for r in read_dataset(data, sample=f"{by_name}:1").requests] == ["B"]
    other = write(tmp_path / "other.json", [0, 3])
    assert len({read_dataset(data, sample=s).sha256 for s in (by_name, f"{by_name}:1", other)}) == 3


@pytest.mark.parametrize(
    ("content", "name", "part"),
    [
        ({"0": [1]}, ":7", "has no sample '7'; there are: 0"),
        ([1], ":7", "holds no samples by name, so there is none called '7'"),
        ({}, "", "must be a list of record numbers"),
        ([], "", "must be a list of record numbers"),
        ([-1], "", "must be a list of record numbers"),
        ([True], "", "must be a list of record numbers"),
        ({"0": 5}, "", "must be a list of record numbers"),
        ([1, 0, 1], "", "takes each record once; 1 is in it again"),
        ([2], "", r"asks for record 2, but .*a\.json has 2 records"),
    ],
)
def test_a_sample_that_is_none_is_one_line(tmp_path: Path, content: Any, name: str, part: str) -> None:
    data = write(tmp_path / "a.json", [flat("A"), flat("B")])
    with pytest.raises(DataError, match=part):
        read_dataset(data, sample=write(tmp_path / "s.json", content) + name)
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        read_dataset(data, sample=str(tmp_path / "none.json"))


# Files on the hub


def test_one_file_of_a_dataset_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(name: str, file: str, *, repo_type: str) -> str:
        asked.append((name, file, repo_type))
        return write(tmp_path / "fetched.json", [WIKI])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    found = read_dataset("zjunlp/KnowEdit:benchmark/wiki_recent/recent_test.json")
    assert asked == [("zjunlp/KnowEdit", "benchmark/wiki_recent/recent_test.json", "dataset")]
    assert (found.source, len(found.requests)) == ("zjunlp/KnowEdit:benchmark/wiki_recent/recent_test.json", 1)


@pytest.mark.parametrize("source", ["zjunlp/KnowEdit:a/b.json", "zjunlp/KnowEdit:train", "lukasthede/WikiBigEdit"])
def test_without_a_connection_it_is_one_line(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DataError, match=rf"^{source}: neither a file .*\(\w+: ") as caught:
        read_dataset(source)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        read_dataset("data/nowhere.json")


# python -m easyeditor.dataset


def test_the_command_says_what_files_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    near = {"locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["c", ""]}}}
    records = [{**flat("A"), **near, "cond": 1}, {**flat("B"), "target_new": ""}, {**flat("C"), "target_new": ""}]
    write(tmp_path / "b.json", [*records, {**flat("D"), "subject": "E"}, {"f|g": 1}])
    write(tmp_path / "a.json", {"layers": [1]})
    (tmp_path / "notes.txt").write_text("none", encoding="utf-8")
    wanted = ["flat", "5", "2", "locality near 1", "locality near 1", "cond", "1"]

    def said(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dataset", *flags])
        code = main()
        return code, capsys.readouterr().out

    code, text = said(str(tmp_path))
    assert (code, re.findall(r"^/.*/(.*)$", text, re.MULTILINE)) == (2, ["a.json", "b.json"])
    names = ("format", "records", "read", "probes", "left out", "fields", "without")
    for line, value in zip(names, wanted, strict=True):
        assert re.search(rf"^  {line}[\w ]*: {value}$", text, re.MULTILINE)
    said_so = "refused: 2 × target_new is empty; give it at least one visible character (first: record 1); 1 × record"
    assert said_so in text
    code, text = said("--table", str(tmp_path / "b.json"))
    assert code == 0
    head, line, row = ([cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in text.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells | {"records": "5", "read": "2", "fields not read": "cond"} == cells
    assert set(line) == {"---"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in it"):
        said(str(tmp_path / "empty"))
