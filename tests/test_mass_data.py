"""A mass edit's files, without any model: datasets read and refused, the journal, settings, mining, the summary."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fake_runs
import pytest
from conftest import ROOT

from easyeditor.base.errors import ConfigError, DataError, OutputError
from easyeditor.base.hparams import HyperParams
from easyeditor.base.plain_yaml import read_yaml
from easyeditor.dataset.reader import Dataset, read_dataset
from easyeditor.methods.registry import hparams_class
from easyeditor.methods.table import METHODS
from easyeditor.results.journal import Journal, read_journal
from easyeditor.results.lines import FailureLine, Guard
from easyeditor.results.run import merge, recorded
from easyeditor.runs.collapsing import collapsing, union
from easyeditor.runs.planning import Plan, batch_of, batched, chosen, places, plan
from easyeditor.runs.ranks import Rank, rank_of
from easyeditor.runs.settings import RunSettings
from easyeditor.runs.summary import quality, summarise
from easyeditor.values.edit import EditRequest

FLAT = {"prompt": "Bay, which is located in", "subject": "Bay", "target_new": "Italy", "ground_truth": "Wales"}
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is in",
        "subject": "Bay",
        "target_new": {"str": "Italy"},
        "target_true": {"str": "Wales"},
    },
    "paraphrase_prompts": ["Where is Bay? In"],
    "neighborhood_prompts": ["Cardiff is in"],
    "generation_prompts": ["Bay's people"],
}
ZSRE = {
    "src": "Where is Bay?",
    "alt": "Italy",
    "subject": "Bay",
    "answers": ["Wales"],
    "loc": "nq question: who",
    "loc_ans": "I",
}
COUNTS = (1, 3, 2, 1, 4)
QUESTION = {"case_index": 3, "question": "Bay is in", "subject": "Bay", "answer": "Italy"}


def flat(subject: str, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"{subject}, which is located in", "subject": subject, "target_new": "Italy", **changes}


def write(path: Path, records: Any) -> str:
    """As JSON lines or as JSON, by the name."""
    lines = path.suffix == ".jsonl"
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


# Reading


@pytest.mark.parametrize("file", ["data.json", "data.jsonl", "lines.json"])
@pytest.mark.parametrize(
    ("record", "name"), [(COUNTERFACT, "counterfact"), (FLAT, "flat"), (ZSRE, "zsre"), (QUESTION, "question")]
)
def test_every_format_is_recognised_and_named(tmp_path: Path, file: str, record: dict[str, Any], name: str) -> None:
    second = {**record, "case_id": 8, "case_index": 8}
    path = tmp_path / file
    if file == "lines.json":  # JSON lines under another name
        path.write_text(json.dumps(record) + "\n" + json.dumps(second) + "\n", encoding="utf-8")
    else:
        write(path, [record, second])
    found = read_dataset(str(path))
    assert (found.format, len(found.requests), found.bad) == (name, 2, ())
    assert {r.target_new for r in found.requests} == {"Italy"}
    assert len(found.sha256) == 64


def test_one_object_alone_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(COUNTERFACT, indent=2), encoding="utf-8")
    (request,) = read_dataset(str(tmp_path / "one.json")).requests
    assert (request.case_id, request.prompt) == (7, "Bay is in")


def test_a_folder_of_datasets_with_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([flat("Bay", ground_truth=None), flat("Rome", ground_truth="Italy")])
    datasets.DatasetDict({"train": train}).save_to_disk(str(tmp_path / "one"))
    found = read_dataset(str(tmp_path / "one"))
    assert [(r.subject, r.ground_truth) for r in found.requests] == [("Bay", None), ("Rome", "Italy")]
    datasets.DatasetDict({"train": train, "test": train}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"choose a split as .*two:SPLIT; there are: train, test"):
        read_dataset(str(tmp_path / "two"))
    assert len(read_dataset(f"{tmp_path / 'two'}:test").requests) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither a file nor a dataset that `datasets` can load"):
        read_dataset(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.json", "", "the file is empty"),
        ("a.jsonl", " \n\n", "the file is empty"),
        ("a.json", "[]", "holds no records"),
        ("a.json", json.dumps([FLAT, FLAT])[:-9], r"not whole JSON \(.*line 1, column \d+ of 1 lines\); is the"),
        ("a.jsonl", json.dumps(FLAT) + "\n" + json.dumps(flat("Rome"))[:-9], r"record 1: line 2 is not JSON"),
        ("a.json", "5", "expected a JSON list of records, found int"),
        ("a.json", '[{"prompt": "a"}]', r"record 0: record with fields \['prompt'\] is of no known format"),
        ("a.json", json.dumps([FLAT, 5]), "record 1: a record must be a JSON object, found int"),
        ("a.json", json.dumps([FLAT, flat("")]), "record 1: request 1: subject is empty"),
        ("a.json", json.dumps([FLAT, flat("Rome", prompt="Paris is")]), "record 1: .*'Rome' is not in the prompt"),
        ("a.json", json.dumps([FLAT, {"requested_rewrite": 5}]), "record 1: malformed counterfact record"),
        ("a.json", json.dumps([FLAT, QUESTION]), "record 1: is a question record and those before are flat"),
        ("a.json", "[" * 100_000, "not readable as JSON .*nested too deeply"),
    ],
)
def test_bad_data_is_refused_with_its_record(tmp_path: Path, name: str, content: str, part: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=part) as caught:
        read_dataset(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(DataError, match="not a readable UTF-8"):
        read_dataset(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        read_dataset(str(tmp_path / "nowhere.json"))


def test_skip_bad_leaves_bad_records_out_and_lists_them(tmp_path: Path) -> None:
    lines = [FLAT, 5, flat(""), QUESTION, flat("Rome", case_id=0), flat("Oslo")]
    path = tmp_path / "a.jsonl"
    write(path, lines)
    with open(path, "a", encoding="utf-8") as sink:
        sink.write('{"prompt": "half')
    found = read_dataset(str(path), skip_bad=True)
    assert [r.subject for r in found.requests] == ["Bay", "Rome", "Oslo"]
    assert [b.number for b in found.bad] == [1, 2, 3, 6]
    assert found.to_json()["bad"][2]["reason"].startswith("is a question record")
    write(path, [5, 6])
    with pytest.raises(DataError, match=r"no usable record in it \(2 bad; the first: record 0"):
        read_dataset(str(path), skip_bad=True)


def test_a_case_id_that_an_earlier_record_has_gets_the_record_s_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qaedit = [{"id": 7, "prompt": f"{name} is in", "target": "Italy", "subject": name} for name in ("Bay", "Rome")]
    mixed = [flat("Bay", case_id=4), flat("Rome", case_id="4"), flat("Oslo", case_id=4.0), flat("Cork", case_id=None)]
    caplog.set_level("INFO")
    for records, ids in ((qaedit, [7, "7-1"]), (mixed, [4, "4-1", "4-2", 3])):
        caplog.clear()
        found = read_dataset(write(tmp_path / "a.json", records))
        assert [r.case_id for r in found.requests] == ids
        (line,) = caplog.messages
        assert (
            f"case ids given twice: {len(ids) - ids.count(3) - 1} got their record's number added; the first: " in line
        )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_ten_megabytes_in_one_line(tmp_path: Path, name: str) -> None:
    found = read_dataset(write(tmp_path / name, [flat("Bay", notes="x" * 10_000_000), flat("Rome")]))
    assert [request.subject for request in found.requests] == ["Bay", "Rome"]
    many = [flat(f"Bay{i}", ground_truth="x" * 10_000) for i in range(1_000)]
    assert len(read_dataset(write(tmp_path / "many.json", many)).requests) == 1_000


@pytest.mark.parametrize("subject", ["東京", "Zoë", "🦊", "👩‍👩‍👧", "São Paulo", "ב״ב", "C++"])
def test_subjects_of_any_script(tmp_path: Path, subject: str) -> None:
    for name in ("a.json", "a.jsonl"):
        (request,) = read_dataset(write(tmp_path / name, [flat(subject)])).requests
        assert (request.subject, request.subject_start) == (subject, 0)
        assert request.after == ", which is located in"


@pytest.mark.parametrize("name", METHODS)
def test_a_subject_that_is_not_in_the_prompt_matters_to_methods_that_look_it_up(name: str, tmp_path: Path) -> None:
    file = next(iter((ROOT / "hparams" / name).glob("smollm2-135m.yaml")), ROOT / "hparams/ROME/smollm2-135m.yaml")
    values = {key: value for key, value in read_yaml(file).items() if key != "if_c_rome"}
    hparams = hparams_class(name).from_dict({**values, "alg_name": name}, where="test")
    absent = [flat("Bay"), {**flat("Rome"), "subject": "Roma"}, {"prompt": "It is in", "target_new": "Italy"}]
    data = write(tmp_path / "a.json", absent)
    if METHODS[name].needs_subject:
        with pytest.raises(DataError, match=r"2 records have no place .* 'Roma' is not in the prompt .*--skip-bad"):
            plan(hparams, settings(data=data))
        assert [r.subject for r in plan(hparams, settings(data=data, skip_bad=True)).requests] == ["Bay"]
        return
    found = plan(hparams, settings(data=data))
    assert [(r.subject, r.prompt) for r in found.requests] == [
        ("Bay", "Bay, which is located in"),
        ("", "Rome, which is located in"),
        ("", "It is in"),
    ]


# Settings


def settings(**values: Any) -> RunSettings:
    return RunSettings.from_dict({"data": "d", **values}, "flags")


def test_selection() -> None:
    items = list(range(10))
    assert settings().select(items) == items
    assert settings(start=3, limit=4).select(items) == [3, 4, 5, 6]
    assert settings(start=8, limit=4).select(items) == [8, 9]
    once, again, other = (settings(shuffle=True, seed=s).select(items) for s in (1, 1, 2))
    assert once == again != other
    assert sorted(once) == items != once
    assert settings(shuffle=True, seed=1, start=2, limit=3).select(items) == once[2:5]
    with pytest.raises(ConfigError, match="start is 10, but d has 10 usable records"):
        settings(start=10).select(items)


def test_the_order_is_another_of_the_same_records(tmp_path: Path) -> None:
    """Two sentences of a relation, four subjects each, in turn: only `clustered` brings a sentence's together."""
    facts = [(f"City{n}", ("{} is in", "Where is {}? In")[n % 2]) for n in range(8)]
    texts = {"target_new": {"str": "Rome"}, "target_true": {"str": "Wales"}}
    records = [
        {"case_id": n, "requested_rewrite": {"subject": subject, "prompt": prompt, **texts}}
        for n, (subject, prompt) in enumerate(facts)
    ]
    data = read_dataset(write(tmp_path / "a.json", records))

    def order(**values: Any) -> list[int]:
        return [number for number, _ in chosen(data, settings(**values))[1]]

    assert order() == order(order="as-is") == list(range(8))
    for kind in ("random", "clustered"):
        orders = {tuple(order(order=kind, order_seed=seed)) for seed in range(6)}
        assert len(orders) > 3
        assert {tuple(sorted(one)) for one in orders} == {tuple(range(8))}
        switches = [sum(a % 2 != b % 2 for a, b in pairwise(one)) for one in orders]
        assert (max(switches) == 1) is (kind == "clustered")
        assert order(order=kind, order_seed=3) == order(order=kind, order_seed=3)
        assert sorted(order(order=kind, start=2, limit=3)) == [2, 3, 4]
    few = [sorted(order(shuffle=True, seed=4, limit=3, order="random", order_seed=seed)) for seed in range(3)]
    assert few == [sorted(order(shuffle=True, seed=4, limit=3))] * 3
    with pytest.raises(ConfigError, match="order_seed is 2 with order as-is; it belongs to random, clustered"):
        settings(order_seed=2)
    with pytest.raises(ConfigError, match="order is 'by date'"):
        settings(order="by date")


