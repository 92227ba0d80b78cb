"""EasyEdit's and the papers' users: their scripts' calls, imports untouched, on tiny models; their arguments."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, build, rome_hparams, same, states, tokenizer
from script_runs import save_tiny, write_yaml

import easyeditor
from easyeditor import BaseEditor
from easyeditor.base.errors import ConfigError, DataError
from easyeditor.dataset.sentences import OFFICIAL, load_sentences
from easyeditor.methods.registry import load_hparams
from easyeditor.stats.store import StatsKey

FEW = {"v_num_grad_steps": 2, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 0}
FT: dict[str, Any] = {"alg_name": "FT", "layers": [1], "num_steps": 2, "lr": 1e-3, "device": "cpu"}
FT |= {"ppl_sentence_num": 0}
RECORDS = [
    {
        **{"case_id": n, "prompt": f"{subject} is a citizen of", "subject": subject, "target_new": target},
        **{"ground_truth": "France", "rephrase_prompt": f"{subject} comes from"},
        **{"locality_prompt": "The sea is", "locality_ground_truth": "blue"},
    }
    for n, (subject, target) in enumerate([("Arun Nehru", "Italy"), ("Danielle", "Spain"), ("Roland", "Norway")])
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as a user has it: a checkpoint, hparams/<METHOD>/tiny.yaml, data/."""
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "hugging_cache" / "tiny")
    for method in ("ROME", "FT", "MEND", "TRAINING/MEND"):
        (tmp_path / "hparams" / method).mkdir(parents=True)
    write_yaml(tmp_path / "hparams/ROME/tiny.yaml", "./hugging_cache/tiny", **FEW)
    (tmp_path / "hparams/FT/tiny.yaml").write_text(yaml.safe_dump({**FT, "model_name": str(model)}), encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return tmp_path


def columns(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The parallel lists that every script makes of its data."""

    def lists(**names: str) -> dict[str, list[Any]]:
        return {name: [record[key] for record in records] for name, key in names.items()}

    near = lists(prompt="locality_prompt", ground_truth="locality_ground_truth")
    named = lists(prompts="prompt", target_new="target_new", rephrase_prompts="rephrase_prompt", subject="subject")
    return {**named, "locality_inputs": {"neighborhood": near}}


def edit_shapes(metrics: list[dict[str, Any]], count: int) -> None:
    """EasyEdit's names and shapes."""
    assert [record["case_id"] for record in metrics] == list(range(count))
    for record in metrics:
        assert {"pre", "post", "time", "requested_rewrite"} <= record.keys()
        for state in ("pre", "post"):
            assert len(record[state]["rewrite_acc"]) == 1
        assert len(record["post"]["rephrase_acc"]) == 1
        assert len(record["post"]["locality"]["neighborhood_acc"]) == 1


# The papers' scripts


@pytest.mark.usefixtures("home")
def test_the_papers_single_case_script() -> None:
    from easyeditor import BaseEditor, FTHyperParams, MEMITHyperParams, MENDHyperParams, ROMEHyperParams

    assert all((FTHyperParams, MEMITHyperParams, MENDHyperParams))
    hparams = ROMEHyperParams.from_hparams("./hparams/ROME/tiny")
    editor = BaseEditor.from_hparams(hparams)
    before = states(editor.model)
    metrics, edited_model, _ = editor.edit(**columns(RECORDS[:1]), keep_original_weight=True)
    edit_shapes(metrics, 1)
    assert same(edited_model, before)


@pytest.mark.usefixtures("home")
def test_the_papers_mass_script_keeps_every_edit() -> None:
    from easyeditor import BaseEditor, ROMEHyperParams

    test_data = json.loads(Path("./data/records.json").read_text(encoding="utf-8"))
    hparams = ROMEHyperParams.from_hparams("./hparams/ROME/tiny")
    editor = BaseEditor.from_hparams(hparams)
    before = states(editor.model)
    metrics, edited_model, _ = editor.edit(**columns(test_data), keep_original_weight=False)
    edit_shapes(metrics, 3)
    assert not same(edited_model, before)
    Path("./results.json").write_text(json.dumps(metrics, indent=4), encoding="utf-8")


def test_the_papers_mend_script(home: Path) -> None:
    from easyeditor import CounterFactDataset, EditTrainer, MENDHyperParams, MENDTrainingHparams, ZsreDataset

    values = {"alg_name": "MEND", "model_name": "./hugging_cache/tiny", "device": "cpu", "ppl_sentence_num": 0}
    values |= {"inner_params": ["model.layers.3.mlp.down_proj.weight"], "rank": 4, "max_iters": 4, "val_steps": 2}
    values |= {"log_interval": 2, "val_interval": 2, "results_dir": "./results", "accumulate_bs": 1}
    (home / "hparams/TRAINING/MEND/tiny.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    zsre = [
        {
            **{"src": f"{r['subject']} lives in which country?", "subject": r["subject"], "alt": r["target_new"]},
            **{"pred": "France", "rephrase": f"Where does {r['subject']} live?", "answers": ["France"], "cond": "x"},
            **{"loc": "nq question: what is the sea", "loc_ans": "water"},
        }
        for r in RECORDS
    ]
    (home / "data/zsre.json").write_text(json.dumps(zsre), encoding="utf-8")
    hparams = MENDTrainingHparams.from_hparams("./hparams/TRAINING/MEND/tiny.yaml")
    train_ds = ZsreDataset("./data/zsre.json", config=hparams)
    eval_ds = ZsreDataset("./data/zsre.json", config=hparams)
    trainer = EditTrainer(config=hparams, train_set=train_ds, val_set=eval_ds)
    trainer.run()
    assert len(CounterFactDataset("./data/records.json", config=hparams)) == 3

    archive = next(path.parent for path in (home / "results/models/MEND").rglob("archive.json"))
    values = {"alg_name": "MEND", "model_name": "./hugging_cache/tiny", "device": "cpu", "archive": str(archive)}
    (home / "hparams/MEND/tiny.yaml").write_text(yaml.safe_dump({**values, "ppl_sentence_num": 0}), encoding="utf-8")
    editor = BaseEditor.from_hparams(MENDHyperParams.from_hparams("./hparams/MEND/tiny"))
    calls = {key: value for key, value in columns(RECORDS[:2]).items() if key != "subject"}
    metrics, _, _ = editor.edit(**calls, ground_truth=["France", "France"], sequential_edit=False)
    edit_shapes(metrics, 2)


# EasyEdit's


@pytest.mark.usefixtures("home")
def test_easyedits_knowedit_run(home: Path) -> None:
    from easyeditor import (
        FTHyperParams,
        IKEHyperParams,
        KNHyperParams,
        KnowEditDataset,
        LoRAHyperParams,
        MEMITHyperParams,
        MENDHyperParams,
        ROMEHyperParams,
        SERACHparams,
    )

    assert all((IKEHyperParams, KNHyperParams, LoRAHyperParams, MEMITHyperParams, MENDHyperParams, SERACHparams))
    known = [
        {
            "subject": "Arun Nehru",
            "prompt": "The country of Arun Nehru is",
            "target_new": "Italy",
            "ground_truth": ["India"],
            "portability": {"Reasoning": [{"prompt": "His capital is", "ground_truth": [["Rome"]]}]},
            "locality": {"Relation_Specificity": [{"prompt": "The sea is", "ground_truth": [["blue"]]}]},
        },
        {"concept": "Oslo", "text": "Oslo is in", "labels": "Spain", "locality": {}},
    ]
    (home / "data/know.json").write_text(json.dumps(known), encoding="utf-8")
    datas = KnowEditDataset("./data/know.json")

    def first(rows: Any) -> tuple[str, str]:
        return (rows[0]["prompt"], rows[0]["ground_truth"][0][0]) if isinstance(rows, list) else ("", "")

    def inputs(**keys: str) -> dict[str, Any]:
        pairs = {name: [first(data[key]) for data in datas] for name, key in keys.items()}
        return {n: {"prompt": [p for p, _ in of], "ground_truth": [a for _, a in of]} for n, of in pairs.items()}

    editing_hparams = {"FT": FTHyperParams, "ROME": ROMEHyperParams}["FT"]
    editor = BaseEditor.from_hparams(editing_hparams.from_hparams("./hparams/FT/tiny"))
    metrics, _, _ = editor.edit(
        prompts=[data["prompt"] for data in datas],
        target_new=[data["target_new"] for data in datas],
        subject=[data["subject"] for data in datas],
        locality_inputs=inputs(Relation_Specificity="locality_rs", Forgetfulness="locality_f"),
        portability_inputs=inputs(Subject_Aliasing="portability_s", reasoning="portability_r"),
        train_ds=datas,
        keep_original_weight=True,
    )
    assert [list(record["post"]["portability"]) for record in metrics] == [["reasoning_acc"], []]
    assert [len(record["post"]["locality"]) for record in metrics] == [2, 0]


@pytest.mark.usefixtures("home")
def test_easyedits_zsre_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="easyeditor.editing.easyedit")
    from easyeditor import BaseEditor, FTHyperParams, IKEHyperParams, ROMEHyperParams

    assert all((FTHyperParams, IKEHyperParams))
    editor = BaseEditor.from_hparams(ROMEHyperParams.from_hparams("./hparams/ROME/tiny"))
    hop = {"one_hop": {"prompt": ["Where is that?"] * 3, "ground_truth": ["Europe"] * 3}}
    metrics, _, _ = editor.edit(
        **columns(RECORDS),
        portability_inputs=hop,
        train_ds=None,
        keep_original_weight=True,
        pre_file=None,
        pre_edit=None,
        test_generation=True,
        eval_metric="ppl",
        summary_metrics=True,
        target_neg=["France"] * 3,
    )
    edit_shapes(metrics, 3)
    (message,) = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert "edit(): target_neg:" in message
    for record in metrics:
        for state, when in (("pre", "before"), ("post", "after")):
            assert record[state]["fluency"]["ngram_entropy"] > 1
            probability = record["probabilities"]["target_new"][when]
            assert record[state]["rewrite_ppl"] == [pytest.approx(1 / probability)]
    means = easyeditor.summary_metrics(metrics)["post"]
    entropies = [record["post"]["fluency"]["ngram_entropy"] for record in metrics]
    assert means["fluency"]["ngram_entropy"] == pytest.approx(sum(entropies) / 3)
    assert means["rewrite_ppl"] == pytest.approx(sum(record["post"]["rewrite_ppl"][0] for record in metrics) / 3)
    assert any("means over 3 records" in r.getMessage() for r in caplog.records)
    assert editor.metrics == ()
    plain, _, _ = editor.edit(**columns(RECORDS[:1]), keep_original_weight=True, eval_metric="exact match")
    assert "fluency" not in plain[0]["post"]
    with pytest.raises(TypeError, match="no argument 'promts'"):
        editor.edit(**columns(RECORDS), promts=["x"])
    with pytest.raises(TypeError, match="did you mean 'keep_original_weight'"):
        editor.batch_edit(**columns(RECORDS), keep_original_weights=True)


@pytest.mark.usefixtures("home")
def test_easyedits_other_calls() -> None:
    editor = BaseEditor.from_hparams(easyeditor.ROMEHyperParams.from_hparams("./hparams/ROME/tiny"))
    before = states(editor.model)
    wanted, _, _ = editor.edit(**columns(RECORDS), ground_truth=["France"] * 3, keep_original_weight=True)
    dataset = easyeditor.CounterFactDataset("./data/records.json")
    found, model, _ = editor.edit_requests(RECORDS)
    listed, _, _ = editor.edit_dataset(dataset, keep_original_weight=True, test_generation=True)
    assert same(model, before)
    for one, other, third in zip(wanted, found, listed, strict=True):
        assert one["post"].items() <= third["post"].items()
        assert one["post"] == other["post"]
        assert third["post"]["fluency"]["ngram_entropy"] > 1
    _, model, _ = editor.edit_dataset(dataset)
    assert not same(model, before)
    for name in ("generate_edit", "normal_edit", "deep_edit"):
        with pytest.raises(ConfigError, match=rf"^BaseEditor\.{name}\(\) is not here; there are: edit, batch_edit"):
            getattr(editor, name)(["x"])


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("sequential", [True, False])
def test_easyedits_alphaedit_like_run(sequential: bool) -> None:
    from easyeditor import FTHyperParams, GraceHyperParams, ROMEHyperParams, WISEHyperParams, summary_metrics

    assert all((FTHyperParams, GraceHyperParams, WISEHyperParams))
    editor = BaseEditor.from_hparams(ROMEHyperParams.from_hparams("./hparams/ROME/tiny"))
    before = states(editor.model)
    several = {**columns(RECORDS), "locality_inputs": {"neighborhood": {"prompt": [["The sea is", "I"]] * 3}}}
    several["locality_inputs"]["neighborhood"]["ground_truth"] = [["blue", "am"]] * 3
    metrics, edited_model, _ = editor.edit(
        **several, keep_original_weight=True, sequential_edit=sequential, test_generation=True
    )
    assert same(edited_model, before) != sequential
    found = summary_metrics(metrics)
    wanted = sum(record["post"]["rewrite_acc"][0] for record in metrics) / 3
    assert found["post"]["rewrite_acc"] == pytest.approx(wanted)
    near = [value for record in metrics for value in record["post"]["locality"]["neighborhood_acc"]]
    assert found["post"]["locality"]["neighborhood_acc"] == pytest.approx(sum(near) / 6)


@pytest.mark.parametrize("name", ["KNHyperParams", "GraceHyperParams", "SERACTrainingHparams", "SafetyDataset"])
def test_what_is_not_here_says_so_at_the_call(name: str) -> None:
    absent = getattr(easyeditor, name)
    uses: list[Callable[[], Any]] = [
        absent,
        lambda: absent.from_hparams("./hparams/KN/gpt2-xl"),
        lambda: absent("x", size=3),
    ]
    for use in uses:
        with pytest.raises(ConfigError) as caught:
            use()
        assert str(caught.value).startswith(f"{name} is not here; there are: ")
        assert "ROMEHyperParams" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert name not in dir(easyeditor)
    with pytest.raises(AttributeError, match="no attribute 'ROMEHyperParam'"):
        easyeditor.ROMEHyperParam  # noqa: B018


# Arguments


@pytest.mark.parametrize("prompt", ["Bay is in", "Bay {} is in"])
def test_a_method_that_does_not_use_the_subject_needs_none(prompt: str) -> None:
    hparams = load_hparams({**FT, "model_name": (build("llama"), tokenizer())})
    editor = BaseEditor.from_hparams(hparams)
    metrics, _, _ = editor.edit([prompt, "The sea is"], ["Italy", "red"], sequential_edit=False)
    assert [record["requested_rewrite"]["subject"] for record in metrics] == ["", ""]
    assert metrics[0]["requested_rewrite"]["prompt"] == prompt
    named, _, _ = editor.edit("The sea is", "red", subject="sea", keep_original_weight=True)
    assert named[0]["trace"] == metrics[1]["trace"]


def test_a_subject_that_is_not_in_the_prompt_is_refused_only_by_methods_that_use_it() -> None:
    ft = BaseEditor.from_hparams(load_hparams({**FT, "model_name": (build("llama"), tokenizer())}))
    record = {"prompt": "The sea is", "subject": "seas", "target_new": "red"}
    assert ft.compute(record).requests[0].subject == ""
    metrics, _, _ = ft.edit("The sea is", "red", subject="seas", keep_original_weight=True)
    assert metrics[0]["requested_rewrite"]["subject"] == ""
    rome = BaseEditor(rome_hparams((build("llama"), tokenizer()), **FEW))
    for call in (lambda: rome.compute(record), lambda: rome.edit("The sea is", "red", subject="seas")):
        with pytest.raises(DataError, match="'seas' is not in the prompt 'The sea is'"):
            call()


def test_a_method_that_uses_the_subject_asks_for_it() -> None:
    editor = BaseEditor(rome_hparams((build("llama"), tokenizer()), **FEW))
    request = easyeditor.EditRequest.make("Bay is in", subject=None, target_new="Italy")
    for call in (lambda: editor.edit("Bay is in", "Italy"), lambda: editor.compute(request)):
        with pytest.raises(DataError, match="ROME needs the subject"):
            call()


def test_verbose_logs_every_record(caplog: pytest.LogCaptureFixture) -> None:
    editor = BaseEditor(rome_hparams((build("llama"), tokenizer()), **FEW))
    for verbose, count in ((True, 2), (False, 0)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="easyeditor.editing.easyedit"):
            editor.edit(**columns(RECORDS[:2]), keep_original_weight=True, verbose=verbose)
        shown = [r.getMessage() for r in caplog.records if r.name == "easyeditor.editing.easyedit"]
        assert len(shown) == count
        assert all("Arun Nehru is a citizen of → Italy" in message for message in shown[:1])
        assert all('"rewrite_acc"' in message for message in shown)


def test_me_ppl_is_found_in_the_working_directory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official = tmp_path / "data" / OFFICIAL[50]
    official.parent.mkdir(parents=True)
    official.write_text(json.dumps([{"Text": f"Sentence {n}."} for n in range(50)]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "package-data"
    assert load_sentences(50, beside).name == "ME-PPL_50"
    with pytest.raises(DataError, match=r"ME-PPL_1k\.json"):
        load_sentences(1000, beside)


# docs/compat.md


def test_statistics_are_found_under_either_spelling_of_the_folder(tmp_path: Path) -> None:
    named = {"model_name": "./hugging_cache/gpt2-xl", "module": "transformer.h.17.mlp.c_proj", "dataset": "wikipedia"}
    key = StatsKey(stats_dir=str(tmp_path), dtype="float32", samples=100, **named)
    assert len(key.paths) == len({path.parent for path in key.paths}) == 2
    for path in key.paths:
        path.parent.mkdir(parents=True)
        path.touch()
        assert key.find() == path
        path.unlink()


def test_each_line_of_what_is_the_same_names_tests_that_exist() -> None:
    text = (ROOT / "docs/compat.md").read_text(encoding="utf-8")
    same_part = text.partition("## What is the same")[2].partition("\n## ")[0]
    bullets = re.split(r"\n- ", same_part)[1:]
    assert len(bullets) > 10
    for bullet in bullets:
        named = re.findall(r"`(tests/test_\w+\.py)`:\s((?:\s*`test_\w+`,?)+)", bullet)
        assert named, f"no test is named: {bullet}"
        assert bullet.rstrip().endswith(").")
        for file, names in named:
            source = (ROOT / file).read_text(encoding="utf-8")
            for name in re.findall(r"test_\w+", names):
                assert f"def {name}(" in source, f"{file} has no {name}"
