"""The seam for methods: rows and variants, the worked example of docs/add-a-method.md, memory of committed edits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, build, rome_hparams, same, states, tokenizer
from golden_numbers import MODELS, pair, read, request
from script_runs import call, save_tiny

import easyeditor
from easyeditor import BaseEditor, EditRequest, EditResult, load_hparams
from easyeditor.base.errors import ConfigError
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.commands import report as report
from easyeditor.methods.registry import canonical, method_class
from easyeditor.methods.table import METHODS, MethodRow

SUBJECTS = ["Bay", "Roland", "Berlin", "Oslo"]
FACTS = [
    EditRequest.make("{}, which is located in", subject=subject, target_new=target)
    for subject, target in zip(SUBJECTS, ["Italy", "France", "Peru", "Chad"], strict=True)
]
SPENT = ("time", "seconds")

# Rows


def test_a_variant_is_a_row() -> None:
    """`alg_name: C-ROME` is ROME with `if_c_rome: true`, read, overridden and computed."""
    pair_ = (build("llama"), tokenizer())
    plain = rome_hparams(pair_)
    row = load_hparams({**plain.to_dict(), "model_name": pair_, "alg_name": "C_ROME", "if_c_rome": True})
    assert (row.alg_name, row.if_c_rome) == ("C-ROME", True)
    variant = plain.override(["alg_name=C-ROME"])
    assert (variant.if_c_rome, variant.if_prefix) == (True, True)
    booleans = plain.override(["if_c_rome=true"])
    editors = [BaseEditor(h) for h in (variant, booleans, plain)]
    assert [editor.method.title for editor in editors] == ["C-ROME", "C-ROME", "ROME"]
    made = [editor.compute(FACTS[0]).deltas[0].dense() for editor in editors]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_memit_seq_is_known_as_the_field_writes_it() -> None:
    for spelling in ("MEMIT_Seq", "MEMIT_seq", "memit_seq"):
        assert canonical(spelling) == "MEMIT-Seq"


def test_a_default_of_a_row_gives_way_and_a_preset_does_not() -> None:
    values = {**rome_hparams(("m", "t"), model_name="m").to_dict(), "alg_name": "C-ROME", "if_prefix": False}
    del values["if_c_rome"]
    assert load_hparams(values).if_prefix is False
    with pytest.raises(ConfigError, match="if_c_rome is False; allowed: True, which alg_name C-ROME stands for"):
        load_hparams({**values, "if_c_rome": False})
    with pytest.raises(ConfigError, match="key 'mom2_update_weight' is missing"):
        load_hparams({**values, "alg_name": "MEMIT"})


@pytest.mark.parametrize("name", METHODS)
def test_every_row_leads_somewhere(name: str) -> None:
    from easyeditor.methods.registry import hparams_class, method_class

    row = METHODS[name]
    assert issubclass(method_class(name), easyeditor.methods.base.EditMethod)
    assert getattr(easyeditor, hparams_class(name).__name__) is hparams_class(name)
    assert row.paper.startswith(("https://", "docs/"))
    assert {*row.preset, *row.defaults} <= set(hparams_class(name).__dataclass_fields__)


# The value search's rule of rest


MPES_PASSES = {  # passes of the six requests in ENCORE's published code at prob_cutoff -2 and -4
    "tiny-gpt2": {-2: [29, 12, 6, 40, 40, 9], -4: [31, 14, 8, 40, 40, 11]},
    "tiny-llama": {-2: [40, 8, 5, 40, 40, 23], -4: [40, 10, 7, 40, 40, 25]},
}


@pytest.mark.parametrize("cutoff", [-2, pytest.param(-4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_most_probable_early_stopping_ends_where_the_reference_does(model: str, cutoff: int) -> None:
    from easyeditor.methods.memit.method import MEMIT

    inputs = read("inputs.json")
    values = {**inputs["hparams"]["MEMIT"][model], "context_templates": inputs["context_templates_memit"]}
    values |= {"layers": [0], "v_num_grad_steps": 40, "clamp_norm_factor": 4.0}
    values |= {"early_stop": "mpes", "prob_cutoff": cutoff}
    values |= {"early_stop_rows": "prefixed"}  # the published code leaves the bare prompt out
    method = MEMIT(*pair(model), easyeditor.MEMITHyperParams.from_dict(values))
    found = method.values([request(n) for n in range(6)], method.parts.block(0), 0)
    assert [len(f.losses) for f in found] == MPES_PASSES[model][cutoff]


def test_most_probable_early_stopping_needs_no_cutoff() -> None:
    """`early_stop: mpes` alone takes ENCORE's four passes, in a file and by --set, for a method that is not ENCORE."""
    inputs = read("inputs.json")
    values = {**inputs["hparams"]["MEMIT"]["tiny-llama"], "context_templates": inputs["context_templates_memit"]}
    values |= {"layers": [0], "v_num_grad_steps": 40, "clamp_norm_factor": 4.0, "early_stop_rows": "prefixed"}
    values |= {"alg_name": "MEMIT", "model_name": pair("tiny-llama")}
    for h in (load_hparams({**values, "early_stop": "mpes"}), load_hparams(values).override(['early_stop="mpes"'])):
        assert h.prob_cutoff == -4  # type: ignore[attr-defined]
    method = method_class("MEMIT")(*pair("tiny-llama"), h)
    found = method.values([request(n) for n in range(1, 3)], method.parts.block(0), 0)  # type: ignore[attr-defined]
    assert [len(f.losses) for f in found] == MPES_PASSES["tiny-llama"][-4][1:3]
    off = load_hparams({**values, "early_stop": "mpes", "prob_cutoff": 0})
    given = load_hparams(values).override(["early_stop=mpes", "prob_cutoff=-2"])
    found_ = (off, off.override(["v_lr=0.1"]), given, load_hparams(values))
    assert [h.prob_cutoff for h in found_] == [0, 0, -2, -4]  # type: ignore[attr-defined]