def chain(number: int, *facts: tuple[str, str]) -> dict[str, Any]:
    """A MQuAKE record of several edits: (subject, new answer)."""
    texts = {"prompt": "{} is in", "target_true": {"str": "Wales"}}
    edits = [{**texts, "subject": subject, "target_new": {"str": new}} for subject, new in facts]
    return {"case_id": number, "requested_rewrite": edits, "questions": ["Who?"], "new_answer": "I"}


def chains(tmp_path: Path, *counts: int) -> Dataset:
    """Records of so many edits each, of facts of their own."""
    records = [chain(n, *((f"City{n}{i}", "Rome") for i in range(count))) for n, count in enumerate(counts)]
    return read_dataset(write(tmp_path / "chains.json", records))


def test_records_are_chosen_whole_and_dealt_out_whole(tmp_path: Path) -> None:
    data, asked = chains(tmp_path, *COUNTS), settings(shuffle=True)
    assert (data.records[:5], data.first(2)) == ((0, 1, 1, 1, 2), list(data.requests[:4]))
    orders = []
    for seed in range(5):
        asked = replace(asked, seed=seed)
        whole = Plan(HyperParams(alg_name="ROME", model_name="m"), asked, *chosen(data, asked))
        few = chosen(data, replace(asked, start=1, limit=2))[1]
        assert few == list(whole.records)[1:3]
        assert [(number, len(own)) for number, own in whole.records] == [(n, COUNTS[n]) for n, _ in whole.records]
        shares = [whole.share(Rank(rank=rank, world=2)) for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == list(range(sum(COUNTS)))
        owner = [number for number, own in whole.records for _ in own]
        assert not {owner[place] for place in shares[0]} & {owner[place] for place in shares[1]}
        orders.append([number for number, _ in whole.records])
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize(
    ("counts", "size", "starts"),
    [
        ((1, 1, 1, 1, 1), 2, [0, 2, 4]),
        ((2, 2, 1), 3, [0, 2]),
        ((1, 3, 1), 2, [0, 1, 3]),  # a record that fits in no batch begins one
        ((2, 3, 1, 4), 4, [0, 2, 6]),
        ((3, 2), 1, [0, 1, 2, 3, 4]),
    ],
)
def test_a_record_s_edits_are_in_one_batch_where_they_fit(
    tmp_path: Path, counts: tuple[int, ...], size: int, starts: list[int]
) -> None:
    assert batched(chains(tmp_path, *counts).grouped(), size) == (starts, [])
    first_of = batch_of(tmp_path, {"batches": starts})
    steps = places(starts, sum(counts))
    assert [first_of(place) for step in steps for place in step] == [step[0] for step in steps for _ in step]
    assert [batch_of(tmp_path, {"batches": None})(n) for n in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"batches in manifest.json is \[\]; it is damaged"):
        batch_of(tmp_path, {"batches": []})


BAY, OSLO, OTHER = ("Bay", "Italy"), ("Oslo", "Rome"), ("Bay", "Wales")


@pytest.mark.parametrize(
    ("facts", "size", "out", "starts"),
    [
        ([[BAY], [OSLO], [OTHER], [BAY], [OTHER]], 5, [2, 4], [0]),  # a repetition is no contradiction
        ([[BAY], [OSLO], [OTHER], [OSLO]], 2, [], [0, 2]),  # in another batch a later fact overwrites
        ([[BAY], [OTHER, OSLO], [OSLO]], 3, [1], [0]),  # a record's questions need all its edits
        ([[OSLO], [BAY, OTHER], [BAY]], 2, [1], [0]),
    ],
)
def test_of_two_facts_of_a_batch_that_contradict_each_other_the_later_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, facts: Any, size: int, out: list[int], starts: list[int]
) -> None:
    data = read_dataset(write(tmp_path / "a.json", [chain(n, *own) for n, own in enumerate(facts)]))
    asked = settings(mode="batch", batch_size=size, skip_bad=True)
    left, records, found = chosen(data, asked)
    assert ([bad.number for bad in left.bad], found) == (out, starts)
    assert [number for number, _ in records] == [n for n in range(len(facts)) if n not in out]
    assert len(caplog.messages) == bool(out)
    assert chosen(data, settings(mode="sequential"))[0].bad == ()
    if out:
        said = rf"contradict an earlier .*: {len(out)}; the first: record {out[0]}: requests .*; --skip-bad leaves"
        with pytest.raises(DataError, match=said):
            chosen(data, replace(asked, skip_bad=False))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"mode": "both"}, "mode is 'both'"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more"),
        ({"batch_size": 5}, "batch_size is 5 with mode single"),
        ({"mode": "sequential", "batch_size": 5}, "batch_size is 5 with mode sequential"),
        ({"eval_every": 5}, "eval_every is set with mode single"),
        ({"stop_on_collapse": True}, "stop_on_collapse is set with mode single"),
        ({"limit": 0}, "limit is 0"),
        ({"start": -1}, "start is -1"),
        ({"together": 0}, "together is 0"),
        ({"screen_threshold": 0}, "screen_threshold is 0"),
        ({"on_collapse": "heal"}, "on_collapse is 'heal'"),
        ({"limt": 5}, "unknown key 'limt' for RunSettings; did you mean 'limit'"),
    ],
)
def test_settings_refused(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        settings(**values)


# The journal


def test_a_journal_cut_at_any_byte_keeps_every_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = [{"kind": "edit", "index": i, "text": "é🦊\n"} for i in range(3)]
    with Journal(path) as journal:
        for line in lines:
            journal.append(line)
    content = path.read_bytes()
    assert content.count(b"\n") == 3
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        assert list(read_journal(path)) == lines[:whole]
        with Journal(path) as journal:
            journal.append(lines[0])
        assert list(read_journal(path)) == [*lines[:whole], lines[0]]


def test_zeros_after_a_power_cut_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"index": 0}\n' + b"\0" * 50 + b"\n")
    assert list(read_journal(path)) == [{"index": 0}]


