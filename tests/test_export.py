"""Edits that leave for other tools: loaded by the foreign library, compared with the edit applied here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import _LLAMA, ARCHITECTURES, build, rome_hparams, states, tokenizer
from fake_runs import single_lines, write_run
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from script_runs import LOUD, QUICK, SUBJECTS, Ran, call, record_of, save_tiny, strict, write_yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from easyeditor import BaseEditor, EditRequest, EditResult
from easyeditor.base.errors import ConfigError, DataError
from easyeditor.commands import export as export_main
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.export.adapter import adapter_of
from easyeditor.export.sources import read_source
from easyeditor.export.write import export
from easyeditor.lm import embedded
from easyeditor.lm.weights import add, applied
from easyeditor.values.edit import WeightDelta

Script = Callable[..., Ran]
TEXT = "Bay, which is located in the north of"


def logits(model: Any) -> torch.Tensor:
    ids = tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits


def asked(subject: str, target: str = " Italy") -> EditRequest:
    return EditRequest.make(f"{subject}, which is located in", subject=subject, target_new=target, case_id=subject)


def loaded(base: PreTrainedModel, folder: Path) -> Any:
    """The adapter on its base, by peft, which keeps quiet only if every key of the file has its place."""
    return PeftModel.from_pretrained(base, folder)


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_peft_gives_the_logits_of_the_applied_edits(kind: str, tmp_path: Path) -> None:
    """Two edits of one weight and one of another layer: ranks 2 and 1, so one is padded."""
    model, tok = build(kind), tokenizer()
    edits = [
        BaseEditor(rome_hparams((model, tok), layers=[layer])).compute([asked(subject)])
        for layer, subject in ((1, "Bay"), (1, "Oslo"), (2, "Berlin"))
    ]
    deltas = [delta for edit in edits for delta in edit.deltas]
    made = export(model, tok, edits, tmp_path / "adapter", kind="adapter", base="tiny")
    assert made is not None
    assert [factors.rank for factors in made.factors] == [2, 1]
    plain = logits(model)
    with applied(model, deltas):
        expected = logits(model)
    assert float((expected - plain).abs().max()) > 0.01  # the edit shows
    torch.testing.assert_close(logits(loaded(build(kind), tmp_path / "adapter")), expected, rtol=1e-5, atol=1e-5)
    export(model, tok, edits, tmp_path / "merged", kind="merged", base="tiny")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_what_vllm_and_peft_read(tmp_path: Path) -> None:
    """Facts of both: names without the adapter's, alpha = r, one rank, no rank_pattern, Conv1D said."""
    for kind, module, inputs in (
        ("llama", "model.layers.1.mlp.down_proj", 48),
        ("gpt2", "transformer.h.1.mlp.c_proj", 128),
    ):
        pair = build(kind), tokenizer()
        edit = BaseEditor(rome_hparams(pair)).compute([asked("Bay")])
        export(*pair, [edit], tmp_path / kind, kind="adapter", base="org/base")
        config = strict((tmp_path / kind / "adapter_config.json").read_text())
        assert config == {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "org/base",
            "r": 1,
            "lora_alpha": 1,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": kind == "gpt2",
            "inference_mode": True,
            "modules_to_save": None,
            "target_modules": [module],
        }
        tensors = load_file(tmp_path / kind / "adapter_model.safetensors")
        stem = f"base_model.model.{module}"
        assert {name: tuple(value.shape) for name, value in tensors.items()} == {
            f"{stem}.lora_A.weight": (1, inputs),
            f"{stem}.lora_B.weight": (32, 1),
        }