# The worked example


def blocks() -> dict[str, str]:
    """The code blocks of docs/add-a-method.md by the file they belong to."""
    text = (ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```(?:python|yaml) (\S+)\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def ridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's method, installed as the page says; yields a folder with a model, a YAML and requests."""
    made = blocks()
    folder = tmp_path / "code" / "ridge"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    for name in ("hparams", "method"):
        (folder / f"{name}.py").write_text(made[f"easyeditor/methods/ridge/{name}.py"])
    monkeypatch.setattr(easyeditor.methods, "__path__", [*easyeditor.methods.__path__, str(folder.parent)])
    row = eval("{" + made["easyeditor/methods/table.py"] + "}", {"MethodRow": MethodRow})
    monkeypatch.setitem(METHODS, "Ridge", row["Ridge"])
    settings = yaml.safe_load(made["hparams/Ridge/smollm2-135m.yaml"])
    small = {"layers": [1, 2], "v_num_grad_steps": 3, "v_loss_layer": 3, "ppl_sentence_num": 2, "v_lr": 0.5}
    save_tiny(tmp_path / "llama")
    small |= {"model_name": str(tmp_path / "llama"), "device": "cpu", "context_templates": ["{}", "You. {}"]}
    (tmp_path / "ridge.yaml").write_text(yaml.safe_dump(settings | small))
    facts = [{"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new} for f in FACTS]
    (tmp_path / "four.json").write_text(json.dumps(facts))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("easyeditor.methods.ridge")]:
        del sys.modules[name]


def test_the_page_is_short() -> None:
    code = [code for name, code in blocks().items() if "/ridge/" in name]
    assert sum(len(text.splitlines()) for text in code) <= 60


@pytest.mark.parametrize(
    "flags", [[], ["--mode", "sequential", "--eval-every", 2], ["--mode", "batch", "--batch-size", 2]]
)
def test_the_page_s_method_runs_everywhere_and_goes_on_to_the_same_bits(
    flags: list[Any], ridge: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["--hparams", "ridge.yaml", "--data", "four.json", "--on-collapse", "revert", *flags]
    ran = call(mass_edit, [*begin, "--output", "whole"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    shutil.copytree("whole", "again")
    whole = Path("whole/results.jsonl").read_bytes().splitlines(keepends=True)
    Path("again/results.jsonl").write_bytes(b"".join(whole[:2]))
    shutil.rmtree("again/deltas/000003", ignore_errors=True)
    assert call(mass_edit, ["--resume", "again"], monkeypatch, capsys).code == 0
    assert timeless(lines(Path("again"))) == timeless(lines(Path("whole")))
    for saved in Path("whole").glob("deltas/*/edit.safetensors"):
        assert saved.read_bytes() == (Path("again") / saved.relative_to("whole")).read_bytes()
    monkeypatch.setattr(sys, "argv", ["report", "again"])
    with pytest.raises(SystemExit) as ended:
        report.run(report.main)
    assert ended.value.code == 0
    assert "Ridge" in next(Path("again/report").glob("*.html")).read_text(encoding="utf-8")


def test_the_page_s_method_edits_one_fact(
    ridge: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = call(single_case_edit, ["--hparams", "ridge.yaml", "--json", "--save-edit", "edit"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    assert ran.json["method"] == "Ridge"
    assert set(EditResult.load("edit").memory) == {"keys.1", "keys.2"}


# Memory


def memory_of(editor: BaseEditor) -> dict[int, torch.Tensor | None]:
    return {layer: editor.method.inverse(layer) for layer in editor.method.layers}


def test_what_was_taken_back_is_forgotten_to_the_bit(ridge: Path) -> None:
    """Memory and weights after commit a, b, c and revert b equal those after commit a, c; also with b loaded again."""
    editor = BaseEditor(load_hparams("ridge.yaml"))
    clean = states(editor.model)
    a, b, c = (editor.compute(fact) for fact in FACTS[:3])
    for edit in (a, c):
        editor.commit(edit)
    expected, weights = memory_of(editor), states(editor.model)
    assert all(value is not None for value in expected.values())
    editor.revert_all()
    assert memory_of(editor) == {1: None, 2: None}
    assert same(editor.model, clean)
    for edit in (a, b, c):
        editor.commit(edit)
    assert not all(torch.equal(memory_of(editor)[layer], expected[layer]) for layer in expected)
    editor.revert(EditResult.load(b.save("b")))
    assert same(editor.model, weights)
    assert all(torch.equal(memory_of(editor)[layer], expected[layer]) for layer in expected)


def test_a_remembered_edit_changes_the_next(ridge: Path) -> None:
    editor = BaseEditor(load_hparams("ridge.yaml"))
    first = editor.compute(FACTS[0])
    with editor.applied(first):  # in the model, and not remembered
        without = editor.compute(FACTS[1]).deltas[0].dense()
    editor.commit(first)
    remembered = editor.compute(FACTS[1]).deltas[0].dense()
    assert not torch.equal(without, remembered)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(value: Any) -> Any:
    """Without what the clock says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in SPENT}
    return [timeless(item) for item in value] if isinstance(value, list) else value