def test_damage_in_the_middle_is_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"index": 0}\n{"ind\n{"index": 2}\n')
    with pytest.raises(DataError, match=r"j\.jsonl, line 2: not JSON \(.*\), and more lines follow"):
        list(read_journal(path))
    with pytest.raises(DataError, match="line 2"):
        Journal(path)


@pytest.mark.parametrize(
    "content", [b"my only copy", b"my only copy\n", b"\x89PNG\0", b"[1]", b'{"a": 1}', b'{"a": 1}\n']
)
@pytest.mark.parametrize("of", [None, "tune", "trace", "protection"])
def test_a_file_that_is_no_journal_is_never_written(tmp_path: Path, content: bytes, of: str | None) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    if of is not None or not content.endswith(b"1}\n"):
        with pytest.raises((DataError, OutputError), match="mine"):
            Journal(path, of)
    assert path.read_bytes() == content


def test_a_full_disk_loses_nothing_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append({"index": 0})
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", _full)
            with pytest.raises(OutputError, match=r"No space left.*--resume"):
                journal.append({"index": 1})
        assert next(iter(read_journal(path))) == {"index": 0}


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


# Ranks


def test_shares_cover_everything_once() -> None:
    shares = [Rank(rank=r, world=3).share(range(10)) for r in range(3)]
    assert shares == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    env = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    assert rank_of(env) == Rank(rank=1, world=3, local=1)
    assert rank_of({}).journal == "results.jsonl"


def edit(index: int, collapsed: bool = False, denominator: float = 5.0, **changes: Any) -> dict[str, Any]:
    """A journal line with what the summary reads."""
    request = EditRequest.make(f"City{index} is in", subject=f"City{index}", target_new="Italy")
    guard = Guard(action="keep", kept=True) if collapsed else None
    options = {"ppl": 5000.0 if collapsed else 110.0, "before": 100.0, "locality": [0.5], "rephrase": None}
    options |= {"guard": guard, "request": request, "method": "M", "denominator": denominator}
    return fake_runs.edit_line(index, **{**options, **changes})


def run_of(folder: Path, lines: dict[str, list[dict[str, Any]]], **run: Any) -> Path:
    """A run folder made by hand: file -> lines."""
    folder.mkdir(exist_ok=True)
    config = {"hparams": {"model_name": "tiny", "ppl_sentence_num": 3}, "run": settings(**run).to_dict()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    manifest = {"method": "M", "selected": 4, "data": {"format": "flat", "bad": [], "sha256": "12ab"}}
    manifest |= {
        "model_fingerprint": "f",
        "context_templates": [],
        "sentences": None,
        "config_sha256": "34cd",
        "together": 8,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for file, own in lines.items():
        write(folder / file, own)
    return folder


def test_ranks_are_merged_in_order_each_line_once_also_again(tmp_path: Path) -> None:
    run = run_of(
        tmp_path, {"results.rank0.jsonl": [edit(0), edit(2)], "results.rank1.jsonl": [edit(3), edit(1), edit(2)]}
    )
    with open(run / "results.rank1.jsonl", "a", encoding="utf-8") as sink:
        sink.write('{"kind": "ed')  # torn
    kept = (run / "results.rank0.jsonl").read_bytes()
    merge(run)
    assert [line["index"] for line in read_journal(run / "results.jsonl")] == [0, 1, 2, 3]
    assert list(run.glob("results.rank*")) == []
    (run / "results.rank0.jsonl").write_bytes(kept)  # killed before the rank's journal was removed
    assert len(list(recorded(run))) == 4
    merge(run)
    assert len(list(read_journal(run / "results.jsonl"))) == 4


# Summary, screen, mining


def test_quality_by_hand() -> None:
    pairs = [(0.1, True), (0.5, False), (0.9, True), (3.0, True), (5.0, False), (8.0, False)]
    found = quality(pairs, 1.0)
    assert (found["true_positive"], found["false_positive"], found["false_negative"], found["true_negative"]) == (
        2,
        1,
        1,
        2,
    )
    assert (found["precision"], found["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert quality([(5.0, False)], 1.0) | {"precision": None, "recall": None} == quality([(5.0, False)], 1.0)


def test_summary_by_hand(tmp_path: Path) -> None:
    failed = FailureLine(index=3, step=4, case_id=3, prompt="p", mode="single", error="e").to_json()
    worst = edit(2, collapsed=True, denominator=-0.2, ppl=math.inf)
    run = run_of(tmp_path, {"results.jsonl": [edit(0), edit(1, collapsed=True, denominator=0.1), worst, failed]})
    found = summarise(run)
    assert found["counts"] | {"selected": 4, "edits": 3, "failed": 1, "collapsed": 2} == found["counts"]
    assert found["complete"]
    assert [(c["index"], c["ppl"], c["denominator"]) for c in found["collapsed"]] == [
        (2, math.inf, -0.2),
        (1, 5000.0, 0.1),
    ]
    assert found["metrics"]["rewrite_acc"] == {"before": 0.0, "after": 1.0, "edits": 3}
    assert found["metrics"]["locality_acc"] == {"before": None, "after": 0.5, "edits": 3}
    assert found["seconds"] == {"edit": 36.0, "metrics": 3.0, "perplexity": 18.0, "total": 60.0}
    assert found["edits_per_second"] == pytest.approx(0.05)
    assert (found["screen"]["precision"], found["screen"]["recall"]) == (1.0, 1.0)
    assert found["guard"] == {"policy": "keep", "actions": {"keep": 2}}
    assert found["ppl"]["before"] == 100.0


def test_collapsing_requests_become_a_dataset_and_unite(tmp_path: Path) -> None:
    marked = EditRequest.make("{} is City1 of", subject="City1", target_new="Italy")
    lines = [edit(0), edit(1, collapsed=True, request=marked), edit(2, collapsed=True, denominator=0.1)]
    records = collapsing(run_of(tmp_path / "a", {"results.jsonl": lines}))
    assert [r["case_id"] for r in records] == [0, 0]
    assert records[0]["prompt"] == "{} is City1 of"
    assert records[1]["collapses"] == [{"model": "tiny", "method": "M", "ppl": 5000.0, "denominator": 0.1}]
    for number, record in enumerate(records):
        record["case_id"] = number
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    write(one, records)
    read = read_dataset(str(one))
    assert read.requests[0].subject_start == 0
    other = {**records[1], "collapses": [{"model": "big", "method": "M", "ppl": 9.0, "denominator": 0.3}]}
    write(two, [other, {**flat("Rome"), "case_id": 5}])
    united = union([one, two])
    assert [(r["case_id"], r["subject"], len(r["collapses"])) for r in united] == [
        (0, "City1", 1),
        (1, "City2", 2),
        (2, "Rome", 0),
    ]
    assert read_dataset(write(tmp_path / "both.json", united)).format == "flat"


def test_a_request_without_a_subject_that_collapses_is_mined_and_united(tmp_path: Path) -> None:
    request = EditRequest.make("It is in", subject=None, target_new="Italy")
    line = edit(0, collapsed=True, request=request)
    records = collapsing(run_of(tmp_path / "a", {"results.jsonl": [line]}))
    united = union([Path(write(tmp_path / name, records)) for name in ("one.json", "two.json")])
    assert [r["prompt"] for r in united] == ["It is in"]


def test_runs_that_show_no_single_requests_collapse_give_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs of mode single"):
        collapsing(run_of(tmp_path, {}, mode="sequential"))
    write(tmp_path / "c.json", [COUNTERFACT])
    with pytest.raises(DataError, match="a union is made of flat records"):
        union([tmp_path / "c.json"])