def test_the_card_carries_the_licence_of_an_embedded_base(tmp_path: Path) -> None:
    """Gemma's terms go with whatever is made of it; of another base nothing is said."""
    pair = build("gemma3_text"), tokenizer()
    edit = BaseEditor(rome_hparams(pair)).compute([asked("Bay")])
    for base, name, licence in (
        ("gemma3-270m", "google/gemma-3-270m", "gemma"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("org/base", "org/base", None),
    ):
        export(*pair, [edit], tmp_path / base, kind="adapter", base=base)
        card = ModelCard.load(tmp_path / base / "README.md")
        assert (card.data.base_model, card.data.license) == (name, licence)
        assert ("a 4-bit copy" in card.text) == (licence is not None)
    pair[0].name_or_path = str(embedded.find("gemma3-270m").folder)  # as where it is loaded from there
    export(*pair, [edit], tmp_path / "named", kind="adapter", base="google/gemma-3-270m")
    assert ModelCard.load(tmp_path / "named/README.md").data.license == "gemma"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dense_change_is_cut_and_the_error_stated(kind: str) -> None:
    model = build(kind)
    name = "model.layers.1.mlp.down_proj.weight" if kind == "llama" else "transformer.h.1.mlp.c_proj.weight"
    torch.manual_seed(0)
    shape = tuple(model.get_parameter(name).shape)
    deltas = [WeightDelta(name=name, full=torch.randn(shape)), WeightDelta(name=name, full=torch.randn(shape))]
    whole = deltas[0].dense() + deltas[1].dense()
    with pytest.raises(ConfigError, match="--rank N"):
        adapter_of(model, deltas)
    errors = []
    for rank in (1, 8, 32):  # 32: the weight's own
        (made,) = adapter_of(model, deltas, rank).factors
        off = float((made.delta().dense() - whole).norm() / whole.norm())
        assert made.lost == pytest.approx(off, abs=1e-5)
        errors.append(made.lost)
    assert errors[0] > errors[1] > 0.1
    assert errors[2] == pytest.approx(0, abs=1e-12)


def test_more_directions_than_vllm_serves_need_a_rank_too() -> None:
    model, name = build("llama"), "model.layers.1.mlp.down_proj.weight"
    one = WeightDelta(name=name, left=torch.ones(32, 1), right=torch.ones(1, 48))
    assert adapter_of(model, [one] * 512).rank == 512
    with pytest.raises(ConfigError, match="513 directions, above 512"):
        adapter_of(model, [one] * 513)
    (made,) = adapter_of(model, [one] * 513, 4).factors
    torch.testing.assert_close(made.delta().dense(), torch.full((32, 48), 513.0))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_what_no_adapter_can_change_is_refused(name: str) -> None:
    model = build("llama", tie_word_embeddings=True)
    with pytest.raises(DataError, match=f"^{name} .*--to checkpoint"):
        adapter_of(model, [WeightDelta(name=name, full=torch.ones_like(model.get_parameter(name)))], 4)


# The scripts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a saved edit of it and of another model, a sequence whose third edit is taken back, a single run."""
    root = tmp_path_factory.mktemp("export")
    save_tiny(root / "llama")
    save_tiny(root / "gpt2", "gpt2")
    write_yaml(root / "rome.yaml", root / "llama", **QUICK)
    write_yaml(root / "gpt2.yaml", root / "gpt2", **QUICK)
    (root / "five.json").write_text(json.dumps([record_of(s) for s in SUBJECTS]), encoding="utf-8")
    (root / "oslo.json").write_text(json.dumps(record_of("Oslo")), encoding="utf-8")
    return root


@pytest.fixture
def script(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """script(module, *flags) -> Ran, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda module, *flags: call(module, list(flags), monkeypatch, capsys)


ASKED = ["--prompt", "Bay | x, which is located in", "--subject", "Bay", "--target-new", "<b>Italy"]


def exported(script: Script, *flags: Any) -> Ran:
    return script(export_main, *flags)


def test_a_saved_edit_becomes_each_kind_with_a_card_that_the_hub_reads(
    script: Script, place: Path, tmp_path: Path
) -> None:
    ran = script(
        single_case_edit,
        "--hparams",
        place / "rome.yaml",
        *ASKED,
        "--save-edit",
        "edit",
        "--save-model",
        "model",
        "--save-adapter",
        "adapter",
        "--json",
    )
    assert ran.code == 0
    for kind in ("adapter", "checkpoint", "merged"):
        assert exported(script, "edit", "--to", kind, "--output", f"new-{kind}").code == 0
    assert (
        load_file("adapter/adapter_model.safetensors").keys()
        == load_file("new-adapter/adapter_model.safetensors").keys()
    )
    whole, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "new-checkpoint"))
    for name, value in states(whole).items():
        assert torch.equal(value, states(again)[name])
    by_peft = logits(loaded(AutoModelForCausalLM.from_pretrained(place / "llama"), tmp_path / "adapter"))
    torch.testing.assert_close(by_peft, logits(whole), rtol=1e-5, atol=1e-5)
    for folder, relation, library in (
        ("adapter", "adapter", "peft"),
        ("new-adapter", "adapter", "peft"),
        ("model", "finetune", "transformers"),
        ("new-checkpoint", "finetune", "transformers"),
        ("new-merged", "finetune", "transformers"),
    ):
        card = ModelCard.load(tmp_path / folder / "README.md")
        found = (card.data.base_model, card.data.base_model_relation, card.data.library_name, card.data.pipeline_tag)
        assert found == ("llama", relation, library, "text-generation")
        assert {"model-editing", "rome"} <= set(card.data.tags)
        assert "| Bay \\| x, which is located in | Bay | &lt;b>Italy | – |" in card.text
        assert f"| rewrite_acc | 0.000 | {ran.json['post']['rewrite_acc'][0]:.3f} |" in card.text
        assert "**No collapse (perplexity" in card.text or "**Collapsed (perplexity" in card.text
        told = strict((tmp_path / folder / "edit.json").read_text(encoding="utf-8"))
        assert told["edits"][0]["requests"][0]["subject"] == "Bay"
        assert told["base_fingerprint"] == EditResult.load("edit").model_fingerprint


def test_a_dense_edit_needs_a_rank_and_what_was_asked_for_before_is_kept(script: Script, place: Path) -> None:
    text = yaml.safe_load((place / "rome.yaml").read_text(encoding="utf-8"))
    text = {key: text[key] for key in ("model_name", "device", "layers", "ppl_sentence_num")}
    Path("ft.yaml").write_text(yaml.safe_dump({**text, "alg_name": "FT", "lr": 1e-3, "num_steps": 3}))
    flags = ["--hparams", "ft.yaml", *ASKED, "--save-edit", "edit"]
    ran = script(single_case_edit, *flags, "--save-adapter", "adapter")
    assert ran.code == 2
    assert "rewrite accuracy" in ran.out  # the edit is measured and shown all the same
    assert "no exact adapter" in ran.err.splitlines()[-1]
    assert EditResult.load("edit").deltas[0].full is not None
    assert not Path("adapter").exists()
    ran = exported(script, "edit", "--to", "adapter", "--rank", "4", "--output", "adapter")
    assert ran.code == 0
    told = strict(Path("adapter/edit.json").read_text(encoding="utf-8"))
    ((module, lost),) = told["relative_error"].items()
    assert f"adapter of rank 4 on 1 module, cut, at most {lost:.3g} of a weight's change is lost" in ran.out
    assert f"| `{module}` | {lost:.3g} |" in Path("adapter/README.md").read_text(encoding="utf-8")


BATCH = ["--mode", "batch", "--batch-size", "2"]


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_a_whole_run_is_one_adapter(
    script: Script, place: Path, tmp_path: Path, mode: str, request: pytest.FixtureRequest
) -> None:
    how = ["--hparams", place / "rome.yaml", "--mode", "sequential"]
    if mode == "batch":
        how = ["--hparams", request.getfixturevalue("memit"), *BATCH]
    assert script(mass_edit, *how, "--data", place / "five.json", "--output", "run").code == 0
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    for folder in sorted((tmp_path / "run/deltas").iterdir()):
        add(model, EditResult.load(folder).deltas)
    ran = exported(script, "run", "--to", "adapter", "--output", "adapter")
    modules = {"sequential": "1 module", "batch": "2 modules"}[mode]  # ROME's layer, MEMIT's span
    assert (ran.code, ran.out) == (0, f"adapter of rank 5 on {modules}, exact\nadapter: adapter\n")
    by_peft = loaded(AutoModelForCausalLM.from_pretrained(place / "llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft), logits(model), rtol=1e-5, atol=1e-5)
    assert "5 edits together, after 5 requests of the run" in ModelCard.load(tmp_path / "adapter/README.md").text
    assert exported(script, "run", "--to", "checkpoint", "--output", "model").code == 0
    whole = states(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert all(torch.equal(value, states(model)[name]) for name, value in whole.items())


def test_what_only_later_edits_need_is_not_read_for_an_export(
    script: Script, place: Path, request: pytest.FixtureRequest
) -> None:
    """Of MEMIT-Seq's edits the keys of every request, in float64: more than the change itself."""
    values = yaml.safe_load(request.getfixturevalue("memit").read_text(encoding="utf-8"))
    Path("seq.yaml").write_text(yaml.safe_dump({**values, "alg_name": "MEMIT-Seq"}), encoding="utf-8")
    flags = ["--hparams", "seq.yaml", *BATCH, "--data", place / "five.json", "--output", "run"]
    assert script(mass_edit, *flags).code == 0
    saved = [EditResult.load(folder) for folder in sorted(Path("run/deltas").iterdir())]
    assert all(edit.memory for edit in saved)
    edits = read_source(Path("run")).edits
    assert [edit.requests for edit in edits] == [edit.requests for edit in saved]
    assert not any(edit.memory for edit in edits)


@pytest.mark.usefixtures("touchy")
def test_an_edit_that_was_taken_back_is_not_exported(script: Script, place: Path, tmp_path: Path) -> None:
    flags = ["--hparams", place / "rome.yaml", "--data", place / "five.json", "--mode", "sequential", *LOUD]
    assert script(mass_edit, *flags, "--on-collapse", "revert", "--output", "run").code == 0
    standing = len(list((tmp_path / "run/deltas").iterdir()))
    assert standing < len(SUBJECTS)
    ran = exported(script, "run", "--to", "adapter", "--output", "adapter")
    if standing:
        assert ran.out.startswith(f"adapter of rank {standing} on 1 module,")
        assert len(strict((tmp_path / "adapter/edit.json").read_text(encoding="utf-8"))["edits"]) == standing
    else:
        assert ran.err == "error: run: no edit of this run was kept, so there is nothing to export\n"


def test_the_card_says_behind_what_the_prompt_was_tested(script: Script, place: Path) -> None:
    flags = ["--hparams", place / "rome.yaml", "--set", "if_c_rome=true", "if_prefix=true", *ASKED]
    ran = script(single_case_edit, *flags, "--save-adapter", "adapter", "--json")
    assert ran.code == 0
    said = f"Measured: this edit alone, its prompt behind the prefix {ran.json['test_prefix']!r}."
    assert said in ModelCard.load("adapter/README.md").text


def test_several_edits_one_model(script: Script, place: Path, tmp_path: Path) -> None:
    """The second was saved without its record, as Python's `save` does: the card says what was measured of which."""
    for folder, words in (("one", ASKED), ("two", ["--request", place / "oslo.json"])):
        assert script(single_case_edit, "--hparams", place / "rome.yaml", *words, "--save-edit", folder).code == 0
    Path("two/result.json").unlink()
    assert exported(script, "one", "two", "--to", "adapter", "--output", "both").code == 0
    assert strict(Path("both/adapter_config.json").read_text())["r"] == 2
    card = ModelCard.load("both/README.md").text
    assert card.count("Measured: this edit alone") == 1
    assert "the edits were not measured all together" in card


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["nothing", "--to", "adapter"], ["nothing: no edit is here", "--save-edit"]),
        (["empty", "--to", "adapter"], ["empty: no edit is here"]),
        (["broken", "--to", "adapter"], ["broken: not a whole saved edit"]),
        (["run", "--to", "adapter"], ["run: a run of one edit", "--save-edit"]),
        (["single", "--to", "adapter"], ["single: a run of mode single"]),
        (["edit", "--to", "adapter", "--rank", "0"], ["--rank is 0"]),
        (["edit", "--to", "adapter", "--rank", "513"], ["--rank is 513"]),
        (["edit", "--to", "adapter", "--model", "./gpt2"], ["model.layers.1.mlp.down_proj.weight", "another model"]),
        (["edit", "--to", "checkpoint", "--model", "./wide"], ["shape (32, 48)", "(32, 64)"]),
        (["edit", "--to", "adapter", "--model", "./seeded"], ["edit was computed on other weights than ./seeded has"]),
        (["edit", "--to", "merged", "--model", "./seeded", "--dtype", "bfloat16"], ["other weights than ./seeded"]),
        (["edit", "./edit", "--to", "adapter"], ["an edit is named twice"]),
        (["edit", "other", "--to", "adapter"], ["no one base model", "--model"]),
        (["python", "--to", "adapter"], ["no one base model", "a model that Python had loaded", "--model"]),
        (["edit", "--to", "adapter", "--output", "edit/new"], ["--output edit/new lies in EDIT edit"]),
        (["edit", "--to", "checkpoint", "--output", "llama/new"], ["lies in --model"]),
        (["edit", "--to", "adapter", "--output", "full"], ["full: is there already and not an empty folder"]),
        (["edit", "--to", "checkpoint", "--output", "full"], ["full: is there already and not an empty folder"]),
        (["edit", "--to", "onnx"], ["--to", "adapter"]),
        (["dense", "--to", "adapter"], ["--rank N", "--to checkpoint"]),
        (["dense", "--to", "merged"], ["--rank N", "--to checkpoint"]),
    ],
)
def test_bad_input_is_one_line_and_costs_nothing(
    script: Script, bad: Path, flags: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad)
    before = {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
    ran = exported(script, *flags, *([] if "--output" in flags else ["--output", "new"]))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
    assert [part for part in parts if part not in ran.err] == [], ran.err
    assert {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def bad(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that are no edit, edits of two models, and a dense one."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("llama", "gpt2"):
        shutil.copytree(place / name, root / name)
    save_tiny(root / "wide", intermediate_size=64)
    save_tiny(root / "seeded", seed=3)
    for folder, kind in (("edit", "llama"), ("other", "gpt2")):
        pair = AutoModelForCausalLM.from_pretrained(root / kind), tokenizer()
        edit = BaseEditor(rome_hparams(pair)).compute([asked("Bay")])
        edit.save(root / "python")
        replace(edit, hparams={**edit.hparams, "model_name": str(root / kind)}).save(root / folder)
    whole = replace(EditResult.load(root / "edit"), traces=({},))
    dense = WeightDelta(name=whole.deltas[0].name, full=torch.ones(32, 48))
    replace(whole, deltas=(dense,)).save(root / "dense")
    (root / "empty").mkdir()
    for folder, file in (("full", "note.txt"), ("broken", "edit.safetensors"), ("run", "result.json")):
        (root / folder).mkdir()
        (root / folder / file).write_text("{}")
    write_run(root / "single", single_lines(3))
    return root


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"depth": 1, "num_heads": 2, "image_size": 16, "patch_size": 8, "out_hidden_size": 32}


@pytest.mark.parametrize(("kind", "whole"), [("gemma3", True), ("qwen3_5", False)])
def test_a_multimodal_model_is_saved_whole_or_what_is_left_out_is_said(
    kind: str,
    whole: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """transformers loads all of Gemma 3 as a causal model, and of Qwen3.5 the language model alone."""
    text = {**_LLAMA, "vocab_size": 400, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    base = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, text_config=text, vision_config=VISION))
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    yaml = write_yaml(tmp_path / "rome.yaml", "base", ppl_sentence_num=0)
    monkeypatch.chdir(tmp_path)
    ran = call(single_case_edit, ["--hparams", yaml, "--save-model", "saved"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    card = (tmp_path / "saved/README.md").read_text(encoding="utf-8")
    assert ("alone is loaded and saved; left out: vision" in caplog.text, "Left out: vision." in card) == (
        not whole,
        not whole,
    )
    saved, first = load_file(tmp_path / "saved/model.safetensors"), load_file(tmp_path / "base/model.safetensors")
    assert (saved.keys() == first.keys()) is whole
    if whole:
        changed = [name for name in first if not torch.equal(first[name], saved[name])]
        assert changed == ["language_model.model.layers.1.mlp.down_proj.weight"]
