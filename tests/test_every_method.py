"""Every row of the table through the same doors: all modes, whole and cut short; weights back; all architectures.

A new row is tested by being there: its settings are those of `SMALL` that its hyper-parameters know.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ARCHITECTURES, build, relative, same, states, tokenizer
from script_runs import call, save_tiny
from test_seam import FACTS, lines, timeless

from easyeditor import BaseEditor, load_hparams
from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.commands import mass_edit
from easyeditor.lm.architectures import Architecture
from easyeditor.lm.discover import anatomy
from easyeditor.methods.mend.archive import write_archive
from easyeditor.methods.mend.hparams import MENDHyperParams
from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights
from easyeditor.methods.mend.network import NetworkSpec
from easyeditor.methods.registry import hparams_class, method_class
from easyeditor.methods.table import METHODS

SMALL: dict[str, Any] = {
    "layers": [1, 2],
    "v_num_grad_steps": 2,
    "v_lr": 0.5,
    "v_loss_layer": 3,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4.0,
    "kl_factor": 0.0625,
    "context_templates": ["{}", "You. {}"],
    "mom2_adjustment": True,
    "mom2_update_weight": 10.0,
    "nullspace_scale": "relative",
    "nullspace_threshold": 0.5,
    "norm_anchor_value": 1.0,
    "num_steps": 2,
    "lr": 1e-3,
    "rank": 2,
    "k": 1,
}
"""Settings by key; a method takes those that it has."""
FILTERED: dict[str, dict[str, Any]] = {
    "MEMIT-Seq prune": {"filters": ["prune"], "mom2_update_weight": 1e-3},  # updates beyond the weight's own size
    "MEMIT-Seq held": {
        "held_own_templates": 2,
        "held_prompt_weight": 5.0,
        "held_short_weight": 5.0,
        "mom2_update_weight": 0.0,
    },
    "ROME rect revive": {"filters": ["rect", "revive"]},
}
"""Methods whose updates are filtered (some filters look at the weights before the first edit, and now), or that hold
more than C."""
ONE_LAYER = ("rome",)  # folders of methods that edit a single layer


@lru_cache
def parts_of(kind: str) -> Architecture:
    return anatomy(build(kind)).architecture


def settings(name_: str, kind: str, place: Path) -> dict[str, Any]:
    """Settings of a method (or of one of `FILTERED`) for a tiny model; statistics and an archive lie in `place`."""
    name = name_.partition(" ")[0]
    cls = hparams_class(name)
    known = {f.name for f in dataclasses.fields(cls)}
    rewrite = parts_of(kind).rewrite
    own = {
        **SMALL,
        "target_modules": [".".join(rewrite.split(".")[-2:])],
        "inner_params": [rewrite.format(1), rewrite.format(2)],
        "stats_dir": str(place / "stats"),
        "archive": str(place / f"archive-{kind}"),
        "demonstrations": str(place / "demonstrations.json"),
    }
    if "v_lr" not in known:
        del own["kl_factor"]  # fine-tuning has the key and no such term
    if "archive" in known:
        own["inner_params"] = None  # those of the archive
    if any(f".methods.{folder}." in METHODS[name].method for folder in ONE_LAYER):
        own["layers"] = [1]
    preset = METHODS[name].preset
    chosen = {key: value for key, value in own.items() if key in known and key not in preset}
    return {"alg_name": name, "device": "cpu", "ppl_sentence_num": 2, **chosen, **FILTERED.get(name_, {})}


@lru_cache
def supplies(kind: str, place: Path) -> Path:
    """Second moments of layers 1 and 2, a MEND archive, of a model whose name is `kind`."""
    model = build(kind)
    parts = anatomy(model)
    shown = [{"prompt": "Lugo is in", "subject": "Lugo", "target_new": "Mali", "rephrase_prompt": "One sees Lugo in"}]
    (place / "demonstrations.json").write_text(json.dumps(shown), encoding="utf-8")
    draw = np.random.default_rng(0)
    for layer in (1, 2):
        width = parts.key_width(layer)
        keys = draw.normal(size=(4 * width, width)) * np.linspace(0.1, 2, width)
        file = place / "stats" / kind / "wikipedia_stats" / f"{parts.rewrite_name(layer)}_float32_mom2_100000.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": len(keys)}
        np.savez(file, **{**arrays, "mom2.mom2": (keys.T @ keys).astype(np.float32), "sample_size": len(keys)})  # type: ignore[arg-type]
    spec = NetworkSpec.of(MENDHyperParams.from_dict({"model_name": "m", "rank": 2, "norm": False}))
    weights = edited_weights(parts, [parts.weight_name(layer) for layer in (1, 2)])
    net = Hypernetwork(spec, weights, edit_lr=0.02, generator=torch.Generator().manual_seed(0))
    write_archive(place / f"archive-{kind}", net.eval(), parts, training={"step": 0})
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


def editor(name: str, kind: str, place: Path, **more: Any) -> BaseEditor:
    model = build(kind)
    model.config.name_or_path = kind
    values = settings(name, kind, supplies(kind, place)) | more
    return BaseEditor.from_hparams(load_hparams({**values, "model_name": (model, tokenizer()), "ppl_sentence_num": 0}))


# Modes


MODES: dict[str, list[Any]] = {
    "single": ["--mode", "single"],
    "sequential": ["--mode", "sequential", "--eval-every", 2],
    "batch": ["--mode", "batch", "--batch-size", 2],
    "together": ["--mode", "single", "--measure", "together", "--together", 2],
}
RUNS = [
    pytest.param(name, mode, id=f"{name}-{mode}", marks=[] if mode == "batch" else [pytest.mark.slow])
    for name in (*METHODS, *FILTERED)
    for mode in MODES
]


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_a_run_cut_short_goes_on_to_the_records_of_a_whole_one(
    name: str,
    mode: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of four edits (two batches) the first half is kept; what comes after is computed again, on its memory."""
    model = save_tiny(tmp_path / "llama")
    values = {**settings(name, "llama", supplies("llama", place)), "model_name": str(model)}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    facts = [{"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new} for f in FACTS]
    (tmp_path / "four.json").write_text(json.dumps(facts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    begin = ["--hparams", "small.yaml", "--data", "four.json", "--output", "whole", "--on-collapse", "revert"]
    ran = call(mass_edit, [*begin, *MODES[mode]], monkeypatch, capsys)
    name = name.partition(" ")[0]
    if mode == "batch" and not method_class(name).joint:
        said = f"error: mode batch with {name}: it edits one fact at a time; use mode sequential or single\n"
        assert (ran.code, ran.err) == (2, said)
        return
    assert ran.code == 0, ran.err
    whole = lines(Path("whole"))
    assert not [line for line in whole if "error" in line]
    shutil.copytree("whole", "again")
    journal = Path("whole/results.jsonl").read_bytes().splitlines(keepends=True)
    Path("again/results.jsonl").write_bytes(b"".join(journal[:2]))
    saved = sorted(Path("again/deltas").glob("*"))
    assert len(saved) == {"single": 0, "sequential": 4, "batch": 2, "together": 0}[mode]
    for folder in saved[1 if mode == "batch" else 2 :]:
        shutil.rmtree(folder)
    ran = call(mass_edit, ["--resume", "again"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    assert timeless(lines(Path("again"))) == timeless(whole)
    for folder in saved:
        edit = Path("whole/deltas") / folder.name / "edit.safetensors"
        assert edit.read_bytes() == (folder / "edit.safetensors").read_bytes()


# Weights


@pytest.mark.parametrize("name", [*METHODS, *FILTERED])
def test_edits_are_values_and_leave_the_weights_as_they_were(name: str, place: Path) -> None:
    """Computed on an untouched model, applied and taken off, committed and reverted: the same bits each time."""
    made = editor(name, "llama", place)
    before, modules = states(made.model), [id(module) for module in made.model.modules()]
    first = made.compute(FACTS[0] if not made.method.joint else FACTS[:2])
    assert same(made.model, before)
    with made.applied(first):
        assert same(made.model, before) != METHODS[name.partition(" ")[0]].writes
    assert same(made.model, before)
    made.commit(first)
    once = states(made.model)
    second = made.compute(FACTS[2])
    assert same(made.model, once)
    made.commit(second)
    made.revert(second)
    assert same(made.model, once)
    again = made.compute(FACTS[2])
    assert again.sha256() == second.sha256()
    made.revert_all()
    assert same(made.model, before)
    assert [id(module) for module in made.model.modules()] == modules
    hooks = [module for module in made.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []
    assert {delta.name for delta in first.deltas} == set(made.method.weight_names)


@pytest.mark.parametrize("name", METHODS)
def test_edited_models_measured_side_by_side_are_those_measured_alone(name: str, place: Path) -> None:
    """Of every method whose deltas are of low rank; the others' are left to be measured alone, as memories are."""
    made, asked = editor(name, "llama", place), FACTS[:2]
    results, before = made.compute_each(asked), made.measure(asked, [None] * 2)
    edits = [(fact, results[n], None, before.only([n])) for n, fact in enumerate(asked)]
    dense = any(delta.full is not None for result in results for delta in result.deltas) or not METHODS[name].writes
    for state, fact, result in zip(made.measure_many(edits), asked, results, strict=True):
        assert (state is None) == dense
        if state is not None:
            with made.applied(result):
                alone = made.measure([fact], [None]).answers.scored
            beside = state.evaluation.answers.scored
            assert beside.keys() == alone.keys()
            for pair, scored in alone.items():
                assert beside[pair].predicted == scored.predicted
                assert beside[pair].mean_log_probability == pytest.approx(scored.mean_log_probability, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_has_no_part_in_it_says_in_one_line(name: str, place: Path) -> None:
    made = editor(name, "llama", place)
    if made.method.screens:
        assert len(made.method.screen(FACTS[:2])) == 2
    else:
        with pytest.raises(ConfigError, match="has no denominator to screen by") as caught:
            made.method.screen(FACTS[:2])
        assert "\n" not in str(caught.value)
    assert made.method.remedy is None or made.method.remedied() is not None


# Architectures


QUICK = ("gemma2", "gpt2", "gptj")  # a norm after the MLP; turned weights; another block


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in ARCHITECTURES]
)
@pytest.mark.parametrize("name", METHODS)
def test_every_architecture_is_edited(name: str, kind: str, place: Path) -> None:
    made = editor(name, kind, place)
    before = states(made.model)
    result = made.compute(FACTS[0])
    assert same(made.model, before)
    for delta in result.deltas:
        assert bool(delta.dense().isfinite().all())
        assert delta.dense().shape == made.model.get_parameter(delta.name).shape
    assert set(result.trace) == set(made.method.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit", "EMMET", "UltraEdit"])
def test_a_narrow_model_is_edited_as_a_wide_one(name: str, dtype: torch.dtype, place: Path) -> None:
    """ROME, FT, LoRA and MEND in these types: the tests of their own."""
    wide = editor(name, "llama", place)
    narrow, _ = pair = (build("llama", dtype=dtype), tokenizer())
    narrow.config.name_or_path = "llama"
    made = BaseEditor.from_hparams(load_hparams({**wide.hparams.to_dict(), "model_name": pair}))
    before = states(narrow)
    found, expected = made.compute_each(FACTS[:2]), wide.compute_each(FACTS[:2])
    assert same(narrow, before)
    for one, other in zip(found, expected, strict=True):
        for delta, whole in zip(one.deltas, other.deltas, strict=True):
            assert delta.dense().dtype == torch.float32
            assert relative(delta.dense(), whole.dense()) < 0.4
    made.commit(found[0])
    assert {weight.dtype for weight in narrow.parameters()} == {dtype}
    made.revert(found[0])
    assert same(narrow, before)


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("kind", ["olmo2", "phi3"])
@pytest.mark.parametrize("name", METHODS)
def test_a_type_that_is_not_known_is_edited(name: str, kind: str, named: bool, place: Path) -> None:
    """docs/add-a-model.md: with the three names, or without, every method runs."""
    parts = parts_of(kind)
    names = {"layer_module_tmp": parts.block, "mlp_module_tmp": parts.mlp, "rewrite_module_tmp": parts.rewrite}
    made = editor(name, kind, place, **(names if named else {}))
    assert made.method.parts.architecture.rewrite == "model.layers.{}.mlp.down_proj"
    (result,) = made.compute_each(FACTS[:1])
    assert any(float(delta.dense().norm()) > 0 for delta in result.deltas) or name == "UltraEdit" or result.facts


def test_a_wrong_name_of_a_module_is_one_line(place: Path) -> None:
    for name in ("LoRA", "UltraEdit", "MEND"):
        with pytest.raises(ConfigError, match=r"layer_module_tmp: 'model.layer.{}' names no module.*near"):
            editor(name, "olmo2", place, layer_module_tmp="model.layer.{}")


@pytest.mark.parametrize("name", METHODS)
def test_a_mixture_of_experts_is_refused_by_every_method(name: str, place: Path) -> None:
    values = settings(name, "llama", supplies("llama", place))  # named, or found by their names
    for kind, told in (("qwen3_moe", "so are all layers here: take a dense model$"), ("deepseek_v2", "can be: 0$")):
        model = build(kind)
        hparams = load_hparams({**values, "model_name": (model, tokenizer())})
        make: Any = partial(BaseEditor.from_hparams, hparams)
        if not METHODS[name].writes and kind == "deepseek_v2":  # no layer is edited, and one is dense
            assert make().compute(FACTS[0]).facts
            continue
        if (name, kind) == ("MEND", "deepseek_v2"):  # no archive of one can be trained
            make = partial(edited_weights, anatomy(model), ["model.layers.1.mlp.down_proj.weight"])
        with pytest.raises(ModelError, match=rf"layer [01] is a mixture of experts \(mlp.experts\): .*{told}"):
            make()
